"""Trainings of priors that are told captions, attributes or vectors of images: killed at any moment, and by two processes."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import safetensors.numpy
import torch
import yaml

from stages import train_prior
from tessera.artifacts import checkpoints
from tessera.artifacts import folder as artifact
from tessera.artifacts.images import write_meta
from tessera.artifacts.shards import ShardWriter
from tessera.components import load, parse
from tessera.contracts import ImageSpec, TokenSpec
from tessera.params import read
from tessera.running.job import Job

ROOT = Path(__file__).parents[2]
NUM, NUM_STEPS = 24, 16
PATIENCE = 240  # seconds, on a busy machine
GUIDE = {"snapshot_at": 0.4}
VQVAE = {
    "kind": "vqvae",
    "quantizer": {"kind": "vector", "codebook_size": 11, "code_dim": 3},
    "channels": 8,
    "num_blocks": 1,
    "patch_size": 4,
    "training": {"num_steps": 1},
}
CONDITIONS = {
    "caption": {"kind": "caption", "width": 16, "depth": 1, "heads": 2, "max_bytes": 8},
    "attributes": {"kind": "attributes", "numbers": {"size": [0, 9]}, "categories": {"style": ["a", "b"]}},
    "embedding": {"kind": "embedding", "embedding_dim": 6, "width": 16},
}
TRAIN = """
import os, sys
from pathlib import Path
import torch
from stages import train_prior
from tessera.params import read
from tessera.running.job import Job
from tessera.training import loop

folder, rank = Path(sys.argv[1]), int(os.environ.get("RANK", "0"))

def train():
    '''Each system that is not there yet; a point in the log for each step.'''
    torch.set_num_threads(1)
    params = read(folder / "params.yaml")
    for name in params.systems:
        if (folder / name).exists():
            continue
        job = Job(name, folder / f"state-{rank}" / name, is_main=rank == 0)
        job.checkpoint_seconds = 0  # after every step
        paths = [folder / each for each in ("images", "tokenizer", "tokens", name, f"{name}.csv", f"{name}.json")]
        train_prior.run(params, name, *paths, job)
"""
KILLED = f"""{TRAIN}
sys.path.append("tests/unit")
import kills
import pandas, pyarrow.dataset, pyarrow.parquet, torch._dynamo
read(folder / "params.yaml")  # it and what training imports once, and not in every child
log = os.open(folder / "log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
average = loop.update_average

def logged(*of):
    os.write(log, b".")
    average(*of)

loop.update_average = logged
kills.until_done(train, folder / "log", most=9, seed=2)
"""


@pytest.fixture
def place(tmp_path: Path, image_spec: ImageSpec, token_spec: TokenSpec) -> Path:
    """Tokens, and images of which something is said; some have several captions, some none, some attributes and vectors are
    missing."""
    draws = np.random.default_rng(0)
    with artifact.create(tmp_path / "tokens") as out:
        for split in ("train", "test"):
            (out / split).mkdir()
            indices = draws.integers(0, token_spec.codebook_size, (NUM, 1, *token_spec.index_grid))
            np.save(out / split / "indices-00000.npy", indices.astype(np.uint16))
            np.save(out / split / "labels-00000.npy", np.arange(NUM) % token_spec.num_classes)
        artifact.write_json(out / "meta.json", {"spec": token_spec.model_dump(), "num_views": 1})
    with artifact.create(tmp_path / "images") as out:
        rows = [{"split": split, "row": row, "kept": True} for split in ("train", "test") for row in range(NUM)]
        for row in rows:
            row["captions"] = [f"{row['row']}, {which}" for which in range(row["row"] % 4)]
            said = {"size": row["row"] % 10, "style": "ab"[row["row"] % 2] if row["row"] % 3 else None}
            row["attributes"] = json.dumps(said)
        vectors = draws.normal(size=(NUM, 6)).astype(np.float32)
        vectors[::5] = np.nan
        for split in ("train", "test"):
            with ShardWriter(out / split, "embeddings") as writer:
                writer.append(vectors)
        write_meta(out, image_spec, "0" * 64, pd.DataFrame(rows))
    config = parse(load("tokenizers", "vqvae").Config, VQVAE)
    with artifact.create(tmp_path / "tokenizer") as out:
        torch.manual_seed(0)
        model = load("tokenizers", "vqvae").Model(config, image_spec)
        checkpoints.save(out, "tokenizers", config, image_spec, model, "code")
    return tmp_path


def write_params(place: Path, **changes: Any) -> None:
    """One system for each condition, of a small prior with these changes."""
    raw = yaml.safe_load((ROOT / "params.yaml").read_text())
    training = {"num_steps": NUM_STEPS, "batch_size": 8, "learning_rate": 0.01}
    prior = {"kind": "masked", "width": 16, "depth": 1, "heads": 2, "training": training, **changes}
    raw["tokenizers"] = {"vqvae": VQVAE}
    raw["systems"] = {
        name: {"tokenizer": "vqvae", "prior": {**prior, "condition": condition}, "sampling": {}}
        for name, condition in CONDITIONS.items()
    }
    raw["follow_training"] = {"every": 0}
    (place / "params.yaml").write_text(yaml.safe_dump(raw, sort_keys=False))


def trained(place: Path, name: str, out: str) -> Path:
    """By this process, in one go."""
    folder = place / out
    folder.mkdir(exist_ok=True)
    beside = (place / "images", place / "tokenizer", place / "tokens")
    made = (folder / name, folder / f"{name}.csv", folder / f"{name}.json")
    train_prior.run(read(place / "params.yaml"), name, *beside, *made, Job(name, folder / "state" / name))
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_trainings_that_are_killed_at_any_moment_make_the_same_bits(place: Path) -> None:
    """With drop-out, and captions that are drawn anew: what is told in a step depends on the step alone."""
    write_params(place, dropout=0.1, label_dropout=0.2, guide=GUIDE)
    result = subprocess.run(
        [sys.executable, "-c", KILLED, str(place)], cwd=ROOT, capture_output=True, text=True, timeout=PATIENCE
    )
    assert result.returncode == 0, result.stderr
    kills, steps = int(result.stdout.split()[-1]), len((place / "log").read_bytes())
    assert all(f"{name}  resumed step" in result.stdout for name in CONDITIONS)
    # done twice, at most: the step before a kill, and the one before it, whose state was being written
    assert kills >= 5 and 0 < steps - len(CONDITIONS) * NUM_STEPS <= 2 * kills
    for name in CONDITIONS:
        whole = trained(place, name, "whole")
        assert contents(place / name) == contents(whole / name)
        assert (place / f"{name}.csv").read_bytes() == (whole / f"{name}.csv").read_bytes()
        assert {"told.json", "guide.safetensors"} <= contents(whole / name).keys()


def test_two_processes_train_the_priors_that_one_process_trains(place: Path, free_tcp_port: int) -> None:
    """The same global batch, nothing drawn: equal up to the order of additions."""
    index = pd.read_parquet(place / "images/index.parquet")
    with artifact.create(place / "again") as out:
        for split in ("train", "test"):
            shutil.copytree(place / "images" / split, out / split)
        index["captions"] = [[one[0]] if len(one) else [] for one in index.captions]  # none is chosen
        spec = ImageSpec(**artifact.read_json(place / "images/meta.json")["spec"])
        write_meta(out, spec, "0" * 64, index)
    (place / "images").rename(place / "before")
    (place / "again").rename(place / "images")
    write_params(place, kind="autoregressive", dropout=0.0, label_dropout=0.0, guide=GUIDE)
    shared = {**os.environ, "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_tcp_port)}
    both = [
        subprocess.Popen(
            [sys.executable, "-c", f"{TRAIN}\ntrain()", str(place)],
            cwd=ROOT,
            env=shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in (0, 1)
    ]
    said = [each.communicate(timeout=PATIENCE)[0] for each in both]
    assert [each.returncode for each in both] == [0, 0], said
    for name in CONDITIONS:
        alone = trained(place, name, "alone")
        losses = [pd.read_csv(folder / f"{name}.csv").loss for folder in (place, alone)]
        np.testing.assert_allclose(*losses, atol=1e-5)
        for file in ("weights", "guide"):
            weights = [safetensors.numpy.load_file(folder / name / f"{file}.safetensors") for folder in (place, alone)]
            for key, one in weights[0].items():
                assert np.abs(weights[1][key] - one).mean() < 1e-5, key

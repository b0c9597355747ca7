"""Encoding that is killed goes on where it was, and makes the bytes of one that was not; shards that grow."""

import json
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
import yaml
from test_validation import Fragile, Killed

from stages import encode_tokens
from tessera.artifacts import checkpoints, shards, tokens
from tessera.artifacts import folder as artifact
from tessera.artifacts.background import Behind, read_ahead
from tessera.artifacts.folder import ArtifactError
from tessera.artifacts.growing import Growing
from tessera.artifacts.shards import ShardWriter
from tessera.bases.optimization import Training
from tessera.components import load, parse
from tessera.params import read
from tessera.running.job import Job
from tessera.training.loop import fit

ROOT = Path(__file__).parents[2]
SHARD_BYTES = 2800  # 7 images of latents
VQVAE = {
    "kind": "vqvae",
    "quantizer": {"kind": "vector", "codebook_size": 16, "code_dim": 4},
    "channels": 8,
    "num_blocks": 1,
    "patch_size": 4,
    "training": {"num_steps": 1},
}
RUN = """
import os, sys, time
from pathlib import Path
sys.path.append("tests/unit")
import kills
import torch
from stages import encode_tokens
from tessera.artifacts import growing, shards
from tessera.params import read
from tessera.running.job import Job

folder, images = Path(sys.argv[1]), Path(sys.argv[2])
shards.SHARD_BYTES = int(sys.argv[3])
log = os.open(folder / "log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
append = growing.Growing.append

def slowly(self, stem, rows):
    time.sleep(0.003)
    append(self, stem, rows)
    if stem.endswith("labels"):
        os.write(log, f"{len(rows)}\\n".encode())

growing.Growing.append = slowly

def encode():
    torch.set_num_threads(1)
    job = Job("encode_tokens@vqvae", folder / "state")
    job.checkpoint_seconds = 3600  # only full shards are kept
    encode_tokens.run(read(folder / "params.yaml"), "vqvae", images, folder / "tokenizer", folder / "tokens", job)

kills.until_done(encode, folder / "log", most=12, seed=0)
"""


@pytest.fixture
def place(tmp_path, image_spec):
    """A checkout's worth of an encoding: params.yaml and an untrained tokenizer."""
    raw = yaml.safe_load((ROOT / "params.yaml").read_text())
    prior = {"kind": "masked", "width": 16, "depth": 1, "heads": 2, "training": {"num_steps": 1}}
    raw["tokenizers"] = {"vqvae": VQVAE}
    raw["systems"] = {"vqvae-masked": {"tokenizer": "vqvae", "prior": prior, "sampling": {}}}
    raw["encode_tokens"] |= {"warps": 2, "batch_size": 4}
    (tmp_path / "params.yaml").write_text(yaml.safe_dump(raw))
    config = parse(load("tokenizers", "vqvae").Config, VQVAE)
    torch.manual_seed(0)
    with artifact.create(tmp_path / "tokenizer") as out:
        model = load("tokenizers", "vqvae").Model(config, image_spec)
        checkpoints.save(out, "tokenizers", config, image_spec, model, "code")
    return tmp_path


def setting(place: Path, **encoding: Any) -> None:
    settings = yaml.safe_load((place / "params.yaml").read_text())
    settings["encode_tokens"] |= encoding
    (place / "params.yaml").write_text(yaml.safe_dump(settings))


def encode(place: Path, images: Path, out: str = "tokens", said: list | None = None) -> dict[str, bytes]:
    job = Job("encode_tokens@vqvae", place / "state")
    job.checkpoint_seconds = 3600
    job.say = (said if said is not None else []).append
    encode_tokens.run(read(place / "params.yaml"), "vqvae", images, place / "tokenizer", place / out, job)
    return contents(place / out)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_an_encoding_that_is_killed_at_any_moment_loses_at_most_a_shard_and_makes_the_same_bytes(
    place, images_folder, monkeypatch
):
    command = [sys.executable, "-c", RUN, str(place), str(images_folder), str(SHARD_BYTES)]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    kills, made = int(result.stdout.split()[-1]), contents(place / "tokens")
    monkeypatch.setattr(shards, "SHARD_BYTES", SHARD_BYTES)
    assert made == encode(place, images_folder, "whole") and len(made) > 12
    appended = sum(map(int, (place / "log").read_text().split()))
    assert kills >= 5 and 72 < appended <= 72 + kills * (7 + 4)  # a shard, and a batch that ends in the next one


def interrupted(place: Path, images: Path, monkeypatch) -> Path:
    """The state that an encoding leaves which fails at its sixth batch."""
    others, starts = encode_tokens.views.others, []

    def kept() -> list[int]:
        """How many batches each state that there is holds."""
        return [artifact.read_json(path)["position"]["num_batches"] for path in place.glob("state/*/tokens.json")]

    def failing(batch, settings, seed, split, start):
        starts.append(start)
        if len(starts) == 6:
            deadline = time.monotonic() + 60  # another thread writes: of the five before, four fill two shards
            while kept() != [4] and time.monotonic() < deadline:
                time.sleep(0.01)
            raise RuntimeError("killed")
        return others(batch, settings, seed, split, start)

    monkeypatch.setattr(shards, "SHARD_BYTES", SHARD_BYTES)
    with monkeypatch.context() as patched, pytest.raises(RuntimeError, match="killed"):
        patched.setattr(encode_tokens.views, "others", failing)
        encode(place, images)
    assert kept() == [4]
    (state,) = (place / "state").iterdir()
    return state


def test_what_was_kept_is_made_anew_when_a_bit_of_it_flipped_and_left_alone_when_anything_else_is_encoded(
    place, images_folder, monkeypatch
):
    state, said = interrupted(place, images_folder, monkeypatch), []
    kept = sorted((state / "tokens/train").glob("latents-*.npy"))[1]
    damaged = bytearray(kept.read_bytes())
    damaged[-1] ^= 1
    kept.write_bytes(damaged)
    made = encode(place, images_folder, said=said)
    assert f"is made anew: {kept} has rows of sha256" in said[0]
    assert made == encode(place, images_folder, "whole")
    setting(place, warp_shift=0.01)
    said.clear()
    assert encode(place, images_folder, said=said) != made and len(said) == 1


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_what_was_kept_is_used(place, images_folder, monkeypatch, dtype):
    setting(place, latents_dtype=dtype)
    interrupted(place, images_folder, monkeypatch)
    said = []
    made = encode(place, images_folder, said=said)
    assert "images, which were encoded before it was interrupted" in said[0]
    assert made == encode(place, images_folder, "whole")


@pytest.mark.parametrize("dtype", [np.uint8, np.int64, np.float32, np.float16, np.uint16])
@pytest.mark.parametrize("number", [1, 9, 10, 23])
def test_shards_that_grow_are_those_of_the_writer(tmp_path, dtype, number, monkeypatch):
    monkeypatch.setattr(shards, "SHARD_BYTES", 10 * 6 * np.dtype(dtype).itemsize)
    rows = np.random.default_rng(0).integers(0, 200, (number, 3, 2)).astype(dtype)
    with ShardWriter(tmp_path / "one/train", "a", shards.SHARD_BYTES) as writer:
        writer.append(rows)
    grown = Growing(tmp_path / "other", tmp_path / "other.json", 0.0)
    assert grown.restored(pytest.fail) is None
    for start in range(0, number, 4):
        grown.append("train/a", rows[start : start + 4])
        grown.append("train/a", rows[:0])
        grown.keep({"next": start + 4})
        grown.append("train/a", rows[:3])  # lost
        grown.append("train/b", rows)
        grown.finish()  # a stage that is killed while it ends
        grown = Growing(tmp_path / "other", tmp_path / "other.json", 0.0)
        assert grown.restored(pytest.fail) == {"next": start + 4}
    grown.finish()
    assert contents(tmp_path / "other") == contents(tmp_path / "one")


def test_sums_on_a_device_are_those_of_the_cpu_up_to_rounding():
    latents = torch.randn(7, 2, 3, 4, 5)
    of_cpu = encode_tokens.sums_of(latents)
    wide = latents.double()
    assert np.allclose(of_cpu, [wide.sum((0, 1, 3, 4)), wide.square().sum((0, 1, 3, 4))], rtol=1e-12)


def test_reading_ahead_and_writing_behind_keep_the_order_and_raise_what_fails():
    read, written = [], []
    for item in read_ahead(lambda item: read.append(item) or item, range(9), depth=2):
        assert item in read and len(read) <= item + 4
    assert read == list(range(9))
    with pytest.raises(ZeroDivisionError):
        list(read_ahead(lambda item: 1 // item, [2, 1, 0]))
    with Behind() as behind:
        for item in range(9):
            behind.call(written.append, item)
    assert written == list(range(9))
    with pytest.raises(ZeroDivisionError), Behind() as behind:
        behind.call(lambda: 1 // 0)


# Latents in float16 ---------------------------------------------------------------------------------------------------


def test_latents_in_float16_are_the_rounded_ones_on_half_the_disk_and_nothing_else_changes(place, images_folder):
    single = encode(place, images_folder, "single")
    setting(place, latents_dtype="float32")
    assert encode(place, images_folder, "default") == single and b"dtype" not in single["meta.json"]
    setting(place, latents_dtype="float16")
    half = encode(place, images_folder, "half")
    for name in ("train/latents-00000.npy", "test/latents-00000.npy"):
        wide, narrow = (np.load(place / folder / name) for folder in ("single", "half"))
        assert narrow.dtype == np.float16 and np.array_equal(narrow, wide.astype(np.float16))
        assert not np.array_equal(narrow, wide) and narrow.nbytes * 2 == wide.nbytes
    same = {name for name in single if half[name] == single[name]}
    assert single.keys() - same == {"manifest.json", "meta.json", "train/latents-00000.npy", "test/latents-00000.npy"}
    assert json.loads(half["meta.json"]) == json.loads(single["meta.json"]) | {"latents_dtype": "float16"}


def vouched(folder: Path) -> None:
    """A manifest that fits what was changed in an artifact."""
    manifest = {name: artifact.sha256(folder / name) for name in contents(folder) if name != artifact.MANIFEST}
    artifact.write_json(folder / artifact.MANIFEST, manifest)


def test_latents_beyond_float16_are_refused(place, images_folder):
    weights = place / "tokenizer/weights.safetensors"
    stored = safetensors.torch.load_file(weights)
    safetensors.torch.save_file(stored | {"encoder.head.bias": torch.full((4,), -7e4)}, weights)
    vouched(place / "tokenizer")
    setting(place, latents_dtype="float16")
    expected = r"latents reach 7e\+04, expected at most 65504, .* write encode_tokens.latents_dtype: float32"
    with pytest.raises(ValueError, match=expected):
        encode(place, images_folder)
    assert not (place / "tokens").exists()
    setting(place, latents_dtype="float32")
    assert encode(place, images_folder)
    edge = np.array([65504.0, -65504.0, 0.0], np.float32)
    assert np.array_equal(tokens.as_stored(edge, "float16"), edge)


@pytest.mark.parametrize(
    ("says", "why"),
    [
        ({}, "holds float16 .* expected rows of float32"),
        ({"latents_dtype": "float8"}, "latents_dtype: input should be"),
    ],
)
def test_an_artifact_with_latents_of_another_dtype_than_it_says_is_refused(place, images_folder, says, why):
    setting(place, latents_dtype="float16")
    encode(place, images_folder)
    assert tokens.read(place / "tokens", "latents")[1]["train"].values.dtype == np.float16
    meta = json.loads((place / "tokens/meta.json").read_text())
    artifact.write_json(place / "tokens/meta.json", {"spec": meta["spec"], "num_views": meta["num_views"]} | says)
    vouched(place / "tokens")
    with pytest.raises(ArtifactError, match=why):
        tokens.read(place / "tokens", "latents")


@pytest.mark.parametrize("on_device", [False, True])
def test_a_training_on_float16_is_that_on_the_rounded_latents_and_resumes_with_the_same_bits(
    place, images_folder, on_device
):
    encode(place, images_folder, "single")
    setting(place, latents_dtype="float16")
    encode(place, images_folder, "half")
    shutil.copytree(place / "single", place / "rounded")  # as float32, without the bits that float16 has no room for
    for path in (place / "rounded").rglob("latents-*.npy"):
        np.save(path, np.load(path).astype(np.float16).astype(np.float32))
    vouched(place / "rounded")
    training = Training(num_steps=6, batch_size=8, data_on_device=on_device)
    module = load("priors", "flow_matching")
    denoiser = {"kind": "transformer", "width": 16, "depth": 1, "heads": 2}
    config = parse(
        module.Config, {"kind": "flow_matching", "denoiser": denoiser, "training": training.model_dump(mode="json")}
    )

    def trained(folder: str, job: Job) -> dict[str, torch.Tensor]:
        spec, splits = tokens.read(place / folder, "latents")
        torch.manual_seed(0)
        job.resumable()
        objective = module.Objective(module.Model(config, spec), config)
        return fit(objective, splits["train"], training, seed=0, job=job).state_dict()

    whole, dying = trained("half", Job("whole", place / "whole")), Fragile("x", place / "parts", dies=4, saves=(3,))
    with pytest.raises(Killed):
        trained("half", dying)
    resumed, said = Job("x", place / "parts"), []
    resumed.say = said.append
    for other in (trained("half", resumed), trained("rounded", Job("y", place / "y"))):
        assert all(torch.equal(value, other[name]) for name, value in whole.items())
    assert "resumed step 3" in said
    plain = trained("single", Job("z", place / "z"))
    assert not all(torch.equal(value, plain[name]) for name, value in whole.items())

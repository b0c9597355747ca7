"""What lies between stages is checked before use: damage, mix-ups and foreign formats end in a sentence naming the file."""

import errno
import hashlib
import os
import pickle
import shutil
import subprocess
import sys
import threading
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import yaml
from safetensors import SafetensorError

from tessera.artifacts import checkpoints, images, recorded, samples, tokens, whole
from tessera.artifacts import folder as artifact
from tessera.artifacts.folder import ArtifactError
from tessera.artifacts.samples import Samples, quotas
from tessera.artifacts.shards import Shards, ShardWriter
from tessera.components import load, parse
from tessera.contracts import ImageSpec

CONFIG = {
    "kind": "vqvae",
    "quantizer": {"kind": "vector", "codebook_size": 16, "code_dim": 4},
    "channels": 8,
    "num_blocks": 1,
    "training": {"num_steps": 1},
}

TINY = ImageSpec(name="tiny", channels=1, height=16, width=8, num_classes=1, class_names=("a",), licence="none")
DRAWN = {
    "num_images": 4,
    "seed": 0,
    "sampling": {"guidance_scale": 1.5},
    "weights": "ema",
    "prior_fingerprint": "p" * 64,
    "tokenizer_fingerprint": "t" * 64,
}


@pytest.fixture
def tokenizer(tmp_path, image_spec):
    config = parse(load("tokenizers", "vqvae").Config, CONFIG)
    torch.manual_seed(0)
    with artifact.create(tmp_path / "tokenizer") as place:
        checkpoints.save(
            place, "tokenizers", config, image_spec, load("tokenizers", "vqvae").Model(config, image_spec), "code"
        )
    return tmp_path / "tokenizer"


@pytest.fixture
def token_folder(tmp_path, token_spec):
    with artifact.create(tmp_path / "tokens") as place:
        for split in ("train", "test"):
            for stem, rows in {
                "indices": np.arange(6 * 8, dtype=np.uint16).reshape(6, 1, 4, 2) % 11,
                "latents": np.ones((6, 1, 3, 4, 2), np.float32),
                "labels": np.arange(6) % 3,
            }.items():
                with ShardWriter(place / split, stem) as writer:
                    writer.append(rows)
        artifact.write_json(place / "meta.json", {"spec": token_spec.model_dump(), "num_views": 1})
    return tmp_path / "tokens"


@pytest.fixture
def sample_folder(tmp_path):
    with artifact.create(tmp_path / "samples") as place:
        with ShardWriter(place, "images") as writer, ShardWriter(place, "labels") as labels:
            writer.append(np.zeros((4, 1, 16, 8), np.uint8))
            labels.append(np.zeros(4, np.int64))
        artifact.write_json(place / "meta.json", DRAWN)
    return tmp_path / "samples"


READERS = {
    "tokenizer": lambda folder: checkpoints.load_model(folder, "tokenizers"),
    "images_copy": images.read,
    "token_folder": lambda folder: tokens.read(folder, "indices"),
    "sample_folder": lambda folder: Samples(folder, TINY),
}


@pytest.fixture
def images_copy(images_folder, tmp_path):
    return shutil.copytree(images_folder, tmp_path / "images")


@pytest.mark.parametrize("kind", READERS)
def test_one_flipped_bit_in_any_file_is_found_before_use(kind, request):
    folder = request.getfixturevalue(kind)
    READERS[kind](folder)
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    assert len(files) >= 3
    for path in files:
        whole = path.read_bytes()
        for offset in (0, len(whole) // 2, len(whole) - 1):
            broken = bytearray(whole)
            broken[offset] ^= 4
            path.write_bytes(broken)
            with pytest.raises(ArtifactError) as error:
                READERS[kind](folder)
            assert str(folder) in str(error.value) and "dvc repro" in str(error.value)
        path.write_bytes(whole)
    READERS[kind](folder)


@pytest.mark.parametrize("kind", READERS)
@pytest.mark.parametrize("damage", ["truncated", "empty", "missing"])
def test_damaged_files_are_named(kind, damage, request):
    folder = request.getfixturevalue(kind)
    for path in [path for path in sorted(folder.rglob("*")) if path.is_file()]:
        whole = path.read_bytes()
        if damage == "missing":
            path.unlink()
        else:
            path.write_bytes(whole[: len(whole) // 2] if damage == "truncated" else b"")
        with pytest.raises(ArtifactError, match=path.name):
            READERS[kind](folder)
        path.write_bytes(whole)


class Canary:
    """Unpickling it creates a file: if that file ever exists, something was unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (self.path, "w"))


@pytest.mark.parametrize("writer", ["pickle", "torch"])
def test_a_pickle_in_the_place_of_weights_is_refused_and_never_opened(tokenizer, tmp_path, writer):
    canary, weights = tmp_path / "canary", tokenizer / "weights.safetensors"
    if writer == "pickle":
        weights.write_bytes(pickle.dumps(Canary(str(canary))))
    else:
        torch.save({"a": Canary(str(canary))}, weights)
    manifest = {path.name: artifact.sha256(path) for path in tokenizer.iterdir() if path.name != artifact.MANIFEST}
    artifact.write_json(tokenizer / artifact.MANIFEST, manifest)  # even one that vouches for it
    with pytest.raises(ArtifactError, match="weights.safetensors is a pickle or a zip.*Expected safetensors"):
        checkpoints.load_model(tokenizer, "tokenizers")
    assert not canary.exists()


def test_an_artifact_of_another_kind_is_refused(tokenizer, sample_folder):
    with pytest.raises(ArtifactError, match="holds 'tokenizers', expected 'priors'"):
        checkpoints.load_model(tokenizer, "priors")


def test_a_missing_artifact_says_how_to_make_it(tmp_path):
    with pytest.raises(ArtifactError, match="does not exist.*dvc repro"):
        artifact.check(tmp_path / "nothing")


def test_weights_of_other_settings_are_refused(tokenizer):
    meta = artifact.read_json(tokenizer / "config.json")
    meta["config"]["channels"] = 16
    artifact.write_json(tokenizer / "config.json", meta)
    manifest = {path.name: artifact.sha256(path) for path in tokenizer.iterdir() if path.name != artifact.MANIFEST}
    artifact.write_json(tokenizer / artifact.MANIFEST, manifest)
    with pytest.raises(ArtifactError, match="does not fit its config.json"):
        checkpoints.load_model(tokenizer, "tokenizers")


def test_the_fingerprint_of_a_models_code_is_part_of_its_artifact(tokenizer):
    assert artifact.read_json(tokenizer / "config.json")["code"] == "code"


def test_a_prior_of_indices_is_refused_on_tokens_without_them(token_folder, token_spec):
    bare = token_spec.model_copy(update={"codebook_size": None})
    with pytest.raises(ArtifactError, match="holds no indices"):
        tokens.Tokens(token_folder, "train", bare, "indices")


def test_an_index_outside_the_codebook_is_refused(token_folder, token_spec):
    narrow = token_spec.model_copy(update={"codebook_size": 5})
    with pytest.raises(ArtifactError, match="outside the codebook of 5 codes"):
        tokens.Tokens(token_folder, "train", narrow, "indices").batch(torch.arange(6))


def batch(data, rows, generator=None):
    """As a training reads it."""
    return data.batch_of(data.stored(rows, generator))


@pytest.mark.parametrize("learns", ["indices", "latents"])
def test_tokens_held_on_a_device_are_the_tokens_on_disk(token_folder, token_spec, learns):
    stored = tokens.Tokens(token_folder, "train", token_spec, learns)
    rows, held = torch.tensor([5, 0, 3, 3]), stored.on(torch.device("cpu"))
    for generator in (None, 7):
        draws = [None if generator is None else torch.Generator().manual_seed(generator) for _ in range(2)]
        for a, b in zip(batch(stored, rows, draws[0]), batch(held, rows, draws[1]), strict=True):
            assert a.dtype == b.dtype and torch.equal(a, b)
    assert len(held) == len(stored)


def test_images_held_on_a_device_are_the_images_on_disk(images_folder):
    _, splits = images.read(images_folder)
    rows, held = torch.tensor([5, 0, 40]), splits["train"].on(torch.device("cpu"))
    for a, b in zip(batch(splits["train"], rows), batch(held, rows), strict=True):
        assert a.dtype == b.dtype and torch.equal(a, b)
    assert held.pixels.dtype == torch.uint8 and len(held) == len(splits["train"])


def test_latents_are_standardized_on_reading_and_back(token_spec):
    raw = torch.randn(2, 3, 4, 2)
    standard = tokens.standardize(raw, token_spec)
    torch.testing.assert_close(standard[:, 1], (raw[:, 1] - 1) / 2)
    torch.testing.assert_close(tokens.unstandardize(standard, token_spec), raw)


def test_an_interrupted_write_leaves_the_artifact_of_before(tmp_path):
    with artifact.create(tmp_path / "out") as place:
        (place / "a").write_text("old")
    with pytest.raises(RuntimeError), artifact.create(tmp_path / "out") as place:
        (place / "a").write_text("new")
        raise RuntimeError("killed")
    assert (artifact.check(tmp_path / "out") / "a").read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_new_artifact_takes_the_place_of_the_old_one_whole(tmp_path):
    for names in (("a", "b"), ("b", "c")):
        with artifact.create(tmp_path / "out") as place:
            for name in names:
                (place / name).write_text(name)
    assert sorted(path.name for path in artifact.check(tmp_path / "out").iterdir()) == ["b", "c", artifact.MANIFEST]


WRITERS = """
import resource, signal, sys
from pathlib import Path
import numpy as np, safetensors.torch, torch
from tessera.artifacts import folder as artifact
from tessera.artifacts import pictures, whole
from tessera.running.progress import History

def as_artifact(write):
    def make(path):
        with artifact.create(path) as place:
            write(place)
    return make

def history(path):
    for step in range(9):
        History(path, "a", 9, lambda *row: None, quiet=False).add(step, {"loss": 1.0}, 8)

def text(path):
    with whole.file(path) as beside:
        beside.write_text("<html>" + "x" * 9000)

rows = np.random.default_rng(0).integers(0, 255, (9, 3, 32, 32), dtype=np.uint8)
writers = {
    "metrics.json": lambda path: artifact.write_json(path, list(range(9000))),
    "page.html": text,
    "grid.png": lambda path: pictures.save_grid(path, rows, 3),
    "history.csv": history,
    "bytes": as_artifact(lambda place: (place / "a").write_bytes(b"x" * 9000)),
    "array": as_artifact(lambda place: np.save(place / "a.npy", rows)),
    "weights": as_artifact(lambda place: safetensors.torch.save_file({"a": torch.zeros(9000)}, place / "w.safetensors")),
}
root = Path(sys.argv[1])
artifact.write_json(root / "metrics.json", 7)
as_artifact(lambda place: (place / "a").write_text("old"))(root / "bytes")
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (40, 40))
for name, write in writers.items():
    try:
        write(root / name)
        print(name, "was written")
    except artifact.ArtifactError as error:
        print(str(error).replace(str(root) + "/", ""))
"""


def test_what_cannot_be_written_is_one_sentence_that_names_it_and_leaves_what_was_there(tmp_path):
    result = subprocess.run([sys.executable, "-c", WRITERS, str(tmp_path)], capture_output=True, text=True, timeout=60)
    names = ["metrics.json", "page.html", "grid.png", "history.csv", "bytes", "array", "weights"]
    lines = result.stdout.splitlines()
    assert [line.partition(" could not be written (")[0] for line in lines] == names, result
    assert all(line.endswith("then run the same command again") for line in lines), result
    assert (tmp_path / "metrics.json").read_text() == "7\n" and (
        artifact.check(tmp_path / "bytes") / "a"
    ).read_text() == "old"
    assert {path.name for path in tmp_path.iterdir()} <= {"metrics.json", "bytes", "history.csv"}  # rows are appended


def test_a_full_disk_is_told_with_the_bytes_that_are_free(tmp_path, monkeypatch):
    (tmp_path / "half").write_bytes(b"x" * 40)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=100))
    for reason in (OSError(errno.ENOSPC, "No space left"), OSError("8 requested and 4 written"), SafetensorError("no")):
        (tmp_path / "half").write_bytes(b"x" * 40)
        told = pytest.raises(ArtifactError, match=r"it needs more than the 140 bytes free in /.*; free some space")
        with told, whole.naming(tmp_path / "out", tmp_path / "half"):
            raise reason
        assert not (tmp_path / "half").exists()
    told = pytest.raises(ArtifactError, match=r"out could not be written \(Permission denied\); make it possible")
    with told, whole.naming(tmp_path / "out"):
        raise PermissionError(errno.EACCES, "Permission denied")


@pytest.mark.parametrize("link", [os.symlink, os.link])
def test_no_file_is_written_through_a_link_into_the_cache(tmp_path, link):
    (tmp_path / "cached").write_text("old")
    link(tmp_path / "cached", tmp_path / "metrics.json")
    artifact.write_json(tmp_path / "metrics.json", 7)
    assert (tmp_path / "cached").read_text() == "old"
    assert (tmp_path / "metrics.json").read_text() == "7\n" and not (tmp_path / "metrics.json").is_symlink()


def test_an_artifact_holds_what_its_manifest_names_and_nothing_else(tmp_path):
    with artifact.create(tmp_path / "out") as place:
        (place / "a").write_text("a")
    (tmp_path / "out/images-00001.npy").write_text("a shard more")
    with pytest.raises(ArtifactError, match=r"out/images-00001.npy is not among the files that .*manifest.json names"):
        artifact.check(tmp_path / "out")
    (tmp_path / "out/images-00001.npy").unlink()
    for manifest in ("{}", "[]", "[" * 100_000, "7"):
        (tmp_path / "out" / artifact.MANIFEST).write_text(manifest)
        with pytest.raises(ArtifactError, match=r"manifest.json (names no files|cannot be read)"):
            artifact.check(tmp_path / "out")


def recorded_outputs(root, **outputs):
    """A checkout in which each of these stages has written one file."""
    stages = {}
    for stage, path in outputs.items():
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_text(f"figures of {stage}")
        md5 = hashlib.md5((root / path).read_bytes()).hexdigest()
        stages[stage] = {"cmd": "true", "outs": [{"path": path, "hash": "md5", "md5": md5}]}
    (root / recorded.LOCK).write_text(yaml.safe_dump({"schema": "2.0", "stages": stages}))


def test_a_file_without_a_manifest_is_what_the_lock_says_that_its_stage_wrote(tmp_path, monkeypatch):
    monkeypatch.setattr(recorded, "PAUSE_SECONDS", 0.05)
    recorded_outputs(tmp_path, evaluate="metrics/gan.json", train="curves/gan.csv")
    figures, given = tmp_path / "metrics/gan.json", [tmp_path / "metrics", tmp_path / "absent"]
    recorded.require_as_written(given, tmp_path)
    before = figures.stat()
    damaged = bytearray(figures.read_bytes())
    damaged[3] ^= 1
    figures.write_bytes(damaged)
    os.utime(figures, ns=(before.st_atime_ns, before.st_mtime_ns))  # as a disk would do it
    with pytest.raises(
        ArtifactError, match=r"metrics/gan.json is not what evaluate wrote: its md5 is .*dvc commit --force evaluate"
    ):
        recorded.require_as_written(given, tmp_path)
    recorded.require_as_written([tmp_path / "curves"], tmp_path)
    recorded.require_as_written(given, tmp_path, but="evaluate")  # which is about to write it anew
    recorded.require_as_written(given, tmp_path, among={"train"})  # params.yaml has it no longer
    (tmp_path / recorded.LOCK).write_text("stages: {train: null, evaluate: {outs: null}, other: {outs: [null]}}")
    recorded.require_as_written(given, tmp_path)
    recorded_outputs(tmp_path, evaluate="metrics/gan.json", train="curves/gan.csv")
    figures.write_bytes(damaged)
    whole_lock = (tmp_path / recorded.LOCK).read_text()
    (tmp_path / recorded.LOCK).write_text(whole_lock[: whole_lock.index("md5: ") + 20])  # another dvc is writing it
    writer = threading.Timer(
        0.07, lambda: (figures.write_text("figures of evaluate"), (tmp_path / recorded.LOCK).write_text(whole_lock))
    )
    writer.start()
    recorded.require_as_written(given, tmp_path)
    writer.join()


def test_weights_that_are_not_finite_are_not_saved(tmp_path, image_spec):
    config = parse(load("tokenizers", "vqvae").Config, CONFIG)
    model = load("tokenizers", "vqvae").Model(config, image_spec)
    model.decoder.head.bias.data[0] = torch.nan
    with pytest.raises(ValueError, match="not finite: decoder.head.bias"), artifact.create(tmp_path / "out") as place:
        checkpoints.save(place, "tokenizers", config, image_spec, model, "code")
    assert not (tmp_path / "out").exists()


def test_shards_give_the_rows_asked_for_across_files(tmp_path):
    rows = np.random.default_rng(0).integers(0, 255, (103, 3, 2)).astype(np.uint8)
    with ShardWriter(tmp_path, "x", shard_bytes=60) as writer:
        for start in range(0, 103, 7):
            writer.append(rows[start : start + 7])
    shards = Shards(tmp_path, "x", np.uint8)
    assert len(list(tmp_path.glob("x-*.npy"))) == 11 and len(shards) == 103
    wanted = np.random.default_rng(1).integers(0, 103, 50)
    assert np.array_equal(shards.gather(wanted), rows[wanted]) and np.array_equal(shards.all(), rows)


def test_of_each_row_one_part_alone_is_gathered_across_shards(tmp_path):
    values = np.arange(14 * 3 * 2, dtype=np.int32).reshape(14, 3, 2)
    rows, parts = np.array([13, 0, 5, 5, 9]), np.array([2, 0, 1, 2, 1])
    for shard_bytes in (60, 10**6):
        with ShardWriter(tmp_path / str(shard_bytes), "x", shard_bytes=shard_bytes) as writer:
            writer.append(values)
        found = Shards(tmp_path / str(shard_bytes), "x", np.int32).gather(rows, parts)
        assert np.array_equal(found, values[rows, parts])


def test_uint8_survives_the_way_through_float_exactly():
    every = torch.arange(256, dtype=torch.uint8)
    assert torch.equal(images.to_uint8(images.to_float(every)), every)
    assert images.to_float(every).min() == -1 and images.to_float(every).max() == 1
    assert images.to_uint8(torch.tensor([-9.0, 9.0])).tolist() == [0, 255]


def test_quotas_follow_the_shares_and_sum_exactly():
    assert quotas(10, (1, 1, 1)).tolist() == [4, 3, 3]
    for total, counts in ((1000, (178, 182, 177, 183)), (7, (1, 1000)), (2, (5, 5, 5))):
        found = quotas(total, counts)
        assert found.sum() == total
        assert np.abs(found - total * np.array(counts) / sum(counts)).max() < 1
    assert samples.quotas(4, (0, 2, 2)).tolist() == [0, 2, 2]

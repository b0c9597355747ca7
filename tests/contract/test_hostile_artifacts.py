"""Artifacts by somebody else, whose manifest fits and whose contents do not: each ends in a sentence, and soon."""

import copy
import json
import random
import shutil
import struct
import time
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from test_artifacts import CONFIG, DRAWN

from tessera.artifacts import checkpoints, images, tokens
from tessera.artifacts import folder as artifact
from tessera.artifacts.samples import Samples
from tessera.artifacts.shards import ShardWriter
from tessera.components import load, parse
from tessera.contracts import ImageSpec
from tessera.evaluation.reference import Reference, write_moments
from tessera.metrics.frechet import moments

SPEC = ImageSpec(
    name="tiny", channels=1, height=16, width=8, num_classes=3, class_names=("a", "b", "c"), licence="none"
)
SECONDS = 5
PARTS = {
    "tokenizers": CONFIG,
    "features": {"kind": "random", "channels": 8, "feature_dim": 4},
    "priors": {"kind": "masked", "width": 16, "depth": 1, "heads": 2, "training": {"num_steps": 1}},
}


@pytest.fixture(scope="module")
def made(tmp_path_factory, images_folder, token_spec) -> Path:
    """One artifact of each kind."""
    root = tmp_path_factory.mktemp("made")
    shutil.copytree(images_folder, root / "images")
    for part, config in PARTS.items():
        module = load(part, config["kind"])
        settings, spec = parse(module.Config, config), token_spec if part == "priors" else SPEC
        with artifact.create(root / part) as place:
            checkpoints.save(place, part, settings, spec, module.Model(settings, spec), "code")
    with artifact.create(root / "tokens") as place:
        for split in ("train", "test"):
            indices = (np.arange(48, dtype=np.uint16) % 11).reshape(6, 1, 4, 2)
            rows = {"indices": indices, "latents": np.ones((6, 1, 3, 4, 2), np.float32), "labels": np.arange(6) % 3}
            for stem, values in rows.items():
                with ShardWriter(place / split, stem) as writer:
                    writer.append(values)
        artifact.write_json(place / "meta.json", {"spec": token_spec.model_dump(), "num_views": 1})
    with artifact.create(root / "samples") as place:
        with ShardWriter(place, "images") as writer, ShardWriter(place, "labels") as labels:
            writer.append(np.zeros((4, 1, 16, 8), np.uint8))
            labels.append(np.zeros(4, np.int64))
        artifact.write_json(place / "meta.json", DRAWN)
    with artifact.create(root / "reference") as place:
        features = np.random.default_rng(0).normal(size=(9, 4)).astype(np.float32)
        for split in ("train", "test"):
            with ShardWriter(place, f"features-{split}") as writer:
                writer.append(features)
            write_moments(place / f"{split}.npz", moments(features.astype(np.float64)))
        split = {"num_images": 9, "num_features": 9, "sha256": ""}
        meta = {"dataset": "tiny", "network": "random", "network_sha256": "", "resize": "none"}
        artifact.write_json(place / "meta.json", meta | {"splits": {"train": split, "test": split}})
    return root


def read_images(folder: Path) -> None:
    for split in images.read(folder)[1].values():
        split.stored(torch.arange(len(split)))


def read_tokens(folder: Path) -> None:
    for learns in ("indices", "latents"):
        for split in tokens.read(folder, learns)[1].values():
            split.stored(torch.arange(len(split)))


def read_reference(folder: Path) -> None:
    reference = Reference(folder)
    for split in ("train", "test"):
        reference.moments(split)
        reference.features(split)


READERS = {
    "images": read_images,
    "tokens": read_tokens,
    "samples": lambda folder: Samples(folder, SPEC, 4),
    "reference": read_reference,
    **{part: lambda folder, part=part: checkpoints.load_model(folder, part) for part in PARTS},
}
JSON = {kind: "config.json" if kind in PARTS else "meta.json" for kind in READERS}


def sealed(folder: Path) -> Path:
    """With a manifest that fits what is there now."""
    (folder / artifact.MANIFEST).unlink()
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    artifact.write_json(
        folder / artifact.MANIFEST, {path.relative_to(folder).as_posix(): artifact.sha256(path) for path in files}
    )
    return folder


def refusal(kind: str, folder: Path) -> str | None:
    """The sentence that the reader ends in; None if it takes the artifact."""
    began = time.monotonic()
    try:
        READERS[kind](sealed(folder))
        return None
    except ValueError as error:  # ArtifactError, InvalidParams
        sentence = str(error)
    finally:
        assert time.monotonic() - began < SECONDS
    assert str(folder) in sentence or "codebook" in sentence or "the tokens hold latents" in sentence
    assert len(sentence) < 1500
    return sentence


@pytest.fixture
def hostile(made, tmp_path):
    """kind -> a copy of the artifact, to be spoilt."""
    return lambda kind: shutil.copytree(made / kind, tmp_path / kind)


@pytest.mark.parametrize("kind", READERS)
def test_what_nobody_touched_is_taken(hostile, kind):
    assert refusal(kind, hostile(kind)) is None


VALUES = (
    "1" * 5000,
    "-1",
    "1000000000",
    "NaN",
    "1e999",
    "[" * 5000 + "]" * 5000,
    '"x"',
    "null",
    "[]",
    "{}",
    "true",
    "[0.5]",
)


def leaves(value: Any, path: tuple = ()) -> list[tuple]:
    if not isinstance(value, dict | list):
        return [path]
    inner = value.items() if isinstance(value, dict) else enumerate(value)
    return [path] * bool(path) + [leaf for key, each in inner for leaf in leaves(each, (*path, key))]


@pytest.mark.parametrize("kind", READERS)
@pytest.mark.parametrize("seed", range(5))
def test_any_value_of_its_json_may_be_anything(hostile, kind, seed):
    """Each value once in five seeds is what it should not be. What is no mistake is taken."""
    folder, chance = hostile(kind), random.Random(f"{kind}{seed}")
    path = folder / JSON[kind]
    good = json.loads(path.read_text())
    for leaf in [leaf for leaf in leaves(good) if chance.random() < 0.3][:12]:
        value = copy.deepcopy(good)
        inner = value
        for key in leaf[:-1]:
            inner = inner[key]
        how = chance.choice(("replaced", "replaced", "replaced", "missing", "unknown"))
        if how == "missing":
            del inner[leaf[-1]]
        elif how == "unknown" and isinstance(inner, dict):
            inner["unheard-of"] = 1
        else:
            inner[leaf[-1]] = "HERE"
        path.write_text(json.dumps(value).replace('"HERE"', chance.choice(VALUES)))
        told = refusal(kind, folder)
        assert told is None or "Traceback" not in told


SIZES = {
    "tokenizers": ["channels", "num_blocks", "patch_size", "quantizer.codebook_size", "quantizer.code_dim"],
    "priors": ["width", "depth"],
    "features": ["channels", "feature_dim"],
}


@pytest.mark.parametrize(("part", "key"), [(part, key) for part, keys in SIZES.items() for key in keys])
@pytest.mark.parametrize("size", [8 * 10**3, 8 * 10**8])
def test_a_network_larger_than_its_weights_is_never_built(hostile, part, key, size):
    folder = hostile(part)
    value = json.loads((folder / "config.json").read_text())
    *above, last = key.split(".")
    inner = value["config"]
    for step in above:
        inner = inner[step]
    inner[last] = size
    (folder / "config.json").write_text(json.dumps(value))
    told = refusal(part, folder)
    assert told and (
        "describes no network that its weights could fill" in told or "does not fit its config.json" in told
    )
    assert "Make it again" in told


def as_header(shape: tuple, dtype: str = "<i8") -> bytes:
    text = repr({"descr": dtype, "fortran_order": False, "shape": shape}).encode()
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text


def objects(path: Path, good: np.ndarray) -> None:
    np.save(path, np.array([{}] * len(good), object), allow_pickle=True)


def spoilt(change: Any) -> Any:
    return lambda path, good: np.save(path, change(good.copy()))


def changed(values: np.ndarray, value: Any) -> np.ndarray:
    values.flat[-1] = value
    return values


ARRAYS = {
    "objects": objects,
    "no dimension": spoilt(lambda good: np.array(3, good.dtype)),
    "another dtype": spoilt(lambda good: good.astype(np.float16)),
    "bytes swapped": spoilt(lambda good: good.astype(good.dtype.newbyteorder() if good.itemsize > 1 else ">i2")),
    "another shape": spoilt(lambda good: good.reshape(len(good), 1, -1)),
    "fewer": spoilt(lambda good: good[:-1]),
    "none": spoilt(lambda good: good[:0]),
    "a huge shape": lambda path, good: path.write_bytes(as_header((10**9, 10**9))),
    "a negative shape": lambda path, good: path.write_bytes(as_header((-5, 2)) + bytes(800)),
    "a shape of text": lambda path, good: path.write_bytes(as_header(("a",))),
    "deep": lambda path, good: path.write_bytes(b"\x93NUMPY\x01\x00" + struct.pack("<H", 9000) + b"(" * 9000),
    "empty": lambda path, good: path.write_bytes(b""),
    "a pickle": lambda path, good: path.write_bytes(b"\x80\x04K\x01."),
}
SHARDS = [
    ("images", "train/images-00000.npy"),
    ("images", "test/labels-00000.npy"),
    ("tokens", "train/indices-00000.npy"),
    ("tokens", "test/latents-00000.npy"),
    ("samples", "images-00000.npy"),
    ("samples", "labels-00000.npy"),
    ("reference", "features-train-00000.npy"),
]


@pytest.mark.parametrize("how", ARRAYS)
def test_no_array_is_taken_but_one_of_the_right_kind(hostile, how, tmp_path):
    for number, (kind, name) in enumerate(SHARDS):
        folder = hostile(kind)
        ARRAYS[how](folder / name, np.load(folder / name))
        assert refusal(kind, folder), (kind, name)
        folder.rename(tmp_path / f"{number}")


@pytest.mark.parametrize(
    ("kind", "name", "value"),
    [
        ("images", "train/labels-00000.npy", 3),
        ("images", "train/labels-00000.npy", -1),
        ("samples", "labels-00000.npy", 10**12),
        ("tokens", "train/labels-00000.npy", -1),
        ("tokens", "train/indices-00000.npy", 11),
        ("tokens", "train/latents-00000.npy", np.nan),
        ("reference", "features-test-00000.npy", np.inf),
    ],
)
def test_labels_beyond_the_classes_indices_beyond_the_codebook_and_nan_are_refused(hostile, kind, name, value):
    folder = hostile(kind)
    np.save(folder / name, changed(np.load(folder / name), value))
    assert refusal(kind, folder)


def header_of(header: bytes, rest: bytes = b"") -> Any:
    return lambda path, good: path.write_bytes(struct.pack("<Q", len(header)) + header + rest)


def saved(change: Any) -> Any:
    return lambda path, good: safetensors.torch.save_file(change(good), path)


def without_one(good: dict) -> dict:
    return dict(list(good.items())[1:])


def last_changed(change: Any) -> Any:
    def of(good: dict) -> dict:
        name = max(name for name in good if good[name].is_floating_point() and good[name].dim())
        return good | {name: change(good[name]).contiguous()}

    return saved(of)


WEIGHTS = {
    "a header without end": lambda path, good: path.write_bytes(struct.pack("<Q", 2**62) + b"{}"),
    "a header of no JSON": header_of(b"{{{{{{{{"),
    "a deep header": header_of(b"[" * 5000),
    "a negative size": header_of(b'{"a":{"dtype":"F32","shape":[-1],"data_offsets":[0,4]}}', bytes(4)),
    "a huge shape": header_of(
        b'{"a":{"dtype":"F32","shape":[4294967296,4294967296,2],"data_offsets":[0,4]}}', bytes(4)
    ),
    "an unknown dtype": header_of(b'{"a":{"dtype":"F31","shape":[1],"data_offsets":[0,4]}}', bytes(4)),
    "a rare dtype": header_of(b'{"a":{"dtype":"F8_E8M0","shape":[4],"data_offsets":[0,4]}}', bytes(4)),
    "offsets that overlap": header_of(
        b'{"a":{"dtype":"U8","shape":[4],"data_offsets":[0,4]},"b":{"dtype":"U8","shape":[4],"data_offsets":[0,4]}}',
        bytes(4),
    ),
    "no tensor": saved(lambda good: {}),
    "a tensor less": saved(without_one),
    "a tensor more": saved(lambda good: good | {"more": torch.zeros(3)}),
    "another shape": last_changed(lambda tensor: torch.cat([tensor, tensor])),
    "another dtype": last_changed(lambda tensor: tensor.double()),
    "no numbers": last_changed(lambda tensor: torch.full_like(tensor, torch.nan)),
    "a pickle": lambda path, good: path.write_bytes(b"\x80\x04K\x01."),
    "empty": lambda path, good: path.write_bytes(b""),
}


@pytest.mark.parametrize("how", WEIGHTS)
@pytest.mark.parametrize("part", PARTS)
def test_no_weights_are_taken_but_those_of_the_network(hostile, part, how):
    folder = hostile(part)
    path = folder / "weights.safetensors"
    WEIGHTS[how](path, safetensors.torch.load_file(path))
    assert refusal(part, folder)


def test_weights_of_very_many_tensors_are_refused(hostile):
    folder = hostile("features")
    many = {f"more{number}": torch.zeros(1) for number in range(20_001)}
    safetensors.torch.save_file(many, folder / "weights.safetensors")
    assert "has 20,001 tensors, expected at most 20,000" in refusal("features", folder)


def bomb(path: Path) -> None:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
        for name in ("mu", "sigma"):
            with file.open(f"{name}.npy", "w") as member:
                member.write(as_header((10**7,), "<f8"))
                for _ in range(80):
                    member.write(bytes(10**6))


MOMENTS = {
    "a bomb": bomb,
    "one array": lambda path: np.savez(path, mu=np.zeros(4)),
    "objects": lambda path: np.savez(path, mu=np.array([{}] * 4, object), sigma=np.eye(4)),
    "another width": lambda path: np.savez(path, mu=np.zeros(5), sigma=np.eye(5)),
    "another dtype": lambda path: np.savez(path, mu=np.zeros(4, np.float32), sigma=np.eye(4)),
    "no numbers": lambda path: np.savez(path, mu=np.full(4, np.nan), sigma=np.eye(4)),
    "no zip": lambda path: path.write_bytes(b"PK\x03\x04"),
}


@pytest.mark.parametrize("how", MOMENTS)
def test_no_moments_are_taken_but_those_of_the_features(hostile, how):
    folder = hostile("reference")
    MOMENTS[how](folder / "test.npz")
    assert refusal("reference", folder)


NO_JSON = ["", "{", "[]", "3", "null", '"x"', "[" * 10**6, "1" * 5000, "\x00", "x" * (17 * 2**20), '{"part": []}']


@pytest.mark.parametrize("text", NO_JSON, ids=range(len(NO_JSON)))
def test_a_file_of_no_such_json_is_refused(hostile, text):
    for kind in READERS:
        folder = hostile(kind)
        (folder / JSON[kind]).write_text(text)
        assert refusal(kind, folder)

"""Vectors of images: from a column of metadata to the images artifact, to a training, and to a prior that draws by them."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from killed import killed_after
from test_image_folder import encoded, picture

from stages import prepare_images
from tessera.artifacts import captions
from tessera.artifacts import folder as artifact
from tessera.artifacts import images as image_artifact
from tessera.artifacts import tokens as token_artifact
from tessera.artifacts.folder import ArtifactError
from tessera.artifacts.shards import ShardWriter
from tessera.artifacts.vectors import Vectors
from tessera.components import parse
from tessera.conditions import embedding
from tessera.contracts import ImageSpec, Planned, TokenSpec
from tessera.datasets import image_folder
from tessera.running.job import Job
from tessera.training.told import told_tokens

NUM, DIM = 24, 3
# Of float16, so that each format can hold them; each third image has none
VECTORS = [None if row % 3 == 2 else [row / 4, -1.5, 2.0**-row] for row in range(NUM)]
NAMES = [f"{row:02d}.png" for row in range(NUM)]


def with_json(folder: Path) -> dict[str, Any]:
    rows = [
        {"file_name": name} | ({} if one is None else {"vec": one}) for name, one in zip(NAMES, VECTORS, strict=True)
    ]
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return {"file": "metadata.jsonl"}


def with_table(kind: pa.DataType) -> Callable[[Path], dict[str, Any]]:
    def write(folder: Path) -> dict[str, Any]:
        halves = [None if one is None else np.array(one, np.float16) for one in VECTORS]
        typed = [None if one is None else one.astype(kind.to_pandas_dtype()) for one in halves]
        table = pa.table({"file_name": NAMES, "vec": pa.array(typed, pa.list_(kind))})
        pq.write_table(table, folder / "metadata.parquet")
        return {"file": "metadata.parquet"}

    return write


def with_files_beside(folder: Path) -> dict[str, Any]:
    for name, one in zip(NAMES, VECTORS, strict=True):
        (folder / name).with_suffix(".json").write_text(json.dumps({"vec": one}))
    return {"file": "beside"}


FORMATS = {
    "json": with_json,
    "float16": with_table(pa.float16()),
    "float64": with_table(pa.float64()),
    "beside": with_files_beside,
}


class Params:
    """All that the stage reads."""

    def __init__(self, dataset: Any):
        self.dataset = dataset


def config(folder: Path, write: Callable[[Path], dict[str, Any]], names: list[str] = NAMES) -> image_folder.Config:
    """A data set of pictures whose metadata are written beside them."""
    folder.mkdir(parents=True)
    for number, name in enumerate(names):
        (folder / name).write_bytes(encoded(picture(number)))
    settings = {"kind": "image_folder", "source": str(folder), "height": 4, "width": 6, "labels": "none"}
    settings |= {"metadata": {**write(folder), "embedding": "vec"}, "max_unreadable_fraction": 0.5}
    return parse(image_folder.Config, settings)


def prepared(place: Path, dataset: image_folder.Config, monkeypatch: pytest.MonkeyPatch, seconds: float = 60) -> Path:
    monkeypatch.setattr(Job, "require_fit", lambda *of: None)
    job = Job("prepare_images", place / "state")
    job.checkpoint_seconds = seconds
    prepare_images.run(Params(dataset), place / "images", job)
    return place / "images"


def check(images: Path) -> None:
    """Every image has the vector that was written beside it."""
    index = pd.read_parquet(images / "index.parquet")
    for split, pixels in image_artifact.read(images)[1].items():
        found = Vectors(images, split)
        assert len(found) == len(pixels) > 0 and found.dim == DIM
        of_split = index[(index.split == split) & index.kept].sort_values("row")
        expected = [VECTORS[int(Path(name).stem)] or [np.nan] * DIM for name in of_split.source]
        np.testing.assert_array_equal(found.of(np.arange(len(found))), np.array(expected, np.float32))


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_gives_each_image_its_vector(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    images = prepared(tmp_path, config(tmp_path / "source", FORMATS[name]), monkeypatch)
    check(images)
    assert captions.said_of(images) == captions.Said(0, {}, DIM)


def test_images_that_were_kept_before_a_kill_keep_their_vectors(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dataset = config(tmp_path / "source", with_json)
    with killed_after(7, monkeypatch) as kept:
        prepared(tmp_path, dataset, monkeypatch, seconds=0)
    images = prepared(tmp_path, dataset, monkeypatch, seconds=0)
    assert NUM <= len(kept) < NUM + 7  # what was kept was not prepared again
    check(images)
    whole = prepared(tmp_path / "whole", dataset, monkeypatch)
    for path in images.rglob("*.*"):
        assert path.read_bytes() == (whole / path.relative_to(images)).read_bytes()


LISTED = [  # a cell, and why its image is not taken
    ([1, 2, "3"], "has a vector in the column 'vec' that is \"[1, 2, '3']\" and no list of numbers"),
    ("[1, 2, 3]", "has a vector in the column 'vec' that is '[1, 2, 3]' and no list of numbers"),
    ([1, True, 3], "is '[1, True, 3]' and no list of numbers"),
    ([[1, 2, 3]], "is '[[1, 2, 3]]' and no list of numbers"),
    ([], "is '[]' and no list of numbers"),
    (7, "is '7' and no list of numbers"),
    ([1, None, 3], "has a vector in the column 'vec' that has numbers that are not finite, or beyond float32"),
    ([1, float("nan"), 3], "has numbers that are not finite, or beyond float32"),
    ([1, 1e39, 3], "has numbers that are not finite, or beyond float32"),
    ([1, 10**400, 3], "and no list of numbers"),
]


def lines(*cells: Any) -> Callable[[Path], dict[str, Any]]:
    def write(folder: Path) -> dict[str, Any]:
        rows = [{"file_name": name, "vec": one} for name, one in zip(NAMES, cells, strict=False)]
        (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
        return {}

    return write


@pytest.mark.parametrize(("cell", "reason"), LISTED)
def test_an_image_whose_vector_is_none_is_listed_with_its_reason(tmp_path: Path, cell: Any, reason: str) -> None:
    dataset = config(tmp_path / "source", lines([1, 2, 3], cell, None), NAMES[:3])
    reasons = [record.reason for record in image_folder.records(dataset) if not record.ignored]
    assert reasons[0] == reasons[2] == "" and reason in reasons[1] and len(reasons[1]) < 150


@pytest.mark.parametrize(
    ("cells", "sentence"),
    [
        (
            ([1, 2, 3], None, [1, 2]),
            "line 3 has 2 numbers in the column 'vec', and others before it 3: expected equally",
        ),
        (
            (None, None, None),
            "no image has a vector in the column 'vec': name another, or leave out metadata.embedding",
        ),
    ],
)
def test_vectors_of_several_lengths_and_none_at_all_are_refused(
    tmp_path: Path, cells: tuple[Any, ...], sentence: str
) -> None:
    with pytest.raises(ValueError, match=sentence) as refused:
        list(image_folder.records(config(tmp_path / "source", lines(*cells), NAMES[:3])))
    assert "\n" not in str(refused.value)


def test_a_second_line_of_an_image_says_the_same_vector(tmp_path: Path) -> None:
    def twice(other: Any) -> Callable[[Path], dict[str, Any]]:
        def write(folder: Path) -> dict[str, Any]:
            rows = [{"file_name": NAMES[0], "vec": one} for one in ([1, 2, 3], other)]
            (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
            return {}

        return write

    (one,) = [
        each
        for each in image_folder.records(config(tmp_path / "same", twice([1, 2, 3]), NAMES[:1]))
        if not each.ignored
    ]
    assert one.metadata.embedding.tolist() == [1, 2, 3]
    with pytest.raises(ValueError, match="expected one embedding for an image"):
        list(image_folder.records(config(tmp_path / "other", twice([1, 2, 4]), NAMES[:1])))


def vectors_of(folder: Path, split: str, rows: np.ndarray) -> Path:
    """An images artifact with these vectors in one split."""
    with artifact.create(folder) as place, ShardWriter(place / split, "embeddings") as writer:
        writer.append(rows)
    return folder


def test_a_vector_is_told_beside_the_label_as_it_lies_on_disk(tmp_path: Path, token_spec: TokenSpec) -> None:
    rows = np.random.default_rng(0).normal(size=(NUM, DIM)).astype(np.float32)
    rows[5] = np.nan
    with artifact.create(tmp_path / "tokens") as place:
        for split in ("train", "test"):
            (place / split).mkdir()
            np.save(place / split / "indices-00000.npy", np.zeros((NUM, 1, *token_spec.index_grid), np.uint16))
            np.save(place / split / "labels-00000.npy", np.arange(NUM) % token_spec.num_classes)
        artifact.write_json(place / "meta.json", {"spec": token_spec.model_dump(), "num_views": 1})
    tokens = token_artifact.read(tmp_path / "tokens", "indices")[1]["train"]
    images = vectors_of(tmp_path / "images", "train", rows)
    condition = embedding.Config(embedding_dim=DIM)
    told = told_tokens(condition, {"train": tokens}, images)["train"]
    wanted = torch.tensor([4, 5, 6, 5])
    for data in (told, told.on(torch.device("cpu"))):
        found = data.batch_of(data.stored(wanted, torch.Generator())).labels
        assert found.dtype == torch.float32 and found[:, 0].tolist() == [2, 3, 1, 3]
        np.testing.assert_array_equal(found[:, 1:].numpy(), rows[wanted.numpy()])
    some = told.subset(np.array([8, 20, 11]))
    np.testing.assert_array_equal(some.batch(torch.tensor([2])).labels[:, 1:].numpy(), rows[11:12])
    expected = embedding.encoded(condition, [None if row == 5 else rows[row] for row in range(NUM)])
    np.testing.assert_array_equal(told.said.told(torch.arange(NUM), None, torch.full((NUM,), -1)), expected)
    rows[7] += 1
    other = told_tokens(condition, {"train": tokens}, vectors_of(tmp_path / "other", "train", rows))["train"]
    assert other.said.fingerprint() != told.said.fingerprint()
    with pytest.raises(ValueError, match="embedding_dim is 4, but the vectors of train images have 3 numbers: write "):
        told_tokens(embedding.Config(embedding_dim=4), {"train": tokens}, images)
    with pytest.raises(ValueError, match=r"has images without vectors, expected some: name the column that holds them"):
        told_tokens(condition, {"train": tokens}, tmp_path / "tokens")


@pytest.mark.parametrize(
    ("vector", "sentence"),
    [
        ([1.0, 2.0], "an embedding has 2 numbers: expected embedding_dim 3"),
        ([1.0, np.nan, 0.0], "an embedding has numbers that are not finite: expected finite ones within float32"),
        ([1.0, 1e39, 0.0], "not finite"),
        ("abc", "an embedding is 'abc': expected a list of 3 numbers"),
        ([True, False, True], r"an embedding is '\[True, False, True\]': expected a list of 3 numbers"),
        ([[1.0], [2.0, 3.0]], "expected a list of 3 numbers"),
        (np.zeros((3, 1)), "expected a list of 3 numbers"),
        (5, "an embedding is '5': expected a list of 3 numbers"),
    ],
)
def test_what_is_no_vector_is_told_in_a_sentence(vector: Any, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        embedding.encoded(embedding.Config(embedding_dim=3), [[1.0, 2.0, 3.0], vector])


@pytest.mark.parametrize(
    ("dim", "sentences"),
    [
        (0, ["the images have no vectors: name the column that holds them as dataset.metadata.embedding"]),
        (512, ["embedding_dim is 3, but the vectors of the images have 512 numbers: write embedding_dim: 512"]),
        (3, []),
    ],
)
def test_vectors_that_a_prior_cannot_read_are_told_before_anything_is_trained(dim: int, sentences: list[str]) -> None:
    spec = ImageSpec(name="x", channels=1, height=8, width=8, num_classes=1, class_names=("x",), licence="none")
    planned = Planned(spec, {}, 2, 8, (), captions.Said(0, {}, dim))
    assert list(embedding.problems(embedding.Config(embedding_dim=3), planned)) == sentences
    assert list(embedding.problems(embedding.Config(embedding_dim=3), planned._replace(said=None))) == []


def test_the_scale_of_a_vector_and_its_direction_are_told_apart() -> None:
    vectors = torch.tensor([[3.0, 4.0], [0.3, 0.4], [0.0, 0.0]])
    found = embedding.direction_and_length(vectors)
    torch.testing.assert_close(found[0, :2], found[1, :2])
    torch.testing.assert_close(found[0, 2] - found[1, 2], torch.tensor(10.0).log())
    assert found.isfinite().all() and not found[2, :2].any()


def test_a_vector_of_zeros_says_something_else_than_none() -> None:
    config = embedding.Config(embedding_dim=2, width=8)
    network = embedding.Network(config, TokenSpec.model_construct(num_classes=3), torch.nn.Embedding(4, 8))
    torch.nn.init.normal_(network.nothing)
    zeros, none = network(embedding.encoded(config, [[0.0, 0.0], None], torch.tensor([1, 1])))
    torch.testing.assert_close(none, network.labels.weight[1] + network.nothing)
    assert not torch.allclose(zeros, none)


def test_vectors_are_left_out_together_and_each_part_alone() -> None:
    told = embedding.encoded(embedding.Config(embedding_dim=2), [[1.0, 2.0]], torch.tensor([1])).expand(20_000, -1)
    torch.manual_seed(0)
    found = embedding.partly_dropped(told, 0.2)
    has_label, has_vector = found[:, 0] == 2, (found[:, 1:] == told[:, 1:]).all(dim=1)
    assert (has_label | (found[:, 0] == 0)).all() and (has_vector | found[:, 1:].isnan().all(dim=1)).all()
    shares = [float(one.float().mean()) for one in (~has_label & ~has_vector, ~has_label, ~has_vector)]
    assert shares == pytest.approx([0.0, 0.2, 0.2], abs=0.01)


def test_examples_of_vectors_are_read_as_they_were_written(tmp_path: Path) -> None:
    vectors = np.array([[1, 2], [np.nan, np.nan]], np.float32)
    examples = [captions.Example("", label, "held_out", {}, one) for label, one in enumerate(vectors)]
    captions.write_examples_file(tmp_path, examples)
    found = captions.examples_of(tmp_path)
    assert [one[:4] for one in found] == [one[:4] for one in examples]
    np.testing.assert_array_equal(np.stack([one.vector for one in found]), vectors)
    np.save(tmp_path / "told.npy", vectors[:1])
    with pytest.raises(ArtifactError, match=r"told.npy holds float32 of the shape \(1, 2\), expected a vector"):
        captions.examples_of(tmp_path)

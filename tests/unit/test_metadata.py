"""What files beside the images say of them: the same in every format; and what is wrong in one is told, or listed."""

import csv
import gzip
import io
import json
import tarfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from test_image_folder import encoded, picture

from stages import prepare_images
from tessera.artifacts import captions
from tessera.artifacts import images as image_artifact
from tessera.components import InvalidParams, load, parse
from tessera.contracts import ImageSpec, Planned
from tessera.datasets import image_folder
from tessera.running.job import Job
from tessera.sources.metadata import Metadata

ROWS = [
    {"file_name": "a/0.png", "text": "a red square", "also": "square", "shape": "square", "side": "train"},
    {"file_name": "a/1.png", "text": "ein Kreis", "also": "七", "shape": "circle", "side": "train"},
    {"file_name": "b/2.png", "text": "a circle, small", "also": "🔵", "shape": "circle", "side": "validation"},
]
SAYS = {"captions": ["text", "also"], "label": "shape", "split": "side"}


def as_json_lines(rows: Iterable[dict[str, Any]]) -> bytes:
    return "\n".join(json.dumps(row) for row in rows).encode()


def as_csv(rows: list[dict[str, Any]]) -> bytes:
    out = io.StringIO(newline="")
    writer = csv.DictWriter(out, list(rows[0]))
    writer.writeheader()
    writer.writerows(rows)
    return out.getvalue().encode("utf-8-sig")  # as spreadsheets save it


def as_parquet(rows: list[dict[str, Any]]) -> bytes:
    return pd.DataFrame(rows).to_parquet()


FORMATS = {"metadata.jsonl": as_json_lines, "metadata.csv": as_csv, "metadata.parquet": as_parquet}


def source(folder: Path, name: str, data: bytes, images: Iterable[str] = ("a/0.png", "a/1.png", "b/2.png")) -> Path:
    for number, image in enumerate(images):
        path = folder / image
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encoded(picture(number)))
    (folder / name).write_bytes(data)
    return folder


def config(folder: Path, name: str = "metadata.jsonl", **says: Any) -> image_folder.Config:
    says = says or SAYS
    settings = {"kind": "image_folder", "source": str(folder), "height": 4, "width": 6, "labels": "none"}
    return parse(image_folder.Config, settings | {"metadata": {"file": name, **says}, "max_unreadable_fraction": 1.0})


def found(*of: Any, **says: Any) -> list[tuple]:
    """Of each image (split, label, its captions); of other files their reason."""
    records = image_folder.records(config(*of, **says))
    return [
        record.reason or (record.split, record.label, *record.metadata.captions)
        for record in records
        if not record.ignored
    ]


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_says_the_same(tmp_path: Path, name: str) -> None:
    folder = source(tmp_path, name, FORMATS[name](ROWS))
    assert found(folder, name) == [
        ("train", 1, "a red square", "square"),
        ("train", 0, "ein Kreis", "七"),
        ("test", 0, "a circle, small", "🔵"),
    ]
    assert image_folder.spec(config(folder, name)).class_names == ("circle", "square")
    assert image_folder.census(config(folder, name)) == {"train": [1, 0], "test": [0]}


def test_stylegan_says_classes_in_the_order_of_numbers(tmp_path: Path) -> None:
    data = json.dumps({"labels": [["a/0.png", 10], ["a/1.png", 9], ["b/2.png", 10]]}).encode()
    folder = source(tmp_path, "dataset.json", data)
    assert [each[1] for each in found(folder, "dataset.json", label="label")] == [1, 0, 1]
    assert image_folder.spec(config(folder, "dataset.json", label="label")).class_names == ("9", "10")


def test_several_lines_and_lists_are_several_captions(tmp_path: Path) -> None:
    rows = [{"image": "a/0.png", "text": ["one", "two"]}, {"image": "a/0.png", "text": "three"}]
    rows += [{"image": "a/1.png", "text": None}, {"image": "b/2.png", "text": ["one", "one", ""]}]
    folder = source(tmp_path, "metadata.jsonl", as_json_lines(rows))
    told = [each[2:] for each in found(folder, captions=["text"], file_column="image")]
    assert told == [("one", "two", "three"), (), ("one", "one")]


def test_a_file_in_each_folder_names_images_beside_it(tmp_path: Path) -> None:
    for split in ("train", "test"):
        source(tmp_path / split, "metadata.jsonl", as_json_lines([{"file_name": "0.png", "text": split}]), ["0.png"])
    assert found(tmp_path, captions=["text"]) == [("test", 0, "test"), ("train", 0, "train")]


def test_images_of_one_value_fall_on_one_side(tmp_path: Path) -> None:
    names = [f"{number}.png" for number in range(60)]
    rows = [{"file_name": name, "text": str(number // 3)} for number, name in enumerate(names)]
    folder = source(tmp_path, "metadata.jsonl", as_json_lines(rows), names)
    sides = [each[0] for each in sorted(found(folder, captions=["text"], split_by="text"), key=lambda each: each[2])]
    by_text: dict[str, set[str]] = {}
    for each in found(folder, captions=["text"], split_by="text"):
        by_text.setdefault(each[2], set()).add(each[0])
    assert all(len(one) == 1 for one in by_text.values()) and set(sides) == {"train", "test"}


LISTED = [  # what is said of one image, and why it is not taken
    (None, "is not spoken of in metadata.jsonl"),
    ({"text": "\0"}, "has a caption that has the character NUL"),
    ({"text": "   "}, "has a caption that has no words"),
    ({"text": "x" * 10_001}, "has a caption that has 10,001 bytes, more than 10,000"),
    ({"text": "x" * 10**6}, "has a caption that has 1,000,000 bytes, more than 10,000"),
    ({"text": 7}, "has a caption that is '7' and not text"),
    ({"text": "\ud800"}, "has a caption that is no Unicode text"),
    ({"shape": None}, "has nothing in the column 'shape'"),
    ({"shape": float("nan")}, "has nothing in the column 'shape'"),
    ({"side": "holdout"}, "is of the split 'holdout', expected train, or test or validation"),
]


@pytest.mark.parametrize(("says", "reason"), LISTED)
def test_an_image_that_is_not_taken_is_listed_with_its_reason(
    tmp_path: Path, says: dict[str, Any] | None, reason: str
) -> None:
    rows = ROWS[:2] if says is None else [*ROWS[:2], {**ROWS[2], **says}]
    folder = source(tmp_path, "metadata.jsonl", as_json_lines(rows))
    assert found(folder)[2].startswith(reason)


REFUSED = [  # the file, its text, and the sentence
    ("metadata.jsonl", b'{"file_name": "a/0.png", "text": "a"}\n{"file', "metadata.jsonl line 2 is no JSON"),
    ("metadata.jsonl", b"", "metadata.jsonl is empty, expected a line for each image"),
    ("metadata.jsonl", b"[1]", "metadata.jsonl line 1 is '[1]', expected a JSON object"),
    ("metadata.jsonl", b'{"text": "a"}', "line 1 names no image by 'file_name', expected it among its columns 'text'"),
    (
        "metadata.jsonl",
        b'{"file_name": "a/0.png"}',
        "line 1 has no column 'text', expected it among its columns 'file_name'",
    ),
    ("metadata.jsonl", b'{"file_name": "x.png", "text": "a"}', "speaks of 1 files that are not there, such as 'x.png'"),
    ("metadata.jsonl", b'{"file_name": "../a/0.png", "text": "a"}', "speaks of 1 files that are not there"),
    ("metadata.jsonl", b"\xff\xfe", "metadata.jsonl is no UTF-8 at byte 0"),
    ("metadata.jsonl", b"[" * 10**5, "metadata.jsonl line 1 is no JSON"),
    ("metadata.csv", b"file_name,text\na/0.png,a,b\n", "line 2 has another number of cells than the 2 columns"),
    ("metadata.csv", b'file_name,text\na/0.png,"a\n', "metadata.csv cannot be read after line 1"),
    ("metadata.parquet", b"PAR1nothing", "metadata.parquet cannot be read as parquet"),
    ("dataset.json", b"{}", "dataset.json has no list of labels"),
    (
        "dataset.json",
        b'{"labels": [["a/0.png"]]}',
        "dataset.json: label 1 is \"['a/0.png']\", expected an image and its class",
    ),
]


@pytest.mark.parametrize(("name", "data", "sentence"), REFUSED)
def test_a_file_that_cannot_be_read_is_refused_in_one_sentence(
    tmp_path: Path, name: str, data: bytes, sentence: str
) -> None:
    folder = source(tmp_path, name, data)
    with pytest.raises(ValueError) as refused:
        found(folder, name, captions=["text"])
    assert sentence in str(refused.value) and "\n" not in str(refused.value) and len(str(refused.value)) < 500


def test_lines_that_contradict_each_other_are_refused(tmp_path: Path) -> None:
    folder = source(tmp_path, "metadata.jsonl", as_json_lines([ROWS[0], {**ROWS[0], "shape": "circle"}, *ROWS[1:]]))
    with pytest.raises(
        ValueError, match=r"line 2 says 'circle' of 'a/0.png', another line 'square': expected one label"
    ):
        found(folder)


@pytest.mark.parametrize(
    ("says", "sentence"),
    [
        ({"file": "metadata.txt", "captions": ["text"]}, "expected one that ends in .jsonl, .csv, .parquet, .json"),
        ({"file": "a/metadata.csv", "captions": ["text"]}, "is no name of a file with metadata"),
        (
            {},
            "no column is asked for: set captions, attributes, embedding, picture, label, split or split_by, or leave out",
        ),
        ({"split": "a", "split_by": "b"}, "split and split_by are both set"),
    ],
)
def test_settings_that_say_nothing_are_refused(says: dict[str, Any], sentence: str) -> None:
    with pytest.raises(InvalidParams) as refused:
        parse(Metadata, says)
    assert sentence in str(refused.value)


def test_what_is_missing_or_one_sided_is_refused(tmp_path: Path) -> None:
    folder = source(tmp_path, "metadata.jsonl", as_json_lines(ROWS))
    with pytest.raises(ValueError, match=r"has no metadata.csv, expected one beside the images"):
        found(folder, "metadata.csv")
    with pytest.raises(ValueError, match=r"the column 'file_kind' says nothing|has no column 'file_kind'"):
        found(folder, label="file_kind")
    same = source(tmp_path / "same", "metadata.jsonl", as_json_lines([{**row, "shape": "x"} for row in ROWS]))
    with pytest.raises(ValueError, match=r"the column 'shape' says x of every image, expected two classes or more"):
        found(same)


IN_ALL = [{**row, "text": [row["text"], row["also"]]} for row in ROWS]


def as_folder(folder: Path) -> dict[str, Any]:
    source(folder, "metadata.jsonl", as_json_lines(IN_ALL))
    return {"metadata": {"captions": ["text"], "label": "shape", "split": "side"}}


def as_tar(folder: Path) -> dict[str, Any]:
    settings = as_folder(folder / "unpacked")
    with tarfile.open(folder / "all.tar", "w") as archive:
        archive.add(folder / "unpacked", ".")
    return settings | {"source": str(folder / "all.tar")}


def as_webdataset(folder: Path) -> dict[str, Any]:
    """Two shards; a caption in .txt, the rest in .json."""
    images = source(folder / "unpacked", "unused", b"")
    for number, rows in enumerate((IN_ALL[:2], IN_ALL[2:])):
        with tarfile.open(folder / f"{number:05d}.tar", "w") as archive:
            for row in rows:
                stem = row["file_name"].removesuffix(".png")
                told = {"json": json.dumps(row).encode(), "png": (images / row["file_name"]).read_bytes()}
                for suffix, data in told.items():
                    member = tarfile.TarInfo(f"{stem}.{suffix}")
                    member.size = len(data)
                    archive.addfile(member, io.BytesIO(data))
    settings = {"file": "beside", "captions": ["text"], "label": "shape", "split": "side"}
    return {"shards": "tar", "metadata": settings}


def as_tables(folder: Path) -> dict[str, Any]:
    """Two files, as the package `datasets` writes images."""
    images = source(folder / "unpacked", "unused", b"")
    for number, rows in enumerate((IN_ALL[:1], IN_ALL[1:])):
        pictures = [{"bytes": (images / row["file_name"]).read_bytes(), "path": row["file_name"]} for row in rows]
        table = pd.DataFrame([{key: row[key] for key in ("text", "shape", "side")} for row in rows])
        table.assign(picture=pictures).to_parquet(folder / f"train-{number}.parquet")
    settings = {"file": "beside", "captions": ["text"], "label": "shape", "split": "side"}
    return {"shards": "parquet", "image": "picture", "metadata": settings}


@pytest.mark.parametrize("packed", [as_tar, as_webdataset, as_tables])
def test_the_same_images_in_another_container_are_the_same_artifact(
    tmp_path: Path, packed: Callable[[Path], dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Job, "require_fit", lambda *of: None)
    made = {}
    for name, make in (("folder", as_folder), ("other", packed)):
        (tmp_path / name).mkdir()
        settings = {"kind": "image_folder", "source": str(tmp_path / name), "height": 4, "width": 6, "labels": "none"}
        made[name] = parse(image_folder.Config, settings | make(tmp_path / name) | {"max_unreadable_fraction": 1.0})
        prepare_images.run(
            Params(made[name]), tmp_path / f"{name}-images", Job("prepare_images", tmp_path / f"{name}-s")
        )
    ours, theirs = (tmp_path / f"{name}-images" for name in made)
    columns = ["split", "row", "label", "source", "sha256", "captions"]
    first, second = (pd.read_parquet(path / "index.parquet").query("kept")[columns] for path in (ours, theirs))
    assert len(first) == 3
    pd.testing.assert_frame_equal(first.reset_index(drop=True), second.reset_index(drop=True))
    for split in ("train", "test"):
        for path in (ours / split).iterdir():
            assert path.read_bytes() == (theirs / split / path.name).read_bytes(), path
    assert image_artifact.read_spec(ours) == image_artifact.read_spec(theirs)


def test_files_beside_images_say_captions_and_classes(tmp_path: Path) -> None:
    source(tmp_path, "0.txt", b"ein Kreis\n", ["0.png", "1.png", "2.png"])
    (tmp_path / "0.cls").write_text("4")
    (tmp_path / "1.cls").write_text("10")
    (tmp_path / "1.txt").write_text("七")
    (tmp_path / "2.png").rename(tmp_path / "9.png")
    assert found(tmp_path, "beside", captions=["txt"], label="cls") == [
        ("train", 0, "ein Kreis"),
        ("train", 1, "七"),
        "has no file beside it",
    ]
    (tmp_path / "1.cls").unlink()
    (tmp_path / "9.cls").write_text("10")
    assert found(tmp_path, "beside", captions=["txt"], label="cls")[1] == "has nothing in the column 'cls'"
    (tmp_path / "3.txt").write_text("nobody")
    with pytest.raises(ValueError, match="the files beside images speak of 1 files that are not there, such as '3'"):
        found(tmp_path, "beside", captions=["txt"], label="cls")


def test_two_files_that_say_one_thing_and_two_images_of_one_name_are_refused(tmp_path: Path) -> None:
    source(tmp_path, "3.txt", b"three", ["3.png", "4.png"])
    (tmp_path / "3.v2.txt").write_text("another three")
    with pytest.raises(ValueError, match=r"3.v2.txt and another file of '3' both say 'txt': take one of them out"):
        found(tmp_path, "beside", captions=["txt"])
    (tmp_path / "3.v2.txt").unlink()
    (tmp_path / "4.png").rename(tmp_path / "3.v2.png")
    with pytest.raises(ValueError, match=r"there are several images called '3', and one file beside them"):
        found(tmp_path, "beside", captions=["txt"])


def test_rows_of_one_path_are_listed_and_say_nothing_of_each_other(tmp_path: Path) -> None:
    rows = [{"bytes": encoded(picture(number)), "path": f"{number % 3}.png"} for number in range(5)]
    pd.DataFrame({"image": rows, "text": list("abcde")}).to_parquet(tmp_path / "a.parquet")
    settings = {"kind": "image_folder", "source": str(tmp_path), "height": 4, "width": 6, "labels": "none"}
    settings |= {"shards": "parquet", "metadata": {"file": "beside", "captions": ["text"]}}
    records = list(image_folder.records(parse(image_folder.Config, settings | {"max_unreadable_fraction": 1.0})))
    assert [record.metadata.captions for record in records[:3]] == [("a",), ("b",), ("c",)]
    assert ["has the name of an earlier image" in record.reason for record in records] == [False] * 3 + [True] * 2
    with pytest.raises(
        ValueError, match=r"whose other columns are the metadata, and not metadata.jsonl: write metadata.file"
    ):
        list(image_folder.records(parse(image_folder.Config, settings | {"metadata": {"captions": ["text"]}})))


def test_attributes_keep_whole_numbers_and_what_is_no_value_is_listed(tmp_path: Path) -> None:
    says = [3, 0.5, "red", True, None, float("nan"), float("inf"), 10**400, [1], {}]
    rows = [{"file_name": f"{number}.png", "x": value} for number, value in enumerate(says)] + [{"file_name": "a.png"}]
    folder = source(tmp_path, "metadata.jsonl", as_json_lines(rows), [row["file_name"] for row in rows])
    records = [record for record in image_folder.records(config(folder, attributes=["x"])) if not record.ignored]
    kept = {record.source: record.metadata.attributes["x"] for record in records if not record.reason}
    assert kept == {
        "0.png": 3,
        "1.png": 0.5,
        "2.png": "red",
        "3.png": "True",
        "4.png": None,
        "5.png": None,
        "a.png": None,
    }
    assert isinstance(kept["0.png"], int)
    listed = [record.reason for record in records if record.reason]
    assert listed == ["has no number and no word in the column 'x'"] * 4


SHARDS = [
    ("parquet", {"a.parquet": pd.DataFrame({"image": ["a.png"]}).to_parquet()}, "expected the bytes of images"),
    ("tar", {}, "holds no .tar files, expected shards of a data set"),
    ("parquet", {"a.parquet": b"nothing"}, "a.parquet cannot be read as parquet"),
    ("parquet", {"a.parquet": pd.DataFrame({"x": [1]}).to_parquet()}, "has no column 'image', expected it among 'x'"),
    ("tar", {"a.tar": gzip.compress(b"")}, "a.tar cannot be listed"),
]


@pytest.mark.parametrize(("kind", "files", "sentence"), SHARDS)
def test_shards_that_are_none_are_refused(tmp_path: Path, kind: str, files: dict[str, bytes], sentence: str) -> None:
    for name, data in files.items():
        (tmp_path / name).write_bytes(data)
    settings = {"kind": "image_folder", "source": str(tmp_path), "height": 4, "width": 6, "labels": "none"}
    with pytest.raises(ValueError) as refused:
        list(image_folder.records(parse(image_folder.Config, settings | {"shards": kind})))
    assert sentence in str(refused.value) and "\n" not in str(refused.value)


def test_rows_of_tables_are_read_from_the_front_and_go_on_anywhere(tmp_path: Path) -> None:
    pictures = [encoded(picture(number)) for number in range(300)]
    for number in range(3):
        rows = [{"bytes": data, "path": None} for data in pictures[100 * number : 100 * number + 100]]
        rows[7] = {"bytes": None, "path": "elsewhere.png"}
        pd.DataFrame({"image": rows}).to_parquet(tmp_path / f"{number}.parquet", row_group_size=30)
    settings = {"kind": "image_folder", "source": str(tmp_path), "height": 4, "width": 6, "labels": "none"}
    with image_folder.opened(parse(image_folder.Config, settings | {"shards": "parquet"})) as opened:
        every = list(opened.records(0))
        rest = list(opened.records(170))
    assert [record.source for record in every[:2]] == ["0/000000000", "0/000000001"]
    assert [record.source for record in rest] == [record.source for record in every[170:]]
    assert [record.sha256 for record in rest] == [record.sha256 for record in every[170:]]
    lost = [record.source for record in every if record.image is None]
    assert lost == ["elsewhere.png"] * 3 and "has no bytes in its row" in every[7].reason


class Params:
    """As much of the pipeline's params as the stage reads."""

    def __init__(self, dataset: image_folder.Config):
        self.dataset = dataset


def test_captions_lie_in_the_index_and_are_read_by_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = [f"{number}.png" for number in range(40)]
    sizes = [[1.5, None, "big"][number % 3] for number in range(40)]
    rows = [
        {"file_name": name, "text": [f"caption {number}"] * (number % 3), "size": sizes[number]}
        for number, name in enumerate(names)
    ]
    folder = source(tmp_path / "source", "metadata.jsonl", as_json_lines(rows), names)
    seen: list[captions.Said | None] = []
    monkeypatch.setattr(Job, "require_fit", lambda self, params, spec, labels, said=None: seen.append(said))
    asked = Params(config(folder, captions=["text"], attributes=["size"]))
    prepare_images.run(asked, tmp_path / "images", Job("prepare_images", tmp_path / "s"))
    index = pd.read_parquet(tmp_path / "images" / "index.parquet")
    of_size = captions.Values(1.5, 1.5, frozenset({"1.5", "big"}))
    assert seen == [None, captions.Said(len("caption 10"), {"size": of_size}, 0, "caption 10")]
    for split, images in image_artifact.read(tmp_path / "images")[1].items():
        told, of_split = captions.read(tmp_path / "images", split), index[(index.split == split) & index.kept]
        assert len(told) == len(images) == len(of_split)
        numbers = [int(Path(name).stem) for name in of_split.source]
        assert [told.of(row) for row in range(len(told))] == [rows[number]["text"] for number in numbers]
        np.testing.assert_array_equal(told.counts, [number % 3 for number in numbers])
        attributes = captions.attributes_of(tmp_path / "images", split)
        assert list(attributes) == [{"size": sizes[number]} for number in numbers]


def test_what_of_a_caption_is_new() -> None:
    group_of = captions.grouping(captions.Captions([["a red square"], ["Ein Kreis", "红色"], []]))
    assert [group_of(one) for one in ("a red square", "a red Kreis", "a blue square", "色红", "色蓝")] == [
        "seen",
        "held_out",
        "new_words",
        "held_out",
        "new_words",
    ]


PLANNED = Planned(
    ImageSpec(name="x", channels=1, height=8, width=8, num_classes=1, class_names=("x",), licence="none"),
    {},
    2,
    8,
    (),
    captions.Said(40, {"size": captions.Values(1, 9.5, frozenset({"1", "9.5", "big"}))}),
)
UNFIT = [
    (
        "image_text",
        {"captions": {"max_bytes": 39}},
        "max_bytes 39 is too few: the longest caption of the images has 40",
    ),
    ("image_text", {}, ""),
    ("caption", {"max_bytes": 39}, "max_bytes 39 is too few: the longest caption of the images has 40 bytes"),
    ("caption", {"max_bytes": 40}, ""),
    ("attributes", {"numbers": {"size": [0, 10]}}, "numbers.size: it has 'big', expected numbers from 0 to 10"),
    ("attributes", {"numbers": {"siz": [0, 10]}}, "'siz' is said of no image, expected attributes among 'size'"),
    (
        "attributes",
        {"categories": {"size": ["big", "9.5"]}},
        "categories.size: 1 is none of its values: add it to them",
    ),
    ("attributes", {"categories": {"size": ["big", "9.5", "1"]}}, ""),
]


@pytest.mark.parametrize(("kind", "settings", "sentence"), UNFIT)
def test_conditions_that_cannot_read_the_metadata_are_told_before_anything_is_trained(
    kind: str, settings: dict[str, Any], sentence: str
) -> None:
    module = load("features" if kind == "image_text" else "conditions", kind)
    found = list(module.problems(parse(module.Config, {"kind": kind, **settings}), PLANNED))
    assert [each.startswith(sentence) for each in found] == [True] * bool(sentence)
    (silent,) = module.problems(
        parse(module.Config, {"kind": kind, **settings}), PLANNED._replace(said=captions.Said(0, {}))
    )
    assert "have no captions" in silent or "is said of no image" in silent
    assert not list(module.problems(parse(module.Config, {"kind": kind, **settings}), PLANNED._replace(said=None)))


def test_a_word_among_many_numbers_is_not_overlooked() -> None:
    values = None
    for value in [*range(3000), "tall", *range(3000)]:
        values = captions._with(values, value)
    assert values is not None and (values.low, values.high) == (0, 2999) and "tall" in values.words
    assert len(values.words) <= captions.MOST_WORDS + 1


def test_a_range_that_images_leave_is_told_with_both_ends() -> None:
    narrow = PLANNED._replace(said=captions.Said(0, {"size": captions.Values(1, 9.5, frozenset({"1", "9.5"}))}))
    module = load("conditions", "attributes")
    (found,) = module.problems(parse(module.Config, {"kind": "attributes", "numbers": {"size": [2, 9]}}), narrow)
    assert found.startswith("numbers.size: it reaches from 1 to 9.5, expected numbers from 2 to 9: widen the range")

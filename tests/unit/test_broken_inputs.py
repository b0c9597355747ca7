"""Data as people have them: what is broken is one sentence of prepare_images, before anything is trained; what is odd and whole
is taken as it is.

What is wrong inside single files of images is in test_image_folder.py and test_bands.py, the formats of metadata in
test_metadata.py.
"""

import csv
import io
import json
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from test_image_folder import encoded, picture

from stages import prepare_images
from tessera.artifacts import captions
from tessera.components import load, parse
from tessera.contracts import ImageSpec, Planned
from tessera.datasets import image_folder
from tessera.running.job import Job

NAMES = [f"{number:02d}.png" for number in range(20)]
ODD = 16  # the image that something is odd about; it is spoken of in line 17
Files = dict[str, bytes]


def images() -> Files:
    return {name: encoded(picture(number)) for number, name in enumerate(NAMES)}


def rows(**of_one: Any) -> list[dict[str, Any]]:
    """A row for each image; of one of them other values."""
    usual = [{"file_name": name, "text": f"number {name}", "size": 1.5} for name in NAMES]
    usual[ODD] |= of_one
    return usual


def lines(found: list[dict[str, Any]]) -> bytes:
    return "\n".join(json.dumps(row, ensure_ascii=False) for row in found).encode("utf-8", "surrogatepass")


def told(**of_one: Any) -> Files:
    return images() | {"metadata.jsonl": lines(rows(**of_one))}


def table(delimiter: str = ",", **of_one: Any) -> Files:
    out = io.StringIO(newline="")
    writer = csv.DictWriter(out, ["file_name", "text", "size"], delimiter=delimiter)
    writer.writeheader()
    writer.writerows(rows(**of_one))
    return images() | {"metadata.csv": out.getvalue().encode()}


def beside(suffix: str = "txt", without: str = "") -> Files:
    texts = {f"{name[:2]}.{suffix}": f"number {name}".encode() for name in NAMES if name != without}
    return images() | texts


def packed(files: Files) -> Files:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as archive:
        for name, data in sorted(files.items()):
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return {"all.tar": out.getvalue()}


def prepared(folder: Path, files: Files, monkeypatch: pytest.MonkeyPatch, **says: Any) -> Path:
    """The artifact of these files; says: of metadata, or settings of the data set beside it."""
    source = folder / "source"
    for name, data in files.items():
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).write_bytes(data)
    beside = {key: says.pop(key) for key in list(says) if key in image_folder.Config.model_fields}
    settings = {"kind": "image_folder", "source": str(source), "height": 4, "width": 6, "labels": "none"}
    metadata = {"metadata": {"captions": ["text"], "attributes": ["size"]} | says}

    class Params:
        dataset = parse(image_folder.Config, settings | metadata | beside)

    monkeypatch.setattr(Job, "require_fit", lambda *of: None)
    prepare_images.run(Params(), folder / "images", Job("prepare_images", folder / "state"))
    return folder / "images"


AT_17 = f"1 of 20 files give no image, expected at most a fraction of 0.01: '{NAMES[ODD]}' "
CASES: dict[str, tuple[Callable[[], Files], dict[str, Any], str]] = {
    "a tar without captions": (lambda: packed(images()), {"source": "all.tar"}, "has no metadata.jsonl, expected one beside"),
    "shards without captions": (
        lambda: packed(images()),
        {"shards": "tar", "file": "beside", "captions": ["txt"], "attributes": []},
        "has no readable image in 'unlabeled', expected one of each class at least: mend its files (npy asks for",
    ),
    "a caption is missing in a shard": (
        lambda: packed(beside(without=NAMES[ODD])),
        {"shards": "tar", "file": "beside", "captions": ["txt"], "attributes": []},
        AT_17 + "has no file beside it",
    ),
    "another column of JSON lines": (told, {"captions": ["caption"]}, "line 1 has no column 'caption', expected it among its"),
    "another column of CSV": (
        table,
        {"file": "metadata.csv", "captions": ["caption"]},
        "metadata.csv line 2 has no column 'caption', expected it among its columns 'file_name', 'text', 'size'",
    ),
    "another column of images": (told, {"file_column": "image"}, "line 1 names no image by 'image', expected it among its"),
    "CSV with semicolons": (
        lambda: table(";"),
        {"file": "metadata.csv"},
        "line 2 names no image by 'file_name', expected it among its columns 'file_name;text;size'",
    ),
    "line 17 is broken": (
        lambda: told() | {"metadata.jsonl": lines(rows()).replace(b'{"file_name": "16', b'{file_name: "16')},
        {},
        "metadata.jsonl line 17 is no JSON (Expecting property name",
    ),
    "line 17 ends early": (
        lambda: images() | {"metadata.jsonl": b"\n".join(lines(rows()).split(b"\n")[:17])[:-9]},
        {},
        "metadata.jsonl line 17 is no JSON",
    ),
    "line 17 is a list": (
        lambda: images() | {"metadata.jsonl": b"\n".join([*lines(rows()).split(b"\n")[:16], b'["16.png", "a"]'])},
        {},
        "metadata.jsonl line 17 is \"['16.png', 'a']\", expected a JSON object with the names of columns",
    ),
    "line 17 is missing": (
        lambda: images() | {"metadata.jsonl": lines([*rows()[:ODD], *rows()[ODD + 1 :]])},
        {},
        AT_17 + "is not spoken of in metadata.jsonl",
    ),
    "UTF-16": (
        lambda: images() | {"metadata.jsonl": lines(rows()).decode().encode("utf-16")},
        {},
        "metadata.jsonl is no UTF-8 at byte 0: save it as UTF-8",
    ),
    "a file of Latin 1": (
        lambda: images() | {"metadata.jsonl": lines(rows(text="é")).decode().encode("latin-1")},
        {},
        "metadata.jsonl is no UTF-8 at byte ",
    ),
    "a caption of a million characters": (lambda: told(text="x" * 10**6), {}, AT_17 + "has a caption that has 1,000,000 bytes"),
    "NUL in a caption": (lambda: told(text="a\0b"), {}, AT_17 + "has a caption that has the character NUL"),
    "NUL in CSV": (lambda: table(text="a\0b"), {"file": "metadata.csv"}, "NUL"),
    "blanks as a caption": (lambda: told(text=" \t\u3000"), {}, AT_17 + "has a caption that has no words"),
    "half a character": (lambda: told(text="\ud83d"), {}, "metadata.jsonl is no UTF-8 at byte "),
    "a number as a caption": (lambda: told(text=3), {}, AT_17 + "has a caption that is '3' and not text"),
    "an object as a caption": (lambda: told(text={"en": "a"}), {}, AT_17 + "has a caption that is"),
    "infinity as an attribute": (lambda: told(size=float("inf")), {}, AT_17 + "has no number and no word in the column 'size'"),
    "a list as an attribute": (lambda: told(size=[1]), {}, AT_17 + "has no number and no word in the column 'size'"),
    "an image that is not there": (lambda: told(file_name="99.png"), {}, "speaks of 1 files that are not there, such as '99"),
    "a path out of the source": (lambda: told(file_name="../x.png"), {}, "speaks of 1 files that are not there, such as '../x"),
    "an absolute path": (lambda: told(file_name="/etc/passwd"), {}, "speaks of 1 files that are not there, such as '/etc"),
    "two sizes of one image": (
        lambda: images() | {"metadata.jsonl": lines([*rows(), {"file_name": NAMES[0], "text": "b", "size": 2}])},
        {},
        "line 21 says {'size': 2} of '00.png', another line {'size': 1.5}: expected one attributes for an image",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_what_is_broken_is_one_sentence_and_leaves_nothing(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make, says, sentence = CASES[name]
    if says.get("source"):
        says = says | {"source": str(tmp_path / "source" / says["source"])}
    with pytest.raises(ValueError) as refused:
        prepared(tmp_path, make(), monkeypatch, **says)
    text = str(refused.value)
    assert sentence in text and "\n" not in text and "\0" not in text and len(text) < 600
    assert not (tmp_path / "images").exists()


ACCEPTED: dict[str, tuple[Any, list[str]]] = {  # a value of the column of captions, and the captions that it becomes
    "right to left": ("مربع أحمر صغير", ["مربع أحمر صغير"]),
    "right to left beside left to right": ("a \u202bריבוע\u202c square", ["a \u202bריבוע\u202c square"]),
    "emoji of several characters": ("👩🏽‍🚀 with 🏳️‍🌈", ["👩🏽‍🚀 with 🏳️‍🌈"]),
    "accents apart from their letters": ("cafe\u0301", ["cafe\u0301"]),  # no normal form is asked for: bytes are told
    "several lines": ("one\r\ntwo", ["one\r\ntwo"]),
    "quotes and commas": ('a "red", square', ['a "red", square']),
    "a separator that some take for a new line": ("one\u2028two", ["one\u2028two"]),
    "empty": ("", []),  # nothing is said: the image is trained on without words
    "null": (None, []),
    "an empty list": ([], []),
    "the most bytes": ("é" * 5000, ["é" * 5000]),
}


@pytest.mark.parametrize("name", ACCEPTED)
def test_odd_captions_arrive_letter_by_letter(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    value, expected = ACCEPTED[name]
    folder = prepared(tmp_path, told(text=value), monkeypatch)
    index = pd.read_parquet(folder / "index.parquet")
    (row,) = index[index.source == NAMES[ODD]].itertuples()
    assert row.kept and captions.read(folder, row.split).of(row.row) == expected


@pytest.mark.parametrize("value", [float("nan"), None, ""])
def test_an_attribute_that_is_no_number_is_one_of_which_nothing_is_said(
    value: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = prepared(tmp_path, told(size=value), monkeypatch)
    index = pd.read_parquet(folder / "index.parquet")
    (row,) = index[index.source == NAMES[ODD]].itertuples()
    found = list(captions.attributes_of(folder, row.split))
    assert found[row.row] == {"size": None} and sum(one == {"size": None} for one in found) == 1


def test_blank_lines_a_mark_of_byte_order_and_lines_of_windows_change_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = prepared(tmp_path / "plain", told(), monkeypatch)
    odd = lines(rows()).replace(b"\n", b"\r\n\r\n")
    other = prepared(tmp_path / "odd", images() | {"metadata.jsonl": b"\xef\xbb\xbf" + odd + b"\r\n"}, monkeypatch)
    first, second = (pd.read_parquet(folder / "index.parquet") for folder in (plain, other))
    columns = ["source", "split", "row", "captions"]
    pd.testing.assert_frame_equal(first[first.kept][columns], second[second.kept][columns])
    assert np.array_equal(first.kept, second.kept)


def test_files_beside_images_without_the_column_say_nothing_and_a_prior_of_captions_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The column txt is there, text is asked for: which columns there are is known only when all files were read."""
    folder = prepared(tmp_path, beside(), monkeypatch, file="beside", captions=["text"], attributes=[])
    said = captions.said_of(folder)
    assert said.longest_caption == 0
    spec = ImageSpec(name="x", channels=3, height=4, width=6, num_classes=1, class_names=("x",), licence="none")
    module = load("conditions", "caption")
    (sentence,) = module.problems(parse(module.Config, {"kind": "caption"}), Planned(spec, {}, 2, 8, (), said))
    assert "have no captions" in sentence and "\n" not in sentence

"""Classes from the names of files: every name fits the pattern, or the stage says so in one sentence."""

import tarfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from test_image_folder import encoded, picture, write_files

from stages import prepare_images
from tessera.artifacts import images as image_artifact
from tessera.components import InvalidParams, parse
from tessera.datasets import image_folder
from tessera.running.job import Job

PATTERN = "([a-z]+)_[0-9]+"
NAMES = ("cat_1.png", "dog_2.png", "below/cat_30.png")


def config(source: Path, pattern: str = PATTERN, **settings: Any) -> image_folder.Config:
    usual = {"kind": "image_folder", "source": str(source), "height": 4, "width": 6, "label_pattern": pattern}
    return parse(image_folder.Config, usual | settings)


def labels_of(source: Path, *of: Any, **settings: Any) -> dict[str, int]:
    records = image_folder.records(config(source, *of, **settings))
    return {record.source: record.label for record in records if record.image is not None}


def refusal(source: Path, *of: Any, **settings: Any) -> str:
    with pytest.raises(ValueError) as refused:
        labels_of(source, *of, **settings)
    text = str(refused.value)
    assert "\n" not in text and "expected" in text and len(text) < 600
    return text


def files(folder: Path, names: Iterable[str]) -> Path:
    write_files(folder, names)
    return folder


def test_the_class_is_the_group_whatever_the_folder_and_the_labels(tmp_path: Path) -> None:
    folder = files(tmp_path, NAMES)
    for labels in ("folders", "none"):
        assert labels_of(folder, labels=labels) == {"below/cat_30.png": 0, "cat_1.png": 0, "dog_2.png": 1}
    made = config(folder)
    assert image_folder.spec(made).class_names == ("cat", "dog") and made.num_classes is None
    found = image_folder.census(made)
    assert sorted(found["train"] + found["test"]) == [0, 0, 1]


def test_numbers_are_in_the_order_of_their_size_and_other_dots_belong_to_the_name(tmp_path: Path) -> None:
    folder = files(tmp_path, ("a.10.png", "b.9.png", "c.x.png"))
    assert image_folder.spec(config(folder, r".*\.(.+)")).class_names == ("9", "10", "x")


def test_train_and_test_folders_go_on_being_the_splits(tmp_path: Path) -> None:
    folder = files(tmp_path, ("train/cat_1.png", "train/dog_2.png", "test/dog_3.png"))
    found = [(record.split, record.label) for record in image_folder.records(config(folder))]
    assert found == [("test", 1), ("train", 0), ("train", 1)]


@pytest.mark.parametrize(
    ("names", "pattern", "sentence"),
    [
        (
            (*NAMES, "Cat_4.png"),
            PATTERN,
            "finds no class in 1 names, such as 'Cat_4.png', expected it to fit each whole name",
        ),
        ((*NAMES, "cat_5 copy.png"), PATTERN, "finds no class in 1 names, such as 'cat_5 copy.png'"),
        ((*NAMES, "README.md"), PATTERN, "finds no class in 1 names, such as 'README.md'"),
        ((*NAMES, "_7.png"), "([a-z]*)_[0-9]+", "finds no class in 1 names, such as '_7.png'"),
        ((*NAMES, "x.png"), "(?:([a-z]+)_[0-9]+|x)", "finds no class in 1 names, such as 'x.png'"),
        (NAMES, "([a-z]+)", "finds no class in 3 names"),
        (NAMES[::2], PATTERN, "finds 1 classes, such as 'cat', expected 2 to 10,000"),
    ],
)
def test_a_name_that_does_not_fit_and_a_single_class_are_refused(
    tmp_path: Path, names: tuple[str, ...], pattern: str, sentence: str
) -> None:
    assert sentence in refusal(files(tmp_path, names), pattern)


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"label_pattern": "([a-z]+"}, "label_pattern: '([a-z]+' is no regular expression"),
        ({"label_pattern": "[a-z]+"}, "has 0 groups, expected one group in parentheses"),
        ({"label_pattern": "([a-z])_([0-9])"}, "has 2 groups, expected one group in parentheses"),
        ({"metadata": {"label": "kind"}}, "label_pattern: metadata.label is set too, expected one of them"),
    ],
)
def test_patterns_that_cannot_say_a_class_are_refused(tmp_path: Path, settings: dict[str, Any], sentence: str) -> None:
    with pytest.raises(InvalidParams) as refused:
        config(tmp_path, **settings) if "label_pattern" not in settings else config(tmp_path, settings["label_pattern"])
    assert sentence in str(refused.value) and "\n" not in str(refused.value)


def test_hidden_files_and_metadata_need_no_class_and_captions_stay_with_their_images(tmp_path: Path) -> None:
    folder = files(tmp_path, NAMES)
    (folder / ".hidden.png").write_bytes(b"")
    rows = [f'{{"file_name": "{name}", "text": "{number}"}}' for number, name in enumerate(NAMES)]
    (folder / "metadata.jsonl").write_text("\n".join(rows))
    records = image_folder.records(config(folder, metadata={"captions": ["text"]}))
    told = {record.source: (record.label, *record.metadata.captions) for record in records if record.image is not None}
    assert told == {"cat_1.png": (0, "0"), "dog_2.png": (1, "1"), "below/cat_30.png": (0, "2")}


def test_a_class_whose_files_cannot_be_read_is_refused(tmp_path: Path) -> None:
    folder = files(tmp_path, NAMES)
    (folder / "dog_2.png").write_bytes(b"no image")
    with pytest.raises(
        ValueError, match="has no readable image of the class 'dog', which label_pattern finds in names"
    ):
        labels_of(folder)


def test_the_artifact_has_the_classes_also_from_a_tar(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Params:
        dataset = config(tmp_path / "all.tar", test_fraction=0.4)

    with tarfile.open(tmp_path / "all.tar", "w") as archive:
        for number in range(20):
            (tmp_path / "one").write_bytes(encoded(picture(number)))
            archive.add(tmp_path / "one", f"{('cat', 'dog')[number % 2]}_{number}.png")
    monkeypatch.setattr(Job, "require_fit", lambda *of: None)
    prepare_images.run(Params(), tmp_path / "images", Job("prepare_images", tmp_path / "state"))
    spec, splits = image_artifact.read(tmp_path / "images")
    assert spec.class_names == ("cat", "dog") and spec.num_classes == 2
    index = pd.read_parquet(tmp_path / "images" / "index.parquet")
    assert all(row.source.startswith(spec.class_names[row.label]) for row in index.itertuples())
    assert sorted(label for split in splits.values() for label in split.labels.tolist()) == [0] * 10 + [1] * 10

"""Pictures in files beside images: from a column or a rule of names to the images artifact, a prior, and what it draws."""

import json
import shutil
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from killed import killed_after
from PIL import Image

import tessera
from stages import encode_tokens, prepare_images, sample_images, train_prior, train_tokenizer
from tessera import seeding
from tessera.artifacts import captions
from tessera.artifacts import images as image_artifact
from tessera.artifacts.pictures import grid
from tessera.artifacts.shown import ShownPictures
from tessera.components import InvalidParams, parse
from tessera.conditions import image
from tessera.contracts import ImageSpec, Planned
from tessera.datasets import image_folder
from tessera.export import __main__ as command
from tessera.params import Pipeline
from tessera.running.job import Job
from tessera.sources import shards
from tessera.sources.pictures import picture_of

ROOT = Path(__file__).parents[2]
NUM, WIDTH, HEIGHT = 24, 13, 10
COLOURS = np.array([[250, 250, 250], [200, 30, 40], [30, 160, 60], [40, 60, 200]], np.uint8)
NAMES = [f"{number:02d}" for number in range(NUM)]


def mask_of(number: int) -> np.ndarray:
    """(HEIGHT, WIDTH) of classes 0 to 3, no two alike."""
    return np.random.default_rng(number).integers(0, 4, (HEIGHT, WIDTH), np.uint8)


def save_mask(path: Path, mask: np.ndarray) -> None:
    """By a palette, whose colors say nothing of the classes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    picture = Image.fromarray(mask)
    picture.putpalette([value for row in COLOURS for value in row])
    picture.save(path)


def save_image(path: Path, mask: np.ndarray) -> None:
    """The picture that the mask determines."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(COLOURS[mask]).save(path)


def with_column(folder: Path) -> dict[str, Any]:
    """In a folder of their own, which is no class."""
    rows = []
    for number, name in enumerate(NAMES):
        save_image(folder / "ab"[number % 2] / f"{name}.png", mask_of(number))
        save_mask(folder / "masks" / f"{name}.png", mask_of(number))
        rows.append({"file_name": f"{'ab'[number % 2]}/{name}.png", "mask": f"./masks/{name}.png"})
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return {"metadata": {"picture": "mask"}, "labels": "folders"}


def with_names(folder: Path) -> dict[str, Any]:
    for number, name in enumerate(NAMES):
        save_image(folder / "ab"[number % 2] / f"{name}.png", mask_of(number))
        save_mask(folder / "ab"[number % 2] / f"{name}.mask.png", mask_of(number))
    return {"metadata": {"file": "beside", "picture": "mask.png"}, "labels": "folders"}


def with_suffixes(folder: Path) -> dict[str, Any]:
    for number, name in enumerate(NAMES):
        save_image(folder / f"{name}.tif", mask_of(number))
        save_mask(folder / f"{name}.png", mask_of(number))
    return {"metadata": {"file": "beside", "picture": "png"}, "labels": "none"}


FORMS = {"column": with_column, "names": with_names, "suffixes": with_suffixes}


def config_of(source: Path, settings: dict[str, Any], **changes: Any) -> image_folder.Config:
    plain = {"kind": "image_folder", "source": str(source), "height": 4, "width": 6, "filter": "lanczos"}
    return parse(
        image_folder.Config, plain | settings | {"test_fraction": 0.4, "max_unreadable_fraction": 0.0} | changes
    )


class Params:
    """All that the stage reads."""

    def __init__(self, dataset: Any):
        self.dataset = dataset


def prepared(place: Path, dataset: image_folder.Config, monkeypatch: pytest.MonkeyPatch, seconds: float = 60) -> Path:
    monkeypatch.setattr(Job, "require_fit", lambda *of: None)
    job = Job("prepare_images", place / "state")
    job.checkpoint_seconds = seconds
    prepare_images.run(Params(dataset), place / "images", job)
    return place / "images"


def nearest(mask: np.ndarray, resize: str, height: int = 4, width: int = 6) -> np.ndarray:
    """(height, width) by the definition: each pixel is that of the source in which its middle lies; 255 outside."""
    across, down = mask.shape[1] / width, mask.shape[0] / height
    if resize == "crop":
        across = down = min(across, down)
    inner = (height, width)
    if resize == "pad":
        scale = min(1 / across, 1 / down)
        inner = (round(mask.shape[0] * scale), round(mask.shape[1] * scale))
        across, down = mask.shape[1] / inner[1], mask.shape[0] / inner[0]
    found = np.full((height, width), 255, np.uint8)
    top, left = (height - inner[0]) // 2, (width - inner[1]) // 2
    first = [(mask.shape[0] - inner[0] * down) / 2, (mask.shape[1] - inner[1] * across) / 2]
    for row in range(inner[0]):
        for column in range(inner[1]):
            y, x = int(first[0] + (row + 0.5) * down), int(first[1] + (column + 0.5) * across)
            found[top + row, left + column] = mask[y, x]
    return found


def check(images: Path, resize: str = "crop") -> None:
    """Every image has the mask that determined it, resized as it is, in the place of its row."""
    index = pd.read_parquet(images / "index.parquet")
    seen = 0
    for split, pixels in image_artifact.read(images)[1].items():
        found = ShownPictures(images, split)
        of_split = index[(index.split == split) & index.kept].sort_values("row")
        assert len(found) == len(pixels) == len(of_split) > 0 and found.channels == 1
        expected = [nearest(mask_of(int(Path(name).stem)), resize)[None] for name in of_split.source]
        np.testing.assert_array_equal(found.uint8(np.arange(len(found))).numpy(), np.stack(expected))
        seen += len(found)
    assert seen == NUM and captions.said_of(images) == captions.Said(0, {}, picture_channels=1)
    assert not index[index.source.str.contains("mask")].kept.any()


@pytest.mark.parametrize("resize", ["crop", "pad", "stretch"])
@pytest.mark.parametrize("form", FORMS)
def test_every_image_has_exactly_the_nearest_pixels_of_its_mask(
    tmp_path: Path, form: str, resize: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    dataset = config_of(tmp_path / "source", FORMS[form](tmp_path / "source"), resize=resize)
    check(prepared(tmp_path, dataset, monkeypatch), resize)
    labels = {"a", "b"} if dataset.labels == "folders" else {"unlabeled"}
    assert set(image_folder.spec(dataset).class_names) == labels
    counted = image_folder.census(dataset)
    assert sum(map(len, counted.values())) == NUM and {*counted["train"], *counted["test"]} == set(range(len(labels)))


def packed(folder: Path, how: str) -> Path:
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    target = folder.with_suffix(f".{how}")
    if how == "zip":
        with zipfile.ZipFile(target, "w") as file:
            for path in paths:
                file.write(path, path.relative_to(folder))
        return target
    with tarfile.open(target, "w:gz" if how == "tar.gz" else "w") as file:
        for path in paths:
            file.add(path, path.relative_to(folder))
    return target


def as_webdataset(folder: Path) -> dict[str, Any]:
    """Two shards; the picture of an image lies before it, in one of them beyond another one's."""
    for number, letter in enumerate("ab"):
        paths = sorted((folder / letter).iterdir(), key=lambda path: path.name[:1])
        with tarfile.open(folder / f"{number:05d}.tar", "w") as file:
            for path in paths:
                file.add(path, path.relative_to(folder))
                path.unlink()
        (folder / letter).rmdir()
    return {"shards": "tar"}


def as_tables(folder: Path, has_paths: bool = True) -> dict[str, Any]:
    """Two files, as the package `datasets` writes images; pictures of plain bytes if they have no paths."""
    rows = []
    for number, name in enumerate(NAMES):
        path = folder / "ab"[number % 2] / f"{name}.png"
        mask = path.with_suffix(".mask.png").read_bytes()
        image = {"bytes": path.read_bytes(), "path": str(path.relative_to(folder))}
        rows.append({"image": image, "mask": {"bytes": mask, "path": f"{name}.png"} if has_paths else mask})
    for letter in "ab":
        shutil.rmtree(folder / letter)
    for number, part in enumerate((rows[0::2], rows[1::2])):  # in the order of the names
        pq.write_table(pa.Table.from_pylist(part), folder / f"{number}.parquet", row_group_size=5)
    return {"shards": "parquet", "metadata": {"file": "beside", "picture": "mask"}}


def as_plain_tables(folder: Path) -> dict[str, Any]:
    return as_tables(folder, has_paths=False)


def as_archive(how: str) -> Callable[[Path], dict[str, Any]]:
    return lambda folder: {"source": str(packed(folder, how))}


def as_one_shard(folder: Path) -> dict[str, Any]:
    return {"source": str(packed(folder, "tar")), "shards": "tar"}


CONTAINERS: list[tuple[str, Callable[[Path], dict[str, Any]], int]] = [
    ("column", as_archive("zip"), 1),
    ("column", as_archive("tar"), 2),
    ("column", as_one_shard, 1),
    ("names", as_archive("zip"), 2),
    ("names", as_webdataset, 1),
    ("names", as_tables, 2),
    ("names", as_plain_tables, 1),
]


@pytest.mark.parametrize(("form", "make", "processes"), CONTAINERS)
def test_the_same_pictures_in_another_container_are_the_same_artifact(
    tmp_path: Path,
    form: str,
    make: Callable[[Path], dict[str, Any]],
    processes: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    settings = FORMS[form](tmp_path / "source")
    in_folder = config_of(tmp_path / "source", settings)
    whole = prepared(tmp_path / "whole", in_folder, monkeypatch)
    counted = image_folder.census(in_folder)
    monkeypatch.setattr(image_folder, "PROCESSES_FROM", 1 if processes > 1 else 4096)
    monkeypatch.setattr(image_folder, "num_cores", lambda: processes)
    monkeypatch.setattr(shards, "ROWS_AT_ONCE", 4)
    source = {"source": str(tmp_path / "source")} | make(tmp_path / "source")
    dataset = config_of(Path(source["source"]), settings | source)
    images = prepared(tmp_path / "other", dataset, monkeypatch)
    check(images)
    for path in whole.glob("t*/*.*"):
        assert path.read_bytes() == (images / path.relative_to(whole)).read_bytes()
    indices = [pd.read_parquet(each / "index.parquet").query("kept") for each in (whole, images)]
    pd.testing.assert_frame_equal(*(one.drop(columns="id").reset_index(drop=True) for one in indices))
    assert {split: sorted(labels) for split, labels in image_folder.census(dataset).items()} == {
        split: sorted(labels) for split, labels in counted.items()
    }


def test_an_image_without_a_picture_in_its_row_is_listed_and_reading_goes_on_anywhere(tmp_path: Path) -> None:
    settings = with_names(tmp_path / "source") | as_tables(tmp_path / "source")
    path = tmp_path / "source/0.parquet"
    table = pq.read_table(path).to_pylist()
    table[2]["mask"] |= {"bytes": None}
    table[3]["mask"] = table[4]["image"]
    pq.write_table(pa.Table.from_pylist(table), path, row_group_size=5)
    with image_folder.opened(config_of(tmp_path / "source", settings, max_unreadable_fraction=1.0)) as opened:
        records, rest = list(opened.records(0)), list(opened.records(9))
    assert [record.source for record in records if record.reason] == ["a/04.png", "a/06.png"]
    assert "has the picture '04.png', which has no bytes in its row: the table names a file" in records[2].reason
    assert "has the picture 'a/08.png', which is in Pillow's mode RGB and not gray" in records[3].reason
    assert [record.source for record in rest] == [record.source for record in records[9:]]
    for one, other in zip(records[9:], rest, strict=True):
        np.testing.assert_array_equal(one.metadata.picture, other.metadata.picture)


def test_a_table_is_never_held_as_a_whole(tmp_path: Path) -> None:
    """Of 40 MB, in groups of 10 rows; what is no image is read too."""
    data = np.random.default_rng(0).bytes(50_000)
    rows = [{"image": data, "mask": {"bytes": data, "path": None}}] * 400
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "0.parquet", row_group_size=10, use_dictionary=False)
    settings = {"labels": "none", "shards": "parquet", "metadata": {"file": "beside", "picture": "mask"}}
    before = pa.total_allocated_bytes()
    with image_folder.opened(config_of(tmp_path / "0.parquet", settings)) as opened:
        held = [pa.total_allocated_bytes() - before for _ in opened.records(0)]
    assert len(held) == 400 and 0 < max(held) < 15_000_000


def test_images_that_were_kept_before_a_kill_keep_their_pictures(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dataset = config_of(tmp_path / "source", with_column(tmp_path / "source"))
    with killed_after(7, monkeypatch) as kept:
        prepared(tmp_path, dataset, monkeypatch, seconds=0)
    images = prepared(tmp_path, dataset, monkeypatch, seconds=0)
    assert 2 * NUM <= len(kept) < 2 * NUM + 7  # of images and masks, none of which was prepared again
    check(images)
    whole = prepared(tmp_path / "whole", dataset, monkeypatch)
    for path in images.rglob("*.*"):
        assert path.read_bytes() == (whole / path.relative_to(images)).read_bytes()


def told(folder: Path, **changes: Any) -> image_folder.Config:
    """Of three images: the second has what the test puts in the place of its mask."""
    settings = {"metadata": {"picture": "mask"} | changes, "labels": "none", "max_unreadable_fraction": 1.0}
    return config_of(folder, settings)


def three(folder: Path, second: Any, below: str = "") -> None:
    rows = []
    for number, name in enumerate(NAMES[:3]):
        save_image(folder / below / f"{name}.png", mask_of(number))
        if number != 1 or second == f"masks/{name}.png":
            save_mask(folder / "masks" / f"{name}.png", mask_of(number))
        rows.append({"file_name": f"{below}{name}.png", "mask": f"masks/{name}.png"})
    rows[1]["mask"] = second
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))


def bad(save: Callable[[Path], None]) -> Callable[[Path], str]:
    def write(folder: Path) -> str:
        save(folder / "masks/bad.png")
        return "masks/bad.png"

    return write


def pixels(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, shape, np.uint8)


TURNED = Image.Exif()
TURNED[0x0112] = 6
BROKEN = {
    "none": (lambda _: None, "has no picture by 'mask'"),
    "number": (lambda _: 7, "has '7', which is no name of a file, by 'mask'"),
    "missing": (lambda _: "masks/no.png", "has the picture 'masks/no.png', which is not there"),
    "itself": (
        lambda _: "./01.png",
        "has the picture '01.png', which is the image itself, expected another file: name the",
    ),
    "outside": (lambda _: "../no.png", "has the picture '../no.png', which is not there"),
    "text": (
        bad(lambda path: path.write_text("x")),
        "has the picture 'masks/bad.png', which Pillow cannot identify it",
    ),
    "empty": (bad(lambda path: path.write_bytes(b"")), "has the picture 'masks/bad.png', which is empty"),
    "cut": (
        bad(lambda path: path.write_bytes((path.parent / "00.png").read_bytes()[:-60])),
        "has the picture 'masks/bad.png', which cannot be read (",
    ),
    "size": (
        bad(lambda path: save_mask(path, pixels(WIDTH, HEIGHT) % 4)),
        "has the picture 'masks/bad.png', which has 10 x 13 pixels, expected 13 x 10, as its image has",
    ),
    "turned": (
        bad(lambda path: Image.fromarray(pixels(HEIGHT, WIDTH)).save(path, exif=TURNED)),
        "which has 10 x 13 pixels, expected 13 x 10",
    ),
    "colors": (
        bad(lambda path: Image.fromarray(pixels(HEIGHT, WIDTH, 3)).save(path)),
        "is in Pillow's mode RGB and not gray in every pixel: save it as gray levels, or write metadata.picture_channels: 3",
    ),
    "deep": (
        bad(lambda path: Image.fromarray(pixels(HEIGHT, WIDTH).astype(np.uint16) * 2).save(path)),
        "which has values from 0 to 496, expected gray levels from 0 to 255",
    ),
}


@pytest.mark.parametrize("name", BROKEN)
def test_an_image_with_no_such_picture_is_listed_with_its_reason(tmp_path: Path, name: str) -> None:
    write, reason = BROKEN[name]
    (tmp_path / "masks").mkdir()
    save_mask(tmp_path / "masks/00.png", mask_of(0))
    three(tmp_path, write(tmp_path))
    records = [record for record in image_folder.records(told(tmp_path)) if not record.ignored]
    assert [record.reason == "" for record in records] == [True, False, True]
    assert reason in records[1].reason and len(records[1].reason) < 170, records[1].reason
    strict = told(tmp_path).model_copy(update={"max_unreadable_fraction": 0.0})
    with pytest.raises(ValueError, match="1 of 3 files give no image") as refused:
        prepare_images.run(Params(strict), tmp_path / "out", Job("prepare_images", tmp_path / "state"))
    assert reason in str(refused.value) and "\n" not in str(refused.value)


@pytest.mark.parametrize("labels", ["none", "folders"])
@pytest.mark.parametrize("most", [0.0, 1.0])
def test_where_the_pictures_of_all_images_of_a_class_fail_the_reason_is_told(
    tmp_path: Path, most: float, labels: str
) -> None:
    """Rather than that the class has no readable image."""
    settings = with_column(tmp_path / "source") | {"labels": labels}
    for number, name in enumerate(NAMES):
        if labels == "none" or number % 2:  # all, or those of b
            Image.fromarray(COLOURS[mask_of(number)]).save(tmp_path / "source/masks" / f"{name}.png")
    dataset = config_of(tmp_path / "source", settings, max_unreadable_fraction=most)
    with pytest.raises(
        ValueError, match=r"'masks/0\d.png', which is in Pillow's mode RGB .* metadata.picture_channels: 3"
    ) as refused:
        prepare_images.run(Params(dataset), tmp_path / "out", Job("prepare_images", tmp_path / "state"))
    assert ("readable image in 'b'" in str(refused.value)) == (most == 1 and labels == "folders")
    assert "unlabeled" not in str(refused.value) and "\n" not in str(refused.value)


def test_a_picture_of_16_bits_that_are_classes_and_one_in_colors_are_kept_as_they_are(tmp_path: Path) -> None:
    mask = mask_of(1)
    how = {"height": HEIGHT, "width": WIDTH, "resize": "crop", "background": "white"}
    for kind in (np.uint8, np.uint16, np.int32):
        np.testing.assert_array_equal(picture_of(Image.fromarray(mask.astype(kind)), channels=1, **how), mask[None])
    found = picture_of(Image.fromarray(COLOURS[mask]), channels=3, **how)
    np.testing.assert_array_equal(found, COLOURS[mask].transpose(2, 0, 1))
    three(tmp_path, "masks/01.png")
    (record, *_) = [each for each in image_folder.records(told(tmp_path, picture_channels=3)) if not each.ignored]
    expected = COLOURS[nearest(mask_of(0), "crop")].transpose(2, 0, 1)  # by its palette
    np.testing.assert_array_equal(record.metadata.picture, expected)


def test_sources_in_which_no_image_can_have_a_picture_are_refused(tmp_path: Path) -> None:
    three(tmp_path / "a", "masks/01.png")
    with pytest.raises(ValueError, match=r"no image has a picture by 'msk': name another column, or, of file: beside"):
        list(image_folder.records(told(tmp_path / "a", picture="msk")))
    three(tmp_path / "b", "masks/01.png", "cats/")
    with pytest.raises(ValueError, match=r"has 1 folder of images beside those of pictures, expected one per class"):
        list(image_folder.records(told(tmp_path / "b").model_copy(update={"labels": "folders"})))
    with pytest.raises(ValueError, match=r"source.tar.gz is packed, and can be read from the front to the back alone"):
        settings = with_column(tmp_path / "source")
        list(image_folder.records(config_of(packed(tmp_path / "source", "tar.gz"), settings)))
    pq.write_table(pa.table({"image": [b"", b""], "mask": ["a", "b"]}), tmp_path / "0.parquet")
    settings = {"labels": "none", "shards": "parquet", "metadata": {"file": "beside", "picture": "mask"}}
    with pytest.raises(
        ValueError, match=r"'mask' is of string, expected the bytes of pictures, or {bytes, path} .* no"
    ):
        list(image_folder.records(config_of(tmp_path / "0.parquet", settings)))
    for column in ("msk", "image"):
        settings["metadata"]["picture"] = column
        with pytest.raises(
            ValueError, match=f"has no column '{column}' beside that of the images, expected it among 'mask':"
        ):
            list(image_folder.records(config_of(tmp_path / "0.parquet", settings)))
    (tmp_path / "c").mkdir()
    Image.new("L", (4, 4)).save(tmp_path / "c/1.jpg")
    with pytest.raises(ValueError, match=r"picture 'jpg' is how the names of all images end: none is left for a pict"):
        list(image_folder.records(told(tmp_path / "c", file="beside", picture="jpg")))
    with pytest.raises(InvalidParams, match="picture_channels is set, and no picture: name their column as picture"):
        told(tmp_path / "a", picture=None, picture_channels=3, captions=["text"])
    with pytest.raises(InvalidParams, match="picture_channels"):
        told(tmp_path / "a", picture_channels=2)


def test_a_picture_is_told_by_its_nearest_pixels_and_as_the_file_has_it() -> None:
    config = image.Config(shows="file", pixels=(2, 2), patch_size=1)
    pictures = torch.arange(32, dtype=torch.uint8).view(2, 1, 4, 4)
    rows = image.encoded(config, pictures, torch.tensor([3, 4]))
    levels = torch.tensor([[5.0, 7, 13, 15], [21, 23, 29, 31]])  # of 2x2 pixels the one behind their middle
    torch.testing.assert_close(rows, torch.cat([torch.tensor([[4.0], [5.0]]), 2 * levels / 255 - 1], dim=1))
    assert image.Config(shows="file", channels=3, pixels=(2, 2), patch_size=1).shape == (3, 2, 2)
    with pytest.raises(ValueError, match="the pictures have channels 3: expected 1, as those of files had"):
        image.encoded(config, torch.zeros(2, 3, 4, 4, dtype=torch.uint8))
    with pytest.raises(InvalidParams, match="channels is 3, but it shows gray: leave out channels"):
        parse(image.Config, {"kind": "image", "channels": 3, "pixels": [4, 4], "patch_size": 1})


@pytest.mark.parametrize(
    ("channels", "sentences"),
    [
        (0, ["the images have no pictures in files: name the column of their files as dataset.metadata.picture"]),
        (
            3,
            [
                "its pictures have channels 1, but those in files have 3: write channels: 3, or dataset.metadata.picture_c"
            ],
        ),
        (1, []),
    ],
)
def test_pictures_that_a_prior_cannot_read_are_told_before_anything_is_trained(
    channels: int, sentences: list[str]
) -> None:
    spec = ImageSpec(name="x", channels=1, height=8, width=8, num_classes=1, class_names=("x",), licence="none")
    planned = Planned(spec, {}, 2, 8, (), captions.Said(0, {}, picture_channels=channels))
    config = image.Config(shows="file", pixels=(4, 4), patch_size=1)
    found = list(image.problems(config, planned))
    assert len(found) == len(sentences) and all(map(str.startswith, found, sentences))
    assert list(image.problems(config, planned._replace(said=None))) == []


def blocks(number: int) -> np.ndarray:
    """(8, 8) of four classes, one in each half."""
    return np.random.default_rng(number).integers(0, 4, (2, 1), np.uint8).repeat(4, axis=0).repeat(8, axis=1)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Pipeline]:
    """A checkout of a system that was told the masks of 200 images, which these determine, spread over the gray levels."""
    root = tmp_path_factory.mktemp("trained")
    rows = []
    for number in range(240):
        save_image(root / "source" / f"{number}.png", blocks(number))
        (root / "source/masks").mkdir(exist_ok=True)
        Image.fromarray(blocks(number) * 85).save(root / "source/masks" / f"{number}.png")
        rows.append({"file_name": f"{number}.png", "mask": f"masks/{number}.png"})
    (root / "source/metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    raw = yaml.safe_load((ROOT / "params.yaml").read_text())
    raw["dataset"] = {"kind": "image_folder", "source": str(root / "source"), "name": "blocks", "height": 8, "width": 8}
    raw["dataset"] |= {"labels": "none", "metadata": {"picture": "mask"}}
    prior = {"kind": "flow_matching", "predicts": "data", "num_views": 1, "time_mean": -1.5, "time_std": 1.5}
    prior |= {"denoiser": {"kind": "transformer", "width": 32, "depth": 2, "heads": 2, "patch_size": 4}}
    prior |= {"condition": {"kind": "image", "shows": "file", "pixels": [8, 8], "patch_size": 4, "width": 32}}
    prior |= {"training": {"num_steps": 250, "batch_size": 32, "learning_rate": 3e-3, "ema_decay": 0.95}}
    raw["tokenizers"] = {"none": {"kind": "none", "quantizer": {"kind": "identity"}}}
    raw["systems"] = {"painted": {"tokenizer": "none", "prior": prior, "sampling": {"num_steps": 8}}}
    raw |= {"follow_training": {"every": 0}, "sample_images": {"num_images": 24, "batch_size": 24}}
    raw["features"], raw["encode_tokens"] = {"random": {"kind": "random"}}, raw["encode_tokens"] | {"warps": 0}
    params = parse(Pipeline, raw)
    (root / "params.yaml").write_text(yaml.safe_dump(raw, sort_keys=False))
    data, state = root / "data", root / "state"
    images, tokenizer, tokens = data / "images", data / "tokenizers/none", data / "tokens/none"
    prior_folder, samples = data / "priors/painted", data / "samples/painted"
    prepare_images.run(params, images, Job("prepare_images", state / "1"))
    train_tokenizer.run(params, "none", images, tokenizer, root / "t.csv", Job("train_tokenizer", state / "2"))
    encode_tokens.run(params, "none", images, tokenizer, tokens, Job("encode_tokens", state / "3"))
    of_prior = (images, tokenizer, tokens, prior_folder, root / "p.csv", root / "p.json")
    train_prior.run(params, "painted", *of_prior, Job("train_prior", state / "4"))
    sample_images.run(
        params, "painted", tokenizer, prior_folder, samples, root / "grid.png", Job("sample", state / "5")
    )
    return root, params


def away(drawn: np.ndarray, masks: np.ndarray) -> float:
    """The mean distance of (N, 3, 8, 8) uint8 from what (N, 8, 8) classes determine."""
    return float(np.abs(drawn.astype(float) - COLOURS[masks].transpose(0, 3, 1, 2)).mean())


def test_samples_are_what_the_masks_of_test_images_determine(trained: tuple[Path, Pipeline]) -> None:
    root, _ = trained
    samples = root / "data/samples/painted"
    told = np.stack([one.vector for one in captions.examples_of(samples)])
    masks = np.rint((told.reshape(-1, 8, 8) + 1) * 127.5 / 85).astype(int)
    index = pd.read_parquet(root / "data/images/index.parquet")
    of_test = index[(index.split == "test") & index.kept].source
    expected = {blocks(int(Path(name).stem)).tobytes() for name in of_test}
    assert {mask.astype(np.uint8).tobytes() for mask in masks} <= expected and len(masks) == 24
    drawn = np.load(samples / "images-00000.npy")
    assert away(drawn, masks) < 0.7 * away(drawn, np.roll(masks, 1, axis=0))
    rows = np.concatenate([np.repeat(85 * masks[:10, None], 3, axis=1), drawn[:10]]).astype(np.uint8)
    shown = np.asarray(Image.open(root / "grid.png"))
    np.testing.assert_array_equal(
        shown[: len(shown) // 3], grid(rows, 10)[: len(shown) // 3]
    )  # masks, and images below


def test_a_mask_of_ones_own_is_painted_over_in_python_and_from_the_shell_alike(
    trained: tuple[Path, Pipeline], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of another size, and cropped: what is told are its nearest pixels."""
    from studio import edit

    root, params = trained
    command.write(params, "painted", root, tmp_path / "exported")
    system = tessera.load(tmp_path / "exported", device="cpu")
    assert "system.preprocess([...], are_told=True)" in (tmp_path / "exported/README.md").read_text()
    mask = mask_of(5) * 85
    Image.fromarray(mask).save(tmp_path / "mask.png")
    pictures = system.preprocess([Image.open(tmp_path / "mask.png")] * 2, are_told=True)
    np.testing.assert_array_equal(pictures[0, 0].numpy(), nearest(mask, "crop", 8, 8))
    drawn = system.sample(pictures=pictures, seed=3)
    assert drawn.shape == (2, 3, 8, 8)
    assert not torch.equal(drawn, system.sample(pictures=pictures.flip(3), seed=3))
    generator = seeding.generator
    monkeypatch.setattr(seeding, "generator", lambda seed, *purpose, device: generator(3, "sample_images", 0))
    monkeypatch.chdir(root)
    asked = ["--system", "painted", "--sample", "--picture", str(tmp_path / "mask.png"), "--count", "2", "--seed", "3"]
    assert edit.main([*asked, str(tmp_path / "out.png")]) == 0
    np.testing.assert_array_equal(np.asarray(Image.open(tmp_path / "out.png")), grid(drawn.numpy(), 2))
    save_image(tmp_path / "mask.png", mask_of(5))
    assert edit.main([*asked, str(tmp_path / "out.png")]) == 2
    assert "mask.png is in Pillow's mode RGB and not gray in every pixel: save it as gray" in capsys.readouterr().err
    with pytest.raises(ValueError, match="picture 0 cannot be told: it is in Pillow's mode RGB and not gray"):
        system.preprocess([Image.open(tmp_path / "mask.png")], are_told=True)
    with pytest.raises(ValueError, match="the pictures have channels 3: expected 1, as those of files had"):
        system.sample(pictures=system.preprocess([Image.open(tmp_path / "mask.png")]))


def test_the_studio_tells_a_mask_of_a_test_image_or_of_ones_own(
    trained: tuple[Path, Pipeline], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is kept of an upload are its classes in the images' size, which the shell reads as the page does."""
    from studio import edit
    from studio.actions import KEPT, Studio

    root, _ = trained
    monkeypatch.chdir(root)
    studio = Studio()
    assert "was told pictures" in studio.about("painted")
    of_test = [np.asarray(Image.open(KEPT / studio.take_test_picture("painted", row))) for row in studio.rows]
    assert {blocks(number).tobytes() for number in range(240)} >= {(mask // 85).tobytes() for mask in of_test}
    save_mask(tmp_path / "own.png", mask_of(5))
    kept = studio.take_to_tell("painted", (tmp_path / "own.png").read_bytes(), "own.png")
    np.testing.assert_array_equal(np.asarray(Image.open(KEPT / kept)), nearest(mask_of(5), "crop", 8, 8))
    assert np.array_equal(
        np.unique(np.asarray(studio.told("painted", kept))), np.unique(nearest(mask_of(5), "crop", 8, 8))
    )
    drawn = studio.draw("painted", None, 2, 3, picture=kept)
    assert edit.main([*drawn.command.split()[3:-1], str(tmp_path / "out.png")]) == 0
    np.testing.assert_array_equal(np.asarray(Image.open(tmp_path / "out.png")), grid(drawn.images, 2))
    assert not np.array_equal(drawn.images, studio.draw("painted", None, 2, 3).images)
    save_image(tmp_path / "own.png", mask_of(5))
    with pytest.raises(ValueError, match=r"^own.png is in Pillow's mode RGB and not gray in every pixel"):
        studio.take_to_tell("painted", (tmp_path / "own.png").read_bytes(), "own.png")


def test_images_of_many_channels_and_with_their_class_in_the_name_have_pictures_too(tmp_path: Path) -> None:
    for number in range(12):
        name = f"{'cat' if number % 2 else 'dog'}_{number}"
        np.save(tmp_path / f"{name}.npy", np.repeat(10 * mask_of(number)[:, :, None], 5, axis=2))
        save_mask(tmp_path / f"{name}.mask.png", mask_of(number))
    settings = {"metadata": {"file": "beside", "picture": "mask.png"}, "label_pattern": "([a-z]+)_[0-9]+", "bands": 5}
    found = list(image_folder.records(config_of(tmp_path, settings | {"filter": "nearest"})))
    assert sum(record.image is not None for record in found) == 12 and all(
        one.ignored for one in found if one.image is None
    )
    for record in found:
        if record.image is not None:
            number = int(Path(record.source).stem.partition("_")[2])
            np.testing.assert_array_equal(record.metadata.picture[0], nearest(mask_of(number), "crop"))
            np.testing.assert_array_equal(record.image, np.repeat(10 * record.metadata.picture, 5, axis=0))
            assert record.label == 1 - number % 2

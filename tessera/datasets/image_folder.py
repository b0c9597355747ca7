"""Any images of yours: a folder, tar or zip of image files, with sub-folders as classes and train/ and test/ if you like.

    source/cat/1.jpg               classes, split by us          labels: folders
    source/train/cat/1.jpg         classes, split by you         (test/, val/, valid/ or validation/ beside train/;
                                                         val/ beside both: see val_images)
    source/1.jpg                   no classes                    labels: none

Every file is listed with its fate; none is skipped silently. Deeper folders inside a class belong to the class.
"""

import hashlib
import os
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Annotated, Literal, NamedTuple

from pydantic import Field

from tessera.components import Params
from tessera.contracts import Count, ImageSpec
from tessera.seeding import derive
from tessera.sources.archives import Entry, Limits, Reader, open_source
from tessera.sources.decoding import PILLOW_MAX_PIXELS, Background, Filter, Resize, decode, pillow_warnings
from tessera.sources.records import DatasetName, Record, Unreadable

LICENCE = "not stated: that of the images' authors"
TEST_FOLDERS = ("test", "val", "valid", "validation")  # the first that exists beside train/ is the test split
READ_AS_SPLITS = {"train", "training", "test", "testing", "eval", "dev", "val", "valid", "validation"}  # in any case
CHUNK_FILES, CHUNK_BYTES = 256, 64 * 2**20  # decoded together


class Config(Params):
    kind: Literal["image_folder"]
    source: str  # a folder, a .tar(.gz, .xz, .bz2) or a .zip
    name: DatasetName = "image-folder"
    root: str = ""  # the folder inside the source that holds the data, such as "archive/images"
    height: Count
    width: Count
    channels: Literal[1, 3] = 3
    labels: Literal["folders", "none"] = "folders"
    resize: Resize = "crop"  # crop: shorter side to size, then the center; pad: longer side to size; stretch: both
    filter: Filter = "lanczos"
    background: Background = "white"  # under transparent pixels, and around padded images
    val_images: Literal["train", "ignore"] | None = None  # of val/ beside train/ and test/; null: refused
    test_fraction: Annotated[float, Field(gt=0, lt=1)] = 0.1  # where the source has no split of its own
    split_seed: int = 0
    max_unreadable_fraction: Annotated[float, Field(ge=0, le=1)] = 0.01
    max_pixels: Annotated[int, Field(ge=1, le=PILLOW_MAX_PIXELS)] = 64 * 2**20  # of one image, before resizing
    max_file_bytes: Count = 256 * 2**20
    max_archive_bytes: Count = 2**40  # of all files in an archive, unpacked
    max_archive_files: Count = 2_000_000
    licence: str = LICENCE

    @property
    def num_classes(self) -> int | None:
        return 1 if self.labels == "none" else None


def spec(config: Config) -> ImageSpec:
    """Lists the source for its class names. Raises ValueError if it is missing, empty, damaged or of another layout."""
    with _open(config) as (entries, _):
        names = _Layout(config, entries).class_names
    return ImageSpec(
        name=config.name,
        channels=config.channels,
        height=config.height,
        width=config.width,
        num_classes=len(names),
        class_names=tuple(names),
        licence=config.licence,
    )


def records(config: Config) -> Iterator[Record]:
    """Every file of the source, in order of name, decoded or with a reason. Raises ValueError as `spec` does."""
    kept: Counter[int] = Counter()
    decoder = partial(
        decode,
        channels=config.channels,
        height=config.height,
        width=config.width,
        resize=config.resize,
        filter=config.filter,
        background=config.background,
        max_pixels=config.max_pixels,
    )
    with _open(config) as (entries, read), ThreadPoolExecutor(min(4, os.cpu_count() or 1)) as pool:
        layout = _Layout(config, entries)
        for chunk in _chunks(entries, layout, read):
            with pillow_warnings():  # Pillow decodes outside Python's lock, so threads help
                decoded = list(pool.map(partial(_decode, decoder), chunk))
            for record in decoded:
                kept[record.label] += record.image is not None
                yield record
    barren = [name for label, name in enumerate(layout.class_names) if not kept[label]]
    if barren and kept:
        raise ValueError(
            f"{config.source} has no readable image in {', '.join(map(repr, barren[:5]))}"
            f"{f' and {len(barren) - 5} more' if len(barren) > 5 else ''}, but each folder is a class: "
            f"move what is no class elsewhere, or set labels: none"
        )


def census(config: Config) -> dict[str, list[int]]:
    """The labels of the files of each split, as if each were an image: they are listed and not read. Raises as `spec` does."""
    found: dict[str, list[int]] = {"train": [], "test": []}
    with _open(config) as (entries, _):
        layout = _Layout(config, entries)
        for entry in entries:
            place = layout.place(entry.name)
            if not (entry.refusal or place.refusal):
                found[place.split].append(place.label)
    return found


def _open(config: Config):  # a context manager of (entries, reader)
    limits = Limits(config.max_file_bytes, config.max_archive_bytes, config.max_archive_files)
    return open_source(Path(config.source), limits)


class _Place(NamedTuple):
    """What a file's name says about it."""

    split: str
    label: int
    refusal: str = ""
    ignored: bool = False


class _Layout:
    """Reads splits and classes from the names of the files."""

    def __init__(self, config: Config, entries: list[Entry]):
        self.config = config
        self.root = tuple(part for part in config.root.split("/") if part)
        inside = [parts for entry in entries if not entry.refusal and (parts := self._below_root(entry.name))]
        if not inside:
            where = f"{config.source} below {config.root}" if self.root else config.source
            raise ValueError(f"{where} holds no files, expected images in it or in folders, one per class")
        tops = {parts[0] for parts in inside if len(parts) > 1}
        found = [name for name in TEST_FOLDERS if name in tops] if "train" in tops else []
        self.test_folder = found[0] if found else None
        self.val_folders = found[1:]
        self._require_use_of_val([parts[0] for parts in inside])
        of_val = self.val_folders if config.val_images == "train" else []
        self.split_folders = ("train", self.test_folder, *of_val) if found else ()
        self.class_names = ["unlabeled"]
        if config.labels == "folders":
            depth = 1 if self.test_folder else 0
            self.class_names = sorted(
                {
                    parts[depth]
                    for parts in inside
                    if len(parts) > depth + 1 and (not self.test_folder or parts[0] in self.split_folders)
                }
            )
            self._require_classes()
        self.numbers = {name: label for label, name in enumerate(self.class_names)}

    def _require_use_of_val(self, tops: list[str]) -> None:
        """Images that are left out in silence would be missed by nobody."""
        if self.config.val_images is not None or not self.val_folders:
            return
        counts = ", ".join(f"{tops.count(name):,} in {name}/" for name in self.val_folders)
        raise ValueError(
            f"{self.config.source} has images ({counts}) beside train/ and {self.test_folder}/, but there is no third split: "
            f"write dataset.val_images: train to train on them too, or val_images: ignore to leave them out"
        )

    def _require_classes(self) -> None:
        readings = {name.casefold() for name in self.class_names}
        if not self.test_folder and len(readings & READ_AS_SPLITS) >= 2 and readings <= READ_AS_SPLITS:
            raise ValueError(
                f"{self.config.source} has the folders {', '.join(map(repr, self.class_names))}, which read as splits and not "
                f"as classes, expected train and one of {', '.join(TEST_FOLDERS)}: rename them so"
            )
        if len(self.class_names) >= 2:
            return
        below = f" below {self.config.root}" if self.root else ""
        found = f"the single folder {self.class_names[0]!r}" if self.class_names else "no folders"
        root = "/".join((*self.root, *self.class_names))
        raise ValueError(
            f"{self.config.source} has {found}{below}, expected a folder per class: set labels: none if there are "
            f"no classes{f', or root: {root} if that folder only wraps the data' if self.class_names else ''}"
        )

    def _below_root(self, name: str) -> tuple[str, ...]:
        parts = tuple(name.split("/"))
        return parts[len(self.root) :] if parts[: len(self.root)] == self.root else ()

    def place(self, name: str) -> _Place:
        parts = self._below_root(name)
        if not parts:
            return _Place("", -1, f"lies outside {self.config.root}", ignored=True)
        split, folders = self._split(parts), parts[:-1]
        if self.test_folder:
            if not folders or folders[0] not in self.split_folders:
                unused = bool(folders) and folders[0] in self.val_folders
                return _Place("", -1, f"lies in neither train/ nor {self.test_folder}/", ignored=unused)
            folders = folders[1:]
        if self.config.labels == "none":
            return _Place(split, 0)
        if not folders:
            return _Place(split, -1, "lies in no class folder")
        return _Place(split, self.numbers.get(folders[0], -1))

    def _split(self, parts: tuple[str, ...]) -> str:
        """By hash of seed and name: needs no other file, and stays when files are added or the source is packed."""
        if self.test_folder:
            return "test" if parts[0] == self.test_folder else "train"
        chance = derive(self.config.split_seed, "split", "/".join(parts)) / 2**63
        return "test" if chance < self.config.test_fraction else "train"


class _Waiting(NamedTuple):
    """A file on its way to the decoder."""

    record: Record
    data: bytes | None


def _chunks(entries: list[Entry], layout: _Layout, read: Reader) -> Iterator[list[_Waiting]]:
    chunk: list[_Waiting] = []
    num_bytes = 0
    for entry in entries:
        waiting = _read(entry, layout, read)
        chunk.append(waiting)
        num_bytes += len(waiting.data or b"")
        if len(chunk) == CHUNK_FILES or num_bytes >= CHUNK_BYTES:
            yield chunk
            chunk, num_bytes = [], 0
    if chunk:
        yield chunk


def _read(entry: Entry, layout: _Layout, read: Reader) -> _Waiting:
    place = layout.place(entry.name)
    refusal = entry.refusal or place.refusal
    record = Record(place.split, place.label, entry.name, "", None, refusal, entry.ignored or place.ignored)
    if refusal:
        return _Waiting(record, None)
    try:
        data = read(entry)
    except Unreadable as error:
        return _Waiting(record._replace(reason=str(error)), None)
    return _Waiting(record._replace(sha256=hashlib.sha256(data).hexdigest()), data)


def _decode(decoder: partial, waiting: _Waiting) -> Record:
    if waiting.data is None:
        return waiting.record
    try:
        return waiting.record._replace(image=decoder(waiting.data))
    except Unreadable as error:
        return waiting.record._replace(reason=str(error))

"""Any images of yours: a folder, tar or zip of image files, with sub-folders as classes and train/ and test/ if you like.

    source/cat/1.jpg               classes, split by us          labels: folders
    source/train/cat/1.jpg         classes, split by you         (test/, val/, valid/ or validation/ beside train/;
                                                         val/ beside both: see val_images)
    source/1.jpg                   no classes                    labels: none
    source/cat_1.jpg               classes in the names          label_pattern: "([a-z]+)_[0-9]+"
    source/metadata.jsonl          captions, classes, splits     metadata: {captions: [text]}: sources/metadata.py
    source/1.jpg, 1.mask.png       pictures beside images        metadata: {picture: mask.png, ...}: sources/pictures.py
    source/000.tar, ...            shards                        shards: tar, or parquet: sources/shards.py
    source/1.npy, 1.tif            1 to 16 channels              bands: 13: sources/bands.py; of 16 bits, bits: 16

Every file is listed with its fate; none is skipped silently. Deeper folders inside a class belong to the class.
"""

from collections import Counter, deque
from collections.abc import Collection, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Annotated, Literal, NamedTuple

from pydantic import Field

from tessera.components import AddedKey, Params, sets
from tessera.contracts import Count, ImageSpec
from tessera.seeding import derive
from tessera.sources import wide_bands
from tessera.sources.archives import ANYWHERE, Limits, Reader, open_source
from tessera.sources.bands import Bands, ToldByReasons, decoder_of
from tessera.sources.decoding import PILLOW_MAX_PIXELS, Background, Filter, Resize, decode, pillow_warnings
from tessera.sources.listing import Entry, Listing
from tessera.sources.metadata import DescribedLayout, Metadata, described
from tessera.sources.naming import LabelPattern, NamedLayout, without_classes
from tessera.sources.pictures import paired, pictured
from tessera.sources.processes import Decoder, Fate, Task, fate, fates, num_cores, task
from tessera.sources.records import DatasetName, Record, Source
from tessera.sources.shards import ShardKind, open_pictured_shards, open_shards

LICENCE = "not stated: that of the images' authors"
TEST_FOLDERS = ("test", "val", "valid", "validation")  # the first that exists beside train/ is the test split
READ_AS_SPLITS = {"train", "training", "test", "testing", "eval", "dev", "val", "valid", "validation"}  # in any case
CHUNK_FILES, CHUNK_BYTES = 256, 64 * 2**20  # decoded together by threads
TASK_FILES, TASK_BYTES = 32, 8 * 2**20  # by one process
PROCESSES_FROM = 4096  # files: fewer are decoded before processes would have started


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
    metadata: AddedKey[Metadata] = None  # what a file beside the images says of them
    shards: AddedKey[ShardKind] = None  # the source is many tars (webdataset), or many files of parquet
    image: AddedKey[str] = None  # of parquet the column that holds the images; unset: "image"
    label_pattern: AddedKey[LabelPattern] = None  # finds the class in each name, in the place of labels
    bands: AddedKey[Bands] = None  # channels of each file as they are, in the place of channels: sources/bands.py
    bits: AddedKey[wide_bands.Bits] = (
        None  # 16: of each of these channels, all of which are kept: sources/wide_bands.py
    )

    @property
    def num_classes(self) -> int | None:
        if sets(self, "label_pattern"):
            return None
        if sets(self, "metadata"):
            return self.metadata.num_classes_beside(self.labels)
        return 1 if self.labels == "none" else None


@contextmanager
def opened(config: Config) -> Iterator[Source]:
    """The source, listed once. Raises ValueError if it is missing, empty, damaged or of another layout."""
    with _open(config) as (entries, read):
        if sets(config, "label_pattern"):
            config = without_classes(config)
        layout = _Layout(config, entries)
        if sets(config, "metadata"):
            layout = DescribedLayout(layout, config, entries, read)
        if sets(config.metadata, "picture"):
            layout = pictured(layout, config, entries)
        if sets(config, "label_pattern"):
            layout = NamedLayout(layout, config, entries)
        spec = ImageSpec(
            name=config.name,
            channels=config.channels,
            height=config.height,
            width=config.width,
            num_classes=len(layout.class_names),
            class_names=tuple(layout.class_names),
            licence=config.licence,
        )
        if sets(config, "bands"):
            spec = spec.model_copy(update={"channels": config.bands})
            layout = ToldByReasons(layout)
        if sets(config, "bits"):
            spec = spec.model_copy(update={"bits": config.bits})
        yield Source(spec, entries.fingerprint, partial(_records, entries, layout, read), layout.require_images)


def spec(config: Config) -> ImageSpec:
    """Lists the source for its class names. Raises as `opened` does."""
    with opened(config) as source:
        return source.spec


def records(config: Config) -> Iterator[Record]:
    """Every file of the source, in order of name, decoded or with a reason. Raises ValueError as `opened` does."""
    with opened(config) as source:
        labels = set()
        for record in source.records(0):
            if record.image is not None:
                labels.add(record.label)
            yield record
        source.require_whole(labels)


def _records(entries: Listing, layout: "_Layout", read: Reader, first: int) -> Iterator[Record]:
    config = layout.config
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
    if sets(config, "bands"):
        decoder = decoder_of(config)
    if sets(config, "bits"):
        decoder = wide_bands.decoder_of(config)
    listed = (_Listed(entry, layout) for entry in entries.since(first))
    if sets(config.metadata, "picture"):
        is_small = len(entries) - first < PROCESSES_FROM or num_cores() == 1
        yield from paired(_by_threads if is_small else _by_processes, listed, layout, read, decoder)
        return
    if len(entries) - first < PROCESSES_FROM or num_cores() == 1:
        yield from _by_threads(listed, read, decoder)
    else:
        yield from _by_processes(listed, read, decoder)


def census(config: Config) -> dict[str, list[int]]:
    """The labels of the files of each split, as if each were an image: they are listed and not read. Raises as `spec` does."""
    found: dict[str, list[int]] = {"train": [], "test": []}
    with _open(config) as (entries, _):
        if sets(config, "label_pattern"):
            config = without_classes(config)
        layout = _Layout(config, entries)
        if sets(config, "metadata"):
            layout = DescribedLayout(layout, config, entries, _)  # what reads one of them
        if sets(config.metadata, "picture"):
            layout = pictured(layout, config, entries)
        if sets(config, "label_pattern"):
            layout = NamedLayout(layout, config, entries)
        for entry in entries:
            place = layout.place(entry.name)
            if not (entry.refusal or place.refusal):
                found[place.split].append(place.label)
    return found


def _open(config: Config):  # a context manager of (entries, reader)
    limits = Limits(config.max_file_bytes, config.max_archive_bytes, config.max_archive_files)
    if sets(config, "shards"):
        if sets(config.metadata, "picture"):
            column = config.metadata.picture
            return open_pictured_shards(Path(config.source), config.shards, config.image or "image", column, limits)
        return open_shards(Path(config.source), config.shards, config.image or "image", limits)
    return open_source(Path(config.source), limits)


class _Place(NamedTuple):
    """What a file's name says about it."""

    split: str
    label: int
    refusal: str = ""
    ignored: bool = False


class _Layout:
    """Reads splits and classes from the names of the files."""

    def __init__(self, config: Config, entries: Listing):
        self.config = config
        self.root = tuple(part for part in config.root.split("/") if part)
        folders, counts = set(), Counter()  # the two uppermost folders of each file; files below what may be a split
        for entry in entries:
            if not entry.refusal and (parts := self._below_root(entry.name)):
                folders.add(parts[:-1][:2])
                if parts[0] in TEST_FOLDERS:
                    counts[parts[0]] += 1
        if not folders:
            where = f"{config.source} below {config.root}" if self.root else config.source
            raise ValueError(f"{where} holds no files, expected images in it or in folders, one per class")
        tops = {above[0] for above in folders if above}
        found = [name for name in TEST_FOLDERS if name in tops] if "train" in tops else []
        self.test_folder = found[0] if found else None
        self.val_folders = found[1:]
        self._require_use_of_val(counts)
        of_val = self.val_folders if config.val_images == "train" else []
        self.split_folders = ("train", self.test_folder, *of_val) if found else ()
        self.class_names = ["unlabeled"]
        if config.labels == "folders":
            below = {above[1] for above in folders if len(above) > 1 and above[0] in self.split_folders}
            self.class_names = sorted(below if self.test_folder else tops)
            self._require_classes()
        self.numbers = {name: label for label, name in enumerate(self.class_names)}

    def _require_use_of_val(self, num_files: Counter[str]) -> None:
        """Images that are left out in silence would be missed by nobody."""
        if self.config.val_images is not None or not self.val_folders:
            return
        counts = ", ".join(f"{num_files[name]:,} in {name}/" for name in self.val_folders)
        raise ValueError(
            f"{self.config.source} has images ({counts}) beside train/ and {self.test_folder}/, but there is no third split: "
            f"write dataset.val_images: train to train on them too, or val_images: ignore to leave them out"
        )

    def require_images(self, labels: Collection[int]) -> None:
        """Raises ValueError, given the labels of all images, if a class has none."""
        barren = [name for label, name in enumerate(self.class_names) if label not in labels]
        if barren:
            raise ValueError(
                f"{self.config.source} has no readable image in {', '.join(map(repr, barren[:5]))}"
                f"{f' and {len(barren) - 5} more' if len(barren) > 5 else ''}, expected one of each class at least: "
                f"mend its files (npy asks for dataset.bands), move a folder that is no class elsewhere, or set labels: none"
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


class _Listed:
    """A file of the source, on its way to the decoder."""

    def __init__(self, entry: Entry, layout: _Layout):
        place = layout.place(entry.name)
        self.entry, self.is_refused = entry, bool(entry.refusal or place.refusal)
        reason, is_ignored = entry.refusal or place.refusal, entry.ignored or place.ignored
        self.record = Record(place.split, place.label, entry.name, "", None, reason, is_ignored)
        if sets(layout.config, "metadata"):
            self.record = self.record._replace(metadata=described(layout.said(entry.name)))


def _chunks(listed: Iterable[_Listed], files: int, most_bytes: int) -> Iterator[list[_Listed]]:
    """In their order, as few together as take up at most so many bytes, the last one apart."""
    chunk: list[_Listed] = []
    num_bytes = 0
    for each in listed:
        chunk.append(each)
        num_bytes += 0 if each.is_refused else each.entry.size
        if len(chunk) == files or num_bytes >= most_bytes:
            yield chunk
            chunk, num_bytes = [], 0
    if chunk:
        yield chunk


def _by_threads(listed: Iterable[_Listed], read: Reader, decoder: Decoder) -> Iterator[Record]:
    """Of few files: they are decoded before processes would have started."""
    with ThreadPoolExecutor(min(4, num_cores())) as pool:
        for chunk in _chunks(listed, CHUNK_FILES, CHUNK_BYTES):
            with pillow_warnings():  # Pillow decodes outside Python's lock, so threads help
                found = list(pool.map(partial(fate, read=read, decoder=decoder), _tasks(chunk, read)))
            yield from _with_fates(chunk, found)


def _by_processes(listed: Iterable[_Listed], read: Reader, decoder: Decoder) -> Iterator[Record]:
    waiting: deque[list[_Listed]] = deque()

    def tasks() -> Iterator[list[Task]]:
        for chunk in _chunks(listed, TASK_FILES, TASK_BYTES):
            waiting.append(chunk)
            yield _tasks(chunk, read)

    for found in fates(tasks(), read if isinstance(read, ANYWHERE) else None, decoder):
        yield from _with_fates(waiting.popleft(), found)


def _tasks(chunk: list[_Listed], read: Reader) -> list[Task]:
    return [task(each.entry, read, read_now=not isinstance(read, ANYWHERE)) for each in chunk if not each.is_refused]


def _with_fates(chunk: list[_Listed], found: list[Fate]) -> Iterator[Record]:
    fates_of = iter(found)
    for each in chunk:
        yield each.record if each.is_refused else each.record._replace(**next(fates_of)._asdict())

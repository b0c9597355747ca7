"""What a file beside the images says of them: captions, the class, the split.

    metadata.jsonl        a JSON object for each image, as the Hugging Face `datasets` package reads it in folders of images
    metadata.csv          a column for each thing that is said, with the columns' names in its first line
    metadata.parquet      the same as a table
    dataset.json          {"labels": [["a/1.png", 3], ...]}, as StyleGAN reads it: the columns file_name and label
    beside                a/1.txt, a/1.json, a/1.cls beside a/1.jpg, as in the shards of webdataset: the columns txt, cls, and
                          those of the JSON object; in shards of parquet: the other columns of the image's row

Every file of that name is read, wherever it lies in the source; it names images relative to its own folder. Several rows of
one image are several captions of it. What is said lies on disk once it is much, as the names of the files do.
"""

import itertools
import json
import sqlite3
import tempfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import PurePosixPath
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import AfterValidator, model_validator

from tessera.components import AddedKey, Params, sets
from tessera.seeding import derive
from tessera.sources import pictures, vectors
from tessera.sources.listing import Entry, Listing
from tessera.sources.records import Described, Unreadable
from tessera.sources.rows import Row, beside, cell, columns_of, naturally, rows_of, text_in

SUFFIXES = (".jsonl", ".csv", ".parquet", ".json")
BESIDE, BESIDE_SUFFIXES = "beside", (".txt", ".json", ".cls")
TRAIN, TEST = ("train", "training"), ("test", "testing", "val", "valid", "validation", "eval", "dev")
MOST_BYTES = 10_000  # of a caption in UTF-8
MOST_NAMED = 3  # in a sentence
MOST_CLASSES = 10_000
LARGEST = 1e12  # number


def _file_name(name: str) -> str:
    if name == BESIDE:
        return name
    if not name.endswith(SUFFIXES) or "/" in name or "\\" in name:
        raise ValueError(
            f"{name!r} is no name of a file with metadata: expected one that ends in {', '.join(SUFFIXES)}"
        )
    return name


class Metadata(Params):
    """Which file says it, and in which columns."""

    file: Annotated[str, AfterValidator(_file_name)] = "metadata.jsonl"
    file_column: str = "file_name"  # the image, relative to the folder that the file lies in
    captions: tuple[str, ...] = ()  # columns with a caption, or with a list of them
    attributes: tuple[str, ...] = ()  # columns with a number or a word each, which may be missing
    embedding: AddedKey[str] = None  # the column with a list of numbers, a vector of the image, which may be missing
    picture: AddedKey[str] = None  # the column with the file of a picture of each image; of beside, how its name ends
    picture_channels: AddedKey[Literal[1, 3]] = None  # 3: colors; else gray levels, or the indices of a palette
    label: str | None = None  # the column whose values are the classes, in the place of folders
    split: str | None = None  # the column that says train, or test or validation
    split_by: str | None = None  # the column by which we split: images with one value of it fall on one side

    def num_classes_beside(self, labels: str) -> int | None:
        """1, if neither a column nor folders say the class; None: it is not known yet."""
        return 1 if self.label is None and labels == "none" else None

    @property
    def columns(self) -> list[str]:
        return [
            *self.captions,
            *self.attributes,
            *(
                each
                for each in (self.embedding, self.picture, self.label, self.split, self.split_by)
                if each is not None
            ),
        ]

    @model_validator(mode="after")
    def _says_something(self) -> "Metadata":
        if not self.columns:
            raise ValueError(
                "no column is asked for: set captions, attributes, embedding, picture, label, split or split_by, or leave out "
                "metadata"
            )
        if self.picture is None and self.picture_channels is not None:
            raise ValueError("picture_channels is set, and no picture: name their column as picture, or leave it out")
        if self.split and self.split_by:
            raise ValueError(
                "split and split_by are both set: expected the column that says the split, or one to split by"
            )
        return self


class Said(NamedTuple):
    """Of one image."""

    captions: tuple[str, ...] = ()
    label: str | None = None
    split: str | None = None  # "train" or "test"
    split_by: str | None = None
    refusal: str = ""  # why the image is not taken
    attributes: dict[str, float | str | None] = {}
    embedding: str | None = None  # sources/vectors.py
    picture: str | None = None  # its file's name in the source: sources/pictures.py


class Table:
    """What is said of the images, by their names in the source.

    Raises ValueError, naming the file and the line, for what cannot be read, for columns that are not there, and for images
    that are named and do not exist.
    """

    def __init__(self, config: Metadata, entries: Listing, read: Callable[[Entry], bytes], source: str):
        self.config, self.source = config, source
        self._length: int | None = None  # of all vectors
        self.is_table = hasattr(read, "rows")  # shards of parquet
        self._table = sqlite3.connect("", isolation_level=None, check_same_thread=False)  # a file, if it is large
        self._table.execute("PRAGMA journal_mode = OFF")
        self._table.execute("CREATE TABLE said (name TEXT PRIMARY KEY, said TEXT, seen INTEGER) WITHOUT ROWID")
        try:
            self._table.execute("BEGIN")
            for name, row, where in self._rows(entries, read):
                self._add(name, row, where)
            self._require_images(entries)
            if sets(config, "embedding"):
                vectors.require_some(self._length, config.embedding, source)
            self._table.execute("COMMIT")
        except sqlite3.Error as error:
            self.close()
            raise ValueError(
                f"what {config.file} says could not be kept ({error}): make room in {tempfile.gettempdir()}"
            ) from None

    def is_metadata(self, name: str) -> bool:
        """Whether a file says something of images, and is none."""
        last = PurePosixPath(name).name
        if self.config.file == BESIDE:
            return (last.endswith(BESIDE_SUFFIXES) or self._is_picture(name)) and not self.is_table
        return last == self.config.file

    def _is_picture(self, name: str) -> bool:
        """Of files beside images, by how the name ends."""
        return self.config.picture is not None and name.endswith(f".{self.config.picture}")

    def _key(self, name: str) -> str:
        """What images are looked up by: files beside an image share its name up to the first dot."""
        return _stem(name) if self.config.file == BESIDE and not self.is_table else name

    def _rows(self, entries: Listing, read: Callable[[Entry], bytes]) -> Iterator[tuple[str, Row, str]]:
        if self.is_table and self.config.file != BESIDE:
            raise ValueError(
                f"{self.source} is shards of parquet, whose other columns are the metadata, and not {self.config.file}: write "
                f"metadata.file: beside"
            )
        if self.is_table:
            yield from read.rows()
            return
        files = (entry for entry in entries if self.is_metadata(entry.name) and not entry.refusal)
        if self.config.file == BESIDE:
            for stem, group in itertools.groupby(files, lambda entry: _stem(entry.name)):
                row: Row = dict.fromkeys(self.config.columns)  # of a file that is missing nothing is said
                for entry in group:
                    is_picture = self._is_picture(entry.name)
                    told = (
                        {self.config.picture: entry.name} if is_picture else beside(entry.name, self._data(entry, read))
                    )
                    twice = [column for column in told if row.get(column) is not None]
                    if twice:
                        raise ValueError(
                            f"{self.source}: {entry.name} and another file of {stem!r} both say {twice[0]!r}: take one of them "
                            f"out, or rename it with its image; names are compared up to the first dot"
                        )
                    row |= told
                yield stem, row, f"{self.source}: {stem}"
            return
        is_there = False
        for entry in files:
            is_there = True
            folder = PurePosixPath(entry.name).parent
            line = 0
            for line, row in rows_of(entry.name, self._data(entry, read)):
                where = f"{self.source}: {entry.name} line {line}"
                name = row.get(self.config.file_column)
                if not isinstance(name, str) or not name:
                    raise ValueError(f"{where} names no image by {self.config.file_column!r}{columns_of(row)}")
                if sets(self.config, "picture"):
                    row = pictures.in_folder(row, self.config.picture, folder)
                yield str(folder / name), row, where
            if not line:
                raise ValueError(f"{self.source}: {entry.name} is empty, expected a line for each image")
        if not is_there:
            raise ValueError(
                f"{self.source} has no {self.config.file}, expected one beside the images: name yours by metadata.file"
            )

    def _data(self, entry: Entry, read: Callable[[Entry], bytes]) -> bytes:
        try:
            return read(entry)
        except Unreadable as error:
            raise ValueError(f"{self.source}: {entry.name} {error}") from None

    def _add(self, name: str, row: Row, where: str) -> None:
        found = self._table.execute("SELECT said FROM said WHERE name = ?", (name,)).fetchone()
        said = said_of(row, self.config, where)
        if sets(self.config, "embedding"):
            self._length = vectors.common_length(self._length, said.embedding, self.config.embedding, where)
        said = _together(Said(*json.loads(found[0])), said, where, name) if found else said
        self._table.execute("INSERT OR REPLACE INTO said VALUES (?, ?, 0)", (name, json.dumps(said)))

    def _require_images(self, entries: Iterable[Entry]) -> None:
        if sets(self.config, "picture"):
            pictures.require_images(self, entries, self.config.file == BESIDE and not self.is_table)
        keys = ((self._key(entry.name),) for entry in entries if not self.is_metadata(entry.name))
        self._table.executemany("UPDATE said SET seen = seen + 1 WHERE name = ?", keys)
        twice = self._table.execute("SELECT name FROM said WHERE seen > 1").fetchone()
        if twice and not self.is_table:
            raise ValueError(
                f"{self.source}: there are several images called {twice[0]!r}, and one file beside them: names are compared up "
                f"to the first dot; rename one of them"
            )
        (number,) = self._table.execute("SELECT COUNT(*) FROM said WHERE seen = 0").fetchone()
        if number:
            some = self._table.execute("SELECT name FROM said WHERE seen = 0 ORDER BY name LIMIT ?", (MOST_NAMED,))
            names = ", ".join(repr(name) for (name,) in some)
            files = "the files beside images speak" if self.config.file == BESIDE else f"{self.config.file} speaks"
            raise ValueError(
                f"{self.source}: {files} of {number:,} files that are not there, such as {names}: take them out, or add the "
                f"images"
            )

    def of(self, name: str) -> Said | None:
        """What is said of the image; None: nothing."""
        found = self._table.execute("SELECT said FROM said WHERE name = ?", (self._key(name),)).fetchone()
        if found is None:
            return None
        said = Said(*json.loads(found[0]))
        if sets(self.config, "embedding"):
            said = said._replace(embedding=vectors.or_missing(said.embedding, self._length))
        return said._replace(captions=tuple(said.captions))

    def every(self, key: str) -> Iterator[str]:
        """All that is said by this key of Said."""
        place = Said._fields.index(key)
        found = self._table.execute(f"SELECT DISTINCT json_extract(said, '$[{place}]') FROM said")
        yield from (value for (value,) in found if value is not None)

    def labels(self) -> list[str]:
        """All that is said to be a class, in order."""
        names = list(self.every("label"))
        if len(names) > MOST_CLASSES:
            raise ValueError(
                f"{self.source}: the column {self.config.label!r} has {len(names):,} values, such as {names[0]!r}, expected at "
                f"most {MOST_CLASSES:,} classes: name another column, or tell them as captions"
            )
        return sorted(names, key=naturally)

    def close(self) -> None:
        self._table.close()


class DescribedLayout:
    """Where images belong: by the metadata first, and by the names of files where these say nothing."""

    def __init__(self, layout: Any, config: Any, entries: Listing, read: Callable[[Entry], bytes]):
        """layout: by the names of files, with class_names and place(name) -> a NamedTuple of split, label and refusal."""
        self.layout, self.config, self.metadata = layout, config, config.metadata
        self.table = Table(self.metadata, entries, read, config.source)
        if self.metadata.label is not None:
            layout.class_names = self.table.labels()
            if len(layout.class_names) < 2:
                raise ValueError(
                    f"{config.source}: the column {self.metadata.label!r} says {', '.join(layout.class_names) or 'nothing'} of "
                    f"every image, expected two classes or more: name another column, or leave out metadata.label"
                )
        if layout.test_folder and (self.metadata.split or self.metadata.split_by):
            raise ValueError(
                f"{config.source} has the folders train/ and {layout.test_folder}/, and metadata names a column for the split: "
                f"leave out that column, or set root to the folder that holds the images"
            )
        self.class_names, self.require_images = layout.class_names, layout.require_images
        self.numbers = {name: label for label, name in enumerate(self.class_names)}

    def said(self, name: str) -> "Said | None":
        return self.table.of(name)

    def place(self, name: str) -> Any:
        place = self.layout.place(name)
        if self.table.is_metadata(name):
            return place._replace(split="", label=-1, refusal="is read for what it says of the images", ignored=True)
        if place.refusal:
            return place
        said = self.said(name)
        if said is None or said.refusal:
            file = self.metadata.file
            silent = "has no file beside it" if file == BESIDE else f"is not spoken of in {file}"
            reason = said.refusal if said else silent
            return place._replace(split="", label=-1, refusal=reason)
        label = place.label if said.label is None else self.numbers[said.label]
        return place._replace(split=said.split or self._split_by(said) or place.split, label=label)

    def _split_by(self, said: "Said") -> str | None:
        """By hash of what the column says, so that all images of which it says so lie on one side."""
        if said.split_by is None:
            return None
        chance = derive(self.config.split_seed, "split_by", said.split_by) / 2**63
        return "test" if chance < self.config.test_fraction else "train"


def described(said: Said | None) -> Described:
    """As it travels with the image's record."""
    if sets(said, "embedding"):
        return Described(said.captions, said.attributes, vectors.decoded(said.embedding))
    return Described() if said is None else Described(said.captions, said.attributes)


def _stem(name: str) -> str:
    folder, slash, last = name.rpartition("/")
    return f"{folder}{slash}{last.partition('.')[0]}"


def said_of(row: Row, config: Metadata, where: str) -> Said:
    """What a row says of its image. Raises ValueError for a column that it has not."""
    found = {
        key: text_in(row, column, where)
        for key in ("label", "split", "split_by")
        if (column := getattr(config, key)) is not None
    }
    refusal = "; ".join(
        f"has nothing in the column {getattr(config, key)!r}" for key, value in found.items() if value is None
    )
    captions: list[str] = []
    for column in config.captions:
        given = cell(row, column, where)
        for caption in given if isinstance(given, list) else [given]:
            if caption is None or caption == "":
                continue
            wrong = _wrong_with(caption)
            refusal = refusal or (f"has a caption that {wrong}" if wrong else "")
            captions += [] if wrong else [caption]
    split = found.get("split")
    if split is not None:
        side = "train" if split.lower() in TRAIN else "test" if split.lower() in TEST else None
        refusal = refusal or ("" if side else f"is of the split {split!r:.40}, expected train, or test or validation")
        found["split"] = side
    attributes = {column: _attribute(row.get(column)) for column in config.attributes}
    wrong = [column for column, value in attributes.items() if isinstance(value, list)]
    if wrong:
        refusal = refusal or f"has no number and no word in the column {wrong[0]!r}"
        attributes = {}
    if sets(config, "embedding"):
        found["embedding"], why = vectors.read(row.get(config.embedding))
        refusal = refusal or (f"has a vector in the column {config.embedding!r} that {why}" if why else "")
    if sets(config, "picture"):
        found["picture"], why = pictures.read(row.get(config.picture))
        refusal = refusal or (f"has {why} by {config.picture!r}" if why else "")
    return Said(captions=tuple(captions), **found, refusal=refusal, attributes=attributes)


def _attribute(value: Any) -> Any:
    """A number, text, or None where nothing is said; a list for what is none of them."""
    if value is None or value == "" or value != value:
        return None
    if isinstance(value, bool | str):
        return str(value)
    if isinstance(value, int | float) and abs(value) <= LARGEST:
        return value
    return [value]


def _wrong_with(caption: Any) -> str:
    if not isinstance(caption, str):
        return f"is {str(caption)!r:.40} and not text"
    try:
        number = len(caption.encode())
    except UnicodeEncodeError:
        return "is no Unicode text"
    if "\0" in caption:
        return "has the character NUL"
    if not caption.strip():
        return "has no words"
    return f"has {number:,} bytes, more than {MOST_BYTES:,}" if number > MOST_BYTES else ""


def _together(first: Said, second: Said, where: str, name: str) -> Said:
    for key in ("label", "split", "split_by", "attributes", "embedding", "picture"):
        one, other = getattr(first, key), getattr(second, key)
        if one != other:
            raise ValueError(
                f"{where} says {other!r:.200} of {name!r}, another line {one!r:.200}: expected one {key} for an image"
            )
    captions = tuple(dict.fromkeys([*first.captions, *second.captions]))
    return first._replace(captions=captions, refusal=first.refusal or second.refusal)

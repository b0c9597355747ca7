"""Captions: of images, as index.parquet of an images artifact has them, any number of each; and told.json, the examples
of a prior and what each of its samples was told."""

import hashlib
import json
import math
import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from tessera.artifacts import described, shown, vectors
from tessera.artifacts import folder as artifact
from tessera.artifacts.folder import ArtifactError
from tessera.components import Params

COLUMN, ATTRIBUTES = COLUMNS = "captions", "attributes"  # of index.parquet
EXAMPLES, VECTORS = "told.json", "told.npy"
Attributes = dict[str, int | float | str | None]  # of one image, by column; None: nothing is said
Group = Literal["seen", "held_out", "new_words"]  # in training; all of its words were; some of its words were not
GROUPS: tuple[Group, ...] = ("seen", "held_out", "new_words")
SPLITS, MOST_WORDS = ("train", "test"), 1000
SEPARATOR = "\0"  # no caption has it


class Captions:
    """By row, as `Images` and `Tokens` count. They lie in one text: a million of them take no more room than their bytes."""

    def __init__(self, captions: list[list[str]]):
        """captions: of each image."""
        self.counts = np.array([len(each) for each in captions], np.int32)
        encoded = [SEPARATOR.join(each).encode() for each in captions]
        self.longest = max((len(one.encode()) for each in captions for one in each), default=0)  # in bytes
        self._ends = np.cumsum([len(each) for each in encoded], dtype=np.int64)
        self._bytes = b"".join(encoded)

    def __len__(self) -> int:
        return len(self.counts)

    def of(self, row: int) -> list[str]:
        """The captions of an image; none, if nobody wrote any."""
        start = int(self._ends[row - 1]) if row else 0
        text = self._bytes[start : int(self._ends[row])].decode()
        return text.split(SEPARATOR) if text else []

    def all(self) -> list[str]:
        """The different ones, in order."""
        return sorted({caption for row in range(len(self)) for caption in self.of(row)})

    def fingerprint(self) -> str:
        return hashlib.sha256(self.counts.tobytes() + self._ends.tobytes() + self._bytes).hexdigest()


def grouping(trained_on: Captions) -> Callable[[str], Group]:
    """What of a caption is new to whoever learned these."""
    known = set(trained_on.all())
    words = {word for caption in known for word in words_of(caption)}

    def group_of(caption: str) -> Group:
        if caption in known:
            return "seen"
        return "held_out" if words.issuperset(words_of(caption)) else "new_words"

    return group_of


def words_of(caption: str) -> set[str]:
    """Its words in small letters; where they are not of ASCII letters, as in languages without spaces, its characters."""
    found = re.findall(r"[^\W_]+", caption.casefold())
    return {word for text in found for word in ([text] if text.isascii() else list(text))}


def cells(captions: Iterable[str], attributes: Attributes) -> tuple[list[str], str]:
    """Of one image in the columns."""
    return list(captions), json.dumps(attributes, ensure_ascii=False)


def attributes_of(images: Path, split: str) -> Iterator[Attributes]:
    """Of each image of a split of an images artifact, in their order. Raises ValueError for images without metadata."""
    for cell in _table(artifact.check(images), split, ATTRIBUTES).to_pylist():
        yield json.loads(cell)


def type_as_text(path: Path) -> None:
    """Have the column of a table hold lists of text, also where no row of it has a caption."""
    import pyarrow as pa  # here, as below: a stage without captions does not wait for it
    import pyarrow.parquet as pq

    table = pq.read_table(path)
    place = table.schema.get_field_index(COLUMN)
    typed = table.column(COLUMN).cast(pa.list_(pa.string()))
    pq.write_table(table.set_column(place, COLUMN, typed), path)


def read(images: Path, split: str) -> Captions:
    """Those of a split of an images artifact. Raises ValueError for images that have none."""
    return _of(artifact.check(images), split)


class Values(NamedTuple):
    """Of one attribute, in all images."""

    low: float  # of what are numbers
    high: float
    words: frozenset[str]  # all as text, but for numbers beyond the first MOST_WORDS


class Said(NamedTuple):
    """What metadata say of the images of a data set, by what parts may be unable to read."""

    longest_caption: int  # bytes in UTF-8; 0: there are no captions
    attributes: dict[str, Values]
    embedding_dim: int = 0  # numbers of each vector; 0: there are none
    longest_text: str = ""  # the longest caption
    picture_channels: int = 0  # of each picture from a file; 0: there are none


def said_of(images: Path) -> Said:
    """By the index of an images artifact, which may be in the making."""
    found: dict[str, Values] = {}
    for split in SPLITS:
        for cell in _table(images, split, ATTRIBUTES).to_pylist():
            for name, value in json.loads(cell).items():
                if value is not None:
                    found[name] = _with(found.get(name), value)
    captions = [caption for split in SPLITS for caption in _of(images, split).all()]
    longest = max(captions, key=lambda caption: len(caption.encode()), default="")
    return Said(len(longest.encode()), found, vectors.dim_of(images), longest, shown.channels_of(images))


def _with(values: Values | None, value: float | str) -> Values:
    low, high, words = values or Values(math.inf, -math.inf, frozenset())
    try:
        number = float(value)
    except ValueError:
        number = math.nan  # which no comparison holds for
    low, high = number if number < low else low, number if number > high else high
    text = str(value)
    is_kept = text not in words and (len(words) < MOST_WORDS or math.isnan(number))  # of numbers the ends say the most
    return Values(low, high, words | {text} if is_kept else words)


def _of(images: Path, split: str) -> Captions:
    return Captions(_table(images, split, COLUMN).to_pylist())


def _table(images: Path, split: str, column: str) -> Any:
    """The column, a row for each image of the split."""
    import pyarrow.parquet as pq

    path = Path(images) / "index.parquet"
    if column not in pq.read_schema(path).names:
        raise ValueError(
            f"{images} has images without {column}, expected some: name the file and the columns that hold them in "
            f"dataset.metadata{', or give captions of the classes as condition.of_classes' if column == COLUMN else ''}"
        )
    filters = [("split", "=", split), ("kept", "=", True)]
    table = pq.read_table(path, columns=["row", column], filters=filters)
    if not np.array_equal(table.column("row").to_numpy(), np.arange(len(table))):
        raise ArtifactError(f"{path} has other rows of {split} than there are images. {artifact.remedy(images)}")
    return table.column(column)


class Example(NamedTuple):
    """What is told of an image: a caption, attributes or a vector, a label beside them, and what of the caption is new to the
    prior."""

    caption: str
    label: int
    group: Group
    attributes: Attributes = {}
    vector: Any = None  # (E,) float32: an embedding, all NaN where there is none, or the pixels of a picture


class Examples(Params):
    """told.json; vectors lie in told.npy, a row for each of its entries."""

    told: tuple[tuple[str, int, Group, Attributes], ...]


def write_examples_file(place: Path, examples: list[Example]) -> None:
    """One kind of example: either all have a vector, or none."""
    artifact.write_json(place / EXAMPLES, {"told": [one[:4] for one in examples]})
    if any(one.vector is not None for one in examples):
        np.save(place / VECTORS, np.stack([one.vector for one in examples]))


def examples_of(folder: Path) -> list[Example]:
    """Of a prior, or of its samples in their order; none where nothing of them was told in captions of images."""
    path, beside = Path(folder) / EXAMPLES, Path(folder) / VECTORS
    found = [Example(*one) for one in described.read(path, Examples).told] if path.is_file() else []
    if not beside.is_file():
        return found
    told = np.load(beside, allow_pickle=False)
    if told.dtype != np.float32 or told.ndim != 2 or len(told) != len(found):
        raise ArtifactError(
            f"{beside} holds {told.dtype} of the shape {told.shape}, expected a vector in float32 for each of the "
            f"{len(found):,} entries of {EXAMPLES}. {artifact.remedy(Path(folder))}"
        )
    return [one._replace(vector=vector) for one, vector in zip(found, told, strict=True)]

"""What every data set yields: one record per source image, kept or not, in an order that never changes."""

import hashlib
from collections.abc import Callable, Collection, Iterator
from typing import TYPE_CHECKING, Annotated, NamedTuple

import numpy as np
from pydantic import Field

from tessera.components import AddedKey

if TYPE_CHECKING:
    from tessera.contracts import ImageSpec  # it imports torch, which the processes that decode do without

# It becomes the name of an experiment and of a registered model, where MLflow refuses slashes, colons and the like
DatasetName = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", max_length=100)]


class Described(NamedTuple):
    """What metadata say of an image, beside its label and its split."""

    captions: tuple[str, ...] = ()
    attributes: dict[str, float | str | None] = {}
    embedding: AddedKey[np.ndarray] = None  # (E,) float32, NaN where it is missing, if the data set reads vectors
    picture: AddedKey[np.ndarray] = None  # (1 or 3, H, W) uint8 of the image's size, if it reads pictures


class Record(NamedTuple):
    """One file or array row of the source; its image is there exactly if it is kept."""

    split: str  # "train" or "test"; "" for a file whose place in the source gives none
    label: int  # in [0, num_classes); -1 for a file whose place in the source gives none
    source: str  # name within the source
    sha256: str  # of the file's bytes, or of the image's pixels where the source is an array; "" if never read
    image: np.ndarray | None  # (C, H, W) uint8
    reason: str = ""  # why there is no image
    ignored: bool = False  # left out by rule (hidden files and the like), so it does not count as unreadable
    metadata: AddedKey[Described] = None  # of every file, if the data set reads metadata


class Source(NamedTuple):
    """A data set that was listed once, and can be gone on with: what `opened(config)` of its module yields."""

    spec: "ImageSpec"
    fingerprint: str  # of the names, sizes and times of change of all files; "" if it cannot be gone on with
    records: Callable[[int], Iterator[Record]]  # from the one of this number on
    require_whole: Callable[
        [Collection[int]], None
    ]  # given the labels with images, raises ValueError if others are needed


class Unreadable(Exception):
    """A file gives no image; the text is the reason, for people."""


def array_records(split: str, images: np.ndarray, labels: np.ndarray, names: list[str]) -> Iterator[Record]:
    """images: (N, C, H, W) uint8; labels: (N,) integers; names: N of them."""
    for image, label, name in zip(images, labels, names, strict=True):
        image = np.ascontiguousarray(image)
        yield Record(split, int(label), name, hashlib.sha256(image.data).hexdigest(), image)


def stratified_test_rows(labels: np.ndarray, fraction: float, seed: int) -> np.ndarray:
    """(N,) bool, True for the test split: the same fraction of each class, and at least one image on either side.

    Rows are ranked by a hash of (seed, row), not by numpy's generator, whose streams may change between releases.
    """
    from tessera.seeding import derive  # here: it imports torch, see above

    is_test = np.zeros(len(labels), bool)
    for label in np.unique(labels):
        rows = np.flatnonzero(labels == label)
        ranked = sorted(rows.tolist(), key=lambda row: derive(seed, "split", row))
        number = min(max(round(fraction * len(rows)), 1), len(rows) - 1)
        is_test[ranked[:number]] = True
    return is_test

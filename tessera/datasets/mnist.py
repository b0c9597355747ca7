"""MNIST, Fashion-MNIST and whatever else comes as their four idx files, plain or packed with gzip or xz.

Source: Y. LeCun, C. Cortes, C. Burges, "The MNIST database of handwritten digits", 1998 (its page defines the idx
format); H. Xiao, K. Rasul, R. Vollgraf, "Fashion-MNIST", 2017, arXiv:1708.07747.
"""

import gzip
import lzma
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
from pydantic import Field

from tessera.components import Params
from tessera.contracts import Count, ImageSpec
from tessera.sources.records import DatasetName, Record, array_records

LICENCE = "MNIST: CC BY-SA 3.0 (Y. LeCun, C. Cortes). Fashion-MNIST: MIT (Zalando SE)"
SIDE = 28
OPENERS = {"": open, ".gz": gzip.open, ".xz": lzma.open}
PREFIXES = {"train": "train", "test": "t10k"}


class Config(Params):
    kind: Literal["mnist"]
    source: str  # the folder of the four files; their names may have a prefix, as in mnist-train-images-idx3-ubyte.xz
    name: DatasetName = "mnist"
    class_names: Annotated[tuple[str, ...], Field(min_length=1)] = tuple("0123456789")
    pad: Annotated[int, Field(ge=0)] = 0  # black pixels added on each side: 2 makes 28 into 32
    num_train: Count | None = None  # only the first ones; None: all
    num_test: Count | None = None

    @property
    def channels(self) -> int:
        return 1

    @property
    def height(self) -> int:
        return SIDE + 2 * self.pad

    @property
    def width(self) -> int:
        return SIDE + 2 * self.pad

    @property
    def num_classes(self) -> int:
        return len(self.class_names)


def spec(config: Config) -> ImageSpec:
    return ImageSpec(
        name=config.name,
        channels=config.channels,
        height=config.height,
        width=config.width,
        num_classes=config.num_classes,
        class_names=config.class_names,
        licence=LICENCE,
    )


def records(config: Config) -> Iterator[Record]:
    """The train files in their order, then the test files. Raises ValueError if one is missing or damaged."""
    for split, limit in (("train", config.num_train), ("test", config.num_test)):
        images_path = _find(Path(config.source), f"{PREFIXES[split]}-images-idx3-ubyte")
        labels_path = _find(Path(config.source), f"{PREFIXES[split]}-labels-idx1-ubyte")
        images = _read_idx(images_path, 3, limit)  # (N, 28, 28)
        labels = _read_idx(labels_path, 1, limit)  # (N,)
        if images.shape[1:] != (SIDE, SIDE):
            raise ValueError(f"{images_path} holds images of {images.shape[1:]} pixels, expected ({SIDE}, {SIDE})")
        if len(images) != len(labels):
            raise ValueError(
                f"{images_path} holds {len(images):,} images but {labels_path} {len(labels):,} labels: "
                f"the two files do not belong together. Get both again"
            )
        if labels.max(initial=0) >= config.num_classes:
            raise ValueError(
                f"{labels_path} holds the label {labels.max()}, expected 0 to {config.num_classes - 1}: "
                f"name every class in class_names"
            )
        pad = (config.pad, config.pad)
        images = np.pad(images[:, None], ((0, 0), (0, 0), pad, pad))  # (N, 1, H, W)
        yield from array_records(split, images, labels, [f"{images_path.name}/{row}" for row in range(len(images))])


def _find(folder: Path, stem: str) -> Path:
    """The file STEM, STEM.gz or STEM.xz, with any prefix; the least packed one if there are several."""
    if not folder.is_dir():
        raise ValueError(
            f"{folder} is not there or not a folder, expected the folder of the four idx files: "
            f"python data/download.py mnist {folder} gets them"
        )
    names = (stem, stem.replace("-idx", ".idx"))  # the second as some archives unpack it
    found = {suffix: [path for name in names for path in folder.glob(f"*{name}{suffix}")] for suffix in OPENERS}
    start = stem.partition("-idx")[0]
    prefixes = {path.name.partition(start)[0] for paths in found.values() for path in paths}
    if not prefixes:
        raise ValueError(
            f"{folder} has no {stem}, {stem}.gz or {stem}.xz: python data/download.py mnist {folder} gets the four files"
        )
    if len(prefixes) > 1:
        raise ValueError(
            f"{folder} has several files {stem} with the prefixes {sorted(prefixes)}: keep each data set in a folder of its own"
        )
    return next(path for paths in found.values() for path in paths)


def _read_idx(path: Path, dimensions: int, limit: int | None) -> np.ndarray:
    """The (first) rows of an idx file of unsigned bytes; as many bytes are unpacked as its header announces, no more."""
    header_bytes = 4 + 4 * dimensions
    try:
        with OPENERS[path.suffix if path.suffix in OPENERS else ""](path, "rb") as file:
            header = file.read(header_bytes)
            if len(header) < header_bytes or header[:4] != bytes((0, 0, 8, dimensions)):
                raise ValueError(
                    f"{path} starts with {header[:4].hex(' ') or 'nothing'}, expected 00 00 08 {dimensions:02x}: "
                    f"it is no idx file of bytes with {dimensions} dimensions. Get it again"
                )
            shape = struct.unpack(f">{dimensions}I", header[4:])
            num_rows = shape[0] if limit is None else min(limit, shape[0])
            expected = num_rows * int(np.prod(shape[1:], dtype=np.int64))
            data = file.read(expected)
            surplus = num_rows == shape[0] and file.read(1)
    except (OSError, EOFError, zlib.error, lzma.LZMAError) as error:
        raise ValueError(f"{path} cannot be unpacked ({error}): it is damaged. Get it again") from None
    if len(data) != expected or surplus:
        raise ValueError(
            f"{path} holds {'more than ' if surplus else ''}{len(data):,} bytes after its header, "
            f"expected {expected:,}: it is damaged. Get it again"
        )
    return np.frombuffer(data, np.uint8).reshape(num_rows, *shape[1:])

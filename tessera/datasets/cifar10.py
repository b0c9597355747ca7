"""CIFAR-10 from its published python batches (a folder or cifar-10-python.tar.gz), or any part of it as one .npz.

Source: A. Krizhevsky, "Learning Multiple Layers of Features from Tiny Images", 2009. Differs from it: an .npz has no
test batch, so a seeded fraction of each class becomes the test split.
"""

import io
import lzma
import pickle
import tarfile
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import Field

from tessera.components import Params
from tessera.contracts import ImageSpec
from tessera.sources.records import DatasetName, Record, array_records, stratified_test_rows

LICENCE = "none stated by its authors; cite Krizhevsky 2009"
CLASS_NAMES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
BATCHES = {
    **{f"data_batch_{number}": "train" for number in range(1, 6)},
    "test_batch": "test",
}
MAX_BATCH_BYTES = 64 * 2**20  # the published ones have 31 MB


class Config(Params):
    kind: Literal["cifar10"]
    source: str  # a folder with data_batch_1 to 5 and test_batch, cifar-10-python.tar.gz, or an .npz with x and y
    name: DatasetName = "cifar10"
    test_fraction: Annotated[float, Field(gt=0, lt=1)] = 0.2  # of an .npz
    split_seed: int = 0  # of an .npz

    @property
    def channels(self) -> int:
        return 3

    @property
    def height(self) -> int:
        return 32

    @property
    def width(self) -> int:
        return 32

    @property
    def num_classes(self) -> int:
        return 10


def spec(config: Config) -> ImageSpec:
    return ImageSpec(
        name=config.name,
        channels=config.channels,
        height=config.height,
        width=config.width,
        num_classes=config.num_classes,
        class_names=CLASS_NAMES,
        licence=LICENCE,
    )


def records(config: Config) -> Iterator[Record]:
    """Train images, then test images, in the source's order. Raises ValueError if the source is missing or damaged."""
    source = Path(config.source)
    if not source.exists():
        raise ValueError(
            f"{source} does not exist, expected CIFAR-10's folder, tar.gz or an .npz: "
            f"python data/download.py cifar10 {source.parent} gets the tar.gz"
        )
    if source.suffix == ".npz":
        images, labels = _read_npz(source)
        is_test = stratified_test_rows(labels, config.test_fraction, config.split_seed)
        for split, rows in (("train", np.flatnonzero(~is_test)), ("test", np.flatnonzero(is_test))):
            yield from array_records(split, images[rows], labels[rows], [f"{source.name}/{row}" for row in rows])
        return
    batches = _batches_of_folder(source) if source.is_dir() else _batches_of_tar(source)
    for name, split in BATCHES.items():
        if name not in batches:
            raise ValueError(f"{source} has no {name}, expected {', '.join(BATCHES)}. Get it again")
        images, labels = _read_batch(name, batches.pop(name))
        yield from array_records(split, images, labels, [f"{name}/{row}" for row in range(len(images))])


def _read_npz(path: Path) -> tuple[np.ndarray, np.ndarray]:
    try:
        with np.load(path, allow_pickle=False) as arrays:
            images, labels = arrays["x"], arrays["y"]
    except (OSError, ValueError, KeyError, EOFError, zlib.error, zipfile.BadZipFile) as error:
        raise ValueError(
            f"{path} cannot be read ({error}), expected arrays x (N, 32, 32, 3) and y (N,), saved by np.savez"
        ) from None
    if images.dtype != np.uint8 or images.shape[1:] != (32, 32, 3) or labels.shape != images.shape[:1]:
        raise ValueError(
            f"{path} holds x {images.dtype} {images.shape} and y {labels.shape}, expected uint8 (N, 32, 32, 3) and (N,)"
        )
    _check_labels(labels, str(path))
    return images.transpose(0, 3, 1, 2), labels.astype(np.int64)


def _check_labels(labels: np.ndarray, where: str) -> None:
    if labels.dtype.kind not in "iu" or not np.isin(labels, range(len(CLASS_NAMES))).all():
        raise ValueError(f"{where} holds labels that are not integers from 0 to 9: it is damaged. Get it again")


def _batches_of_folder(folder: Path) -> dict[str, bytes]:
    paths = {path.name: path for path in folder.rglob("*_batch*") if path.name in BATCHES and path.is_file()}
    too_long = [str(path) for path in paths.values() if path.stat().st_size > MAX_BATCH_BYTES]
    if too_long:
        raise ValueError(f"{', '.join(too_long)} has more than {MAX_BATCH_BYTES:,} bytes: it is no batch of CIFAR-10")
    return {name: path.read_bytes() for name, path in paths.items()}


def _batches_of_tar(path: Path) -> dict[str, bytes]:
    batches: dict[str, bytes] = {}
    try:
        with tarfile.open(path, "r|*") as archive:  # as a stream: gzip cannot go back cheaply
            for member in archive:
                name = member.name.rpartition("/")[2]
                if name not in BATCHES or not member.isreg():
                    continue
                if name in batches or member.size > MAX_BATCH_BYTES:
                    raise ValueError(f"{path} holds {name} twice, or one of more than {MAX_BATCH_BYTES:,} bytes")
                file = archive.extractfile(member)
                assert file is not None  # it is a regular file
                batches[name] = file.read()
    except (tarfile.TarError, OSError, EOFError, zlib.error, lzma.LZMAError) as error:
        raise ValueError(
            f"{path} cannot be unpacked ({error}), expected cifar-10-python.tar.gz. Get it again"
        ) from None
    return batches


class _Array:
    """Takes the place of the numpy array in a batch: accepts the state of an array of bytes, and no other."""

    def __setstate__(self, state: Any) -> None:
        _, shape, dtype, is_fortran, data = state
        if not isinstance(dtype, _Bytes) or is_fortran or not isinstance(data, bytes):
            raise pickle.UnpicklingError("an array that is not of plain bytes")
        self.values = np.frombuffer(data, np.uint8).reshape(shape)


class _Bytes:
    """Takes the place of the numpy dtype of unsigned bytes."""

    def __setstate__(self, state: Any) -> None:
        pass


def _reconstruct(*arguments: Any) -> _Array:
    return _Array()


def _dtype(name: bytes | str, *arguments: Any) -> _Bytes:
    if name not in (b"u1", "u1"):
        raise pickle.UnpicklingError(f"an array of {name!r}")
    return _Bytes()


class _BatchUnpickler(pickle.Unpickler):
    """Reads a batch without running any code that the file names.

    Pickles call whatever functions they name; the batches are published in no other form. So the three names of
    a batch stand for harmless functions of this module, and any other name is an error.
    """

    NAMES = {"_reconstruct": _reconstruct, "ndarray": _Array, "dtype": _dtype}

    def find_class(self, module: str, name: str) -> Any:
        if module not in ("numpy", "numpy.core.multiarray", "numpy._core.multiarray") or name not in self.NAMES:
            raise pickle.UnpicklingError(f"it names {module}.{name}, which no batch of CIFAR-10 does")
        return self.NAMES[name]


def _read_batch(name: str, data: bytes) -> tuple[np.ndarray, np.ndarray]:
    """((N, 3, 32, 32) uint8, (N,) int64)"""
    try:
        batch = _BatchUnpickler(io.BytesIO(data), encoding="bytes").load()
        pixels, labels = batch[b"data"].values, np.asarray(batch[b"labels"])
        if pixels.shape != (len(labels), 3072):
            raise ValueError(f"pixels {pixels.shape} for {len(labels)} labels")
    except Exception as error:  # a damaged pickle can raise anything
        raise ValueError(
            f"{name} is no batch of CIFAR-10's python version ({type(error).__name__}: {error}). Get it again"
        ) from None
    _check_labels(labels, name)
    return pixels.reshape(-1, 3, 32, 32), labels.astype(np.int64)

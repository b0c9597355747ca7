"""Rows of one shape and dtype in numbered .npy files: written as a stream, read memory-mapped, gathered in batches."""

import mmap
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType

import numpy as np

from tessera.artifacts import folder as artifact
from tessera.artifacts.folder import ArtifactError

SHARD_BYTES = 256 * 2**20
BATCH = 500  # rows that are read at a time
MAPPED_BYTES = 256 * 2**20  # of pages that may stay mapped after they were read
AROUND = 2**21  # bytes: the largest piece of a file that the kernel may map for one page that is asked for


class ShardWriter:
    """Appends arrays (n, *row) and writes STEM-00000.npy, STEM-00001.npy, ... of at most `shard_bytes` each."""

    def __init__(self, folder: Path, stem: str, shard_bytes: int = SHARD_BYTES):
        self.folder, self.stem, self.shard_bytes = Path(folder), stem, shard_bytes
        self.num_rows = 0
        self._num_shards = 0
        self._held: list[np.ndarray] = []
        self._held_rows = 0
        self.folder.mkdir(parents=True, exist_ok=True)

    def append(self, rows: np.ndarray) -> None:
        if self._held and (rows.dtype, rows.shape[1:]) != (self._held[0].dtype, self._held[0].shape[1:]):
            held = self._held[0]
            raise ValueError(
                f"rows {rows.dtype} {rows.shape[1:]} do not fit {held.dtype} {held.shape[1:]} of {self.stem}"
            )
        self._held.append(rows)
        self._held_rows += len(rows)
        self.num_rows += len(rows)
        per_shard = max(1, self.shard_bytes // max(1, rows[:1].nbytes)) if len(rows) else 1
        while self._held_rows >= per_shard and len(rows):
            together = np.concatenate(self._held)
            self._write(together[:per_shard])
            self._held = [together[per_shard:]]
            self._held_rows = len(self._held[0])

    def _write(self, rows: np.ndarray) -> None:
        np.save(self.folder / f"{self.stem}-{self._num_shards:05d}.npy", np.ascontiguousarray(rows), allow_pickle=False)
        self._num_shards += 1

    def __enter__(self) -> "ShardWriter":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None and self._held_rows:
            self._write(np.concatenate(self._held))


class Shards:
    """Read-only rows of all shards of a stem. Memory use is that of the rows asked for: what was read is unmapped now and then,
    and stays in the system's cache alone.

    Raises ArtifactError, naming the file, unless all of them hold rows of one shape in the dtype that is expected.
    """

    def __init__(self, folder: Path, stem: str, dtype: type[np.generic], row_shape: tuple[int, ...] | None = None):
        """row_shape: None, where the first shard decides it."""
        paths = sorted(Path(folder).glob(f"{stem}-[0-9]*.npy"))
        if not paths:
            raise ArtifactError(f"{folder} has no {stem}-*.npy: it holds no rows")
        self.arrays = [_opened(path) for path in paths]
        shape = self.arrays[0].shape[1:] if row_shape is None else row_shape
        for path, array in zip(paths, self.arrays, strict=True):
            if array.ndim == 0 or array.dtype != dtype or array.shape[1:] != shape:
                raise ArtifactError(
                    f"{path} holds {array.dtype} of shape {array.shape}, expected rows of {np.dtype(dtype)} {shape}. "
                    f"{_remedy(Path(folder))}"
                )
        self.starts = np.cumsum([0, *(len(array) for array in self.arrays)])
        self.dtype, self.row_shape = self.arrays[0].dtype, self.arrays[0].shape[1:]
        self._row_reach = AROUND + self.dtype.itemsize * int(
            np.prod(self.row_shape)
        )  # bytes that reading a row may map
        self._mapped = 0  # bytes, at most

    def __len__(self) -> int:
        return int(self.starts[-1])

    def gather(self, rows: np.ndarray, parts: np.ndarray | None = None) -> np.ndarray:
        """The rows at these positions, in this order, as a new array (len(rows), *row_shape).

        parts: (len(rows),) of each row only the element at this place of its first axis, and nothing else of it is read.
        """
        rows = np.asarray(rows)
        self._count(len(rows))
        if len(self.arrays) == 1:
            return self.arrays[0][rows] if parts is None else self.arrays[0][rows, parts]
        out = np.empty((len(rows), *(self.row_shape if parts is None else self.row_shape[1:])), self.dtype)
        shard = np.searchsorted(self.starts, rows, side="right") - 1
        for number in np.unique(shard):
            chosen = shard == number
            places = rows[chosen] - self.starts[number]
            out[chosen] = self.arrays[number][places if parts is None else (places, parts[chosen])]
        return out

    def all(self) -> np.ndarray:
        """Every row, in memory: for labels and small sets."""
        found = np.concatenate(self.arrays)
        self._count(len(self))
        return found

    def _count(self, num_rows: int) -> None:
        """Unmap what was read so far, once it may be much. It stays in the system's cache, and is mapped again if asked for."""
        self._mapped += num_rows * self._row_reach
        if self._mapped > MAPPED_BYTES and hasattr(mmap, "MADV_DONTNEED"):
            for array in self.arrays:
                if isinstance(array.base, mmap.mmap):
                    array.base.madvise(mmap.MADV_DONTNEED)
            self._mapped = 0


def _remedy(folder: Path) -> str:
    return artifact.remedy(folder if (folder / artifact.MANIFEST).is_file() else folder.parent)  # a split of it


def _opened(path: Path) -> np.ndarray:
    try:
        return np.load(path, mmap_mode="r", allow_pickle=False)
    except Exception as error:  # NumPy's parser of headers raises whatever a hostile one leads it to
        raise ArtifactError(
            f"{path} cannot be read ({type(error).__name__}: {str(error)[:200]}), expected an array of numbers as numpy.save "
            f"writes it. {_remedy(path.parent)}"
        ) from None


def labels_of(folder: Path, num_classes: int) -> np.ndarray:
    """(N,) int64, the labels of a folder, in memory. Raises ArtifactError unless they are those of classes."""
    found = Shards(folder, "labels", np.int64, ()).all()
    if len(found) and not (found.min() >= 0 and found.max() < num_classes):
        raise ArtifactError(
            f"{folder}/labels-*.npy hold {found.min()} to {found.max()}, expected 0 to {num_classes - 1}. "
            f"{_remedy(Path(folder))}"
        )
    return found


def spread(number: int, at_most: int) -> np.ndarray:
    """All of range(number), or `at_most` of it, evenly spread: files often lie by class."""
    return np.linspace(0, number - 1, min(number, at_most)).astype(int)


def in_batches(rows_of: Shards | np.ndarray, rows: np.ndarray | None = None) -> Iterator[np.ndarray]:
    """(n, *row) of the given rows, or of all, at most BATCH at a time."""
    rows = np.arange(len(rows_of)) if rows is None else rows
    for start in range(0, len(rows), BATCH):
        chosen = rows[start : start + BATCH]
        yield rows_of.gather(chosen) if isinstance(rows_of, Shards) else rows_of[chosen]

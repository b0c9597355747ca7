"""Shards that grow as rows arrive, and of which a kill loses the last ones alone: what was kept is found again, with its hash.

The files are byte for byte those of ShardWriter. Rows go to them at once, so that nothing is held but the rows given; the
number of rows in the header of the last shard is put right in the end.
"""

import hashlib
import io
import shutil
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from tessera.artifacts import folder as artifact
from tessera.artifacts import shards, whole
from tessera.artifacts.folder import ArtifactError

BLOCK = 2**22  # bytes that are hashed at a time


class Growing:
    """All shards of a half-made artifact.

    record: the JSON file, outside of it, that says what of it can be relied on: rows and hashes by stem ("train/labels"), and a
    position, which is whatever its maker needs to go on from there.
    """

    def __init__(self, folder: Path, record: Path, seconds: float):
        """seconds: after which what has grown is kept; it also is whenever a shard is full."""
        self.folder, self.record, self.seconds = Path(folder), Path(record), seconds
        self._stems: dict[str, _Stem] = {}
        self._kept, self._has_full_shard = time.monotonic(), False

    def restored(self, say: Callable[[str], None], check: Callable[[Any], None] = lambda position: None) -> Any:
        """The position at which it was kept, with every file as it was then; None, and an empty folder, if there is none.

        check: raises ValueError for a position with which its maker cannot go on.
        """
        position = None
        if self.record.is_file():
            try:
                found = artifact.read_json(self.record)
                self._stems = {stem: _Stem.restored(self.folder, stem, kept) for stem, kept in found["stems"].items()}
                check(found["position"])
                position = found["position"]
            except (ArtifactError, OSError, KeyError, TypeError, ValueError) as error:
                say(f"{self.folder} is not what was kept of it, and is made anew: {error}")
                self._stems = {}
        self._remove_others()
        return position

    def _remove_others(self) -> None:
        if not self._stems:
            shutil.rmtree(self.folder, ignore_errors=True)
        known = {path for stem in self._stems.values() for path in stem.paths()}
        for path in [path for path in self.folder.rglob("*") if path.is_file() and path not in known]:
            path.unlink()
        self.folder.mkdir(parents=True, exist_ok=True)

    def append(self, stem: str, rows: np.ndarray) -> None:
        """Add rows (n, *row) to the shards of a stem."""
        if stem not in self._stems and len(rows):
            self._stems[stem] = _Stem(self.folder, stem, rows.dtype, rows.shape[1:])
        if len(rows):
            self._has_full_shard |= self._stems[stem].append(rows)

    def num_rows(self, stem: str) -> int:
        return self._stems[stem].num_rows if stem in self._stems else 0

    def is_due(self) -> bool:
        """Whether it is time to keep what there is."""
        return self._has_full_shard or time.monotonic() - self._kept >= self.seconds

    def keep(self, position: Any) -> None:
        """From now on a kill loses nothing of what was appended so far."""
        stems = {name: stem.kept() for name, stem in self._stems.items()}
        artifact.write_json(self.record, {"stems": stems, "position": position})
        self._kept, self._has_full_shard = time.monotonic(), False

    def finish(self) -> None:
        """No more rows come: the headers tell how many there are."""
        for stem in self._stems.values():
            stem.close()


class _Stem:
    """The shards of one stem, the last of which may be open."""

    def __init__(self, folder: Path, name: str, dtype: np.dtype, row_shape: tuple[int, ...]):
        self.folder, self.name, self.dtype, self.row_shape = folder, name, dtype, row_shape
        row_bytes = dtype.itemsize * int(np.prod(row_shape))
        self.rows_per_shard = max(1, shards.SHARD_BYTES // max(1, row_bytes))
        self.full_header = _header(dtype, (self.rows_per_shard, *row_shape))
        self.row_bytes = row_bytes
        self.num_rows = 0
        self.digests: list[str] = []  # of the rows of each full shard
        self._file: BinaryIO | None = None
        self._sha256 = hashlib.sha256()  # of the rows of the open one

    def paths(self) -> list[Path]:
        number = -(-self.num_rows // self.rows_per_shard)
        return [self.folder / f"{self.name}-{shard:05d}.npy" for shard in range(number)]

    def append(self, rows: np.ndarray) -> bool:
        """Whether a shard got full."""
        if (rows.dtype, rows.shape[1:]) != (self.dtype, self.row_shape):
            raise ValueError(
                f"rows {rows.dtype} {rows.shape[1:]} do not fit {self.dtype} {self.row_shape} of {self.name}"
            )
        before = len(self.digests)
        while len(rows):
            inside = self.num_rows % self.rows_per_shard
            part, rows = rows[: self.rows_per_shard - inside], rows[self.rows_per_shard - inside :]
            self.num_rows += len(part)
            data = memoryview(np.ascontiguousarray(part)).cast("B")
            if self._file is None:
                path = self.paths()[-1]
                path.parent.mkdir(parents=True, exist_ok=True)
                self._file = path.open("w+b")
                self._file.write(self.full_header)
            self._file.write(data)
            self._sha256.update(data)
            if inside + len(part) == self.rows_per_shard:
                self._end_shard()
        return len(self.digests) > before

    def _end_shard(self) -> None:
        assert self._file is not None
        self._file.close()
        whole.sync(Path(self._file.name))
        self.digests.append(self._sha256.hexdigest())
        self._file, self._sha256 = None, hashlib.sha256()

    def kept(self) -> dict[str, Any]:
        """What the record says of them."""
        digests = list(self.digests)
        if self._file is not None:
            self._file.flush()
            whole.sync(Path(self._file.name))
            digests.append(self._sha256.hexdigest())
        shape, dtype = list(self.row_shape), np.lib.format.dtype_to_descr(self.dtype)
        return {"rows": self.num_rows, "dtype": dtype, "row_shape": shape, "sha256": digests}

    def close(self) -> None:
        if self._file is not None:
            self._file.seek(0)
            self._file.write(_header(self.dtype, (self.num_rows % self.rows_per_shard, *self.row_shape)))
            self._file.close()
            self._file = None

    @staticmethod
    def restored(folder: Path, name: str, kept: dict[str, Any]) -> "_Stem":
        """Raises ValueError, naming the file, unless all of them begin with what was kept. What follows is cut off."""
        found = _Stem(folder, name, np.dtype(kept["dtype"]), tuple(kept["row_shape"]))
        found.num_rows = kept["rows"]
        paths, digests = found.paths(), kept["sha256"]
        if len(paths) != len(digests):
            raise ValueError(f"{len(digests)} hashes for {len(paths)} shards of {name}")
        inside = found.num_rows % found.rows_per_shard
        with ThreadPoolExecutor(4) as pool:  # hashlib releases the lock, disks like company
            sizes = [found.rows_per_shard] * (len(paths) - bool(inside)) + [inside] * bool(inside)
            hashes = list(pool.map(found._hash, paths, sizes))
        for path, digest, sha256 in zip(paths, digests, hashes, strict=True):
            if sha256.hexdigest() != digest:
                raise ValueError(f"{path} has rows of sha256 {sha256.hexdigest()}, expected {digest}")
        found.digests = digests[: len(digests) - bool(inside)]
        if inside:
            found._sha256, found._file = hashes[-1], paths[-1].open("r+b")
            found._file.write(found.full_header)  # of a stage that was killed while it ended, it tells the last number
            found._file.truncate(len(found.full_header) + inside * found.row_bytes)
            found._file.seek(0, io.SEEK_END)
        return found

    def _hash(self, path: Path, num_rows: int) -> Any:
        """Of the first rows of a shard. Raises ValueError for another header, or fewer rows."""
        sha256, left = hashlib.sha256(), num_rows * self.row_bytes
        with path.open("rb") as file:
            header = file.read(len(self.full_header))
            if num_rows == self.rows_per_shard and header != self.full_header:
                raise ValueError(f"{path} has another header than its rows need")
            while left and (block := file.read(min(left, BLOCK))):
                sha256.update(block)
                left -= len(block)
        if left:
            raise ValueError(f"{path} lacks {left:,} bytes of the {num_rows:,} rows that were kept")
        return sha256


def _header(dtype: np.dtype, shape: tuple[int, ...]) -> bytes:
    """As numpy.save writes it; of one length whatever the number of rows is."""
    out = io.BytesIO()
    described = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(out, described)
    return out.getvalue()

"""Vectors that metadata gave images: shards of an images artifact, (N, E) float32, NaN where an image has none."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tessera.artifacts import folder as artifact
from tessera.artifacts.folder import ArtifactError
from tessera.artifacts.images import ImageWriter
from tessera.artifacts.shards import Shards

STEM = "embeddings"


def append(writer: ImageWriter, records: Sequence[Any]) -> None:
    """Those of records, sources/records.py, beside their images."""
    assert writer.grown is not None
    writer.grown.append(f"{writer.split}/{STEM}", np.stack([record.metadata.embedding for record in records]))


def dim_of(images: Path) -> int:
    """Numbers of each vector of an images artifact, which may be in the making; 0: it has none."""
    first = next(iter(sorted(Path(images).glob(f"*/{STEM}-*.npy"))), None)
    return 0 if first is None else int(np.load(first, mmap_mode="r").shape[1])


class Vectors:
    """Those of a split, memory-mapped, by row, as `Images` and `Tokens` count."""

    def __init__(self, images: Path, split: str):
        """Verifies the artifact. Raises ValueError for images without vectors."""
        self.folder, self.split = artifact.check(images), split
        if not dim_of(self.folder):
            raise ValueError(
                f"{images} has images without vectors, expected some: name the column that holds them as "
                f"dataset.metadata.embedding"
            )
        self._shards = Shards(self.folder / split, STEM, np.float32)
        if len(self._shards.row_shape) != 1:
            raise ArtifactError(
                f"{images}/{split} holds vectors of the shape {self._shards.row_shape}, expected (E,). "
                f"{artifact.remedy(self.folder)}"
            )
        (self.dim,) = self._shards.row_shape

    def __len__(self) -> int:
        return len(self._shards)

    def of(self, rows: np.ndarray) -> np.ndarray:
        """(n,) rows -> (n, E) float32."""
        return self._shards.gather(rows)

    def fingerprint(self) -> str:
        """By the artifact's own hashes of its files."""
        paths = sorted((self.folder / self.split).glob(f"{STEM}-*.npy"))
        names = [path.relative_to(self.folder).as_posix() for path in paths]
        return "-".join(artifact.file_sha256(self.folder, name) for name in names)

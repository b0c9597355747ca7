"""Pictures that metadata gave images, from files: shards of an images artifact, (N, C, H, W) uint8 of the images' size."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tessera.artifacts import folder as artifact
from tessera.artifacts.folder import ArtifactError
from tessera.artifacts.images import ImageWriter
from tessera.artifacts.shards import Shards

STEM = "pictures"


def append(writer: ImageWriter, records: Sequence[Any]) -> None:
    """Those of records, sources/records.py, beside their images."""
    assert writer.grown is not None
    writer.grown.append(f"{writer.split}/{STEM}", np.stack([record.metadata.picture for record in records]))


def channels_of(images: Path) -> int:
    """Of the pictures of an images artifact, which may be in the making; 0: it has none."""
    first = next(iter(sorted(Path(images).glob(f"*/{STEM}-*.npy"))), None)
    return 0 if first is None else int(np.load(first, mmap_mode="r").shape[1])


class ShownPictures:
    """Those of a split, memory-mapped, by row, as `Images` and `Tokens` count."""

    def __init__(self, images: Path, split: str):
        """Verifies the artifact. Raises ValueError for images without pictures."""
        self.folder, self.split = artifact.check(images), split
        if not channels_of(self.folder):
            raise ValueError(
                f"{images} has images without pictures, expected some: name the column that names their files as "
                f"dataset.metadata.picture"
            )
        self._shards = Shards(self.folder / split, STEM, np.uint8)
        if len(self._shards.row_shape) != 3 or self._shards.row_shape[0] not in (1, 3):
            raise ArtifactError(
                f"{images}/{split} holds pictures of the shape {self._shards.row_shape}, expected (1 or 3, H, W). "
                f"{artifact.remedy(self.folder)}"
            )
        self.channels = self._shards.row_shape[0]

    def __len__(self) -> int:
        return len(self._shards)

    def uint8(self, rows: np.ndarray) -> Tensor:
        """(n,) rows -> (n, C, H, W) uint8."""
        return torch.from_numpy(self._shards.gather(rows))

    def fingerprint(self) -> str:
        """By the artifact's own hashes of its files."""
        paths = sorted((self.folder / self.split).glob(f"{STEM}-*.npy"))
        names = [path.relative_to(self.folder).as_posix() for path in paths]
        return "-".join(artifact.file_sha256(self.folder, name) for name in names)

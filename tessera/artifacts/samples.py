"""Generated images between stages: uint8 shards, labels, and meta.json with how they were drawn."""

from pathlib import Path
from typing import Any

import numpy as np

from tessera.artifacts import folder as artifact
from tessera.artifacts.folder import ArtifactError
from tessera.artifacts.shards import Shards


class Samples:
    """A verified samples artifact, memory-mapped."""

    def __init__(self, folder: Path):
        folder = artifact.check(folder)
        self.pixels, self.labels = Shards(folder, "images"), Shards(folder, "labels").all()
        self.meta: dict[str, Any] = artifact.read_json(folder / "meta.json")
        if self.pixels.dtype != np.uint8 or len(self.pixels) != len(self.labels):
            raise ArtifactError(
                f"{folder} holds {self.pixels.dtype} images and {len(self.labels)} labels, expected uint8"
            )

    def __len__(self) -> int:
        return len(self.pixels)


def quotas(num_images: int, class_counts: tuple[int, ...]) -> np.ndarray:
    """How many of num_images each class gets, in proportion to class_counts, by largest remainders; sums to num_images."""
    exact = num_images * np.asarray(class_counts) / np.sum(class_counts)
    whole = np.floor(exact).astype(int)
    by_remainder = np.argsort(whole - exact, kind="stable")
    whole[by_remainder[: num_images - whole.sum()]] += 1
    return whole

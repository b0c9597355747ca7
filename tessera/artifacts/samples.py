"""Generated images between stages: uint8 shards, labels, and meta.json with how they were drawn."""

from pathlib import Path
from typing import Any

import numpy as np

from tessera import seeding
from tessera.artifacts import folder as artifact
from tessera.artifacts.folder import ArtifactError
from tessera.artifacts.shards import Shards


class Samples:
    """A verified samples artifact, memory-mapped. `expected`: how many images were asked for; fewer are an error."""

    def __init__(self, folder: Path, expected: int | None = None):
        folder = artifact.check(folder)
        self.pixels, self.labels = Shards(folder, "images"), Shards(folder, "labels").all()
        self.meta: dict[str, Any] = artifact.read_json(folder / "meta.json")
        if self.pixels.dtype != np.uint8 or len(self.pixels) != len(self.labels):
            raise ArtifactError(
                f"{folder} holds {len(self.pixels)} {self.pixels.dtype} images and {len(self.labels)} labels, expected uint8"
            )
        if expected is not None and len(self.pixels) != expected:
            raise ArtifactError(
                f"{folder} holds {len(self.pixels):,} images, expected the {expected:,} of sample_images.num_images: figures "
                f"of another number would not compare. {artifact.remedy(folder)}"
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


def floor_rows(labels: np.ndarray, num_classes: int, num_images: int, seed: int) -> np.ndarray:
    """As many training images as there are samples, with the classes in the same proportions: what the floors are made of.

    labels: (N,) of the training images -> (num_images,) rows, ascending.
    """
    wanted = quotas(num_images, tuple(np.bincount(labels, minlength=num_classes)))
    generator = seeding.numpy_generator(seed, "floor")
    rows = []
    for label, count in enumerate(wanted):
        members = np.flatnonzero(labels == label)
        if count > len(members):
            raise ValueError(
                f"class {label} has {len(members)} training images, but a floor at the samples' number needs {count}. "
                f"Lower sample_images.num_images to at most {len(labels)}"
            )
        rows.append(generator.permutation(members)[:count])
    return np.sort(np.concatenate(rows))

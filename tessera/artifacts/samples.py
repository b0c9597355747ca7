"""Generated images between stages: uint8 shards, or uint16 of a data set with 16 bits, labels, and meta.json with how they were
drawn."""

from pathlib import Path
from typing import Annotated, Any

import numpy as np
from pydantic import Field

from tessera import seeding
from tessera.artifacts import bit_depth, described
from tessera.artifacts import folder as artifact
from tessera.artifacts.folder import ArtifactError
from tessera.artifacts.shards import Shards, labels_of
from tessera.components import Params, sets
from tessera.contracts import ImageSpec


class Described(Params):
    """meta.json: how they were drawn, from what."""

    num_images: Annotated[int, Field(ge=1)]
    seed: Annotated[int, Field(ge=0)]
    sampling: dict[str, Any]
    weights: str
    prior_fingerprint: str
    tokenizer_fingerprint: str
    choice: dict[str, Any] | None = None  # of the weights


class Samples:
    """A verified samples artifact of images with this spec, memory-mapped. `expected`: how many images were asked for; fewer
    are an error."""

    def __init__(self, folder: Path, spec: ImageSpec, expected: int | None = None):
        folder = artifact.check(folder)
        if sets(spec, "bits"):
            _open_16_bits(self, folder, spec, expected)
            return
        self.pixels = Shards(folder, "images", np.uint8, (spec.channels, spec.height, spec.width))
        self.labels = labels_of(folder, spec.num_classes)
        self.meta = described.read(folder / "meta.json", Described).model_dump(mode="json", exclude_unset=True)
        if len(self.pixels) != len(self.labels) or len(self.pixels) != self.meta["num_images"]:
            raise ArtifactError(
                f"{folder} holds {len(self.pixels)} images and {len(self.labels)} labels, expected the "
                f"{self.meta['num_images']} of its meta.json. {artifact.remedy(folder)}"
            )
        if expected is not None and len(self.pixels) != expected:
            raise ArtifactError(
                f"{folder} holds {len(self.pixels):,} images, expected the {expected:,} of sample_images.num_images: figures "
                f"of another number would not compare. {artifact.remedy(folder)}"
            )

    def __len__(self) -> int:
        return len(self.pixels)


def _open_16_bits(samples: Samples, folder: Path, spec: ImageSpec, expected: int | None) -> None:
    """As Samples does for 8 bits, whose code is left as it is for the sake of figures that were made by it."""
    samples.pixels, samples.labels = bit_depth.shards(folder, spec), labels_of(folder, spec.num_classes)
    samples.meta = described.read(folder / "meta.json", Described).model_dump(mode="json", exclude_unset=True)
    found, told = {len(samples.pixels), len(samples.labels)}, samples.meta["num_images"]
    if found != {told} or expected not in (None, told):
        raise ArtifactError(
            f"{folder} holds {len(samples.pixels):,} images and {len(samples.labels):,} labels, expected the {told:,} of its "
            f"meta.json and the {expected or told:,} of sample_images.num_images. {artifact.remedy(folder)}"
        )


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

"""Images between stages: uint8 shards and labels per split, index.parquet with a row per source file, meta.json.

Of a data set with `bits: 16` they are uint16: artifacts/bit_depth.py.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, NamedTuple

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from tessera.artifacts import bit_depth, described
from tessera.artifacts import folder as artifact
from tessera.artifacts.folder import ArtifactError
from tessera.artifacts.growing import Growing
from tessera.artifacts.shards import Shards, ShardWriter, labels_of
from tessera.components import Params, sets
from tessera.contracts import ImageBatch, ImageSpec

if TYPE_CHECKING:
    import pandas as pd  # half a second of every stage, and one of them writes the index

SPLITS = ("train", "test")


def to_float(images: Tensor) -> Tensor:
    """uint8 in [0, 255], or uint16 in [0, 65535] -> float32 in [-1, 1]."""
    if sets(bit_depth.of(images), "bits"):
        return bit_depth.to_float(images)
    return (images / 127.5).sub_(1)


def to_uint8(images: Tensor) -> Tensor:
    """float in [-1, 1] -> uint8 in [0, 255], clipped; the inverse of `to_float` on all 256 values.

    Raises ValueError unless all values are finite: NaN would become black.
    """
    if not images.isfinite().all():
        raise ValueError(
            "images hold values that are not finite, expected finite ones: look for settings beyond reason (guidance, "
            "temperature, learning rates) and for NaN in the weights"
        )
    return (images.float() * 127.5 + 128).clip(0, 255).to(torch.uint8)


class ImageWriter:
    """Streams images of one split into shards inside an artifact folder."""

    def __init__(self, folder: Path, split: str, spec: ImageSpec, grown: Growing | None = None):
        """grown: what the shards are a part of, if they are to survive a kill."""
        self.spec, self.split, self.grown = spec, split, grown
        self.images = ShardWriter(folder / split, "images")
        self.labels = ShardWriter(folder / split, "labels")

    def append(self, images: np.ndarray, labels: np.ndarray) -> None:
        """images: (n, C, H, W) uint8, or uint16 of a spec with 16 bits; labels: (n,) integers in [0, num_classes)."""
        if sets(self.spec, "bits"):
            bit_depth.append(self, images, labels)
            return
        expected = (self.spec.channels, self.spec.height, self.spec.width)
        assert images.dtype == np.uint8 and images.shape[1:] == expected, (images.dtype, images.shape, expected)
        assert len(images) == len(labels)
        if len(labels) and not (labels.min() >= 0 and labels.max() < self.spec.num_classes):
            raise ValueError(f"labels {labels.min()} to {labels.max()} are outside 0 to {self.spec.num_classes - 1}")
        if self.grown is not None:
            self.grown.append(f"{self.split}/images", images)
            self.grown.append(f"{self.split}/labels", labels.astype(np.int64))
            return
        self.images.append(images)
        self.labels.append(labels.astype(np.int64))

    def __enter__(self) -> "ImageWriter":
        return self

    def __exit__(self, *error) -> None:
        self.images.__exit__(*error)
        self.labels.__exit__(*error)


def write_meta(folder: Path, spec: ImageSpec, source_sha256: str, index: "pd.DataFrame") -> None:
    """index: one row per source image with id, split, shard row, label, source, sha256, kept, reason."""
    index.to_parquet(folder / "index.parquet", index=False)
    write_counts(folder, spec, source_sha256, {s: int(((index.split == s) & index.kept).sum()) for s in SPLITS})


def write_counts(folder: Path, spec: ImageSpec, source_sha256: str, counts: dict[str, int]) -> None:
    """counts: images of each split."""
    artifact.write_json(
        folder / "meta.json", {"spec": spec.model_dump(), "counts": counts, "source_sha256": source_sha256}
    )


class Images:
    """One split of an images artifact, memory-mapped. Check the artifact once with `read` before."""

    def __init__(self, folder: Path, split: str, spec: ImageSpec):
        self.split, self.spec = split, spec
        if sets(spec, "bits"):
            self.pixels, self.labels = bit_depth.opened(folder, split, spec)
            return
        self.pixels = Shards(Path(folder) / split, "images", np.uint8, (spec.channels, spec.height, spec.width))
        self.labels = labels_of(Path(folder) / split, spec.num_classes)  # (N,) int64
        if len(self.labels) != len(self.pixels):
            raise ArtifactError(
                f"{folder}/{split} holds {len(self.pixels)} images and {len(self.labels)} labels, expected as many. "
                f"{artifact.remedy(folder)}"
            )

    def __len__(self) -> int:
        return len(self.pixels)

    def uint8(self, rows: np.ndarray) -> Tensor:
        """(n, C, H, W) uint8 at these rows; uint16 where the spec has 16 bits."""
        return torch.from_numpy(self.pixels.gather(rows))

    def on(self, device: torch.device) -> "ImagesOnDevice":
        """The same images, all of them in that device's memory."""
        return ImagesOnDevice(self, device)

    def stored(self, rows: Tensor, generator: torch.Generator | None = None) -> ImageBatch:
        """The images at these rows, still as they lie on disk; the generator is what augmentations would draw from."""
        rows_ = rows.numpy()
        return ImageBatch(self.uint8(rows_), torch.from_numpy(self.labels[rows_]))

    def batch_of(self, stored: ImageBatch) -> ImageBatch:
        return ImageBatch(to_float(stored.images), stored.labels)


class Rows(NamedTuple):
    """What is stored of a batch where all images lie on the device already."""

    rows: Tensor  # (B,) int64


class ImagesOnDevice:
    """All images of a split, as they are stored, on one device: a step copies the numbers of its rows."""

    def __init__(self, images: Images, device: torch.device):
        self.pixels = torch.from_numpy(images.pixels.all()).to(device)
        self.labels = torch.from_numpy(images.labels).to(device)
        if sets(images.spec, "bits"):
            self.pixels = self.pixels.view(torch.int16)

    def __len__(self) -> int:
        return len(self.labels)

    def stored(self, rows: Tensor, generator: torch.Generator | None = None) -> Rows:
        return Rows(rows)

    def batch_of(self, stored: Rows) -> ImageBatch:
        return ImageBatch(to_float(self.pixels[stored.rows]), self.labels[stored.rows])


class Described(Params):
    """meta.json"""

    spec: described.OfImages
    counts: dict[Literal["train", "test"], Annotated[int, Field(ge=0)]]  # images of each split
    source_sha256: str


def read_spec(folder: Path) -> ImageSpec:
    """The spec of an images artifact, unverified."""
    return described.read(Path(folder) / "meta.json", Described).spec


def read(folder: Path) -> tuple[ImageSpec, dict[str, Images]]:
    """Verify the artifact and open both splits."""
    artifact.check(folder)
    meta = described.read(Path(folder) / "meta.json", Described)
    splits = {split: Images(folder, split, meta.spec) for split in SPLITS}
    found = {split: len(images) for split, images in splits.items()}
    if found != meta.counts:
        raise ArtifactError(
            f"{folder} holds {found} images, expected {meta.counts} of its meta.json. {artifact.remedy(folder)}"
        )
    return meta.spec, splits

"""Reference statistics: what a feature network makes of each split of the images, computed once, used by every system.

Per split: features of its images (float32 shards) and SPLIT.npz with their mean `mu` and unbiased covariance `sigma` in
float64, in the layout that pytorch-fid and its kin read: other projects can judge against the same reference.
"""

import math
import zipfile
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import torch
from pydantic import Field, model_validator

from tessera.artifacts import described
from tessera.artifacts import folder as artifact
from tessera.artifacts.folder import ArtifactError
from tessera.artifacts.shards import Shards, spread
from tessera.components import Params
from tessera.evaluation.figures import Protocol, Setting
from tessera.metrics.frechet import Moments

HEADER_BYTES = 1024  # of an .npy


class Split(Params):
    num_images: Annotated[int, Field(ge=2)]
    num_features: Annotated[int, Field(ge=2)]  # rows kept as features: all, or evenly spread ones
    sha256: str  # of the images and labels


class Described(Params):
    """meta.json"""

    dataset: str
    network: str  # the kind
    network_sha256: str  # of its weights
    resize: str
    splits: dict[Literal["train", "test"], Split]

    @model_validator(mode="after")
    def _has_both_splits(self) -> "Described":
        if len(self.splits) != 2 or any(split.num_features > split.num_images for split in self.splits.values()):
            raise ValueError("expected splits train and test, with no more features than images")
        return self


class Reference:
    """A verified artifact; moments and features are read when asked for."""

    def __init__(self, folder: Path):
        self.folder = artifact.check(folder)
        self.described = described.read(self.folder / "meta.json", Described)

    def moments(self, split: str) -> Moments:
        path, width = self.folder / f"{split}.npz", self._features(split).row_shape[0]
        try:
            mean, covariance = (
                read_moments(path, name, shape) for name, shape in (("mu", (width,)), ("sigma", (width,) * 2))
            )
        except Exception as error:  # a zip by a stranger, whose headers NumPy parses
            raise ArtifactError(
                f"{path} holds no arrays mu and sigma of {width} features ({type(error).__name__}: {str(error)[:200]}). "
                f"{artifact.remedy(self.folder)}"
            ) from None
        return Moments(torch.from_numpy(mean), torch.from_numpy(covariance), self.described.splits[split].num_images)

    def features(self, split: str) -> np.ndarray:
        """(num_features, D) float64"""
        found = self._features(split).all().astype(np.float64)
        if not np.isfinite(found).all():
            raise ArtifactError(f"{self.folder} holds features of the {split} images that are not finite")
        return found

    def _features(self, split: str) -> Shards:
        found = Shards(self.folder, f"features-{split}", np.float32)
        if len(found.row_shape) != 1 or len(found) != self.described.splits[split].num_features:
            raise ArtifactError(
                f"{self.folder} has {len(found)} rows {found.row_shape} of features of the {split} images, expected "
                f"{self.described.splits[split].num_features} vectors. {artifact.remedy(self.folder)}"
            )
        return found

    def features_at(self, split: str, rows: np.ndarray) -> np.ndarray:
        """(n, D) float64 features of these images of the split. Raises ValueError if one of them was not kept."""
        kept = self.feature_rows(split)
        if not np.isin(rows, kept).all():
            raise ValueError(
                f"{self.folder} keeps {len(kept):,} features of the {split} images, not those that are asked for: raise "
                f"reference_stats.max_features to the {self.described.splits[split].num_images:,} images there are"
            )
        return self.features(split)[np.searchsorted(kept, rows)]

    def protocol(self, split: str, images: str, num_images: int, **settings: Setting) -> Protocol:
        """That of a figure which compares so many images, by this network, with all features of the split."""
        return self.protocol_of(split, images, num_images, self.described.splits[split].num_images, **settings)

    def protocol_of(
        self, split: str, images: str, num_images: int, num_reference_images: int, **settings: Setting
    ) -> Protocol:
        """The same, compared with as many images of the split as one says."""
        return Protocol(
            dataset=self.described.dataset,
            images=images,
            num_images=num_images,
            reference_split=split,
            reference_sha256=self.described.splits[split].sha256,
            num_reference_images=num_reference_images,
            network=self.described.network,
            network_sha256=self.described.network_sha256,
            resize=self.described.resize,
            dtype="float32 features, float64 statistics",
            settings=settings,
        )

    def feature_rows(self, split: str) -> np.ndarray:
        """(num_features,) which images of the split these are of."""
        return spread(self.described.splits[split].num_images, self.described.splits[split].num_features)


def read_moments(path: Path, name: str, shape: tuple[int, ...]) -> np.ndarray:
    """One float64 array of an .npz, of this shape, read only if it claims no more bytes. Raises whatever damage leads to."""
    with zipfile.ZipFile(path) as file:
        claimed, most = file.getinfo(f"{name}.npy").file_size, 8 * math.prod(shape) + HEADER_BYTES
    if claimed > most:
        raise ValueError(f"{name} has {claimed:,} bytes, expected at most {most:,}")
    with np.load(path, allow_pickle=False) as file:
        found = file[name]
    if found.dtype != np.float64 or found.shape != shape or not np.isfinite(found).all():
        raise ValueError(f"{name} is {found.dtype} {found.shape}, expected finite float64 {shape}")
    return found


def write_moments(path: Path, moments: Moments) -> None:
    np.savez(path, mu=moments.mean.cpu().numpy(), sigma=moments.covariance.cpu().numpy())

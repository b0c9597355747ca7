"""Reference statistics: what a feature network makes of each split of the images, computed once, used by every system.

Per split: features of its images (float32 shards) and SPLIT.npz with their mean `mu` and unbiased covariance `sigma` in
float64, in the layout that pytorch-fid and its kin read: other projects can judge against the same reference.
"""

import zipfile
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
from pydantic import Field

from tessera.artifacts import folder as artifact
from tessera.artifacts.folder import ArtifactError
from tessera.artifacts.shards import Shards, spread
from tessera.components import Params, parse
from tessera.evaluation.figures import Protocol, Setting
from tessera.metrics.frechet import Moments


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
    splits: dict[str, Split]


class Reference:
    """A verified artifact; moments and features are read when asked for."""

    def __init__(self, folder: Path):
        self.folder = artifact.check(folder)
        meta: Any = artifact.read_json(self.folder / "meta.json")
        self.described = parse(Described, meta, f"{self.folder}/meta.json")

    def moments(self, split: str) -> Moments:
        path = self.folder / f"{split}.npz"
        try:
            with np.load(path, allow_pickle=False) as file:
                mean, covariance = torch.from_numpy(file["mu"]), torch.from_numpy(file["sigma"])
        except (OSError, ValueError, KeyError, zipfile.BadZipFile) as error:
            raise ArtifactError(
                f"{path} holds no arrays mu and sigma: {error}. {artifact.remedy(self.folder)}"
            ) from None
        return Moments(mean, covariance, self.described.splits[split].num_images)

    def features(self, split: str) -> np.ndarray:
        """(num_features, D) float64"""
        return Shards(self.folder, f"features-{split}").all().astype(np.float64)

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


def write_moments(path: Path, moments: Moments) -> None:
    np.savez(path, mu=moments.mean.cpu().numpy(), sigma=moments.covariance.cpu().numpy())

"""The judge of images: a fixed feature network, applied in batches to uint8 images wherever they lie; and which to choose."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from tessera.artifacts import checkpoints
from tessera.artifacts import folder as artifact
from tessera.artifacts.images import to_float
from tessera.artifacts.shards import Shards, in_batches, spread
from tessera.components import Params
from tessera.contracts import ImageSpec
from tessera.metrics.frechet import Moments, MomentsAccumulator, figure_name

LEAST_SIDE_OF_PHOTOGRAPHS = 32  # pixels: below, ImageNet's textures and parts have no room


def judge_for(spec: ImageSpec, count: int) -> dict[str, Any]:
    """The entry of `features` that judges such images best, as params.yaml has it; count: training images.

    One that learns the labels, where there are some; else, for color images of 32 pixels and more, one that learned ImageNet;
    else one that learns these images themselves. Measured on planted garbage: docs/log.md, judges that see garbage.
    """
    training = {"num_steps": 400, "batch_size": min(64, count), "learning_rate": 0.002}
    if spec.num_classes > 1:
        return {"kind": "classifier", "training": training}
    if spec.channels == 3 and min(spec.height, spec.width) >= LEAST_SIDE_OF_PHOTOGRAPHS:
        return {"kind": "timm"}
    return {"kind": "contrastive", "training": training}


class Summary:
    """Moments of all features that arrive, and evenly spread ones of them: memory does not grow with the number of images."""

    def __init__(self, num_images: int, max_features: int):
        self.kept = spread(num_images, max_features)  # which images the features are of
        self._is_kept = np.isin(np.arange(num_images), self.kept)
        self._moments, self._seen, self._num_kept = MomentsAccumulator(), 0, 0
        self._features = torch.empty(0)

    def update(self, features: Tensor) -> None:
        """features: (n, D) of the next n images. They stay on the device where they are."""
        self._moments.update(features)
        chosen = np.flatnonzero(
            self._is_kept[self._seen : self._seen + len(features)]
        )  # a mask would wait for the device
        if (
            not self._seen
        ):  # room for all: pieces that stay, among what is freed, keep a process's memory from shrinking
            self._features = features.new_empty(len(self.kept), features.shape[1])
        number = self._num_kept + len(chosen)
        self._features[self._num_kept : number] = features[torch.from_numpy(chosen).to(features.device)]
        self._num_kept, self._seen = number, self._seen + len(features)

    @property
    def moments(self) -> Moments:
        """On the CPU, where they are compared."""
        assert self._seen == len(self._is_kept), (self._seen, len(self._is_kept))
        found = self._moments.moments()
        return found._replace(mean=found.mean.cpu(), covariance=found.covariance.cpu())

    @property
    def features(self) -> Tensor:
        """(len(kept), D) float64"""
        return self.stored.double()

    @property
    def stored(self) -> Tensor:
        """The same as the network gave them."""
        assert self._num_kept == len(self.kept), (self._num_kept, len(self.kept))
        return self._features


class Judge:
    """A feature network, on the GPU if there is one. `name` is its key in params.yaml, and what its figures are called by."""

    def __init__(self, model: nn.Module, config: Params, name: str = "", weights_sha256: str = ""):
        self.config, self.weights_sha256 = config, weights_sha256
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.model = model.to(self.device).eval()
        self.has_logits: bool = model.has_logits
        self.name = name or config.kind
        self.frechet_name = figure_name(config.kind, self.name)

    @torch.no_grad()
    def batches(self, pixels: Shards | np.ndarray, rows: np.ndarray | None = None) -> Iterator[Tensor]:
        """(n, D) float32 features of uint8 images (N, C, H, W), or of the given rows of them, in batches, on the device.

        Raises ValueError unless they are finite, as do all that follow.
        """
        for batch in self._batches(pixels, rows):
            yield _finite(self.model.features(batch), "features")

    def summary(self, pixels: Shards | np.ndarray, max_features: int, rows: np.ndarray | None = None) -> Summary:
        """What is kept of the features of these images."""
        found = Summary(len(pixels) if rows is None else len(rows), max_features)
        for batch in self.batches(pixels, rows):
            found.update(batch)
        return found

    def features(self, pixels: Shards | np.ndarray, rows: np.ndarray | None = None) -> np.ndarray:
        """All of them at once, (N, D) float64, on the host."""
        return np.concatenate([batch.cpu().double().numpy() for batch in self.batches(pixels, rows)])

    def agrees(self, pixels: Shards | np.ndarray, labels: np.ndarray) -> np.ndarray:
        """(N,) bool: whether the class that the network sees in an image is its label."""
        return self.logits(pixels).argmax(dim=1).numpy() == labels

    @torch.no_grad()
    def logits(self, pixels: Shards | np.ndarray, rows: np.ndarray | None = None) -> Tensor:
        """(N, num_classes) on the CPU, of a network that has them."""
        return _finite(torch.cat([self.model.logits(batch).cpu() for batch in self._batches(pixels, rows)]), "logits")

    @torch.no_grad()
    def class_logits(self, pixels: Shards | np.ndarray, rows: np.ndarray | None = None) -> np.ndarray:
        """(N, number of ImageNet's classes): what the Inception Score is taken of."""
        found = [self.model.class_logits(batch).cpu() for batch in self._batches(pixels, rows)]
        return _finite(torch.cat(found), "logits").numpy()

    @staticmethod
    def read(folder: Path, name: str = "") -> "Judge":
        """The judge of a features artifact."""
        model, config, _ = checkpoints.load_model(folder, "features")
        return Judge(model, config, name, artifact.file_sha256(folder, "weights.safetensors"))

    def _batches(self, pixels: Shards | np.ndarray, rows: np.ndarray | None) -> Iterator[Tensor]:
        for values in in_batches(pixels, rows):
            yield to_float(torch.from_numpy(values).to(self.device))


def _finite(values: Tensor, what: str) -> Tensor:
    """A comparison with NaN is False, and argmax takes it for the largest: copies would be none, a class one like another."""
    if not values.isfinite().all():
        raise ValueError(
            f"{what} hold values that are not finite, expected finite ones: look for NaN in the images or the weights"
        )
    return values

"""The judge of images: a fixed feature network, applied in batches to uint8 images wherever they lie."""

from pathlib import Path

import numpy as np
import torch
from torch import nn

from tessera.artifacts import checkpoints
from tessera.artifacts import folder as artifact
from tessera.artifacts.images import to_float
from tessera.artifacts.shards import Shards
from tessera.components import Params

BATCH = 500


class Judge:
    """A feature network, on the GPU if there is one."""

    def __init__(self, model: nn.Module, config: Params):
        self.config = config
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.model = model.to(self.device).eval()
        self.has_logits: bool = model.has_logits
        self.frechet_name = "fid" if config.kind == "inception" else f"fd_{config.kind}"
        self.kernel_name = "kid" if config.kind == "inception" else f"kd_{config.kind}"

    @torch.no_grad()
    def features(self, pixels: Shards | np.ndarray, rows: np.ndarray | None = None) -> np.ndarray:
        """(N, D) float64 features of uint8 images (N, C, H, W), or of the given rows of them."""
        rows = np.arange(len(pixels)) if rows is None else rows
        parts = [self.model.features(batch).double().cpu().numpy() for batch in self._batches(pixels, rows)]
        return np.concatenate(parts)

    @torch.no_grad()
    def agreement(self, pixels: Shards | np.ndarray, labels: np.ndarray) -> float:
        """Share of the images whose predicted class is their label."""
        rows = np.arange(len(pixels))
        predicted = [self.model.logits(batch).argmax(dim=1).cpu().numpy() for batch in self._batches(pixels, rows)]
        return float((np.concatenate(predicted) == labels).mean())

    @staticmethod
    def read(folder: Path) -> tuple["Judge", np.ndarray, str]:
        """The judge of a features artifact, the (N, D) features of the test images, and the artifact's fingerprint."""
        model, config, _ = checkpoints.load_model(folder, "features")
        reference = Shards(folder, "reference").all().astype(np.float64)
        return Judge(model, config), reference, artifact.fingerprint(folder)

    @staticmethod
    def train_features(folder: Path) -> np.ndarray:
        """The (N, D) features of the training images that a features artifact keeps."""
        return Shards(folder, "train").all().astype(np.float64)

    def _batches(self, pixels: Shards | np.ndarray, rows: np.ndarray):
        for start in range(0, len(rows), BATCH):
            chosen = rows[start : start + BATCH]
            values = pixels.gather(chosen) if isinstance(pixels, Shards) else pixels[chosen]
            yield to_float(torch.from_numpy(values).to(self.device))

"""LPIPS of reconstructions: a distance of images by the features of VGG-16, from a local file of weights.

Source: Zhang et al., "The Unreasonable Effectiveness of Deep Features as a Perceptual Metric", 2018, arXiv:1801.03924,
equation 1 (`tessera/nn/image_losses.py`).
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from tessera.artifacts import weights_file
from tessera.artifacts.images import to_float
from tessera.components import Params
from tessera.contracts import ImageSpec, Planned, Record, Shown
from tessera.nn.image_losses import Lpips

FIGURES = (Shown("lpips", better="lower"),)
SMALLEST = 16  # pixels
WINDOW = (
    11  # of SSIM, which stands in the protocol of every figure of pairs; without it earlier runs could not be compared
)


class Config(Params):
    kind: Literal["lpips"]
    weights: str  # path of a safetensors file
    sha256: str  # of that file


def problems(config: Config, planned: Planned) -> Iterator[str]:
    if planned.spec.channels not in (1, 3):
        yield (
            f"images of {planned.spec.channels} channels do not fit LPIPS, expected 1 (gray) or 3 (RGB): take the entry of "
            f"kind lpips out"
        )
    shortest = min(planned.spec.height, planned.spec.width)
    if shortest < SMALLEST:
        yield (
            f"images of {shortest} pixels are too small for LPIPS, whose network halves them four times, expected at least "
            f"{SMALLEST}: take the entry of kind lpips out"
        )


class Pairs:
    """`lpips`: the mean distance of reconstructions from their originals."""

    def __init__(self, config: Config, spec: ImageSpec, device: torch.device):
        shortest = min(spec.height, spec.width)
        if shortest < SMALLEST:
            raise ValueError(
                f"evaluate.metrics: images of {shortest} pixels are too small for LPIPS, whose network halves them four "
                f"times, expected at least {SMALLEST}: take the entry of kind lpips out"
            )
        keys = ("weights of evaluate.metrics of kind lpips", "sha256")
        remedy = "Without an entry of kind lpips there is no such figure"
        weights = weights_file.read(Path(config.weights), config.sha256, keys, "the VGG weights of LPIPS", remedy)
        self.network, self.device, self.sha256 = Lpips(weights).eval().to(device), device, config.sha256
        self.distances: list[Tensor] = []

    @torch.no_grad()
    def update(self, originals: Tensor, decoded: Tensor) -> None:
        pair = (to_float(images).to(self.device) for images in (decoded, originals))
        self.distances.append(self.network.of_each(*pair).cpu())

    def record(self, protocol: Any, found: Record) -> None:
        by_vgg = protocol(network="lpips-vgg16", network_sha256=self.sha256, window=WINDOW)
        found.add_mean("lpips", torch.cat(self.distances), by_vgg)

"""Perceptual loss of any image network of timm: how far the features of a reconstruction are from those of its image.

With y^l the features of layer l, of unit length along the channels at each place, u a constant, and means over places:

    distance(y, x) = 1/u sum_l mean_ij sum_c (y^l - x^l)^2

u is the mean of the same sum over pairs of unrelated images, so that 1 is the distance of two images that have nothing in
common, and `perceptual_weight` means the same for every network and choice of layers. The images are noise with the
spectrum of photographs, drawn from a seed of their own: u follows from the settings and weights alone, on the CPU, when a
training begins. Its checkpoints have it as `unrelated`, so that a resumed training goes on with the same bits.

The weights are the installed ones of EfficientNet-lite0, or those of a local file, checked by its sha256. They are frozen and
in no artifact or checkpoint. A network that trained a tokenizer must not be its only judge (`tessera.params`).

Source: Zhang et al., "The Unreasonable Effectiveness of Deep Features as a Perceptual Metric", 2018, arXiv:1801.03924,
section 3.1, equation 1; Johnson et al., "Perceptual Losses for Real-Time Style Transfer", 2016, arXiv:1603.08155, section 3
(as a loss); Field, "Relations between the statistics of natural images and the response properties of cortical cells", 1987
(amplitudes fall as 1/f).
Differs from them: no learned weights of channels, all weigh alike; divided by u; small images are enlarged.
"""

from collections.abc import Iterator
from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor, nn

from tessera.components import Params
from tessera.contracts import ImageSpec, Planned
from tessera.features import timm
from tessera.nn.weightless import WithoutWeights

NUM_UNRELATED = 16  # images of noise, each compared with the next


class Config(Params):
    kind: Literal["features"] = "features"
    network: Annotated[str, Field(pattern="^[a-z0-9_]+$")] = timm.PACKAGED  # timm's name of it
    weights: Annotated[str, Field(min_length=1)] | None = None  # path of a safetensors file; unset: the packaged ones
    sha256: Annotated[str, Field(pattern="^[0-9a-f]{64}$")] | None = None  # of that file
    layers: Annotated[tuple[int, ...], Field(min_length=1)] = (0, 1, 2, 3)  # as timm counts them, from the end if < 0
    min_side: Annotated[int, Field(ge=32, le=1024)] = 64  # pixels; images with a shorter side are enlarged to it

    @model_validator(mode="after")
    def _has_weights(self) -> "Config":
        self.pretrained()
        return self

    def pretrained(self) -> timm.Config:
        """The network as features of kind timm have it. Raises ValueError if it is without weights."""
        return timm.Config(network=self.network, layer=None, weights=self.weights, sha256=self.sha256)


def problems(config: Config, planned: Planned) -> Iterator[str]:
    """Of the params; a file of weights that is missing or another one is told by the check itself."""
    try:
        with WithoutWeights():
            network = timm.Model(config.pretrained(), planned.spec).network
        _require_layers(network, config)
    except ValueError as refusal:
        yield _in_our_words(refusal)
    yield from timm.problems(config.pretrained(), planned)


class Distance(nn.Module):
    """The distance of two image batches (B, 1 or 3, H, W) in [-1, 1]: a scalar, the mean over the batch, 0 if they are equal.

    Its state is `unrelated` alone: the network is in a list, where neither checkpoints nor optimizers see it, and where it
    stays in evaluation mode.
    """

    unrelated: Tensor

    def __init__(self, config: Config):
        """Reads the weights. Raises ValueError if they are missing, changed, or of another network, or lack a layer."""
        super().__init__()
        self.config = config
        side = config.min_side
        spec = ImageSpec(
            name="noise", channels=1, height=side, width=side, num_classes=1, class_names=("noise",), licence="none"
        )
        try:
            model = timm.Model(config.pretrained(), spec)
            _require_layers(model.network, config)
            timm.prepare(model, config.pretrained())
        except ValueError as refusal:
            raise ValueError(_in_our_words(refusal)) from None
        self._network = [model]
        expects = model.network.pretrained_cfg
        self._fixed = tuple(expects["input_size"][-2:]) if expects.get("fixed_input_size") else None
        with torch.no_grad():
            noise = natural_noise(NUM_UNRELATED, side)
            self.register_buffer("unrelated", self._sum_over_layers(noise, noise.roll(1, dims=0)))

    def forward(self, reconstructions: Tensor, images: Tensor) -> Tensor:
        """Zhang et al., equation 1, over u; the gradient reaches the reconstructions."""
        return self._sum_over_layers(reconstructions, images) / self.unrelated

    def _sum_over_layers(self, first: Tensor, second: Tensor) -> Tensor:
        return torch.stack(
            [unit_distance(a, b) for a, b in zip(self._grids(first), self._grids(second), strict=True)]
        ).sum()

    def _grids(self, images: Tensor) -> list[Tensor]:
        """(B, channels, h, w) of each layer."""
        model = self._network[0].to(images.device)
        pixels = 127.5 * (self._resized(images.float()).expand(-1, 3, -1, -1) + 1)  # not rounded, for the gradient
        scaled = ((pixels - model.mean) / model.std).contiguous(memory_format=torch.channels_last)
        return model.network.forward_intermediates(
            scaled, indices=list(self.config.layers), intermediates_only=True, stop_early=True
        )

    def _resized(self, images: Tensor) -> Tensor:
        """As they are; if small, enlarged with their shape kept; for a network of one input size, of that size."""
        height, width = images.shape[-2:]
        factor = max(1.0, self.config.min_side / min(height, width))
        size = self._fixed or (round(factor * height), round(factor * width))
        if size == (height, width):
            return images
        return F.interpolate(images, size=size, mode="bicubic", antialias=True)


def unit_distance(first: Tensor, second: Tensor) -> Tensor:
    """Zhang et al., equation 1, of one layer and with weights of 1: (B, channels, h, w) twice -> a scalar in [0, 4]."""
    first, second = (F.normalize(grid.float(), dim=1, eps=1e-5) for grid in (first, second))
    return (first - second).square().sum(dim=1).mean()


def natural_noise(count: int, side: int) -> Tensor:
    """Field: (count, 1, side, side) in [-1, 1], gray noise whose amplitudes fall as 1/f, always the same."""
    white = torch.randn(count, 1, side, side, generator=torch.Generator().manual_seed(0))
    frequency = torch.hypot(torch.fft.fftfreq(side)[:, None], torch.fft.rfftfreq(side)[None])
    frequency[0, 0] = torch.inf  # no mean
    noise = torch.fft.irfft2(torch.fft.rfft2(white) / frequency, s=(side, side))
    return (0.5 * noise / noise.std(dim=(1, 2, 3), keepdim=True)).clamp(-1, 1)


def _require_layers(network: nn.Module, config: Config) -> None:
    """Raises ValueError if the network lacks a layer."""
    number = len(getattr(network, "feature_info", [])) if hasattr(network, "forward_intermediates") else 0
    missing = [layer for layer in config.layers if not -number <= layer < number]
    if missing:
        raise ValueError(
            f"layers: timm's {config.network} gives {number} layers and none of number {missing[0]}, expected numbers from "
            f"{-number} to {number - 1}: choose among them"
        )


def _in_our_words(refusal: ValueError) -> str:
    """What features of kind timm say, of the keys that stand here."""
    return str(refusal).replace("features.", "perceptual.")

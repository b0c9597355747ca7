"""Generator and discriminator of a GAN on a grid of any size: mirror images of each other, conditioned on a label.

A patch layer, then levels with a factor 2 between them, residual blocks on each. Without normalization and with blocks it
has the shape of R3GAN's networks; with normalization and without blocks it is a DCGAN. On a grid of one place, which a
patch as large as the image gives, both networks are residual perceptrons.

Source: Huang et al., "The GAN is dead; long live the GAN!", 2024, arXiv:2501.05441, section 3 (no normalization, residual
branches that start at zero); Radford et al., DCGAN, 2015, arXiv:1511.06434, section 3 (strided convolutions of 4x4);
Miyato and Koyama, "cGANs with Projection Discriminator", 2018, arXiv:1802.05637, equation 3.
Differs from it: two plain 3x3 convolutions a block, not a grouped one between two of 1x1; features are flattened, not
pooled, before the projection, because where things are matters on small grids.

Shape letters: B batch, D latent channels, H W their grid, N noise.
"""

import math
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

SLOPE = 0.2  # of the leaky ReLU, as in DCGAN
Normalization = Literal["none", "batch"]


class Level(NamedTuple):
    height: int
    width: int
    channels: int


def levels_of(
    latent_shape: tuple[int, int, int], patch_size: int, channels: int, max_channels: int, smallest_side: int
) -> list[Level]:
    """From the finest to the coarsest: halved while both sides are even and stay at least `smallest_side`."""
    _, height, width = latent_shape
    if height % patch_size or width % patch_size:
        raise ValueError(
            f"latents of {height}x{width} are not divisible by patch_size {patch_size} of the gan: choose a divisor"
        )
    levels = [Level(height // patch_size, width // patch_size, channels)]
    while True:
        height, width, channels = levels[-1]
        if height % 2 or width % 2 or min(height, width) < 2 * smallest_side:
            return levels
        levels.append(Level(height // 2, width // 2, min(2 * channels, max(channels, max_channels))))


class Sizes(NamedTuple):
    """What both networks are built from."""

    latent_shape: tuple[int, int, int]
    num_labels: int
    patch_size: int
    levels: list[Level]
    num_blocks: int
    normalization: Normalization


class Full(nn.Linear):
    """Every place to every place: a convolution as large as its grid, at the speed of a matrix product."""

    def __init__(self, in_shape: tuple[int, int, int], out_shape: tuple[int, int, int]):
        super().__init__(math.prod(in_shape), math.prod(out_shape))
        self.out_shape = out_shape

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.flatten(1)).view(-1, *self.out_shape)


def _patch_layer(sizes: Sizes, is_generator: bool) -> nn.Module:
    """Between the latents and the finest level; patches overlap where the grid allows it."""
    height, width, channels = sizes.levels[0]
    shape, patch = sizes.latent_shape, sizes.patch_size
    if height == width == 1:
        return Full((channels, 1, 1), shape) if is_generator else Full(shape, (channels, 1, 1))
    if patch == 1:
        grid = {"kernel_size": 3, "padding": 1}
    elif patch % 2:
        grid = {"kernel_size": patch, "stride": patch}
    else:
        grid = {"kernel_size": 2 * patch, "stride": patch, "padding": patch // 2}
    return nn.ConvTranspose2d(channels, shape[0], **grid) if is_generator else nn.Conv2d(shape[0], channels, **grid)


def _activated(layer: nn.Module, channels: int, normalization: Normalization) -> list[nn.Module]:
    norm = [nn.BatchNorm2d(channels)] if normalization == "batch" else []
    return [layer, *norm, nn.LeakyReLU(SLOPE)]


class Block(nn.Module):
    """x + f(x); f starts at zero, without which networks without normalization explode (Huang et al., section 3)."""

    def __init__(self, level: Level, normalization: Normalization):
        super().__init__()
        shape = (level.channels, level.height, level.width)
        if level.height == level.width == 1:
            first, last = Full(shape, shape), Full(shape, shape)
        else:
            first, last = (nn.Conv2d(level.channels, level.channels, 3, padding=1) for _ in range(2))
        self.layers = nn.Sequential(*_activated(first, level.channels, normalization), last)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.layers(x)


def _initialize(network: nn.Module) -> None:
    """He et al., arXiv:1502.01852, section 2.2; zero at the end of each residual branch."""
    for module in network.modules():
        if isinstance(module, nn.ConvTranspose2d):  # each output meets kernel / stride places of the input a side
            fan_in = module.in_channels * math.prod(module.kernel_size) / math.prod(module.stride)
            nn.init.normal_(module.weight, std=math.sqrt(2 / (1 + SLOPE**2) / fan_in))
        elif isinstance(module, nn.Conv2d | nn.Linear):
            nn.init.kaiming_normal_(module.weight, a=SLOPE)
        if isinstance(module, nn.ConvTranspose2d | nn.Conv2d | nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)
    for module in network.modules():
        if isinstance(module, Block):
            nn.init.zeros_(module.layers[-1].weight)


class Generator(nn.Module):
    """(B, N) noise and (B,) labels -> (B, D, H, W); with `hidden_dim`, through a hidden layer before the first grid."""

    def __init__(self, sizes: Sizes, noise_dim: int, hidden_dim: int):
        super().__init__()
        top = sizes.levels[-1]
        self.top = (top.channels, top.height, top.width)
        self.label_embedding = nn.Embedding(sizes.num_labels, noise_dim)
        hidden = [nn.Linear(2 * noise_dim, hidden_dim), nn.LeakyReLU(SLOPE)] if hidden_dim else []
        self.from_noise = nn.Sequential(*hidden, nn.Linear(hidden_dim or 2 * noise_dim, math.prod(self.top)))
        norm = [nn.BatchNorm2d(top.channels)] if sizes.normalization == "batch" else []
        layers: list[nn.Module] = [*norm, nn.LeakyReLU(SLOPE)]
        for coarse, level in zip([None, *sizes.levels[:0:-1]], sizes.levels[::-1], strict=True):
            if coarse is not None:
                up = nn.ConvTranspose2d(coarse.channels, level.channels, 4, stride=2, padding=1)
                layers += _activated(up, level.channels, sizes.normalization)
            layers += [Block(level, sizes.normalization) for _ in range(sizes.num_blocks)]
        self.layers = nn.Sequential(*layers)
        self.to_latents = _patch_layer(sizes, is_generator=True)
        _initialize(self)

    def forward(self, noise: Tensor, labels: Tensor) -> Tensor:
        x = self.from_noise(torch.cat([noise, self.label_embedding(labels)], dim=1))
        return self.to_latents(self.layers(x.view(-1, *self.top)))


class ProjectionDiscriminator(nn.Module):
    """Miyato and Koyama, equation 3: (B, D, H, W) and (B,) labels -> (B,) logits, high for real."""

    def __init__(self, sizes: Sizes, feature_dim: int):
        super().__init__()
        coarsest = sizes.levels[-1]
        layers: list[nn.Module] = [
            _patch_layer(sizes, is_generator=False),
            nn.LeakyReLU(SLOPE),  # and no normalization on what sees the data, as in DCGAN
        ]
        for fine, level in zip([None, *sizes.levels[:-1]], sizes.levels, strict=True):
            if fine is not None:
                down = nn.Conv2d(fine.channels, level.channels, 4, stride=2, padding=1)
                layers += _activated(down, level.channels, sizes.normalization)
            layers += [Block(level, sizes.normalization) for _ in range(sizes.num_blocks)]
        self.layers = nn.Sequential(*layers)
        self.to_features = nn.Linear(coarsest.channels * coarsest.height * coarsest.width, feature_dim)
        self.to_logit = nn.Linear(feature_dim, 1)
        self.label_embedding = nn.Embedding(sizes.num_labels, feature_dim)
        _initialize(self)
        nn.init.normal_(self.to_logit.weight)
        nn.init.normal_(self.label_embedding.weight)  # not zero: the label counts from the first step

    def forward(self, latents: Tensor, labels: Tensor) -> Tensor:
        features = F.leaky_relu(self.to_features(self.layers(latents).flatten(1)), SLOPE)
        features = features / features.shape[1] ** 0.5
        return self.to_logit(features).squeeze(1) + (features * self.label_embedding(labels)).sum(dim=1)

"""Augmented views of a training image: mirror images and small warps, encoded once and drawn from while a prior trains.

Source: LlamaGen's pre-extracted ten-crop codes (Sun et al. 2024, arXiv:2406.06525, section 3.1), with sub-pixel warps in
the place of crops, because whole-pixel shifts of an 8x8 image are other images.
"""

import torch
from torch import Tensor

from tessera import seeding
from tessera.nn.warp import warp as warped
from tessera.params import EncodeTokens


def count(settings: EncodeTokens) -> int:
    """Views per training image, the image itself among them."""
    return (1 + settings.warps) * (2 if settings.horizontal_flip else 1)


def others(images: Tensor, settings: EncodeTokens, seed: int, split: str, start: int) -> list[Tensor]:
    """The other count - 1 views of images (B, C, H, W) in [-1, 1]; `start`, the first row, seeds their warps."""
    generator = seeding.generator(seed, "views", split, start)
    warps = [warp(images, settings, generator) for _ in range(settings.warps)]
    flipped = [view.flip(-1) for view in (images, *warps)] if settings.horizontal_flip else []
    return [*warps, *flipped]


def warp(images: Tensor, settings: EncodeTokens, generator: torch.Generator) -> Tensor:
    """(B, C, H, W) images in [-1, 1], each rotated, scaled and shifted by its own uniform draws."""
    draws = torch.rand(4, len(images), generator=generator) * 2 - 1
    amounts = settings.warp_rotation, settings.warp_scale, settings.warp_shift
    return warped(images, draws, *amounts, interpolation="bicubic").clamp(
        -1, 1
    )  # priors would learn the blur of bilinear

"""What feature networks share: the settings and the shape of those that learn the images at hand, and which images fit."""

from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor, nn

from tessera.components import Params
from tessera.contracts import ImageSpec
from tessera.nn.warp import warp

GROUPS = 8


class LearnsImages(Params):
    """Settings of a network that is trained on the images at hand."""

    channels: Annotated[int, Field(ge=8, multiple_of=GROUPS)] = 32  # at the finest grid; twice as many below
    feature_dim: Annotated[int, Field(ge=1)] = 64
    seed: Annotated[int, Field(ge=0)] = 0  # not the run's: two runs compare only under one and the same judge


class PooledFeatures(nn.Module):
    """Features are a linear map of what `blocks` leaves of an image, which it pools to a few cells: where things are counts."""

    has_logits = False
    resize = "none"
    blocks: nn.Module
    to_features: nn.Module

    def features(self, images: Tensor) -> Tensor:
        """images: (B, C, H, W) float in [-1, 1] -> (B, feature_dim) float32."""
        return self.to_features(self.blocks(images).flatten(1)).float()


def first_stride(spec: ImageSpec) -> int:
    """From 16 pixels on the first convolution halves the grid: full resolution costs the most and says the least."""
    return 2 if min(spec.height, spec.width) >= 16 else 1


def warped(images: Tensor, rotation: float, scale: float, shift: float) -> Tensor:
    """images (B, C, H, W), each rotated, scaled and shifted by its own small amount, between pixels; edges repeat.

    Each up to this much: radians, fraction of the size, fraction of the side. Draws come from torch's global generator, as
    those of dropout would.
    """
    draws = 2 * torch.rand(4, len(images), device=images.device) - 1
    return warp(images, draws, rotation, scale, shift)


def require_gray_or_rgb(spec: ImageSpec, network: str) -> None:
    """Raises ValueError for images that a network of photographs cannot see; network: what the sentence calls it."""
    if spec.channels not in (1, 3):
        raise ValueError(
            f"images of {spec.channels} channels do not fit {network}, expected 1 (gray) or 3 (RGB): "
            f"use features of kind classifier or contrastive"
        )

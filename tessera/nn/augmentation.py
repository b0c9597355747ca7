"""Differentiable augmentation of what a discriminator sees, of the same kinds for real and for generated.

Source: Zhao et al., "Differentiable Augmentation for Data-Efficient GAN Training", 2020, arXiv:2006.10738, section 3.2
(translation and cutout); Karras et al., "Training Generative Adversarial Networks with Limited Data", 2020,
arXiv:2006.06676, section 2.2 (a probability below 1 keeps the changes from leaking into what is generated).
Differs from it: small warps between pixels are a kind of their own, for grids where one place is far to move.
"""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from tessera.nn.warp import warp

Augmentation = Literal["none", "warp", "translate_cutout"]
ROTATION, SCALE, SHIFT = 0.15, 0.1, 0.08  # of warps, at most: radians, relative change, share of the side
TRANSLATION, CUTOUT = 0.125, 0.5  # shares of the side: the farthest move, and the side of the hole


def augmented(images: Tensor, kind: Augmentation, probability: float) -> Tensor:
    """Zhao et al., section 3.2, of each image with a probability (Karras et al., section 2.2).

    (B, C, H, W) -> (B, C, H, W); draws from torch's global generator.
    """
    if kind == "none" or not probability:
        return images
    is_changed = torch.rand(len(images), device=images.device) < probability
    if kind == "warp":
        draws = (2 * torch.rand(4, len(images), device=images.device) - 1) * is_changed
        return warp(images, draws, ROTATION, SCALE, SHIFT)
    changed = _cutout(_translated(images))
    return torch.where(is_changed.view(-1, 1, 1, 1), changed, images)


def _translated(images: Tensor) -> Tensor:
    """Each image shifted by whole places, at most TRANSLATION of the side each way, with zeros beyond the edge."""
    batch, _, height, width = images.shape
    far_y, far_x = round(height * TRANSLATION), round(width * TRANSLATION)
    y = torch.randint(-far_y, far_y + 1, (batch, 1, 1), device=images.device)
    x = torch.randint(-far_x, far_x + 1, (batch, 1, 1), device=images.device)
    rows = torch.arange(height, device=images.device).view(1, -1, 1) + far_y - y
    columns = torch.arange(width, device=images.device).view(1, 1, -1) + far_x - x
    padded = F.pad(images, (far_x, far_x, far_y, far_y)).permute(0, 2, 3, 1)
    which = torch.arange(batch, device=images.device).view(-1, 1, 1)
    return padded[which, rows, columns].permute(0, 3, 1, 2)


def _cutout(images: Tensor) -> Tensor:
    """Zeros in a rectangle with CUTOUT of each side, anywhere, also partly outside."""
    batch, _, height, width = images.shape
    hole_y, hole_x = round(height * CUTOUT), round(width * CUTOUT)
    top = torch.randint(-(hole_y // 2), height - hole_y // 2, (batch, 1), device=images.device)
    left = torch.randint(-(hole_x // 2), width - hole_x // 2, (batch, 1), device=images.device)
    y = torch.arange(height, device=images.device) - top  # (B, H)
    x = torch.arange(width, device=images.device) - left
    is_hole = ((y >= 0) & (y < hole_y)).unsqueeze(2) & ((x >= 0) & (x < hole_x)).unsqueeze(1)
    return images * ~is_hole.unsqueeze(1)

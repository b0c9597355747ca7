"""The membrane that closes the seam of a filled hole: smooth inside, the difference from the known pixels on its border.

Source: Perez, Gangnet and Blake, "Poisson Image Editing", 2003, section 2: with the gradient of the filling as guidance field
the correction solves Laplace's equation with the differences on the border as boundary values.
Differs from it: solved by averaging over the neighbors; the sides of the image are free; and the correction may fade with the
distance (the screened equation), where what fills the hole has the image's colors already and only its border is off.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

SWEEPS_PER_PIXEL = 4  # of the longer side: the correction reaches across the image


def close_seam(images: Tensor, filling: Tensor, mask: Tensor, fade: float = math.inf) -> Tensor:
    """(B, C, H, W) known pixels of `images`, unchanged, and where mask (B, H, W) is True `filling` plus the membrane.

    fade: pixels from a straight border after which a share 1 / e of the correction is left.
    """
    hole = mask.unsqueeze(1)
    correction = torch.where(hole, 0.0, images - filling)  # known pixels pull the filling to themselves
    is_near = F.max_pool2d(hole.float(), 3, stride=1, padding=1).bool() & ~hole  # of the known ones, the border alone
    fixed = torch.where(is_near, correction, 0.0)
    weight = (is_near | hole).float()  # known pixels farther away take no part
    screen = 2 * (math.cosh(1 / fade) - 1)
    x = fixed
    for _ in range(SWEEPS_PER_PIXEL * max(images.shape[2:])):
        total = _neighbors(x * weight) / (_neighbors(weight).clamp_min(1) + screen)
        x = torch.where(hole, total, fixed)
    return torch.where(hole, (filling + x).clamp(-1, 1), images)


def _neighbors(x: Tensor) -> Tensor:
    """The sum of the four neighbors; beyond the image there is none."""
    padded = F.pad(x, (1, 1, 1, 1))
    return padded[..., :-2, 1:-1] + padded[..., 2:, 1:-1] + padded[..., 1:-1, :-2] + padded[..., 1:-1, 2:]

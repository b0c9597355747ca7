"""Small warps of images between pixels: rotation, scale and shift, each image by its own amounts.

Source: Simard, Steinkraus and Platt, "Best Practices for Convolutional Neural Networks Applied to Visual Document
Analysis", 2003, section 2 (affine warps of digits as further examples).
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def warp(
    images: Tensor, draws: Tensor, rotation: float, scale: float, shift: float, interpolation: str = "bilinear"
) -> Tensor:
    """Simard et al., section 2: (B, C, H, W) images, each warped by its column of `draws` (4, B) in [-1, 1].

    A draw of 1 means the whole rotation in radians, scale as a relative change, shift as a fraction of the side. Edges repeat
    outward. Interpolation "bicubic" keeps images sharp, and may leave their range of values; "bilinear" is faster and blurs.
    """
    draws = draws.to(images.device)
    angle, factor, shifts = draws[0] * rotation, 1 + draws[1] * scale, draws[2:] * 2 * shift  # a side is 2 units long
    cosine, sine = factor * angle.cos(), factor * angle.sin()
    aspect = images.shape[-1] / images.shape[-2]  # affine_grid counts in half sides, a rotation is one of pixels
    rows = [cosine, -sine / aspect, shifts[0], sine * aspect, cosine, shifts[1]]
    grid = F.affine_grid(torch.stack(rows, dim=1).view(-1, 2, 3), list(images.shape), align_corners=False)
    return F.grid_sample(images.float(), grid, mode=interpolation, padding_mode="border", align_corners=False)

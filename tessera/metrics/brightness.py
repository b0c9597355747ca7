"""How much brighter one set of images is than another, in gray levels: the mistakes of rounding and of preprocessing.

A shift of one level of 255 (a decoder's float truncated where it was to be rounded, a reference saved as JPEG) moves
Fréchet distances by less than their noise, and spoils comparisons all the same. A mean over all pixels sees it.
"""

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor


class Shift(NamedTuple):
    value: float  # gray levels of 255; above 0: the first set is brighter
    standard_error: float  # over draws of the images; NaN for one image


def levels(images: Tensor | np.ndarray) -> Tensor:
    """(N, C, H, W) uint8 -> (N,) float64 mean gray level of each image, in [0, 255]."""
    return torch.as_tensor(images).double().mean(dim=(1, 2, 3))


def shift(images: Tensor, others: Tensor, paired: bool = False) -> Shift:
    """Levels of two sets, (N,) and (M,). paired: image i of one is made of image i of the other, so N = M."""
    if not (images.isfinite().all() and others.isfinite().all()):
        raise ValueError("gray levels are not finite, expected 0 to 255: look for NaN in the images they are of")
    if paired:
        differences = images - others
        return Shift(differences.mean().item(), (differences.std() / len(differences) ** 0.5).item())
    error = torch.hypot(images.std() / len(images) ** 0.5, others.std() / len(others) ** 0.5)
    return Shift((images.mean() - others.mean()).item(), error.item())

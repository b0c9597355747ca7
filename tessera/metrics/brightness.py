"""How much brighter one set of images is than another, in gray levels: the mistakes of rounding and of preprocessing.

A shift of one level of 255 (a decoder's float truncated where it was to be rounded, a reference saved as JPEG) moves
Fréchet distances by less than their noise, and spoils comparisons all the same. A mean over all pixels sees it.

Source: the mistakes are those of Parmar, Zhang and Zhu, "On Aliased Resizing and Surprising Subtleties in GAN Evaluation",
2022, arXiv:2104.11222, section 3; the mean is nobody's.
"""

from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from tessera.artifacts import bit_depth
from tessera.components import Params, sets
from tessera.contracts import ImageSpec, Record, SeenSamples, Shown

FIGURES = (Shown("brightness_shift", form=None), Shown("reconstruction_brightness_shift", form=None))
# That of SSIM: it stands in the protocol of every figure of pairs, and without it this one could not be compared with those
# of earlier runs.
WINDOW = 11


class Config(Params):
    kind: Literal["brightness"]


class Shift(NamedTuple):
    value: float  # gray levels of 255; above 0: the first set is brighter
    standard_error: float  # over draws of the images; NaN for one image


def of_samples(config: Config, samples: SeenSamples, found: Record) -> None:
    """`brightness_shift`: how much brighter samples are than test images, all of them."""
    ours, theirs = (
        torch.tensor([level for batch in batches for level in levels(batch).tolist()], dtype=torch.float64)
        for batches in (samples.pixels(), samples.test_pixels())
    )
    difference = shift(ours, theirs)
    found.add("brightness_shift", difference.value, samples.protocol(), difference.standard_error)


class Pairs:
    """`reconstruction_brightness_shift`: of reconstructions, each beside its original."""

    def __init__(self, config: Config, spec: ImageSpec, device: torch.device):
        self.decoded: list[
            float
        ] = []  # numbers: small tensors that stay, among large ones that go, keep memory from shrinking
        self.originals: list[float] = []

    def update(self, originals: Tensor, decoded: Tensor) -> None:
        self.decoded += levels(decoded).tolist()
        self.originals += levels(originals).tolist()

    def record(self, protocol: Any, found: Record) -> None:
        ours, theirs = (torch.tensor(each, dtype=torch.float64) for each in (self.decoded, self.originals))
        difference = shift(ours, theirs, paired=True)
        found.add(
            "reconstruction_brightness_shift", difference.value, protocol(window=WINDOW), difference.standard_error
        )


def levels(images: Tensor | np.ndarray) -> Tensor:
    """(N, C, H, W) uint8 or uint16 -> (N,) float64 mean gray level of each image, in [0, 255]: of 16 bits, 257 are one."""
    if sets(bit_depth.of(images), "bits"):
        return bit_depth.gray_levels(images).mean(dim=(1, 2, 3))
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

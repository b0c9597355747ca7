"""How close a reconstruction is to its original, pixel by pixel (PSNR) and by local structure (SSIM).

Source: Wang, Bovik, Sheikh and Simoncelli, "Image Quality Assessment: From Error Visibility to Structural Similarity",
IEEE Transactions on Image Processing 13(4), 2004, equation 13, with their window (Gaussian, 11x11, sigma 1.5) and
constants (K1 0.01, K2 0.03).
Differs from it: every channel counts alike, no luminance is formed; as in torchmetrics there is a window around every
pixel, with the image mirrored at its edges. Where an image is smaller than 11 pixels the window shrinks to the largest
odd side that fits (7x7 for an 8x8 image), so such figures compare only among equal image sizes.
"""

from collections.abc import Iterator
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from tessera.artifacts import bit_depth
from tessera.components import Params, sets
from tessera.contracts import ImageSpec, Record, Shown

FIGURES = (Shown("psnr_db", "{:.2f}", better="higher"), Shown("ssim", better="higher"))
WINDOW = 11  # pixels
SIGMA = 1.5  # pixels
K1, K2 = 0.01, 0.03
CHUNK_NUMBERS = 2**14  # of the images whose float64 maps are in memory at a time: then they stay in a processor's cache


class Config(Params):
    kind: Literal["reconstruction"]


class Pairs:
    """`psnr_db` and `ssim`: means over images."""

    def __init__(self, config: Config, spec: ImageSpec, device: torch.device):
        self.psnr: list[
            float
        ] = []  # numbers: small tensors that stay, among large ones that go, keep memory from shrinking
        self.ssim: list[float] = []

    def update(self, originals: Tensor, decoded: Tensor) -> None:
        if sets(bit_depth.of(originals), "bits"):
            ours, theirs = bit_depth.to_shares(decoded), bit_depth.to_shares(originals)
            self.psnr += psnr_db(ours, theirs).tolist()
            self.ssim += ssim(ours, theirs).tolist()
            return
        self.psnr += psnr_db(decoded / 255, originals / 255).tolist()
        self.ssim += ssim(decoded / 255, originals / 255).tolist()

    def record(self, protocol: Any, found: Record) -> None:
        found.add_mean("psnr_db", self.psnr, protocol(window=WINDOW))
        found.add_mean("ssim", self.ssim, protocol(window=WINDOW))


def psnr_db(images: Tensor, originals: Tensor, ceiling: float = 100.0) -> Tensor:
    """Peak signal-to-noise ratio in dB of each image, (N,) float64; its mean is not that of the pooled error.

    Both (N, C, H, W) float in [0, 1]. An image counts at most `ceiling` dB, so that an exact one leaves a mean finite.
    """
    _check(images, originals)
    errors = [
        (a.double() - b.double()).square().mean(dim=(1, 2, 3))  # (n,)
        for a, b in _chunks(images, originals)
    ]
    return (-10 * torch.cat(errors).log10()).clamp(max=ceiling)


def ssim(images: Tensor, originals: Tensor) -> Tensor:
    """Structural similarity of each image, (N,) float64 in [-1, 1], 1 for equal ones: the mean over pixels and channels.

    Both (N, C, H, W) float in [0, 1].
    """
    _check(images, originals)
    return torch.cat([_ssim_of_each(a.double(), b.double()) for a, b in _chunks(images, originals)])


def _chunks(images: Tensor, originals: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """A few images at a time. Each is measured by itself, so that it does not matter how many."""
    size = max(1, CHUNK_NUMBERS // images[0].numel())
    return zip(images.split(size), originals.split(size), strict=True)


def _ssim_of_each(x: Tensor, y: Tensor) -> Tensor:
    """(n,) float64."""
    mean_x, mean_y, mean_xx, mean_yy, mean_xy = _blur(torch.stack([x, y, x * x, y * y, x * y])).unbind()
    variance_x = (mean_xx - mean_x.square()).clamp(min=0)
    variance_y = (mean_yy - mean_y.square()).clamp(min=0)
    covariance = mean_xy - mean_x * mean_y
    luminance = (2 * mean_x * mean_y + K1**2) / (mean_x.square() + mean_y.square() + K1**2)
    structure = (2 * covariance + K2**2) / (variance_x + variance_y + K2**2)
    return (luminance * structure).mean(dim=(1, 2, 3))


def _blur(images: Tensor) -> Tensor:
    """(..., H, W) -> the same: the Gaussian mean around every pixel of the mirrored image."""
    height, width = images.shape[-2:]
    smallest = min(height, width)
    side = min(WINDOW, smallest - (smallest + 1) % 2)
    offsets = torch.arange(side, dtype=images.dtype, device=images.device) - (side - 1) / 2
    weights = torch.exp(-0.5 * (offsets / SIGMA) ** 2)
    weights = weights / weights.sum()
    planes = F.pad(images.reshape(-1, 1, height, width), [side // 2] * 4, mode="reflect")
    blurred = F.conv2d(F.conv2d(planes, weights.view(1, 1, -1, 1)), weights.view(1, 1, 1, -1))  # it is separable
    return blurred.view(images.shape)


def _check(images: Tensor, originals: Tensor) -> None:
    if images.shape != originals.shape or images.ndim != 4 or not images.numel():
        raise ValueError(
            f"images of shapes {tuple(images.shape)} and {tuple(originals.shape)} cannot be compared, "
            f"expected one shape (N, C, H, W) without a 0: pass each original beside its reconstruction"
        )
    for name, values in (("images", images), ("originals", originals)):
        low, high = values.min().item(), values.max().item()
        if not (values.is_floating_point() and low >= 0 and high <= 1):  # NaN fails this too
            raise ValueError(
                f"{name} are {values.dtype} from {low} to {high}, expected float in [0, 1]: "
                f"divide uint8 by 255 (uint16 by 65535), or map [-1, 1] by (x + 1) / 2 and clip"
            )

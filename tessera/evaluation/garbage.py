"""Images that nobody takes for real ones, made of real ones: what a judge must put far from them, or be told of.

Each kind keeps something of the image and destroys the rest, so that a judge which looks at that alone is found out: its
patches, its spectrum, its coarse shapes, its mean color, or its contrast.

Source: Heusel et al., "GANs Trained by a Two Time-Scale Update Rule Converge to a Local Nash Equilibrium", 2017,
arXiv:1706.08500, appendix A1 (a distance is tried on disturbed real images); Geirhos et al., "ImageNet-trained CNNs are
biased towards texture", 2018, arXiv:1811.12231 (shapes destroyed, texture kept); Oppenheim and Lim, "The Importance of Phase
in Signals", 1981 (spectra without phases).
"""

from collections.abc import Callable

import numpy as np
from scipy import ndimage

from tessera.artifacts import bit_depth
from tessera.components import sets

PATCHES = 4  # to a side, that are shuffled
BLUR = 16  # the standard deviation is 1 / BLUR of the shorter side, at least 1 pixel: no outline survives


def made_of(images: np.ndarray, generator: np.random.Generator) -> dict[str, np.ndarray]:
    """images: (N, C, H, W) uint8 or uint16 -> by kind, as many of the same shape and dtype, each made of its own image."""
    found = {}
    for kind, made in KINDS.items():
        values = np.stack([made(image, generator) for image in images.astype(np.float64)])
        if sets(bit_depth.of(images), "bits"):
            found[kind] = np.rint(values).clip(0, bit_depth.WHITE).astype(np.uint16)
            continue
        found[kind] = np.rint(values).clip(0, 255).astype(np.uint8)
    return found


def shuffled(image: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    """(C, H, W) -> its patches in another order, none in its own place: rows and columns beyond the last whole patch stay."""
    height, width = (max(1, side // PATCHES) for side in image.shape[1:])
    rows, columns = (min(PATCHES, side) for side in image.shape[1:])
    places = [
        (slice(row * height, (row + 1) * height), slice(column * width, (column + 1) * width))
        for row in range(rows)
        for column in range(columns)
    ]
    order = generator.permutation(len(places))
    found = image.copy()
    for place, other in zip(order, np.roll(order, 1), strict=True):  # one cycle through all places
        found[:, *places[place]] = image[:, *places[other]]
    return found


def without_phases(image: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    """(C, H, W) -> the same spectrum under random phases, one field of them for all channels: its colors stay together."""
    phases = np.angle(np.fft.rfft2(generator.standard_normal(image.shape[1:])))
    phases[0, 0] = 0.0  # the mean color stays
    return np.fft.irfft2(np.fft.rfft2(image) * np.exp(1j * phases), s=image.shape[1:])


def blurred(image: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    """(C, H, W) -> its coarse shapes alone."""
    std = max(1.0, min(image.shape[1:]) / BLUR)
    return ndimage.gaussian_filter(image, (0, std, std), mode="nearest")


def mean_color(image: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    """(C, H, W) -> a tile of its mean color."""
    return np.broadcast_to(image.mean(axis=(1, 2), keepdims=True), image.shape)


def noise(image: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    """(C, H, W) -> Gaussian noise with the mean and the contrast of each channel."""
    mean, std = image.mean(axis=(1, 2), keepdims=True), image.std(axis=(1, 2), keepdims=True)
    return mean + std * generator.standard_normal(image.shape)


KINDS: dict[str, Callable[[np.ndarray, np.random.Generator], np.ndarray]] = {
    "shuffled": shuffled,
    "phases": without_phases,
    "blurred": blurred,
    "tiles": mean_color,
    "noise": noise,
}

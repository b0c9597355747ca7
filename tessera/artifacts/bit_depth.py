"""Images of 16 bits for each channel: what is uint8 in [0, 255] elsewhere is uint16 in [0, 65535], and no value is lost.

A data set has them whose params set `bits: 16`; the spec of its images says so, and so do networks that were built for such a
spec. Where no spec is at hand, the dtype of the values tells: `sets(bit_depth.of(images), "bits")`.
"""

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from tessera.artifacts import folder as artifact
from tessera.artifacts.folder import ArtifactError
from tessera.artifacts.shards import Shards, labels_of

WHITE = 65535
LEVELS = WHITE // 255  # of 16 bits to one of 8: 257, so that black stays black and white white
WIDE = ("torch.uint16", "torch.int16", "uint16")  # int16: the same bits, which every device can gather
ROUNDED = "precision bf16 has 8 significant bits, and would round images of 16"


class BitDepth(NamedTuple):
    bits: int | None  # 16; None: 8, as images without the key have them


def of(images: Tensor | np.ndarray) -> BitDepth:
    """Of stored images, by their dtype."""
    return BitDepth(16 if str(images.dtype) in WIDE else None)


def to_float(images: Tensor) -> Tensor:
    """uint16 in [0, 65535] (or the same bits as int16) -> float32 in [-1, 1]: 0 is -1, 65535 is 1."""
    return (_values(images).float() / (WHITE / 2)).sub_(1)


def _values(images: Tensor) -> Tensor:
    """int32 in [0, 65535]. Few kernels take uint16, on whichever device; these all do."""
    return images.view(torch.int16).to(torch.int32) & WHITE


def to_uint16(images: Tensor) -> Tensor:
    """float in [-1, 1] -> uint16 in [0, 65535], clipped; the inverse of `to_float` on all 65,536 values.

    Raises ValueError unless all values are finite, as `to_uint8` does.
    """
    if not images.isfinite().all():
        raise ValueError(
            "images hold values that are not finite, expected finite ones: look for settings beyond reason (guidance, "
            "temperature, learning rates) and for NaN in the weights"
        )
    values = (images.float() * (WHITE / 2) + (WHITE + 1) / 2).clip(0, WHITE).to(torch.int32)
    return values.to(torch.int16).view(torch.uint16)  # the lower 16 bits, as they are


def stored(images: Tensor, network: Any) -> Tensor:
    """float in [-1, 1] -> what is stored of images that this network, or this spec, is of: uint16."""
    assert network.bits == 16, network.bits
    return to_uint16(images)


def to_shares(images: Tensor) -> Tensor:
    """uint16 -> float32 in [0, 1], as metrics of pairs take images."""
    return _values(images).float() / WHITE


def gray_levels(images: Tensor | np.ndarray) -> Tensor:
    """uint16 -> float64 in the levels of 8 bits, [0, 255], by which figures of 8 and of 16 bits compare."""
    return _values(torch.as_tensor(images)).double() / LEVELS


def shown(images: np.ndarray) -> np.ndarray:
    """uint16 -> uint8, each value to the nearest: what people see of them, and nothing is computed of."""
    return ((images.astype(np.uint32) * 255 + WHITE // 2) // WHITE).astype(np.uint8)


def require_fp32(precision: str) -> None:
    """Raises ValueError for what would round images of 16 bits as they are drawn."""
    if precision != "fp32":
        raise ValueError(f"{ROUNDED}: expected precision fp32")


def append(writer: Any, images: np.ndarray, labels: np.ndarray) -> None:
    """As ImageWriter.append, for the (n, C, H, W) uint16 images of a spec that says so."""
    expected = (writer.spec.channels, writer.spec.height, writer.spec.width)
    assert images.dtype == np.uint16 and images.shape[1:] == expected, (images.dtype, images.shape, expected)
    assert len(images) == len(labels)
    if len(labels) and not (labels.min() >= 0 and labels.max() < writer.spec.num_classes):
        raise ValueError(f"labels {labels.min()} to {labels.max()} are outside 0 to {writer.spec.num_classes - 1}")
    if writer.grown is not None:
        writer.grown.append(f"{writer.split}/images", images)
        writer.grown.append(f"{writer.split}/labels", labels.astype(np.int64))
        return
    writer.images.append(images)
    writer.labels.append(labels.astype(np.int64))


def shards(folder: Path, spec: Any) -> Shards:
    """The images of a folder with this spec, uint16. Raises ArtifactError for others."""
    return Shards(folder, "images", np.uint16, (spec.channels, spec.height, spec.width))


def opened(folder: Path, split: str, spec: Any) -> tuple[Shards, np.ndarray]:
    """The images and the labels of a split of an images artifact. Raises ArtifactError unless they are as many."""
    pixels, labels = shards(Path(folder) / split, spec), labels_of(Path(folder) / split, spec.num_classes)
    if len(labels) != len(pixels):
        raise ArtifactError(
            f"{folder}/{split} holds {len(pixels)} images and {len(labels)} labels, expected as many. "
            f"{artifact.remedy(folder)}"
        )
    return pixels, labels

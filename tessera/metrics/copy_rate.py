"""How many samples are copies: nearer to a training image than images that were not trained on are.

The measure is what is usual among real images: the distance to the nearest training image that only a small share of
the test images, `HELD_OUT_SHARE`, falls below. Samples of the true distribution would fall below it as often, so a
copy rate near HELD_OUT_SHARE is what to hope for, one far above it is memory, and one far below it often means samples
that are near no real image at all: read it beside precision.

Source: the nearest-neighbour test for memory of Meehan et al., "A Non-Parametric Test to Detect Data-Copying in
Generative Models", 2020, arXiv:2004.05675, section 3.
Differs from it: a rate at one threshold in the place of a rank statistic, over all cells at once.
"""

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

HELD_OUT_SHARE = 0.05
CHUNK_ROWS = 1024  # of a distance matrix that are in memory at a time


class Nearest(NamedTuple):
    distances: Tensor  # (M, k) ascending
    rows: Tensor  # (M, k) of the training images


def copy_rate(samples: np.ndarray, train: np.ndarray, held_out: np.ndarray) -> float:
    """Features of one network, (M, D), (N, D) and (H, D) -> the share of samples that are nearer to a training image
    than all but HELD_OUT_SHARE of the held-out images. In [0, 1]."""
    return share_of_copies(nearest(samples, train).distances, nearest(held_out, train).distances)


def share_of_copies(distances: Tensor, held_out_distances: Tensor) -> float:
    """The same from distances that are known, (M, k) and (H, k), of which the first column counts."""
    threshold = torch.quantile(held_out_distances[:, 0], HELD_OUT_SHARE)
    return (distances[:, 0] < threshold).double().mean().item()


def nearest(x: np.ndarray, train: np.ndarray, k: int = 1) -> Nearest:
    """The k nearest rows of train (N, D) to each row of x (M, D)."""
    points, others = torch.as_tensor(x).double(), torch.as_tensor(train).double()
    if not (points.isfinite().all() and others.isfinite().all()):  # NaN is nearest to nothing, so no copy of anything
        raise ValueError(
            "features hold values that are not finite, expected finite ones: look for NaN in the images they are of"
        )
    found = [torch.cdist(piece, others).topk(k, dim=1, largest=False) for piece in points.split(CHUNK_ROWS)]
    return Nearest(torch.cat([one.values for one in found]), torch.cat([one.indices for one in found]))

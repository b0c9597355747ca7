"""The nearest rows of one set of features to each row of another, by distances in float64."""

from typing import NamedTuple

import torch
from torch import Tensor

CHUNK_ROWS = 1024  # of a distance matrix that are in memory at a time


class Nearest(NamedTuple):
    distances: Tensor  # (M, k) float64, ascending
    rows: Tensor  # (M, k) of the other set


def nearest(x: Tensor, others: Tensor, k: int = 1) -> Nearest:
    """The k nearest rows of others (N, D) to each row of x (M, D); either may be an array. Raises ValueError unless finite."""
    points, others = torch.as_tensor(x).double(), torch.as_tensor(others).double()
    if not (points.isfinite().all() and others.isfinite().all()):  # NaN is nearest to nothing, so no copy of anything
        raise ValueError(
            "features hold values that are not finite, expected finite ones: look for NaN in the images they are of"
        )
    found = [torch.cdist(piece, others).topk(k, dim=1, largest=False) for piece in points.split(CHUNK_ROWS)]
    return Nearest(torch.cat([one.values for one in found]), torch.cat([one.indices for one in found]))


def number_within(x: Tensor, others: Tensor, distance: float) -> Tensor:
    """(N,) float64, how many rows of x (M, D) lie nearer than the distance to each row of others (N, D); both may be arrays."""
    points, others = torch.as_tensor(x).double(), torch.as_tensor(others).double()
    return torch.cat(
        [(torch.cdist(piece, points) < distance).sum(dim=1) for piece in others.split(CHUNK_ROWS)]
    ).double()

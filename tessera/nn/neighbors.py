"""The nearest rows of one set of features to each row of another, by distances in float64, on the device where they are."""

from typing import NamedTuple

import torch
from torch import Tensor

CHUNK_ROWS = 1024  # of a distance matrix that are in memory at a time
DEVICE_BYTES = 2**30  # of it at a time, where it is not the host's memory


class Nearest(NamedTuple):
    distances: Tensor  # (M, k) float64, ascending, on the device of the features
    rows: Tensor  # (M, k) of the other set


def nearest(x: Tensor, others: Tensor, k: int = 1) -> Nearest:
    """The k nearest rows of others (N, D) to each row of x (M, D); either may be an array. Raises ValueError unless finite."""
    points, others = torch.as_tensor(x).double(), torch.as_tensor(others).double()
    if not (points.isfinite().all() and others.isfinite().all()):  # NaN is nearest to nothing, so no copy of anything
        raise ValueError(
            "features hold values that are not finite, expected finite ones: look for NaN in the images they are of"
        )
    found = [torch.cdist(piece, others).topk(k, dim=1, largest=False) for piece in _chunks(points, others)]
    return Nearest(torch.cat([one.values for one in found]), torch.cat([one.indices for one in found]))


def number_within(x: Tensor, others: Tensor, distance: float) -> Tensor:
    """(N,) float64, how many rows of x (M, D) lie nearer than the distance to each row of others (N, D); both may be arrays."""
    points, others = torch.as_tensor(x).double(), torch.as_tensor(others).double()
    return torch.cat([(torch.cdist(piece, points) < distance).sum(dim=1) for piece in _chunks(others, points)]).double()


def _chunks(rows: Tensor, others: Tensor) -> tuple[Tensor, ...]:
    """The rows in pieces whose distances from all others are in memory at a time. On a CPU of one size: with it, BLAS's sums
    and so the last digits of a distance would change."""
    is_cpu = rows.device.type == "cpu"
    return rows.split(CHUNK_ROWS if is_cpu else max(1, DEVICE_BYTES // (8 * max(1, len(others)))))

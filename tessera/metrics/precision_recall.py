"""Fidelity and variety apart, from nearest neighbours in feature space: precision and recall, density and coverage.

Each set is thought of as balls around its images, as wide as the distance to their k-th nearest neighbour in that set.
Precision: the fraction of samples inside a ball of the reference. Recall: the fraction of the reference inside a ball
of the samples. Density counts how many balls hold a sample, which one outlier of the reference cannot inflate; coverage
is the fraction of reference balls that hold a sample.

Source: Kynkäänniemi et al., "Improved Precision and Recall Metric for Assessing Generative Models", 2019,
arXiv:1904.06991, section 2 (k = 3); Naeem et al., "Reliable Fidelity and Diversity Metrics for Generative
Models", 2020, arXiv:2002.09797, section 3 (k = 5).
All four depend on the number of images: compare only figures of equal set sizes.
"""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

CHUNK_ROWS = 1024  # of a distance matrix that are in memory at a time


class PrecisionRecall(NamedTuple):
    precision: float  # in [0, 1]
    recall: float  # in [0, 1]


class DensityCoverage(NamedTuple):
    density: float  # at least 0, may exceed 1
    coverage: float  # in [0, 1]
    density_standard_error: float  # over draws of the samples, the reference being what it is


def precision_recall(reference: Tensor | np.ndarray, samples: Tensor | np.ndarray, k: int = 3) -> PrecisionRecall:
    """reference: (N, D), samples: (M, D), features of one network. Raises ValueError unless k < min(N, M)."""
    reference, samples = _prepare(reference, samples, k, smallest="both")
    reference_radii, sample_radii = _radii(reference, k), _radii(samples, k)
    is_realistic = torch.zeros(len(samples), dtype=torch.bool, device=samples.device)
    is_recalled = torch.zeros(len(reference), dtype=torch.bool, device=samples.device)
    for rows, distances in _distances(samples, reference):
        is_realistic[rows] = (distances <= reference_radii).any(dim=1)
        is_recalled |= (distances <= sample_radii[rows, None]).any(dim=0)
    return PrecisionRecall(is_realistic.double().mean().item(), is_recalled.double().mean().item())


def density_coverage(reference: Tensor | np.ndarray, samples: Tensor | np.ndarray, k: int = 5) -> DensityCoverage:
    """reference: (N, D), samples: (M, D), features of one network. Raises ValueError unless k < N."""
    reference, samples = _prepare(reference, samples, k, smallest="reference")
    radii = _radii(reference, k)
    hits = []  # per sample, the reference balls around it
    is_covered = torch.zeros(len(reference), dtype=torch.bool, device=samples.device)
    for _, distances in _distances(samples, reference):
        inside = distances <= radii  # (rows, N)
        hits.append(inside.sum(dim=1).double())
        is_covered |= inside.any(dim=0)
    each = torch.cat(hits) / k
    error = (each.std() / len(each) ** 0.5).item() if len(each) > 1 else float("nan")
    return DensityCoverage(each.mean().item(), is_covered.double().mean().item(), error)


def _prepare(
    reference: Tensor | np.ndarray, samples: Tensor | np.ndarray, k: int, smallest: str
) -> tuple[Tensor, Tensor]:
    """Both in float64 around a common origin near them, where products of features lose the fewest digits."""
    reference, samples = torch.as_tensor(reference).double(), torch.as_tensor(samples).double()
    if reference.ndim != 2 or samples.ndim != 2 or reference.shape[1] != samples.shape[1] or not len(samples):
        raise ValueError(
            f"features of shapes {tuple(reference.shape)} and {tuple(samples.shape)} cannot be compared, "
            f"expected (N, D) and (M, D): make both with the same feature network"
        )
    fewest = len(reference) if smallest == "reference" else min(len(reference), len(samples))
    if not 1 <= k < fewest:
        raise ValueError(f"among {fewest} images there is no neighbour number {k}: choose k from 1 to {fewest - 1}")
    center = reference.mean(dim=0)
    return reference - center, samples - center


def _distances(x: Tensor, y: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Squared distances (rows, M) of a chunk of rows of x (N, D) from all of y (M, D), chunk by chunk."""
    y_norms = y.square().sum(dim=1)
    for start in range(0, len(x), CHUNK_ROWS):
        rows = slice(start, min(start + CHUNK_ROWS, len(x)))
        squares = torch.addmm(y_norms, x[rows], y.T, alpha=-2).add_(x[rows].square().sum(dim=1, keepdim=True))
        yield rows, squares.clamp_(min=0)


def _radii(x: Tensor, k: int) -> Tensor:
    """(N,) squared distance of each row from its k-th nearest other row."""
    radii = torch.empty(len(x), dtype=x.dtype, device=x.device)
    for rows, distances in _distances(x, x):
        distances[:, rows].fill_diagonal_(torch.inf)  # an image is not its own neighbour
        radii[rows] = distances.kthvalue(k, dim=1).values
    return radii

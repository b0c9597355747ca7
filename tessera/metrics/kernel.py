"""Kernel distance between two sets of image features (KID, with Inception-v3 features): unbiased at any set size.

The squared maximum mean discrepancy under the cubic polynomial kernel k(x, y) = (x.y / D + 1)^3, by its unbiased
estimator, averaged over random subsets. Unlike the Fréchet distance it assumes no Gaussian and is as often below 0 as
above when both sets come from one distribution.

Source: Bińkowski et al., "Demystifying MMD GANs", 2018, arXiv:1801.01401, section 4; Gretton et al., "A Kernel
Two-Sample Test", JMLR 13, 2012, equation 3 (the unbiased estimator).
"""

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor


class KernelDistance(NamedTuple):
    """A mean over subsets, and how far that mean may be off for the choice of subsets alone."""

    mean: float  # squared, may be below 0
    standard_error: float  # of the mean; NaN for one subset. Subsets share images, so the true error is larger


def distance(
    a: Tensor | np.ndarray,
    b: Tensor | np.ndarray,
    generator: np.random.Generator,
    subset_size: int = 1000,
    num_subsets: int = 100,
) -> KernelDistance:
    """a: (N, D), b: (M, D); each subset is `subset_size` rows of either, without repetition, of `a` first.

    Raises ValueError if a set is smaller than a subset, or a subset smaller than 2.
    """
    a, b = torch.as_tensor(a), torch.as_tensor(b)
    if not 2 <= subset_size <= min(len(a), len(b)) or num_subsets < 1:
        raise ValueError(
            f"{num_subsets} subsets of {subset_size} images cannot be drawn from {len(a)} and {len(b)} images: "
            f"choose at least 1 subset of 2 to {min(len(a), len(b))} images"
        )
    values = []
    for _ in range(num_subsets):
        rows_a = torch.from_numpy(generator.permutation(len(a))[:subset_size]).to(a.device)
        rows_b = torch.from_numpy(generator.permutation(len(b))[:subset_size]).to(b.device)
        values.append(squared_discrepancy(a[rows_a], b[rows_b]))
    error = np.std(values, ddof=1) / num_subsets**0.5 if num_subsets > 1 else float("nan")
    return KernelDistance(float(np.mean(values)), float(error))


def squared_discrepancy(a: Tensor | np.ndarray, b: Tensor | np.ndarray) -> float:
    """The unbiased squared maximum mean discrepancy of (N, D) and (M, D), computed in float64."""
    a, b = torch.as_tensor(a).double(), torch.as_tensor(b).double()
    if a.ndim != 2 or b.ndim != 2 or a.shape[1] != b.shape[1]:
        raise ValueError(
            f"features of shapes {tuple(a.shape)} and {tuple(b.shape)} cannot be compared, "
            f"expected (N, D) and (M, D): make both with the same feature network"
        )
    within = sum((k.sum() - k.trace()) / (len(k) * (len(k) - 1)) for k in (_kernel(a, a), _kernel(b, b)))
    return float(within - 2 * _kernel(a, b).mean())


def _kernel(x: Tensor, y: Tensor) -> Tensor:
    return (x @ y.T / x.shape[1] + 1) ** 3

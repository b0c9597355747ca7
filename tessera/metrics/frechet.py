"""Fréchet distance between two sets of image features, each summarized as a Gaussian; with Inception-v3 features, FID.

distance = |mean_a - mean_b|^2 + tr(A) + tr(B) - 2 tr((A B)^(1/2)), with A, B the unbiased covariances (N - 1).

Its standard error over draws of the samples is a delete-a-block jackknife: the samples lie in blocks, whose moments add up,
so that memory does not grow with their number.

Source: Dowson and Landau, "The Fréchet distance between multivariate normal distributions", 1982;
Heusel et al., "GANs Trained by a Two Time-Scale Update Rule Converge to a Local Nash Equilibrium", 2017,
arXiv:1706.08500, equation 6 (FID). Batches merge by Chan, Golub and LeVeque, "Updating Formulae and a Pairwise Algorithm
for Computing Sample Variances", 1979, equation 2.1. Jackknife: Efron and Stein, "The Jackknife Estimate of Variance", Annals
of Statistics 9(3), 1981, equation 1.3, with blocks in the place of single observations.
Differs from common implementations: no square root of the unsymmetric A B is taken. Its trace is the sum of the
singular values of F^T G for any factors A = F F^T, B = G G^T, which is real, at least 0, and faster.
"""

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
import torch
from scipy.linalg import lapack
from torch import Tensor

NUM_BLOCKS = 20  # of the jackknife: its standard error is itself off by a sixth, one deviation


class FrechetDistance(NamedTuple):
    value: float  # at least 0, in squared units of the features
    standard_error: float  # of the value, over draws of as many samples; NaN for one block


class Moments(NamedTuple):
    """What a set of features is reduced to, in float64."""

    mean: Tensor  # (D,)
    covariance: Tensor  # (D, D), symmetric, divided by num_images - 1
    num_images: int


class MomentsAccumulator:
    """Mean and covariance of features that arrive in batches; memory is that of one batch and a (D, D) matrix.

    Everything is float64 and centered before it is squared, so a large common offset costs no digits.
    """

    def __init__(self) -> None:
        self.num_images = 0
        self._mean: Tensor | None = None  # (D,)
        self._scatter: Tensor | None = None  # (D, D), sum of outer products of the deviations from the mean

    def update(self, features: Tensor | np.ndarray) -> None:
        """features: (n, D), any float dtype and device, finite; all batches of one accumulator share D and device."""
        features = torch.as_tensor(features).detach()
        if features.ndim != 2:
            raise ValueError(f"features have shape {tuple(features.shape)}, expected (N, D): flatten them per image")
        if not len(features):
            return
        features = features.double()
        if not features.isfinite().all():
            raise ValueError(
                "features hold values that are not finite, expected finite ones: look for NaN in the images they are of"
            )
        mean = features.mean(dim=0)
        deviations = features - mean
        self._merge(len(features), mean, deviations.T @ deviations)

    def merge(self, other: "MomentsAccumulator") -> None:
        """Take over the images that another accumulator has seen; the order of merging does not matter."""
        if other.num_images:
            self._merge(other.num_images, other._mean, other._scatter)

    def moments(self) -> Moments:
        """Raises ValueError for fewer than 2 images."""
        if self.num_images < 2:
            raise ValueError(
                f"a covariance of {self.num_images} image{'' if self.num_images == 1 else 's'} does not exist, "
                f"expected at least 2: sample more images"
            )
        return Moments(self._mean.clone(), self._scatter / (self.num_images - 1), self.num_images)

    def _merge(self, num_images: int, mean: Tensor, scatter: Tensor) -> None:
        if self._mean is None:
            self.num_images, self._mean, self._scatter = num_images, mean.clone(), scatter.clone()
            return
        if mean.shape != self._mean.shape:
            raise ValueError(
                f"features of width {len(mean)} do not fit those of width {len(self._mean)} seen before: "
                f"use one feature network per accumulator"
            )
        total = self.num_images + num_images
        shift = mean - self._mean
        self._scatter += scatter + torch.outer(shift, shift) * (self.num_images * num_images / total)
        self._mean += shift * (num_images / total)
        self.num_images = total


def moments(features: Tensor | np.ndarray) -> Moments:
    """features: (N, D), N >= 2, any float dtype -> their mean and unbiased covariance in float64."""
    accumulator = MomentsAccumulator()
    accumulator.update(features)
    return accumulator.moments()


def distance(a: Moments, b: Moments) -> float:
    """The Fréchet distance, at least 0 (rounding below 0 is clamped), in squared units of the features.

    Eigenvalues where that is exact enough, which is fast; else, above all for fewer images than features, singular
    values of low-rank factors.
    """
    if a.mean.shape != b.mean.shape:
        raise ValueError(
            f"features of width {len(a.mean)} and {len(b.mean)} cannot be compared: "
            f"make both with the same feature network"
        )
    spread = float(a.covariance.trace() + b.covariance.trace())
    cross = _cross_trace_by_eigenvalues(a, b, tolerance=1e-8 * spread)
    if cross is None:
        cross = _cross_trace_by_singular_values(a, b)
    return max(0.0, float((a.mean - b.mean).square().sum()) + spread - 2 * cross)


class Blocks:
    """Features that arrive in batches, dealt out to NUM_BLOCKS accumulators: one for each part that the jackknife leaves out.

    block: (N,) the block of each image, in the order of arrival, as `deal` gives it.
    """

    def __init__(self, block: np.ndarray):
        self.block = torch.as_tensor(block)
        self.accumulators = [MomentsAccumulator() for _ in range(int(self.block.max()) + 1)]
        self._seen = 0

    def update(self, features: Tensor | np.ndarray) -> None:
        """features: (n, D), of the next n images."""
        features = torch.as_tensor(features)
        block = self.block[self._seen : self._seen + len(features)].to(features.device)
        self._seen += len(features)
        assert len(block) == len(features), "more features than images were dealt out"
        for number, accumulator in enumerate(self.accumulators):
            accumulator.update(features[block == number])

    def moments(self) -> Moments:
        """Of all images."""
        return _merged(self.accumulators).moments()

    def without_each(self) -> list[Moments]:
        """Of all images but those of block 0, of all but those of block 1, and so on."""
        last = len(self.accumulators) - 1
        before, after = [MomentsAccumulator()], [MomentsAccumulator()]  # of the blocks 0 ... i - 1, and i + 1 ... last
        for number in range(last):
            before.append(_merged([before[-1], self.accumulators[number]]))
            after.append(_merged([after[-1], self.accumulators[last - number]]))
        return [_merged(pair).moments() for pair in zip(before, reversed(after), strict=True)]


def deal(labels: np.ndarray, num_blocks: int = NUM_BLOCKS) -> np.ndarray:
    """(N,) labels -> (N,) a block for each image: equal sizes, and each class spread evenly, because samples are drawn with
    fixed shares of each class. At least two images to a block."""
    block = np.empty(len(labels), np.int64)
    block[np.argsort(labels, kind="stable")] = np.arange(len(labels)) % max(1, min(num_blocks, len(labels) // 2))
    return block


def distance_with_error(samples: Blocks, reference: Moments | Blocks) -> FrechetDistance:
    """The distance of the samples from the reference, and how much other samples would change it.

    reference: moments, which stay as they are; or blocks of the originals that the samples are reconstructions of: then the
    jackknife leaves out images together with their originals, because both were drawn at once.
    """
    fixed = reference if isinstance(reference, Moments) else reference.moments()
    value = distance(samples.moments(), fixed)
    if len(samples.accumulators) < 2:
        return FrechetDistance(value, float("nan"))
    left = samples.without_each()
    others = [fixed] * len(left) if isinstance(reference, Moments) else reference.without_each()
    values = np.array([distance(a, b) for a, b in zip(left, others, strict=True)])
    return FrechetDistance(value, float(np.sqrt((len(left) - 1) * values.var())))


def _merged(accumulators: Iterable[MomentsAccumulator]) -> MomentsAccumulator:
    total = MomentsAccumulator()
    for accumulator in accumulators:
        total.merge(accumulator)
    return total


def _cross_trace_by_eigenvalues(a: Moments, b: Moments, tolerance: float) -> float | None:
    """tr((A B)^(1/2)) from the eigenvalues of L^T B L, where A = L L^T; None if its error might exceed the tolerance.

    An eigenvalue that should be 0 comes out near 1e-16 and its square root near 1e-8, hence the refusal.
    """
    if min(a.num_images, b.num_images) <= len(a.mean):
        return None
    factor, failed = torch.linalg.cholesky_ex(a.covariance)
    if failed:
        return None
    eigenvalues = torch.linalg.eigvalsh(_congruence(factor, b.covariance))  # ascending
    if eigenvalues[0] <= 0:
        return None
    roots = eigenvalues.sqrt()
    rounding = 8 * torch.finfo(torch.float64).eps * eigenvalues[-1]  # in each eigenvalue
    if ((eigenvalues + rounding).sqrt() - roots).sum() > tolerance:
        return None
    return float(roots.sum())


def _congruence(factor: Tensor, matrix: Tensor, block: int = 256) -> Tensor:
    """The lower triangle of L^T M L, for L lower triangular: blocks that are zero by structure are not multiplied.

    That is 4/3 D^3 operations instead of 4 D^3. What lies above the block diagonal of the result is undefined.
    """
    width = len(factor)
    edges = [slice(start, min(start + block, width)) for start in range(0, width, block)]
    product = torch.empty_like(matrix)
    for cols in edges:
        torch.mm(matrix[:, cols.start :], factor[cols.start :, cols], out=product[:, cols])
    result = torch.empty_like(matrix)
    for rows in edges:
        result[rows, : rows.stop] = factor[rows.start :, rows].T @ product[rows.start :, : rows.stop]
    return result


def _cross_trace_by_singular_values(a: Moments, b: Moments) -> float:
    """tr((A B)^(1/2)) as the sum of the singular values of F^T G, where A = F F^T and B = G G^T: exact at any rank."""
    return float(torch.linalg.svdvals(_factor(a.covariance).T @ _factor(b.covariance)).sum())


def _factor(covariance: Tensor) -> Tensor:
    """F (D, rank) with covariance = F F^T: Cholesky with pivots, which stops when what remains is rounding.

    Higham, "Analysis of the Cholesky Decomposition of a Semi-definite Matrix", 1990; LAPACK's dpstrf.
    """
    packed, pivots, rank, _ = lapack.dpstrf(covariance.cpu().numpy(), lower=1)
    factor = np.empty((len(covariance), rank))
    factor[pivots - 1] = np.tril(packed)[:, :rank]
    return torch.from_numpy(factor)

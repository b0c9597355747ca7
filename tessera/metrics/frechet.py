"""Fréchet distance between two sets of image features, each summarized as a Gaussian; with Inception-v3 features, FID.

distance = |mean_a - mean_b|^2 + tr(A) + tr(B) - 2 tr((A B)^(1/2)), with A, B the unbiased covariances (N - 1).

Its standard error over draws of the samples follows from the influence of each sample, the distance being nearly linear in
the moments: (x - mean_a)^T (I - T) (x - mean_a) + 2 (x - mean_a)^T (mean_a - mean_b), less its mean, where T, symmetric, is
the optimal map from the one Gaussian to the other.

Source: Dowson and Landau, "The Fréchet distance between multivariate normal distributions", 1982;
Heusel et al., "GANs Trained by a Two Time-Scale Update Rule Converge to a Local Nash Equilibrium", 2017,
arXiv:1706.08500, equation 6 (FID). Batches merge by Chan, Golub and LeVeque, "Updating Formulae and a Pairwise Algorithm
for Computing Sample Variances", 1979, equation 2.1. Standard error: Rippl, Munk and Sturm, "Limit laws of the empirical
Wasserstein distance: Gaussian distributions", 2016, arXiv:1507.04090, theorem 2.2; its variance is taken within classes here,
because samples are drawn with fixed shares of each.
Differs from common implementations: no square root of the unsymmetric A B is taken. Its trace is the sum of the
singular values of F^T G for any factors A = F F^T, B = G G^T, which is real, at least 0, and faster.
"""

import math
from collections.abc import Iterator
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from tessera.components import Params
from tessera.contracts import Planned, RealImages, Record, Seen, SeenReconstructions, SeenSamples, Shown

_NAMES = ("fd_*", "fid")  # see figure_name
_IN_TABLES = ("", "r", "p", "floor_")  # samples; reconstructions, from perturbed indices, of training images
FIGURES = (
    *(Shown(f"{of}{name}", better="lower", has_error=True, ranks=not of) for of in _IN_TABLES for name in _NAMES),
    *(Shown(f"{of}{name}", form=None, better="lower") for of in ("gap_", "halves_") for name in _NAMES),
)


class Config(Params):
    kind: Literal["frechet"]


def problems(config: Config, planned: Planned) -> Iterator[str]:
    for split, labels in planned.labels.items():
        if len(labels) < 2:
            yield f"{len(labels)} image in the {split} split has no covariance, expected at least 2: add images"
    in_a_half = sum(
        int(count) // 2 for count in np.bincount(planned.labels["train"])
    )  # as many of each class in either
    if in_a_half < 2:
        yield (
            f"the training images cannot be halved with equal classes ({in_a_half} in each half), expected at least 2 in "
            f"each: add images to the classes"
        )


def figure_name(kind: str, network: str) -> str:
    """What a distance is called that is taken with the network of this kind and name in the params: fid of inception alone."""
    return "fid" if kind == "inception" else f"fd_{network.replace('-', '_')}"


def of_samples(config: Config, samples: SeenSamples, found: Record) -> None:
    """The distance from the test images by each network (`fd_classifier`), and how much larger it is than that of as many
    training images through the tokenizer (`gap_fd_classifier`), where there is one: 0 on average for a perfect prior."""
    for seen in samples.networks.values():
        name, other = figure_name(seen.kind, seen.network), seen.real_moments()
        own, error = distance(seen.moments, other), _error_of(seen, other)
        found.add(name, own, seen.protocol(), error)
        floor = samples.beside(f"floor_{name}")
        if floor is None:
            continue
        of_floor = math.nan if floor.standard_error is None else floor.standard_error
        found.add(f"gap_{name}", own - floor.value, seen.protocol(floor=floor.num_images), math.hypot(error, of_floor))


def of_real_images(config: Config, real: RealImages, found: Record) -> None:
    """`halves_fd_classifier`: the distance of one half of the training images from the other."""
    for one, other in real.halves():
        protocol = one.protocol("train", num_real=other.num_images)
        name = f"halves_{figure_name(one.kind, one.network)}"
        errors = (_error_of(one, other.moments), _error_of(other, one.moments))
        # Halves differ by noise e alone, and their distance is a square of it. Its variance, 2 tr(C^2) with C the covariance of
        # e, is half of the 4 <e, C e> that the influences of both halves give.
        error = math.hypot(*errors) / math.sqrt(2)
        found.add(name, distance(one.moments, other.moments), protocol, error)


def of_reconstructions(config: Config, decoded: SeenReconstructions, found: Record) -> None:
    """The distance from the test images: `rfd_classifier`, `pfd_classifier`, `floor_fd_classifier`. Where they are the
    originals of what is decoded, they were drawn together with it, so that both influences belong to one image."""
    for seen in decoded.networks.values():
        other, originals = seen.real_moments(), decoded.originals(seen.network)
        name = f"{decoded.prefix}{figure_name(seen.kind, seen.network)}"
        error = _error_of(seen, other, originals)
        found.add(name, distance(seen.moments, other), seen.protocol(), error)


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
        self._scatter: Tensor | None = (
            None  # (D, D), sum of outer products of the deviations; its upper triangle counts
        )

    def update(self, features: Tensor | np.ndarray) -> None:
        """features: (n, D), any float dtype and device, finite; all batches of one accumulator share D and device."""
        features = torch.as_tensor(features).detach()
        if features.ndim != 2:
            raise ValueError(f"features have shape {tuple(features.shape)}, expected (N, D): flatten them per image")
        count, width = features.shape
        if not count:
            return
        rows = torch.empty(count + 1, width, dtype=torch.float64, device=features.device)
        deviations = rows[:count].copy_(features)
        mean = deviations.mean(dim=0)
        if not mean.isfinite().all():  # a single value that is not finite makes its mean so
            raise ValueError(
                "features hold values that are not finite, expected finite ones: look for NaN in the images they are of"
            )
        deviations -= mean
        rows[count] = self._move(count, mean)  # one row more, in the place of a pass over a (D, D) matrix
        self._add(rows)

    def merge(self, other: "MomentsAccumulator") -> None:
        """Take over the images that another accumulator has seen; the order of merging does not matter."""
        if other.num_images:
            self._add(self._move(other.num_images, other._mean)[None])
            self._scatter += other._scatter

    def moments(self) -> Moments:
        """Raises ValueError for fewer than 2 images."""
        if self.num_images < 2:
            raise ValueError(
                f"a covariance of {self.num_images} image{'' if self.num_images == 1 else 's'} does not exist, "
                f"expected at least 2: sample more images"
            )
        covariance = (self._scatter / (self.num_images - 1)).triu_()
        covariance += covariance.triu(1).T
        return Moments(self._mean.clone(), covariance, self.num_images)

    def _move(self, num_images: int, mean: Tensor) -> Tensor:
        """Count images with this mean in. Returns the (D,) row whose square the scatter lacks for the distance of the means."""
        if self._mean is None:
            self._mean = torch.zeros_like(mean)
            self._scatter = mean.new_zeros(len(mean), len(mean))
        if mean.shape != self._mean.shape:
            raise ValueError(
                f"features of width {len(mean)} do not fit those of width {len(self._mean)} seen before: "
                f"use one feature network per accumulator"
            )
        total = self.num_images + num_images
        shift = mean - self._mean
        weight = self.num_images * num_images / total
        self._mean += shift * (num_images / total)
        self.num_images = total
        return shift * weight**0.5

    def _add(self, rows: Tensor) -> None:
        """Add rows^T rows to the scatter in place; on the CPU to its upper triangle only, which is half the work."""
        if rows.device.type != "cpu":
            self._scatter.addmm_(rows.T, rows)
            return
        column_major = self._scatter.numpy().T  # BLAS's order, in which the upper triangle is the lower one
        from scipy.linalg import blas  # here: most stages read params and compare nothing

        found = blas.dsyrk(1.0, rows.numpy().T, beta=1.0, c=column_major, overwrite_c=1, lower=1)
        assert np.shares_memory(found, column_major)


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
    _require_finite(a, b)
    spread = float(a.covariance.trace() + b.covariance.trace())
    cross = _cross_trace_by_eigenvalues(a, b, tolerance=1e-8 * spread)
    if cross is None:
        cross = _cross_trace_by_singular_values(a, b)
    found = float((a.mean - b.mean).square().sum()) + spread - 2 * cross
    if not math.isfinite(found):  # max(0.0, nan) is 0.0, the best distance there is
        raise ValueError(f"the Fréchet distance is {found}: features are too large for float64; scale them down")
    return max(0.0, found)


def influence(features: Tensor | np.ndarray, own: Moments, other: Moments) -> Tensor:
    """features: (n, D), images of the set that `own` summarizes -> (n,) how much each moves the distance of own from other.

    One image more of this kind changes the distance by its influence over the number of images, to first order. Over the whole
    set the mean is 0.
    """
    _require_finite(own, other)
    root = _power(other.covariance, 0.5)
    between = _power(root @ own.covariance @ root, -0.5)
    bend = torch.eye(len(own.mean), dtype=torch.float64) - root @ between @ root  # I - T
    features = torch.as_tensor(features).double()
    place = features.device  # moments are compared on the CPU, all features need not be copied there
    deviations = features - own.mean.to(place)
    quadratic = ((deviations @ bend.to(place)) * deviations).sum(dim=1)
    return quadratic - (bend * own.covariance).sum().to(place) + 2 * deviations @ (own.mean - other.mean).to(place)


def standard_error(influences: Tensor, labels: np.ndarray, num_images: int) -> float:
    """The standard error of a distance over draws of num_images images with fixed shares of each class.

    influences, labels: (n,) of the images, or of some of them. NaN if no class has two.
    """
    labels = torch.as_tensor(labels).to(influences.device)
    within = [influences[labels == label] for label in labels.unique()]
    freedom = len(labels) - len(within)
    if not freedom:
        return float("nan")
    squares = sum((some - some.mean()).square().sum() for some in within)
    return float((squares / freedom / num_images).sqrt())


def _error_of(seen: Seen, other: Moments, originals: np.ndarray | None = None) -> float:
    """The standard error of the distance of images from `other`; originals: the features that `other` summarizes, if each
    belongs to an image."""
    influences = influence(seen.features, seen.moments, other)
    if originals is not None:
        influences = influences + influence(originals, other, seen.moments)
    return standard_error(influences, seen.labels, seen.num_images)


def _require_finite(*all_moments: Moments) -> None:
    if not all(values.isfinite().all() for some in all_moments for values in (some.mean, some.covariance)):
        raise ValueError(
            "moments of features are not finite, expected finite ones: look for NaN in the images or the statistics they are of"
        )


def _power(matrix: Tensor, exponent: float) -> Tensor:
    """A power of a symmetric positive semidefinite matrix; directions without variance stay without it."""
    values, vectors = torch.linalg.eigh(matrix)
    kept = values > 1e-10 * values[-1]
    return (vectors[:, kept] * values[kept] ** exponent) @ vectors[:, kept].T


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
    from scipy.linalg import lapack

    packed, pivots, rank, _ = lapack.dpstrf(covariance.cpu().numpy(), lower=1)
    factor = np.empty((len(covariance), rank))
    factor[pivots - 1] = np.tril(packed)[:, :rank]
    return torch.from_numpy(factor)

"""Fidelity and variety apart, from nearest neighbours in feature space: precision and recall, density and coverage.

Each set is thought of as balls around its images, as wide as the distance to their k-th nearest neighbour in that set.
Precision: the fraction of samples inside a ball of the reference. Recall: the fraction of the reference inside a ball
of the samples. Density counts how many balls hold a sample, which one outlier of the reference cannot inflate; coverage
is the fraction of reference balls that hold a sample. A ball of radius 0, around an image that occurs more than k times, holds
nothing: else any set of constant images would be wholly precise.

Standard errors are over draws of the samples, the reference being what it is; of recall and coverage see _error_of_share.

Source: Kynkäänniemi et al., "Improved Precision and Recall Metric for Assessing Generative Models", 2019,
arXiv:1904.06991, section 2 (k = 3); Naeem et al., "Reliable Fidelity and Diversity Metrics for Generative
Models", 2020, arXiv:2002.09797, section 3 (k = 5). Errors of shares of what overlaps: Kish, "Survey
Sampling", 1965, section 8.2 (the design effect). Bounds of rounding: Higham, "Accuracy and Stability of Numerical
Algorithms", 2002, section 3.1.
Differs from common implementations: products of float32 only bound the distances. Pairs whose bounds leave open on which side
of a rim they lie are subtracted in float64, so that images on a rim, as copies are, are inside. Distances within a set
are taken once for both images and every k.
All four depend on the number of images: compare only figures of equal set sizes.
"""

import math
from collections.abc import Iterator
from typing import Annotated, Literal, NamedTuple

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from tessera.components import Params
from tessera.contracts import Planned, Record, SeenSamples, Shown

FIGURES = (
    Shown("precision", better="higher"),
    Shown("recall", better="higher"),
    Shown("density", form=None, better="higher"),
    Shown("coverage", better="higher"),
)
CHUNK_ROWS = 512  # of a distance matrix that are in memory at a time
SPARE_NEIGHBORS = 3  # kept beyond the k-th, as the nearest by lower bounds need not be the nearest
MAX_OPEN_SHARE = 0.01  # of a chunk's pairs: more are bounded in float64 before they are subtracted
PAIR_NUMBERS = 2**20  # that are subtracted at a time
OVERLAP_BALLS = 512  # whose overlaps with all balls widen a standard error


class Config(Params):
    kind: Literal["precision_recall"]
    neighbors: Annotated[int, Field(ge=1)] = 3  # k of precision and recall
    density_neighbors: Annotated[int, Field(ge=1)] = 5  # k of density and coverage


def problems(config: Config, planned: Planned) -> Iterator[str]:
    num_test = min(len(planned.labels["test"]), planned.max_neighbor_images)
    fewest = min(num_test, planned.num_samples)
    for key, k, number in (
        ("neighbors", config.neighbors, fewest),
        ("density_neighbors", config.density_neighbors, num_test),
    ):
        if k >= number >= 2:
            yield f"{key} {k}: among {number} images there is no neighbour number {k}, expected less: write {key}: {number - 1}"


def of_samples(config: Config, samples: SeenSamples, found: Record) -> None:
    """`precision`, `recall`, `density` and `coverage` by the first network."""
    seen = samples.first
    features, others = seen.features, seen.real_features(is_limited=True)
    of_precision, of_density = (
        seen.protocol(num_images=len(features), num_real=len(others), neighbors=number)
        for number in (config.neighbors, config.density_neighbors)
    )
    near = neighborhoods(others, features, config.neighbors, config.density_neighbors)
    found.add_share("precision", near.precision, of_precision)
    found.add("recall", near.recall, of_precision, near.recall_standard_error)
    found.add("density", near.density, of_density, near.density_standard_error)
    found.add("coverage", near.coverage, of_density, near.coverage_standard_error)


class Neighborhoods(NamedTuple):
    precision: float  # in [0, 1]
    recall: float  # in [0, 1]
    density: float  # at least 0, may exceed 1
    coverage: float  # in [0, 1]
    density_standard_error: float  # over draws of the samples, the reference being what it is
    recall_standard_error: float
    coverage_standard_error: float


class PrecisionRecall(NamedTuple):
    precision: float  # as above
    recall: float


class DensityCoverage(NamedTuple):
    density: float  # as above
    coverage: float
    density_standard_error: float


def neighborhoods(
    reference: Tensor | np.ndarray, samples: Tensor | np.ndarray, precision_k: int | None = 3, density_k: int = 5
) -> Neighborhoods:
    """reference: (N, D), samples: (M, D), features of one network. precision_k None: no precision, no recall (NaN).

    Raises ValueError unless density_k < N and precision_k < min(N, M).
    """
    real, drawn = _prepare(reference, samples)
    _require_neighbor(density_k, len(real))
    if precision_k is not None:
        _require_neighbor(precision_k, min(len(real), len(drawn)))
    wanted = [density_k] if precision_k is None else [density_k, precision_k]
    real_radii, drawn_radii = (
        radii.masked_fill_(radii == 0, -1) for radii in (_radii(real, wanted), _radii(drawn, wanted[1:]))
    )
    device = real.given.device
    is_realistic = torch.zeros(len(drawn), dtype=torch.bool, device=device)
    # Which samples' balls each reference image lies in, and which samples lie in its ball.
    recalling, covering = (torch.zeros(len(real), len(drawn), dtype=torch.bool, device=device) for _ in range(2))
    for i, j, distances in _contacts(drawn, real, drawn_radii, real_radii):
        inside = distances <= real_radii[j, 0]
        covering[j[inside], i[inside]] = True
        if precision_k is not None:
            is_realistic[i[distances <= real_radii[j, 1]]] = True
            is_recalling = distances <= drawn_radii[i, 0]
            recalling[j[is_recalling], i[is_recalling]] = True
    precision, recall = (
        float("nan") if precision_k is None else some.double().mean().item()
        for some in (is_realistic, recalling.any(dim=1))
    )
    each = covering.sum(dim=0).double() / density_k  # the reference balls around each sample
    error = (each.std() / len(each) ** 0.5).item() if len(each) > 1 else float("nan")
    coverage = covering.any(dim=1).double().mean().item()
    of_shares = (float("nan") if precision_k is None else _error_of_share(recalling), _error_of_share(covering))
    return Neighborhoods(precision, recall, each.mean().item(), coverage, error, *of_shares)


def precision_recall(reference: Tensor | np.ndarray, samples: Tensor | np.ndarray, k: int = 3) -> PrecisionRecall:
    """These two alone. Raises ValueError unless k < min(N, M)."""
    return PrecisionRecall(*neighborhoods(reference, samples, k, k)[:2])


def density_coverage(reference: Tensor | np.ndarray, samples: Tensor | np.ndarray, k: int = 5) -> DensityCoverage:
    """These two alone. Raises ValueError unless k < N."""
    return DensityCoverage(*neighborhoods(reference, samples, None, k)[2:5])


def _error_of_share(hits: Tensor) -> float:
    """hits: (N, M) bool, which of M samples hit each of N targets -> the standard error, over draws of as many samples, of the
    share of targets that are hit.

    Neighbouring targets are hit by the same samples. Let hits be Poisson variables of one mean, which is a = -log(1 -
    share), and o the part of them that two targets have in common. Both are missed with probability exp(-2 a + a o), and so
    the variance of one target, share (1 - share), is multiplied by the mean over targets of the sum of (exp(a o) - 1) /
    (exp(a) - 1) over all targets, the design effect. o is measured as the samples that hit both among those that hit
    either. The last term is there because the number of samples is fixed.
    """
    number, num_samples = hits.shape
    counts = hits.sum(dim=1)
    is_hit = counts > 0
    share = (float(is_hit.sum()) + 1) / (number + 2)  # not 0 or 1 (Laplace's rule of succession)
    rate = -math.log1p(-share)
    rows = is_hit.nonzero()[:, 0]
    rows = rows[torch.linspace(0, len(rows) - 1, min(len(rows), OVERLAP_BALLS), device=hits.device).long()]
    effect, some = 0.0, hits[rows].float()
    for start in range(0, number, CHUNK_ROWS):
        both = some @ hits[start : start + CHUNK_ROWS].float().T
        either = counts[rows, None] + counts[start : start + CHUNK_ROWS] - both
        effect += float(torch.expm1(rate * both.double() / either).sum())
    effect = effect / math.expm1(rate) / len(rows) if len(rows) else 1.0
    variance = share * (1 - share) / number * effect - (rate * (1 - share)) ** 2 / num_samples
    return max(0.0, variance) ** 0.5


class _View(NamedTuple):
    """A set in one number format: |x|^2 + |y|^2 - 2 x.y is off the squared distance by at most slack x + slack y."""

    points: Tensor  # (N, D) in [-1, 1]
    norms: Tensor  # (N,) float64, squared
    slack: Tensor  # (N,) float64


class _Points:
    """A set as it was given, for exact distances, and moved and scaled like the other one, for bounds of them."""

    def __init__(self, given: Tensor, center: Tensor, unit: float):
        self.given, self.center, self.unit = given, center, unit  # unit: a power of 2, so that scaling is exact
        # Products on accelerators, and on request on CPUs, may have fewer digits than float32: no bound holds for them.
        is_plain = given.device.type == "cpu" and torch.get_float32_matmul_precision() == "highest"
        self.formats = (torch.float32, torch.float64) if is_plain else (torch.float64,)
        self._views: dict[torch.dtype, _View] = {}

    def __len__(self) -> int:
        return len(self.given)

    def view(self, dtype: torch.dtype) -> _View:
        if dtype not in self._views:
            points = torch.empty_like(self.given, dtype=dtype)
            norms = points.new_empty(len(points), dtype=torch.float64)
            for start in range(0, len(points), CHUNK_ROWS):
                rows = slice(start, start + CHUNK_ROWS)
                points[rows] = (self.given[rows].double() - self.center).mul_(self.unit)
                norms[rows] = points[rows].double().square().sum(dim=1)
            # A sum of D products is off by at most D rounding errors of the sum of their sizes. 16: of the points, norms
            # and sums. 1.1: errors of errors. 1e8: where small numbers lose digits.
            relative = 1.1 * (points.shape[1] + 16) * torch.finfo(dtype).eps / 2
            self._views[dtype] = _View(points, norms, relative * norms + 1e8 * torch.finfo(dtype).tiny)
        return self._views[dtype]


def _prepare(reference: Tensor | np.ndarray, samples: Tensor | np.ndarray) -> tuple[_Points, _Points]:
    """Both around a common origin near them, where products of features lose the fewest digits."""
    reference, samples = torch.as_tensor(reference), torch.as_tensor(samples)
    is_matching = reference.ndim == samples.ndim == 2 and reference.shape[1] == samples.shape[1]
    if not (is_matching and len(reference) and len(samples)):
        raise ValueError(
            f"features of shapes {tuple(reference.shape)} and {tuple(samples.shape)} cannot be compared, "
            f"expected (N, D) and (M, D): make both with the same feature network"
        )
    center = reference.mean(dim=0, dtype=torch.float64)
    edges = torch.cat([edge for some in (reference, samples) for edge in (some.amin(dim=0), some.amax(dim=0))])
    farthest = float((edges.view(4, -1) - center).abs().max())
    if not np.isfinite(farthest):
        raise ValueError(
            "features hold values that are not finite, expected finite ones: look for NaN in the images they are of"
        )
    unit = 2.0 ** -int(np.frexp(farthest)[1])
    return _Points(reference, center, unit), _Points(samples, center, unit)


def _require_neighbor(k: int, fewest: int) -> None:
    if not 1 <= k < fewest:
        raise ValueError(f"among {fewest} images there is no neighbour number {k}: choose k from 1 to {fewest - 1}")


def _lower_bounds(x: _View, y: _View, rows: slice | Tensor, cols: slice) -> Tensor:
    """(rows, cols) of squared distances, in the views' format."""
    of_rows, of_cols = ((view.norms - view.slack)[some].to(view.points.dtype) for view, some in ((x, rows), (y, cols)))
    return ((-2 * x.points[rows]) @ y.points[cols].T).add_(of_cols).add_(of_rows[:, None])


def _exact(x: _Points, y: _Points, i: Tensor, j: Tensor) -> Tensor:
    """(P,) squared distances of pairs, the same for the same two images wherever they stand."""
    found = i.new_empty(len(i), dtype=torch.float64)
    size = max(1, PAIR_NUMBERS // x.given.shape[1])
    for start in range(0, len(i), size):
        pairs = slice(start, start + size)
        difference = x.given[i[pairs]].double().sub_(y.given[j[pairs]].double())
        found[pairs] = difference.mul_(x.unit).square_().sum(dim=1)
    return found


def _contacts(x: _Points, y: _Points, x_radii: Tensor, y_radii: Tensor) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Rows i of x, rows j of y, and squared distances of all pairs of which one may lie in a ball of the other.

    x_radii: (N, any), y_radii: (M, any), squared. Distances are exact wherever it matters for a comparison with these.
    """
    x_reach, y_reach = (
        (1 + 1e-6) * torch.cat([radii, radii.new_full((len(radii), 1), -1)], dim=1).amax(dim=1)  # rounded up
        for radii in (x_radii, y_radii)
    )
    for start in range(0, len(x), CHUNK_ROWS):
        rows = slice(start, start + CHUNK_ROWS)
        for dtype in x.formats:
            one, other = x.view(dtype), y.view(dtype)
            bounds = _lower_bounds(one, other, rows, slice(None))
            i, j = ((bounds <= y_reach.to(dtype)) | (bounds <= x_reach[rows, None].to(dtype))).nonzero(as_tuple=True)
            distances = bounds[i, j].double()
            i = i + start
            upper = distances + 2 * (one.slack[i] + other.slack[j])
            radii = torch.cat([x_radii[i], y_radii[j]], dim=1)
            is_open = ((distances[:, None] <= radii) & (radii < upper[:, None])).any(dim=1)
            if is_open.sum() <= MAX_OPEN_SHARE * bounds.numel():
                break
        distances[is_open] = _exact(x, y, i[is_open], j[is_open])
        yield i, j, distances


def _radii(x: _Points, ks: list[int]) -> Tensor:
    """(N, len(ks)) squared distances of each row from its k-th nearest other rows."""
    if not ks:
        return x.given.new_empty(len(x), 0, dtype=torch.float64)
    size = min(max(ks) + SPARE_NEIGHBORS, len(x) - 1)
    everyone = torch.arange(len(x), device=x.given.device)
    found, is_open = _settled(x, x.view(x.formats[0]), everyone, *_nearest(x, size), ks)
    for rows in is_open.nonzero()[:, 0].split(CHUNK_ROWS):  # crowded balls; still open then: ties
        view = x.view(torch.float64)
        bounds = _lower_bounds(view, view, rows, slice(None))
        bounds.scatter_(1, rows[:, None], torch.inf)
        found[rows], _ = _settled(x, view, rows, *bounds.topk(size, dim=1, largest=False), ks)
    return found


def _nearest(x: _Points, size: int) -> tuple[Tensor, Tensor]:
    """The `size` lowest bounds of distances of each row from other rows, (N, size) ascending, and which rows these are."""
    view = x.view(x.formats[0])
    lowest = view.points.new_full((len(x), size), torch.inf)
    nearest = torch.zeros(len(x), size, dtype=torch.int64, device=lowest.device)

    def keep(rows: slice, bounds: Tensor, first: int) -> None:
        values, places = bounds.topk(min(size, bounds.shape[1]), dim=1, largest=False)
        merged = torch.cat([lowest[rows], values], dim=1).topk(size, dim=1, largest=False)
        nearest[rows] = torch.cat([nearest[rows], places + first], dim=1).gather(1, merged.indices)
        lowest[rows] = merged.values

    for start in range(0, len(x), CHUNK_ROWS):
        stop = min(start + CHUNK_ROWS, len(x))
        bounds = _lower_bounds(view, view, slice(start, stop), slice(start, None))
        bounds.fill_diagonal_(torch.inf)  # an image is not its own neighbour
        keep(slice(start, stop), bounds, start)
        if stop < len(x):  # the same pairs, as the others see them
            keep(slice(stop, None), bounds[:, stop - start :].T, start)
    return lowest, nearest


def _settled(
    x: _Points, view: _View, rows: Tensor, lowest: Tensor, nearest: Tensor, ks: list[int]
) -> tuple[Tensor, Tensor]:
    """(R, len(ks)) squared radii of rows (R,), exact, and (R,) whether a row that is not in `nearest` might be nearer."""
    lower = lowest.double()  # (R, size)
    beyond = lower[:, -1] if lower.shape[1] < len(x) - 1 else torch.inf  # no other row is nearer than that
    upper = lower + 2 * (view.slack[rows, None] + view.slack[nearest])
    is_open = torch.zeros_like(lower, dtype=torch.bool)
    for k in ks:  # whatever may be the k-th
        is_open |= (upper >= lower[:, k - 1 : k]) & (lower <= upper.kthvalue(k, dim=1, keepdim=True).values)
    i, place = is_open.nonzero(as_tuple=True)
    distances = lower.clone()
    distances[i, place] = _exact(x, x, rows[i], nearest[i, place])
    radii = distances.sort(dim=1).values[:, [k - 1 for k in ks]]
    most = radii.amax(dim=1)
    return radii, (most > beyond) & (most > 0)

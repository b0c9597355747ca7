"""Kernel distance between two sets of image features (KID, with Inception-v3 features): unbiased at any set size.

The squared maximum mean discrepancy under the cubic polynomial kernel k(x, y) = (x.y / D + 1)^3, by its unbiased
estimator, averaged over random subsets. Unlike the Fréchet distance it assumes no Gaussian and is as often below 0 as
above when both sets come from one distribution.

Source: Bińkowski et al., "Demystifying MMD GANs", 2018, arXiv:1801.01401, section 4; Gretton et al., "A Kernel
Two-Sample Test", JMLR 13, 2012, equation 3 (the unbiased estimator).
Differs from common implementations: subsets overlap, so each pair of images is multiplied once where that is less work
than each subset's own pairs, and sums over subsets are products with their rows of zeros and ones. All of it is float64.
"""

from collections.abc import Iterator
from typing import Annotated, Literal, NamedTuple

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from tessera import seeding
from tessera.components import Params
from tessera.contracts import Planned, Record, SeenSamples, Shown

FIGURES = (Shown("kd_*", form=None, better="lower"), Shown("kid", form=None, better="lower"))
BLOCK_ROWS = 192  # of a kernel matrix that are in memory at a time; more multiply more pairs twice


class Config(Params):
    kind: Literal["kernel"]
    subset: Annotated[int, Field(ge=2)] = 1000  # images per subset; more than there are is an error
    num_subsets: Annotated[int, Field(ge=2)] = 100


def problems(config: Config, planned: Planned) -> Iterator[str]:
    num_samples = min(planned.num_samples, planned.max_neighbor_images)
    num_test = len(planned.labels["test"])
    smaller = min(num_samples, num_test)
    if config.subset > smaller >= 2:
        yield (
            f"subset {config.subset} is larger than the {smaller} images at hand ({num_samples} samples, {num_test} test "
            f"images), expected at most as many: write subset: {max(2, smaller * 2 // 3)}"
        )


def figure_name(kind: str, network: str) -> str:
    """What a distance is called that is taken with the network of this kind and name in the params: kid of inception alone."""
    return "kid" if kind == "inception" else f"kd_{network.replace('-', '_')}"


def of_samples(config: Config, samples: SeenSamples, found: Record) -> None:
    """The distance from the test images by each network (`kd_classifier`)."""
    for seen in samples.networks.values():
        features, others = seen.features, seen.real_features()
        smaller = min(len(features), len(others))
        if config.subset > smaller:
            raise ValueError(
                f"the kernel metric's subset {config.subset} is larger than the {smaller} images at hand ({len(features)} "
                f"samples, {len(others)} test images): lower it in evaluate.metrics, or raise sample_images.num_images"
            )
        generator = seeding.numpy_generator(samples.seed, "kernel_subsets")
        between = distance(features, others, generator, config.subset, config.num_subsets)
        protocol = seen.protocol(
            num_images=len(features), num_real=len(others), subset=config.subset, num_subsets=config.num_subsets
        )
        found.add(figure_name(seen.kind, seen.network), between.mean, protocol, between.standard_error)


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
    drawn = [[generator.permutation(len(features))[:subset_size] for features in (a, b)] for _ in range(num_subsets)]
    width = a.shape[-1]
    if (len(a) + len(b)) ** 2 * (width + num_subsets) < num_subsets * (2 * subset_size) ** 2 * width:  # multiplications
        members = [a.new_zeros(num_subsets, len(features), dtype=torch.float64) for features in (a, b)]
        for number, subset in enumerate(drawn):
            for is_member, rows in zip(members, subset, strict=True):
                is_member[number, torch.from_numpy(rows)] = 1
        values = _discrepancies(a, b, *members)
    else:
        values = [squared_discrepancy(a[torch.from_numpy(x)], b[torch.from_numpy(y)]) for x, y in drawn]
    error = np.std(values, ddof=1) / num_subsets**0.5 if num_subsets > 1 else float("nan")
    return KernelDistance(float(np.mean(values)), float(error))


def squared_discrepancy(a: Tensor | np.ndarray, b: Tensor | np.ndarray) -> float:
    """The unbiased squared maximum mean discrepancy of (N, D) and (M, D), computed in float64."""
    a, b = torch.as_tensor(a), torch.as_tensor(b)
    everyone = (a.new_ones(1, len(features), dtype=torch.float64) for features in (a, b))
    return _discrepancies(a, b, *everyone)[0]


def _discrepancies(a: Tensor, b: Tensor, members_a: Tensor, members_b: Tensor) -> list[float]:
    """Those of S pairs of subsets, whose images are the ones in members_a (S, N) and members_b (S, M), else zeros."""
    if a.ndim != 2 or b.ndim != 2 or a.shape[1] != b.shape[1]:
        raise ValueError(
            f"features of shapes {tuple(a.shape)} and {tuple(b.shape)} cannot be compared, "
            f"expected (N, D) and (M, D): make both with the same feature network"
        )
    if not (a.isfinite().all() and b.isfinite().all()):
        raise ValueError(
            "features hold values that are not finite, expected finite ones: look for NaN in the images they are of"
        )
    a, b = a.double(), b.double()
    n, m = members_a.sum(dim=1), members_b.sum(dim=1)
    within_a, within_b = _sums_within(a, members_a) / (n * (n - 1)), _sums_within(b, members_b) / (m * (m - 1))
    return (within_a + within_b - 2 * _sums_between(a, b, members_a, members_b) / (n * m)).tolist()


def _sums_within(x: Tensor, members: Tensor) -> Tensor:
    """(S,) sums of the kernel over all pairs of two different members: twice those above the diagonal."""
    sums = members.new_zeros(len(members))
    for start in range(0, len(x), BLOCK_ROWS):
        stop = start + BLOCK_ROWS
        pairs = _kernel(x[start:stop], x[start:]).triu_(1)
        sums += 2 * ((members[:, start:stop] @ pairs) * members[:, start:]).sum(dim=1)
    return sums


def _sums_between(x: Tensor, y: Tensor, members_x: Tensor, members_y: Tensor) -> Tensor:
    """(S,) sums of the kernel over all pairs of a member in x and one in y."""
    sums = members_x.new_zeros(len(members_x))
    for start in range(0, len(x), BLOCK_ROWS):
        stop = start + BLOCK_ROWS
        sums += ((members_x[:, start:stop] @ _kernel(x[start:stop], y)) * members_y).sum(dim=1)
    return sums


def _kernel(x: Tensor, y: Tensor) -> Tensor:
    return torch.addmm(x.new_ones(()), x, y.T, alpha=1 / x.shape[1]).pow_(3)

"""Kernel distance between two sets of image features (KID, with Inception-v3 features): unbiased at any set size.

The squared maximum mean discrepancy under the cubic polynomial kernel k(x, y) = (x.y / D + 1)^3: the squared distance between
the mean embeddings of the two sets, less what the noise of either mean adds to it on average. Unlike the Fréchet distance it
assumes no Gaussian, and is as often below 0 as above when both sets come from one distribution.

Samples and test images have fixed shares of each class, so a mean is as noisy as images of one class differ among themselves,
and no more. Its squared noise is sum_c p_c^2 v_c / n_c, where class c has share p_c, n_c images and variance v_c in the space
of the kernel. That is to give the mean over pairs of two different images of class c the weight p_c^2, and the one over pairs
of classes c and c' the weight p_c p_c'. With one class it is the estimator of independent draws.

Source: Bińkowski et al., "Demystifying MMD GANs", 2018, arXiv:1801.01401, section 4; Gretton et al., "A Kernel
Two-Sample Test", JMLR 13, 2012, equation 3 (the unbiased estimator); Cochran, "Sampling Techniques", 1977, theorem 5.3
(the variance of a stratified mean).
Differs from common implementations: draws are stratified, all pairs of images count in the place of random subsets, and the
standard error is that of other images in the place of other subsets of the same ones. All of it is float64.
"""

from collections.abc import Iterator
from typing import Annotated, Literal, NamedTuple

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from tessera.components import Params
from tessera.contracts import Planned, Record, SeenSamples, Shown

FIGURES = (Shown("kd_*", form=None, better="lower"), Shown("kid", form=None, better="lower"))
BLOCK_ROWS = 192  # of a kernel matrix that are in memory at a time
ERROR_IMAGES = 2000  # of either set, whose whole kernel matrix the standard error is taken from


class Config(Params):
    kind: Literal["kernel"]
    # Of files from when the distance was a mean over random subsets. They decide nothing, and whoever sets them is told.
    subset: Annotated[int, Field(ge=2)] | None = None
    num_subsets: Annotated[int, Field(ge=2)] | None = None


def problems(config: Config, planned: Planned) -> Iterator[str]:
    most = max(np.bincount(planned.labels["test"]), default=0)
    if most < 2:
        yield (
            f"no class has two of the {len(planned.labels['test'])} test images, expected at least one that has: take more "
            f"test images (dataset.test_fraction), or take this metric out"
        )


def figure_name(kind: str, network: str) -> str:
    """What a distance is called that is taken with the network of this kind and name in the params: kid of inception alone."""
    return "kid" if kind == "inception" else f"kd_{network.replace('-', '_')}"


def of_samples(config: Config, samples: SeenSamples, found: Record) -> None:
    """The distance from the test images by each network (`kd_classifier`)."""
    for seen in samples.networks.values():
        features, others = seen.features, seen.real_features()
        between = distance(features, others, seen.labels, seen.real_labels())
        protocol = seen.protocol(num_images=len(features), num_real=len(others), draws="stratified")
        found.add(figure_name(seen.kind, seen.network), between.value, protocol, between.standard_error)
    if config.subset is not None or config.num_subsets is not None:
        found.note(
            "subset and num_subsets of the kernel metric no longer mean anything: its distance is that of all images, which "
            "subsets only made noisier. Take them out of evaluate.metrics"
        )


class KernelDistance(NamedTuple):
    value: float  # squared, may be below 0
    standard_error: float  # over draws of both sets with these numbers of images of each class


class _Set(NamedTuple):
    """Images of a mixture of classes, sorted by class."""

    points: Tensor  # (N, D) float64
    classes: tuple[int, ...]  # number of images of each class
    weights: Tensor  # (N,) p_c / n_c of each image: these weigh its part in the mean embedding
    noise: Tensor  # (N,) its weight in the squared noise of the mean embedding: the squared weight, 0 if alone in its class


def distance(
    x: Tensor | np.ndarray,
    y: Tensor | np.ndarray,
    x_labels: np.ndarray | None = None,
    y_labels: np.ndarray | None = None,
) -> KernelDistance:
    """x: (N, D), y: (M, D), with labels (N,) and (M,), None: all of one class.

    Classes of `y` are weighed by their shares in `x`; one that only one of the sets has keeps its share. A class of a single
    image is taken to vary as the others do on average. Raises ValueError if features are not finite or differ in width, or if
    no class of a set has two images.
    """
    x, y = torch.as_tensor(x), torch.as_tensor(y)
    if x.ndim != 2 or y.ndim != 2 or x.shape[1] != y.shape[1]:
        raise ValueError(
            f"features of shapes {tuple(x.shape)} and {tuple(y.shape)} cannot be compared, "
            f"expected (N, D) and (M, D): make both with the same feature network"
        )
    if not (x.isfinite().all() and y.isfinite().all()):
        raise ValueError(
            "features hold values that are not finite, expected finite ones: look for NaN in the images they are of"
        )
    x_labels, y_labels = (
        np.zeros(len(one), int) if labels is None else np.asarray(labels)
        for one, labels in ((x, x_labels), (y, y_labels))
    )
    y_shares = _shares_like(y_labels, x_labels)
    one, other = _sorted(x, x_labels, _shares(x_labels)), _sorted(y, y_labels, y_shares)
    points = torch.cat([one.points, other.points])
    signed = torch.cat([one.weights, -other.weights])
    witness = _weighted_sums(points, signed)  # how much nearer an image is to the mean of x than to that of y
    apart = torch.cat([_apart_from_class(one), _apart_from_class(other)])
    value = float(signed @ witness - torch.cat([one.noise, other.noise]) @ apart)
    return KernelDistance(value, _standard_error(one, other, witness - signed * apart))


def _shares(labels: np.ndarray) -> dict[int, float]:
    classes, counts = np.unique(labels, return_counts=True)
    return {int(label): count / len(labels) for label, count in zip(classes, counts, strict=True)}


def _shares_like(labels: np.ndarray, others: np.ndarray) -> dict[int, float]:
    """Shares of the classes of `labels`, in the proportions of `others` among the classes that both have."""
    own, wanted = _shares(labels), _shares(others)
    common = own.keys() & wanted.keys()
    scale = sum(own[label] for label in common) / (sum(wanted[label] for label in common) or 1)
    return {label: wanted[label] * scale if label in common else share for label, share in own.items()}


def _sorted(points: Tensor, labels: np.ndarray, shares: dict[int, float]) -> _Set:
    order = np.argsort(labels, kind="stable")
    classes, counts = np.unique(labels, return_counts=True)
    if counts.max() < 2:
        raise ValueError(
            f"no class has two of the {len(labels)} images, expected at least one that has: their noise is not known from "
            f"single ones. Raise sample_images.num_images, or take more test images"
        )
    weights = np.array([shares[int(label)] for label in classes]) / counts
    squares, is_known = weights**2 * counts, counts > 1
    scale = squares.sum() / squares[is_known].sum()  # where single images leave noise out
    each = (weights, np.where(is_known, scale * weights**2, 0))
    in_order = (torch.from_numpy(np.repeat(values, counts)).to(points.device) for values in each)
    return _Set(points[torch.from_numpy(order)].double(), tuple(counts.tolist()), *in_order)


def _apart_from_class(one: _Set) -> Tensor:
    """(N,) the kernel of each image with itself, less its mean with the others of the class; 0 where there is no other.

    The mean over a class is the unbiased variance of the class in the space of the kernel.
    """
    found = []
    for some in one.points.split(one.classes):
        itself = (some.square().sum(dim=1) / some.shape[1] + 1).pow(3)
        everyone = _weighted_sums(some, some.new_ones(len(some)))
        found.append(itself - (everyone - itself) / (len(some) - 1) if len(some) > 1 else 0 * itself)
    return torch.cat(found)


def _standard_error(one: _Set, other: _Set, witness: Tensor) -> float:
    """The noise e of the difference d of the mean embeddings moves |d + e|^2 by 2 <d, e> + |e|^2 - E|e|^2, of variance
    4 <d, C d> + 2 tr(C^2), with C the covariance of e. Of d only d + e is known, which has tr(C^2) more on average.

    witness: (N + M,) the product of each image with the difference of the mean embeddings of the other images.
    """
    squares = _trace_of_square(one, other)
    along = torch.cat([one.noise, other.noise]) @ _deviations(witness, one.classes + other.classes).square()
    return (4 * max(0.0, float(along) - squares) + 2 * squares) ** 0.5


def _trace_of_square(one: _Set, other: _Set) -> float:
    """tr(C^2) from the products of all pairs of two different images, of at most ERROR_IMAGES of either set."""
    thinned = [_thinned(some) for some in (one, other)]
    points, noise = (torch.cat([getattr(some, name) for some in thinned]) for name in ("points", "noise"))
    classes = thinned[0].classes + thinned[1].classes
    products = _deviations(_deviations(_kernel(points, points), classes).T, classes)
    return float(noise @ products.fill_diagonal_(0).square_() @ noise)


def _thinned(one: _Set) -> _Set:
    """Evenly spread images, with the noise of the whole set."""
    number = len(one.points)
    kept = np.linspace(0, number - 1, min(number, max(ERROR_IMAGES, 2 * len(one.classes)))).astype(int)
    labels = np.repeat(np.arange(len(one.classes)), one.classes)[kept]
    share_of = one.weights.numpy(force=True) * np.repeat(one.classes, one.classes)
    thin = _sorted(one.points[torch.from_numpy(kept)], labels, dict(zip(labels.tolist(), share_of[kept], strict=True)))
    return thin._replace(noise=thin.noise * (len(kept) / number))


def _deviations(values: Tensor, classes: tuple[int, ...]) -> Tensor:
    """(N, any) less the mean of each class, whose rows lie together; scaled to a mean square that is the unbiased variance."""
    scaled = [(some - some.mean(dim=0)) * (len(some) / max(len(some) - 1, 1)) ** 0.5 for some in values.split(classes)]
    return torch.cat(scaled)


def _weighted_sums(points: Tensor, weights: Tensor) -> Tensor:
    """(N,) sums of the kernel of each point with all points, weighted. Each pair is multiplied once."""
    sums = torch.zeros_like(weights)
    for start in range(0, len(points), BLOCK_ROWS):
        stop = min(start + BLOCK_ROWS, len(points))
        block = _kernel(points[start:stop], points[start:])
        sums[start:stop] += block @ weights[start:]
        sums[stop:] += block[:, stop - start :].T @ weights[start:stop]
    return sums


def _kernel(x: Tensor, y: Tensor) -> Tensor:
    return torch.addmm(x.new_ones(()), x, y.T, alpha=1 / x.shape[1]).pow_(3)

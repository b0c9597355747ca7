"""Inception Score: how sure a classifier is of each sample, and how evenly its classes occur among all of them.

score = exp(mean over samples of KL(p(y|x) || p(y))), p(y) the mean of the p(y|x): from 1, when all predictions are
equal, to the number of classes, when each is certain and all occur equally often. It sees no real images, so neither
copies nor lost variety within a class lower it. It means something only for RGB photographs of what ImageNet's classes
are of, and under the classifier it is named after: the class logits of features of kind inception.

Source: Salimans et al., "Improved Techniques for Training GANs", 2016, arXiv:1606.03498, section 4.
Differs from it: the standard error of the mean over splits is given. Papers give the deviation of the splits, which is
(num_splits - 1)^(1/2) times as large.
"""

from collections.abc import Iterator
from typing import Annotated, Literal, NamedTuple

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from tessera.components import Params
from tessera.contracts import Planned, Record, SeenSamples, Shown

FIGURES = (Shown("inception_score", "{:.2f}", better="higher"),)


class Config(Params):
    kind: Literal["inception_score"]
    num_splits: Annotated[int, Field(ge=1)] = 10


def problems(config: Config, planned: Planned) -> Iterator[str]:
    is_measured = "inception" in planned.networks and planned.spec.channels == 3
    if is_measured and config.num_splits > planned.num_samples:
        yield (
            f"num_splits {config.num_splits} is larger than the {planned.num_samples} samples: write num_splits: "
            f"{planned.num_samples} or less, or raise sample_images.num_images"
        )


def of_samples(config: Config, samples: SeenSamples, found: Record) -> None:
    """`inception_score`: of RGB images alone, by a network of kind inception; of gray digits it would mean nothing."""
    if samples.are_real or samples.spec.channels != 3:
        return
    for seen, logits in samples.class_logits():
        found_score = score(logits, config.num_splits)
        protocol = seen.protocol(num_real=0, num_splits=config.num_splits)
        found.add("inception_score", found_score.inception_score, protocol, found_score.standard_error)


class InceptionScore(NamedTuple):
    inception_score: float  # in [1, number of classes], the mean over splits
    standard_error: float  # of that mean; NaN for one split


def score(logits: Tensor | np.ndarray, num_splits: int = 10) -> InceptionScore:
    """logits: (N, classes), N >= num_splits, rows in random order, since splits are consecutive rows; in float64.

    A score grows with the images per split, so compare only equal N and num_splits (papers: 50,000 and 10).
    """
    logits = torch.as_tensor(logits).double()
    if logits.ndim != 2 or not 1 <= num_splits <= len(logits):
        raise ValueError(
            f"logits of shape {tuple(logits.shape)} cannot be split into {num_splits} parts, "
            f"expected (N, classes) with 1 to N parts: sample more images or choose fewer splits"
        )
    if not logits.isfinite().all():
        raise ValueError(
            "logits hold values that are not finite, expected finite ones: look for NaN in the images they are of"
        )
    edges = [number * len(logits) // num_splits for number in range(num_splits + 1)]
    log_likelihood = logits.log_softmax(dim=1)
    scores = [_score(log_likelihood[start:end]) for start, end in zip(edges, edges[1:], strict=False)]
    error = np.std(scores, ddof=1) / num_splits**0.5 if num_splits > 1 else float("nan")
    return InceptionScore(float(np.mean(scores)), float(error))


def _score(log_likelihood: Tensor) -> float:
    """exp of the mean divergence of the rows (n, classes) from their mean; a class that never occurs adds 0, not NaN."""
    log_marginal = log_likelihood.logsumexp(dim=0) - np.log(len(log_likelihood))
    divergence = (log_likelihood.exp() * (log_likelihood - log_marginal)).sum(dim=1)
    return float(divergence.mean().exp())

"""How many samples are as near to a training image as few images are that were not trained on.

The measure is what is usual among real images: the distance to the nearest training image that only a small share of
the test images, `HELD_OUT_SHARE`, falls below. Samples of the true distribution fall below it as often, so a copy rate near
HELD_OUT_SHARE is what to hope for. One far below it often means samples that are near no real image at all: read it beside
precision. One far above it has two possible causes, which only a look at the test images tells apart. A prior that has
learned images by heart draws samples that are nearer to training than to test images. One whose sampler is truncated (by
guidance, a low temperature, top_k) draws from where images are dense, near to both alike: read it beside recall.

Source: the nearest-neighbour test for memory of Meehan et al., "A Non-Parametric Test to Detect Data-Copying in
Generative Models", 2020, arXiv:2004.05675, section 3. The noise of the threshold: Woodruff, "Confidence Intervals for Medians
and Other Position Measures", JASA 47, 1952.
Differs from it: a rate at one threshold in the place of a rank statistic, over all cells at once; training and test images
are compared by the number of samples nearer than the threshold to an image of either.
"""

import math
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from tessera.components import Params
from tessera.contracts import Record, SeenSamples, Shown
from tessera.nn.neighbors import nearest, number_within

HELD_OUT_SHARE = 0.05
SUSPICIOUS_SHARE = 3 * HELD_OUT_SHARE
MEMORY_STDS, MEMORY_RATIO = 3.0, 2.0
FIGURES = (Shown("copy_rate", better="neither"),)


class Config(Params):
    kind: Literal["copy_rate"]


def of_samples(config: Config, samples: SeenSamples, found: Record) -> None:
    """`copy_rate` by the first network. Training images are copies of themselves: of them it says nothing."""
    if samples.are_real:
        return
    seen = samples.first
    trained, held_out = seen.real_features("train"), seen.real_features("test", is_limited=True)
    copies = share_of_copies(samples.nearest_training.distances, nearest(held_out, trained).distances)
    protocol = seen.protocol("train", num_images=len(seen.features), num_real=len(trained), held_out=HELD_OUT_SHARE)
    found.add("copy_rate", copies.rate, protocol, copies.standard_error)
    if copies.rate <= SUSPICIOUS_SHARE:
        return
    sentence = (
        f"{copies.rate:.0%} of the samples lie nearer to a training image than all but {HELD_OUT_SHARE:.0%} of the test "
        f"images do"
    )
    if are_learned_by_heart(seen.features, trained, held_out, copies.threshold):
        found.alarm(
            f"{sentence}, and not to test images: the prior has learned images by heart. Train it for fewer steps, on more "
            f"views (encode_tokens.warps), or make it smaller"
        )
    else:
        found.note(
            f"{sentence}, and as near to test images: they are no copies, but keep to where images are dense, as guidance, "
            f"a low temperature or top_k make them. Look at recall"
        )


class Copies(NamedTuple):
    rate: float  # in [0, 1]
    standard_error: float  # over draws of the samples and of the held-out images
    threshold: float  # the distance below which a sample counts


def copy_rate(samples: Tensor, train: Tensor, held_out: Tensor) -> float:
    """Features of one network, (M, D), (N, D) and (H, D) -> the share of samples that are nearer to a training image
    than all but HELD_OUT_SHARE of the held-out images. In [0, 1]."""
    return share_of_copies(nearest(samples, train).distances, nearest(held_out, train).distances).rate


def share_of_copies(distances: Tensor, held_out_distances: Tensor) -> Copies:
    """The same from distances that are known, (M, k) and (H, k), of which the first column counts.

    The threshold is a quantile of H distances: one std of how many of them fall below it, sqrt(H p (1 - p)), moves it to a
    neighbouring quantile, and with it the rate (Woodruff, 1952). That noise adds to the binomial one of the samples.
    """
    own, others = distances[:, 0], held_out_distances[:, 0]
    std = (HELD_OUT_SHARE * (1 - HELD_OUT_SHARE) / len(others)) ** 0.5
    levels = others.new_tensor([HELD_OUT_SHARE, max(0.0, HELD_OUT_SHARE - std), HELD_OUT_SHARE + std])
    thresholds = torch.quantile(others, levels.clamp(max=1))
    rate, lower, upper = (float((own < threshold).double().mean()) for threshold in thresholds)
    smoothed = (rate * len(own) + 1) / (len(own) + 2)  # 0 of 50 is not certainty
    error = math.hypot((smoothed * (1 - smoothed) / len(own)) ** 0.5, (upper - lower) / 2)
    return Copies(rate, error, float(thresholds[0]))


def are_learned_by_heart(samples: Tensor, train: Tensor, held_out: Tensor, threshold: float) -> bool:
    """Whether more samples lie nearer than the threshold to a training image than to a held-out one, on average over these.

    If nothing was learned by heart, which real images were trained on makes no difference. MEMORY_RATIO: a network that was
    itself trained on the training images sees them a little nearer to everything.
    """
    of_train, of_others = (number_within(samples, some, threshold) for some in (train, held_out))
    error = math.hypot(*(float(some.std()) / len(some) ** 0.5 for some in (of_train, of_others)))
    excess = float(of_train.mean() - of_others.mean())
    return excess > MEMORY_STDS * error and float(of_train.mean()) > MEMORY_RATIO * float(of_others.mean())

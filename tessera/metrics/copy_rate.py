"""How many samples are copies: nearer to a training image than images that were not trained on are.

The measure is what is usual among real images: the distance to the nearest training image that only a small share of
the test images, `HELD_OUT_SHARE`, falls below. Samples of the true distribution would fall below it as often, so a
copy rate near HELD_OUT_SHARE is what to hope for, one far above it is memory, and one far below it often means samples
that are near no real image at all: read it beside precision.

Source: the nearest-neighbour test for memory of Meehan et al., "A Non-Parametric Test to Detect Data-Copying in
Generative Models", 2020, arXiv:2004.05675, section 3.
Differs from it: a rate at one threshold in the place of a rank statistic, over all cells at once.
"""

from typing import Literal

import numpy as np
import torch
from torch import Tensor

from tessera.components import Params
from tessera.contracts import Record, SeenSamples, Shown
from tessera.nn.neighbors import nearest

HELD_OUT_SHARE = 0.05
SUSPICIOUS_SHARE = 3 * HELD_OUT_SHARE
FIGURES = (Shown("copy_rate", better="neither"),)


class Config(Params):
    kind: Literal["copy_rate"]


def of_samples(config: Config, samples: SeenSamples, found: Record) -> None:
    """`copy_rate` by the first network. Training images are copies of themselves: of them it says nothing."""
    if samples.are_real:
        return
    seen = samples.first
    trained, held_out = seen.real_features("train"), seen.real_features("test", is_limited=True)
    rate = share_of_copies(samples.nearest_training.distances, nearest(held_out, trained).distances)
    protocol = seen.protocol("train", num_images=len(seen.features), num_real=len(trained), held_out=HELD_OUT_SHARE)
    found.add_share("copy_rate", rate, protocol)
    if rate > SUSPICIOUS_SHARE:
        found.alarm(
            f"{rate:.0%} of the samples lie nearer to a training image than all but {HELD_OUT_SHARE:.0%} of the test images "
            f"do: the prior has learned images by heart. Train it for fewer steps, on more views (encode_tokens.warps), or "
            f"make it smaller"
        )


def copy_rate(samples: np.ndarray, train: np.ndarray, held_out: np.ndarray) -> float:
    """Features of one network, (M, D), (N, D) and (H, D) -> the share of samples that are nearer to a training image
    than all but HELD_OUT_SHARE of the held-out images. In [0, 1]."""
    return share_of_copies(nearest(samples, train).distances, nearest(held_out, train).distances)


def share_of_copies(distances: Tensor, held_out_distances: Tensor) -> float:
    """The same from distances that are known, (M, k) and (H, k), of which the first column counts."""
    threshold = torch.quantile(held_out_distances[:, 0], HELD_OUT_SHARE)
    return (distances[:, 0] < threshold).double().mean().item()

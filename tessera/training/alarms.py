"""Alarms on overfitting: a validation loss that rises, and samples that copy the training images.

Sources: Prechelt, "Early Stopping - But When?", 1998, section 2.2 (the generalization loss); Meehan et al., "A Non-Parametric
Test to Detect Data-Copying in Generative Models", 2020, arXiv:2004.05675, section 3.
Differs from them: an alarm stops nothing. That on losses also asks that the training loss fell meanwhile; that on samples
asks for each which split its nearest real image belongs to, with equally many images of both, and compares with chance.
"""

from collections.abc import Mapping
from math import sqrt

import torch
from torch import Tensor

# Prechelt stops at 1 % to 5 %. Validations differ by the weights alone, so that there is no noise to allow for.
LOSS_RISE = 0.02
# If a share q of the samples are copies of the training images compared with, and the others are as near to either split,
# 0.5 + q / 2 of them are nearest to a training image. Below q = 0.3 the tokenizer's own memory may be the cause.
COPYING_SHARE = 0.65
COPYING_STDS = 3.0  # reached by chance in one validation of 740


def train_share(nearest: Tensor, count: int) -> tuple[float, float]:
    """(M,) which of `count` test images and, numbered after them, `count` training images is nearest to each sample -> the
    share that is nearest to a training image, and its standard deviation under the null hypothesis.

    Under it any half of the real images might have been the one trained on. Several samples may share a nearest image: the
    standard deviation is that of a sum over a random half of a finite set.
    """
    uses = torch.bincount(nearest, minlength=2 * count).double()
    variance = (uses - uses.mean()).square().sum() / 4 * (2 * count / (2 * count - 1))
    return float(uses[count:].sum()) / len(nearest), sqrt(float(variance)) / len(nearest)


def loss_alarm(metrics: Mapping[int, dict[str, float]]) -> str | None:
    """Prechelt, section 2.2: a sentence if the test loss has risen since its minimum while the training loss fell.

    metrics: those of each validation by its step, in order.
    """
    now = metrics[max(metrics)]
    if "test_loss" not in now:
        return None
    step = min(metrics, key=lambda step: metrics[step]["test_loss"])
    best = metrics[step]
    has_risen = now["test_loss"] > (1 + LOSS_RISE) * best["test_loss"]
    if not has_risen or now["train_loss"] >= best["train_loss"]:
        return None
    return (
        f"overfitting: since step {step} the loss rose from {best['test_loss']:.4g} to {now['test_loss']:.4g} on test images "
        f"and fell from {best['train_loss']:.4g} to {now['train_loss']:.4g} on training images. "
        f"Train fewer steps, raise dropout or the number of views, or set follow_training.criterion: validation_loss"
    )


def copying_alarm(step: int, share: float, std: float) -> str | None:
    """A sentence if more samples are nearest to a training image than chance explains, by `train_share`."""
    if share < COPYING_SHARE or share - 0.5 <= COPYING_STDS * std:
        return None
    return (
        f"overfitting: at step {step} {share:.0%} of the samples are nearer to a training image than to any of as many test "
        f"images, where 50 % (+- {std:.1%}) are expected by chance: they copy what was trained on. Train fewer steps, take a "
        f"smaller prior, or more images or views"
    )

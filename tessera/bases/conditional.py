"""Labels as priors see them: hidden from a share of the training images, so that guidance has something to lead away from.

Sources: Ho and Salimans, "Classifier-Free Diffusion Guidance", 2022, arXiv:2207.12598, algorithm 1 (label dropout) and
equation 6, written here so that a scale of 1 is the conditional model and 0 the unconditional one; the ramp of the scale:
Weber et al. (MaskBit), 2024, arXiv:2409.16211, and Yu et al. (RAR), 2024, arXiv:2411.00776.
"""

import math
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor

from tessera.bases.optimization import Fraction
from tessera.components import Params

Ramp = Literal["constant"] | Annotated[float, Field(gt=0)]


class PriorSettings(Params):
    """What every prior has among its settings."""

    num_views: Annotated[int, Field(ge=1)] | None = None  # of each image, to train on; 1: the image itself, None: all


class ConditionalConfig(PriorSettings):
    """What every prior that is given labels has among its settings."""

    label_dropout: Fraction = 0.1  # share of the labels replaced by the null label: what guidance needs
    is_conditional: bool = True  # False: every label is the null label


def seen_labels(labels: Tensor, config: ConditionalConfig, null_label: int, is_training: bool) -> Tensor:
    """(B,) labels -> (B,) the labels that the network is told, some or all of them the null label."""
    if not config.is_conditional:
        return torch.full_like(labels, null_label)
    if not is_training or not config.label_dropout:
        return labels
    is_hidden = torch.rand(labels.shape, device=labels.device) < config.label_dropout
    return torch.where(is_hidden, null_label, labels)


def guided(conditional: Tensor, unconditional: Tensor, scale: float | Tensor) -> Tensor:
    """Away from what the network says without the label, towards what it says with it; 1 is `conditional`."""
    return unconditional + scale * (conditional - unconditional)


def ramped(scale: float, ramp: Ramp, progress: float) -> float:
    """The scale in force when the share `progress` of the sampling is done: from 1 to `scale`, later for a larger power."""
    if ramp == "constant":
        return scale
    return 1 + (scale - 1) * (1 - math.cos(math.pi * progress**ramp)) / 2

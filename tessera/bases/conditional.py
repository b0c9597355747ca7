"""Priors that are conditioned on a label: label dropout in training, the null label, guidance in sampling.

Sources: Ho and Salimans, "Classifier-Free Diffusion Guidance", 2022, arXiv:2207.12598, algorithm 1 and equation 6; the ramp
of the guidance scale: Weber et al. (MaskBit), 2024, arXiv:2409.16211, and Yu et al. (RAR), 2024, arXiv:2411.00776.
Differs from them: the scale is s = 1 + w, so that 1 is the conditional model and 0 the unconditional one.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated, Literal

import torch
from pydantic import AfterValidator, Field
from torch import Tensor, nn
from torch.optim import Optimizer

from tessera.bases import middle
from tessera.bases.guide import Autoguidance, Guide
from tessera.bases.initialization import Initialization
from tessera.bases.middle import Alignment, Dispersive
from tessera.bases.optimization import optimizers_for
from tessera.components import AddedKey, ConditionConfig, Fraction, Params, load, sets
from tessera.contracts import TokenBatch, TokenSpec
from tessera.nn.cross_attention import attend


def rising(ends: tuple[float, float]) -> tuple[float, float]:
    """The two ends of an interval. Raises ValueError unless the first is the lower one."""
    if not ends[0] < ends[1]:
        raise ValueError(f"[{ends[0]:g}, {ends[1]:g}] is no interval: expected the lower end first, then a higher one")
    return ends


Ramp = Literal["constant"] | Annotated[float, Field(ge=0.01, le=100)]


class GuidedSampling(Params):
    """How a conditional prior is guided."""

    guidance_scale: Annotated[float, Field(ge=0, le=100)] = 1.0  # uncond + scale * (cond - uncond); 1: off
    autoguidance_scale: AddedKey[Autoguidance] = None  # guide + scale * (prior - guide), bases/autoguidance.py; 1: off


class RampedSampling(GuidedSampling):
    """Of priors that draw one token after another, or some at a time."""

    guidance_ramp: Ramp = "constant"  # or the power of the cosine by which the scale rises from 1

    def scale_at(self, progress: float) -> float:
        """The guidance scale when this share of the sampling is done."""
        return ramped(self.guidance_scale, self.guidance_ramp, progress)


class IntervalSampling(GuidedSampling):
    """Of priors that take noise away. The interval: Kynkaanniemi et al., 2024, arXiv:2404.07724."""

    # times within which guidance acts: 1 / (1 + sigma)
    guidance_interval: Annotated[tuple[Fraction, Fraction], AfterValidator(rising)] = (0.0, 1.0)

    def is_guided_at(self, time: float) -> bool:
        low, high = self.guidance_interval
        return self.guidance_scale != 1.0 and low <= time <= high


class PriorSettings(Params):
    """The settings of every prior."""

    num_views: Annotated[int, Field(ge=1)] | None = None  # of each image, to train on; 1: the image itself, None: all
    init: AddedKey[Initialization] = None  # begin from these weights


class ConditionalConfig(PriorSettings):
    """The settings of every prior that is conditioned on a label."""

    label_dropout: Fraction = 0.1  # share of the labels replaced by the null label: what guidance needs
    is_conditional: bool = True  # False: every label is the null label
    condition: AddedKey[ConditionConfig] = None  # what is told of an image in the place of its label
    guide: AddedKey[Guide] = None  # a worse version of the prior, kept beside it: what autoguidance leads away from
    alignment: AddedKey[Alignment] = None  # middle features tell what another network, or the tokenizer, sees
    dispersive: AddedKey[Dispersive] = None  # middle features of different images lie apart


class ConditionalModel(nn.Module):
    """A network with one label more than there are classes: the null label, which says nothing of the class."""

    def __init__(self, config: ConditionalConfig, spec: TokenSpec):
        super().__init__()
        self.config, self.spec = config, spec
        self.null_label = spec.num_classes
        if sets(config, "alignment"):
            middle.require(config)
        if sets(config, "dispersive"):
            middle.require(config)

    def null_labels(self, labels: Tensor) -> Tensor:
        """(B,) labels -> (B,) null labels; of other conditions their own null."""
        if sets(self.config, "condition"):
            return null_of(labels, self)
        return torch.full_like(labels, self.null_label)

    def condition(self, labels: Tensor) -> Tensor:
        """(B,) labels -> (B,) what the network is conditioned on: null labels where the prior is not conditional."""
        return labels if self.config.is_conditional else self.null_labels(labels)


def null_of(told: Tensor, model: ConditionalModel) -> Tensor:
    """(B,) labels -> (B,) null labels; another condition (B, ...) -> its own null, or what `steering_from` names."""
    if getattr(model, "steered_from", None) is not None:
        return model.steered_from.expand(len(told), -1)
    if told.ndim == 1:
        return torch.full_like(told, model.null_label)
    return load("conditions", model.config.condition.kind).null(told)


@contextmanager
def steering_from(model: ConditionalModel, told: Tensor | None) -> Iterator[None]:
    """Inside, guidance leads away from this condition, (1, ...), in the place of the null one: a negative caption."""
    model.steered_from = told
    try:
        yield
    finally:
        model.steered_from = None


def dropped_of(told: Tensor, objective: "ConditionalObjective") -> Tensor:
    """Ho and Salimans, algorithm 1, of labels (B,) or of another condition (B, ...), of which parts are left out too."""
    rate = objective.config.label_dropout
    if not objective.training or not rate:
        return told
    is_dropped = torch.rand(len(told), device=told.device) < rate
    if told.ndim == 1:
        return torch.where(is_dropped, objective.model.null_label, told)
    part = load("conditions", objective.config.condition.kind)
    return torch.where(is_dropped.unsqueeze(1), part.null(told), part.partly_dropped(told, rate))


def either_dropped(told: Tensor, null: Tensor, rate: float) -> Tensor:
    """(B, 1 + ...) a label and what is told beside it, and null ones -> a share `rate` of them without what is beside the
    label, and another one without the label.

    Brooks et al. (InstructPix2Pix), 2023, arXiv:2211.09800, section 3.2.1: so that each may be told alone.
    """
    draws = torch.rand(len(told), 1, device=told.device)
    is_label = torch.arange(told.shape[1], device=told.device) == 0
    label_alone, without_label = draws < rate, (draws >= rate) & (draws < 2 * rate)
    return torch.where((label_alone & ~is_label) | (without_label & is_label), null, told)


def require_conditional(config: Params) -> None:
    """Of a prior with a condition: raises ValueError where nothing would be told."""
    if not config.is_conditional:
        raise ValueError(
            "is_conditional is false, and there is a condition: leave out one of them, as nothing would be told"
        )


def tell(body: nn.Module, config: ConditionalConfig, spec: TokenSpec) -> None:
    """Put what embeds the condition in the place of a body's `label_embedding`, and let its layers attend to the sequence that
    the condition gives beside, if it does. Raises ValueError where nothing would be told.
    """
    require_conditional(config)
    network = load("conditions", config.condition.kind).Network(config.condition, spec, body.label_embedding)
    if network.context is not None:
        attend(body, network.context)
    body.label_embedding = network


class ConditionalObjective(nn.Module):
    """A loss in one phase, under label dropout. A prior defines `loss`; its Config has `training`."""

    phases = ("prior",)

    def __init__(self, model: ConditionalModel, config: ConditionalConfig):
        super().__init__()
        self.model, self.config = model, config

    def forward(self, batch: TokenBatch, phase: str, step: int) -> dict[str, Tensor]:
        """The loss and further terms to plot, scalars."""
        if sets(self.config, "alignment"):
            return middle.with_terms(self, batch, step)
        if sets(self.config, "dispersive"):
            return middle.with_terms(self, batch, step)
        return self.loss(batch.tokens, self.dropped(batch.labels), step)

    def loss(self, tokens: Tensor, labels: Tensor, step: int) -> dict[str, Tensor]:
        """TokenBatch.tokens, (B,) labels up to and including null_label -> terms, among them "loss"."""
        raise NotImplementedError("the objective of each prior defines its loss")

    def dropped(self, labels: Tensor) -> Tensor:
        """Ho and Salimans, algorithm 1: in training a share `label_dropout` of the labels becomes the null label."""
        if sets(self.config, "condition"):
            return dropped_of(labels, self)
        if not self.config.is_conditional or not self.training or not self.config.label_dropout:
            return self.model.condition(labels)
        is_dropped = torch.rand(labels.shape, device=labels.device) < self.config.label_dropout
        return torch.where(is_dropped, self.model.null_label, labels)

    def optimizers(self) -> dict[str, list[Optimizer]]:
        if sets(self.config, "alignment"):  # with the head, which is the objective's own
            return {"prior": optimizers_for(self, self.config.training)}
        return {"prior": optimizers_for(self.model, self.config.training)}


def guided(conditional: Tensor, unconditional: Tensor, scale: float | Tensor) -> Tensor:
    """Ho and Salimans, equation 6, with scale = 1 + w: a scale of 1 gives `conditional`."""
    return unconditional + scale * (conditional - unconditional)


def ramped(scale: float, ramp: Ramp, progress: float) -> float:
    """The guidance scale when the share `progress` of the sampling is done, by a power cosine from 1 to `scale`.

    Weber et al. and Yu et al.; the larger the power `ramp`, the later it rises.
    """
    if ramp == "constant":
        return scale
    return 1 + (scale - 1) * (1 - math.cos(math.pi * progress**ramp)) / 2

"""Masked prior: a transformer that sees some of the indices of an image and predicts the others, all at once.

Sampling starts from masks alone and fills a growing number of places per step.

Sources: Chang et al. (MaskGIT), 2022, arXiv:2202.04200, section 3; the arccos schedule and the ramp of the guidance: Weber et
al. (MaskBit), 2024, arXiv:2409.16211; the Halton order: Besnier et al., 2025, arXiv:2503.17076; classifier-free
guidance: Ho and Salimans 2022, arXiv:2207.12598; the bound of the likelihood: Uria et al., 2014, arXiv:1310.1757, and
Hoogeboom et al., 2021, arXiv:2110.02037, section 3.
Differs from them: the body is nn/transformer.py; the label is added to every place, which needs neither a place of its own
nor the weights of adaptive norms; each step places at least one index, so that more steps than places are as many as places.

Shape letters: B batch, L = h * w places, K codebook size; index K is the mask.
"""

import math
from functools import cache
from typing import Annotated, Literal, NamedTuple

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from tessera.bases.autoguidance import as_guidance, away, guide_of
from tessera.bases.conditional import (
    ConditionalConfig,
    ConditionalModel,
    ConditionalObjective,
    RampedSampling,
    guided,
    tell,
)
from tessera.bases.optimization import PriorTraining
from tessera.bases.transformer import TransformerConfig
from tessera.components import Fraction, Steps, sets
from tessera.contracts import Learns, TokenSpec
from tessera.nn.gumbel import gumbel_noise, uniform
from tessera.nn.transformer import Transformer

LEARNS: Learns = "indices"
MaskSchedule = Literal["arccos", "cosine"]
BOUND_DRAWS = 8  # network calls for the bits of a batch
EVIDENCE_ORDERS = 2  # random orders in which known indices are read


class Config(TransformerConfig, ConditionalConfig):
    kind: Literal["masked"] = "masked"
    dropout: Fraction = 0.1
    mask_schedule: MaskSchedule = "arccos"  # how the share of masked places is drawn
    label_smoothing: Annotated[float, Field(ge=0, lt=1)] = 0.1  # of the indices, in training alone
    training: PriorTraining


class Sampling(RampedSampling):
    decoding_steps: Steps = 8
    mask_schedule: MaskSchedule = "arccos"  # how many places stay masked after each step
    temperature: Annotated[float, Field(ge=0.01, le=100)] = 1.0
    order: Literal["confidence", "halton", "random"] = "confidence"  # which places are kept first
    choice_temperature: Annotated[float, Field(ge=0, le=1000)] = 2.0  # with confidence: of its noise, annealed to 0


def mask_ratio(schedule: MaskSchedule, progress: Tensor) -> Tensor:
    """The share of masked places at `progress` in [0, 1], from 1 to 0: MaskGIT, section 3.3 (cosine), or MaskBit (arccos)."""
    if schedule == "arccos":
        return torch.arccos(progress) * (2 / math.pi)
    return torch.cos(progress * (math.pi / 2))


UNMASKED = -1  # no index: in the place of what the loss leaves out


@cache
def placed_per_step(num_places: int, steps: int, schedule: MaskSchedule) -> tuple[int, ...]:
    """MaskGIT, section 3.2: how many masked places each step fills, at least one; there are no more steps than places."""
    steps = min(steps, num_places)
    masked, placed = num_places, []
    for step in range(1, steps + 1):
        wanted = int(mask_ratio(schedule, torch.tensor(step / steps, dtype=torch.float64)) * num_places)
        left = min(max(wanted, steps - step), masked - 1)  # each step to come fills a place, and so does this one
        placed.append(masked - left)
        masked = left
    return tuple(placed)


class Plan(NamedTuple):
    """What each of the S steps does with each image; computed on the host, and sent to the device once."""

    placed: Tensor  # (S, B) how many places are filled
    temperatures: Tensor  # (S, B, 1) of the noise of the confidence
    scales: Tensor  # (S, B, 1, 1) of the guidance
    is_guided: list[bool]  # (S,) whether some scale is not 1, on the host

    @classmethod
    def of(cls, num_masked: list[int], sampling: Sampling, device: torch.device) -> "Plan":
        """num_masked: of each image; one with fewer than others is ready before them."""
        plans = [placed_per_step(number, sampling.decoding_steps, sampling.mask_schedule) for number in num_masked]
        steps = range(max(map(len, plans)))
        placed = [[plan[step] if step < len(plan) else 0 for plan in plans] for step in steps]
        temperature = sampling.choice_temperature
        temperatures = [[temperature * (1 - (step + 1) / max(1, len(plan))) for plan in plans] for step in steps]
        scales = [[sampling.scale_at(min(1.0, step / max(1, len(plan)))) for plan in plans] for step in steps]
        shape = (len(steps), len(plans), 1)  # told, as there may be no step
        return cls(
            torch.tensor(placed, device=device),
            torch.tensor(temperatures, device=device).clamp_min(0).view(shape),
            torch.tensor(scales, device=device).view(*shape, 1),
            [any(scale != 1 for scale in each) for each in scales],
        )


def halton_order(height: int, width: int) -> Tensor:
    """Besnier et al.: (h * w,) every place once, in the order in which the points of the Halton sequence of bases 2 and 3
    first fall on it."""
    order: dict[int, None] = {}
    number = 0
    while len(order) < height * width:
        number += 1
        row, column = int(_radical_inverse(number, 2) * height), int(_radical_inverse(number, 3) * width)
        order.setdefault(row * width + column)
    return torch.tensor(list(order))


def _radical_inverse(number: int, base: int) -> float:
    """The digits of `number` mirrored at the radix point: 6 = 110 in base 2 gives 0.011."""
    value, unit = 0.0, 1 / base
    while number:
        number, digit = divmod(number, base)
        value += digit * unit
        unit /= base
    return value


class Model(ConditionalModel):
    reads_all_known = True  # `complete` draws each index given all that are known

    def __init__(self, config: Config, spec: TokenSpec):
        super().__init__(config, spec)
        assert spec.codebook_size is not None
        self.grid = spec.index_grid
        self.mask_index = spec.codebook_size
        length = self.grid[0] * self.grid[1]
        self.index_embedding = nn.Embedding(spec.codebook_size + 1, config.width)
        self.label_embedding = nn.Embedding(spec.num_classes + 1, config.width)
        self.position = nn.Parameter(torch.randn(length, config.width) * 0.02)
        self.transformer = Transformer(
            config.width, config.depth, config.heads, self.grid, config.dropout, is_causal=False
        )
        self.head = nn.Linear(config.width, spec.codebook_size)
        for layer in (self.index_embedding, self.label_embedding, self.head):
            nn.init.normal_(layer.weight, std=0.02)
        if sets(config, "condition"):
            tell(self, config, spec)

    def forward(self, indices: Tensor, labels: Tensor) -> Tensor:
        """(B, L) indices up to and including mask_index, (B,) labels up to and including null_label -> (B, L, K) logits."""
        x = self.index_embedding(indices) + self.position + self.label_embedding(labels).unsqueeze(1)
        return self.head(self.transformer(x))

    @torch.no_grad()
    def bits(self, tokens: Tensor, labels: Tensor, generator: torch.Generator) -> Tensor:
        """(B, *index_grid) indices, (B,) labels -> (B,) an unbiased estimate of an upper bound of -log2 probability.

        Hoogeboom et al., section 3: the mean over orders of filling one place after the other, a bound by Jensen's
        inequality. It is L times the mean over m = 1..L of the mean cost of one of m masked places given the others. m is
        spread evenly over BOUND_DRAWS draws of an image; which places are masked is random.
        """
        labels = self.condition(labels)
        indices = tokens.flatten(1)
        batch, length = indices.shape
        nats = torch.zeros(batch, device=indices.device)
        offset = uniform(nats, generator)
        everywhere = torch.ones_like(indices, dtype=torch.bool)
        for number in range(BOUND_DRAWS):
            masked = 1 + ((number + offset) / BOUND_DRAWS * length).long().clamp_max(length - 1)
            is_masked = first(uniform(indices, generator), everywhere, masked)
            logits = self(torch.where(is_masked, self.mask_index, indices), labels).float()
            cost = -logits.log_softmax(dim=2).gather(2, indices.unsqueeze(2)).squeeze(2)
            nats += (cost * is_masked).sum(dim=1) / is_masked.sum(dim=1)
        return nats * (length / BOUND_DRAWS / math.log(2))

    @torch.no_grad()
    def evidence(self, indices: Tensor, is_known: Tensor, labels: Tensor, generator: torch.Generator) -> Tensor:
        """(B, *index_grid) indices and which are known -> (B,) nats: an estimate of the log-probability of the known ones.

        They are read in a random order, in pieces that grow with what was read, each given the pieces before.
        """
        labels = self.condition(labels)
        indices, is_known = indices.flatten(1), is_known.flatten(1)
        number = int(is_known.sum(dim=1).max())
        nats = torch.zeros(len(indices), device=indices.device)
        for _ in range(EVIDENCE_ORDERS):
            key = uniform(indices, generator)
            rank = key.masked_fill(~is_known, 2.0).argsort(dim=1).argsort(dim=1)
            begin = 0
            while begin < number:
                end = begin + max(1, begin // 2)
                logits = self(torch.where(is_known & (rank < begin), indices, self.mask_index), labels).float()
                found = logits.log_softmax(dim=2).gather(2, indices.unsqueeze(2)).squeeze(2)
                nats += (found * (is_known & (rank >= begin) & (rank < end))).sum(dim=1)
                begin = end
        return nats / EVIDENCE_ORDERS

    def sample(self, labels: Tensor, sampling: Sampling, generator: torch.Generator) -> Tensor:
        """(B,) labels -> (B, *index_grid) indices."""
        batch, length = len(labels), self.grid[0] * self.grid[1]
        indices = torch.full((batch, length), self.mask_index, device=labels.device)
        return self._fill(indices, [length] * batch, labels, sampling, generator)

    @torch.no_grad()
    def complete(
        self,
        indices: Tensor,
        is_known: Tensor,
        labels: Tensor,
        sampling: Sampling,
        generator: torch.Generator,
    ) -> Tensor:
        """MaskGIT, section 3.2: keep the (B, *index_grid) indices where is_known and draw the others, given those."""
        is_known = is_known.flatten(1)
        indices = torch.where(is_known, indices.flatten(1), self.mask_index)
        return self._fill(indices, (~is_known).sum(dim=1).tolist(), labels, sampling, generator)

    @torch.no_grad()
    def _fill(
        self, indices: Tensor, num_masked: list[int], labels: Tensor, sampling: Sampling, generator: torch.Generator
    ) -> Tensor:
        """(B, L) indices, of which so many of each image are masked -> (B, *index_grid), all drawn.

        What the steps do is planned before the first one: within the loop the host neither asks the device nor sends to it.
        """
        labels = self.condition(labels)
        plan = Plan.of(num_masked, sampling, indices.device)
        precedence = self._precedence(indices, sampling, generator)
        if sets(sampling, "autoguidance_scale"):
            guide, leading = guide_of(self, sampling), Plan.of(num_masked, as_guidance(sampling), indices.device)
        for step in range(len(plan.placed)):
            scales = plan.scales[step] if plan.is_guided[step] and self.config.is_conditional else None
            logits = self._guided(indices, labels, scales) / sampling.temperature
            if sets(sampling, "autoguidance_scale"):
                good = logits if scales is None else self(indices, labels).float() / sampling.temperature
                bad = guide(indices, labels).float() / sampling.temperature
                logits = logits + away(good, bad, leading.scales[step])
            drawn = (logits + gumbel_noise(logits, generator)).argmax(dim=2)  # (B, L)
            if sampling.order == "confidence":
                confidence = logits.log_softmax(dim=2).gather(2, drawn.unsqueeze(2)).squeeze(2)
                precedence = confidence + gumbel_noise(confidence, generator) * plan.temperatures[step]
            chosen = first(precedence, indices == self.mask_index, plan.placed[step])
            indices = torch.where(chosen, drawn, indices)
        return indices.view(-1, *self.grid)

    def _precedence(self, indices: Tensor, sampling: Sampling, generator: torch.Generator) -> Tensor:
        """(B, L): of two masked places the one with the larger number is filled first."""
        if sampling.order == "halton":
            rank = torch.empty(indices.shape[1])
            rank[halton_order(*self.grid)] = -torch.arange(indices.shape[1], dtype=rank.dtype)
            return rank.to(indices.device).expand(indices.shape)
        if sampling.order == "random":
            return uniform(indices, generator)
        return torch.zeros(indices.shape, device=indices.device)  # each step has its own confidence

    def _guided(self, indices: Tensor, labels: Tensor, scales: Tensor | None) -> Tensor:
        """(B, L, K) logits; with guidance scales (B, 1, 1) by a second pass, without the labels."""
        if scales is None:
            return self(indices, labels).float()
        both = self(torch.cat([indices, indices]), torch.cat([labels, self.null_labels(labels)])).float()
        conditional, unconditional = both.chunk(2)
        return guided(conditional, unconditional, scales)


def first(precedence: Tensor, is_open: Tensor, number: Tensor) -> Tensor:
    """(B, L) whether a place is among the `number` (B,) open ones with the largest precedence."""
    order = precedence.masked_fill(~is_open, -torch.inf).argsort(dim=1, descending=True, stable=True)
    return (order.argsort(dim=1) < number.unsqueeze(1)) & is_open


class Objective(ConditionalObjective):
    def loss(self, tokens: Tensor, labels: Tensor, step: int) -> dict[str, Tensor]:
        """MaskGIT, section 3.1, equation 1: the cross-entropy of masked indices, a mean over those of the batch."""
        indices = tokens.flatten(1)  # (B, L)
        is_masked = self._masks(indices)
        logits = self.model(torch.where(is_masked, self.model.mask_index, indices), labels)
        if logits.device.type == "cpu":
            logits, truth = logits[is_masked].float(), indices[is_masked]
        else:  # how many are masked would be waited for: the others are gone through as well, and left out
            logits, truth = logits.float().flatten(0, 1), torch.where(is_masked, indices, UNMASKED).flatten()
        smoothing = self.config.label_smoothing if self.training else 0.0
        loss = F.cross_entropy(logits, truth, label_smoothing=smoothing, ignore_index=UNMASKED)
        return {"loss": loss, "accuracy": (logits.argmax(dim=1) == truth).sum() / is_masked.sum()}

    def _masks(self, indices: Tensor) -> Tensor:
        """(B, L) whether a place is masked: a random number of each row, at least one."""
        ratio = mask_ratio(self.config.mask_schedule, torch.rand(len(indices), device=indices.device))
        number = (ratio * indices.shape[1]).ceil().clamp_min(1)
        return first(
            torch.rand(indices.shape, device=indices.device), torch.ones_like(indices, dtype=torch.bool), number
        )

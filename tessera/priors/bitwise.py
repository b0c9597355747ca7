"""Bitwise prior: a causal transformer over the indices of an image, whose head draws the digits of an index, a few at a time.

An index is written with the digits of `digits`, in mixed radix: bits, say, or the levels of fsq. Neither what the transformer
reads nor what the head predicts then has a table as large as the codebook: 2**20 codes cost what 20 bits cost.

Sources: Yu et al. (BAR), "Autoregressive Image Generation with Masked Bit Modeling", 2026, arXiv:2602.09024; the body and its
guidance as in priors/autoregressive.py; the bound of the likelihood: Uria et al., 2014, arXiv:1310.1757, and Hoogeboom et
al., 2021, arXiv:2110.02037, section 3.
Differs from BAR: digits of any sizes, chosen by params. Its masking ratios are logit-normal around a half, its loss is the mean
over masked bits; here each number of hidden digits is as probable as any other, and weights make the loss a bound of
-log p (`Objective.loss`). Digits are drawn in a random order, unless `order: confidence`, which is theirs, is asked for, in
steps of as many digits each. One place of the sequence is one index, and no patch of them. What is said of BAR's masking and
order is read from copies of its authors' code.

The sequence is [label, index 0, ..., index L-2]; place i predicts index i, in raster order.
Shape letters: B batch, L = h * w places, N width, J digits of an index, S all values of all digits, V of the largest digit.
"""

import math
from collections.abc import Iterator
from typing import Annotated, Literal

import torch
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
from tessera.nn.cross_attention import told_decoder
from tessera.nn.decoding import decoder
from tessera.nn.digits import DigitEmbedding, DigitHead, Radix, prime_factors
from tessera.nn.gumbel import gumbel_noise, uniform
from tessera.nn.steps import Number, element, put, repeat
from tessera.nn.transformer import Transformer

LEARNS: Learns = "indices"
Digit = Annotated[int, Field(ge=2, le=2**16)]


class Config(TransformerConfig, ConditionalConfig):
    kind: Literal["bitwise"] = "bitwise"
    dropout: Fraction = 0.1
    token_dropout: Fraction = 0.0  # share of the indices read that are replaced by random ones
    # values of each digit of an index, the least significant first; null: the prime factors of the codebook's size
    digits: Annotated[tuple[Digit, ...], Field(min_length=1, max_length=64)] | None = None
    head_depth: Annotated[int, Field(ge=1, le=64)] = 2  # layers of the head
    training: PriorTraining


class Sampling(RampedSampling):
    head_steps: Steps = 4  # in which the digits of an index are drawn; with one for each digit nothing is approximated
    temperature: Annotated[float, Field(ge=0.01, le=100)] = 1.0
    order: Literal["random", "confidence"] = "random"  # which digits are kept first
    choice_temperature: Annotated[float, Field(ge=0, le=1000)] = 2.0  # with confidence: of its noise, falls to 0


def digits_of(config: Config, codebook_size: int) -> tuple[int, ...]:
    """Raises ValueError, in a sentence, unless they name each code once."""
    fitting = prime_factors(codebook_size)
    if config.digits is None:
        return fitting
    if math.prod(config.digits) != codebook_size:
        raise ValueError(
            f"digits {list(config.digits)} tell {math.prod(config.digits)} codes apart, and the codebook has {codebook_size}: "
            f"expected digits whose product is {codebook_size}, such as {list(fitting)}; or leave digits out"
        )
    return config.digits


class Model(ConditionalModel):
    reads_all_known = False  # `complete` draws an index given those before it alone

    def __init__(self, config: Config, spec: TokenSpec):
        super().__init__(config, spec)
        assert spec.codebook_size is not None
        sizes = digits_of(config, spec.codebook_size)
        self.grid = spec.index_grid
        length = self.grid[0] * self.grid[1]
        self.radix = Radix(sizes)
        self.digit_embedding = DigitEmbedding(sizes, config.width, std=0.02)
        self.label_embedding = nn.Embedding(spec.num_classes + 1, config.width)
        self.position = nn.Parameter(torch.randn(length, config.width) * 0.02)
        self.transformer = Transformer(
            config.width, config.depth, config.heads, self.grid, config.dropout, is_causal=True
        )
        self.head = DigitHead(sizes, config.width, config.head_depth, config.dropout)
        nn.init.normal_(self.label_embedding.weight, std=0.02)
        if sets(config, "condition"):
            tell(self, config, spec)

    def forward(self, indices: Tensor, labels: Tensor, is_hidden: Tensor | None = None) -> Tensor:
        """(B, L) indices, (B,) labels up to and including null_label -> (B, L, S) logits of the digits of each index.

        Place i sees the indices before i, and of index i the digits that are not hidden; is_hidden: (B, L, J), None: all are.
        """
        digits = self.radix.digits(indices)
        if is_hidden is None:
            is_hidden = torch.ones_like(digits, dtype=torch.bool)
        return self.head(self.thoughts(indices, labels), digits, is_hidden)

    def thoughts(self, indices: Tensor, labels: Tensor) -> Tensor:
        """(B, L) indices, (B,) labels -> (B, L, N) what the transformer makes, at each place, of the indices before it."""
        start = self.label_embedding(labels).unsqueeze(1)  # (B, 1, N)
        x = torch.cat([start, self.digit_embedding(self.radix.digits(indices[:, :-1]))], dim=1)
        return self.transformer(x + self.position)

    def digit_log_probs(self, thoughts: Tensor, digits: Tensor, is_hidden: Tensor) -> Tensor:
        """(B, L, N), (B, L, J), (B, L, J) -> (B, L, J) nats of each digit given those that are not hidden."""
        logits = self.head.by_digit(self.head(thoughts, digits, is_hidden).float())
        return logits.log_softmax(dim=-1).gather(-1, digits.unsqueeze(-1)).squeeze(-1)

    def _index_log_probs(self, indices: Tensor, labels: Tensor, rank: Tensor) -> Tensor:
        """(B, L) nats of each index given those before it, its digits drawn one by one in the order of their rank (..., J)."""
        thoughts, digits = self.thoughts(indices, labels), self.radix.digits(indices)
        rank = rank.expand(digits.shape)
        nats = torch.zeros(indices.shape, device=indices.device)
        for number in range(digits.shape[2]):
            found = self.digit_log_probs(thoughts, digits, rank >= number)
            nats += (found * (rank == number)).sum(dim=2)
        return nats

    @torch.no_grad()
    def bits(self, tokens: Tensor, labels: Tensor, generator: torch.Generator) -> Tensor:
        """(B, *index_grid) indices, (B,) labels -> (B,) an unbiased estimate of an upper bound of -log2 probability.

        Hoogeboom et al., section 3, of what is drawn with a head step for each digit, in a random order: the mean over orders
        is a bound by Jensen's inequality, and one order is drawn for each index. Exact where an index has one digit.
        """
        indices = tokens.flatten(1)
        keys = uniform(self.radix.digits(indices), generator)
        nats = self._index_log_probs(indices, self.condition(labels), keys.argsort(dim=2).argsort(dim=2))
        return -nats.sum(dim=1) / math.log(2)

    @torch.no_grad()
    def log_probs(self, indices: Tensor, labels: Tensor) -> Tensor:
        """(B, *index_grid) nats: the log-probability of each index given all before it in raster order.

        Exact if its digits are drawn one after the other, the least significant first; samples have other orders, or fewer
        steps, for which this stands.
        """
        flat = indices.flatten(1)
        rank = torch.arange(len(self.radix.sizes), device=indices.device)
        return self._index_log_probs(flat, self.condition(labels), rank).view(indices.shape)

    @torch.no_grad()
    def evidence(self, indices: Tensor, is_known: Tensor, labels: Tensor, generator: torch.Generator) -> Tensor:
        """(B, *index_grid) indices and which are known -> (B,) nats: the log-probability of the known ones, by `log_probs`.

        Each is given all indices before it, drawn ones too: the importance weight that turns draws of `complete`, which ignore
        the known ones behind them, into draws from the distribution given all that are known. Nothing is drawn.
        """
        return (self.log_probs(indices, labels) * is_known).flatten(1).sum(dim=1)

    def sample(self, labels: Tensor, sampling: Sampling, generator: torch.Generator) -> Tensor:
        """(B,) labels -> (B, *index_grid) indices."""
        indices = torch.zeros(len(labels), *self.grid, dtype=torch.long, device=labels.device)
        return self.complete(indices, torch.zeros_like(indices, dtype=torch.bool), labels, sampling, generator)

    @torch.no_grad()
    def complete(
        self, indices: Tensor, is_known: Tensor, labels: Tensor, sampling: Sampling, generator: torch.Generator
    ) -> Tensor:
        """Keep the (B, *index_grid) indices where is_known and draw the others in raster order, each given those before it."""
        drawing = Drawing(self, indices.flatten(1).clone(), is_known.flatten(1), labels, sampling, generator)
        repeat(drawing.step, drawing.indices.shape[1], indices.device, generator)
        return drawing.indices.view(-1, *self.grid)


class Reading:
    """A model, the prior itself or its guide, as it reads the sequences that are being drawn, with a memory of its own."""

    def __init__(self, model: Model, labels: Tensor):
        """(B,) what it is conditioned on."""
        self.model = model
        self.x = model.label_embedding(labels)  # (B, N): what the next step reads
        self.decoder = decoder(model.transformer, like=self.x)
        if sets(model.config, "condition"):
            self.decoder = told_decoder(model.transformer, self.decoder, like=self.x)
        self.thought = torch.empty_like(self.x)

    def think(self, number: Number) -> None:
        self.thought = self.decoder.step(self.x + element(self.model.position, number), number)

    def logits(self, digits: Tensor, is_hidden: Tensor) -> Tensor:
        """(B, J) digits of the present index -> (B, S)"""
        return self.model.head(self.thought, digits, is_hidden).float()

    def read(self, digits: Tensor) -> None:
        self.x.copy_(self.model.digit_embedding(digits))


class Drawing:
    """Sequences of indices being drawn, and the step that draws one index of each.

    Steps differ by their number alone, and on a GPU none waits for it: they can be one CUDA graph (nn/steps.py).
    """

    def __init__(
        self,
        model: Model,
        indices: Tensor,
        is_known: Tensor,
        labels: Tensor,
        sampling: Sampling,
        generator: torch.Generator,
    ):
        """(B, L) indices, which are written, and which of them are known."""
        self.model, self.sampling, self.generator = model, sampling, generator
        self.indices, self.is_known = indices, is_known
        self.is_guided = sampling.guidance_scale != 1.0 and model.config.is_conditional
        labels = model.condition(labels)
        if sets(sampling, "autoguidance_scale"):
            self.guide = Reading(guide_of(model, sampling), labels)
            self.scales_of_guide = self._scales(as_guidance(sampling))
        if self.is_guided:  # a second half of the batch, without the labels
            labels = torch.cat([labels, model.null_labels(labels)])
            self.scales = self._scales(sampling)
        self.own = Reading(model, labels)

    def _scales(self, sampling: Sampling) -> Tensor:
        """(L,) the scale of guidance at each index."""
        length = self.indices.shape[1]
        return torch.tensor(
            [sampling.scale_at(number / length) for number in range(length)], device=self.indices.device
        )

    def step(self, number: Number) -> None:
        """Draw the index at `number` of each sequence, unless it is known, and embed it for the next step."""
        radix = self.model.radix
        self.own.think(number)
        if sets(self.sampling, "autoguidance_scale"):
            self.guide.think(number)
        drawn = radix.numbers(self._digits(number)).unsqueeze(1)
        drawn = torch.where(element(self.is_known, number, dim=1), element(self.indices, number, dim=1), drawn)
        put(self.indices, number, drawn, dim=1)
        digits = radix.digits(drawn.squeeze(1))
        self.own.read(self._of_both_halves(digits))
        if sets(self.sampling, "autoguidance_scale"):
            self.guide.read(digits)

    def _digits(self, number: Number) -> Tensor:
        """(B, J) the digits of the index at `number`, drawn by the head in its steps."""
        digits = torch.zeros(
            len(self.indices), len(self.model.radix.sizes), dtype=torch.long, device=self.indices.device
        )
        is_hidden = torch.ones_like(digits, dtype=torch.bool)
        precedence = uniform(digits, self.generator)
        for count, noise in steps_of(digits.shape[1], self.sampling):
            logits = self._logits(digits, is_hidden, number)
            drawn = gumbel_noise(logits, self.generator).add_(logits).argmax(dim=2)
            if self.sampling.order == "confidence":
                precedence = logits.log_softmax(dim=2).gather(2, drawn.unsqueeze(2)).squeeze(2)
                precedence = precedence + noise * gumbel_noise(precedence, self.generator)
            first = precedence.masked_fill(~is_hidden, -torch.inf).topk(count, dim=1).indices
            digits = digits.scatter(1, first, drawn.gather(1, first))
            is_hidden = is_hidden.scatter(1, first, False)
        return digits

    def _logits(self, digits: Tensor, is_hidden: Tensor, number: Number) -> Tensor:
        """(B, J, V) guided, and over the temperature."""
        logits = self.own.logits(self._of_both_halves(digits), self._of_both_halves(is_hidden))
        if sets(self.sampling, "autoguidance_scale"):
            bad = self.guide.logits(digits, is_hidden)
            led = away(logits[: len(digits)], bad, element(self.scales_of_guide, number))
        if self.is_guided:
            logits = guided(*logits.chunk(2), element(self.scales, number))
        if sets(self.sampling, "autoguidance_scale"):
            logits = logits + led
        return self.model.head.by_digit(logits / self.sampling.temperature)

    def _of_both_halves(self, x: Tensor) -> Tensor:
        return torch.cat([x, x]) if self.is_guided else x


def steps_of(num_digits: int, sampling: Sampling) -> Iterator[tuple[int, float]]:
    """Of each step of the head, how many digits it draws and the temperature of the confidence; no more steps than digits."""
    steps = min(sampling.head_steps, num_digits)
    for step in range(steps):
        count = num_digits * (step + 1) // steps - num_digits * step // steps
        yield count, sampling.choice_temperature * (1 - (step + 1) / steps)


class Objective(ConditionalObjective):
    def loss(self, tokens: Tensor, labels: Tensor, step: int) -> dict[str, Tensor]:
        """Hoogeboom et al., section 3: a bound of the mean -log p of an index given those before it, in nats.

        Of each index m digits are hidden, m of 1 to J and the set M of them by chance, and the loss is J times their mean
        cross-entropy, so that in the mean over m and M

            -log p(k) <= mean over orders of sum_j -log p(digit j | digits before j) = E_m E_M (J / m) sum_{j in M} -log p_j

        as the next digit of a random order is any of those hidden. BAR's plain mean over masked bits bounds nothing, and its
        masking ratios, logit-normal, hide all digits so seldom that weights to make up for it would be in the thousands.
        """
        model, indices = self.model, tokens.flatten(1)  # (B, L)
        read = indices
        if self.training and self.config.token_dropout:
            replaced = torch.rand(indices.shape, device=indices.device) < self.config.token_dropout
            read = torch.where(replaced, torch.randint_like(indices, model.spec.codebook_size), indices)
        digits = model.radix.digits(indices)  # (B, L, J)
        is_hidden, number = hidden_digits(digits)
        logits = model.head.by_digit(model.head(model.thoughts(read, labels), digits, is_hidden).float())
        cost = -logits.log_softmax(dim=-1).gather(-1, digits.unsqueeze(-1)).squeeze(-1)
        loss = ((cost * is_hidden).sum(dim=2) / number).mean() * digits.shape[2]
        is_right = (logits.argmax(dim=-1) == digits) & is_hidden
        return {"loss": loss, "accuracy": is_right.sum() / is_hidden.sum()}


def hidden_digits(digits: Tensor) -> tuple[Tensor, Tensor]:
    """(B, L, J) which digits are hidden, and (B, L) how many: all numbers from 1 to J, and all sets of so many, alike."""
    number = torch.randint(1, digits.shape[2] + 1, digits.shape[:2], device=digits.device)
    rank = torch.rand(digits.shape, device=digits.device).argsort(dim=2).argsort(dim=2)
    return rank < number.unsqueeze(2), number

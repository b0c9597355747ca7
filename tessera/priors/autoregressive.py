"""Autoregressive prior: a causal transformer that predicts the indices of an image one after another, in raster order.

It may be trained in random orders first, on a share of the images that falls to 0 (RAR): it then learns to predict any place
from any others, and can complete an image of which any places are known.

Sources: Esser et al. (VQGAN), 2021, arXiv:2012.09841, section 3.2; Sun et al. (LlamaGen), 2024, arXiv:2406.06525, for the
plain language-model body; classifier-free guidance: Ho and Salimans 2022, arXiv:2207.12598; nucleus sampling: Holtzman et
al. 2019, arXiv:1904.09751; random orders annealed to raster order: Yu et al. (RAR), 2024, arXiv:2411.00776, section 3.2.
Differs from them: each place of the sequence carries the position of the index it predicts, not of the one it reads; with
random orders, which each image draws for itself, it carries both, where RAR adds the predicted one to the read one only then.

The sequence is [label, index 0, ..., index L-2]; place i predicts index i, the i-th of the order.
"""

import math
from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor, nn

from tessera.bases.autoguidance import Reading
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
from tessera.components import Fraction, sets
from tessera.contracts import Learns, TokenSpec
from tessera.nn.cross_attention import told_decoder
from tessera.nn.decoding import decoder
from tessera.nn.gumbel import gumbel_noise
from tessera.nn.steps import Number, element, put, repeat
from tessera.nn.transformer import Transformer

LEARNS: Learns = "indices"


class Config(TransformerConfig, ConditionalConfig):
    kind: Literal["autoregressive"] = "autoregressive"
    dropout: Fraction = 0.1
    token_dropout: Fraction = 0.0  # share of the indices read that are replaced by random ones
    # shares of num_steps between which the share of images read in a random order falls from 1 to 0; (0, 0): raster only
    random_order_until: tuple[Fraction, Fraction] = (0.0, 0.0)
    training: PriorTraining

    @model_validator(mode="after")
    def _orders_are_annealed_forwards(self) -> "Config":
        begin, end = self.random_order_until
        if begin > end:
            raise ValueError(f"random_order_until begins at {begin} and ends before, at {end}; swap them")
        return self

    @property
    def has_random_orders(self) -> bool:
        return self.random_order_until[1] > 0


class Sampling(RampedSampling):
    temperature: Annotated[float, Field(ge=0.01, le=100)] = 1.0
    top_k: Annotated[int, Field(ge=0)] = 0  # keep the k likeliest indices; 0: all
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0  # keep the fewest indices that hold this probability; 1: all


class Model(ConditionalModel):
    def __init__(self, config: Config, spec: TokenSpec):
        super().__init__(config, spec)
        assert spec.codebook_size is not None
        self.grid = spec.index_grid
        length = self.grid[0] * self.grid[1]
        self.index_embedding = nn.Embedding(spec.codebook_size, config.width)
        self.label_embedding = nn.Embedding(spec.num_classes + 1, config.width)
        self.position = nn.Parameter(torch.randn(length, config.width) * 0.02)
        self.read_position = (
            nn.Parameter(torch.randn(length, config.width) * 0.02) if config.has_random_orders else None
        )
        self.transformer = Transformer(
            config.width, config.depth, config.heads, self.grid, config.dropout, is_causal=True
        )
        self.head = nn.Linear(config.width, spec.codebook_size)
        for layer in (self.index_embedding, self.label_embedding, self.head):
            nn.init.normal_(layer.weight, std=0.02)
        if sets(config, "condition"):
            tell(self, config, spec)

    def forward(self, indices: Tensor, labels: Tensor, order: Tensor | None = None) -> Tensor:
        """(B, L) indices, (B,) labels up to and including null_label -> (B, L, K) logits; place i sees indices < i.

        Indices and logits stand in the `order` (B, L) of the sequence: the grid place of each; None is raster order.
        """
        start = self.label_embedding(labels).unsqueeze(1)  # (B, 1, N)
        x = torch.cat([start, self.index_embedding(indices[:, :-1])], dim=1)
        x = x + (self.position if order is None else self.position[order])
        if self.read_position is not None:
            read = self.read_position[:-1] if order is None else self.read_position[order[:, :-1]]
            x = x + F.pad(read, (0, 0, 1, 0))  # the label has no place
        return self.head(self.transformer(x, places=order))

    @torch.no_grad()
    def bits(self, tokens: Tensor, labels: Tensor, generator: torch.Generator) -> Tensor:
        """Esser et al., section 3.2: (B, *index_grid) indices, (B,) labels -> (B,) -log2 of their probability in raster order.

        Exact; nothing is drawn.
        """
        indices = tokens.flatten(1)
        log_probs = self(indices, self.condition(labels)).float().log_softmax(dim=2)
        return -log_probs.gather(2, indices.unsqueeze(2)).sum(dim=(1, 2)) / math.log(2)

    @torch.no_grad()
    def log_probs(self, indices: Tensor, labels: Tensor) -> Tensor:
        """(B, *index_grid) nats: the log-probability of each index given all before it in raster order."""
        if not self.config.is_conditional:
            labels = torch.full_like(labels, self.null_label)
        flat = indices.flatten(1)
        return self(flat, labels).float().log_softmax(dim=2).gather(2, flat.unsqueeze(2)).view(indices.shape)

    def sample(self, labels: Tensor, sampling: Sampling, generator: torch.Generator) -> Tensor:
        """(B,) labels -> (B, *index_grid) indices."""
        indices = torch.zeros(len(labels), *self.grid, dtype=torch.long, device=labels.device)
        return self.complete(indices, torch.zeros_like(indices, dtype=torch.bool), labels, sampling, generator)

    @torch.no_grad()
    def complete(
        self, indices: Tensor, is_known: Tensor, labels: Tensor, sampling: Sampling, generator: torch.Generator
    ) -> Tensor:
        """Keep the (B, *index_grid) indices where is_known and draw the others.

        A model of random orders reads the known ones first and draws the others in raster order, each given all that are
        known: exact as far as the model knows such orders, which it forgets while they are annealed to raster order
        (random_order_until of (1, 1) prevents that). Other models go through all places in raster order and draw an index
        given those before it alone, which is not the distribution given all that are known.
        """
        indices, is_known, order = indices.flatten(1), is_known.flatten(1), None
        if self.reads_all_known:
            order = (~is_known).long().argsort(dim=1, stable=True)
            indices, is_known = indices.gather(1, order), is_known.gather(1, order)
        drawing = Drawing(self, indices.clone(), is_known, order, labels, sampling, generator)
        repeat(drawing.step, indices.shape[1], indices.device, generator)
        drawn = drawing.indices
        if order is not None:
            drawn = torch.empty_like(drawn).scatter_(1, order, drawn)
        return drawn.view(-1, *self.grid)

    @property
    def reads_all_known(self) -> bool:
        """Whether `complete` draws each index given all that are known."""
        return self.read_position is not None

    @torch.no_grad()
    def evidence(self, indices: Tensor, is_known: Tensor, labels: Tensor, generator: torch.Generator) -> Tensor:
        """(B, *index_grid) indices and which are known -> (B,) nats: the log-probability of the known ones; nothing is drawn.

        A model of random orders reads the known ones first, and no others. In raster order each is given all indices before
        it, drawn ones too: the importance weight that turns draws of `complete`, which ignore the known ones behind them,
        into draws from the distribution given all that are known.
        """
        labels = self.condition(labels)
        indices, is_known = indices.flatten(1), is_known.flatten(1)
        order = (~is_known).long().argsort(dim=1, stable=True) if self.reads_all_known else None
        if order is not None:
            indices, is_known = indices.gather(1, order), is_known.gather(1, order)
        log_probs = self(indices, labels, order).float().log_softmax(dim=2)
        return (log_probs.gather(2, indices.unsqueeze(2)).squeeze(2) * is_known).sum(dim=1)


class Drawing:
    """Sequences of indices being drawn, and the step that draws one index of each.

    Steps differ by their number alone, and on a GPU none waits for it: they can be one CUDA graph (nn/steps.py).
    """

    def __init__(
        self,
        model: Model,
        indices: Tensor,
        is_known: Tensor,
        order: Tensor | None,
        labels: Tensor,
        sampling: Sampling,
        generator: torch.Generator,
    ):
        """(B, L) indices, which are written, which of them are known, and their grid places; None is raster order."""
        self.model, self.sampling, self.generator = model, sampling, generator
        self.indices, self.is_known, self.order = indices, is_known, order
        self.is_guided = sampling.guidance_scale != 1.0 and model.config.is_conditional
        labels, length = model.condition(labels), indices.shape[1]
        if self.is_guided:  # a second half of the batch, without the labels
            labels = torch.cat([labels, model.null_labels(labels)])
            scales = [sampling.scale_at(number / length) for number in range(length)]
            self.scales = torch.tensor(scales, device=indices.device)
        self.x = model.label_embedding(labels)  # (B, N), or (2 B, N): what the next step reads
        self.decoder = decoder(model.transformer, like=self.x)
        if sets(model.config, "condition"):
            self.decoder = told_decoder(model.transformer, self.decoder, like=self.x)
        if sets(sampling, "autoguidance_scale"):
            self.guide = Reading(model, sampling, labels[: len(indices)], length)

    def step(self, number: Number) -> None:
        """Draw the index at `number` of each sequence, unless it is known, and embed it for the next step."""
        model = self.model
        places = None if self.order is None else self._of_both_halves(element(self.order, number, dim=1))  # (B, 1)
        position = element(model.position, number) if places is None else model.position[places].squeeze(1)
        logits = model.head(self.decoder.step(self.x + position, number, places)).float()
        if sets(self.sampling, "autoguidance_scale"):
            own = None if places is None else places[: len(self.indices)]
            away = self.guide.away(logits[: len(self.indices)], number, own)
        if self.is_guided:
            logits = guided(*logits.chunk(2), element(self.scales, number))
        if sets(self.sampling, "autoguidance_scale"):
            logits = logits + away
        drawn = draw(logits, self.sampling, self.generator).unsqueeze(1)
        known = element(self.indices, number, dim=1)
        drawn = torch.where(element(self.is_known, number, dim=1), known, drawn)
        put(self.indices, number, drawn, dim=1)
        x = self._of_both_halves(model.index_embedding(drawn))
        if model.read_position is not None:
            x = x + model.read_position[places]
        self.x.copy_(x.squeeze(1))
        if sets(self.sampling, "autoguidance_scale"):
            self.guide.read(drawn, own)

    def _of_both_halves(self, x: Tensor) -> Tensor:
        return torch.cat([x, x]) if self.is_guided else x


def draw(logits: Tensor, sampling: Sampling, generator: torch.Generator) -> Tensor:
    """(B, K) logits -> (B,) indices, by the Gumbel-max trick; top_p: Holtzman et al., section 3.1 (nucleus sampling)."""
    if sampling.temperature != 1:
        logits = logits / sampling.temperature
    if sampling.top_k and sampling.top_k < logits.shape[1]:
        least = logits.topk(sampling.top_k, dim=1).values[:, -1:]
        logits = logits.masked_fill(logits < least, -torch.inf)
    if sampling.top_p < 1:
        ordered, order = logits.sort(dim=1, descending=True)
        probs = ordered.softmax(dim=1)
        beyond = probs.cumsum(dim=1) - probs >= sampling.top_p  # the probability before this index is enough
        logits = logits.masked_fill(torch.zeros_like(beyond).scatter(1, order, beyond), -torch.inf)
    return gumbel_noise(logits, generator).add_(logits).argmax(dim=1)


def random_order_share(until: tuple[float, float], progress: float) -> float:
    """RAR, section 3.2: the share of images read in a random order when the share `progress` of the training is done."""
    begin, end = until
    if progress < begin:
        return 1.0
    return (end - progress) / (end - begin) if progress < end else 0.0


class Objective(ConditionalObjective):
    def loss(self, tokens: Tensor, labels: Tensor, step: int) -> dict[str, Tensor]:
        """Esser et al., section 3.2: the mean cross-entropy of each index given those before it, in nats."""
        indices = tokens.flatten(1)  # (B, L)
        order = self._orders(indices, step)
        indices = indices if order is None else indices.gather(1, order)
        read = indices
        if self.training and self.config.token_dropout:
            replaced = torch.rand(indices.shape, device=indices.device) < self.config.token_dropout
            read = torch.where(replaced, torch.randint_like(indices, self.model.spec.codebook_size), indices)
        logits = self.model(read, labels, order).float()
        loss = F.cross_entropy(logits.flatten(0, 1), indices.flatten())
        accuracy = (logits.argmax(dim=-1) == indices).float().mean()
        return {"loss": loss, "accuracy": accuracy}

    def _orders(self, indices: Tensor, step: int) -> Tensor | None:
        """(B, L) the order of each image, a random one for a share of them; None: raster order for all."""
        if not self.config.has_random_orders or not self.training:
            return None
        share = random_order_share(self.config.random_order_until, step / self.config.training.num_steps)
        is_random = torch.rand(len(indices), 1, device=indices.device) < share
        order = torch.rand(indices.shape, device=indices.device).argsort(dim=1)
        return torch.where(is_random, order, torch.arange(indices.shape[1], device=indices.device))

"""Autoregressive prior: a causal transformer that predicts the indices of an image one after another, in raster order.

Sources: Esser et al. (VQGAN), 2021, arXiv:2012.09841, section 3.2; Sun et al. (LlamaGen), 2024, arXiv:2406.06525, for the
plain language-model body; classifier-free guidance: Ho and Salimans 2022, arXiv:2207.12598; nucleus sampling: Holtzman et
al. 2019, arXiv:1904.09751.
Differs from them: each place of the sequence carries the position of the index it predicts, not of the one it reads.

The sequence is [label, index 0, ..., index L-2]; place i predicts index i.
"""

from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn
from torch.optim import Optimizer

from tessera.components import Params
from tessera.conditioning import ConditionalConfig, guided, seen_labels
from tessera.contracts import Learns, TokenBatch, TokenSpec
from tessera.nn.transformer import Transformer
from tessera.optimization import Fraction, Training, optimizers_for
from tessera.transformer_settings import TransformerConfig

LEARNS: Learns = "indices"


class Config(TransformerConfig, ConditionalConfig):
    kind: Literal["autoregressive"] = "autoregressive"
    dropout: Fraction = 0.1
    token_dropout: Fraction = 0.0  # share of the indices read that are replaced by random ones
    training: Training


class Sampling(Params):
    guidance_scale: Annotated[float, Field(ge=0)] = 1.0  # uncond + scale * (cond - uncond); 1: off
    temperature: Annotated[float, Field(gt=0)] = 1.0
    top_k: Annotated[int, Field(ge=0)] = 0  # keep the k likeliest indices; 0: all
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0  # keep the fewest indices that hold this probability; 1: all


class Model(nn.Module):
    def __init__(self, config: Config, spec: TokenSpec):
        super().__init__()
        assert spec.codebook_size is not None
        self.config, self.spec = config, spec
        self.grid = spec.index_grid
        self.null_label = spec.num_classes
        length = self.grid[0] * self.grid[1]
        self.index_embedding = nn.Embedding(spec.codebook_size, config.width)
        self.label_embedding = nn.Embedding(spec.num_classes + 1, config.width)
        self.position = nn.Parameter(torch.randn(length, config.width) * 0.02)
        self.transformer = Transformer(
            config.width, config.depth, config.heads, self.grid, config.dropout, is_causal=True
        )
        self.head = nn.Linear(config.width, spec.codebook_size)
        for layer in (self.index_embedding, self.label_embedding, self.head):
            nn.init.normal_(layer.weight, std=0.02)

    def forward(self, indices: Tensor, labels: Tensor) -> Tensor:
        """(B, L) indices, (B,) labels up to and including null_label -> (B, L, K) logits; place i sees indices < i."""
        start = self.label_embedding(labels).unsqueeze(1)  # (B, 1, N)
        x = torch.cat([start, self.index_embedding(indices[:, :-1])], dim=1) + self.position
        return self.head(self.transformer(x))

    @torch.no_grad()
    def sample(self, labels: Tensor, sampling: Sampling, generator: torch.Generator) -> Tensor:
        """(B,) labels -> (B, *index_grid) indices. The generator is a CPU one: the same draws on every device."""
        if not self.config.is_conditional:
            labels = torch.full_like(labels, self.null_label)
        batch, length = len(labels), self.position.shape[0]
        is_guided = sampling.guidance_scale != 1.0 and self.config.is_conditional
        if is_guided:
            labels = torch.cat([labels, torch.full_like(labels, self.null_label)])
        x = self.label_embedding(labels)
        caches = self.transformer.new_caches(len(labels), like=x)
        indices = torch.empty(batch, length, dtype=torch.long, device=labels.device)
        for place in range(length):
            h = self.transformer((x + self.position[place]).unsqueeze(1), caches=caches)
            logits = self.head(h[:, 0]).float()
            if is_guided:
                conditional, unconditional = logits.chunk(2)
                logits = guided(conditional, unconditional, sampling.guidance_scale)
            indices[:, place] = draw(logits, sampling, generator)
            x = self.index_embedding(indices[:, place])
            x = torch.cat([x, x]) if is_guided else x
        return indices.view(batch, *self.grid)


def draw(logits: Tensor, sampling: Sampling, generator: torch.Generator) -> Tensor:
    """(B, K) logits -> (B,) indices, by the Gumbel-max trick."""
    logits = logits / sampling.temperature
    if sampling.top_k and sampling.top_k < logits.shape[1]:
        least = logits.topk(sampling.top_k, dim=1).values[:, -1:]
        logits = logits.masked_fill(logits < least, -torch.inf)
    if sampling.top_p < 1:
        ordered, order = logits.sort(dim=1, descending=True)
        shares = ordered.softmax(dim=1)
        beyond = shares.cumsum(dim=1) - shares >= sampling.top_p  # the probability before this index is enough
        logits = logits.masked_fill(torch.zeros_like(beyond).scatter(1, order, beyond), -torch.inf)
    uniform = torch.rand(logits.shape, generator=generator).clamp_min(1e-20)
    return (logits - torch.log(-torch.log(uniform)).to(logits.device)).argmax(dim=1)


class Objective(nn.Module):
    phases = ("prior",)

    def __init__(self, model: Model, config: Config):
        super().__init__()
        self.model, self.config = model, config

    def forward(self, batch: TokenBatch, phase: str, step: int) -> dict[str, Tensor]:
        indices = batch.tokens.flatten(1)  # (B, L)
        labels = seen_labels(batch.labels, self.config, self.model.null_label, self.training)
        read = indices
        if self.training and self.config.token_dropout:
            replaced = torch.rand(indices.shape, device=indices.device) < self.config.token_dropout
            read = torch.where(replaced, torch.randint_like(indices, self.model.spec.codebook_size), indices)
        logits = self.model(read, labels).float()
        loss = F.cross_entropy(logits.flatten(0, 1), indices.flatten())
        accuracy = (logits.argmax(dim=-1) == indices).float().mean()
        return {"loss": loss, "accuracy": accuracy}

    def optimizers(self) -> dict[str, list[Optimizer]]:
        hidden = self.model.transformer.hidden_matrices()
        return {"prior": optimizers_for(self.model, self.config.training, hidden)}

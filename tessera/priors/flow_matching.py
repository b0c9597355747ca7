"""Flow matching prior: a transformer that learns the velocity from noise to latents along straight lines.

Time runs from t = 0, noise x_0, to t = 1, data x_1: x_t = (1 - t) x_0 + t x_1, velocity = x_1 - x_0.

Sources: Lipman et al., "Flow Matching for Generative Modeling", 2022, arXiv:2210.02747, equations 20 to 23 (sigma_min = 0:
Liu et al., rectified flow, arXiv:2209.03003, equation 1); times from a logit-normal: Esser et al., 2024,
arXiv:2403.03206, section 3.1; the conditioned transformer: Peebles and Xie (DiT), arXiv:2212.09748; predicting the data
under the velocity's loss: Li and He, 2025, arXiv:2511.13720; guidance in an interval: Kynkaanniemi et al., 2024,
arXiv:2404.07724; Heun's step: Karras et al., 2022, arXiv:2206.00364, algorithm 1.
"""

import math
from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.optim import Optimizer

from tessera.components import Params
from tessera.contracts import Learns, TokenBatch, TokenSpec
from tessera.nn.transformer import Transformer
from tessera.optimization import Fraction, Training, optimizers_for

LEARNS: Learns = "latents"


class Config(Params):
    kind: Literal["flow_matching"] = "flow_matching"
    width: Annotated[int, Field(ge=8)] = 128
    depth: Annotated[int, Field(ge=1)] = 4
    heads: Annotated[int, Field(ge=1)] = 4
    patch_size: Annotated[int, Field(ge=1)] = 1  # side of the latents that one place of the sequence holds
    dropout: Fraction = 0.0
    label_dropout: Fraction = 0.1
    is_conditional: bool = True
    predicts: Literal["velocity", "data"] = "velocity"  # what the network's output means; the loss is the velocity's
    time_mean: float = 0.0  # of the normal whose sigmoid is the training time
    time_std: Annotated[float, Field(gt=0)] = 1.0
    training: Training

    @model_validator(mode="after")
    def _heads_divide_width(self) -> "Config":
        if self.width % self.heads or self.width // self.heads % 4:
            raise ValueError(
                f"width {self.width} over heads {self.heads} must be a multiple of 4 (two rotary axes); "
                f"choose a width of heads x 4n"
            )
        return self


class Sampling(Params):
    guidance_scale: Annotated[float, Field(ge=0)] = 1.0  # uncond + scale * (cond - uncond); 1: off
    guidance_interval: tuple[Fraction, Fraction] = (0.0, 1.0)  # times within which guidance acts
    num_steps: Annotated[int, Field(ge=1)] = 20
    solver: Literal["euler", "heun"] = "heun"  # Heun: two network calls a step, one in the last


class Model(nn.Module):
    def __init__(self, config: Config, spec: TokenSpec):
        super().__init__()
        self.config, self.spec = config, spec
        depth, height, width = spec.latent_shape
        patch = config.patch_size
        if height % patch or width % patch:
            raise ValueError(f"a {height}x{width} grid of latents is not divisible by prior.patch_size {patch}")
        self.grid = (height // patch, width // patch)
        self.null_label = spec.num_classes
        self.enter = nn.Linear(depth * patch**2, config.width)
        self.position = nn.Parameter(torch.randn(self.grid[0] * self.grid[1], config.width) * 0.02)
        self.time = nn.Sequential(
            nn.Linear(config.width, config.width), nn.SiLU(), nn.Linear(config.width, config.width)
        )
        self.label_embedding = nn.Embedding(spec.num_classes + 1, config.width)
        nn.init.normal_(self.label_embedding.weight, std=0.02)
        self.transformer = Transformer(
            config.width, config.depth, config.heads, self.grid, config.dropout, is_causal=False, is_conditioned=True
        )
        self.leave = nn.Linear(config.width, depth * patch**2)
        nn.init.zeros_(self.leave.weight)
        nn.init.zeros_(self.leave.bias)

    def forward(self, x: Tensor, t: Tensor, labels: Tensor) -> Tensor:
        """(B, D, h, w) latents at times t (B,) in [0, 1], (B,) labels up to and including null_label -> the velocity."""
        patch = self.config.patch_size
        sequence = F.pixel_unshuffle(x, patch).flatten(2).transpose(1, 2)  # (B, L, D * patch ** 2)
        condition = self.time(time_features(t, self.config.width)) + self.label_embedding(labels)  # (B, N)
        h = self.transformer(self.enter(sequence) + self.position, condition)
        out = self.leave(h).transpose(1, 2).unflatten(2, self.grid)
        out = F.pixel_shuffle(out, patch).float()  # (B, D, h, w)
        if self.config.predicts == "velocity":
            return out
        return (out - x) / (1 - t).clamp_min(0.05).view(-1, 1, 1, 1)  # x_1 - x_t = (1 - t) * velocity

    @torch.no_grad()
    def sample(self, labels: Tensor, sampling: Sampling, generator: torch.Generator) -> Tensor:
        """(B,) labels -> (B, D, h, w) standardized latents. The generator is a CPU one: the same noise on every device."""
        if not self.config.is_conditional:
            labels = torch.full_like(labels, self.null_label)
        x = torch.randn(len(labels), *self.spec.latent_shape, generator=generator).to(labels.device)
        times = torch.linspace(0, 1, sampling.num_steps + 1).tolist()
        for t, next_t in zip(times, times[1:], strict=False):
            velocity = self._guided(x, t, labels, sampling)
            ahead = x + (next_t - t) * velocity
            if sampling.solver == "heun" and next_t < 1:
                velocity = (velocity + self._guided(ahead, next_t, labels, sampling)) / 2
                ahead = x + (next_t - t) * velocity
            x = ahead
        return x

    def _guided(self, x: Tensor, t: float, labels: Tensor, sampling: Sampling) -> Tensor:
        times = torch.full((len(x),), t, device=x.device)
        low, high = sampling.guidance_interval
        if sampling.guidance_scale == 1.0 or not self.config.is_conditional or not low <= t <= high:
            return self(x, times, labels)
        null = torch.full_like(labels, self.null_label)
        both = self(torch.cat([x, x]), torch.cat([times, times]), torch.cat([labels, null]))
        conditional, unconditional = both.chunk(2)
        return unconditional + sampling.guidance_scale * (conditional - unconditional)


def time_features(t: Tensor, width: int) -> Tensor:
    """(B,) in [0, 1] -> (B, width) cosines and sines at periods from about 1/160 to 60 (the transformer's usual ones)."""
    frequencies = torch.exp(-math.log(10_000) * torch.arange(width // 2, device=t.device) / (width // 2)) * 1000
    angles = t.float().unsqueeze(1) * frequencies
    return torch.cat([angles.cos(), angles.sin()], dim=1)


class Objective(nn.Module):
    phases = ("prior",)

    def __init__(self, model: Model, config: Config):
        super().__init__()
        self.model, self.config = model, config

    def forward(self, batch: TokenBatch, phase: str, step: int) -> dict[str, Tensor]:
        x_1, labels = batch.tokens, batch.labels
        if not self.config.is_conditional:
            labels = torch.full_like(labels, self.model.null_label)
        elif self.training:
            dropped = torch.rand(labels.shape, device=labels.device) < self.config.label_dropout
            labels = torch.where(dropped, self.model.null_label, labels)
        t = torch.sigmoid(self.config.time_mean + self.config.time_std * torch.randn(len(x_1), device=x_1.device))
        x_0 = torch.randn_like(x_1)
        at = t.view(-1, 1, 1, 1)
        velocity = self.model((1 - at) * x_0 + at * x_1, t, labels)
        return {"loss": F.mse_loss(velocity, x_1 - x_0)}

    def optimizers(self) -> dict[str, list[Optimizer]]:
        hidden = self.model.transformer.hidden_matrices()
        return {"prior": optimizers_for(self.model, self.config.training, hidden)}

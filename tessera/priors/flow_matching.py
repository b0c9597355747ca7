"""Flow matching prior: a network that learns the velocity from noise to latents along straight lines.

Time runs from t = 0, noise x_0, to t = 1, data x_1: x_t = (1 - t) x_0 + t x_1, velocity = x_1 - x_0.

Sources: Lipman et al., "Flow Matching for Generative Modeling", 2022, arXiv:2210.02747, equations 20 to 23 (sigma_min = 0:
Liu et al., rectified flow, arXiv:2209.03003, equation 1); times from a logit-normal: Esser et al., 2024,
arXiv:2403.03206, section 3.1; predicting the data under the velocity's loss: Li and He, 2025, arXiv:2511.13720;
guidance in an interval: Kynkaanniemi et al., 2024, arXiv:2404.07724; Heun's step: Karras et al., 2022,
arXiv:2206.00364, algorithm 1.
"""

from itertools import pairwise
from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from tessera.bases.autoguidance import guided_twice
from tessera.bases.conditional import (
    ConditionalConfig,
    ConditionalModel,
    ConditionalObjective,
    IntervalSampling,
    guided,
    tell,
)
from tessera.bases.optimization import PriorTraining
from tessera.components import DenoiserConfig, Steps, load, sets
from tessera.contracts import Learns, TokenSpec
from tessera.nn import samplers

LEARNS: Learns = "latents"
LARGEST_SIGMA = 80.0  # where an edit begins: at time 0 there are no data in x


class Config(ConditionalConfig):
    kind: Literal["flow_matching"] = "flow_matching"
    denoiser: DenoiserConfig  # the network
    predicts: Literal["velocity", "data"] = "velocity"  # what the network's output means; the loss is the velocity's
    time_mean: Annotated[float, Field(ge=-10, le=10)] = 0.0  # of the normal whose sigmoid is the training time
    time_std: Annotated[float, Field(ge=0.01, le=10)] = 1.0
    training: PriorTraining


class Sampling(IntervalSampling):
    num_steps: Steps = 20
    solver: Literal["euler", "heun"] = "heun"  # Heun: two network calls a step, one in the last


class Model(ConditionalModel):
    def __init__(self, config: Config, spec: TokenSpec):
        super().__init__(config, spec)
        network = load("denoisers", config.denoiser.kind)
        self.denoiser = network.Model(config.denoiser, spec.latent_shape, spec.num_classes + 1)
        if sets(config, "condition"):
            tell(self.denoiser, config, spec)

    def forward(self, x: Tensor, t: Tensor, labels: Tensor) -> Tensor:
        """(B, D, h, w) latents at times t (B,) in [0, 1], (B,) labels up to and including null_label -> their velocities."""
        out = self.denoiser(x, t, labels)
        if self.config.predicts == "velocity":
            return out
        return (out - x) / (1 - t).clamp_min(0.05).view(-1, 1, 1, 1)  # Li and He: x_1 - x_t = (1 - t) * velocity

    @torch.no_grad()
    def sample(self, labels: Tensor, sampling: Sampling, generator: torch.Generator) -> Tensor:
        """(B,) labels -> (B, D, h, w) standardized latents."""
        labels = self.condition(labels)
        x = samplers.noise(labels.new_empty(len(labels), *self.spec.latent_shape), generator)
        times = torch.linspace(0, 1, sampling.num_steps + 1).tolist()

        def velocity(x: Tensor, t: float) -> Tensor:
            return self._guided(x, t, labels, sampling)

        for t, t_next in pairwise(times):
            is_heun = sampling.solver == "heun" and t_next < 1
            x = (samplers.heun_step if is_heun else samplers.euler_step)(velocity, x, t, t_next)
        return x

    def levels(self, sampling: Sampling) -> list[float]:
        """Noise levels from pure noise, nearly, to 0, for `denoise`: those of num_steps even times."""
        times = torch.linspace(0, 1, sampling.num_steps + 1).clamp_min(1 / (1 + LARGEST_SIGMA)).tolist()
        return [(1 - t) / t for t in times]

    def denoise(self, x: Tensor, sigma: float, labels: Tensor, sampling: Sampling) -> Tensor:
        """The expected data of x = data + sigma * noise, guided. The path's own x is t * x, with t = 1 / (1 + sigma)."""
        labels = self.condition(labels)
        t = 1 / (1 + sigma)
        return t * x + (1 - t) * self._guided(t * x, t, labels, sampling)

    def _guided(self, x: Tensor, t: float, labels: Tensor, sampling: Sampling) -> Tensor:
        """The velocity, guided within an interval of times (Kynkaanniemi et al.)."""
        times = torch.full((len(x),), t, device=x.device)
        if sets(sampling, "autoguidance_scale"):
            return guided_twice(self, sampling, t, labels, lambda model, told: model(x, times, told))
        if not self.config.is_conditional or not sampling.is_guided_at(t):
            return self(x, times, labels)
        null = self.null_labels(labels)
        both = self(torch.cat([x, x]), torch.cat([times, times]), torch.cat([labels, null]))
        conditional, unconditional = both.chunk(2)
        return guided(conditional, unconditional, sampling.guidance_scale)


class Objective(ConditionalObjective):
    def loss(self, tokens: Tensor, labels: Tensor, step: int) -> dict[str, Tensor]:
        """Lipman et al., equation 23 at sigma_min = 0 (Liu et al., equation 1); times: Esser et al. 2024, section 3.1."""
        x_1 = tokens
        t = torch.sigmoid(self.config.time_mean + self.config.time_std * torch.randn(len(x_1), device=x_1.device))
        x_0 = torch.randn_like(x_1)
        at = t.view(-1, 1, 1, 1)
        velocity = self.model((1 - at) * x_0 + at * x_1, t, labels)
        return {"loss": F.mse_loss(velocity, x_1 - x_0)}

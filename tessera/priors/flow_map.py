"""Flow map prior: a network that learns the mean velocity of a flow between two times, and so samples in one to four calls.

Time runs from t = 0, noise x_0, to t = 1, data x_1, as in flow_matching.py; v is the velocity of its flow. The mean velocity
of a jump, u(x_t, t, r) = (x_r - x_t) / (r - t), satisfies u = v + (r - t) du/dt along the flow, and u(x, t, t) = v(x, t).

Sources: Geng et al., "Mean Flows for One-step Generative Modeling", 2025, arXiv:2505.13447, equations 3 and 6 (here with time
the other way); the loss: Geng et al., "Improved Mean Flows", 2025, arXiv:2512.02012, which regresses the velocity by
u - (r - t) du/dt and moves by the network's own velocity; first a flow, then its map: Lee et al., "Decoupled MeanFlow", 2025,
arXiv:2510.24474; the derivative by differences: Wang et al., "Transition Models", 2025, arXiv:2509.04394.
Differs from them: the length of the jump is embedded beside the time, and says nothing at first, where Lee et al. give the
last blocks the later time; guidance acts on mean velocities while sampling, and the network is trained without it.
"""

from itertools import pairwise
from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

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
from tessera.components import DenoiserConfig, Fraction, Steps, load, sets
from tessera.contracts import Learns, TokenSpec
from tessera.nn import samplers
from tessera.nn.time_features import time_features

LEARNS: Learns = "latents"
LARGEST_SIGMA = 80.0  # where an edit begins: at time 0 there are no data in x
TIME_SCALE = (
    0.003  # of times and lengths as networks see them: what is learnt is differentiated by them, and must be smooth
)
EPSILON = 0.01  # of time, to either side, over which the derivative along the flow is taken


class Config(ConditionalConfig):
    kind: Literal["flow_map"] = "flow_map"
    denoiser: DenoiserConfig  # the network
    time_mean: Annotated[float, Field(ge=-10, le=10)] = -0.5  # of the normal whose sigmoid is a training time: near the
    time_std: Annotated[float, Field(ge=0.01, le=10)] = 1.4  # noise, where the jumps of one call begin
    flow_share: Fraction = 0.25  # of the steps, the first ones, in which the flow alone is learnt
    jump_share: Fraction = 0.5  # of the rows of a later step that are jumps; the others keep the flow
    training: PriorTraining


class Sampling(IntervalSampling):
    num_steps: Steps = 4  # one network call each


class TimeAndLength(nn.Module):
    """A denoiser's layers of the time, under their names, and beside them those of the length of a jump, silent at first."""

    def __init__(self, time: nn.Sequential):
        super().__init__()
        self.names = [name for name, _ in time.named_children()]
        for name, layer in time.named_children():
            self.add_module(name, layer)
        self.width = time[0].in_features
        wide = time[-1].out_features
        self.length = nn.Sequential(nn.Linear(self.width, wide), nn.SiLU(), nn.Linear(wide, wide))
        nn.init.zeros_(self.length[-1].weight)
        nn.init.zeros_(self.length[-1].bias)
        self.lengths: Tensor | None = None  # (B,) of the jumps that the network is being asked for

    def forward(self, features: Tensor) -> Tensor:
        """(B, width) features of times -> (B, E)."""
        said = self.length(time_features(TIME_SCALE * self.lengths, self.width))
        for name in self.names:
            features = getattr(self, name)(features)
        return features + said


class Model(ConditionalModel):
    def __init__(self, config: Config, spec: TokenSpec):
        super().__init__(config, spec)
        network = load("denoisers", config.denoiser.kind)
        self.denoiser = network.Model(config.denoiser, spec.latent_shape, spec.num_classes + 1)
        self.denoiser.time = TimeAndLength(self.denoiser.time)
        if sets(config, "condition"):
            tell(self.denoiser, config, spec)

    def forward(self, x: Tensor, t: Tensor, labels: Tensor, lengths: Tensor) -> Tensor:
        """(B, D, h, w) latents at times t (B,) in [0, 1], (B,) labels up to and including null_label, and the lengths (B,) of
        jumps to later times -> their mean velocities; at a length of 0 the velocities at t."""
        self.denoiser.time.lengths = lengths
        return self.denoiser(x, TIME_SCALE * t, labels)

    @torch.no_grad()
    def sample(self, labels: Tensor, sampling: Sampling, generator: torch.Generator) -> Tensor:
        """(B,) labels -> (B, D, h, w) standardized latents."""
        labels = self.condition(labels)
        x = samplers.noise(labels.new_empty(len(labels), *self.spec.latent_shape), generator)
        times = torch.linspace(0, 1, sampling.num_steps + 1).tolist()
        for t, t_next in pairwise(times):
            x = x + (t_next - t) * self._guided(x, t, t_next - t, labels, sampling)
        return x

    def levels(self, sampling: Sampling) -> list[float]:
        """Noise levels from pure noise, nearly, to 0, for `denoise`: those of num_steps even times."""
        times = torch.linspace(0, 1, sampling.num_steps + 1).clamp_min(1 / (1 + LARGEST_SIGMA)).tolist()
        return [(1 - t) / t for t in times]

    def denoise(self, x: Tensor, sigma: float, labels: Tensor, sampling: Sampling) -> Tensor:
        """The expected data of x = data + sigma * noise, guided. The path's own x is t * x, with t = 1 / (1 + sigma)."""
        labels = self.condition(labels)
        t = 1 / (1 + sigma)
        return t * x + (1 - t) * self._guided(t * x, t, 0.0, labels, sampling)

    def _guided(self, x: Tensor, t: float, length: float, labels: Tensor, sampling: Sampling) -> Tensor:
        """The mean velocity from t on, guided within an interval of times (Kynkaanniemi et al.)."""
        times, lengths = (torch.full((len(x),), value, device=x.device) for value in (t, length))
        if sets(sampling, "autoguidance_scale"):
            return guided_twice(self, sampling, t, labels, lambda model, told: model(x, times, told, lengths))
        if not self.config.is_conditional or not sampling.is_guided_at(t):
            return self(x, times, labels, lengths)
        null = self.null_labels(labels)
        twice = (torch.cat([each, each]) for each in (x, times))
        both = self(*twice, torch.cat([labels, null]), torch.cat([lengths, lengths]))
        return guided(*both.chunk(2), sampling.guidance_scale)


class Objective(ConditionalObjective):
    def loss(self, tokens: Tensor, labels: Tensor, step: int) -> dict[str, Tensor]:
        """Geng et al., "Improved Mean Flows": the squared error of u - (r - t) du/dt, by a derivative that is not
        differentiated, from x_1 - x_0; rows with r = t have flow matching's loss.

        The two times of a jump are both drawn as flow matching draws its one (Esser et al. 2024, section 3.1).
        """
        config, x_1 = self.config, tokens
        draws = torch.randn(2, len(x_1), device=x_1.device)
        times = torch.sigmoid(config.time_mean + config.time_std * draws)
        x_0 = torch.randn_like(x_1)
        is_flow = step < config.flow_share * config.training.num_steps
        jumps = 0 if is_flow else round(config.jump_share * len(x_1))
        t = times[0].clone()
        t[:jumps] = times[:, :jumps].amin(dim=0)
        lengths = torch.zeros_like(t)
        lengths[:jumps] = times[:, :jumps].amax(dim=0) - t[:jumps]
        x = (1 - _wide(t)) * x_0 + _wide(t) * x_1
        rise = torch.zeros_like(x)
        if jumps:  # before the pass that is differentiated, which may be run again in the backward one
            slope = derivative(self.model, x[:jumps], t[:jumps], labels[:jumps], lengths[:jumps])
            rise[:jumps] = _wide(lengths[:jumps]) * slope
        found = self.model(x, t, labels, lengths) - rise
        return {"loss": F.mse_loss(found, x_1 - x_0)}


@torch.no_grad()
def derivative(model: nn.Module, x: Tensor, t: Tensor, labels: Tensor, lengths: Tensor) -> Tensor:
    """(B, D, h, w) at times t (B,) -> du/dt of jumps that end at t + lengths, along the flow by the model's own velocity: by
    differences over EPSILON to either side (Wang et al.), as attention has no forward derivative on every device.

    In float32, as bfloat16 would leave nothing of a difference, and without dropout, which would be another on either side.
    """
    was_training = model.training
    model.eval()
    with torch.autocast(x.device.type, enabled=False):
        velocity = model(x, t, labels, torch.zeros_like(t))
        before, after = (t - EPSILON).clamp_min(0), torch.minimum(t + EPSILON, t + lengths)
        ends = []
        for time in (before, after):
            moved = x + _wide(time - t) * velocity
            ends.append(model(moved, time, labels, t + lengths - time))
    model.train(was_training)
    return (ends[1] - ends[0]) / _wide((after - before).clamp_min(EPSILON / 2))


def _wide(t: Tensor) -> Tensor:
    """(B,) -> (B, 1, 1, 1)."""
    return t.view(-1, 1, 1, 1)

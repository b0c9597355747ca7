"""Gaussian diffusion prior: a network that denoises latents, and samplers that go from noise to data by it.

Noise levels are sigma, noise over data. A schedule says how they are drawn in training and spaced in sampling: `cosine` in
a time of its own; `edm` log-normal in training and even in sigma^(1 / rho) in sampling. What the network predicts is a
setting apart. `edm` with `velocity` is EDM's preconditioning and loss, as nn/noise_levels.py explains.

Sources: Ho et al., "Denoising Diffusion Probabilistic Models", 2020, arXiv:2006.11239; Nichol and Dhariwal, 2021,
arXiv:2102.09672 (cosine); Salimans and Ho, 2022, arXiv:2202.00512 (velocity); Karras et al., 2022, arXiv:2206.00364 (EDM);
Hang et al., 2023, arXiv:2303.09556 (min-SNR); Kynkaanniemi et al., 2024, arXiv:2404.07724 (guidance in an interval).
Differs from them: no variance is learnt; the loss is the velocity's whatever is predicted; noise levels are even in a batch.
"""

from functools import partial
from typing import Annotated, Literal

import torch
from pydantic import AfterValidator, Field, model_validator
from torch import Tensor

from tessera.bases.autoguidance import away_at
from tessera.bases.conditional import (
    ConditionalConfig,
    ConditionalModel,
    ConditionalObjective,
    IntervalSampling,
    guided,
    rising,
    tell,
)
from tessera.bases.optimization import PriorTraining
from tessera.components import DenoiserConfig, Fraction, Steps, load, sets
from tessera.contracts import Learns, TokenSpec
from tessera.nn import noise_levels, samplers

LEARNS: Learns = "latents"
Sigma = Annotated[float, Field(ge=1e-4, le=1e4)]
LogSigma = Annotated[float, Field(ge=-5, le=5)]
Snr = Annotated[float, Field(ge=0.01, le=1e4)]
LogSnr = Annotated[float, Field(ge=-10, le=10)]
Latent = Annotated[float, Field(ge=-1e6, le=1e6)]
Range = Annotated[tuple[Latent, Latent], AfterValidator(rising)]


class Config(ConditionalConfig):
    kind: Literal["diffusion"] = "diffusion"
    denoiser: DenoiserConfig  # the network
    predicts: Literal["velocity", "noise", "data"] = "velocity"  # what the network's output means
    schedule: Literal["cosine", "edm"] = "edm"
    log_snr_shift: LogSnr = 0.0  # cosine: added to the log of the signal-to-noise ratio, below 0: noisier
    sigma_log_mean: LogSigma = -0.5  # edm: of log sigma in training; EDM's -1.2, in units of the data's std
    sigma_log_std: Annotated[float, Field(ge=0.01, le=5)] = 1.2
    min_snr: Snr | None = None  # largest weight of the data's squared error; null: the velocity's weight
    training: PriorTraining


class Sampling(IntervalSampling):
    sampler: Literal["ancestral", "ddim", "heun", "dpm_solver"] = "dpm_solver"
    num_steps: Steps = 20
    eta: Fraction = 0.0  # ddim: share of the ancestral sampler's fresh noise
    sigma_min: Sigma = 0.01  # edm: the last level before 0
    sigma_max: Sigma = 80.0  # edm: the first level
    clip_data: Range | None = None  # bounds of the predicted latents, as the tokenizer gives them

    @model_validator(mode="after")
    def _makes_sense(self) -> "Sampling":
        if self.eta and self.sampler != "ddim":
            raise ValueError(f"eta {self.eta} is for the sampler ddim, not {self.sampler}: leave it out")
        if self.sigma_min >= self.sigma_max:
            raise ValueError(f"sigma_min {self.sigma_min} must be less than sigma_max {self.sigma_max}")
        return self


class Model(ConditionalModel):
    def __init__(self, config: Config, spec: TokenSpec):
        super().__init__(config, spec)
        network = load("denoisers", config.denoiser.kind)
        self.denoiser = network.Model(config.denoiser, spec.latent_shape, spec.num_classes + 1)
        if sets(config, "condition"):
            tell(self.denoiser, config, spec)

    def forward(self, x: Tensor, sigma: Tensor, labels: Tensor) -> Tensor:
        """(B, D, h, w) alpha * data + sigma_vp * noise at levels sigma (B,), (B,) labels up to and including null_label -> the
        prediction, (B, D, h, w)."""
        if self.config.schedule == "cosine":
            times = noise_levels.cosine_time(sigma, self.config.log_snr_shift)
        else:
            times = sigma.log() / 4  # EDM, table 1: c_noise
        return self.denoiser(x, times, labels)

    @torch.no_grad()
    def sample(self, labels: Tensor, sampling: Sampling, generator: torch.Generator) -> Tensor:
        """(B,) labels -> (B, D, h, w) standardized latents."""
        sigmas = self.levels(sampling)

        draw = partial(samplers.noise, generator=generator)

        def denoise(x: Tensor, sigma: float) -> Tensor:
            return self.denoise(x, sigma, labels, sampling)

        x = draw(labels.new_empty(len(labels), *self.spec.latent_shape)) * (1 + sigmas[0] ** 2) ** 0.5
        if sampling.sampler == "ancestral":
            return samplers.ancestral(denoise, x, sigmas, draw)
        if sampling.sampler == "ddim":
            return samplers.ddim(denoise, x, sigmas, draw, sampling.eta)
        return {"heun": samplers.heun, "dpm_solver": samplers.dpm_solver}[sampling.sampler](denoise, x, sigmas)

    def levels(self, sampling: Sampling) -> list[float]:
        """Noise levels from pure noise, nearly, to 0, for `denoise`."""
        if self.config.schedule == "cosine":
            return noise_levels.cosine_grid(sampling.num_steps, self.config.log_snr_shift)
        return noise_levels.edm_grid(sampling.num_steps, sampling.sigma_min, sampling.sigma_max)

    def denoise(self, x: Tensor, sigma: float, labels: Tensor, sampling: Sampling) -> Tensor:
        """The expected data of x = data + sigma * noise, guided and clipped; EDM, equation 7."""
        labels = self.condition(labels)
        levels = torch.full((len(x),), sigma, device=x.device)
        alpha, sigma_vp = (scale.view(-1, 1, 1, 1) for scale in noise_levels.variance_preserving(levels))
        x = alpha * x
        if not self.config.is_conditional or not sampling.is_guided_at(1 / (1 + sigma)):
            out = self(x, levels, labels)
        else:  # predictions differ by terms without the network: guiding any of them guides all
            null = self.null_labels(labels)
            both = self(torch.cat([x, x]), torch.cat([levels, levels]), torch.cat([labels, null]))
            out = guided(*both.chunk(2), sampling.guidance_scale)
        if sets(sampling, "autoguidance_scale"):
            time = 1 / (1 + sigma)
            good = both[: len(x)] if self.config.is_conditional and sampling.is_guided_at(time) else out
            out = out + away_at(self, sampling, time, good, lambda guide: guide(x, levels, labels))
        data = noise_levels.data_of(self.config.predicts, out, x, alpha, sigma_vp)
        if sampling.clip_data is None:
            return data
        mean, std = (x.new_tensor(values).view(-1, 1, 1) for values in (self.spec.latent_mean, self.spec.latent_std))
        low, high = ((bound - mean) / std for bound in sampling.clip_data)
        return torch.clamp(data, low, high)


class Objective(ConditionalObjective):
    def loss(self, tokens: Tensor, labels: Tensor, step: int) -> dict[str, Tensor]:
        """EDM, equation 8 at sigma_data = 1, whatever is predicted; with min_snr: Hang et al., section 3.4."""
        config, data = self.config, tokens
        uniforms = noise_levels.even_uniforms(len(data), data.device)
        if config.schedule == "cosine":
            sigma = noise_levels.cosine_sigma(uniforms, config.log_snr_shift).clamp_min(1e-3)
        else:
            sigma = noise_levels.edm_sigma(uniforms, config.sigma_log_mean, config.sigma_log_std)
        alpha, sigma_vp = (scale.view(-1, 1, 1, 1) for scale in noise_levels.variance_preserving(sigma))
        noise = torch.randn_like(data)
        out = self.model(alpha * data + sigma_vp * noise, sigma, labels)
        target = noise_levels.target_of(config.predicts, data, noise, alpha, sigma_vp)
        weight = noise_levels.loss_weight(config.predicts, sigma, config.min_snr)
        return {"loss": (weight * (out - target).square().mean(dim=(1, 2, 3))).mean()}

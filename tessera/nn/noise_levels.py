"""Noise levels of Gaussian diffusion, and what a network that sees a noisy image may predict.

A noise level is one number: sigma, the standard deviation of the noise over that of the data, which is 1 (latents are
standardized). Networks see the x of a variance-preserving process, alpha * data + sigma_vp * noise with
alpha^2 + sigma_vp^2 = 1 and sigma_vp / alpha = sigma, whose standard deviation is 1 at every level; it is c_in times EDM's x.

Sources: Salimans and Ho, "Progressive Distillation for Fast Sampling of Diffusion Models", 2022, arXiv:2202.00512,
appendix D (the velocity); Nichol and Dhariwal, "Improved Denoising Diffusion Probabilistic Models", 2021,
arXiv:2102.09672, equation 17 (cosine); Hoogeboom et al., "Simple Diffusion", 2023, arXiv:2301.11093, section 3.1 (shift);
Karras et al., "Elucidating the Design Space of Diffusion-Based Generative Models" (EDM), 2022, arXiv:2206.00364, table 1
and equation 5; Kingma et al., "Variational Diffusion Models", 2021, arXiv:2107.00630, appendix I.1 (even draws).
Differs from them: the cosine is continuous in time and ends at a largest sigma instead of a largest beta. EDM's
preconditioning is not written out, because at sigma_data = 1 it is the velocity: c_in x is the x here, and
c_skip x + c_out F is `data_of("velocity", -F, ...)`.
"""

import math

import torch
from torch import Tensor

OFFSET = 0.008  # of the cosine: the smallest steps of noise are not too small
SIGMA_MAX = 30.0  # where the cosine ends: later there are no data to see, and predicted noise says nothing about them


def variance_preserving(sigma: Tensor) -> tuple[Tensor, Tensor]:
    """Noise levels sigma >= 0 -> (alpha, sigma_vp) with alpha^2 + sigma_vp^2 = 1 and sigma_vp / alpha = sigma."""
    alpha = (1 + sigma.square()).rsqrt()
    return alpha, sigma * alpha


def target_of(predicts: str, data: Tensor, noise: Tensor, alpha: Tensor, sigma_vp: Tensor) -> Tensor:
    """What the network is trained to predict from alpha * data + sigma_vp * noise; Salimans and Ho, appendix D."""
    return {"data": data, "noise": noise, "velocity": alpha * noise - sigma_vp * data}[predicts]


def data_of(predicts: str, out: Tensor, x: Tensor, alpha: Tensor, sigma_vp: Tensor) -> Tensor:
    """The data according to a prediction `out` from x, the inverse of `target_of`; Salimans and Ho, appendix D."""
    if predicts == "data":
        return out
    return (x - sigma_vp * out) / alpha if predicts == "noise" else alpha * x - sigma_vp * out


def loss_weight(predicts: str, sigma: Tensor, min_snr: float | None, limit: float = 10.0) -> Tensor:
    """The weight of the squared error of a prediction, such that the loss is the same whatever is predicted.

    In units of the data's squared error it is 1 + 1 / sigma^2, the velocity's own (and that of EDM, equation 8, at
    sigma_data = 1); or, with min_snr, min(1 / sigma^2, min_snr) (Hang et al., 2023, arXiv:2303.09556, section 3.4). The limit
    keeps a few images from dominating a batch where a prediction is hard: noise at large sigma, data at small.
    """
    snr = sigma.pow(-2)
    wanted = 1 + snr if min_snr is None else snr.clamp_max(min_snr)
    own = {"data": torch.ones_like(snr), "noise": snr, "velocity": 1 + snr}[predicts]
    return (wanted / own).clamp_max(limit)


def even_uniforms(count: int, device: torch.device) -> Tensor:
    """Kingma et al., appendix I.1: (count,) uniform numbers, one in each of `count` equal parts of [0, 1)."""
    return (torch.arange(count, device=device) + torch.rand(count, device=device)) / count


def cosine_sigma(t: Tensor, log_snr_shift: float = 0.0) -> Tensor:
    """Nichol and Dhariwal, equation 17: times in [0, 1], 0 data and 1 noise -> sigma in [0, SIGMA_MAX].

    alpha(t) = cos(angle(t)) / cos(angle(0)); the shift of the log-SNR: Hoogeboom et al., section 3.1.
    """
    start = math.pi / 2 * OFFSET / (1 + OFFSET)
    alpha = torch.cos(math.pi / 2 * (t + OFFSET) / (1 + OFFSET)) / math.cos(start)
    sigma = (alpha.clamp(1e-8, 1).pow(-2) - 1).sqrt() * math.exp(-log_snr_shift / 2)
    return sigma.clamp_max(SIGMA_MAX)


def cosine_time(sigma: Tensor, log_snr_shift: float = 0.0) -> Tensor:
    """The inverse of `cosine_sigma`."""
    start = math.pi / 2 * OFFSET / (1 + OFFSET)
    alpha = variance_preserving(sigma * math.exp(log_snr_shift / 2))[0] * math.cos(start)
    return torch.arccos(alpha) * (2 / math.pi) * (1 + OFFSET) - OFFSET


def cosine_grid(num_steps: int, log_snr_shift: float = 0.0) -> list[float]:
    """num_steps + 1 falling noise levels, the last 0: even in the cosine's time."""
    last = cosine_time(torch.tensor(SIGMA_MAX, dtype=torch.float64), log_snr_shift)
    times = torch.linspace(1, 0, num_steps + 1, dtype=torch.float64) * last
    return [*cosine_sigma(times[:-1], log_snr_shift).tolist(), 0.0]


def edm_sigma(uniforms: Tensor, mean: float, std: float) -> Tensor:
    """EDM, table 1, noise distribution: uniform numbers in (0, 1) -> sigma, whose logarithm is normal."""
    margin = torch.finfo(uniforms.dtype).eps
    return torch.exp(mean + std * torch.special.ndtri(uniforms.clamp(margin, 1 - margin)))


def edm_grid(num_steps: int, sigma_min: float, sigma_max: float, rho: float = 7.0) -> list[float]:
    """EDM, equation 5: num_steps + 1 falling noise levels, the last 0, the others even in sigma^(1 / rho)."""
    first, last = sigma_max ** (1 / rho), sigma_min ** (1 / rho)
    even = torch.linspace(first, last, num_steps, dtype=torch.float64)
    return [*even.pow(rho).tolist(), 0.0]

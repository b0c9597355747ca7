"""Noise levels of Gaussian diffusion, and what a network that sees a noisy image may predict.

One number is a noise level: sigma, the deviation of the noise over that of the data (latents are standardized, so the
data's is 1). Networks see x = a * data + b * noise with a^2 + b^2 = 1 and b / a = sigma, which has deviation 1 at every
level: x of a variance preserving process, and c_in times x of EDM.

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


def shares(sigma: Tensor) -> tuple[Tensor, Tensor]:
    """sigma >= 0 -> (a, b), the shares of data and of noise: a^2 + b^2 = 1, b / a = sigma."""
    a = (1 + sigma.square()).rsqrt()
    return a, sigma * a


def target_of(predicts: str, data: Tensor, noise: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """What the network should say of x = a * data + b * noise."""
    return {"data": data, "noise": noise, "velocity": a * noise - b * data}[predicts]


def data_of(predicts: str, out: Tensor, x: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """The data that the network's output means: the inverse of `target_of` in its second argument."""
    if predicts == "data":
        return out
    return (x - b * out) / a if predicts == "noise" else a * x - b * out


def loss_weight(predicts: str, sigma: Tensor, min_snr: float | None, limit: float = 10.0) -> Tensor:
    """The weight of a squared error of what is predicted, so that every prediction is trained with one and the same loss.

    In units of the data's squared error that loss weighs 1 + 1 / sigma^2, the velocity's own (EDM's too); or, with
    min_snr, min(1 / sigma^2, min_snr) (Hang et al., 2023, arXiv:2303.09556, section 3.4). The limit keeps a few images
    from ruling a batch where one prediction is much harder than the other: noise at large sigma, data at small.
    """
    snr = sigma.pow(-2)
    wanted = 1 + snr if min_snr is None else snr.clamp_max(min_snr)
    own = {"data": torch.ones_like(snr), "noise": snr, "velocity": 1 + snr}[predicts]
    return (wanted / own).clamp_max(limit)


def even_uniforms(count: int, device: torch.device) -> Tensor:
    """(count,) uniform numbers, one in each of `count` equal parts of [0, 1): a batch's loss then varies less."""
    return (torch.arange(count, device=device) + torch.rand(count, device=device)) / count


def cosine_sigma(t: Tensor, log_snr_shift: float = 0.0) -> Tensor:
    """Times in [0, 1], 0 data and 1 noise -> sigma in [0, SIGMA_MAX]: a(t) = cos(angle(t)) / cos(angle(0))."""
    start = math.pi / 2 * OFFSET / (1 + OFFSET)
    a = torch.cos(math.pi / 2 * (t + OFFSET) / (1 + OFFSET)) / math.cos(start)
    sigma = (a.clamp(1e-8, 1).pow(-2) - 1).sqrt() * math.exp(-log_snr_shift / 2)
    return sigma.clamp_max(SIGMA_MAX)


def cosine_time(sigma: Tensor, log_snr_shift: float = 0.0) -> Tensor:
    """The inverse of `cosine_sigma`."""
    start = math.pi / 2 * OFFSET / (1 + OFFSET)
    a = shares(sigma * math.exp(log_snr_shift / 2))[0] * math.cos(start)
    return torch.arccos(a) * (2 / math.pi) * (1 + OFFSET) - OFFSET


def cosine_grid(num_steps: int, log_snr_shift: float = 0.0) -> list[float]:
    """num_steps + 1 falling noise levels, the last 0: even in the cosine's time."""
    last = cosine_time(torch.tensor(SIGMA_MAX, dtype=torch.float64), log_snr_shift)
    times = torch.linspace(1, 0, num_steps + 1, dtype=torch.float64) * last
    return [*cosine_sigma(times[:-1], log_snr_shift).tolist(), 0.0]


def edm_sigma(uniforms: Tensor, mean: float, std: float) -> Tensor:
    """Uniform numbers in (0, 1) -> sigma, whose logarithm is normal."""
    margin = torch.finfo(uniforms.dtype).eps
    return torch.exp(mean + std * torch.special.ndtri(uniforms.clamp(margin, 1 - margin)))


def edm_grid(num_steps: int, sigma_min: float, sigma_max: float, rho: float = 7.0) -> list[float]:
    """num_steps + 1 falling noise levels, the last 0: the others even in sigma^(1 / rho)."""
    first, last = sigma_max ** (1 / rho), sigma_min ** (1 / rho)
    even = torch.linspace(first, last, num_steps, dtype=torch.float64)
    return [*even.pow(rho).tolist(), 0.0]

"""Samplers of Gaussian diffusion: from noise to data along falling noise levels.

Each takes `denoise(x, sigma)`, the expected data of x = data + sigma * noise, the x at the first level, and the levels
(sigma, falling, the last may be 0). This x is that of a variance-preserving process divided by alpha
(nn/noise_levels.py); the steps of DDIM, of the ancestral sampler and of DPM-Solver++ are the same in both.

Sources: Ho et al., "Denoising Diffusion Probabilistic Models", 2020, arXiv:2006.11239, equations 6 and 7 (ancestral);
Song et al., "Denoising Diffusion Implicit Models", 2020, arXiv:2010.02502, equations 12 and 16; Karras et al., 2022,
arXiv:2206.00364, algorithm 1 (Heun); Lu et al., "DPM-Solver++", 2022, arXiv:2211.01095, algorithm 2 (2M).
Differs from them: everything is in terms of sigma; a step to sigma = 0 is of first order everywhere.
"""

import math
from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
from torch import Tensor

Denoise = Callable[[Tensor, float], Tensor]
Draw = Callable[[Tensor], Tensor]  # standard normal numbers in the shape of a tensor
Slope = Callable[[Tensor, float], Tensor]


def noise(like: Tensor, generator: torch.Generator) -> Tensor:
    """Standard normal numbers in the shape of `like`, float32 and on its device, drawn as `gumbel.uniform` draws."""
    return torch.randn(like.shape, generator=generator, device=generator.device).to(like.device)


def ancestral(denoise: Denoise, x: Tensor, sigmas: Sequence[float], draw: Draw) -> Tensor:
    """Ho et al., equations 6 and 7: each step draws from the posterior of the next x, given this one and the predicted data."""
    for sigma, sigma_next in pairwise(sigmas):
        x = ancestral_step(x, denoise(x, sigma), sigma, sigma_next, draw)
    return x


def ancestral_step(x: Tensor, data: Tensor, sigma: float, sigma_next: float, draw: Draw) -> Tensor:
    """From x = data + sigma * noise to level sigma_next <= sigma: a draw from q(x_next | x, data), the posterior of
    the next x (Ho et al., 2020, equations 6 and 7, in terms of sigma)."""
    kept = (sigma_next / sigma) ** 2
    mean = data + kept * (x - data)
    if not sigma_next:
        return mean
    return mean + sigma_next * math.sqrt(1 - kept) * draw(x)


def ddim(denoise: Denoise, x: Tensor, sigmas: Sequence[float], draw: Draw, eta: float = 0.0) -> Tensor:
    """Song et al., equation 12, with the fresh noise of equation 16; eta 0: deterministic, 1: `ancestral`."""
    for sigma, sigma_next in pairwise(sigmas):
        data = denoise(x, sigma)
        fresh = eta * sigma_next * math.sqrt(1 - (sigma_next / sigma) ** 2)
        x = data + math.sqrt(sigma_next**2 - fresh**2) / sigma * (x - data)
        if fresh:
            x = x + fresh * draw(x)
    return x


def heun(denoise: Denoise, x: Tensor, sigmas: Sequence[float]) -> Tensor:
    """Karras et al., algorithm 1, on dx / dsigma = (x - data) / sigma; two calls a step, one where a step ends at 0."""

    def slope(x: Tensor, sigma: float) -> Tensor:
        return (x - denoise(x, sigma)) / sigma

    for sigma, sigma_next in pairwise(sigmas):
        x = heun_step(slope, x, sigma, sigma_next) if sigma_next else euler_step(slope, x, sigma, sigma_next)
    return x


def euler_step(slope: Slope, x: Tensor, t: float, t_next: float) -> Tensor:
    """A first-order step along dx / dt = slope(x, t)."""
    return x + (t_next - t) * slope(x, t)


def heun_step(slope: Slope, x: Tensor, t: float, t_next: float) -> Tensor:
    """A second-order step along dx / dt = slope(x, t): Karras et al., algorithm 1, lines 4 to 8."""
    here = slope(x, t)
    ahead = x + (t_next - t) * here
    return x + (t_next - t) * ((here + slope(ahead, t_next)) / 2)


def dpm_solver(denoise: Denoise, x: Tensor, sigmas: Sequence[float]) -> Tensor:
    """Lu et al., algorithm 2 (2M): second order in -log sigma by the predictions of this step and the last; one call a step."""
    previous, previous_step = None, 0.0
    for sigma, sigma_next in pairwise(sigmas):
        data = denoise(x, sigma)
        if not sigma_next:
            return data
        step = math.log(sigma / sigma_next)
        leading = data if previous is None else data + step / (2 * previous_step) * (data - previous)
        x = sigma_next / sigma * x - math.expm1(-step) * leading
        previous, previous_step = data, step
    return x

"""Samplers of Gaussian diffusion: from noise to data along falling noise levels.

Each takes `denoise(x, sigma)`, the expected data of x = data + sigma * noise, the x at the first level, and the levels
(sigma, falling, the last may be 0). In a variance preserving process this x is the process's own divided by a, and sigma
is b / a; the steps of DDIM, of the ancestral sampler and of DPM-Solver++ are the same in both.

Sources: Ho et al., "Denoising Diffusion Probabilistic Models", 2020, arXiv:2006.11239, equations 6 and 7 (ancestral);
Song et al., "Denoising Diffusion Implicit Models", 2020, arXiv:2010.02502, equations 12 and 16; Karras et al., 2022,
arXiv:2206.00364, algorithm 1 (Heun); Lu et al., "DPM-Solver++", 2022, arXiv:2211.01095, algorithm 2 (2M).
Differs from them: everything is in terms of sigma; a step to sigma = 0 is of first order everywhere.
"""

import math
from collections.abc import Callable, Sequence
from itertools import pairwise

from torch import Tensor

Denoise = Callable[[Tensor, float], Tensor]
Draw = Callable[[Tensor], Tensor]  # standard normal numbers in the shape of a tensor


def ancestral(denoise: Denoise, x: Tensor, sigmas: Sequence[float], draw: Draw) -> Tensor:
    """Each step draws from the posterior of the next x, given this one and the predicted data."""
    for sigma, following in pairwise(sigmas):
        data = denoise(x, sigma)
        kept = (following / sigma) ** 2
        x = data + kept * (x - data)
        if following:
            x = x + following * math.sqrt(1 - kept) * draw(x)
    return x


def ddim(denoise: Denoise, x: Tensor, sigmas: Sequence[float], draw: Draw, eta: float = 0.0) -> Tensor:
    """Each step keeps the predicted noise and scales it down; eta replaces a part by fresh noise, 1: `ancestral`."""
    for sigma, following in pairwise(sigmas):
        data = denoise(x, sigma)
        fresh = eta * following * math.sqrt(1 - (following / sigma) ** 2)
        x = data + math.sqrt(following**2 - fresh**2) / sigma * (x - data)
        if fresh:
            x = x + fresh * draw(x)
    return x


def heun(denoise: Denoise, x: Tensor, sigmas: Sequence[float]) -> Tensor:
    """Second order in dx / dsigma = (x - data) / sigma; two calls a step, one where a step ends at 0."""
    for sigma, following in pairwise(sigmas):
        slope = (x - denoise(x, sigma)) / sigma
        ahead = x + (following - sigma) * slope
        if following:
            slope = (slope + (ahead - denoise(ahead, following)) / following) / 2
            ahead = x + (following - sigma) * slope
        x = ahead
    return x


def dpm_solver(denoise: Denoise, x: Tensor, sigmas: Sequence[float]) -> Tensor:
    """DPM-Solver++(2M): second order in -log sigma from the predictions of this step and the one before; one call a step."""
    previous, previous_step = None, 0.0
    for sigma, following in pairwise(sigmas):
        data = denoise(x, sigma)
        if not following:
            return data
        step = math.log(sigma / following)
        leading = data if previous is None else data + step / (2 * previous_step) * (data - previous)
        x = following / sigma * x - math.expm1(-step) * leading
        previous, previous_step = data, step
    return x

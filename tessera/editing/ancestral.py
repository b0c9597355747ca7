"""From noisy latents to data, down the noise levels of a prior that denoises, by ancestral steps.

Sources: Ho et al., "Denoising Diffusion Probabilistic Models", 2020, arXiv:2006.11239, equations 6 and 7; Meng et al.
(SDEdit), 2021, arXiv:2108.01073, section 3.1 (starting from data with noise); Lugmayr et al. (RePaint), 2022,
arXiv:2201.09865, algorithm 1.
Differs from them: everything is in terms of sigma, noise over data; the step itself is that of nn/samplers.py.
"""

import math
from collections.abc import Callable
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from tessera.nn.samplers import ancestral_step, noise
from tessera.system import System


def levels_from(levels: list[float], strength: float, grid: tuple[int, int]) -> list[float]:
    """Falling noise levels, from that of the strength to the last of `levels`, 0.

    The first is s / (1 - s) on a grid of 8x8 or less, at most levels[0]. Neighbors on a finer grid show much the same and
    average the noise away: with n places on a side it takes n / 8 times the noise to hide as much (Hoogeboom et al.,
    "Simple Diffusion", 2023, arXiv:2301.11093, section 3.1).
    """
    finer = max(1.0, math.sqrt(grid[0] * grid[1]) / 8)
    first = levels[0] if strength == 1 else min(levels[0], finer * strength / (1 - strength))
    below = [level for level in levels if level < 0.999 * first]
    return [first, *below]


def num_redrawn(strength: float, count: int) -> int:
    """Of `count` indices those to draw again: the share of noise in the variance of latents at level s / (1 - s)."""
    return round(count * strength**2 / (strength**2 + (1 - strength) ** 2))


@torch.no_grad()
def denoise_along(
    predict: Callable[[Tensor, float], Tensor],
    x: Tensor,
    levels: list[float],
    generator: torch.Generator,
    keep: Callable[[Tensor, float], Tensor] = lambda x, sigma: x,
    repeats: int = 1,
) -> Tensor:
    """(B, D, h, w) data, by ancestral steps from x = data + levels[0] * noise down the levels.

    predict: x and its level -> its expected data. keep: x at a level -> x with what is known of it put in. repeats: how
    often a step is taken; between two, x gets the noise again that the step took (RePaint, section 4.2,
    "resampling"), so that what is drawn and what is known come to agree.
    """
    draw = partial(noise, generator=generator)
    x = keep(x, levels[0])
    for sigma, sigma_next in pairwise(levels):
        for repeat in range(repeats):
            x_next = keep(ancestral_step(x, predict(x, sigma), sigma, sigma_next, draw), sigma_next)
            if not sigma_next or repeat == repeats - 1:
                break
            x = x_next + (sigma**2 - sigma_next**2) ** 0.5 * draw(x)
        x = x_next
    return x


def predictor(system: System, labels: Tensor, sampling: Any) -> Callable[[Tensor, float], Tensor]:
    """What data the system's prior expects of x at a level, under these labels: `predict` of `denoise_along`."""
    return lambda x, sigma: system.prior.denoise(x, sigma, labels, sampling)


def drawn_around(
    system: System, tokens: Tensor, strength: float, labels: Tensor, sampling: Any, generator: torch.Generator
) -> Tensor:
    """Images of standardized latents that got noise of the strength's level and lost it again under the labels (SDEdit)."""
    levels = levels_from(system.prior.levels(sampling), strength, system.grid)
    x = tokens + levels[0] * noise(tokens, generator)
    return system.decode(denoise_along(predictor(system, labels, sampling), x, levels, generator)).clamp(-1, 1)

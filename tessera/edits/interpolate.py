"""Interpolation: images on the way from one to another, in the space of latents.

Source: White, "Sampling Generative Networks", 2016, arXiv:1609.04468, section 2 (spherical interpolation).
Differs from it: it is the noisy latents that are interpolated, one noise for both ends, which a prior of latents then
cleans under the null label: the straight line between two images' latents leaves what images look like. Systems with a prior
of indices go along the straight line and take the nearest codes.
"""

from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from tessera.components import Params
from tessera.contracts import Denoises
from tessera.editing.ancestral import denoise_along, levels_from, predictor
from tessera.editing.trial import Trial
from tessera.nn.samplers import noise
from tessera.system import System


class Config(Params):
    kind: Literal["interpolate"] = "interpolate"
    strength: Annotated[float, Field(ge=0, le=1)] = 0.3  # of the noise that the prior removes on the way


def edit(
    images: Tensor,
    labels: Tensor,
    system: System,
    config: Config,
    sampling: Any,
    generator: torch.Generator,
    others: Tensor,
    share: float,
) -> Tensor:
    """From `images` at share 0 to `others` at share 1; both ends are the images themselves."""
    if share in (0, 1):
        return others if share else images
    line = torch.lerp(system.encode_latents(images), system.encode_latents(others), share)
    if not isinstance(system.prior, Denoises) or config.strength == 0:
        return system.decode_latents(line).clamp(-1, 1)
    tokens = system.standardize(line)
    levels = levels_from(system.prior.levels(sampling), config.strength, system.grid)
    x = tokens + levels[0] * noise(tokens[:1], generator)
    predict = predictor(system, system.null_labels(len(images)), sampling)
    return system.decode(denoise_along(predict, x, levels, generator)).clamp(-1, 1)


def trial(
    images: Tensor, labels: Tensor, system: System, config: Config, sampling: Any, generator: torch.Generator
) -> Trial:
    """Halfway to the next image; without a prior: the mean of both."""
    others = images.roll(-1, dims=0)
    edited = edit(images, labels, system, config, sampling, generator, others, 0.5)
    return Trial(images, edited, {"mean_of_pixels": (images + others) / 2}, None)

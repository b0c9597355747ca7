"""Enhancement: images that a damaged one could have come from: less noise, less blur, more pixels.

The damage is an operator with given settings, and what is left is a measurement, y = A(image) + noise. A prior of latents
goes from noise to data, and at each level the expected data are conditioned on the measurement. A masked prior draws each
token of the damaged image again given all others, several times, weighted by the likelihood of the measurement. Both, with
their sources, are in editing/posterior.py.
"""

import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import Annotated, Any, Literal

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor

from tessera.components import Params
from tessera.contracts import Denoises, Planned, PredictsMasked
from tessera.editing.ancestral import denoise_along
from tessera.editing.posterior import Measurement, expected_data, resampled
from tessera.editing.ranges import PixelStd, Tries
from tessera.editing.trial import Trial
from tessera.nn.samplers import noise
from tessera.system import System

LEAST_STD = 0.02  # of a measurement's noise: with less, the steps towards it would be blind to the prior
LEAST_NOISE = 0.001  # a gray level of 255 is 0.008
NoiseStd = Annotated[float, Field(ge=0, le=10)]
Trust = Annotated[float, Field(ge=0.001, le=1e4)]
NEEDS = (Denoises, PredictsMasked)  # a prior with one of these abilities


class Config(Params):
    kind: Literal["enhance"] = "enhance"
    damage: Literal["noise", "blur", "downsample"] = "noise"
    noise_std: NoiseStd = 0.02  # of the measurement, in [-1, 1]; with damage noise, all there is
    blur_std: Annotated[float, Field(ge=0.1, le=100)] = 1.0  # pixels
    factor: Annotated[int, Field(ge=1)] = 2  # downsample: means of factor x factor pixels
    pixel_std: PixelStd = 0.2  # of what decoded tokens cannot explain, in [-1, 1]; masked priors
    trust: Trust = 6.0  # weight of the measurement against a masked prior, which is only an estimate
    correction_steps: Annotated[int, Field(ge=0, le=10_000)] = 20  # of Adam, at each level; diffusion and flow
    sweeps: Tries = 6  # in which every token is drawn again; masked priors
    candidates: Tries = 16  # for each token; masked priors
    told_label: Literal["none", "own"] = "none"

    @model_validator(mode="after")
    def _noise_is_some(self) -> "Config":
        if self.damage == "noise" and self.noise_std < LEAST_NOISE:
            raise ValueError(
                f"damage noise with noise_std {self.noise_std:g} is no damage: expected at least {LEAST_NOISE}, e.g. 0.2"
            )
        return self


def problems(config: Config, planned: Planned) -> Iterator[str]:
    height, width = planned.spec.height, planned.spec.width
    if config.damage == "downsample" and (height % config.factor or width % config.factor):
        yield (
            f"images of {height}x{width} are not divisible by factor {config.factor}: write a factor that divides both, "
            f"such as {math.gcd(height, width, config.factor)}"
        )


def damaged(images: Tensor, config: Config) -> Tensor:
    """A of (B, C, H, W) images: what a measurement without noise is; smaller images where they are downsampled."""
    if config.damage == "downsample":
        height, width = images.shape[2:]
        if height % config.factor or width % config.factor:
            raise ValueError(
                f"images of {height}x{width} are not divisible by enhance.factor {config.factor}: choose one that divides both"
            )
        return F.avg_pool2d(images, config.factor)
    if config.damage == "blur":
        return blurred(images, config.blur_std)
    return images


def blurred(images: Tensor, std: float) -> Tensor:
    """A Gaussian blur, the border repeated outwards."""
    radius = max(1, math.ceil(3 * std))
    places = torch.arange(-radius, radius + 1, dtype=images.dtype, device=images.device)
    kernel = torch.exp(-places.square() / (2 * std**2))
    kernel = kernel / kernel.sum()
    channels = images.shape[1]
    padded = F.pad(images, (radius,) * 4, mode="replicate")
    rows = F.conv2d(padded, kernel.view(1, 1, -1, 1).expand(channels, 1, -1, 1), groups=channels)
    return F.conv2d(rows, kernel.view(1, 1, 1, -1).expand(channels, 1, 1, -1), groups=channels)


def measure(images: Tensor, config: Config, generator: torch.Generator) -> Tensor:
    """What is left of images: A(images) with noise of noise_std."""
    left = damaged(images, config)
    return left + config.noise_std * noise(left, generator)


def first_guess(measured: Tensor, size: tuple[int, int]) -> Tensor:
    """The measurement at the images' size: bicubic, as anybody would enlarge it."""
    if measured.shape[2:] == size:
        return measured.clamp(-1, 1)
    return F.interpolate(measured, size, mode="bicubic", align_corners=False).clamp(-1, 1)


def edit(
    measured: Tensor,
    labels: Tensor,
    system: System,
    config: Config,
    sampling: Any,
    generator: torch.Generator,
    size: tuple[int, int],
) -> Tensor:
    """measured: what `measure` gives -> (B, C, *size) images."""
    system.require("enhance", *NEEDS, means="a diffusion, flow or masked prior")
    observe = partial(damaged, config=config)
    if config.told_label == "none" or not system.prior.config.is_conditional:
        labels = system.null_labels(len(measured))
        sampling = sampling.model_copy(update={"guidance_scale": 1.0})  # there is nothing to guide towards
    if isinstance(system.prior, Denoises):
        return _denoised(observe, measured, labels, system, config, sampling, generator).clamp(-1, 1)
    measurement = Measurement(observe, measured, ((config.noise_std**2 + config.pixel_std**2) / config.trust) ** 0.5)
    with torch.no_grad():
        first = system.encode(first_guess(measured, size))
        drawn = resampled(first, labels, system, measurement, config.sweeps, config.candidates, generator)
        return system.decode(drawn).clamp(-1, 1)


def _denoised(
    observe: Callable[[Tensor], Tensor],
    measured: Tensor,
    labels: Tensor,
    system: System,
    config: Config,
    sampling: Any,
    generator: torch.Generator,
) -> Tensor:
    """Images of latents drawn by ancestral steps towards the expected data, conditioned on the measurement at each level."""

    def observe_latents(data: Tensor) -> Tensor:
        return observe(system.decode(data))

    measurement = Measurement(observe_latents, measured, max(config.noise_std, LEAST_STD))

    def predict(x: Tensor, sigma: float) -> Tensor:
        def denoise(x: Tensor) -> Tensor:
            return system.prior.denoise(x, sigma, labels, sampling)

        return expected_data(x, sigma, denoise, measurement, config.correction_steps)

    levels = system.prior.levels(sampling)
    like = torch.empty(len(measured), *system.spec.latent_shape, device=measured.device)
    x = levels[0] * noise(like, generator)
    return system.decode(denoise_along(predict, x, levels, generator))


def trial(
    images: Tensor, labels: Tensor, system: System, config: Config, sampling: Any, generator: torch.Generator
) -> Trial:
    size = (images.shape[2], images.shape[3])
    measured = measure(images, config, generator)
    edited = edit(measured, labels, system, config, sampling, generator, size)
    guess = first_guess(measured, size)
    with torch.no_grad():
        decoded = system.decode(system.encode(guess)).clamp(-1, 1)
    return Trial(guess, edited, {"bicubic": guess, "encode_decode": decoded}, labels)

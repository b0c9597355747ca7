"""Enhancement: images that a damaged one could have come from: less noise, less blur, more pixels.

The damage is an operator with given config, and what is left is a measurement, y = A(image) + noise. A prior of latents is
followed from noise to data, and at each level its prediction is moved to where it explains the measurement as well. A
masked prior draws tokens again, first all of them and then ever fewer, led at each draw by how a token would change the
error of the measurement; the draw is kept that is most probable, by the prior and the measurement.

Sources: Zhu et al. (DiffPIR), "Denoising Diffusion Models for Plug-and-Play Image Restoration", 2023, arXiv:2305.08995,
algorithm 1; in latents: Song et al. (ReSample), 2023, arXiv:2307.08123, section 3.2; the linear guess of what a token
changes: Grathwohl et al. (Gibbs with gradients), 2021, arXiv:2102.04509, section 3.
Differs from them: the step to the data is a fixed number of Adam's, through the decoder where there is one; tokens are led
in the steps of MaskGIT's sampler, from the codes that are expected of the places still open.
"""

import math
from typing import Annotated, Any, Literal

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor

from tessera.components import Params
from tessera.editing import System, Trial, follow, noise

LEAST_STD = 0.02  # of a measurement's noise: with less, the steps towards it would be blind to the prior
Positive = Annotated[float, Field(gt=0)]


class Config(Params):
    kind: Literal["enhance"] = "enhance"
    damage: Literal["noise", "blur", "downsample"] = "noise"
    noise_std: Annotated[float, Field(ge=0)] = 0.02  # of the measurement, in [-1, 1]; with damage noise, all there is
    blur_std: Positive = 1.0  # pixels
    factor: Annotated[int, Field(ge=1)] = 2  # downsample: means of factor x factor pixels
    pixel_std: Positive = 0.2  # of what decoded tokens cannot explain, in [-1, 1]; masked priors
    trust: Positive = 3.0  # weight of the measurement against the prior, of which a trained one is only an estimate
    correction_steps: Annotated[int, Field(ge=1)] = 40  # of Adam, at each level
    rounds: Annotated[int, Field(ge=1)] = 8  # of drawing tokens again
    candidates: Annotated[int, Field(ge=1)] = 2
    told_label: Literal["none", "own"] = "none"

    @model_validator(mode="after")
    def _noise_is_some(self) -> "Config":
        if self.damage == "noise" and not self.noise_std:
            raise ValueError("damage noise with noise_std 0 is no damage: expected noise_std above 0, e.g. 0.2")
        return self


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
    is_led = system.completes and hasattr(system.prior, "mask_index")
    system.require("enhance", system.denoises or is_led, "a diffusion, flow or masked prior")
    if config.told_label == "none":
        labels = system.null_labels(len(measured))
        sampling = sampling.model_copy(update={"guidance_scale": 1.0})  # there is nothing to guide towards
    if system.denoises:
        images = _followed(measured, labels, system, config, sampling, generator)
    else:
        images = _redrawn(measured, labels, system, config, sampling, generator, size)
    return images.clamp(-1, 1)


def _misfit(images: Tensor, measured: Tensor, config: Config, std: float) -> Tensor:
    """(B,) negative log-likelihood of the measurement, up to a constant."""
    error = (damaged(images, config) - measured).square().sum(dim=(1, 2, 3))
    return config.trust * error / (2 * std**2)


def _followed(
    measured: Tensor, labels: Tensor, system: System, config: Config, sampling: Any, generator: torch.Generator
) -> Tensor:
    levels = system.prior.levels(sampling)

    def correct(data: Tensor, sigma: float, following: float) -> Tensor:
        std = sigma / (1 + sigma**2) ** 0.5  # of the data around their prediction, where data have unit deviation
        return _explained(data, std, measured, system, config)

    like = torch.empty(len(measured), *system.spec.latent_shape, device=measured.device)
    x = levels[0] * noise(like, generator)
    return system.images_of(follow(system, x, levels, labels, sampling, generator, correct=correct))


def _explained(data: Tensor, std: float, measured: Tensor, system: System, config: Config) -> Tensor:
    """The latents near `data`, by `std`, that explain the measurement best."""
    least = max(config.noise_std, LEAST_STD)
    with torch.enable_grad():
        z = data.clone().requires_grad_()
        rate = std / 2
        optimizer = torch.optim.Adam([z], lr=rate, betas=(0.9, 0.9))
        for number in range(config.correction_steps):
            optimizer.param_groups[0]["lr"] = rate * (1 - number / config.correction_steps)
            away = (z - data).square().sum(dim=(1, 2, 3)) / (2 * std**2)
            loss = (_misfit(system.images_of(z), measured, config, least) + away).sum()
            (z.grad,) = torch.autograd.grad(loss, [z])
            optimizer.step()
    return z.detach()


def _redrawn(
    measured: Tensor,
    labels: Tensor,
    system: System,
    config: Config,
    sampling: Any,
    generator: torch.Generator,
    size: tuple[int, int],
) -> Tensor:
    std = (config.noise_std**2 + config.pixel_std**2) ** 0.5
    same_masks = generator.get_state()  # for every estimate of bits, so that draws differ and not the estimates

    @torch.no_grad()
    def surprise(indices: Tensor) -> Tensor:
        """(B,) nats: minus the log-probability of the indices given the measurement, up to a constant."""
        masks = torch.Generator().set_state(same_masks)
        bits = system.prior.bits(indices, labels, masks)
        return _misfit(system.images_of(indices), measured, config, std) + math.log(2) * bits

    def lead(shares: Tensor) -> Tensor:
        return _led(shares, measured, system, config, std)

    with torch.no_grad():
        best = system.tokens_of(first_guess(measured, size))
    least = surprise(best)
    for number in range(config.rounds):
        share = 1 - number / config.rounds  # of the tokens that are drawn again
        current = best
        for _ in range(config.candidates):
            is_known = torch.rand(current.shape, generator=generator).to(current.device) >= share
            drawn = system.prior.complete(current, is_known, labels, sampling, generator, lead=lead)
            found = surprise(drawn)
            is_better = found < least
            best = torch.where(is_better.view(-1, 1, 1), drawn, best)
            least = torch.where(is_better, found, least)
    return system.images_of(best)


def _led(shares: Tensor, measured: Tensor, system: System, config: Config, std: float) -> Tensor:
    """(B, L, K) probabilities of the indices -> what to add to their logits: minus the guessed change of the misfit."""
    batch, length, size = shares.shape
    height, width = system.grid
    every = torch.arange(size, device=shares.device).view(1, 1, -1)
    codes = system.tokenizer.quantizer.indices_to_codes(every).flatten(2).squeeze(0).T  # (K, D)
    with torch.enable_grad():
        expected = (shares @ codes).movedim(2, 1).reshape(batch, -1, height, width).requires_grad_()
        misfit = _misfit(system.tokenizer.decoder(expected).float(), measured, config, std).sum()
        (slope,) = torch.autograd.grad(misfit, [expected])
    slope = slope.flatten(2).movedim(2, 1)  # (B, L, D)
    change = slope @ codes.T - (slope * expected.detach().flatten(2).movedim(2, 1)).sum(dim=2, keepdim=True)
    return -change


def trial(
    images: Tensor, labels: Tensor, system: System, config: Config, sampling: Any, generator: torch.Generator
) -> Trial:
    size = (images.shape[2], images.shape[3])
    measured = measure(images, config, generator)
    edited = edit(measured, labels, system, config, sampling, generator, size)
    guess = first_guess(measured, size)
    with torch.no_grad():
        decoded = system.images_of(system.tokens_of(guess)).clamp(-1, 1)
    return Trial(guess, edited, {"bicubic": guess, "encode_decode": decoded}, labels)

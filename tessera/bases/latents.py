"""The key `latents` of a tokenizer: what makes its latents easier for a prior to model, while it trains.

noise: the decoder rebuilds the image from latents that are mixed with noise, so that neighbouring latents must mean
neighbouring images. equivariance: the decoder rebuilds the turned and scaled image from the turned and scaled latents, so that
a shape has the same latents wherever and however large it stands. Both act in training alone; what `encode` and `decode` do
stays as it is. `perturbation_share` (bases/autoencoder.py) is the third of the kind, for codebooks: wrong indices.

With x an image, E and D the encoder and the decoder, q the quantizer, tau a turn and a change of size:

    without     rec(x, D(q(E(x))))
    noise       rec(x, D(z')),  z' = m + (1 - t) (z - m) + t gamma s eps,  z = q(E(x)),  t ~ U(0, 1),  eps ~ N(0, 1)
    equivariance  rec(tau x, D(q(tau E(x)))) in a share `probability` of the steps

The quantizer sees transformed latents, because an image of another size is to be told by other codes; it sees no noise,
because its codes and its loss are to be those of the latents that are stored. Noise is on what the decoder gets: codes are
pushed apart where the decoder must tell them apart, and near ones come to mean alike, before and after a codebook starts and
with every quantizer. (Noise before the quantizer would change indices; that is what `perturbation_share` does.)

Sources: Yang et al. (l-DeTok), "Latent Denoising Makes Good Visual Tokenizers", 2025, arXiv:2507.15856, interpolative latent
noise; Kouzelis et al. (EQ-VAE), 2025, arXiv:2502.09509, equations 5 to 7 (section 3.3, also that latents are transformed before
they are quantized).
Differs from them: noise is that of latents standardized per channel (m and s are mean and deviation over the batch of this
process), so that gamma means the same for every tokenizer, no encoder can outgrow it, and gamma 1 gives what a flow prior
sees; no inputs are masked; where the authors then tune the decoder alone without noise, `noise_until` leaves the rest of the
training without it, encoder and all. Sides of the grid stay whole; sizes are reduced with antialiasing; a turn and a size are
of a whole step, all its micro-batches and processes, because codebooks draw from the latents of all; images that are no squares
make half turns alone; no step is transformed before a codebook has been placed among the latents.
"""

import math
from typing import Annotated, Any, NamedTuple

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor, nn

from tessera import seeding
from tessera.components import Fraction, Params
from tessera.contracts import HasLevels, ImageSpec, StartsLate

SMALLEST_LPIPS = 16  # pixels: VGG halves them four times


class Settings(Params):
    """Below a key that may be left out, where a wrong key would else be refused without telling the right ones."""

    @model_validator(mode="before")
    @classmethod
    def _keys_are_known(cls, value: Any) -> Any:
        unknown = sorted(set(value) - set(cls.model_fields)) if isinstance(value, dict) else []
        if unknown:
            raise ValueError(f"unknown key {unknown[0]}, expected {' or '.join(cls.model_fields)}")
        return value


class Equivariance(Settings):
    probability: Fraction = 0.5  # of a step: 1 - p_alpha of the paper
    smallest_scale: Annotated[float, Field(gt=0, le=1)] = 0.25  # of each side, drawn between this and 1
    quarter_turns: bool = True

    @model_validator(mode="after")
    def _moves_something(self) -> "Equivariance":
        if self.smallest_scale == 1 and not self.quarter_turns:
            raise ValueError(
                "equivariance neither scales nor turns: write smallest_scale below 1, or quarter_turns: true, or leave it out"
            )
        return self


class LatentRegularization(Settings):
    noise: Annotated[float, Field(ge=0, le=100)] = 0.0  # gamma, in deviations of each channel; 0: none
    noise_until: Annotated[float, Field(gt=0, le=1)] = 1.0  # share of the training after which none is left
    equivariance: Equivariance | None = None

    @model_validator(mode="after")
    def _acts(self) -> "LatentRegularization":
        if self.noise_until != 1 and not self.noise:
            raise ValueError(
                "noise_until says when noise ends, and noise is 0: write noise: 1.0, or leave noise_until out"
            )
        return self


class Transformation(NamedTuple):
    """tau: quarter turns, then another size of the grid of latents."""

    quarter_turns: int
    sides: tuple[int, int]


class Regularizer(nn.Module):
    """What a tokenizer does to its latents in training; without state, and the identity outside training."""

    def __init__(self, config: Any, spec: ImageSpec):
        """config: an AutoencoderConfig that sets `latents`. Raises ValueError, before anything is trained, for images that
        cannot be scaled so far, and where there is no training."""
        super().__init__()
        if not config.training.num_steps:
            raise ValueError(
                "latents act in training alone, and training.num_steps is 0: write a number of steps, or leave latents out"
            )
        self.settings: LatentRegularization = config.latents
        self.grid = (spec.height // config.downsample_factor, spec.width // config.downsample_factor)
        self.seed = torch.initial_seed()  # that of the training: the same in all its processes, and when it resumes
        quantizer = config.quantizer.quantizer if isinstance(config.quantizer, HasLevels) else config.quantizer
        late = quantizer.codes_start_step if isinstance(quantizer, StartsLate) else None
        self.start = 0 if late is None else late + 1
        self.end = self.settings.noise_until * config.training.num_steps
        if self.settings.equivariance is not None:
            _require_room(config, self.grid)

    def noised(self, latents: Tensor, step: int) -> Tensor:
        """(B, D, h, w) what the decoder is to get -> the same, noisy; float32."""
        if not (self.training and self.settings.noise and step < self.end):
            return latents
        return interpolated(latents.float(), self.settings.noise)

    def transformed(self, x: Tensor, step: int) -> Tensor:
        """(B, D, h, w) latents, or (B, C, H, W) images, of whole grids -> as this step of the training transforms them."""
        tau = self.transformation(step) if self.training else None
        if tau is None:
            return x
        factor = x.shape[-1] // self.grid[1]
        turned = torch.rot90(x.float(), tau.quarter_turns, (-2, -1))
        return resized(turned, (tau.sides[0] * factor, tau.sides[1] * factor))

    def transformation(self, step: int) -> Transformation | None:
        """Kouzelis et al., equations 6 and 7: tau of a step, None for the identity; by the seed of the training and the step
        alone."""
        settings = self.settings.equivariance
        if settings is None or step < self.start:
            return None
        generator = seeding.numpy_generator(self.seed, "equivariance", step)
        if generator.random() >= settings.probability:
            return None
        turns = ((1, 2, 3) if self.grid[0] == self.grid[1] else (2,)) if settings.quarter_turns else (0,)
        drawn = int(generator.choice(turns))
        height, width = (
            int(generator.integers(shortest(side, settings.smallest_scale), side + 1)) for side in self.grid
        )
        return Transformation(drawn, (height, width))


def shortest(side: int, scale: float) -> int:
    """The shortest whole side that is at least this share of one."""
    return max(1, math.ceil(side * scale - 1e-9))


def interpolated(latents: Tensor, gamma: float) -> Tensor:
    """Yang et al.: x' = (1 - t) x + t gamma eps, t ~ U(0, 1) of each image, of (B, D, h, w) latents standardized per channel.

    Drawn from torch's global generator. The variance of a channel becomes (1 + gamma^2) / 3 times its own.
    """
    of_channel = (0, 2, 3)
    mean = latents.detach().mean(of_channel, keepdim=True)
    std = latents.detach().std(of_channel, keepdim=True, correction=0)
    level = torch.rand(len(latents), 1, 1, 1, device=latents.device)
    return mean + (1 - level) * (latents - mean) + level * gamma * std * torch.randn_like(latents)


def resized(x: Tensor, sides: tuple[int, int]) -> Tensor:
    """(B, C, H, W) float32 -> (B, C, *sides), bicubic and antialiased: as products with two matrices, whose gradients, unlike
    those of F.interpolate, have the same bits each time on a GPU."""
    if tuple(x.shape[-2:]) == sides:
        return x
    with torch.autocast(x.device.type, enabled=False):
        rows, columns = (_resizing(before, after, x.device) for before, after in zip(x.shape[-2:], sides, strict=True))
        return rows @ x @ columns.T


@torch.no_grad()
def _resizing(before: int, after: int, device: torch.device) -> Tensor:
    """(after, before): what makes `before` values `after` ones."""
    one = torch.eye(before, device=device)[None, None]
    return F.interpolate(one, (after, before), mode="bicubic", antialias=True)[0, 0]


def _require_room(config: Any, grid: tuple[int, int]) -> None:
    """Raises ValueError where nothing is left to transform, or the losses could not see the smallest image."""
    if grid == (1, 1):
        raise ValueError(
            "latents.equivariance turns and scales a grid of latents, but these images have a grid of 1x1: take a smaller "
            "patch_size or fewer channel_multipliers, or leave it out"
        )
    needs = {1: "it"}
    if config.perceptual == "lpips":
        needs[SMALLEST_LPIPS] = "perceptual: lpips"
    if getattr(config, "adversarial_weight", 0):
        needs[2**config.discriminator_layers] = f"a discriminator of {config.discriminator_layers} discriminator_layers"
    wanted, factor, side = max(needs), config.downsample_factor, min(grid)
    scale = config.latents.equivariance.smallest_scale
    if not config.latents.equivariance.quarter_turns and shortest(max(grid), scale) == max(grid):
        raise ValueError(
            f"latents.equivariance.smallest_scale {scale:g} leaves a grid of {grid[0]}x{grid[1]} as it is, whose sides stay "
            f"whole, and nothing is turned: write {math.floor((max(grid) - 1) / max(grid) * 100) / 100:g} or less"
        )
    if shortest(side, scale) * factor < min(wanted, side * factor):
        enough = min(1.0, math.ceil(wanted / factor) / side)
        raise ValueError(
            f"latents.equivariance.smallest_scale {scale:g} leaves {shortest(side, scale) * factor} pixels of {side * factor}, "
            f"but {needs[wanted]} takes no fewer than {wanted}: write {math.ceil(enough * 100) / 100:g} or more"
        )

"""What every edit works with: a trained system that turns images into tokens and back, and what its prior can do.

An edit is a file of tessera/edits: its Config; `edit(images, labels, system, config, sampling, generator, ...)`, which takes
and gives (B, C, H, W) float32 images in [-1, 1]; and `trial(...)`, which damages test images, edits them, and does what
anybody could do without a prior, to compare with.
"""

import math
from collections.abc import Callable
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from tessera.artifacts import tokens as token_artifact
from tessera.contracts import Learns, TokenSpec
from tessera.system import ImageGenerator

PROBES = 8  # random images by which the reach of tokens is measured


class Trial(NamedTuple):
    """What an edit did to test images, all (B, C, H, W) in [-1, 1]."""

    given: Tensor  # what the edit was given to see
    edited: Tensor
    baselines: dict[str, Tensor]  # by name: the same without a prior
    labels: Tensor | None  # (B,) what the results should show; None: nobody can say
    mask: Tensor | None = None  # (B, H, W) the pixels that the edit may change; None: all

    @staticmethod
    def joined(parts: "list[Trial]") -> "Trial":
        """One trial of all images, on the CPU."""

        def cat(values: list[Tensor | None]) -> Tensor | None:
            return None if values[0] is None else torch.cat(values).cpu()

        baselines = {key: cat([part.baselines[key] for part in parts]) for key in parts[0].baselines}
        return Trial(
            cat([part.given for part in parts]),
            cat([part.edited for part in parts]),
            baselines,
            cat([part.labels for part in parts]),
            cat([part.mask for part in parts]),
        )


class CannotEdit(ValueError):
    """The prior of this system has no means for this edit; the sentence says which priors do."""


class System:
    """A tokenizer and the prior of its tokens. `tokens` are (B, *index_grid) indices or (B, D, h, w) standardized latents."""

    def __init__(
        self, tokenizer: nn.Module, prior: nn.Module, spec: TokenSpec, learns: Learns, name: str = "this system"
    ):
        self.tokenizer, self.prior, self.spec, self.learns, self.name = tokenizer, prior, spec, learns, name
        self.device = next(prior.parameters()).device
        self.grid = spec.latent_shape[1:]  # (h, w) of tokens, whatever a token is

    @staticmethod
    def of(generator: ImageGenerator, name: str) -> "System":
        return System(generator.decoder.eval(), generator.model.eval(), generator.spec, generator.module.LEARNS, name)

    @property
    def completes(self) -> bool:
        return hasattr(self.prior, "complete")

    @property
    def denoises(self) -> bool:
        return hasattr(self.prior, "denoise")

    def require(self, edit: str, able: bool, means: str) -> None:
        if not able:
            kind = type(self.prior).__module__.rpartition(".")[2]
            raise CannotEdit(
                f"{self.name} cannot {edit}: its prior {kind} has no way to do so; choose a system with {means}"
            )

    def null_labels(self, count: int) -> Tensor:
        """(B,) the label that says nothing."""
        return torch.full((count,), self.spec.num_classes, device=self.device)

    def latents_of(self, images: Tensor) -> Tensor:
        """(B, D, h, w) latents as the tokenizer gives them, before quantization."""
        return self.tokenizer.encode(images).latents

    def tokens_of(self, images: Tensor) -> Tensor:
        encoded = self.tokenizer.encode(images)
        if self.learns == "indices":
            return encoded.indices
        return self.standardized(encoded.latents)

    def indices_of(self, latents: Tensor) -> Tensor:
        """(B, D, h, w) latents before quantization -> their (B, *index_grid) indices."""
        return self.tokenizer.quantizer(latents).indices

    def images_of(self, tokens: Tensor) -> Tensor:
        if self.learns == "indices":
            return self.tokenizer.decode_indices(tokens)
        return self.tokenizer.decode(token_artifact.unstandardize(tokens, self.spec))

    def standardized(self, latents: Tensor) -> Tensor:
        mean, std = (
            latents.new_tensor(values).view(-1, 1, 1) for values in (self.spec.latent_mean, self.spec.latent_std)
        )
        return (latents - mean) / std

    def spread(self, tokens: Tensor) -> Tensor:
        """(B, h, w) about tokens -> (B, *index_grid), where a token may be several indices side by side."""
        return tokens.repeat_interleave(self.spec.index_grid[1] // self.grid[1], dim=2)

    @cached_property
    def reach(self) -> Tensor:
        """(h, w, H, W) how much each token decides each pixel: from 0, and at most 1 for each token.

        Measured: the mean absolute change of the decoded pixels when this token alone is exchanged for that of another
        image, over PROBES random pairs; divided by the largest of the token.
        """
        generator = torch.Generator().manual_seed(0)
        depth, height, width = self.spec.latent_shape
        mean = torch.tensor(self.spec.latent_mean).view(-1, 1, 1)
        std = torch.tensor(self.spec.latent_std).view(-1, 1, 1)
        drawn = mean + std * torch.randn(2 * PROBES, depth, height, width, generator=generator)
        ours, theirs = drawn.to(self.device).chunk(2)
        with torch.no_grad():
            before = self.tokenizer.decode(ours)
            rows = []
            for row in range(height):
                for column in range(width):
                    changed = ours.clone()
                    changed[:, :, row, column] = theirs[:, :, row, column]
                    rows.append((self.tokenizer.decode(changed) - before).abs().mean(dim=(0, 1)))
        reach = torch.stack(rows).view(height, width, *before.shape[2:])
        return reach / reach.amax(dim=(2, 3), keepdim=True).clamp_min(1e-12)

    def touched(self, mask: Tensor, least: float) -> Tensor:
        """(B, H, W) booleans of pixels -> (B, h, w) whether a token decides some such pixel by more than `least`."""
        decides = self.reach > least
        return (decides.flatten(2).float() @ mask.flatten(1).T.to(decides.device, torch.float32) > 0).movedim(2, 0)


def noise(like: Tensor, generator: torch.Generator) -> Tensor:
    """Standard normal numbers of a CPU generator: the same on every device."""
    return torch.randn(like.shape, generator=generator).to(like.device)


def levels_from(levels: list[float], strength: float, grid: tuple[int, int]) -> list[float]:
    """As many levels, from that of the strength to 0: level s / (1 - s) on a grid of 8x8 or less, at most the first.

    Neighbors on a finer grid show much the same and average the noise away: with n places on a side it takes n / 8 times
    the noise to hide as much (Hoogeboom et al., "Simple Diffusion", 2023, arXiv:2301.11093, section 3.1).
    """
    finer = max(1.0, math.sqrt(grid[0] * grid[1]) / 8)
    first = levels[0] if strength == 1 else min(levels[0], finer * strength / (1 - strength))
    below = [level for level in levels if level < 0.999 * first]
    return [first, *below]


def number_drawn(strength: float, count: int) -> int:
    """Of `count` indices those to draw again: the share of noise in the variance of latents at level s / (1 - s)."""
    return round(count * strength**2 / (strength**2 + (1 - strength) ** 2))


def ancestral_step(x: Tensor, data: Tensor, sigma: float, following: float, generator: torch.Generator) -> Tensor:
    """From x = data + sigma * noise to the following level, with fresh noise for what the level keeps no more."""
    kept = (following / sigma) ** 2
    ahead = data + kept * (x - data)
    if not following:
        return ahead
    return ahead + following * (1 - kept) ** 0.5 * noise(x, generator)


@torch.no_grad()
def follow(
    system: System,
    x: Tensor,
    levels: list[float],
    labels: Tensor,
    sampling: Any,
    generator: torch.Generator,
    predict: Callable[[Tensor, float], Tensor] | None = None,
    keep: Callable[[Tensor, float], Tensor] = lambda x, sigma: x,
    repeats: int = 1,
) -> Tensor:
    """From x = data + levels[0] * noise down the levels by ancestral steps towards the data that are predicted.

    predict: x and its level -> its expected data; the prior's own if None. keep: x at a level -> x with what is known of it
    put in. repeats: how often a step is taken; between two, x gets the noise again that the step took (RePaint:
    Lugmayr et al., 2022, arXiv:2201.09865, section 4.2), so that what is drawn and what is known come to agree.
    """
    x = keep(x, levels[0])
    for sigma, following in zip(levels, levels[1:], strict=False):
        for repeat in range(repeats):
            data = predict(x, sigma) if predict else system.prior.denoise(x, sigma, labels, sampling)
            ahead = keep(ancestral_step(x, data, sigma, following, generator), following)
            if not following or repeat == repeats - 1:
                break
            x = ahead + (sigma**2 - following**2) ** 0.5 * noise(x, generator)
        x = ahead
    return x


def drawn_around(
    system: System, tokens: Tensor, strength: float, labels: Tensor, sampling: Any, generator: torch.Generator
) -> Tensor:
    """(B, C, H, W) images of latents that got noise of the strength's level and lost it again under the labels."""
    levels = levels_from(system.prior.levels(sampling), strength, system.grid)
    x = tokens + levels[0] * noise(tokens, generator)
    return system.images_of(follow(system, x, levels, labels, sampling, generator)).clamp(-1, 1)

"""Inpainting: draw anew what a mask covers, so that it fits what is left of the image.

Tokens that decide a covered pixel are drawn given the others: by a masked prior all at once in several steps, by an
autoregressive one with the known ones forced, by diffusion and flow with the known ones put back, noisy, at each level.
Of several drawn candidates the one is kept that fits best; then the known pixels are put back, exactly, and the seam is
closed inside the hole.

Sources: Chang et al. (MaskGIT), 2022, arXiv:2202.04200, section 4.3 (completion of tokens); Lugmayr et al. (RePaint), 2022,
arXiv:2201.09865, section 4.2; sampling and importance resampling: Rubin, 1988; the membrane that closes the seam: Perez
et al., "Poisson Image Editing", 2003, section 2, the guidance field being the gradient of what was drawn.
Differs from them: which tokens are drawn is measured from the decoder (System.reach); a candidate is drawn in proportion to
how well it explains what is known and was not used: pixels near the seam, and for a left-to-right prior the known
tokens behind the hole.
"""

from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from tessera.components import Params
from tessera.editing import System, Trial, follow, noise
from tessera.nn.membrane import close_seam

Share = Annotated[float, Field(ge=0, lt=1)]


class Config(Params):
    kind: Literal["inpaint"] = "inpaint"
    least_reach: Share = (
        0.2  # a token is drawn if it decides a covered pixel by more than this share of its largest effect
    )
    candidates: Annotated[int, Field(ge=1)] = 4
    pixel_std: Annotated[float, Field(gt=0)] = 0.25  # of the known pixels that a candidate has to explain, in [-1, 1]
    repeats: Annotated[int, Field(ge=1)] = 4  # of each step of diffusion and flow
    is_labelled: bool = False  # whether the prior is told the label of the image
    hole: Literal["bottom", "top", "left", "right", "center"] = "bottom"  # of test images: a half, or half of each side


def edit(
    images: Tensor,
    labels: Tensor,
    system: System,
    config: Config,
    sampling: Any,
    generator: torch.Generator,
    mask: Tensor,
) -> Tensor:
    """mask: (B, H, W) booleans, True where a pixel is covered; what `images` has there is not looked at."""
    system.require("inpaint", system.completes or system.denoises, "a masked, autoregressive, diffusion or flow prior")
    if not config.is_labelled:
        labels = system.null_labels(len(images))
    if not mask.any():
        return images
    images = mean_filled(images, mask)
    is_open = system.touched(mask, config.least_reach)
    best, best_score = images, torch.full((len(images),), -torch.inf, device=images.device)
    for _ in range(config.candidates):
        if system.completes:
            drawn, score = _completed(images, is_open, labels, system, sampling, generator)
        else:
            drawn, score = _repainted(images, is_open, labels, system, config.repeats, sampling, generator), 0.0
        error = ((drawn - images).square() * ~mask.unsqueeze(1)).sum(dim=(1, 2, 3))
        score = score - error / (2 * config.pixel_std**2)
        chance = score - torch.rand(len(images), generator=generator).log().neg().log().to(score.device)
        is_better = chance > best_score  # the largest of score + Gumbel noise is a draw in proportion to exp(score)
        best = torch.where(is_better.view(-1, 1, 1, 1), drawn, best)
        best_score = torch.where(is_better, chance, best_score)
    return close_seam(images, best, mask)


def mean_filled(images: Tensor, mask: Tensor) -> Tensor:
    """The mean of each image's known pixels where the mask is, per channel."""
    return torch.where(mask.unsqueeze(1), known_mean(images, mask), images)


def known_mean(images: Tensor, mask: Tensor) -> Tensor:
    """(B, C, 1, 1)"""
    known = ~mask.unsqueeze(1)
    return (images * known).sum(dim=(2, 3), keepdim=True) / known.sum(dim=(2, 3), keepdim=True).clamp_min(1)


def _completed(
    images: Tensor, is_open: Tensor, labels: Tensor, system: System, sampling: Any, generator: torch.Generator
) -> tuple[Tensor, Tensor | float]:
    """Decoded images whose open tokens were drawn, and the log-probability of known tokens that drawing did not look at."""
    indices, is_known = system.tokens_of(images), ~system.spread(is_open)
    drawn = system.prior.complete(indices, is_known, labels, sampling, generator)
    unread = getattr(system.prior, "unread_evidence", None)
    return system.images_of(drawn), unread(drawn, is_known, labels) if unread else 0.0


def _repainted(
    images: Tensor,
    is_open: Tensor,
    labels: Tensor,
    system: System,
    repeats: int,
    sampling: Any,
    generator: torch.Generator,
) -> Tensor:
    known, is_known = system.tokens_of(images), ~is_open.unsqueeze(1)

    def keep(x: Tensor, sigma: float) -> Tensor:
        return torch.where(is_known, known + sigma * noise(known, generator), x)

    levels = system.prior.levels(sampling)
    x = levels[0] * noise(known, generator)
    return system.images_of(follow(system, x, levels, labels, sampling, generator, keep=keep, repeats=repeats))


def trial(
    images: Tensor, labels: Tensor, system: System, config: Config, sampling: Any, generator: torch.Generator
) -> Trial:
    mask = hole_of(config, images.shape[2:]).to(images.device).expand(len(images), -1, -1)
    edited = edit(images, labels, system, config, sampling, generator, mask)
    mean = mean_filled(images, mask)
    hole = mask.unsqueeze(1)
    with torch.no_grad():
        decoded = system.images_of(system.tokens_of(mean)).clamp(-1, 1)
    baselines = {
        "mean_fill": mean,
        "smooth_fill": close_seam(images, known_mean(images, mask).expand_as(images), mask),
        "encode_decode": torch.where(hole, decoded, images),
    }
    return Trial(torch.where(hole, -1.0, images), edited, baselines, labels, mask)


def hole_of(config: Config, size: torch.Size) -> Tensor:
    """(H, W) booleans"""
    height, width = size
    mask = torch.zeros(height, width, dtype=torch.bool)
    rows = {"bottom": slice(height // 2, None), "top": slice(height // 2), "center": slice(height // 4, -(height // 4))}
    columns = {"right": slice(width // 2, None), "left": slice(width // 2), "center": slice(width // 4, -(width // 4))}
    mask[rows.get(config.hole, slice(None)), columns.get(config.hole, slice(None))] = True
    return mask

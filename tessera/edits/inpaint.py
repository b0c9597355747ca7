"""Inpainting: draw anew what a mask covers, so that it fits what is left of the image.

Tokens that decide a covered pixel are drawn given the others: by a masked prior all at once in several steps, by an
autoregressive one with the known ones forced, by diffusion and flow with the known ones put back, noisy, at each level.
Of several drawn candidates the one is kept that fits best; then the known pixels are put back, exactly, and the seam is
closed inside the hole.

Unless a label is given, each candidate has one of its own, drawn in proportion to how well it explains what is known
(label_evidence.py): priors are trained to know labels, and without one, seldom, they know less.

Sources: Chang et al. (MaskGIT), 2022, arXiv:2202.04200, section 4.3 (completion of tokens); Lugmayr et al. (RePaint), 2022,
arXiv:2201.09865, section 4.2; sampling and importance resampling: Rubin, 1988; the membrane that closes the seam: Perez
et al., "Poisson Image Editing", 2003, section 2, the guidance field being the gradient of what was drawn.
Differs from them: which tokens are drawn is measured from the decoder (System.reach); a candidate is drawn in proportion to
how well it explains what is known and was not used: pixels near the seam, and for a left-to-right prior the known
tokens behind the hole. The tokenizer sees the hole filled with the median of what is known: a mean, which may be a color
that no image has, spoils its statistics of the whole image.
"""

from typing import Annotated, Any, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from tessera.components import Params
from tessera.editing.label_evidence import label_chances, log_shares
from tessera.editing.trial import System, Trial, follow, noise
from tessera.nn.gumbel import gumbel_noise
from tessera.nn.membrane import close_seam

SEAM_SHARE = 1 / 8  # of the image's longer side: how far into the hole its border's correction reaches
Share = Annotated[float, Field(ge=0, lt=1)]


class Config(Params):
    kind: Literal["inpaint"] = "inpaint"
    least_reach: Share = (
        0.2  # a token is drawn if it decides a covered pixel by more than this share of its largest effect
    )
    candidates: Annotated[int, Field(ge=1)] = 4
    pixel_std: Annotated[float, Field(gt=0)] = 0.25  # of the known pixels that a candidate has to explain, in [-1, 1]
    repeats: Annotated[int, Field(ge=1)] = 4  # of each step of diffusion and flow
    told_label: Literal["none", "inferred", "own"] = "inferred"  # by what is known: a draw for each candidate
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
    if not mask.any():
        return images
    is_open = system.touched(mask, config.least_reach)
    images = torch.where(mask.unsqueeze(1), known_median(images, mask), images)
    with torch.no_grad():
        tokens = system.tokens_of(images)
    chances = _chances(tokens, ~is_open, labels, system, config, sampling, generator)
    wanted = F.pad(log_shares(system), (0, 1)).to(images.device)  # to the null label no other is compared
    best, best_score = images, torch.full((len(images),), -torch.inf, device=images.device)
    for _ in range(config.candidates):
        told = (chances + gumbel_noise(chances.shape, generator).to(chances.device)).argmax(dim=1)
        if system.completes:
            drawn, score = _completed(tokens, is_open, told, system, sampling, generator)
            if not system.prior.reads_all_known:  # what is wanted of the label over what it was drawn with
                score = score + wanted[told] - chances.gather(1, told.unsqueeze(1)).squeeze(1)
        else:
            drawn, score = _repainted(tokens, is_open, told, system, config.repeats, sampling, generator), 0.0
        error = ((drawn - images).square() * ~mask.unsqueeze(1)).sum(dim=(1, 2, 3))
        score = score - error / (2 * config.pixel_std**2)
        chance = score + gumbel_noise(error.shape, generator).to(error.device)
        is_better = chance > best_score  # the largest of score + Gumbel noise is a draw in proportion to exp(score)
        best = torch.where(is_better.view(-1, 1, 1, 1), drawn, best)
        best_score = torch.where(is_better, chance, best_score)
    return close_seam(images, best, mask, SEAM_SHARE * max(images.shape[2:]))


def _chances(
    tokens: Tensor,
    is_known: Tensor,
    labels: Tensor,
    system: System,
    config: Config,
    sampling: Any,
    generator: torch.Generator,
) -> Tensor:
    """(B, num_classes + 1) log-probabilities of the labels that the prior may be told; the last one says nothing."""
    size = system.spec.num_classes + 1
    chances = torch.full((len(tokens), size), -torch.inf, device=tokens.device)
    if config.told_label == "inferred" and system.prior.config.is_conditional:
        chances[:, :-1] = label_chances(system, tokens, is_known, sampling, generator)
        return chances
    told = labels if config.told_label == "own" else system.null_labels(len(tokens))
    return chances.scatter(1, told.unsqueeze(1), 0.0)


def known_median(images: Tensor, mask: Tensor) -> Tensor:
    """(B, C, 1, 1) The median of each channel's known pixels: what most of an image is, its background often."""
    hidden = mask.unsqueeze(1).expand_as(images)
    known = images.masked_fill(hidden, torch.nan).flatten(2).nanmedian(dim=2).values
    return known.nan_to_num(0.0)[..., None, None]  # of an image that is covered whole nothing is known


def mean_filled(images: Tensor, mask: Tensor) -> Tensor:
    """The mean of each image's known pixels where the mask is, per channel."""
    return torch.where(mask.unsqueeze(1), known_mean(images, mask), images)


def known_mean(images: Tensor, mask: Tensor) -> Tensor:
    """(B, C, 1, 1)"""
    known = ~mask.unsqueeze(1)
    return (images * known).sum(dim=(2, 3), keepdim=True) / known.sum(dim=(2, 3), keepdim=True).clamp_min(1)


@torch.no_grad()
def _completed(
    tokens: Tensor, is_open: Tensor, labels: Tensor, system: System, sampling: Any, generator: torch.Generator
) -> tuple[Tensor, Tensor | float]:
    """Decoded images whose open tokens were drawn, and the log-probability of known tokens that drawing did not look at."""
    is_known = ~system.spread(is_open)
    drawn = system.prior.complete(tokens, is_known, labels, sampling, generator)
    prior = system.prior
    score = 0.0 if prior.reads_all_known else prior.evidence(drawn, is_known, labels, generator)
    return system.images_of(drawn).clamp(-1, 1), score


@torch.no_grad()
def _repainted(
    known: Tensor,
    is_open: Tensor,
    labels: Tensor,
    system: System,
    repeats: int,
    sampling: Any,
    generator: torch.Generator,
) -> Tensor:
    is_known = ~is_open.unsqueeze(1)

    def keep(x: Tensor, sigma: float) -> Tensor:
        return torch.where(is_known, known + sigma * noise(known, generator), x)

    levels = system.prior.levels(sampling)
    x = levels[0] * noise(known, generator)
    drawn = follow(system, x, levels, labels, sampling, generator, keep=keep, repeats=repeats)
    return system.images_of(drawn).clamp(-1, 1)


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

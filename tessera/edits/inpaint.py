"""Inpainting: draw anew what a mask covers, so that it fits what is left of the image.

Tokens that decide a covered pixel are drawn given the others: by a masked prior all at once in several steps, by an
autoregressive one with the known ones forced, by diffusion and flow with the known ones put back, noisy, at each level.
Of several drawn candidates the one is kept that fits best; then the known pixels are put back, exactly, and the seam is
closed inside the hole.

Unless a label is given, each candidate has one of its own, drawn from the posterior over labels given what is known
(editing/label_evidence.py): priors are trained to know labels, and without one, seldom, they know less. A prior that can do
no more than complete is told no label, and its candidates compete by the known pixels alone.

Sources: Chang et al. (MaskGIT), 2022, arXiv:2202.04200, section 4.3 (completion of tokens); Lugmayr et al. (RePaint), 2022,
arXiv:2201.09865, section 4.2; sampling and importance resampling: Rubin, 1988; the membrane that closes the seam: Perez
et al., "Poisson Image Editing", 2003, section 2, the guidance field being the gradient of what was drawn.
Differs from them: which tokens are drawn is measured from the decoder (System.reach); candidates are resampled by the
likelihood of what is known and was not read: pixels near the seam, and for a left-to-right prior the known tokens behind
the hole. The tokenizer sees the hole filled with the median of what is known: a mean, which may be a color
that no image has, spoils its statistics of the whole image.
"""

from typing import Annotated, Any, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from tessera.components import Params
from tessera.contracts import Completes, Denoises, KnowsEvidence
from tessera.editing.ancestral import denoise_along, predictor
from tessera.editing.label_evidence import label_log_frequencies, label_log_probs
from tessera.editing.ranges import PixelStd, Tries
from tessera.editing.trial import Trial
from tessera.nn.gumbel import gumbel_noise
from tessera.nn.membrane import close_seam
from tessera.nn.samplers import noise
from tessera.system import System

SEAM_SHARE = 1 / 8  # of the image's longer side: how far into the hole its border's correction reaches
Share = Annotated[float, Field(ge=0, lt=1)]
NEEDS = (Completes, Denoises)  # a prior with one of these abilities


class Config(Params):
    kind: Literal["inpaint"] = "inpaint"
    least_reach: Share = (
        0.2  # a token is drawn if it decides a covered pixel by more than this share of its largest effect
    )
    candidates: Tries = 4
    pixel_std: PixelStd = 0.25  # of the known pixels that a candidate has to explain, in [-1, 1]
    repeats: Tries = 4  # of each step of diffusion and flow
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
    system.require("inpaint", *NEEDS, means="a masked, autoregressive, diffusion or flow prior")
    if not mask.any():
        return images
    is_open = system.touched(mask, config.least_reach)
    images = torch.where(mask.unsqueeze(1), known_median(images, mask), images)
    with torch.no_grad():
        tokens = system.encode(images)
    log_probs = _label_log_probs(tokens, ~is_open, labels, system, config, sampling, generator)
    best, best_score = images, torch.full((len(images),), -torch.inf, device=images.device)
    for _ in range(config.candidates):
        told = (log_probs + gumbel_noise(log_probs, generator)).argmax(dim=1)
        if isinstance(system.prior, Completes):
            drawn, log_weight = _completed(tokens, is_open, told, log_probs, system, sampling, generator)
        else:
            drawn, log_weight = _repainted(tokens, is_open, told, system, config.repeats, sampling, generator), 0.0
        error = ((drawn - images).square() * ~mask.unsqueeze(1)).sum(dim=(1, 2, 3))
        log_weight = log_weight - error / (2 * config.pixel_std**2)
        score = log_weight + gumbel_noise(error, generator)
        is_better = score > best_score  # the largest of log_weight + Gumbel noise is a draw by the weights
        best = torch.where(is_better.view(-1, 1, 1, 1), drawn, best)
        best_score = torch.where(is_better, score, best_score)
    return close_seam(images, best, mask, SEAM_SHARE * max(images.shape[2:]))


def _label_log_probs(
    tokens: Tensor,
    is_known: Tensor,
    labels: Tensor,
    system: System,
    config: Config,
    sampling: Any,
    generator: torch.Generator,
) -> Tensor:
    """(B, num_classes + 1) log-probabilities by which the condition of a candidate is drawn; the last is the null label."""
    size = system.spec.num_classes + 1
    log_probs = torch.full((len(tokens), size), -torch.inf, device=tokens.device)
    can_infer = system.prior.config.is_conditional and isinstance(system.prior, KnowsEvidence | Denoises)
    if config.told_label == "inferred" and can_infer:
        log_probs[:, :-1] = label_log_probs(system, tokens, is_known, sampling, generator)
        return log_probs
    told = labels if config.told_label == "own" else system.null_labels(len(tokens))
    return log_probs.scatter(1, told.unsqueeze(1), 0.0)


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
    tokens: Tensor,
    is_open: Tensor,
    labels: Tensor,
    log_probs: Tensor,
    system: System,
    sampling: Any,
    generator: torch.Generator,
) -> tuple[Tensor, Tensor | float]:
    """Images whose open tokens were drawn, and their log importance weights: target over proposal.

    A prior that reads all that is known draws from the target itself. Of another, the target has the probability of the known
    tokens that the draw did not read, and the frequency of its label, which was drawn by `log_probs` instead. What a prior
    cannot tell counts as equal for all candidates.
    """
    is_known, prior = ~system.on_index_grid(is_open), system.prior
    drawn = prior.complete(tokens, is_known, labels, sampling, generator)
    log_weight = 0.0
    if isinstance(prior, KnowsEvidence) and not prior.reads_all_known:
        frequencies = F.pad(label_log_frequencies(system), (0, 1)).to(labels.device)  # the null label has no rival
        log_weight = prior.evidence(drawn, is_known, labels, generator)
        log_weight = log_weight + frequencies[labels] - log_probs.gather(1, labels.unsqueeze(1)).squeeze(1)
    return system.decode(drawn).clamp(-1, 1), log_weight


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
    """Images of latents drawn by ancestral steps, the known ones put back, with noise, at each level (RePaint, algorithm 1)."""
    is_known = ~is_open.unsqueeze(1)

    def keep(x: Tensor, sigma: float) -> Tensor:
        return torch.where(is_known, known + sigma * noise(known, generator), x)

    levels = system.prior.levels(sampling)
    x = levels[0] * noise(known, generator)
    drawn = denoise_along(predictor(system, labels, sampling), x, levels, generator, keep, repeats)
    return system.decode(drawn).clamp(-1, 1)


def trial(
    images: Tensor, labels: Tensor, system: System, config: Config, sampling: Any, generator: torch.Generator
) -> Trial:
    mask = hole_of(config, images.shape[2:]).to(images.device).expand(len(images), -1, -1)
    edited = edit(images, labels, system, config, sampling, generator, mask)
    mean = mean_filled(images, mask)
    hole = mask.unsqueeze(1)
    with torch.no_grad():
        decoded = system.decode(system.encode(mean)).clamp(-1, 1)
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

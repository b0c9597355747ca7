"""Restyling: an image under another label, or with the look of a reference image, by a strength from 0 to 1.

At strength 0 the image comes back as it is; at 1 nothing of it is left but the label. Between, diffusion and flow add
noise of a level that rises with the strength and remove it again under the label; priors of indices draw as large a share
of the tokens again, first those that suit the label least. With a reference the latents first take over the mean and
deviation of its channels, by the strength.

Sources: Meng et al. (SDEdit), 2021, arXiv:2108.01073, section 3.1; the statistics of a style: Huang and Belongie (AdaIN),
2017, arXiv:1703.06868, equation 8; drawing unlikely tokens again: Chang et al. (MaskGIT), 2022, arXiv:2202.04200, section
4.3, where places are chosen by hand.
Differs from them: a strength is a time, t = 1 - strength, with level (1 - t) / t on a grid of 8x8, and of as many indices
are kept as the share of data in the variance there (editing/ancestral.py); of several draws of indices the one is kept
that shows the label best, by the prior itself.
"""

from collections.abc import Iterator
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from tessera.components import Params
from tessera.contracts import Completes, Denoises, KnowsLikelihood, Planned, PredictsMasked, PredictsNext
from tessera.editing.ancestral import drawn_around, num_redrawn
from tessera.editing.ranges import Tries
from tessera.editing.trial import Trial
from tessera.nn.gumbel import uniform
from tessera.system import System

MASKINGS = 4  # times that a masked prior judges the tokens
SEEN_SHARE = 0.1  # of the tokens, by which it judges the others
NEEDS = (Completes, Denoises)  # a prior with one of these abilities


class Config(Params):
    kind: Literal["restyle"] = "restyle"
    strength: Annotated[float, Field(ge=0, le=1)] = 0.6
    candidates: Tries = 4  # of priors of indices: the one is kept that shows the label best
    target: Annotated[int, Field(ge=0)] | None = None  # the label to restyle towards; null: the image's own


def problems(config: Config, planned: Planned) -> Iterator[str]:
    if config.target is not None and config.target >= planned.spec.num_classes:
        yield (
            f"target is {config.target}, but there are {planned.spec.num_classes} classes: write 0 to "
            f"{planned.spec.num_classes - 1}"
        )
    elif config.target is not None and config.target not in planned.labels["train"]:
        yield f"target is {config.target}, a class without a training image: write another one, or null"


def edit(
    images: Tensor,
    labels: Tensor,
    system: System,
    config: Config,
    sampling: Any,
    generator: torch.Generator,
    reference: Tensor | None = None,
) -> Tensor:
    """reference: (C, H, W) or None. labels: (B,) of the images, used where config.target is None."""
    system.require("restyle", *NEEDS, means="a masked, autoregressive, diffusion or flow prior")
    if config.strength == 0:
        return images
    if config.target is not None:
        if config.target >= system.spec.num_classes:
            raise ValueError(
                f"restyle.target is {config.target}, but there are {system.spec.num_classes} classes: expected 0 to "
                f"{system.spec.num_classes - 1}"
            )
        system.require_trained_on([config.target])
        labels = torch.full_like(labels, config.target)
    latents = system.encode_latents(images)
    if reference is not None:
        labels = system.null_labels(len(images))
        styled = with_statistics(latents, system.encode_latents(reference.unsqueeze(0)))
        latents = latents + config.strength * (styled - latents)
    if isinstance(system.prior, Denoises):
        return drawn_around(system, system.standardize(latents), config.strength, labels, sampling, generator)
    return _drawn_again(system.quantize(latents), labels, system, config, sampling, generator)


def _drawn_again(
    indices: Tensor, labels: Tensor, system: System, config: Config, sampling: Any, generator: torch.Generator
) -> Tensor:
    """Images whose indices that suit the label least were drawn again; of the candidates the one that shows the label best.

    A prior that does not know the likelihood of its draws cannot choose among them: it draws once.
    """
    number = num_redrawn(config.strength, indices[0].numel())
    order = unlikeliness(indices, labels, system, generator).flatten(1).argsort(dim=1, descending=True)
    is_known = torch.ones_like(order, dtype=torch.bool).scatter(1, order[:, :number], False).view(indices.shape)
    if not isinstance(system.prior, KnowsLikelihood):
        drawn = system.prior.complete(indices, is_known, labels, sampling, generator)
        return system.decode(drawn).clamp(-1, 1)
    best, best_score = indices, torch.full((len(indices),), -torch.inf, device=indices.device)
    for _ in range(config.candidates):
        drawn = system.prior.complete(indices, is_known, labels, sampling, generator)
        score = _evidence(drawn, labels, system, generator)
        best = torch.where((score > best_score).view(-1, 1, 1), drawn, best)
        best_score = torch.maximum(score, best_score)
    return system.decode(best).clamp(-1, 1)


def _evidence(indices: Tensor, labels: Tensor, system: System, generator: torch.Generator) -> Tensor:
    """(B,) bits by which the label makes the indices more probable than no label does: what guidance climbs."""
    state = generator.get_state()
    without = system.prior.bits(indices, system.null_labels(len(indices)), generator)
    generator.set_state(state)  # a masked prior estimates both by the same masks
    return without - system.prior.bits(indices, labels, generator)


def with_statistics(latents: Tensor, reference: Tensor) -> Tensor:
    """(B, D, h, w) latents with the mean and deviation of each channel of the (1, D, h, w) reference."""
    mean, std = (latents.mean(dim=(2, 3), keepdim=True), latents.std(dim=(2, 3), keepdim=True).clamp_min(1e-6))
    return (latents - mean) / std * reference.std(dim=(2, 3), keepdim=True) + reference.mean(dim=(2, 3), keepdim=True)


@torch.no_grad()
def unlikeliness(indices: Tensor, labels: Tensor, system: System, generator: torch.Generator) -> Tensor:
    """(B, *index_grid) how little each index suits the label.

    For a masked prior: how much less probable the label makes it than no label does, given a few others: given many, an
    index would suit the others and with them what the image shows now. For one that predicts the next index: how improbable
    it is given all before it. For a prior that can do neither: a random number.
    """
    prior, flat = system.prior, indices.flatten(1)
    if not isinstance(prior, PredictsMasked):
        if isinstance(prior, PredictsNext):
            return -prior.log_probs(indices, labels)
        return uniform(indices, generator)
    null = system.null_labels(len(flat))
    if not prior.config.is_conditional:
        labels = null  # its network was never told any other
    says_nothing = (labels == null).unsqueeze(1)
    rank = uniform(flat, generator).argsort(dim=1)
    seen = max(1, round(SEEN_SHARE * flat.shape[1]))
    total, times = torch.zeros(flat.shape, device=flat.device), torch.zeros(flat.shape, device=flat.device)
    for number in range(MASKINGS):
        is_masked = (rank < number * seen) | (rank >= (number + 1) * seen)
        given = torch.where(is_masked, prior.mask_index, flat)
        without = _log_probs(flat, given, null, system)
        suits = _log_probs(flat, given, labels, system) - without
        total -= torch.where(says_nothing, without, suits) * is_masked
        times += is_masked
    return (total / times).view(indices.shape)


def _log_probs(indices: Tensor, given: Tensor, labels: Tensor, system: System) -> Tensor:
    """(B, L) of each index under the label, where the network reads the `given` ones."""
    logits = system.prior(given, labels).float()
    return logits.log_softmax(dim=2).gather(2, indices.unsqueeze(2)).squeeze(2)


def trial(
    images: Tensor, labels: Tensor, system: System, config: Config, sampling: Any, generator: torch.Generator
) -> Trial:
    """Towards the next class that there are training images of, or towards `target` if that is set."""
    known = torch.from_numpy(system.labels).to(labels)
    wanted = known[torch.searchsorted(known, labels, right=True) % len(known)]
    if config.target is not None:
        wanted = torch.full_like(labels, config.target)
    edited = edit(images, wanted, system, config, sampling, generator)
    return Trial(images, edited, {"unchanged": images}, wanted)

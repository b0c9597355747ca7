"""Posterior over labels given the known tokens of an image, p(label | known), by the prior itself and Bayes' rule.

A prior of indices gives the likelihood of the known ones under each label (KnowsEvidence). For a prior of latents
(Denoises) it is estimated by the variational bound: by how well, down the noise levels, the known latents are predicted
under each label.

Sources: Li et al., "Your Diffusion Model is Secretly a Zero-Shot Classifier", 2023, arXiv:2303.16203, section 3; the weight
of a level, half the growth of the signal-to-noise ratio: Kingma et al. (VDM), 2021, arXiv:2107.00630, section 4.1.
Differs from them: unknown latents are drawn on the way, by the mixture of all labels; levels below LOWEST do not count,
where small networks predict details badly and no label helps.
"""

from functools import partial
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from tessera.components import sets
from tessera.contracts import Denoises
from tessera.nn.samplers import ancestral_step, noise
from tessera.system import System

HIGHEST, LOWEST = 40.0, 0.5  # noise levels, over the data's deviation
NUM_LEVELS = 12


@torch.no_grad()
def label_log_probs(
    system: System, tokens: Tensor, is_known: Tensor, sampling: Any, generator: torch.Generator
) -> Tensor:
    """Tokens of B images and which (B, h, w) are known -> (B, num_classes) log p(label | known tokens).

    The prior has to be one that Denoises or KnowsEvidence.
    """
    of_kind = _by_denoising if isinstance(system.prior, Denoises) else _by_prediction
    evidence = of_kind(system, tokens, is_known, sampling, generator)
    return (evidence + label_log_frequencies(system).to(evidence.device)).log_softmax(dim=1)


def label_log_frequencies(system: System) -> Tensor:
    """(num_classes,) log p(label) before anything is known: the frequencies of the labels among the training images."""
    return torch.tensor(system.spec.class_counts, dtype=torch.float32).log().log_softmax(dim=0)


def _by_prediction(
    system: System, indices: Tensor, is_known: Tensor, sampling: Any, generator: torch.Generator
) -> Tensor:
    """(B, num_classes) log p(known | label)"""
    state, evidence = generator.get_state(), []
    for label in range(system.spec.num_classes):
        generator.set_state(state)  # each label explains the same pieces
        labels = torch.full((len(indices),), label, device=indices.device)
        evidence.append(system.prior.evidence(indices, system.on_index_grid(is_known), labels, generator))
    return torch.stack(evidence, dim=1)


def _by_denoising(
    system: System, latents: Tensor, is_known: Tensor, sampling: Any, generator: torch.Generator
) -> Tensor:
    """(B, num_classes) a bound of log p(known | label), up to a constant, as a sum over levels (VDM, section 4.1)."""
    unguided = sampling.model_copy(update={"guidance_scale": 1.0})  # what is guided is no likelihood
    if sets(sampling, "autoguidance_scale"):
        unguided = unguided.model_copy(update={"autoguidance_scale": None})
    known, draw = is_known.unsqueeze(1), partial(noise, generator=generator)
    evidence = torch.zeros(len(latents), system.spec.num_classes, device=latents.device)
    levels = torch.logspace(*torch.tensor([HIGHEST, LOWEST]).log10().tolist(), NUM_LEVELS + 1).tolist()
    x = HIGHEST * draw(latents)
    for sigma, sigma_next in pairwise(levels):
        x = torch.where(known, latents + sigma * draw(latents), x)
        predicted = torch.stack(
            [
                system.prior.denoise(x, sigma, torch.full((len(x),), label, device=x.device), unguided)
                for label in range(system.spec.num_classes)
            ],
            dim=1,
        )  # (B, classes, D, h, w)
        error = ((predicted - latents.unsqueeze(1)).square() * known.unsqueeze(1)).sum(dim=(2, 3, 4))
        evidence = evidence - (sigma_next**-2 - sigma**-2) / 2 * error
        data = (evidence.softmax(dim=1)[:, :, None, None, None] * predicted).sum(dim=1)
        x = ancestral_step(x, data, sigma, sigma_next, draw)
    return evidence

"""Which label the known tokens of an image speak for, by the prior itself and Bayes' rule.

A prior of indices says how probable the known ones are under each label. A prior of latents says it by the bound of its
likelihood: down the noise levels, how well it predicts the known latents under each label.

Sources: Li et al., "Your Diffusion Model is Secretly a Zero-Shot Classifier", 2023, arXiv:2303.16203, section 3; the weight
of a level, half the growth of the signal-to-noise ratio: Kingma et al. (VDM), 2021, arXiv:2107.00630, section 4.1.
Differs from them: latents that are not known are drawn on the way, by the mixture of all labels; levels below LOWEST do
not count, where small networks predict details badly and no label helps.
"""

from typing import Any

import torch
from torch import Tensor

from tessera.editing.trial import System, ancestral_step, noise

HIGHEST, LOWEST = 40.0, 0.5  # noise levels, over the data's deviation
NUM_LEVELS = 12


@torch.no_grad()
def label_chances(
    system: System, tokens: Tensor, is_known: Tensor, sampling: Any, generator: torch.Generator
) -> Tensor:
    """Tokens of B images and which (B, h, w) are known -> (B, num_classes) log-probabilities of the labels given those."""
    of_kind = _by_denoising if system.denoises else _by_prediction
    evidence = of_kind(system, tokens, is_known, sampling, generator)
    return (evidence + log_shares(system).to(evidence.device)).log_softmax(dim=1)


def log_shares(system: System) -> Tensor:
    """(num_classes,) log-probabilities of the labels before anything is known: their shares of the training images."""
    return torch.tensor(system.spec.class_counts, dtype=torch.float32).log().log_softmax(dim=0)


def _by_prediction(
    system: System, indices: Tensor, is_known: Tensor, sampling: Any, generator: torch.Generator
) -> Tensor:
    state, found = generator.get_state(), []
    for label in range(system.spec.num_classes):
        generator.set_state(state)  # each label explains the same pieces
        labels = torch.full((len(indices),), label, device=indices.device)
        found.append(system.prior.evidence(indices, system.spread(is_known), labels, generator))
    return torch.stack(found, dim=1)


def _by_denoising(
    system: System, latents: Tensor, is_known: Tensor, sampling: Any, generator: torch.Generator
) -> Tensor:
    plain = sampling.model_copy(update={"guidance_scale": 1.0})  # what is guided is no likelihood
    known = is_known.unsqueeze(1)
    evidence = torch.zeros(len(latents), system.spec.num_classes, device=latents.device)
    levels = torch.logspace(*torch.tensor([HIGHEST, LOWEST]).log10().tolist(), NUM_LEVELS + 1).tolist()
    x = HIGHEST * noise(latents, generator)
    for sigma, following in zip(levels, levels[1:], strict=False):
        x = torch.where(known, latents + sigma * noise(latents, generator), x)
        predicted = torch.stack(
            [
                system.prior.denoise(x, sigma, torch.full((len(x),), label, device=x.device), plain)
                for label in range(system.spec.num_classes)
            ],
            dim=1,
        )  # (B, classes, D, h, w)
        error = ((predicted - latents.unsqueeze(1)).square() * known.unsqueeze(1)).sum(dim=(2, 3, 4))
        evidence = evidence - (following**-2 - sigma**-2) / 2 * error
        data = (evidence.softmax(dim=1)[:, :, None, None, None] * predicted).sum(dim=1)
        x = ancestral_step(x, data, sigma, following, generator)
    return evidence

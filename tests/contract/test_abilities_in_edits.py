"""Every edit with every prior: those that need what a prior claims to be able to do have to work, all others to refuse."""

import contextlib
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from test_abilities import SPEC, claims, prior_of, sampling_of, seeded
from torch import Tensor, nn

from tessera import contracts
from tessera.components import kinds, load
from tessera.contracts import Encoded, Quantized
from tessera.system import CannotEdit, System

OPENS = {  # the edits that a prior with an ability may not refuse; interpolation asks for nothing
    contracts.Completes: {"inpaint", "restyle", "variations"},
    contracts.PredictsMasked: {"enhance"},
    contracts.Denoises: {"inpaint", "enhance", "restyle", "variations"},
}


def needs(edit: str) -> tuple[type, ...]:
    """What an edit's file says of itself, which the studio believes; `object` is what every prior has."""
    return getattr(load("edits", edit), "NEEDS", (object,))


class Tiles(nn.Module):
    """Images of 4x4 gray tiles: a tile's latents are three times its gray, its index is the gray in 11 steps."""

    def encode(self, images: Tensor) -> Encoded:
        latents = F.avg_pool2d(images, 4).expand(-1, 3, -1, -1)
        return Encoded(latents, self.quantizer(latents).indices)

    def quantizer(self, z: Tensor) -> Quantized:
        indices = ((z.mean(dim=1) + 1) * 5).round().long().clamp(0, 10)
        return Quantized(z, indices, z.new_zeros(()))

    def decode(self, latents: Tensor) -> Tensor:
        return latents.mean(dim=1, keepdim=True).repeat_interleave(4, dim=2).repeat_interleave(4, dim=3)

    def decode_indices(self, indices: Tensor) -> Tensor:
        return self.decode((indices / 5 - 1).unsqueeze(1))


IMAGES = torch.rand(4, 1, 16, 8, generator=torch.Generator().manual_seed(3)) * 1.8 - 0.9
LABELS = torch.tensor([0, 1, 2, 0])


def edited(system: System, edit: str, sampling: Any, seed: int = 0, **settings: Any) -> Any:
    module = load("edits", edit)
    return module.trial(IMAGES, LABELS, system, module.Config(**settings), sampling, seeded(seed))


def inpaints(system: System, sampling: Any) -> None:
    for told_label in ("none", "inferred", "own"):
        trials = [
            edited(system, "inpaint", sampling, seed, candidates=2, repeats=1, told_label=told_label)
            for seed in (0, 0, 1)
        ]
        hole = trials[0].mask.unsqueeze(1)
        for trial in trials:
            assert torch.equal(trial.edited[~hole], IMAGES[~hole]) and trial.edited.isfinite().all()
        assert torch.equal(trials[0].edited, trials[1].edited)
        assert (trials[0].edited != trials[2].edited)[hole].float().mean() > 0.1


@pytest.mark.parametrize("is_conditional", [True, False])
@pytest.mark.parametrize("kind", kinds("priors"))
def test_edits_take_every_prior_that_claims_what_they_need_and_refuse_all_others(
    kind: str, is_conditional: bool
) -> None:
    opened = set().union(*(edits for ability, edits in OPENS.items() if ability in claims(kind, "priors")))
    prior, sampling = prior_of(kind, is_conditional=is_conditional), sampling_of(kind)
    system = System(Tiles(), prior, SPEC, load("priors", kind).LEARNS, "toy")
    for edit in kinds("edits"):
        says_so = isinstance(prior, needs(edit))
        if edit in set().union(*OPENS.values()) - opened:
            assert not says_so
            with pytest.raises(CannotEdit, match=f"toy cannot .*: its prior {kind}"):
                edited(system, edit, sampling)
            continue
        if edit not in set().union(*OPENS.values(), {"interpolate"}):  # another edit says by itself whom it refuses
            with contextlib.nullcontext() if says_so else pytest.raises(CannotEdit):
                edited(system, edit, sampling)
            continue
        assert says_so
        if edit == "inpaint":
            inpaints(system, sampling)
            continue
        trials = [edited(system, edit, sampling, seed) for seed in (0, 0, 1)]
        for trial in trials:
            assert trial.edited.shape == IMAGES.shape and trial.edited.abs().max() <= 1  # finite, too
        assert torch.equal(trials[0].edited, trials[1].edited)
        assert edit == "interpolate" or not torch.equal(trials[0].edited, trials[2].edited)
        if edit == "restyle":
            targets = [edited(system, edit, sampling, target=label, strength=0.4).edited for label in range(3)]
            assert torch.equal(targets[0], targets[1]) != is_conditional


class Completing(nn.Module):
    """A prior that can complete and nothing else: what it draws is told by the label, 0, 1, 2 or null, and chance."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(()))
        self.config = SimpleNamespace(is_conditional=True)
        self.told: list[int] = []

    def complete(
        self, indices: Tensor, is_known: Tensor, labels: Tensor, sampling: Any, generator: torch.Generator
    ) -> Tensor:
        self.told += labels.tolist()
        drawn = torch.randint(SPEC.codebook_size, indices.shape, generator=generator)
        return torch.where(is_known, indices, drawn)


def test_a_prior_that_can_only_complete_inpaints_restyles_and_varies() -> None:
    system = System(Tiles(), Completing(), SPEC, "indices", "toy")
    inpaints(system, None)
    with pytest.raises(CannotEdit):
        edited(system, "enhance", None)
    for edit in ("restyle", "variations"):
        trials = [edited(system, edit, None, seed) for seed in (0, 0, 1)]
        assert torch.equal(trials[0].edited, trials[1].edited)
        assert not torch.equal(trials[0].edited, trials[2].edited)


def test_a_prior_that_cannot_infer_a_label_is_told_none_unless_one_is_given() -> None:
    for told_label, expected in (("inferred", [3, 3, 3, 3]), ("none", [3, 3, 3, 3]), ("own", LABELS.tolist())):
        system = System(Tiles(), Completing(), SPEC, "indices", "toy")
        edited(system, "inpaint", None, candidates=1, told_label=told_label)
        assert system.prior.told == expected


def test_candidates_of_a_prior_that_can_only_complete_compete_by_the_known_pixels() -> None:
    """A hole in half of each tile of the third row: the other half of the tile says what its gray should be."""
    system, gray = System(Tiles(), Completing(), SPEC, "indices", "toy"), torch.full((200, 1, 16, 8), 0.4)
    mask = torch.zeros(200, 16, 8, dtype=torch.bool)
    mask[:, 10:12] = True
    module, errors = load("edits", "inpaint"), []
    for candidates in (1, 64):
        config = module.Config(candidates=candidates)
        filled = module.edit(gray, torch.zeros(200).long(), system, config, None, seeded(), mask)
        errors.append(float((system.encode(filled)[:, 2] - 7).abs().float().mean()))  # index 7 is the gray of 0.4
    assert errors[1] < 0.5 * errors[0]

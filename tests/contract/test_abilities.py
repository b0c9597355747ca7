"""What only some priors and quantizers can do: whoever has any member of an ability's Protocol is asked for all of it.

Parts are found by their files, abilities by their Protocols in contracts.py: a new one of either is tried by being there.
"""

import itertools
from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
from test_components import SMALL, TRAINING, small
from torch import Tensor, nn
from typing_extensions import get_protocol_members

from tessera import contracts
from tessera.bases.diagnostics import Diagnostics, Monitor
from tessera.components import Params, kinds, load, parse
from tessera.contracts import TokenSpec


def spec_of(codebook_size: int, height: int, width: int) -> TokenSpec:
    return TokenSpec(
        codebook_size=codebook_size,
        latent_shape=(3, height, width),
        index_grid=(height, width),
        num_classes=3,
        class_counts=(4, 2, 6),
        latent_mean=(0.0, 0.1, 0.2),
        latent_std=(1.0, 0.5, 0.5),
        tokenizer_fingerprint="f" * 64,
    )


SPEC = spec_of(11, 4, 2)  # higher than wide: a mistaken transpose shows
PAIR = spec_of(3, 2, 1)  # nine images
EVERY_PAIR = torch.tensor(list(itertools.product(range(3), repeat=2))).view(9, 2, 1)
ABILITIES = [one for one in vars(contracts).values() if getattr(one, "_is_runtime_protocol", False)]
TRIALS: dict[type, Callable[[Any], None]] = {}


def tries(ability: type) -> Callable[[Callable], Callable]:
    """Registers what tries an ability. It is given the kind of a part that claims it."""

    def register(trial: Callable) -> Callable:
        TRIALS[ability] = trial
        return trial

    return register


def prior_of(kind: str, spec: TokenSpec = SPEC, is_conditional: bool = True) -> nn.Module:
    """Weights so large that no two labels and no two places are alike."""
    module = load("priors", kind)
    settings = {"kind": kind, **SMALL["priors"].get(kind, {"training": TRAINING})}
    config = parse(module.Config, settings).model_copy(update={"is_conditional": is_conditional})
    torch.manual_seed(0)
    model = module.Model(config, spec).eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    return model.requires_grad_(False)


def quantizer_of(kind: str, config: Params | None = None) -> nn.Module:
    torch.manual_seed(0)
    return load("quantizers", kind).Quantizer(config or small("quantizers", kind))


def claims(kind: str, folder: str) -> list[type]:
    """The abilities of which a part has any member, in its model or its Config."""
    of_folder = [ability for ability in ABILITIES if (ability in OF_PRIORS) == (folder == "priors")]
    return [ability for ability in of_folder if any(has(kind, folder, name) for name in members(ability))]


def has(kind: str, folder: str, member: str) -> bool:
    return any(hasattr(place, member) for place in places_of(kind, folder))


@cache
def places_of(kind: str, folder: str) -> list[Any]:
    """Where the members of abilities are: a prior's model, a quantizer and its Config."""
    return [prior_of(kind)] if folder == "priors" else [quantizer_of(kind), small(folder, kind)]


def members(ability: type) -> list[str]:
    return sorted(name for name in get_protocol_members(ability) if not name.startswith("__"))


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def sampling_of(kind: str) -> Any:
    return load("priors", kind).Sampling()


def of_label(label: int, count: int) -> Tensor:
    return torch.full((count,), label)


def heeds_labels(kind: str, answer: Callable[[nn.Module, Tensor], Tensor], count: int) -> None:
    """A conditional prior answers each label, the null label too, otherwise; an unconditional one all of them alike."""
    for is_conditional in (True, False):
        model = prior_of(kind, is_conditional=is_conditional)
        answers = [answer(model, of_label(label, count)) for label in range(SPEC.num_classes + 1)]
        for one, other in itertools.combinations(answers, 2):
            assert torch.equal(one, other) != is_conditional


def some_indices(count: int, spec: TokenSpec = SPEC) -> Tensor:
    return torch.randint(spec.codebook_size, (count, *spec.index_grid), generator=seeded(7))


# Priors ---------------------------------------------------------------------------------------------------------------


@tries(contracts.Completes)
def known_indices_stay_and_the_others_are_drawn(kind: str) -> None:
    model, sampling, indices = prior_of(kind), sampling_of(kind), some_indices(8)
    is_known = torch.rand(indices.shape, generator=seeded(1)) < 0.5
    is_known[0], is_known[1] = True, False
    before, labels = (indices.clone(), is_known.clone()), torch.arange(8) % 4
    drawn = [model.complete(indices, is_known, labels, sampling, seeded(seed)) for seed in (0, 0, 1)]
    assert torch.equal(indices, before[0]) and torch.equal(is_known, before[1])
    for one in drawn:
        assert one.shape == indices.shape and one.dtype == torch.int64
        assert torch.equal(one[is_known], indices[is_known]) and one.min() >= 0 and one.max() < SPEC.codebook_size
    assert torch.equal(drawn[0], drawn[1]) and not torch.equal(drawn[0], drawn[2])
    rest = is_known[2:3].expand(8, -1, -1)
    heeds_labels(kind, lambda model, labels: model.complete(indices, rest, labels, sampling, seeded()), 8)


@tries(contracts.KnowsEvidence)
def evidence_is_a_log_probability_and_draws_read_what_is_claimed(kind: str) -> None:
    model, indices = prior_of(kind), some_indices(11)
    nothing, labels = torch.zeros_like(indices, dtype=torch.bool), torch.arange(11) % 4
    assert not model.evidence(indices, nothing, labels, seeded()).any()
    for row, column in ((0, 0), (2, 1), (3, 1)):  # a single known index: the probabilities of its 11 values
        values, is_known = indices[:1].repeat(11, 1, 1), nothing.clone()
        values[:, row, column], is_known[:, row, column] = torch.arange(11), True
        total = model.evidence(values, is_known, of_label(1, 11), seeded()).exp().sum()
        assert float(total) == pytest.approx(1, abs=1e-4)
    heeds_labels(kind, lambda model, labels: model.evidence(indices, ~nothing, labels, seeded()), 11)

    def changes_draws(row: int, column: int) -> bool:
        start, is_known = torch.zeros(100, 4, 2, dtype=torch.long), torch.zeros(100, 4, 2, dtype=torch.bool)
        is_known[:, row, column] = True
        other = start.clone()
        other[:, row, column] = 1
        a, b = (model.complete(one, is_known, of_label(1, 100), sampling_of(kind), seeded()) for one in (start, other))
        return not torch.equal(a[~is_known], b[~is_known])

    is_read = [changes_draws(row, column) for row in range(4) for column in range(2)]
    assert all(is_read) == model.reads_all_known
    if not model.reads_all_known and isinstance(model, contracts.KnowsLikelihood):
        drawn_by_evidence_is_the_joint(kind)


def drawn_by_evidence_is_the_joint(kind: str) -> None:
    """The second of two indices known: p(first as it is drawn) * exp(evidence) = p(both)."""
    model, is_known = prior_of(kind, PAIR), torch.tensor([[False], [True]])
    drawn = model.complete(
        torch.full((20_000, 2, 1), 2),
        is_known.expand(20_000, -1, -1),
        of_label(1, 20_000),
        sampling_of(kind),
        seeded(),
    )
    shares = torch.bincount(drawn[:, 0, 0], minlength=3) / 20_000
    pairs, labels = EVERY_PAIR[2::3], of_label(1, 3)  # those whose second index is 2
    evidence = model.evidence(pairs, is_known.expand(3, -1, -1), labels, seeded()).exp()
    joint = torch.exp2(-model.bits(pairs, labels, seeded()))
    torch.testing.assert_close(shares * evidence, joint, atol=0.015, rtol=0)


@tries(contracts.KnowsLikelihood)
def bits_are_those_of_probabilities_that_sum_to_one_at_most(kind: str) -> None:
    """An upper bound of -log2 p, in the mean over draws, makes each probability too small."""
    model, indices = prior_of(kind, PAIR), some_indices(6)
    for label in range(4):
        bits = torch.stack([model.bits(EVERY_PAIR, of_label(label, 9), seeded(seed)) for seed in range(100)])
        assert bits.shape == (100, 9) and (bits >= 0).all()
        assert 0.5 < float(torch.exp2(-bits.double().mean(dim=0)).sum()) < 1.0 + 1e-2
        assert torch.equal(bits[0], model.bits(EVERY_PAIR, of_label(label, 9), seeded(0)))
    heeds_labels(kind, lambda model, labels: model.bits(indices, labels, seeded()), 6)


@tries(contracts.PredictsMasked)
def each_index_is_predicted_given_all_others_that_are_not_masked(kind: str) -> None:
    model, indices, labels = prior_of(kind), some_indices(5).flatten(1), torch.arange(5) % 4
    assert not 0 <= model.mask_index < SPEC.codebook_size
    for hidden, changed in ((0, 7), (7, 0), (3, 4)):
        given, other = (indices.index_fill(1, torch.tensor([hidden]), model.mask_index) for _ in range(2))
        other[:, changed] = (other[:, changed] + 1) % SPEC.codebook_size
        logits, others = model(given, labels), model(other, labels)
        assert logits.shape == (5, 8, SPEC.codebook_size) and logits.isfinite().all()
        assert not torch.isclose(logits[:, hidden], others[:, hidden]).all(dim=1).any()
    everything = torch.full_like(indices, model.mask_index)
    assert model(everything, labels).isfinite().all()


@tries(contracts.PredictsNext)
def each_index_is_predicted_given_those_before_it_alone(kind: str) -> None:
    pairs = prior_of(kind, PAIR).log_probs(EVERY_PAIR, of_label(1, 9))
    assert float(pairs.exp().prod(dim=1).sum()) == pytest.approx(1, abs=1e-5)
    model, indices, labels = prior_of(kind), some_indices(5), torch.arange(5) % 4
    found, changed = model.log_probs(indices, labels), indices.clone()
    changed[:, 2, 0] = (changed[:, 2, 0] + 1) % SPEC.codebook_size
    differs = found != model.log_probs(changed, labels)
    assert found.shape == indices.shape and (found <= 0).all()
    assert not differs.flatten(1)[:, :4].any() and differs.flatten(1)[:, 4:].all()
    heeds_labels(kind, lambda model, labels: model.log_probs(indices, labels), 5)


@tries(contracts.Denoises)
def levels_fall_and_expected_data_have_a_derivative(kind: str) -> None:
    model, sampling = prior_of(kind), sampling_of(kind)
    levels = model.levels(sampling)
    assert levels[0] >= 10 and levels[-1] == 0 and levels == sorted(set(levels), reverse=True)
    data, labels = torch.randn(4, *SPEC.latent_shape, generator=seeded()), torch.arange(4)
    for sigma in levels[:-1]:
        x = (data * (1 + sigma)).requires_grad_()
        before = x.detach().clone()
        with torch.enable_grad():
            expected = model.denoise(x, sigma, labels, sampling)
            (slope,) = torch.autograd.grad(expected.square().sum(), x)
        assert expected.shape == x.shape and expected.isfinite().all() and torch.equal(x, before)
        assert slope.isfinite().all() and slope.any()
        alone = model.denoise(x[1:2].detach(), sigma, labels[1:2], sampling)
        torch.testing.assert_close(alone, expected[1:2].detach(), atol=1e-3, rtol=1e-3)
    heeds_labels(kind, lambda model, labels: model.denoise(data, 1.0, labels, sampling), 4)


OF_PRIORS = set(TRIALS)


# Quantizers -----------------------------------------------------------------------------------------------------------


@tries(contracts.Squashes)
def squashed_latents_are_bounded_and_pass_the_gradient_on(kind: str) -> None:
    quantizer, config = quantizer_of(kind).eval(), small("quantizers", kind)
    z = torch.randn(2, config.code_dim, 3, 2, generator=seeded(), requires_grad=True)
    weights = torch.randn(z.shape, generator=seeded(1))
    ((expected,), (found,)) = (
        torch.autograd.grad((squashed * weights).sum(), z) for squashed in (quantizer.bound(z), quantizer(z).codes)
    )
    torch.testing.assert_close(found, expected)
    assert not torch.allclose(expected, weights)  # of what is not squashed
    every = quantizer.indices_to_codes(torch.arange(quantizer.codebook_size).view(1, 1, -1))
    assert quantizer.bound(1e6 * z).norm(dim=1).max() <= 1.5 * every.norm(dim=1).max()


@tries(contracts.LeavesScaledResidual)
def further_levels_of_residual_leave_less_over(kind: str) -> None:
    inner = small("quantizers", kind)
    assert 0 < inner.residual_scale < 1
    z, errors = 1.6 * torch.rand(64, inner.code_dim, 4, 4, generator=seeded()) - 0.8, []
    for num_levels in (1, 2, 3):
        config = parse(
            load("quantizers", "residual").Config,
            {"kind": "residual", "quantizer": inner.model_dump(mode="json"), "num_levels": num_levels},
        )
        quantizer = quantizer_of("residual", config).eval()
        assert quantizer.scales == pytest.approx([inner.residual_scale**level for level in range(num_levels)])
        errors.append(float((quantizer(z).codes - z).square().mean()))
    assert errors[1] < 0.7 * errors[0] and errors[2] < 0.7 * errors[1]


@tries(contracts.HasLevels)
def each_level_has_indices_of_its_own_codebook(kind: str) -> None:
    config, quantizer = small("quantizers", kind), quantizer_of(kind).eval()
    size = config.codebook_size // config.num_levels
    assert config.codebook_size == config.num_levels * config.quantizer.codebook_size
    assert quantizer.indices_per_code == config.num_levels
    indices = quantizer(torch.randn(8, config.code_dim, 4, 3, generator=seeded())).indices
    levels = indices.view(8, 4, 3, config.num_levels) // size
    assert torch.equal(levels, torch.arange(config.num_levels).expand_as(levels))
    monitor = Monitor(Diagnostics(), config)
    assert (monitor.levels, monitor.quantizer) == (config.num_levels, config.quantizer)


@tries(contracts.StartsLate)
def codes_mean_something_from_their_start_on(kind: str) -> None:
    quantizer, start = quantizer_of(kind).train(), small("quantizers", kind).codes_start_step
    assert start is None or start > 0, "the defaults show nothing: add a line to SMALL of test_components.py"
    z = torch.randn(8, small("quantizers", kind).code_dim, 4, 4, generator=seeded())
    for step in range((start or 0) + 1):
        quantized = quantizer(z)
        if step < (start or 0):
            assert torch.equal(quantized.codes, z) and not quantized.indices.any()
    assert not torch.equal(quantized.codes, z) and len(quantized.indices.unique()) > 1


# All of them ----------------------------------------------------------------------------------------------------------

CLAIMED = [
    pytest.param(folder, kind, ability, id=f"{kind}-{ability.__name__}")
    for folder in ("priors", "quantizers")
    for kind in kinds(folder)
    for ability in claims(kind, folder)
]


def test_each_ability_has_a_trial_and_most_are_claimed_so_the_tests_below_are_about_something() -> None:
    assert set(ABILITIES) == set(TRIALS)
    assert {param.values[2] for param in CLAIMED} == set(ABILITIES)


@pytest.mark.parametrize(("folder", "kind", "ability"), CLAIMED)
def test_an_ability_that_a_part_claims_is_real(folder: str, kind: str, ability: type) -> None:
    missing = [name for name in members(ability) if not has(kind, folder, name)]
    assert not missing, f"{kind} has a part of {ability.__name__} (tessera/contracts.py) and lacks {missing}"
    assert any(isinstance(place, ability) for place in places_of(kind, folder))
    TRIALS[ability](kind)

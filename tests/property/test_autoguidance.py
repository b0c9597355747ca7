"""Autoguidance: equation 3 of Karras et al. in every prior that is guided, alone and beside classifier-free guidance."""

import pytest
import torch
from toy_distributions import spec

from tessera.bases.guide import Guide
from tessera.bases.optimization import PriorTraining
from tessera.components import load
from tessera.contracts import Denoises
from tessera.nn import samplers
from tessera.nn.gumbel import gumbel_noise
from tessera.nn.precision import in_precision

KINDS = ["autoregressive", "bitwise", "masked", "flow_matching", "flow_map", "diffusion"]
LABELS = torch.arange(60) % 3


def pair(kind: str, **settings):
    """A random prior with a random guide."""
    if load("priors", kind).LEARNS == "indices":
        settings = {"width": 32, "depth": 2, "heads": 2} | settings
    else:
        settings |= {"denoiser": load("denoisers", "transformer").Config(width=16, depth=1, heads=2)}
    module = load("priors", kind)
    config = module.Config(training=PriorTraining(num_steps=1), **settings)
    torch.manual_seed(0)
    made = [module.Model(config, spec(codebook_size=9, shape=(3, 3, 2), num_classes=3)).eval() for _ in range(2)]
    for parameter in (each for model in made for each in model.parameters()):
        torch.nn.init.normal_(parameter, std=0.3)
        parameter.requires_grad_(False)
    made[0].guide = made[1]
    return made[0], module.Sampling


def seeded() -> torch.Generator:
    return torch.Generator().manual_seed(7)


def expected(good, null, bad, sampling) -> torch.Tensor:
    """bad + a (good - bad), and what classifier-free guidance of the scale s adds to `good`."""
    led_away = bad + (sampling.autoguidance_scale or 1.0) * (good - bad)
    return led_away + (sampling.guidance_scale - 1) * (good - null)


@pytest.mark.parametrize("kind", KINDS)
def test_a_scale_of_1_is_as_if_the_key_were_not_there(kind):
    model, settings = pair(kind)
    assert settings(autoguidance_scale=1.0) == settings()
    assert "autoguidance_scale" not in settings(autoguidance_scale=1.0).model_dump()
    plain, one, strong = (
        model.sample(LABELS, settings(autoguidance_scale=scale), seeded()) for scale in (None, 1.0, 3.0)
    )
    assert torch.equal(plain, one) and not torch.equal(plain, strong)
    strong_again = in_precision(model, "bf16").sample(LABELS, settings(autoguidance_scale=3.0), seeded())
    assert strong_again.dtype == strong.dtype and strong_again.float().isfinite().all()
    del model.guide
    assert torch.equal(model.sample(LABELS, settings(), seeded()), plain)
    with pytest.raises(
        ValueError, match=r"autoguidance_scale is 3, but this prior has no guide .*guide: \{snapshot_at"
    ):
        model.sample(LABELS, settings(autoguidance_scale=3.0), seeded())


@pytest.mark.parametrize("scales", [{"autoguidance_scale": 1.7}, {"autoguidance_scale": 0.4, "guidance_scale": 2.5}])
@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        ("flow_matching", {}),
        ("flow_map", {}),
        *(("diffusion", {"predicts": each}) for each in ("velocity", "noise", "data")),
    ],
)
def test_expected_data_are_led_away_from_the_guides_within_the_interval(kind, settings, scales):
    """Each alone is asked for its own, by its own method."""
    model, sampling = pair(kind, **settings)
    assert isinstance(model, Denoises)
    x, scales = torch.randn(60, 3, 3, 2), sampling(guidance_interval=(0.3, 1.0), **scales)
    null = torch.full_like(LABELS, model.null_label)
    for sigma in (0.8, 4.0):  # times 0.56 and 0.2
        good, blind, bad = (
            each.denoise(x, sigma, labels, sampling())
            for each, labels in ((model, LABELS), (model, null), (model.guide, LABELS))
        )
        found = model.denoise(x, sigma, LABELS, scales)
        wanted = expected(good, blind, bad, scales) if sigma == 0.8 else good
        torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-4)
        assert sigma == 4.0 or (found - good).abs().max() > 0.05


def test_a_flow_with_linear_networks_follows_the_closed_form():
    """Velocities A_c x, A_0 x and B_c x, and Euler's N steps of length h: x = (1 + h M)^N x_0."""
    model, sampling = pair("flow_matching")
    of_good, of_bad = torch.randn(2, 4, 18, 18) * 0.3  # a matrix of each label, the null label last
    for each, matrices in ((model, of_good), (model.guide, of_bad)):
        each.forward = lambda x, t, labels, by=matrices: torch.einsum("bij,bj->bi", by[labels], x.flatten(1)).view_as(x)
    scales = sampling(solver="euler", num_steps=6, guidance_scale=1.5, autoguidance_scale=2.2)
    found = model.sample(LABELS, scales, seeded())
    matrix = expected(of_good[LABELS], of_good[3], of_bad[LABELS], scales)
    step = torch.linalg.matrix_power(torch.eye(18) + matrix / 6, 6)
    begin = samplers.noise(torch.empty(60, 3, 3, 2), seeded())
    torch.testing.assert_close(
        found.flatten(1), torch.einsum("bij,bj->bi", step, begin.flatten(1)), atol=1e-3, rtol=1e-4
    )


@torch.no_grad()
def complete_without_cache(model, given, is_known, sampling, generator):
    """The whole sequences anew for each index, by the prior and by its guide; the known first where orders were random."""
    order, asked = torch.arange(6).expand(60, 6), None
    indices, is_known = given.flatten(1).clone(), is_known.flatten(1)
    if model.config.has_random_orders:
        order = asked = (~is_known).long().argsort(dim=1, stable=True)
    null = torch.full_like(LABELS, model.null_label)
    for number in range(6):
        sequence = indices.gather(1, order)
        good, blind, bad = (
            each(sequence, labels, asked)[:, number]
            for each, labels in ((model, LABELS), (model, null), (model.guide, LABELS))
        )
        ramped = {"guidance_scale": sampling.scale_at(number / 6)}
        as_scale = sampling.model_copy(update={"guidance_scale": sampling.autoguidance_scale})
        ramped["autoguidance_scale"] = as_scale.scale_at(number / 6)
        logits = expected(good, blind, bad, sampling.model_copy(update=ramped))
        drawn = load("priors", "autoregressive").draw(logits, sampling, generator)
        place = order[:, number : number + 1]
        known = is_known.gather(1, place)
        indices.scatter_(1, place, torch.where(known, indices.gather(1, place), drawn.unsqueeze(1)))
    return indices.view(60, 3, 2)


@pytest.mark.parametrize("until", [(0.0, 0.0), (1.0, 1.0)])
@pytest.mark.parametrize("settings", [{}, {"guidance_scale": 2.5}, {"guidance_ramp": 0.5, "guidance_scale": 1.5}])
def test_an_autoregressive_prior_and_its_guide_draw_with_caches_as_without(until, settings):
    model, sampling = pair("autoregressive", random_order_until=until)
    scales = sampling(autoguidance_scale=1.8, **settings)
    given, is_known = torch.randint(9, (60, 3, 2)), torch.rand(60, 3, 2) < 0.3
    slow = complete_without_cache(model, given, is_known, scales, seeded())
    fast = model.complete(given, is_known, LABELS, scales, seeded())
    assert torch.equal(fast, slow) and torch.equal(fast[is_known], given[is_known])
    assert not torch.equal(fast, model.complete(given, is_known, LABELS, sampling(**settings), seeded()))


@pytest.mark.parametrize("guidance", [1.0, 2.5])
def test_a_masked_prior_fills_places_by_the_logits_led_away(guidance):
    """All places in one step, with the same noise."""
    model, sampling = pair("masked")
    scales = sampling(
        autoguidance_scale=1.8, guidance_scale=guidance, decoding_steps=1, temperature=0.7, order="halton"
    )
    given, is_known = torch.randint(9, (60, 3, 2)), torch.rand(60, 3, 2) < 0.3
    is_known[:, 0, 0] = False
    shown = torch.where(is_known, given, model.mask_index).flatten(1)
    null = torch.full_like(LABELS, model.null_label)
    good, blind, bad = (each(shown, labels) for each, labels in ((model, LABELS), (model, null), (model.guide, LABELS)))
    logits, noise = expected(good, blind, bad, scales), gumbel_noise(good, seeded())
    drawn = (logits / 0.7 + noise).argmax(dim=2).view(60, 3, 2)
    found = model.complete(given, is_known, LABELS, scales, seeded())
    assert torch.equal(found, torch.where(is_known, given, drawn))
    assert not torch.equal(drawn, (good / 0.7 + noise).argmax(dim=2).view(60, 3, 2))


@pytest.mark.parametrize("kind", KINDS)
def test_a_prior_without_labels_is_led_away_from_a_guide_without_them(kind):
    model, sampling = pair(kind, is_conditional=False)
    scales = sampling(autoguidance_scale=3.0, guidance_scale=2.0)
    drawn = model.sample(LABELS, scales, seeded())
    assert torch.equal(drawn, model.sample(LABELS * 0, scales, seeded()))
    assert torch.equal(drawn, model.sample(LABELS, sampling(autoguidance_scale=3.0), seeded()))
    assert not torch.equal(drawn, model.sample(LABELS, sampling(), seeded()))


def test_the_snapshot_is_of_a_step_within_the_training():
    assert [Guide(snapshot_at=share).step_of(50) for share in (0.001, 0.1, 0.999)] == [1, 5, 49]

"""Latents that are easier to model: noise by its closed form, turns and sizes by encoders that commute with them."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tessera.bases.autoencoder import Autoencoder
from tessera.bases.latents import Regularizer, interpolated, resized, shortest
from tessera.components import load, parse
from tessera.contracts import ImageBatch, ImageSpec

SQUARE = ImageSpec(name="x", channels=1, height=16, width=16, num_classes=1, class_names=("all",), licence="none")
HIGH = SQUARE.model_copy(update={"height": 32})
VECTOR = {"kind": "vector", "codebook_size": 32, "code_dim": 4, "init": "uniform"}
EVERY = {
    "vector": VECTOR,
    "late": {**VECTOR, "init": "data", "init_step": 2},
    "fsq": {"kind": "fsq", "levels": [8, 5, 5]},
    "lfq": {"kind": "lfq", "code_dim": 6},
    "simvq": {"kind": "simvq", "codebook_size": 32, "code_dim": 4},
    "residual": {"kind": "residual", "num_levels": 2, "quantizer": VECTOR},
    "identity": {"kind": "identity", "code_dim": 4},
}
BOTH = {"noise": 1.0, "equivariance": {"smallest_scale": 0.5}}


def objective(kind: str = "vqvae", spec: ImageSpec = SQUARE, **changes):
    settings = {
        "kind": kind,
        "quantizer": EVERY["identity" if kind == "vae" else "vector"],
        "patch_size": 2,
        "channels": 8,
        "num_blocks": 1,
        "training": {"num_steps": 100},
        **changes,
    }
    module = load("tokenizers", kind)
    config = parse(module.Config, settings)
    torch.manual_seed(0)
    return module.Objective(module.Model(config, spec), config).train()


def batch(spec: ImageSpec = SQUARE, number: int = 6) -> ImageBatch:
    generator = torch.Generator().manual_seed(1)
    images = torch.rand(number, 1, spec.height, spec.width, generator=generator) * 2 - 1
    return ImageBatch(images, torch.zeros(number, dtype=torch.long))


def regularizer(latents: dict, spec: ImageSpec = SQUARE, **changes) -> Regularizer:
    return objective(spec=spec, latents=latents, **changes).model.regularizer


@pytest.mark.parametrize("kind", ["vqvae", "vqgan", "vae"])
def test_with_noise_off_and_probability_0_every_bit_is_that_of_before(kind):
    found = []
    for latents in ({}, {"latents": {"noise": 0.0, "equivariance": {"probability": 0.0}}}):
        trained = objective(kind, adversarial_weight=0.1, **latents) if kind != "vqvae" else objective(**latents)
        optimizer = torch.optim.Adam(trained.model.parameters())
        for step in range(3):
            torch.manual_seed(step)
            terms = trained(batch(), "autoencoder", step)
            optimizer.zero_grad()
            terms["loss"].backward()
            optimizer.step()
        found.append([*trained.model.state_dict().values(), *terms.values(), torch.get_rng_state()])
    assert len(found[0]) == len(found[1])
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))


def test_noise_has_the_variance_of_its_closed_form_in_every_channel_and_keeps_means():
    torch.manual_seed(0)
    scale, shift = torch.tensor([0.01, 1.0, 50.0]).view(1, 3, 1, 1), torch.tensor([5.0, 0.0, -7.0]).view(1, 3, 1, 1)
    latents = shift + scale * torch.randn(4000, 3, 4, 4)
    for gamma in (1.0, 3.0):
        noisy = interpolated(latents, gamma)
        of_channel = (0, 2, 3)
        expected = latents.var(of_channel) * (1 + gamma**2) / 3
        torch.testing.assert_close(noisy.var(of_channel), expected, rtol=0.03, atol=0)
        assert ((noisy - latents).mean(of_channel).abs() < 0.05 * gamma * scale.flatten()).all()
    one = interpolated(latents[:1, :, :1, :1], 1.0)  # a value alone has no deviation
    torch.testing.assert_close(one, latents[:1, :, :1, :1])


def test_the_level_is_one_for_all_of_an_image_and_scales_its_gradient():
    torch.manual_seed(0)
    latents = torch.randn(500, 2, 3, 3, requires_grad=True)
    (share,) = torch.autograd.grad(interpolated(latents, 2.0).sum(), latents)
    assert torch.equal(share, share[:, :1, :1, :1].expand_as(share))
    level = 1 - share[:, 0, 0, 0]
    assert 0 <= level.min() < 0.02 and 0.98 < level.max() <= 1 and level.mean().item() == pytest.approx(0.5, abs=0.04)


def commuting(symmetric: bool) -> Autoencoder:
    """An encoder and a decoder of kernels that a quarter turn leaves as they are, or not; pixels are their patches."""
    trained = objective(
        patch_size=1, quantizer=EVERY["identity"], latents={"equivariance": {"smallest_scale": 1, "probability": 1}}
    )
    for layer in trained.modules():
        if isinstance(layer, nn.Conv2d) and symmetric:
            kernel = layer.weight.data
            layer.weight.data = torch.stack([kernel.rot90(turns, (2, 3)) for turns in range(4)]).mean(0)
    return trained


def test_what_commutes_with_quarter_turns_has_the_loss_of_its_reconstruction_and_others_have_not():
    for symmetric in (True, False):
        trained, turns = commuting(symmetric), set()
        for step in range(12):
            turns.add(trained.model.regularizer.transformation(step).quarter_turns)
            moved = trained.train()(batch(), "autoencoder", step)["loss"]
            plain = trained.eval()(batch(), "autoencoder", step)["loss"]
            assert torch.isclose(moved, plain, rtol=1e-5, atol=0) == symmetric
        assert turns == {1, 2, 3}


@pytest.mark.parametrize("quantizer", EVERY)
@pytest.mark.parametrize("spec", [SQUARE, HIGH], ids=["square", "high"])
def test_with_every_quantizer_reconstructions_have_the_size_of_their_targets(quantizer, spec):
    settings = {"quantizer": EVERY[quantizer], "latents": {**BOTH, "equivariance": {"probability": 1}}}
    trained = objective(spec=spec, **settings)
    sizes = set()
    for step in range(8):
        images = batch(spec).images
        reconstructions, quantized = trained.model(images, step)
        target = trained.model.regularizer.transformed(images, step)
        assert reconstructions.shape == target.shape
        if quantized.indices is not None:
            assert quantized.indices.shape[1] * 2 == target.shape[2]  # codes of the transformed image
        assert target.shape[2] % 2 == 0 and target.shape[3] % 2 == 0
        sizes.add(tuple(target.shape[2:]))
        trained(batch(spec), "autoencoder", step)["loss"].backward()
    assert len(sizes) > 3
    assert all(p.grad is not None and p.grad.isfinite().all() for p in trained.model.encoder.parameters())
    reconstructions, _ = trained.eval().model(images, step)
    assert reconstructions.shape == images.shape


def test_the_steps_that_are_transformed_the_sides_and_the_turns():
    steps = range(4000)
    found = [regularizer({"equivariance": {"probability": 0.3}}).transformation(step) for step in steps[:1]]
    own = regularizer({"equivariance": {"probability": 0.3}})
    found = [tau for step in steps if (tau := own.transformation(step)) is not None]
    assert len(found) / 4000 == pytest.approx(0.3, abs=0.03)
    assert {tau.quarter_turns for tau in found} == {1, 2, 3}
    for axis in (0, 1):
        assert {tau.sides[axis] for tau in found} == set(range(2, 9))  # of 8, a quarter and more
    high = regularizer({"equivariance": {"probability": 1}}, HIGH)
    assert {high.transformation(step).quarter_turns for step in range(50)} == {2}
    still = regularizer({"equivariance": {"probability": 1, "quarter_turns": False}})
    assert {still.transformation(step).quarter_turns for step in range(50)} == {0}
    late = regularizer({"equivariance": {"probability": 1}}, quantizer=EVERY["late"])
    assert [late.transformation(step) is None for step in range(4)] == [True, True, True, False]


def test_a_transformation_follows_from_the_seed_of_the_training_and_the_step():
    own = regularizer({"equivariance": {"probability": 1}})
    torch.rand(7)  # whatever was drawn
    assert [own.transformation(s) for s in range(9)] == [own.transformation(s) for s in range(9)]
    torch.manual_seed(5)
    config = objective(latents={"equivariance": {"probability": 1}}).config
    torch.manual_seed(5)
    other = Regularizer(config, SQUARE)
    assert [own.transformation(s) for s in range(9)] != [other.transformation(s) for s in range(9)]


@pytest.mark.parametrize(("before", "after"), [((8, 8), (2, 8)), ((7, 12), (5, 3)), ((4, 4), (1, 1))])
def test_a_size_is_that_of_bicubic_interpolation_with_antialiasing(before, after):
    x = torch.randn(2, 3, *before, generator=torch.Generator().manual_seed(0))
    expected = F.interpolate(x, after, mode="bicubic", antialias=True)
    torch.testing.assert_close(resized(x, after), expected, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(resized(torch.ones(1, 1, *before), after), torch.ones(1, 1, *after))
    assert shortest(8, 0.25) == 2 and shortest(7, 0.25) == 2 and shortest(10, 0.3) == 3 and shortest(3, 0.01) == 1


def test_outside_training_nothing_is_drawn_or_transformed():
    own, latents = regularizer(BOTH).eval(), torch.randn(2, 4, 8, 8)
    before = torch.get_rng_state()
    assert own.noised(latents, 0) is latents and all(own.transformed(latents, step) is latents for step in range(9))
    assert torch.equal(before, torch.get_rng_state())


def test_noise_ends_after_its_share_of_the_training():
    own, latents = regularizer({"noise": 1.0, "noise_until": 0.6}), torch.randn(2, 4, 8, 8)
    assert [own.noised(latents, step) is latents for step in (0, 59, 60, 99)] == [False, False, True, True]
    assert regularizer({"noise": 1.0}).noised(latents, 99) is not latents


def test_noise_reaches_the_decoder_and_neither_codes_nor_their_loss():
    found = []
    for latents in ({}, {"latents": {"noise": 2.0}}):
        network, seen = objective(**latents).model, []
        network.decoder.register_forward_pre_hook(lambda _, inputs, seen=seen: seen.append(inputs[0]))
        _, quantized = network(batch().images, 0)
        found.append((quantized.loss, quantized.indices, network.quantizer.codebook, seen[0]))
    *same, differs = zip(*found, strict=True)
    assert all(torch.equal(*pair) for pair in same) and not torch.allclose(*differs)


@pytest.mark.parametrize(
    ("kind", "changes", "sentence"),
    [
        (
            "vqvae",
            {"latents": {"equivariance": {"smallest_scale": 1, "quarter_turns": False}}},
            "neither scales nor turns",
        ),
        (
            "vqvae",
            {"latents": {"equivariance": {"smallest_scale": 0.9, "quarter_turns": False}}},
            r"0\.9 leaves a grid of 8x8 as it is, .* nothing is turned: write 0\.87 or less",
        ),
        ("vqvae", {"latents": {"noise_until": 0.5}}, "when noise ends, and noise is 0: write noise"),
        ("vqvae", {"latents": {"equivariance": {"probability": 2}}}, "less than or equal to 1"),
        ("vqvae", {"latents": {"nois": 2}}, "latents: unknown key nois, expected noise or noise_until or equivariance"),
        ("vqvae", {"patch_size": 16, "latents": {"equivariance": {}}}, "have a grid of 1x1"),
        (
            "vqgan",
            {"discriminator_layers": 3, "latents": {"equivariance": {}}},
            r"0\.25 leaves 4 pixels of 16, but a discriminator of 3 .* takes no fewer than 8: write 0\.5 or more",
        ),
        ("vae", {"perturbation_share": 0.1}, "choose a quantizer with one .vector., or latents: {noise: 1.0}"),
    ],
)
def test_what_cannot_work_is_refused_in_a_sentence(kind, changes, sentence):
    with pytest.raises(ValueError, match=sentence):
        objective(kind, **changes)


def test_the_smallest_image_that_is_not_refused_can_be_trained_on():
    for scale, layers in ((0.5, 3), (0.25, 2), (0.25, 1)):
        settings = {"discriminator_layers": layers, "discriminator_channels": 8, "latents": {"equivariance": {}}}
        trained = objective("vqgan", **settings | {"latents": {"equivariance": {"smallest_scale": scale}}})
        side = math.ceil(8 * scale) * 2
        assert trained.discriminator(torch.rand(2, 1, side, side)).isfinite().all()

"""The adversarial half of the VQGAN: its losses in closed form, and which phase moves which weights."""

import pytest
import torch

from tessera.bases.adversarial import adaptive_weight, hinge_loss
from tessera.components import load, parse
from tessera.contracts import ImageBatch, ImageSpec
from tessera.tokenizers import vqgan

SPEC = ImageSpec(name="x", channels=1, height=16, width=8, num_classes=1, class_names=("all",), licence="none")


def objective(**changes) -> vqgan.Objective:
    settings = {
        "kind": "vqgan",
        "quantizer": {"kind": "vector", "codebook_size": 16, "code_dim": 4, "init": "uniform"},
        "channels": 8,
        "num_blocks": 1,
        "discriminator_channels": 8,
        "training": {"num_steps": 1},
        **changes,
    }
    config = parse(load("tokenizers", "vqgan").Config, settings)
    torch.manual_seed(0)
    return vqgan.Objective(vqgan.Model(config, SPEC), config)


def batch() -> ImageBatch:
    return ImageBatch(torch.rand(4, 1, 16, 8) * 2 - 1, torch.zeros(4, dtype=torch.long))


def test_the_hinge_loss_is_one_for_a_blind_discriminator_and_zero_beyond_the_margin():
    zeros = torch.zeros(3)
    assert hinge_loss(zeros, zeros) == 1 and hinge_loss(zeros + 1, zeros - 1) == 0
    assert hinge_loss(torch.tensor([0.5]), torch.tensor([-2.0])) == pytest.approx(0.25)


def test_the_adaptive_weight_is_the_ratio_of_gradient_norms():
    layer = torch.nn.Parameter(torch.tensor([2.0, 1.0]))
    reconstruction, adversarial = (3 * layer).sum(), (layer * torch.tensor([0.6, 0.8])).sum()
    expected = (9 + 9) ** 0.5 / 1.0
    assert adaptive_weight(reconstruction, adversarial, layer, 100.0).item() == pytest.approx(expected, rel=1e-4)
    assert adaptive_weight(reconstruction, adversarial * 1e-9, layer, 100.0).item() == 100.0  # it cannot explode


def test_before_its_first_step_the_discriminator_neither_learns_nor_is_heard():
    parts = objective(discriminator_start_step=10)
    terms = parts(batch(), "autoencoder", 9)
    assert terms["adversarial_loss"] == 0 and terms["adversarial_weight"] == 0
    assert parts(batch(), "discriminator", 9) is None
    assert parts(batch(), "autoencoder", 10)["adversarial_weight"] == pytest.approx(0.1)
    assert parts(batch(), "discriminator", 10) is not None


def test_each_phase_moves_its_own_weights_only():
    parts = objective()
    parts(batch(), "autoencoder", 0)["loss"].backward()
    assert all(p.grad is None for p in parts.discriminator.parameters())
    assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in parts.model.decoder.parameters())
    parts.zero_grad(set_to_none=True)
    parts(batch(), "discriminator", 0)["loss"].backward()
    assert all(p.grad is None for p in parts.model.parameters())
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in parts.discriminator.parameters())


def test_the_adversarial_term_pushes_reconstructions_towards_real():
    parts = objective(adversarial_weight=1.0)
    terms = parts(batch(), "autoencoder", 0)
    reconstruction = 4 * terms["reconstruction_loss"] + terms["perceptual_loss"] + terms["quantizer_loss"]
    torch.testing.assert_close(terms["loss"], reconstruction + terms["adversarial_loss"])


def test_the_adaptive_balance_reaches_the_loss():
    parts = objective(adversarial_balance="adaptive", adversarial_weight=0.5)
    terms = parts(batch(), "autoencoder", 0)
    assert 0 < terms["adversarial_weight"] <= 50 and terms["adversarial_weight"] != 0.5


def test_lecam_keeps_logits_near_the_average_of_the_other_side():
    """Equation 5: max(0, D(real) - average fake)^2 + max(0, average real - D(fake))^2, on the mean logits."""
    parts, without = objective(lecam_weight=2.0), objective(lecam_weight=0.0)  # the same weights: one seed
    images = batch()
    parts(images, "autoencoder", 0)
    without._pending = list(parts._pending)
    parts.average_logits.copy_(torch.tensor([0.7, -0.4]))
    with_lecam, plain = parts(images, "discriminator", 0), without(images, "discriminator", 0)
    real, fake = plain["real_logits"], plain["fake_logits"]
    expected = 2.0 * ((real + 0.4).clamp_min(0) ** 2 + (0.7 - fake).clamp_min(0) ** 2)
    torch.testing.assert_close(with_lecam["loss"] - plain["loss"], expected)
    torch.testing.assert_close(
        parts.average_logits, torch.stack([0.7 + 0.01 * (real - 0.7), -0.4 + 0.01 * (fake + 0.4)])
    )


def test_the_discriminator_is_not_part_of_the_saved_model():
    parts = objective()
    assert not any("discriminator" in name for name in parts.model.state_dict())


def test_without_a_weight_there_is_neither_a_discriminator_nor_its_phase():
    parts = objective(adversarial_weight=0.0)
    assert parts.phases == ("autoencoder",) == tuple(parts.optimizers())
    assert not any("discriminator" in name for name, _ in parts.named_parameters())
    terms = parts(batch(), "autoencoder", 0)
    torch.testing.assert_close(
        terms["loss"], 4 * terms["reconstruction_loss"] + terms["perceptual_loss"] + terms["quantizer_loss"]
    )

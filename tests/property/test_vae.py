"""The KL autoencoder: its divergence in closed form, its draws, and what it refuses."""

import pytest
import torch
from torch.distributions import Normal, kl_divergence

from tessera.components import load, parse
from tessera.contracts import ImageBatch, ImageSpec
from tessera.tokenizers import vae

SPEC = ImageSpec(name="x", channels=3, height=16, width=8, num_classes=1, class_names=("all",), licence="none")


def config(**changes) -> vae.Config:
    settings = {
        "kind": "vae",
        "quantizer": {"kind": "identity", "code_dim": 5},
        "channels": 8,
        "num_blocks": 1,
        "discriminator_channels": 8,
        "training": {"num_steps": 10},
        **changes,
    }
    return parse(load("tokenizers", "vae").Config, settings)


def model(**changes) -> vae.Model:
    torch.manual_seed(0)
    return vae.Model(config(**changes), SPEC)


def batch() -> ImageBatch:
    return ImageBatch(torch.rand(2, 3, 16, 8) * 2 - 1, torch.zeros(2, dtype=torch.long))


def test_the_divergence_is_that_of_normal_distributions():
    mean, log_variance = 2 * torch.randn(3, 4, 2, 5), 3 * torch.randn(3, 4, 2, 5)
    expected = kl_divergence(Normal(mean, (0.5 * log_variance).exp()), Normal(0.0, 1.0)).mean()
    torch.testing.assert_close(vae.kl_divergence(mean, log_variance), expected)
    assert vae.kl_divergence(torch.zeros(1), torch.zeros(1)) == 0


def test_a_draw_has_the_mean_and_the_variance_of_the_moments(monkeypatch):
    network = model().train()
    seen = []
    network.decoder.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].detach()))
    images = batch().images[:1].expand(4000, -1, -1, -1)
    mean, log_variance = network.moments(images[:1])
    network(images, 0)
    torch.testing.assert_close(seen[0].mean(dim=0), mean[0], atol=0.1, rtol=0)
    torch.testing.assert_close(seen[0].std(dim=0), (0.5 * log_variance[0]).exp(), atol=0, rtol=0.08)


def test_outside_training_the_decoder_gets_the_mean():
    network = model().eval()
    images = batch().images
    encoded = network.encode(images)
    assert encoded.indices is None and encoded.latents.shape == (2, 5, 4, 2)
    assert torch.equal(encoded.latents, network.moments(images)[0])
    assert torch.equal(network(images, 0)[0], network.decode(encoded.latents))
    assert torch.equal(network(images, 0)[0], network(images, 0)[0])
    with pytest.raises(ValueError, match="no codebook"):
        network.decode_indices(torch.zeros(1, 4, 2, dtype=torch.long))


def test_the_weight_acts_on_the_divergence_and_draws_latents_to_the_normal_distribution():
    torch.manual_seed(0)
    terms = {}
    for weight in (0.0, 0.5):
        settings = config(kl_weight=weight)
        torch.manual_seed(0)
        terms[weight] = vae.Objective(vae.Model(settings, SPEC), settings)(batch(), "autoencoder", 0)
    difference = terms[0.5]["loss"] - terms[0.0]["loss"]
    torch.testing.assert_close(difference, 0.5 * terms[0.5]["kl_loss"])


def test_without_an_adversarial_weight_there_is_no_discriminator_phase():
    settings = config()
    objective = vae.Objective(vae.Model(settings, SPEC), settings)
    assert objective.phases == ("autoencoder",) and list(objective.optimizers()) == ["autoencoder"]
    settings = config(adversarial_weight=0.1, adversarial_balance="adaptive")
    objective = vae.Objective(vae.Model(settings, SPEC), settings)
    assert objective.phases == ("autoencoder", "discriminator")
    assert objective(batch(), "autoencoder", 0)["adversarial_weight"] > 0
    assert objective(batch(), "discriminator", 0)["loss"] > 0


def test_moments_are_float32_and_clamped_under_bf16_autocast():
    network = model().train()
    with torch.no_grad():
        network.encoder.head.bias[5:] = 1e4
    with torch.autocast("cpu", torch.bfloat16):
        mean, log_variance = network.moments(batch().images)
        reconstructions, divergence = network(batch().images, 0)
    assert mean.dtype == log_variance.dtype == divergence.dtype == torch.float32
    assert log_variance.max() == 20 and divergence.isfinite() and reconstructions.isfinite().all()


def test_a_quantizer_with_a_codebook_is_refused():
    with pytest.raises(ValueError, match="tokenizer vae takes quantizer identity, not vector"):
        config(quantizer={"kind": "vector"})

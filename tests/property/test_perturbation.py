"""Latent perturbation: how many indices are replaced, by which, when, and what stays as it was."""

import pytest
import torch

from tessera.bases.autoencoder import Autoencoder, AutoencoderConfig
from tessera.components import parse
from tessera.contracts import ImageSpec, Quantized

SPEC = ImageSpec(name="x", channels=1, height=16, width=8, num_classes=1, class_names=("all",), licence="none")
VECTOR = {"kind": "vector", "codebook_size": 40, "code_dim": 4, "init": "uniform", "revive_below": 0.0}
EVERY = [
    VECTOR,
    {"kind": "fsq", "levels": [8, 5, 5]},
    {"kind": "lfq", "code_dim": 6},
    {"kind": "simvq", "codebook_size": 40, "code_dim": 4},
    {"kind": "residual", "num_levels": 2, "quantizer": VECTOR},
]


def config(**changes) -> AutoencoderConfig:
    settings = {
        "quantizer": VECTOR,
        "channels": 8,
        "num_blocks": 1,
        "perturbation_share": 0.5,
        "training": {"num_steps": 100},
        **changes,
    }
    return parse(AutoencoderConfig, settings)


def model(**changes) -> Autoencoder:
    torch.manual_seed(0)
    return Autoencoder(config(**changes), SPEC)


def decoder_inputs(network: Autoencoder, images: torch.Tensor, step: int) -> tuple[Quantized, torch.Tensor]:
    """The quantizer's answer and what the decoder gets of its codes."""
    seen = []
    hook = network.decoder.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    _, quantized = network(images, step)
    hook.remove()
    return quantized, seen[0]


def test_the_share_falls_to_zero_on_a_line():
    settings = config(perturbation_share=0.4, perturbation_until=0.5)
    assert settings.perturbed_share(0) == 0.4
    assert settings.perturbed_share(25) == pytest.approx(0.2)
    assert settings.perturbed_share(50) == 0 and settings.perturbed_share(99) == 0
    assert config(perturbation_share=0.4).perturbed_share(99) == pytest.approx(0.004)


@pytest.mark.parametrize("quantizer", EVERY, ids=lambda quantizer: quantizer["kind"])
def test_the_decoder_gets_codes_of_near_indices_in_that_share_of_places(quantizer):
    if quantizer["kind"] == "vector":  # codes of moving averages would have moved by the time they are compared
        quantizer = {**quantizer, "update": "gradient"}
    network = model(quantizer=quantizer, perturbation_neighbors=3).train()
    images = torch.rand(128, 1, 16, 8) * 2 - 1
    quantized, given = decoder_inputs(network, images, step=0)
    is_moved = (given - quantized.codes).abs().amax(dim=1) > 1e-6
    levels = network.quantizer.indices_per_code
    expected = 1 - 0.5**levels  # a place of several indices moves if one of them is replaced
    assert is_moved.float().mean().item() == pytest.approx(expected, abs=0.05)
    if levels == 1:
        near = network.quantizer.neighbors(quantized.indices.flatten(), 3)  # (M, 3)
        allowed = network.quantizer.indices_to_codes(near.view(1, -1, 3))[0]  # (D, M, 3)
        moved = given.permute(1, 0, 2, 3).flatten(1)  # (D, M)
        distance = (allowed - moved.unsqueeze(2)).abs().amax(dim=0).amin(dim=1)
        assert distance[is_moved.flatten()].max() < 1e-4


def test_the_quantizers_losses_and_the_encoders_gradient_are_untouched():
    images = torch.rand(4, 1, 16, 8) * 2 - 1
    found = {}
    for share in (0.0, 0.9):
        network = model(perturbation_share=share).train()
        weights = torch.linspace(-1, 1, 4 * 4 * 4 * 2).view(4, 4, 4, 2)
        _, quantized = network(images, 0)
        gradient = torch.autograd.grad(quantized.loss, network.encoder.head.weight)[0]
        _, given = decoder_inputs(network, images, 0)
        through = torch.autograd.grad((given * weights).sum(), network.encoder.head.weight)[0]
        found[share] = (quantized.loss, quantized.indices, gradient, through)
    for plain, perturbed in zip(*found.values(), strict=True):
        assert torch.equal(plain, perturbed)


def test_outside_training_and_when_the_share_is_zero_nothing_is_replaced_or_drawn():
    images = torch.rand(4, 1, 16, 8) * 2 - 1
    for network, step in (
        (model().eval(), 0),
        (model().train(), 100),
        (model(perturbation_share=0.0).train(), 0),
    ):
        before = torch.get_rng_state()
        quantized, given = decoder_inputs(network, images, step)
        assert torch.equal(quantized.codes, given) and torch.equal(before, torch.get_rng_state())


def test_a_codebook_that_has_not_started_has_nothing_to_replace():
    network = model(quantizer={"kind": "vector", "codebook_size": 40, "code_dim": 4, "init_step": 3}).train()
    images = torch.rand(32, 1, 16, 8) * 2 - 1
    for step in range(3):
        quantized, given = decoder_inputs(network, images, step)
        assert torch.equal(quantized.codes, given)
    quantized, given = decoder_inputs(network, images, 3)
    assert not torch.equal(quantized.codes, given)


def test_a_tokenizer_without_a_codebook_refuses_perturbation():
    with pytest.raises(
        ValueError, match="perturbation_share replaces codes by near ones, but quantizer identity has no"
    ):
        config(quantizer={"kind": "identity"})


def test_more_neighbors_than_codes_are_refused():
    with pytest.raises(ValueError, match="perturbation_neighbors 40 must be below the number of codes, 40"):
        config(perturbation_neighbors=40)
    residual = {"kind": "residual", "num_levels": 2, "quantizer": VECTOR}
    with pytest.raises(ValueError, match="below the number of codes, 40"):
        config(quantizer=residual, perturbation_neighbors=40)
    assert config(quantizer=residual, perturbation_neighbors=39)

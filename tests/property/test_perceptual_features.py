"""A perceptual loss of any network of timm: closed forms, beside timm's own feature extractor, and its gradient."""

import numpy as np
import pytest
import safetensors.torch
import timm as library
import torch

from tessera.artifacts import folder as artifact
from tessera.bases.autoencoder import ReconstructionLoss
from tessera.components import InvalidParams, load, parse
from tessera.features import timm
from tessera.perceptual import features


def images(*shape: int, seed: int = 0) -> torch.Tensor:
    return 2 * torch.rand(*shape, generator=torch.Generator().manual_seed(seed)) - 1


def vqgan(perceptual):
    settings = {"kind": "vqgan", "quantizer": {"kind": "vector"}, "training": {"num_steps": 1}}
    return parse(load("tokenizers", "vqgan").Config, settings | {"perceptual": perceptual})


@pytest.fixture(scope="module")
def packaged() -> features.Distance:
    return features.Distance(features.Config())


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Settings of a small network of timm with random weights in a file."""

    def settings(network: str) -> dict:
        torch.manual_seed(0)
        path = tmp_path_factory.mktemp("weights") / f"{network}.safetensors"
        safetensors.torch.save_file(library.create_model(network, pretrained=False).state_dict(), path)
        return {"network": network, "weights": str(path), "sha256": artifact.sha256(path)}

    return settings


def test_the_distance_of_a_layer_is_that_of_directions_alone():
    """(1, 2, 1, 2): two places of two channels. Right angles are 2 apart, opposites 4, lengths do not matter."""
    first = torch.tensor([[[[1.0, 3.0]], [[0.0, 0.0]]]])
    turned = torch.tensor([[[[0.0, 5.0]], [[7.0, 0.0]]]])  # by a right angle at the first place, not at the second
    assert features.unit_distance(first, turned) == 1.0
    assert features.unit_distance(first, -first) == 4.0
    assert features.unit_distance(first, 9 * first) == 0.0
    assert features.unit_distance(torch.zeros(1, 2, 1, 1), torch.zeros(1, 2, 1, 1)) == 0.0


def recomputed(network: torch.nn.Module, first: torch.Tensor, second: torch.Tensor) -> np.ndarray:
    """(B,) by numpy, of timm's own extractor of layers, before it is divided by anything."""
    total = 0.0
    with torch.no_grad():
        for pair in zip(network(first), network(second), strict=True):
            a, b = (grid.double().numpy() for grid in pair)
            a, b = (grid / np.linalg.norm(grid, axis=1, keepdims=True) for grid in (a, b))
            total = total + ((a - b) ** 2).sum(axis=1).mean(axis=(1, 2))
    return total


def test_it_is_the_sum_over_layers_over_that_of_unrelated_images(packaged):
    network = library.create_model(
        "tf_efficientnet_lite0", pretrained=False, features_only=True, out_indices=(0, 1, 2, 3)
    ).eval()
    weights = packaged._network[0].network.state_dict()
    network.load_state_dict(
        {name: weights[name] for name in network.state_dict()}
    )  # pixels of [-1, 1] are what it wants
    first, second = images(3, 3, 64, 96), images(3, 3, 64, 96, seed=1)
    noise = features.natural_noise(features.NUM_UNRELATED, 64).expand(-1, 3, -1, -1)
    unrelated = recomputed(network, noise, noise.roll(1, dims=0)).mean()
    assert packaged.unrelated.item() == pytest.approx(unrelated, rel=1e-4)
    expected = recomputed(network, first, second).mean() / unrelated
    assert packaged(first, second).item() == pytest.approx(expected, rel=1e-4)
    assert packaged(first, first) == 0


def test_the_noise_has_the_spectrum_of_photographs_and_is_always_the_same():
    noise = features.natural_noise(64, 64)
    assert noise.shape == (64, 1, 64, 64) and noise.abs().max() <= 1
    assert noise.std().item() == pytest.approx(0.5, abs=0.05)
    amplitude = (
        torch.fft.fft(noise[:, 0, 0]).abs().square().mean(dim=0).sqrt()
    )  # along a row: f^-1/2 of the 1/f of a plane
    slope = np.polyfit(np.log(np.arange(2, 17)), amplitude[2:17].log().numpy(), 1)[0]
    assert slope == pytest.approx(-0.5, abs=0.1)
    torch.manual_seed(5)
    assert torch.equal(features.natural_noise(64, 64), noise)


@pytest.mark.parametrize("network", ["test_resnet", "test_vit"])  # the second takes images of 160 pixels alone
def test_networks_of_a_local_file_say_1_of_unrelated_images_too(network, saved):
    distance = features.Distance(features.Config(**saved(network), layers=(0, -1)))
    noise = features.natural_noise(features.NUM_UNRELATED, 64)
    assert distance(noise, noise.roll(1, dims=0)).item() == pytest.approx(1.0)
    some = images(2, 1, 28, 20)
    assert torch.equal(
        distance(some, some.flip(-1)), distance(*(x.expand(-1, 3, -1, -1) for x in (some, some.flip(-1))))
    )
    assert distance(some, some.flip(-1)) > 0.01


def test_small_images_are_enlarged_with_their_shape_kept(packaged):
    assert packaged._resized(images(1, 1, 28, 14)).shape == (1, 1, 128, 64)
    assert packaged._resized(images(1, 3, 64, 65)).shape == (1, 3, 64, 65)
    assert packaged(images(1, 1, 3, 1), images(1, 1, 3, 1, seed=1)) > 0


def test_the_gradient_reaches_the_reconstruction_as_differences_say_and_no_weight(saved):
    """Of a transformer, because differences across the kinks of ReLUs are no gradients."""
    distance = features.Distance(features.Config(**saved("test_vit"), layers=(0, 2, 5)))
    target, reconstruction = images(1, 3, 16, 16), images(1, 3, 16, 16, seed=1).requires_grad_()
    (gradient,) = torch.autograd.grad(distance(reconstruction, target), reconstruction)
    step = 1e-2 * torch.nn.functional.normalize(gradient, dim=None)
    with torch.no_grad():
        rise = distance(reconstruction + step, target) - distance(reconstruction - step, target)
    assert rise.item() == pytest.approx(2 * (gradient * step).sum().item(), rel=0.02)
    assert not any(weight.requires_grad for weight in distance._network[0].parameters())


def test_a_tokenizer_s_loss_has_it_as_its_perceptual_term_and_no_checkpoint_holds_the_network(packaged):
    torch.manual_seed(3)
    state = torch.get_rng_state()
    loss = ReconstructionLoss(vqgan({"kind": "features"})).train()
    assert torch.equal(torch.get_rng_state(), state)  # what is made after it is as without it
    assert list(loss.state_dict()) == ["distance.unrelated"] and not list(loss.parameters())
    some = images(2, 3, 32, 32)
    terms = loss(some.flip(-1), some)
    torch.testing.assert_close(terms["perceptual_loss"], packaged(some.flip(-1), some), rtol=0, atol=0)
    torch.testing.assert_close(terms["loss"], 4 * terms["reconstruction_loss"] + terms["perceptual_loss"])


@pytest.mark.parametrize(
    ("perceptual", "sentence"),
    [
        ("laplacien", r"perceptual: expected one of none, laplacian, lpips, or a mapping .*did you mean 'laplacian'\?"),
        ({"kind": "feature"}, r"perceptual: there is no tessera/perceptual/feature\.py: .*did you mean 'features'\?"),
        ({"kind": "features", "layer": [1]}, r"perceptual\.layer: unknown key; did you mean 'layers'\?"),
        ({"kind": "features", "layers": []}, r"perceptual\.layers: .*at least 1 item"),
        (
            {"kind": "features", "network": "resnet18"},
            r"perceptual: network resnet18 has no installed weights.*set both",
        ),
    ],
)
def test_each_mistake_in_the_params_is_one_sentence(perceptual, sentence):
    with pytest.raises(InvalidParams, match=sentence) as refusal:
        vqgan(perceptual)
    assert len(str(refusal.value).splitlines()) == 1


def test_weights_that_are_missing_changed_or_of_another_network_stop_the_training_at_its_start(saved, tmp_path):
    right = saved("test_resnet")
    for changes, sentence in [
        ({"weights": str(tmp_path / "nothing")}, r"^perceptual\.weights: .*nothing does not exist"),
        ({"sha256": "0" * 64}, r"^perceptual\.weights: .* has sha256 .*, expected perceptual\.sha256 000"),
        ({"network": "test_vit"}, r"^perceptual\.weights: .* holds the weights of another network"),
        ({"layers": (0, 5)}, r"^layers: timm's test_resnet gives 5 layers and none of number 5, expected .* -5 to 4"),
        ({"network": "no_such_net"}, r"has no network no_such_net, expected .*: correct perceptual\.network"),
    ]:
        with pytest.raises(ValueError, match=sentence):
            features.Distance(features.Config(**right | changes))


def test_the_installed_weights_are_checked_too(monkeypatch, tmp_path):
    (tmp_path / "changed.pth").write_bytes(b"other")
    monkeypatch.setattr(timm, "_packaged_path", lambda: tmp_path / "changed.pth")
    with pytest.raises(ValueError, match=f"has sha256 .*, expected {timm.PACKAGED_SHA256}.*make setup"):
        features.Distance(features.Config())
    (sentence,) = timm.problems(timm.Config(), planned=None)  # of a judge, before anything runs
    assert "is missing or not the file with sha256" in sentence and sentence.endswith("make setup")

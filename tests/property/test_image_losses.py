"""Reconstruction terms: closed forms, and LPIPS against another implementation under the same random weights."""

import pytest
import safetensors.torch
import torch

from tessera.artifacts import folder as artifact
from tessera.bases.autoencoder import ReconstructionLoss, codebook_terms
from tessera.components import InvalidParams, load, parse
from tessera.contracts import Quantized
from tessera.nn.image_losses import Lpips, laplacian_loss, laplacian_pyramid, pixel_loss


def test_pixel_losses_are_mean_absolute_and_mean_squared():
    a, b = torch.zeros(1, 1, 2, 2), torch.tensor([[[[1.0, 3.0], [0.0, 0.0]]]])
    assert pixel_loss(a, b, "l1") == 1.0 and pixel_loss(a, b, "l2") == 2.5


@pytest.mark.parametrize("shape", [(1, 1, 16, 8), (2, 3, 8, 8), (1, 1, 3, 5)])
def test_the_pyramid_sums_back_to_the_image(shape):
    images = torch.randn(shape)
    levels = laplacian_pyramid(images)
    whole = levels[-1]
    for level in reversed(levels[:-1]):
        whole = level + torch.nn.functional.interpolate(
            whole, size=level.shape[-2:], mode="bilinear", align_corners=False
        )
    torch.testing.assert_close(whole, images)


def test_the_pyramid_weighs_a_shift_of_brightness_at_the_coarsest_level_only():
    images = torch.rand(2, 1, 16, 16)
    torch.testing.assert_close(laplacian_loss(images + 0.3, images), torch.tensor(0.3 / 3), atol=1e-5, rtol=0)


def random_lpips():
    """torchmetrics' LPIPS with random weights, and those weights under the names that ours expects."""
    lpips = pytest.importorskip("torchmetrics.functional.image.lpips")
    torch.manual_seed(0)
    peer = lpips._LPIPS(pretrained=False, net="vgg", pnet_rand=True, use_dropout=True).eval()
    weights = {}
    for slice_number in range(1, 6):
        for name, layer in getattr(peer.net, f"slice{slice_number}").named_children():
            if isinstance(layer, torch.nn.Conv2d):
                weights[f"features.{name}.weight"], weights[f"features.{name}.bias"] = (
                    layer.weight.data,
                    layer.bias.data,
                )
    for number in range(5):
        weight = torch.rand_like(getattr(peer, f"lin{number}").model[-1].weight.data)  # LPIPS' weights are positive
        getattr(peer, f"lin{number}").model[-1].weight.data.copy_(weight)
        weights[f"lin{number}.weight"] = weight
    return peer, weights


@pytest.mark.parametrize("channels", [1, 3])
def test_lpips_is_that_of_another_implementation(channels):
    """With random weights of the published names and shapes: the true ones are not part of the project."""
    peer, weights = random_lpips()
    a, b = torch.rand(2, channels, 32, 48) * 2 - 1, torch.rand(2, channels, 32, 48) * 2 - 1
    with torch.no_grad():
        theirs = peer(a.expand(-1, 3, -1, -1), b.expand(-1, 3, -1, -1)).mean()
        torch.testing.assert_close(Lpips(weights)(a, b), theirs, atol=1e-5, rtol=1e-4)
        assert Lpips(weights)(a, a) == 0


def config(**changes):
    return parse(
        load("tokenizers", "vqvae").Config,
        {"kind": "vqvae", "quantizer": {"kind": "vector"}, "training": {"num_steps": 1}, **changes},
    )


def test_lpips_comes_from_a_local_file_whose_hash_is_checked(tmp_path):
    _, weights = random_lpips()
    path = tmp_path / "lpips.safetensors"
    safetensors.torch.save_file({name: value.contiguous() for name, value in weights.items()}, path)
    right = {"perceptual": "lpips", "lpips_weights": str(path), "lpips_sha256": artifact.sha256(path)}
    images = torch.rand(2, 1, 32, 32)
    loss = ReconstructionLoss(config(**right))
    terms = loss(images.flip(-1), images)
    assert terms["perceptual_loss"] > 0
    torch.testing.assert_close(terms["loss"], 4 * terms["reconstruction_loss"] + terms["perceptual_loss"])
    assert not loss.state_dict()  # no checkpoint carries a copy of VGG
    with pytest.raises(ValueError, match="has sha256 .* expected lpips_sha256"):
        ReconstructionLoss(config(**(right | {"lpips_sha256": "0" * 64})))
    with pytest.raises(ValueError, match="does not exist"):
        ReconstructionLoss(config(**(right | {"lpips_weights": "nowhere"})))
    with pytest.raises(InvalidParams, match="needs lpips_weights"):
        config(perceptual="lpips")


def test_the_plotted_perplexity_is_the_exponential_of_the_entropy():
    indices = torch.tensor([[[0, 0], [1, 1]]])
    terms = codebook_terms(Quantized(torch.zeros(1), indices, torch.zeros(())), 5)
    assert terms["codebook_perplexity"].item() == pytest.approx(2.0)
    assert codebook_terms(Quantized(torch.zeros(1), None, torch.zeros(())), None) == {}

"""SimVQ: nearest codes of a frozen codebook times one learned matrix, its losses, and what a step moves."""

import pytest
import torch

from tessera.quantizers.simvq import Config, Quantizer


def make(**settings) -> Quantizer:
    torch.manual_seed(0)
    return Quantizer(Config(**{"codebook_size": 24, "code_dim": 5, **settings}))


def every_code(quantizer: Quantizer) -> torch.Tensor:
    """(K, D)"""
    indices = torch.arange(quantizer.codebook_size).view(1, -1, 1)
    return quantizer.indices_to_codes(indices)[0, :, :, 0].T.detach()


def test_codes_are_the_nearest_of_the_frozen_codebook_through_the_matrix():
    quantizer = make().eval()
    z = torch.randn(3, 5, 4, 2)
    codes = quantizer.frozen @ quantizer.linear.weight.T + quantizer.linear.bias
    torch.testing.assert_close(every_code(quantizer), codes)
    distances = torch.cdist(z.permute(0, 2, 3, 1).reshape(-1, 5), codes)
    assert torch.equal(distances.argmin(dim=1), quantizer(z).indices.flatten())


def test_the_losses_have_their_closed_form_and_their_targets():
    quantizer = make(commitment_weight=0.5, codebook_weight=2.0)
    z = torch.randn(2, 5, 3, 2, requires_grad=True)
    quantized = quantizer(z)
    codes = quantizer.indices_to_codes(quantized.indices).detach()
    torch.testing.assert_close(quantized.loss, 2.5 * (z - codes).square().mean())
    quantized.loss.backward()
    torch.testing.assert_close(z.grad, 0.5 * 2 * (z - codes).detach() / z.numel())  # beta on the encoder's term alone
    assert quantizer.linear.weight.grad.abs().sum() > 0


def test_the_matrix_moves_every_code_and_the_codebook_stays_frozen():
    quantizer = make()
    before, frozen = every_code(quantizer), quantizer.frozen.clone()
    assert [name for name, _ in quantizer.named_parameters()] == ["linear.weight", "linear.bias"]
    optimizer = torch.optim.AdamW(quantizer.parameters(), lr=1e-2)
    quantized = quantizer(torch.randn(1, 5, 1, 2))  # two latents, at most two codes in use
    quantized.loss.backward()
    optimizer.step()
    assert ((every_code(quantizer) - before).norm(dim=1) > 0).all() and torch.equal(quantizer.frozen, frozen)


def test_distances_are_float32_under_bf16_autocast():
    quantizer = make(codebook_size=512).eval()
    z = torch.randn(2, 5, 8, 8)
    with torch.autocast("cpu", torch.bfloat16):
        under = quantizer(z)
        assert quantizer.indices_to_codes(under.indices).dtype == torch.float32
    assert under.codes.dtype == torch.float32 and torch.equal(under.indices, quantizer(z).indices)


def test_the_frozen_codebook_is_saved_with_the_weights():
    assert "frozen" in make().state_dict()


def test_indices_and_codes_agree_with_the_peer_library():
    pytest.importorskip("vector_quantize_pytorch")
    from vector_quantize_pytorch import SimVQ

    ours = make().eval()
    peer = SimVQ(dim=5, codebook_size=24, rotation_trick=False, codebook_transform=ours.linear).eval()
    peer.frozen_codebook.copy_(ours.frozen)
    z = torch.randn(3, 5, 4, 2)
    codes, indices, loss = peer(z.permute(0, 2, 3, 1).reshape(3, 8, 5))
    quantized = ours(z)
    assert torch.equal(indices.view(3, 4, 2), quantized.indices)
    torch.testing.assert_close(codes.view(3, 4, 2, 5).permute(0, 3, 1, 2), quantized.codes)
    torch.testing.assert_close(loss, quantized.loss)  # the peer's defaults: 0.25 on the encoder, 1 on the codes

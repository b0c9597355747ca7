"""The mathematics of lookup-free quantization: signs, bits, and the two entropies against sums over all codes."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tessera.quantizers.lfq import Config, Quantizer


def make(**settings) -> Quantizer:
    return Quantizer(Config(**settings))


def all_codes(quantizer: Quantizer) -> torch.Tensor:
    """(K, D)"""
    return quantizer.indices_to_codes(torch.arange(quantizer.codebook_size).view(1, -1, 1))[0, :, :, 0].T


def soft_assignments(quantizer: Quantizer, z: torch.Tensor) -> torch.Tensor:
    """(N, K) exp(-||z - code||^2 / temperature), normalized, in float64: the definition, code by code."""
    flat = z.permute(0, 2, 3, 1).flatten(0, 2).double()
    squared = torch.cdist(flat, all_codes(quantizer).double()).square()
    return torch.softmax(-squared / quantizer.config.entropy_temperature, dim=1)


def entropy(shares: torch.Tensor) -> torch.Tensor:
    return torch.special.entr(shares).sum(dim=-1)


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 12), st.integers(0, 2**31))
def test_the_code_is_the_nearest_corner_of_the_cube(bits, seed):
    quantizer = make(code_dim=bits)
    z = torch.randn(1, bits, 3, 2, generator=torch.Generator().manual_seed(seed))
    flat = z.permute(0, 2, 3, 1).flatten(0, 2)
    assert torch.equal(torch.cdist(flat, all_codes(quantizer)).argmin(dim=1), quantizer(z).indices.flatten())


def test_index_bits_are_those_of_the_paper():
    """Section 3.1: Index(z) = sum over channels i = 1.. of 2^(i-1) where z_i > 0; zero counts as negative."""
    z = torch.tensor([0.5, -1.0, 0.0, 3.0]).view(1, 4, 1, 1)
    assert make(code_dim=4)(z).indices.item() == 1 + 8


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 9), st.floats(0.3, 20.0), st.integers(0, 2**31))
def test_the_entropies_are_those_of_a_sum_over_all_codes(bits, temperature, seed):
    quantizer = make(code_dim=bits, entropy_temperature=temperature, entropy_group_bits=9)
    z = torch.randn(2, bits, 3, 4, generator=torch.Generator().manual_seed(seed))
    shares = soft_assignments(quantizer, z)
    of_tokens, of_batch = quantizer.entropies(z)
    assert of_tokens.item() == pytest.approx(entropy(shares).mean().item(), abs=1e-4)
    assert of_batch.item() == pytest.approx(entropy(shares.mean(dim=0)).item(), abs=1e-4)


def test_groups_of_bits_count_as_independent():
    quantizer = make(code_dim=5, entropy_group_bits=2)
    z = torch.randn(2, 5, 3, 4)
    shares = soft_assignments(quantizer, z).mean(dim=0).view(2, 2, 2, 2, 2)  # bits 4, 3, 2, 1, 0
    expected = sum(entropy(shares.sum(dim=others).flatten()) for others in ((0, 1, 2), (0, 3, 4), (1, 2, 3, 4)))
    assert quantizer.entropies(z)[1].item() == pytest.approx(expected.item(), abs=1e-5)
    exact = make(code_dim=5).entropies(z)[1]
    assert quantizer.entropies(z)[1] >= exact - 1e-6  # the sum over groups bounds the joint entropy


def test_the_loss_is_made_of_its_terms_and_its_gradient_is_right():
    quantizer = make(
        code_dim=3, entropy_weight=0.3, diversity_gamma=2.0, commitment_weight=0.7, entropy_temperature=2.0
    )
    z = torch.randn(2, 3, 2, 2, dtype=torch.double, requires_grad=True)
    shares = soft_assignments(quantizer, z)
    expected = 0.3 * (entropy(shares).mean() - 2.0 * entropy(shares.mean(dim=0)))
    expected = expected + 0.7 * (z - z.sign()).square().mean()
    gradient = torch.autograd.grad(expected, z)[0]
    loss = quantizer(z).loss
    torch.testing.assert_close(loss, expected.float(), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(torch.autograd.grad(loss, z)[0], gradient, atol=1e-5, rtol=1e-4)


def test_extreme_latents_have_finite_losses_and_gradients():
    quantizer = make(code_dim=12, entropy_temperature=0.01)
    z = (torch.tensor([0.0, 1e-8, -300.0, 300.0]).view(1, 1, 4, 1).expand(1, 12, 4, 1)).clone().requires_grad_()
    loss = quantizer(z).loss
    loss.backward()
    assert loss.isfinite() and z.grad.isfinite().all()


def test_spread_latents_have_the_largest_entropy_of_a_batch():
    quantizer = make(code_dim=4, entropy_temperature=0.1)
    z = all_codes(quantizer).T.reshape(1, 4, 16, 1)
    of_tokens, of_batch = quantizer.entropies(z)
    assert of_batch.item() == pytest.approx(4 * math.log(2), abs=1e-4) and of_tokens.item() == pytest.approx(
        0, abs=1e-4
    )


def test_a_million_codes_need_no_million_columns():
    quantizer = make(code_dim=20)
    z = torch.randn(4, 20, 16, 16, requires_grad=True)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        quantized = quantizer(z)
        quantized.loss.backward()
    assert quantizer.codebook_size == 2**20 and quantized.indices.max() > 2**17 and z.grad.isfinite().all()
    assert max(event.cpu_memory_usage for event in profile.events()) < 16 * 2**20  # (1024, 2**20) floats are 4 GiB
    torch.testing.assert_close(quantizer.indices_to_codes(quantized.indices), quantized.codes)


def test_indices_codes_and_entropies_agree_with_the_peer_library():
    """Its first channel is the highest bit, ours (the paper's) the lowest: the channels are turned round for it."""
    peer = pytest.importorskip("vector_quantize_pytorch").LFQ(dim=6, commitment_loss_weight=1.0).train()
    ours = make(code_dim=6, entropy_temperature=0.5).train()
    z = 0.3 * torch.randn(2, 6, 5, 3)
    (codes, indices, _), breakdown = peer(z.flip(1), inv_temperature=1 / 0.5, return_loss_breakdown=True)
    quantized = ours(z)
    assert torch.equal(indices.long(), quantized.indices)
    torch.testing.assert_close(codes.flip(1), quantized.codes)
    of_tokens, of_batch = ours.entropies(z)
    assert of_tokens.item() == pytest.approx(breakdown.per_sample_entropy.item(), abs=2e-3)  # it clamps logarithms
    assert of_batch.item() == pytest.approx(breakdown.batch_entropy.item(), abs=2e-3)

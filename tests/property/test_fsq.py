"""The mathematics of finite scalar quantization, for any levels, and beside the peer library."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from tessera.quantizers.fsq import Config, Quantizer

some_levels = st.lists(st.integers(3, 9), min_size=1, max_size=4).map(tuple)


def every_code(quantizer: Quantizer) -> torch.Tensor:
    """(K, D)"""
    return quantizer.indices_to_codes(torch.arange(quantizer.codebook_size).view(1, -1, 1))[0, :, :, 0].T


@settings(max_examples=30, deadline=None)
@given(some_levels)
def test_every_index_is_a_code_of_its_own_on_the_grid(levels):
    config = Config(levels=levels)
    quantizer = Quantizer(config)
    codes = every_code(quantizer)
    assert config.code_dim == len(levels) and quantizer.codebook_size == torch.tensor(levels).prod()
    assert len(codes.unique(dim=0)) == quantizer.codebook_size
    for channel, count in enumerate(levels):
        values = codes[:, channel].unique()
        expected = (torch.arange(count) - count // 2) / (count // 2)
        torch.testing.assert_close(values, expected)


@settings(max_examples=30, deadline=None)
@given(some_levels, st.integers(0, 2**31))
def test_a_code_is_the_grid_point_nearest_to_the_bounded_latent(levels, seed):
    quantizer = Quantizer(Config(levels=levels))
    z = 3 * torch.randn(1, len(levels), 5, 2, generator=torch.Generator().manual_seed(seed))
    codes, bounded = quantizer(z).codes, quantizer.bound(z)
    step = 1 / (quantizer.levels // 2)
    assert ((codes - bounded).abs() <= step / 2 + 1e-6).all()


def test_every_code_is_reached_by_some_latent():
    quantizer = Quantizer(Config(levels=(8, 5, 4)))
    ends = [torch.linspace(-6, 6, 200) for _ in range(3)]
    z = torch.cartesian_prod(*(torch.cat([end[:1], end[60:140:4], end[-1:]]) for end in ends)).T  # (3, M)
    assert len(quantizer(z.reshape(1, 3, -1, 1)).indices.unique()) == quantizer.codebook_size


@settings(max_examples=20, deadline=None)
@given(some_levels)
def test_zero_maps_to_zero_and_infinity_to_the_outermost_levels(levels):
    quantizer = Quantizer(Config(levels=levels))
    zero = torch.zeros(1, len(levels), 2, 1)
    torch.testing.assert_close(quantizer(zero).codes, zero, atol=1e-6, rtol=0)
    torch.testing.assert_close(quantizer.bound(zero), zero, atol=1e-6, rtol=0)
    high = quantizer(zero + 1e4).codes[0, :, 0, 0]
    expected = torch.tensor([(count - 1 - count // 2) / (count // 2) for count in levels])
    torch.testing.assert_close(high, expected)
    torch.testing.assert_close(quantizer(zero - 1e4).codes[0, :, 0, 0], -torch.ones(len(levels)))


def test_the_bound_is_that_of_the_paper_but_for_its_shift():
    """Appendix A.1 with atanh in the place of tan; for odd levels there is no shift, and both are one."""
    z = torch.linspace(-3, 3, 50).view(1, 1, 50, 1)
    for count in (5, 8):
        half = (count - 1) * (1 - 1e-3) / 2
        offset = 0.0 if count % 2 else 0.5
        for shift, tolerance in ((torch.atanh, 1e-6), (torch.tan, 0.0 if count % 2 else 5e-3)):
            expected = torch.tanh(z + shift(torch.tensor(offset / half))) * half - offset
            ours = Quantizer(Config(levels=(count,))).bound(z) * (count // 2)
            torch.testing.assert_close(ours, expected, atol=max(tolerance, 1e-6), rtol=0)


@pytest.mark.parametrize("levels", [(8, 5, 5, 5), (7, 5, 5, 5, 5), (4, 3)])
def test_indices_and_codes_agree_with_the_peer_library(levels):
    """Its squashed interval is wider by 0.2 %: latents that near a rounding boundary are left out."""
    peer = pytest.importorskip("vector_quantize_pytorch").FSQ(levels=list(levels)).eval()
    ours = Quantizer(Config(levels=levels)).eval()
    z = 2 * torch.randn(2, len(levels), 40, 30, generator=torch.Generator().manual_seed(0))
    codes, indices = peer(z)
    distance = ((ours.bound(z) * (ours.levels // 2) - 0.5) % 1).sub(0.5).abs()  # 1/2 at a boundary
    is_clear = (distance < 0.5 - 0.01).all(dim=1)
    assert 0.85 < is_clear.float().mean() < 1
    quantized = ours(z)
    assert torch.equal(indices.long()[is_clear], quantized.indices[is_clear])
    moved = is_clear.unsqueeze(1).expand_as(codes)
    torch.testing.assert_close(codes[moved], quantized.codes[moved], atol=1e-6, rtol=0)
    every = torch.arange(ours.codebook_size)
    torch.testing.assert_close(peer.indices_to_codes(every), every_code(ours))


def test_the_gradient_is_that_of_the_bound_and_never_turns():
    quantizer = Quantizer(Config())
    z = torch.randn(2, 4, 3, 5, requires_grad=True)
    weights = torch.randn_like(z)
    gradient = torch.autograd.grad((quantizer(z).codes * weights).sum(), z)[0]
    torch.testing.assert_close(gradient, torch.autograd.grad((quantizer.bound(z) * weights).sum(), z)[0])
    assert (gradient * weights > 0).all()


def test_rounding_is_float32_under_bf16_autocast():
    quantizer = Quantizer(Config())
    z = torch.randn(1, 4, 20, 10)
    with torch.autocast("cpu", torch.bfloat16):
        under = quantizer(z)
    assert under.codes.dtype == torch.float32 and torch.equal(under.indices, quantizer(z).indices)


def test_two_levels_are_refused_because_the_shift_would_be_infinite():
    with pytest.raises(ValidationError, match="greater than or equal to 3"):
        Config(levels=(8, 2))

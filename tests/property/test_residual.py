"""Residual quantization over other quantizers: the order of indices, the sums, the gradient, and the peer library."""

import pytest
import torch

from tessera.code.entries import code_of
from tessera.components import load, parse
from tessera.quantizers.residual import Config, Quantizer

VECTOR = {"kind": "vector", "codebook_size": 12, "code_dim": 5, "init": "uniform", "revive_below": 0.0}


def make(quantizer: dict | None = None, num_levels: int = 3) -> Quantizer:
    torch.manual_seed(0)
    made = Quantizer(parse(Config, {"kind": "residual", "quantizer": quantizer or VECTOR, "num_levels": num_levels}))
    for level in made.levels:
        if hasattr(level, "codebook"):
            level.codebook.data.normal_()
    return made


def test_each_level_quantizes_what_the_levels_before_it_left_over():
    quantizer = make().eval()
    z = torch.randn(2, 5, 3, 4)
    quantized = quantizer(z)
    by_level = quantized.indices.view(2, 3, 4, 3)  # the indices of one place stand side by side
    left = z.permute(0, 2, 3, 1).clone()
    for number, level in enumerate(quantizer.levels):
        expected = torch.cdist(left.reshape(-1, 5), level.codebook).argmin(dim=1).view(2, 3, 4)
        assert torch.equal(by_level[..., number], expected + 12 * number)
        left -= level.codebook[expected]
    torch.testing.assert_close(quantized.codes, z - left.permute(0, 3, 1, 2))


def test_indices_have_one_meaning_each_and_count_levels_times_codes():
    quantizer = make()
    assert quantizer.codebook_size == 36 and quantizer.indices_per_code == 3
    indices = quantizer.eval()(torch.randn(1, 5, 3, 4)).indices
    assert indices.shape == (1, 3, 12)
    assert torch.equal(indices.view(3, 4, 3) // 12, torch.arange(3).expand(3, 4, 3))


@pytest.mark.parametrize(
    "inner",
    [
        {"kind": "fsq", "levels": [8, 5, 5]},
        {"kind": "lfq", "code_dim": 6},
        {"kind": "vector", "codebook_size": 64, "code_dim": 3, "init_step": 0, "ema_decay": 0.8},
    ],
)
def test_more_levels_leave_less_over(inner):
    torch.manual_seed(0)
    errors = []
    for levels in (1, 2, 3):
        quantizer = make(inner, levels)
        width = parse(Config, {"kind": "residual", "quantizer": inner}).code_dim
        z = torch.randn(16, width, 4, 4).clamp(-1.5, 1.5) * (0.6 if inner["kind"] == "fsq" else 1.0)
        for _ in range(20 if inner["kind"] == "vector" else 0):
            quantizer.train()(z)
        errors.append((quantizer.eval()(z).codes - z).square().mean().item())
    assert errors[1] < 0.5 * errors[0] and errors[2] < 0.6 * errors[1]


@pytest.mark.parametrize(
    "inner",
    [
        {"kind": "fsq", "levels": [8, 5, 5]},
        {"kind": "lfq", "code_dim": 3},
        {"kind": "simvq", "codebook_size": 9, "code_dim": 3},
    ],
)
def test_indices_name_the_codes_of_levels_that_are_scaled_down(inner):
    quantizer = make(inner).eval()
    z = torch.randn(2, 3, 4, 5)
    quantized = quantizer(z)
    torch.testing.assert_close(quantizer.indices_to_codes(quantized.indices), quantized.codes, atol=1e-5, rtol=0)
    assert quantized.indices.max() < quantizer.codebook_size


def test_the_decoders_gradient_counts_once_and_every_level_draws_the_encoder():
    quantizer = make().eval()
    z = torch.randn(2, 5, 3, 4, requires_grad=True)
    weights = torch.randn_like(z)
    assert torch.equal(torch.autograd.grad((quantizer(z).codes * weights).sum(), z)[0], weights)
    left, expected = z.detach(), torch.zeros_like(z)
    for level in quantizer.levels:
        codes = level(left).codes
        left = left - codes
        expected += 0.25 * 2 * left / z.numel()
    torch.testing.assert_close(torch.autograd.grad(quantizer(z).loss, z)[0], expected)


def test_indices_and_codes_agree_with_the_peer_library():
    library = pytest.importorskip("vector_quantize_pytorch")
    ours = make().eval()
    peer = library.ResidualVQ(dim=5, codebook_size=12, num_quantizers=3, kmeans_init=False).eval()
    for level, of_peer in zip(ours.levels, peer.layers, strict=True):
        of_peer._codebook.embed.data.copy_(level.codebook.unsqueeze(0))
    z = torch.randn(3, 5, 4, 2)
    codes, indices, _ = peer(z.permute(0, 2, 3, 1).reshape(3, 8, 5))
    quantized = ours(z)
    assert torch.equal(indices.view(3, 4, 2, 3) + torch.arange(3) * 12, quantized.indices.view(3, 4, 2, 3))
    torch.testing.assert_close(codes.view(3, 4, 2, 5).permute(0, 3, 1, 2), quantized.codes)


@pytest.mark.parametrize("kind", ["identity", "residual"])
def test_levels_without_codes_of_their_own_are_refused(kind):
    inner = {"kind": kind, **({"quantizer": VECTOR} if kind == "residual" else {})}
    with pytest.raises(ValueError, match=f"cannot have levels of kind {kind}; choose one with a codebook"):
        parse(Config, {"kind": "residual", "quantizer": inner})


def test_an_unknown_key_of_the_inner_quantizer_is_named_with_its_path():
    with pytest.raises(ValueError, match=r"quantizer\.codebok_size: unknown key; did you mean 'codebook_size'\?"):
        parse(Config, {"kind": "residual", "quantizer": {"kind": "vector", "codebok_size": 3}})


def test_the_code_of_the_inner_quantizer_is_part_of_the_residual_ones():
    tokenizer = parse(
        load("tokenizers", "vqvae").Config,
        {
            "kind": "vqvae",
            "quantizer": {"kind": "residual", "quantizer": {"kind": "lfq"}},
            "training": {"num_steps": 1},
        },
    )
    modules = {name.rpartition(".")[0].rpartition(".")[2] for name in code_of(tokenizer)}
    assert {"residual", "lfq", "vqvae", "straight_through"} <= modules
    assert not {"vector", "fsq", "simvq"} & modules


def test_an_index_of_another_level_than_its_place_is_decoded_as_what_it_names():
    """A prior may draw one: the sum is then over the codes that the indices name."""
    config = parse(
        Config, {"kind": "residual", "quantizer": {**VECTOR, "codebook_size": 5, "code_dim": 3}, "num_levels": 2}
    )
    quantizer = Quantizer(config).eval()
    first, second = (level.indices_to_codes(torch.arange(5).view(1, 1, 5))[0, :, 0].T for level in quantizer.levels)
    codes = quantizer.indices_to_codes(torch.tensor([[[7, 4, 1, 1]]]))[0, :, 0].T  # (2 places, D)
    torch.testing.assert_close(codes[0], second[2] + first[4])
    torch.testing.assert_close(codes[1], first[1] + first[1])

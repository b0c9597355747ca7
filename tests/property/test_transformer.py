"""The transformer body: causality, rotary positions, the cache."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tessera.nn import handwritten, transformer
from tessera.nn.decoding import FEWEST_ROWS, Decoder, HandwrittenDecoder, decoder
from tessera.nn.transformer import RMSNorm, Transformer, rotary_angles, rotate


def body(is_causal: bool, is_conditioned: bool = False) -> Transformer:
    torch.manual_seed(0)
    net = Transformer(32, 2, 4, (3, 2), dropout=0.0, is_causal=is_causal, is_conditioned=is_conditioned).eval()
    for parameter in net.parameters():
        nn.init.normal_(parameter, std=0.2)
    return net


def test_a_causal_place_sees_nothing_after_it():
    net, x = body(is_causal=True), torch.randn(1, 6, 32)
    for place in range(6):
        changed = x.clone()
        changed[:, place] += 1
        difference = (net(x) - net(changed)).abs().amax(dim=(0, 2))
        assert (difference[:place] == 0).all() and difference[place] > 0


def test_without_causality_every_place_sees_every_other():
    net, x = body(is_causal=False), torch.randn(1, 6, 32)
    changed = x.clone()
    changed[:, 5] += 1
    assert ((net(x) - net(changed)).abs().amax(dim=(0, 2)) > 0).all()


@pytest.mark.parametrize("rows", [3, FEWEST_ROWS])
@pytest.mark.parametrize("are_ordered", [False, True])
@torch.no_grad()
def test_element_by_element_with_the_cache_equals_all_at_once(rows, are_ordered):
    net, x = body(is_causal=True), torch.randn(rows, 6, 32)
    order = torch.rand(rows, 6).argsort(dim=1) if are_ordered else None
    expected = net(x, places=order)
    assert type(decoder(net, like=x[:, 0])) is HandwrittenDecoder  # float32 on the CPU
    for chosen, as_tensor in ((HandwrittenDecoder, False), (Decoder, False), (Decoder, True)):
        decoding = chosen(net, like=x[:, 0])
        for i in range(6):
            places = None if order is None else order[:, i : i + 1]
            found = decoding.step(x[:, i], torch.tensor([i]) if as_tensor else i, places)
            torch.testing.assert_close(found, expected[:, i], atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_elements_are_decoded_with_dropout_and_in_the_precision_of_autocast():
    net, x = body(is_causal=True), torch.randn(3, 6, 32)
    with torch.autocast("cpu", torch.bfloat16):
        decoding = decoder(net, like=x[:, 0])
        found = torch.stack([decoding.step(x[:, i], i) for i in range(6)], dim=1)
        assert decoding.memory[0].dtype == torch.bfloat16
        torch.testing.assert_close(found, net(x), atol=0.05, rtol=0.05)
    dropping = Transformer(32, 2, 4, (3, 2), dropout=0.9, is_causal=True).train()
    decoding = decoder(dropping, like=x[:, 0])
    assert not torch.equal(decoding.step(x[:, 0], 0), decoding.step(x[:, 0], 0))


def test_rotated_products_depend_on_the_offset_between_places_alone():
    angles = rotary_angles(5, 4, 16)  # (20, 8)
    query, key = torch.randn(1, 1, 1, 16), torch.randn(1, 1, 1, 16)
    spun = [rotate(v.expand(1, 1, 20, 16), angles.cos(), angles.sin()).view(5, 4, 16) for v in (query, key)]
    product = torch.einsum("abe,cde->abcd", *spun)
    torch.testing.assert_close(product[1, 1, 3, 2], product[0, 0, 2, 1], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(product[4, 3, 2, 2], product[3, 2, 1, 1], atol=1e-4, rtol=1e-4)
    assert (product[0, 0, 2, 1] - product[0, 0, 1, 2]).abs() > 1e-3  # rows and columns are told apart


def test_rotation_keeps_lengths():
    angles, x = rotary_angles(3, 2, 8), torch.randn(2, 4, 6, 8)
    torch.testing.assert_close(rotate(x, angles.cos(), angles.sin()).norm(dim=-1), x.norm(dim=-1))


def test_rms_norm_is_its_formula():
    x, norm = torch.randn(2, 3, 7), RMSNorm(7)
    torch.testing.assert_close(norm(x), x / (x.square().mean(dim=-1, keepdim=True) + 1e-6).sqrt())


def test_a_conditioned_block_starts_as_the_identity():
    net = Transformer(16, 3, 2, (2, 2), dropout=0.0, is_causal=False, is_conditioned=True)
    x = torch.randn(2, 4, 16)
    torch.testing.assert_close(net(x, torch.randn(2, 16)), net.norm(x))


@pytest.mark.parametrize("has_weight", [False, True])
def test_the_norms_handwritten_gradient_is_the_numerical_one(has_weight):
    x = torch.randn(2, 3, 5, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(5, dtype=torch.float64, requires_grad=True) if has_weight else None
    assert torch.autograd.gradcheck(lambda *a: handwritten.RootMeanSquareNorm.apply(*a, 1e-6), (x, weight))


def test_the_handwritten_gradient_of_queries_keys_and_values_is_the_numerical_one():
    qkv = torch.randn(2, 6, 3 * 16, dtype=torch.float64, requires_grad=True)
    weights = [torch.randn(8, dtype=torch.float64, requires_grad=True) for _ in range(2)]
    angles = rotary_angles(3, 2, 8).double()
    assert torch.autograd.gradcheck(
        lambda *a: handwritten.QueryKeyValue.apply(*a, angles.cos(), angles.sin(), 2, 1e-6), (qkv, *weights)
    )


@pytest.mark.parametrize("is_causal", [False, True])
def test_handwritten_attention_is_torchs(is_causal):
    query, key, value = torch.randn(3, 2, 3, 6, 8).unbind()
    torch.testing.assert_close(
        handwritten.attention(query, key, value, 0.0, is_causal),
        F.scaled_dot_product_attention(query, key, value, is_causal=is_causal),
    )


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("is_conditioned", [False, True])
def test_the_handwritten_body_and_the_plain_one_agree_in_values_and_gradients(is_causal, is_conditioned, monkeypatch):
    net, x = body(is_causal, is_conditioned), torch.randn(3, 6, 32)
    condition = torch.randn(3, 32) if is_conditioned else None
    found = []
    for is_handwritten in (True, False):
        monkeypatch.setattr(transformer, "is_handwritten_faster", lambda x, answer=is_handwritten: answer)
        net.zero_grad()
        out = net(x, condition)
        out.square().sum().backward()
        found.append([out.detach(), *(parameter.grad.clone() for parameter in net.parameters())])
    for ours, plain in zip(*found, strict=True):
        torch.testing.assert_close(ours, plain, atol=1e-4, rtol=1e-4)


def test_the_body_can_be_compiled_into_one_graph():
    net = body(is_causal=True)
    compiled = torch.compile(net, backend="aot_eager", fullgraph=True)
    for length in (6, 5, 4, 1):  # from the second length on, the graph is compiled for any length
        x = torch.randn(3, length, 32)
        torch.testing.assert_close(compiled(x), net(x), atol=1e-5, rtol=1e-5)

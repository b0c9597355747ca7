"""Attention to a sequence beside the image: against its formula; padding, copies, and drawing one index after another."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tessera.bases.captions import encoded
from tessera.bases.conditional import guided
from tessera.components import load, parse
from tessera.contracts import TokenSpec
from tessera.nn.cross_attention import AttendingBlock, Context, CrossAttention, GridCrossAttention, attend
from tessera.nn.transformer import Transformer


def layer_of(context: Context, heads: int, seed: int = 0) -> CrossAttention:
    torch.manual_seed(seed)
    layer = CrossAttention(8, heads, context)
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter)
    return layer.requires_grad_(False)


def normed(x: Tensor, weight: Tensor) -> Tensor:
    return x / (x.square().mean() + 1e-6).sqrt() * weight


@settings(max_examples=25, deadline=None)
@given(heads=st.sampled_from([1, 2, 4]), elements=st.integers(0, 4), seed=st.integers(0, 99))
def test_each_place_sees_the_elements_that_there_are_and_one_that_always_is(
    heads: int, elements: int, seed: int
) -> None:
    torch.manual_seed(seed)
    context = Context(6)
    layer = layer_of(context, heads, seed)
    x, sequence = torch.randn(2, 3, 8), torch.randn(2, elements, 6)
    is_there = torch.rand(2, elements) < 0.5
    context.tell(sequence, is_there)
    found = layer(x)
    width = 8 // heads
    for image in range(2):
        said = [
            layer.key_value.weight @ normed(one, layer.sequence_norm.weight) for one in sequence[image][is_there[image]]
        ]
        pairs = [(layer.nothing[0, 0, :8], layer.nothing[0, 0, 8:]), *((one[:8], one[8:]) for one in said)]
        for place in range(3):
            query = layer.query.weight @ normed(x[image, place], layer.norm.weight)
            heard = []
            for head in range(heads):
                of_head = slice(head * width, (head + 1) * width)
                scaled = normed(query[of_head], layer.query_norm.weight) / width**0.5
                weights = torch.stack(
                    [scaled @ normed(key[of_head], layer.key_norm.weight) for key, _ in pairs]
                ).softmax(0)
                heard.append(sum(weight * value[of_head] for weight, (_, value) in zip(weights, pairs, strict=True)))
            torch.testing.assert_close(found[image, place], layer.out.weight @ torch.cat(heard), atol=1e-4, rtol=1e-4)


def test_what_stands_in_padding_is_not_seen() -> None:
    context = Context(6)
    layer, x = layer_of(context, 2), torch.randn(1, 3, 8)
    sequence, is_there = torch.randn(1, 5, 6), torch.tensor([[True, False, True, False, False]])
    context.tell(sequence, is_there)
    found = layer(x)
    context.tell(sequence.masked_fill(~is_there.unsqueeze(2), 1e3), is_there)
    assert torch.equal(layer(x), found)
    context.tell(sequence, torch.ones_like(is_there))
    assert not torch.allclose(layer(x), found)


def test_a_network_that_begins_to_attend_is_the_one_that_it_was_with_its_weights_by_name() -> None:
    torch.manual_seed(0)
    body, x = Transformer(16, 2, 2, (2, 3), 0.0, is_causal=False), torch.randn(2, 6, 16)
    before, names = body(x), set(body.state_dict())
    context = Context(4)
    attend(body, context)
    context.tell(torch.randn(2, 5, 4), torch.ones(2, 5, dtype=torch.bool))
    assert torch.equal(body(x), before) and names < set(body.state_dict())
    assert all(isinstance(block, AttendingBlock) for block in body.blocks)
    assert len(body.hidden_matrices()) == 2 * 7  # Muon has the three of each new layer as well


def test_the_places_of_a_grid_attend_as_those_of_a_sequence_do() -> None:
    context = Context(6)
    layer, x = GridCrossAttention(8, 2, context), torch.randn(2, 8, 3, 2)
    layer.cross_attention = layer_of(context, 2)
    context.tell(torch.randn(2, 5, 6), torch.ones(2, 5, dtype=torch.bool))
    of_places = layer.cross_attention(x.permute(0, 2, 3, 1).reshape(2, 6, 8)).view(2, 3, 2, 8).permute(0, 3, 1, 2)
    torch.testing.assert_close(layer(x), x + of_places)


def test_a_copy_attends_to_its_own_sequence() -> None:
    """The average of the weights is a copy that is made while a batch may be under way."""
    body = Transformer(16, 2, 2, (2, 3), 0.0, is_causal=False)
    context = Context(4)
    attend(body, context)
    context.tell(torch.randn(2, 5, 4, requires_grad=True) * 2, torch.ones(2, 5, dtype=torch.bool))
    copied = copy.deepcopy(body)
    contexts = {id(block.cross_attention.context) for block in copied.blocks}
    assert len(contexts) == 1 and id(context) not in contexts
    assert not copied.blocks[0].cross_attention.context.sequence.numel()


@pytest.mark.parametrize(("scale", "away"), [(1.0, None), (2.5, None), (2.5, 1.8)])
def test_an_autoregressive_prior_draws_what_it_says_of_the_whole_sequence(
    scale: float, away: float | None, token_spec: TokenSpec
) -> None:
    """One index after another, nearly without chance, is the likeliest index of the forward pass, at every place."""
    module = load("priors", "autoregressive")
    condition = {"kind": "caption", "width": 16, "max_bytes": 8, "cross_attention": True}
    sizes = {"width": 16, "depth": 2, "heads": 2, "training": {"num_steps": 1}}
    torch.manual_seed(0)
    config = parse(module.Config, {"kind": "autoregressive", **sizes, "condition": condition})
    model = module.Model(config, token_spec).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    model.guide = guide = copy.deepcopy(model)
    for parameter in guide.parameters():
        parameter.detach().mul_(0.5)
    told = encoded(["a zero", "二", ""], 8, torch.tensor([0, 1, 2]))
    sampling = parse(module.Sampling, {"temperature": 0.01, "guidance_scale": scale, "autoguidance_scale": away})
    drawn = model.sample(told, sampling, torch.Generator().manual_seed(0)).flatten(1)
    with torch.no_grad():
        logits = guided(model(drawn, told), model(drawn, model.null_labels(told)), scale)
        logits += ((away or 1.0) - 1) * (model(drawn, told) - guide(drawn, told))
        silent = guided(model(drawn, told[:, :1].squeeze(1) - 1), model(drawn, model.null_labels(told)), scale)
    assert torch.equal(logits.argmax(dim=2), drawn)
    assert not torch.equal(silent.argmax(dim=2), drawn)  # the words count

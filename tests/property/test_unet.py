"""The U-Net: shapes on every grid, one clear sentence where none fits, and nothing that leaks between images."""

import pytest
import torch
from torch import nn

from tessera.components import parse
from tessera.denoisers import unet


def build(shape, num_labels=4, **settings) -> unet.Model:
    torch.manual_seed(0)
    model = unet.Model(parse(unet.Config, {"kind": "unet", "channels": 16, **settings}), shape, num_labels)
    for parameter in (model.leave.weight, model.leave.bias):  # they start at zero, and so would the output
        nn.init.normal_(parameter, std=0.1)
    return model.eval()


def inputs(shape, batch=3):
    generator = torch.Generator().manual_seed(0)
    return torch.randn(batch, *shape, generator=generator), torch.linspace(-1, 1, batch), torch.arange(batch) % 4


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize(
    ("shape", "settings"),
    [
        ((1, 28, 28), {"patch_size": 2, "channel_multipliers": (1, 2)}),  # 14x14 and 7x7
        ((3, 8, 12), {"channel_multipliers": (1, 2, 2), "num_blocks": 1}),
        ((3, 12, 4), {"channel_multipliers": (1, 2), "has_attention": False}),
        ((4, 7, 5), {"channel_multipliers": (2,)}),  # odd sides, at one level
        ((2, 1, 1), {"channel_multipliers": (1,), "num_blocks": 1}),
        ((1, 6, 9), {"patch_size": 3, "channel_multipliers": (1,)}),
    ],
)
def test_output_has_the_shape_of_the_input_on_grids_of_any_form(shape, settings, batch):
    model = build(shape, **settings)
    out = model(*inputs(shape, batch))
    assert out.shape == (batch, *shape) and out.dtype == torch.float32 and out.isfinite().all()


@pytest.mark.parametrize(
    ("shape", "settings", "factor"),
    [
        ((1, 28, 28), {"channel_multipliers": (1, 2, 2, 2)}, 8),
        ((1, 28, 26), {"patch_size": 2, "channel_multipliers": (1, 2)}, 4),
        ((1, 9, 8), {"patch_size": 2, "channel_multipliers": (1,)}, 2),
    ],
)
def test_a_grid_that_does_not_divide_is_refused_in_a_sentence(shape, settings, factor):
    expected = f"a {shape[1]}x{shape[2]} grid of latents is not divisible by the denoiser's patch_size .*, {factor}:"
    with pytest.raises(ValueError, match=expected):
        build(shape, **settings)


def test_an_untrained_network_says_zero():
    torch.manual_seed(0)
    model = unet.Model(unet.Config(channels=16), (1, 8, 8), 4)
    assert torch.equal(model(*inputs((1, 8, 8))), torch.zeros(3, 1, 8, 8))


def test_images_of_a_batch_do_not_see_each_other():
    model = build((1, 8, 8))
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.2)
    x, times, labels = inputs((1, 8, 8))
    alone = torch.cat([model(x[i : i + 1], times[i : i + 1], labels[i : i + 1]) for i in range(3)])
    torch.testing.assert_close(model(x, times, labels), alone, atol=1e-3, rtol=1e-3)


def test_attention_at_the_coarsest_grid_joins_places_that_convolutions_do_not():
    """One block on a long grid: without attention, what is far away cannot matter."""
    for has_attention in (True, False):
        model = build((1, 4, 64), channel_multipliers=(1,), num_blocks=1, has_attention=has_attention)
        for name, parameter in model.named_parameters():
            if "norm" not in name:
                nn.init.normal_(parameter, std=0.1)
        for norm in (layer for layer in model.modules() if isinstance(layer, nn.GroupNorm)):
            norm.forward = lambda x: x  # statistics over the grid join places, too
        x, times, labels = inputs((1, 4, 64), 1)
        changed = x.clone()
        changed[..., 0] += 1
        difference = (model(changed, times, labels) - model(x, times, labels))[..., -1].abs().max()
        assert (difference > 1e-6) == has_attention


def test_muon_may_move_the_kernels_inside_and_nothing_else():
    model = build((1, 8, 8))
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    moved = {names[id(parameter)] for parameter in model.hidden_matrices()}
    assert all(name.startswith(("down.", "middle.", "up.")) and name.endswith("weight") for name in moved)
    assert not any("norm" in name or "modulation" in name for name in moved)
    assert any("qkv" in name for name in moved) and any("conv1" in name for name in moved)
    assert all(parameter.ndim == 4 for parameter in model.hidden_matrices())


@pytest.mark.parametrize(
    ("settings", "millions"),
    [
        ({"channels": 128, "channel_multipliers": (1, 2, 2), "num_blocks": 3}, 35),
        ({"channels": 32, "patch_size": 2}, 1),
    ],
)
def test_sizes_are_those_that_are_told(settings, millions):
    with torch.device("meta"):
        model = unet.Model(parse(unet.Config, {"kind": "unet", **settings}), (3, 32, 32), 11)
    assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(millions, rel=0.1)

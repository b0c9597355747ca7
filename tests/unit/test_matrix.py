"""The matrix of systems at one budget: it trains as the stages do."""

import torch

from benchmarks.matrix import Views, fitted
from tessera.components import load, parse


def test_a_part_trains_on_views_in_memory_for_about_the_seconds_that_it_is_given(token_spec):
    config = {
        "kind": "autoregressive",
        "width": 16,
        "depth": 1,
        "heads": 2,
        "training": {"num_steps": 9, "batch_size": 4},
    }
    part = load("priors", "autoregressive")
    tokens = torch.randint(token_spec.codebook_size, (12, 3, *token_spec.index_grid))
    data = Views(tokens, torch.arange(12) % token_spec.num_classes)
    model, seconds = fitted(part, parse(part.Config, config), token_spec, data, seconds=1.0, seed=0)
    assert isinstance(model, part.Model) and not model.training
    assert 0.2 < seconds < 5  # by a pace that was measured, on a machine that may have other work

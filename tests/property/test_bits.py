"""Bits of images under priors of indices: equal to sums over all images, and bounded below by the entropy of the data."""

import itertools
import math

import pytest
import torch
from toy_distributions import GRIDS, draws, few_grids, spec

from tessera.bases.optimization import PriorTraining
from tessera.components import kinds, load
from tessera.priors import autoregressive, masked
from tessera.training.loop import fit

LABELS = torch.tensor([0, 1]).repeat_interleave(256)
EVERY = GRIDS.repeat(2, 1).view(-1, 2, 2)  # (512, 2, 2): each grid for each label


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def random_model(module, **settings):
    """Weights large enough that no two places and no two labels are alike."""
    torch.manual_seed(0)
    config = module.Config(width=32, depth=2, heads=2, training=PriorTraining(num_steps=1), **settings)
    model = module.Model(config, spec()).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model


def entropy_bits(truth: torch.Tensor) -> float:
    """Of the grid given the label, both labels equally often."""
    return float(-(truth * truth.log2()).sum(dim=1).mean())


def test_the_priors_of_indices_tell_bits_and_those_of_latents_do_not():
    telling = {kind for kind in kinds("priors") if hasattr(load("priors", kind).Model, "bits")}
    assert telling == {kind for kind in kinds("priors") if load("priors", kind).LEARNS == "indices"}


@pytest.mark.parametrize("settings", [{}, {"random_order_until": (0.5, 1.0)}, {"is_conditional": False}])
def test_probabilities_of_all_grids_sum_to_one(settings):
    bits = random_model(autoregressive, **settings).bits(EVERY, LABELS, seeded())
    assert bits.std() > 0.2  # not simply uniform
    for label in range(2):
        assert (2.0 ** -bits[label == LABELS].double()).sum() == pytest.approx(1, abs=1e-5)
    assert torch.equal(bits[:256], bits[256:]) == (settings == {"is_conditional": False})  # labels matter, or do not


def test_autoregressive_bits_are_those_of_drawing_one_index_after_the_other():
    """The probability of each index by the sampler's own path: a network call on what stands before it, nothing after."""
    model = random_model(autoregressive)
    rows = torch.arange(0, 512, 37)
    expected = torch.zeros(len(rows))
    with torch.no_grad():
        for place in range(4):
            shown = EVERY[rows].flatten(1).clone()
            truth = shown[:, place].clone()
            shown[:, place:] = 0  # neither the index nor what follows it
            probability = model(shown, LABELS[rows])[:, place].softmax(dim=1)
            expected -= probability[torch.arange(len(rows)), truth].log2()
    torch.testing.assert_close(model.bits(EVERY[rows], LABELS[rows], seeded()), expected, atol=1e-4, rtol=1e-5)


@torch.no_grad()
def bits_over_all_orders(model: masked.Model, grid: torch.Tensor, label: int) -> tuple[float, float]:
    """Brute force over the 24 orders: the mean of -log2 p(grid | order), and -log2 of the mean probability."""
    costs = []
    for order in itertools.permutations(range(4)):
        shown, cost = torch.full((1, 4), model.mask_index), 0.0
        for place in order:
            cost -= float(model(shown, torch.tensor([label]))[0, place].log_softmax(dim=0)[grid[place]]) / math.log(2)
            shown[0, place] = grid[place]
        costs.append(cost)
    return sum(costs) / 24, -math.log2(sum(2.0**-cost for cost in costs) / 24)


def test_the_masked_bound_is_the_mean_over_all_orders_and_not_below_the_bits_of_their_mixture():
    model = random_model(masked)
    for row in (3, 100, 300, 511):
        mean, mixture = bits_over_all_orders(model, EVERY[row].flatten(), int(LABELS[row]))
        many = model.bits(EVERY[row].expand(4000, 2, 2), LABELS[row].expand(4000), seeded())
        error = float(many.std()) / 4000**0.5
        assert float(many.mean()) == pytest.approx(mean, abs=5 * error + 1e-4)
        assert mean > mixture + 1e-3 > 0 and error < 0.02


def test_masked_bits_follow_from_the_generator_alone():
    model = random_model(masked)
    first, again, other = (model.bits(EVERY, LABELS, seeded(seed)) for seed in (0, 0, 1))
    assert torch.equal(first, again) and not torch.equal(first, other)


@pytest.mark.parametrize("module", [autoregressive, masked], ids=["autoregressive", "masked"])
def test_a_trained_prior_needs_hardly_more_bits_than_the_entropy_and_never_less(module, job):
    """Gibbs: the mean bits under the truth are the entropy and the divergence of the model from it, which is at least 0."""
    torch.manual_seed(0)
    truth = few_grids()
    rates = {"optimizer": "muon", "learning_rate": 1e-2, "muon_learning_rate": 1e-2, "weight_decay": 0.0}
    training = PriorTraining(num_steps=300, batch_size=256, ema_decay=0.99, final_learning_rate_fraction=0.0, **rates)
    settings = {"mask_schedule": "cosine", "label_smoothing": 0.0} if module is masked else {}
    config = module.Config(width=32, depth=2, heads=2, dropout=0.0, label_dropout=0.0, training=training, **settings)
    job.resumable()
    model = fit(module.Objective(module.Model(config, spec()), config), draws(truth), training, seed=0, job=job)
    repeats = 20 if module is masked else 1  # the bound is estimated
    bits = torch.stack([model.bits(EVERY, LABELS, seeded(seed)) for seed in range(repeats)]).mean(dim=0)
    mean = float((truth.flatten() * bits).sum()) / 2
    entropy = entropy_bits(truth)
    assert 2.0 < entropy < 2.3
    assert entropy <= mean < 1.1 * entropy

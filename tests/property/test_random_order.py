"""The autoregressive prior on random orders: what is told of places, the annealing, completion with some indices known."""

import itertools

import pytest
import torch
from torch import nn
from toy_distributions import GRIDS, draws, few_grids, spec, total_variation

from tessera.bases.optimization import PriorTraining
from tessera.contracts import TokenBatch
from tessera.nn.transformer import Transformer
from tessera.priors import autoregressive
from tessera.priors.autoregressive import Config, Model, Objective, Sampling, random_order_share
from tessera.training.loop import fit


def random_model(until=(1.0, 1.0), **settings) -> Model:
    torch.manual_seed(0)
    config = Config(
        width=32, depth=2, heads=2, random_order_until=until, training=PriorTraining(num_steps=10), **settings
    )
    model = Model(config, spec(codebook_size=9, shape=(3, 3, 2), num_classes=3)).eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    return model


def random_orders(batch: int) -> torch.Tensor:
    return torch.rand(batch, 6, generator=torch.Generator().manual_seed(4)).argsort(dim=1)


def test_the_share_of_random_orders_falls_from_one_to_nothing_between_two_points():
    shares = [random_order_share((0.2, 0.6), progress) for progress in (0.0, 0.2, 0.3, 0.4, 0.6, 1.0)]
    assert shares == pytest.approx([1, 1, 0.75, 0.5, 0, 0])
    assert random_order_share((1.0, 1.0), 0.999) == 1 and random_order_share((0.0, 0.0), 0.0) == 0
    assert random_order_share((0.5, 0.5), 0.499) == 1 and random_order_share((0.5, 0.5), 0.5) == 0


def test_an_annealing_that_ends_before_it_begins_is_refused():
    with pytest.raises(ValueError, match="begins at 0.6 and ends before, at 0.2"):
        random_model(until=(0.6, 0.2))


def test_the_objective_reads_the_share_of_the_step_in_random_orders():
    model = random_model(until=(0.2, 0.8))
    objective = Objective(model, model.config).train()
    indices = torch.zeros(4000, 6, dtype=torch.long)
    for step, expected in ((0, 1.0), (5, 0.5), (9, 0.0)):
        order = objective._orders(indices, step)
        assert torch.equal(order.sort(dim=1).values, torch.arange(6).expand(4000, 6))
        share = float((order != torch.arange(6)).any(dim=1).float().mean()) / (
            1 - 1 / 720
        )  # one in 720 is raster order
        assert share == pytest.approx(expected, abs=0.03)
    assert objective.eval()._orders(indices, 0) is None  # the loss of held-out images is that of sampling


def test_a_body_told_permuted_places_is_the_body_permuted():
    torch.manual_seed(0)
    net = Transformer(32, 2, 4, (3, 2), dropout=0.0, is_causal=False).eval()
    x, order = torch.randn(5, 6, 32), random_orders(5)
    everywhere = order.unsqueeze(2).expand(5, 6, 32)
    torch.testing.assert_close(
        net(x.gather(1, everywhere), places=order), net(x).gather(1, everywhere), atol=1e-5, rtol=1e-5
    )
    assert not torch.allclose(net(x.gather(1, everywhere)), net(x).gather(1, everywhere), atol=1e-2)


def test_raster_order_told_is_raster_order_untold():
    model, indices = random_model(), torch.randint(9, (4, 6))
    labels = torch.arange(4) % 3
    told = model(indices, labels, torch.arange(6).expand(4, 6))
    torch.testing.assert_close(told, model(indices, labels), atol=1e-5, rtol=1e-5)


def test_an_index_changes_no_logit_at_or_before_its_place_in_the_order():
    model, indices, order = random_model(), torch.randint(9, (3, 6)), random_orders(3)
    labels = torch.arange(3)
    with torch.no_grad():
        before = model(indices, labels, order)
        for number in range(6):
            changed = indices.clone()
            changed[:, number] = (changed[:, number] + 1) % 9
            difference = (model(changed, labels, order) - before).abs().amax(dim=2)
            assert (difference[:, : number + 1] == 0).all() and (difference[:, number + 1 :] > 0).all()


def test_the_place_of_what_is_predicted_and_of_what_is_read_are_both_told():
    """Two orders that differ in the place read last, or in the place predicted next, predict differently."""
    model, indices, label = random_model(), torch.randint(9, (1, 6)), torch.tensor([1])
    orders = torch.tensor([[0, 1, 2, 3, 4, 5], [0, 1, 2, 3, 5, 4], [1, 0, 2, 3, 4, 5]])
    with torch.no_grad():
        logits = model(indices.expand(3, 6), label.expand(3), orders)
    assert (logits[0, 4] - logits[1, 4]).abs().max() > 1e-2  # other target, same read
    assert (logits[0, 2] - logits[2, 2]).abs().max() > 1e-2  # same target; what was read stands elsewhere
    with torch.no_grad():
        model.read_position.zero_()
        blind = model(indices.expand(3, 6), label.expand(3), orders)
    assert (blind[0, 4] - blind[1, 4]).abs().max() > 1e-2


def test_without_random_orders_nothing_is_added_and_nothing_is_drawn():
    model = random_model(until=(0.0, 0.0))
    assert model.read_position is None and "read_position" not in model.state_dict()
    objective, state = Objective(model, model.config).train(), torch.get_rng_state()
    assert objective._orders(torch.zeros(2, 6, dtype=torch.long), 0) is None
    assert torch.equal(torch.get_rng_state(), state)


@torch.no_grad()
def complete_without_cache(model, indices, is_known, labels, sampling, generator):
    """The whole sequence anew for each index; the known first where orders were random."""
    indices, is_known = indices.flatten(1).clone(), is_known.flatten(1)
    orders = []
    for row in is_known.tolist():
        known = [place for place in range(6) if row[place]] if model.config.has_random_orders else []
        orders.append(known + [place for place in range(6) if place not in known])
    order = torch.tensor(orders)
    for number in range(6):
        asked = order if model.config.has_random_orders else None
        sequence = indices.gather(1, order)
        logits = model(sequence, labels, asked)[:, number].float()
        if sampling.guidance_scale != 1.0:
            unconditional = model(sequence, torch.full_like(labels, model.null_label), asked)[:, number].float()
            cosine = torch.cos(torch.tensor(torch.pi * (number / 6) ** 2.0, dtype=torch.float64))
            share = 1.0 if sampling.guidance_ramp == "constant" else float((1 - cosine) / 2)
            scale = 1 + (sampling.guidance_scale - 1) * share
            logits = unconditional + scale * (logits - unconditional)
        drawn = autoregressive.draw(logits, sampling, generator)
        for row in range(len(labels)):
            if not is_known[row, order[row, number]]:
                indices[row, order[row, number]] = drawn[row]
    return indices.view(-1, 3, 2)


@pytest.mark.parametrize("until", [(0.0, 0.0), (1.0, 1.0)])
@pytest.mark.parametrize("settings", [{}, {"guidance_scale": 2.5}, {"guidance_scale": 2.5, "guidance_ramp": 2.0}])
def test_completing_with_the_cache_equals_completing_without_and_keeps_what_is_known(until, settings):
    model, sampling = random_model(until), Sampling(**settings)
    labels = torch.arange(60) % 3
    given = torch.randint(9, (60, 3, 2))
    is_known = torch.rand(60, 3, 2) < torch.linspace(0, 1, 60).view(-1, 1, 1)
    is_known[0], is_known[-1] = False, True
    slow = complete_without_cache(model, given, is_known, labels, sampling, torch.Generator().manual_seed(7))
    fast = model.complete(given, is_known, labels, sampling, torch.Generator().manual_seed(7))
    assert torch.equal(fast, slow)
    assert torch.equal(fast[is_known], given[is_known])
    nothing = model.complete(given, is_known & False, labels, sampling, torch.Generator().manual_seed(7))
    assert torch.equal(nothing, model.sample(labels, sampling, torch.Generator().manual_seed(7)))


@torch.no_grad()
def distribution(model: Model, label: int, order: list[int]) -> torch.Tensor:
    """(256,): the probability of each grid, its places taken in the order given."""
    orders = torch.tensor(order).expand(256, 4)
    sequence = GRIDS.gather(1, orders)
    log_probability = model(sequence, torch.full((256,), label), orders).log_softmax(dim=2)
    return log_probability.gather(2, sequence.unsqueeze(2)).sum(dim=(1, 2)).exp()


def trained(until, steps, job) -> Model:
    torch.manual_seed(0)
    rates = {"optimizer": "muon", "learning_rate": 1e-2, "muon_learning_rate": 1e-2, "weight_decay": 0.0}
    training = PriorTraining(num_steps=steps, batch_size=256, ema_decay=0.99, **rates)
    config = Config(width=32, depth=2, heads=2, dropout=0.0, random_order_until=until, training=training)
    job.resumable()
    return fit(Objective(Model(config, spec()), config), draws(few_grids()), training, seed=0, job=job)


def test_raster_order_after_the_annealing_gives_a_known_distribution(job):
    model, truth = trained((0.2, 0.6), 250, job), few_grids()
    for label in range(2):
        found = distribution(model, label, [0, 1, 2, 3])
        assert found.sum() == pytest.approx(1, abs=1e-3)
        assert total_variation(found, truth[label]) < 0.05


def test_random_orders_to_the_end_give_the_distribution_of_every_order_and_its_completions(job):
    """Given the last two places of the likeliest grid, the first two are drawn as the truth has them."""
    model, truth = trained((1.0, 1.0), 250, job), few_grids()
    for order in itertools.islice(itertools.permutations(range(4)), 0, 24, 5):
        assert total_variation(distribution(model, 1, list(order)), truth[1]) < 0.1
    last = int(GRIDS[truth[1].argmax()] @ torch.tensor([0, 0, 4, 1]))  # of a grid that is likely
    given = torch.tensor([[0, 0], [last // 4, last % 4]])
    is_known = torch.tensor([[False, False], [True, True]])
    expected = truth[1].view(4, 4, 4, 4)[:, :, last // 4, last % 4].flatten()
    count = 20_000
    grids, labels = (count, 2, 2), torch.ones(count, dtype=torch.long)
    generator = torch.Generator().manual_seed(0)
    found = model.complete(given.expand(grids), is_known.expand(grids), labels, Sampling(), generator)
    shares = torch.bincount(found[:, 0, 0] * 4 + found[:, 0, 1], minlength=16) / count
    assert total_variation(shares, expected / expected.sum()) < 0.05


def test_the_losses_of_raster_order_are_those_from_before_random_orders_were_there(job):
    """Fixed seed, three steps; the figures are of the commit before."""
    torch.manual_seed(0)
    training = PriorTraining(num_steps=3, batch_size=8, learning_rate=0.01)
    config = Config(width=16, depth=2, heads=2, training=training)
    model = Model(config, spec(codebook_size=9, shape=(3, 3, 2), num_classes=3))
    rows = TokenBatch(torch.arange(96).view(16, 3, 2) % 9, torch.arange(16) % 3)

    class Data:
        def __len__(self):
            return 16

        def stored(self, chosen, generator=None):
            return TokenBatch(rows.tokens[chosen], rows.labels[chosen])

        def batch_of(self, stored):
            return stored

    job.resumable()
    fit(Objective(model, config), Data(), training, seed=0, job=job)
    lines = (job.state / "history.csv").read_text().splitlines()
    assert [float(line.split(",")[1]) for line in lines[1:]] == pytest.approx([2.209002, 2.183949, 2.139586], abs=2e-5)

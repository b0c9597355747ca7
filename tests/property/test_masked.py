"""The masked prior: what it learns, which places it fills when, and what it keeps."""

import itertools

import pytest
import torch
from torch import nn
from toy_distributions import GRIDS, draws, few_grids, spec, total_variation

from tessera.bases.conditional import ramped
from tessera.bases.optimization import PriorTraining
from tessera.contracts import TokenBatch
from tessera.priors import masked
from tessera.priors.masked import Config, Model, Objective, Sampling, first, halton_order, mask_ratio, placed_per_step
from tessera.training.loop import fit


def random_model(**settings) -> Model:
    """Weights large enough that every prediction differs."""
    torch.manual_seed(0)
    config = Config(width=32, depth=2, heads=2, training=PriorTraining(num_steps=1), **settings)
    model = Model(config, spec(codebook_size=9, shape=(3, 3, 2), num_classes=3)).eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    return model


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@torch.no_grad()
def distribution_of_random_order(model: Model, label: int) -> torch.Tensor:
    """(256,): what filling one place after the other in random order draws, by summing over all orders and all draws.

    Each place of a state is a code or the mask, 4; states are visited by their number of masks.
    """
    states = torch.tensor(list(itertools.product(range(5), repeat=4)))  # (625, 4), state s at row sum of s_i 5^(3-i)
    probability = model(states, torch.full((625,), label)).softmax(dim=2)
    place_value = torch.tensor([125, 25, 5, 1])
    reached = torch.zeros(625)
    reached[-1] = 1
    for num_masked in (4, 3, 2, 1):
        for state in torch.nonzero((states == 4).sum(dim=1) == num_masked).flatten().tolist():
            for place in torch.nonzero(states[state] == 4).flatten().tolist():
                for code in range(4):
                    after = state + (code - 4) * int(place_value[place])
                    reached[after] += reached[state] / num_masked * probability[state, place, code]
    return reached[(GRIDS * place_value).sum(dim=1)]


def test_the_masked_prior_learns_a_known_distribution_and_its_sampler_draws_from_what_it_learnt(job):
    torch.manual_seed(0)
    truth = few_grids()
    rates = {"optimizer": "muon", "learning_rate": 1e-2, "muon_learning_rate": 1e-2, "weight_decay": 0.0}
    training = PriorTraining(num_steps=300, batch_size=256, ema_decay=0.99, final_learning_rate_fraction=0.0, **rates)
    settings = {"mask_schedule": "cosine", "dropout": 0.0, "label_smoothing": 0.0, "label_dropout": 0.0}
    config = Config(width=32, depth=2, heads=2, training=training, **settings)
    job.resumable()
    model = fit(Objective(Model(config, spec()), config), draws(truth), training, seed=0, job=job)
    labels = torch.arange(20_000) % 2
    drawn = model.sample(labels, Sampling(order="random", decoding_steps=4), seeded()).flatten(1)
    for label in range(2):
        learnt = distribution_of_random_order(model, label)
        assert learnt.sum() == pytest.approx(1, abs=1e-4)
        assert total_variation(learnt, truth[label]) < 0.05
        counts = torch.bincount((drawn[labels == label] * torch.tensor([64, 16, 4, 1])).sum(dim=1), minlength=256)
        assert total_variation(counts / counts.sum(), learnt) < 0.05


@pytest.mark.parametrize("schedule", ["arccos", "cosine"])
def test_the_schedule_falls_from_all_masked_to_none(schedule):
    ratio = mask_ratio(schedule, torch.linspace(0, 1, 101, dtype=torch.float64))
    assert ratio[0] == pytest.approx(1, abs=1e-12) and ratio[-1] == pytest.approx(0, abs=1e-12)
    assert (ratio.diff() < 0).all()
    assert ratio[50] == pytest.approx({"arccos": 2 / 3, "cosine": 0.5**0.5}[schedule])


@pytest.mark.parametrize("schedule", ["arccos", "cosine"])
def test_every_step_places_at_least_one_index_and_all_of_them_place_all(schedule):
    for num_places, steps in itertools.product((1, 2, 6, 16, 49, 256), (1, 2, 3, 8, 15, 16, 300)):
        placed = placed_per_step(num_places, steps, schedule)
        assert sum(placed) == num_places and min(placed) >= 1 and len(placed) == min(steps, num_places)
    assert placed_per_step(16, 8, "cosine")[0] == 1 and placed_per_step(0, 8, schedule) == ()


@pytest.mark.parametrize("order", ["confidence", "halton", "random"])
@pytest.mark.parametrize("decoding_steps", [1, 4, 50])
def test_the_sampler_places_as_many_indices_per_step_as_its_plan_says(order, decoding_steps):
    model, seen = random_model(), []
    asked = model.forward
    model.forward = lambda indices, labels: seen.append(indices) or asked(indices, labels)
    last = model.sample(torch.tensor([0, 1, 2]), Sampling(order=order, decoding_steps=decoding_steps), seeded())
    masks = [(indices == model.mask_index).sum(dim=1).tolist() for indices in [*seen, last.flatten(1)]]
    left = [6 - sum(placed_per_step(6, decoding_steps, "arccos")[:step]) for step in range(len(masks))]
    assert masks == [[number] * 3 for number in left] and left[-1] == 0
    for before, after in itertools.pairwise([*seen, last.flatten(1)]):
        is_kept = before != model.mask_index
        assert torch.equal(before[is_kept], after[is_kept])  # what is placed is never placed again


@pytest.mark.parametrize("grid", [(1, 1), (1, 7), (5, 3), (16, 16)])
def test_the_halton_order_is_a_permutation(grid):
    assert halton_order(*grid).sort().values.tolist() == list(range(grid[0] * grid[1]))


def test_the_halton_order_begins_as_the_sequence_is_written_in_books():
    """Base 2: 1/2, 1/4, 3/4, 1/8; base 3: 1/3, 2/3, 1/9, 4/9."""
    assert halton_order(8, 9)[:4].tolist() == [4 * 9 + 3, 2 * 9 + 6, 6 * 9 + 1, 1 * 9 + 4]


def test_the_first_places_of_the_halton_order_lie_more_evenly_than_random_ones():
    """The discrepancy: how far the share of the places in a corner box is from the box's share of the grid, at most."""
    rows, columns = torch.arange(256) // 16, torch.arange(256) % 16

    def discrepancy(order, number):
        row, column = rows[order[:number]], columns[order[:number]]
        sides = torch.arange(1, 17).view(-1, 1)
        shares = ((row < sides).float() @ (column < sides).float().T) / number  # (16, 16): of each box
        return float((shares - sides * sides.T / 256).abs().max())

    for number in (8, 16, 32, 64, 128):
        random = [discrepancy(torch.randperm(256, generator=seeded(seed)), number) for seed in range(50)]
        assert discrepancy(halton_order(16, 16), number) < min(random)


def test_without_noise_the_confident_places_are_filled_first():
    """By brute force: the drawn indices are those of the seed, and the likeliest of them stay."""
    model, sampling = random_model(), Sampling(choice_temperature=0.0, decoding_steps=3)
    labels, placed = torch.arange(20) % 3, placed_per_step(6, 3, "arccos")
    seen, asked = [], model.forward
    model.forward = lambda indices, labels: seen.append(indices) or asked(indices, labels)
    model.sample(labels, sampling, seeded())
    with torch.no_grad():
        logits = asked(seen[0], labels)
    drawn = (logits + masked.gumbel_noise(logits, seeded())).argmax(dim=2)
    for row in range(20):
        chance = [float(logits[row, place].softmax(dim=0)[drawn[row, place]]) for place in range(6)]
        expected = sorted(range(6), key=lambda place: -chance[place])[: placed[0]]
        assert set(torch.nonzero(seen[1][row] != 9).flatten().tolist()) == set(expected)
        assert all(seen[1][row, place] == drawn[row, place] for place in expected)


def test_noise_on_the_confidence_changes_which_places_come_first():
    model, labels = random_model(), torch.arange(40) % 3
    drawn = [
        model.sample(labels, Sampling(choice_temperature=heat, decoding_steps=4), seeded()) for heat in (0.0, 5.0, 5.0)
    ]
    assert not torch.equal(drawn[0], drawn[1]) and torch.equal(drawn[1], drawn[2])


def test_the_largest_open_places_are_chosen():
    precedence = torch.tensor([[0.3, 0.9, 0.5, 0.7], [4.0, 3.0, 2.0, 1.0]])
    is_open = torch.tensor([[True, False, True, True], [True, True, True, True]])
    chosen = first(precedence, is_open, torch.tensor([2, 0]))
    assert chosen.tolist() == [[False, False, True, True], [False] * 4]


@pytest.mark.parametrize("order", ["confidence", "halton", "random"])
@pytest.mark.parametrize("guidance_scale", [1.0, 2.0])
def test_completing_keeps_what_is_known_and_nothing_known_is_sampling(order, guidance_scale):
    model = random_model()
    sampling = Sampling(order=order, decoding_steps=3, guidance_scale=guidance_scale)
    given = torch.randint(9, (40, 3, 2), generator=seeded())
    is_known = torch.rand(40, 3, 2, generator=seeded(1)) < torch.linspace(0, 1, 40).view(-1, 1, 1)
    is_known[0], is_known[-1] = False, True  # one with nothing known, one with everything
    labels = torch.arange(40) % 3
    found = model.complete(torch.where(is_known, given, 7), is_known, labels, sampling, seeded(2))
    assert found.shape == (40, 3, 2) and found.max() < 9
    assert torch.equal(found[is_known], given[is_known])
    hidden = model.complete(torch.where(is_known, given, 0), is_known, labels, sampling, seeded(2))
    assert torch.equal(found, hidden)  # what stands where nothing is known does not matter
    nothing = torch.zeros_like(is_known)
    sampled = model.sample(labels, sampling, seeded(2))
    assert torch.equal(model.complete(given, nothing, labels, sampling, seeded(2)), sampled)


def test_the_last_place_is_drawn_from_the_network_given_all_others():
    model = random_model()
    given = torch.randint(9, (1, 3, 2), generator=seeded())
    is_known = torch.ones(1, 3, 2, dtype=torch.bool)
    is_known[0, 1, 0] = False
    count, label = 20_000, torch.tensor([1])
    asked = torch.where(is_known, given, model.mask_index).flatten(1)
    with torch.no_grad():
        expected = model(asked, label)[0, 2].softmax(dim=0)
    found = model.complete(
        given.expand(count, 3, 2), is_known.expand(count, 3, 2), label.expand(count), Sampling(), seeded()
    )
    shares = torch.bincount(found[:, 1, 0], minlength=9) / count
    assert total_variation(shares, expected) < 0.02


@pytest.mark.parametrize("ramp", [0.5, 1.0, 2.75])
def test_the_ramp_rises_from_one_to_the_scale(ramp):
    scales = [ramped(4.0, ramp, step / 50) for step in range(51)]
    assert scales[0] == 1 and scales[-1] == pytest.approx(4)
    assert all(a < b for a, b in itertools.pairwise(scales))
    assert ramped(4.0, ramp, 0.5 ** (1 / ramp)) == pytest.approx(2.5)  # half of the cosine where t^p is a half
    assert ramped(4.0, "constant", 0.0) == ramped(4.0, "constant", 1.0) == 4


def test_guidance_of_one_takes_no_second_pass_and_a_ramp_none_in_its_first_step():
    model, sizes = random_model(), []
    asked = model.forward
    model.forward = lambda indices, labels: sizes.append(len(labels)) or asked(indices, labels)
    for settings in ({}, {"guidance_scale": 3.0}, {"guidance_scale": 3.0, "guidance_ramp": 2.0}):
        model.sample(torch.tensor([0, 1]), Sampling(decoding_steps=3, **settings), seeded())
    assert sizes == [2, 2, 2, 4, 4, 4, 2, 4, 4]


def objective_with(logits, **settings) -> Objective:
    model = random_model(**settings)
    model.forward = lambda indices, labels: logits
    return Objective(model, model.config)


def test_the_loss_is_of_the_masked_places_alone():
    batch = TokenBatch(torch.randint(9, (5, 3, 2)), torch.arange(5) % 3)
    logits = torch.randn(5, 6, 9, requires_grad=True)
    objective = objective_with(logits)
    torch.manual_seed(3)
    is_masked = objective._masks(batch.tokens.flatten(1))
    assert 0 < is_masked.sum() < 30 and is_masked.any(dim=1).all()

    def loss(logits):
        torch.manual_seed(3)  # hidden labels are drawn first
        objective.model.forward = lambda indices, labels: logits
        objective.eval()
        return objective(batch, "prior", 0)["loss"]

    plain = loss(logits)
    plain.backward()
    assert torch.equal(logits.grad.abs().sum(dim=2) > 0, is_masked)
    changed = torch.where(is_masked.unsqueeze(2), logits, torch.randn(5, 6, 9))
    assert loss(changed) == plain


def test_what_is_masked_is_hidden_from_the_network_and_what_is_not_is_shown():
    model, seen = random_model(), []
    model.forward = lambda indices, labels: seen.append(indices) or torch.randn(64, 6, 9)
    batch = TokenBatch(torch.randint(9, (64, 3, 2)), torch.zeros(64, dtype=torch.long))
    Objective(model, model.config)(batch, "prior", 0)
    is_masked = seen[0] == model.mask_index
    assert torch.equal(seen[0][~is_masked], batch.tokens.flatten(1)[~is_masked])
    assert set(is_masked.sum(dim=1).tolist()) == {1, 2, 3, 4, 5, 6}


def test_label_smoothing_spreads_probability_in_training_and_not_in_evaluation():
    """(1 - e) times the loss of the truth + e times the mean loss over all indices."""
    batch = TokenBatch(torch.randint(9, (200, 3, 2)), torch.zeros(200, dtype=torch.long))
    logits = torch.randn(1, 1, 9).expand(200, 6, 9)
    minus_log = -logits[0, 0].log_softmax(dim=0)
    found = {}
    for is_training, smoothing in ((True, 0.0), (True, 0.3), (False, 0.3)):
        torch.manual_seed(0)
        objective = objective_with(logits, label_smoothing=smoothing, label_dropout=0.0).train(is_training)
        torch.manual_seed(1)
        found[is_training, smoothing] = float(objective(batch, "prior", 0)["loss"])
    assert found[False, 0.3] == found[True, 0.0]
    expected = 0.7 * found[True, 0.0] + 0.3 * float(minus_log.mean())
    assert found[True, 0.3] == pytest.approx(expected, rel=1e-5)

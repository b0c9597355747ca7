"""The bitwise prior: digits in mixed radix, a loss that bounds -log p, and draws from what its head says of the digits."""

import itertools
import math

import pytest
import torch
from toy_distributions import GRIDS, draws, few_grids, spec, total_variation

from tessera.bases.autoguidance import as_guidance
from tessera.bases.optimization import PriorTraining
from tessera.components import parse
from tessera.nn.digits import Radix, prime_factors
from tessera.priors import bitwise
from tessera.quantizers import fsq, lfq
from tessera.training.loop import fit

SIZES = {"width": 32, "depth": 2, "heads": 2}
DIGITS = (3, 2, 2)  # of the twelve codes of a place
PLACE = spec(codebook_size=12, shape=(2, 1, 1))


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def random_model(token_spec=PLACE, std: float = 0.5, **settings) -> bitwise.Model:
    """Weights so large that no two digits are independent."""
    torch.manual_seed(0)
    config = bitwise.Config(**SIZES, training=PriorTraining(num_steps=1), **settings)
    model = bitwise.Model(config, token_spec).eval().requires_grad_(False)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=std)
    return model


def orders_of(model: bitwise.Model, label: int) -> torch.Tensor:
    """(6, 12) the probability of each code of the one place by each order of its digits, a digit after the other."""
    codes = torch.arange(12).view(12, 1)
    digits, labels = model.radix.digits(codes), torch.full((12,), label)
    found = []
    for order in itertools.permutations(range(3)):
        is_hidden, probs = torch.ones(12, 1, 3, dtype=torch.bool), torch.ones(12)
        for digit in order:
            parts = model(codes, labels, is_hidden).split(DIGITS, dim=2)
            probs = probs * parts[digit].softmax(dim=2)[torch.arange(12), 0, digits[:, 0, digit]]
            is_hidden[:, :, digit] = False
        found.append(probs)
    return torch.stack(found)


@pytest.mark.parametrize(
    ("quantizer", "sizes"),
    [(fsq.Quantizer(fsq.Config(levels=(8, 5, 3))), (8, 5, 3)), (lfq.Quantizer(lfq.Config(code_dim=6)), (2,) * 6)],
    ids=["fsq", "lfq"],
)
def test_digits_are_the_channels_of_quantizers_without_a_table(quantizer, sizes):
    """Each digit of a code decides one channel, and rises with it."""
    every = torch.arange(math.prod(sizes))
    radix = Radix(sizes)
    digits, codes = radix.digits(every), quantizer.indices_to_codes(every.view(1, 1, -1))[0, :, 0].T  # (K, J) both
    assert torch.equal(radix.numbers(digits), every)
    for place in range(len(sizes)):
        of_digit = [codes[digits[:, place] == value, place].unique() for value in range(sizes[place])]
        assert all(len(one) == 1 for one in of_digit) and torch.equal(torch.cat(of_digit), codes[:, place].unique())


def test_left_out_digits_are_prime_factors_and_others_have_to_fit():
    for number in range(1, 400):
        found = prime_factors(number)
        assert math.prod(found) == number and list(found) == sorted(found)
        assert number == 1 or all(factor > 1 and all(factor % less for less in range(2, factor)) for factor in found)
    assert prime_factors(2**31 - 1) == (2**31 - 1,)
    assert random_model().head.sizes == (2, 2, 3) and random_model(digits=(4, 3)).head.sizes == (4, 3)
    with pytest.raises(
        ValueError, match=r"digits \[5, 3\] tell 15 codes apart, and the codebook has 12: .* \[2, 2, 3\]"
    ):
        random_model(digits=(5, 3))


def test_a_million_codes_cost_twenty_bits():
    """Nowhere a table of them: 2**20 codes have twice the digits of 2**10, and twice their rows."""
    settings = {"kind": "bitwise", "width": 16, "depth": 1, "heads": 2, "training": {"num_steps": 1}}
    config = parse(bitwise.Config, settings)
    few, many = (
        {name: each.numel() for name, each in bitwise.Model(config, spec(codebook_size=2**bits)).named_parameters()}
        for bits in (10, 20)
    )
    grown = {name: (few[name], many[name]) for name in few if few[name] != many[name]}
    rows = {"digit_embedding.table.weight": 16 * 2, "head.embedding.table.weight": 16 * 3, "head.out.weight": 16 * 2}
    rows["head.out.bias"] = 2
    assert grown == {name: (10 * each, 20 * each) for name, each in rows.items()}


def test_places_see_indices_before_them_and_digits_that_are_shown():
    model = random_model(spec(codebook_size=12, shape=(2, 2, 2)), digits=DIGITS)
    indices, labels = torch.randint(12, (5, 4), generator=seeded()), torch.zeros(5, dtype=torch.long)
    is_hidden = torch.ones(5, 4, 3, dtype=torch.bool)
    is_hidden[:, :, 0] = False  # which is the index modulo 3
    before = model(indices, labels, is_hidden)
    assert before.shape == (5, 4, 7)
    shown, hidden = (model(indices * 0, labels, one) for one in (is_hidden, torch.ones_like(is_hidden)))
    assert not torch.allclose(shown, hidden, atol=1e-3)  # a 0 that is shown says more than one that is hidden
    for change, begin in (
        (3, 2),
        (1, 1),
    ):  # to another hidden digit: later places see it; to the one that is shown: this too
        other = indices.clone()
        other[:, 1] = (other[:, 1] + change) % 12
        differs = (model(other, labels, is_hidden) - before).abs().amax(dim=2) > 1e-4
        assert not differs[:, :begin].any() and differs[:, begin:].all()


def test_the_loss_is_the_mean_over_orders_which_bounds_the_bits_of_their_mixture():
    """Brute force over the six orders of three digits; both labels, for which the model is another one."""
    model = random_model(digits=DIGITS, dropout=0.0)
    objective = bitwise.Objective(model, model.config).eval()
    for label, code in ((0, 3), (1, 11)):
        of_orders = orders_of(model, label)[:, code]
        mean, mixture = float(-of_orders.log().mean()), -math.log(float(of_orders.mean()))
        tokens, labels = torch.full((10_000, 1, 1), code), torch.full((10_000,), label)
        torch.manual_seed(1)
        losses = torch.stack([objective.loss(tokens, labels, 0)["loss"] for _ in range(20)])
        error = float(losses.std()) / 20**0.5
        bits = model.bits(tokens, labels, seeded()) * math.log(2)
        assert mean > mixture + 0.02
        assert float(losses.mean()) == pytest.approx(mean, abs=4 * error) and error < 0.02
        assert float(bits.mean()) == pytest.approx(mean, abs=4 * float(bits.std()) / 100)
    rising = orders_of(model, 1)[0]  # the least significant digit first
    found = model.log_probs(torch.arange(12).view(12, 1, 1), torch.ones(12, dtype=torch.long)).exp()
    torch.testing.assert_close(found.flatten(), rising, atol=1e-6, rtol=1e-5)
    assert float(rising.sum()) == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize("head_steps", [3, 100])
def test_with_a_step_for_each_digit_draws_are_the_mixture_over_orders(head_steps):
    """Chi-square: 11 degrees of freedom have 31.3 in one of 1,000 draws. The digits are far from independent."""
    model = random_model(digits=DIGITS)
    expected = orders_of(model, 1).mean(dim=0)
    by_digit = model.radix.digits(torch.arange(12))
    alone = [torch.zeros(size).index_add(0, by_digit[:, j], expected) for j, size in enumerate(DIGITS)]
    independent = torch.stack([one[by_digit[:, j]] for j, one in enumerate(alone)]).prod(dim=0)
    assert total_variation(expected, independent) > 0.05

    def chi_square(steps: int) -> float:
        labels = torch.ones(100_000, dtype=torch.long)
        drawn = model.sample(labels, bitwise.Sampling(head_steps=steps), seeded())
        counts = torch.bincount(drawn.flatten(), minlength=12)
        return float(((counts - 100_000 * expected).square() / (100_000 * expected)).sum())

    assert chi_square(head_steps) < 31.3 < 100 < chi_square(1)  # all at once are drawn as if they were independent


@torch.no_grad()
def drawn_without_cache(model, given, is_known, labels, sampling, generator) -> torch.Tensor:
    """The whole sequences anew for each step of the head; guidance by the formulas, the least certain digits last."""
    indices, null = given.flatten(1).clone(), torch.full_like(labels, model.null_label)
    for place in range(indices.shape[1]):
        digits = torch.zeros(len(labels), 3, dtype=torch.long)
        is_hidden = torch.ones(len(labels), 3, dtype=torch.bool)
        torch.rand(digits.shape, generator=generator)  # a random order, which confidence has no use for
        scale = sampling.scale_at(place / indices.shape[1])
        of_guide = as_guidance(sampling).scale_at(place / indices.shape[1])
        for step, count in enumerate((1, 2)):
            shown, mask = indices.clone(), torch.ones(*indices.shape, 3, dtype=torch.bool)
            shown[:, place], mask[:, place] = model.radix.numbers(digits), is_hidden
            good, blind, bad = (
                each(shown, told, mask)[:, place]
                for each, told in ((model, labels), (model, null), (model.guide, labels))
            )
            logits = blind + scale * (good - blind) + (of_guide - 1) * (good - bad)
            logits = model.head.by_digit(logits / sampling.temperature)
            drawn = (logits - (-torch.rand(logits.shape, generator=generator).log()).log()).argmax(dim=2)
            certain = logits.log_softmax(dim=2).gather(2, drawn.unsqueeze(2)).squeeze(2)
            noise = -(-torch.rand(certain.shape, generator=generator).log()).log()
            certain = certain + sampling.choice_temperature * (1 - (step + 1) / 2) * noise
            for row in range(len(labels)):
                for digit in certain[row].masked_fill(~is_hidden[row], -torch.inf).topk(count).indices:
                    digits[row, digit], is_hidden[row, digit] = drawn[row, digit], False
        indices[:, place] = torch.where(is_known.flatten(1)[:, place], indices[:, place], model.radix.numbers(digits))
    return indices.view(given.shape)


@pytest.mark.parametrize("digits", [DIGITS, (2, 3, 2)])
def test_a_prior_and_its_guide_draw_with_caches_as_without(digits):
    token_spec = spec(codebook_size=12, shape=(2, 2, 2))
    model = random_model(token_spec, std=0.3, digits=digits)
    model.guide = random_model(token_spec, std=0.4, digits=digits)
    labels = torch.arange(40) % 2
    given, is_known = torch.randint(12, (40, 2, 2)), torch.rand(40, 2, 2) < 0.3
    scales = {"guidance_scale": 2.5, "autoguidance_scale": 1.8, "guidance_ramp": 0.5, "temperature": 0.8}
    sampling = bitwise.Sampling(head_steps=2, order="confidence", **scales)
    fast, slow = (
        draw(given, is_known, labels, sampling, seeded())
        for draw in (model.complete, lambda *told: drawn_without_cache(model, *told))
    )
    assert torch.equal(fast, slow) and torch.equal(fast[is_known], given[is_known])


def test_one_digit_is_the_loss_of_the_autoregressive_prior():
    """Nothing is left to bound: cross-entropy of the index, and exact bits."""
    model = random_model(spec(codebook_size=5), digits=(5,))
    objective, tokens = bitwise.Objective(model, model.config).eval(), torch.randint(5, (30, 2, 2), generator=seeded())
    labels = torch.arange(30) % 2
    expected = torch.nn.functional.cross_entropy(model(tokens.flatten(1), labels).flatten(0, 1), tokens.flatten())
    found = objective.loss(tokens, labels, 0)["loss"]
    torch.testing.assert_close(found, expected)
    assert float(model.bits(tokens, labels, seeded()).mean()) == pytest.approx(4 * float(found) / math.log(2), rel=1e-4)


def test_it_learns_a_known_distribution_and_its_bits_are_hardly_more_than_the_entropy(job):
    """Gibbs: the mean bits under the truth are the entropy and the divergence of the model from it, which is at least 0."""
    truth = few_grids()
    rates = {"optimizer": "muon", "learning_rate": 1e-2, "muon_learning_rate": 1e-2, "weight_decay": 0.0}
    training = PriorTraining(num_steps=300, batch_size=256, ema_decay=0.99, final_learning_rate_fraction=0.0, **rates)
    config = bitwise.Config(**SIZES, dropout=0.0, label_dropout=0.0, training=training)
    torch.manual_seed(0)
    job.resumable()
    model = fit(
        bitwise.Objective(bitwise.Model(config, spec()), config), draws(truth), training, seed=0, job=job
    ).eval()
    assert model.head.sizes == (2, 2)
    labels = torch.tensor([0, 1]).repeat_interleave(256)
    bits = model.bits(GRIDS.repeat(2, 1).view(-1, 2, 2), labels, seeded())
    mean, entropy = float((truth.flatten() * bits).sum()) / 2, float(-(truth * truth.log2()).sum(dim=1).mean())
    assert entropy <= mean < 1.1 * entropy
    drawn = model.sample(torch.ones(20_000, dtype=torch.long), bitwise.Sampling(), seeded()).flatten(1)
    shares = torch.bincount((drawn * torch.tensor([64, 16, 4, 1])).sum(dim=1), minlength=256) / 20_000
    assert total_variation(shares, truth[1]) < 0.08

"""The priors: sampling draws from what the network says; known distributions are learnt."""

import itertools

import pytest
import torch
from torch import nn
from toy_distributions import GRIDS, Rows, draws, known_distribution, spec, total_variation

from tessera.bases.optimization import PriorTraining
from tessera.contracts import TokenBatch
from tessera.denoisers.transformer import Config as transformer
from tessera.priors import autoregressive, flow_matching
from tessera.training.loop import fit


def random_model(**settings) -> autoregressive.Model:
    torch.manual_seed(0)
    training = PriorTraining(num_steps=1)
    config = autoregressive.Config(width=32, depth=2, heads=2, training=training, **settings)
    model = autoregressive.Model(config, spec(codebook_size=9, shape=(3, 3, 2), num_classes=3)).eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    return model


def sample_without_cache(model, labels, sampling, generator):
    """The whole sequence anew for each index: slow, and with no cache to be wrong about."""
    batch, length = len(labels), 6
    indices = torch.zeros(batch, length, dtype=torch.long)
    for place in range(length):
        logits = model(indices, labels)[:, place]
        if sampling.guidance_scale != 1.0:
            unconditional = model(indices, torch.full_like(labels, model.null_label))[:, place]
            logits = unconditional + sampling.guidance_scale * (logits - unconditional)
        indices[:, place] = autoregressive.draw(logits.float(), sampling, generator)
    return indices.view(batch, 3, 2)


@pytest.mark.parametrize("settings", [{}, {"guidance_scale": 2.5}, {"temperature": 0.5, "top_k": 3}, {"top_p": 0.7}])
def test_sampling_with_the_cache_equals_sampling_without(settings):
    model, sampling = random_model(), autoregressive.Sampling(**settings)
    labels = torch.arange(60) % 3
    with torch.no_grad():
        slow = sample_without_cache(model, labels, sampling, torch.Generator().manual_seed(7))
    fast = model.sample(labels, sampling, torch.Generator().manual_seed(7))
    assert torch.equal(fast, slow)


def test_changing_an_index_changes_no_logit_at_or_before_its_place():
    model = random_model()
    indices, labels = torch.randint(9, (1, 6)), torch.tensor([1])
    with torch.no_grad():
        before = model(indices, labels)
        for place in range(6):
            changed = indices.clone()
            changed[0, place] = (changed[0, place] + 1) % 9
            difference = (model(changed, labels) - before).abs().amax(dim=(0, 2))
            assert (difference[: place + 1] == 0).all()
            assert (difference[place + 1 :] > 0).all()


def test_drawing_follows_the_softmax():
    logits = torch.tensor([[0.0, 1.0, 2.0, -1.0]])
    drawn = autoregressive.draw(logits.expand(200_000, 4), autoregressive.Sampling(), torch.Generator().manual_seed(0))
    shares = torch.bincount(drawn, minlength=4) / 200_000
    torch.testing.assert_close(shares, logits.softmax(dim=1)[0], atol=0.005, rtol=0)


def test_top_k_and_top_p_keep_exactly_the_likeliest():
    logits = torch.tensor([0.5, 0.3, 0.15, 0.05]).log().expand(5000, 4)
    drawn = {
        name: set(autoregressive.draw(logits, sampling, torch.Generator().manual_seed(0)).tolist())
        for name, sampling in {
            "k2": autoregressive.Sampling(top_k=2),
            "p.5": autoregressive.Sampling(top_p=0.5),
            "p.6": autoregressive.Sampling(top_p=0.6),
            "p.9": autoregressive.Sampling(top_p=0.9),
        }.items()
    }
    assert drawn == {"k2": {0, 1}, "p.5": {0}, "p.6": {0, 1}, "p.9": {0, 1, 2}}


def test_the_autoregressive_prior_learns_a_known_distribution(job):
    """Grids of 2x2 with 4 codes whose joint distribution is known, another one for each label: total variation < 0.05."""
    torch.manual_seed(0)
    truth = known_distribution()
    training = PriorTraining(num_steps=700, batch_size=512, learning_rate=4e-3, weight_decay=0.0, ema_decay=0.99)
    config = autoregressive.Config(width=32, depth=2, heads=2, dropout=0.0, training=training)
    job.resumable()
    objective = autoregressive.Objective(autoregressive.Model(config, spec()), config)
    model = fit(objective, draws(truth), training, seed=0, job=job)
    with torch.no_grad():
        for label in range(2):
            log_probability = model(GRIDS, torch.full((256,), label)).log_softmax(dim=2)
            found = log_probability.gather(2, GRIDS.unsqueeze(2)).sum(dim=(1, 2)).exp()
            assert found.sum() == pytest.approx(1, abs=1e-3)  # the chain rule: a distribution over all grids
            assert total_variation(found, truth[label]) < 0.05


def test_heun_is_of_second_order_and_euler_of_first():
    """On dx/dt = x the error shrinks by 4 (Heun) and 2 (Euler) when the steps double."""
    training = PriorTraining(num_steps=1)
    config = flow_matching.Config(denoiser=transformer(width=16, depth=1, heads=2), training=training)
    model = flow_matching.Model(config, spec())
    model.forward = lambda x, t, labels: x
    noise = torch.randn(1, 2, 2, 2, generator=torch.Generator().manual_seed(0))
    errors = {}
    for solver, steps in itertools.product(("euler", "heun"), (16, 32)):
        sampling = flow_matching.Sampling(solver=solver, num_steps=steps)
        drawn = model.sample(torch.tensor([0]), sampling, torch.Generator().manual_seed(0))
        errors[solver, steps] = float((drawn - noise * torch.e).norm())
    assert errors["euler", 16] / errors["euler", 32] == pytest.approx(2, rel=0.1)
    assert errors["heun", 16] / errors["heun", 32] > 2.8  # the last step is Euler's, so a little under 4


@pytest.mark.parametrize("predicts", ["velocity", "data"])
def test_the_flow_learns_a_mixture_in_two_dimensions(predicts, job):
    """Three clusters per label: samples lie on the label's clusters, in the right shares (sliced Wasserstein)."""
    generator = torch.Generator().manual_seed(0)
    centres = torch.tensor([[[-1.5, 0.0], [1.5, 1.0], [0.5, -1.5]], [[1.5, -1.0], [-1.0, 1.5], [0.0, 0.0]]])
    labels = torch.arange(6000) % 2

    def draw(labels):
        which = torch.multinomial(torch.tensor([0.5, 0.3, 0.2]), len(labels), replacement=True, generator=generator)
        return centres[labels, which] + 0.15 * torch.randn(len(labels), 2, generator=generator)

    training = PriorTraining(num_steps=800, batch_size=256, learning_rate=3e-3, weight_decay=0.0, ema_decay=0.99)
    config = flow_matching.Config(
        denoiser=transformer(width=64, depth=2, heads=2), predicts=predicts, training=training
    )
    job.resumable()
    point = spec(codebook_size=None, shape=(2, 1, 1))
    objective = flow_matching.Objective(flow_matching.Model(config, point), config)
    model = fit(objective, Rows(draw(labels).view(-1, 2, 1, 1), labels), training, seed=0, job=job)
    asked = torch.arange(2000) % 2
    found = model.sample(asked, flow_matching.Sampling(num_steps=20), torch.Generator().manual_seed(1)).view(-1, 2)
    for label in range(2):
        real = sliced_wasserstein(draw(asked[asked == label]), draw(asked[asked == label]))
        assert sliced_wasserstein(found[asked == label], draw(asked[asked == label])) < 3 * real + 0.06
        assert sliced_wasserstein(found[asked == label], draw(asked[asked != label])) > 0.3  # labels matter


def sliced_wasserstein(a, b, num_directions=64):
    angles = torch.linspace(0, torch.pi, num_directions + 1)[:-1]
    directions = torch.stack([angles.cos(), angles.sin()])
    return float(((a @ directions).sort(dim=0).values - (b @ directions).sort(dim=0).values).abs().mean())


def test_velocity_and_data_predictions_mean_the_same():
    """x_1 - x_t = (1 - t) v: a network that outputs the data gives the velocity of the straight line."""
    training = PriorTraining(num_steps=1)
    config = flow_matching.Config(denoiser=transformer(width=16, depth=1, heads=2), predicts="data", training=training)
    model = flow_matching.Model(config, spec())
    x_0, x_1, t = torch.randn(3, 2, 2, 2), torch.randn(3, 2, 2, 2), torch.tensor([0.1, 0.5, 0.9])
    x_t = (1 - t.view(-1, 1, 1, 1)) * x_0 + t.view(-1, 1, 1, 1) * x_1
    model.denoiser.forward = lambda x, times, labels: x_1
    torch.testing.assert_close(model(x_t, t, torch.tensor([0, 1, 0])), x_1 - x_0, atol=1e-5, rtol=1e-5)


def test_training_times_of_the_flow_are_logit_normal():
    """Their logits have the mean and the deviation of the settings."""
    training = PriorTraining(num_steps=1)
    config = flow_matching.Config(
        denoiser=transformer(width=16, depth=1, heads=2), time_mean=-0.7, time_std=1.4, training=training
    )
    model = flow_matching.Model(config, spec(shape=(1, 1, 1)))
    times = []
    model.forward = lambda x, t, labels: times.append(t) or torch.zeros_like(x)
    torch.manual_seed(0)
    batch = TokenBatch(torch.randn(4000, 1, 1, 1), torch.zeros(4000, dtype=torch.long))
    flow_matching.Objective(model, config)(batch, "prior", 0)
    logits = torch.logit(times[0])
    assert float(logits.mean()) == pytest.approx(-0.7, abs=0.1)
    assert float(logits.std()) == pytest.approx(1.4, rel=0.05)


def test_guidance_of_the_flow_acts_in_its_interval_and_a_scale_of_1_needs_no_second_pass():
    training = PriorTraining(num_steps=1)
    config = flow_matching.Config(denoiser=transformer(width=16, depth=1, heads=2), training=training)
    model = flow_matching.Model(config, spec())
    rows = []
    model.forward = lambda x, t, labels: rows.append((round(float(t[0]), 3), len(x))) or torch.zeros_like(x)
    labels = torch.tensor([0, 1, 1])
    sampling = {"num_steps": 5, "solver": "euler"}
    model.sample(labels, flow_matching.Sampling(**sampling), torch.Generator().manual_seed(0))
    assert [count for _, count in rows] == [3] * 5
    rows.clear()
    guided = flow_matching.Sampling(**sampling, guidance_scale=2.0, guidance_interval=(0.3, 0.7))
    model.sample(labels, guided, torch.Generator().manual_seed(0))
    assert rows == [(0.0, 3), (0.2, 3), (0.4, 6), (0.6, 6), (0.8, 3)]

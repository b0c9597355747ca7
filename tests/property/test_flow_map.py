"""The flow map: its identity on a flow that is known, and what it saves in calls on one that it learns."""

import pytest
import torch
from test_priors import sliced_wasserstein
from toy_distributions import Rows, spec

from tessera.bases.optimization import PriorTraining
from tessera.contracts import TokenBatch
from tessera.denoisers.transformer import Config as transformer
from tessera.priors import flow_map
from tessera.training.loop import fit

MEAN, STD = 0.7, 0.3  # of Gaussian data


def deviation(t):
    return ((1 - t) ** 2 + (t * STD) ** 2) ** 0.5


def exact_velocity(x, t):
    """Of the flow from N(0, 1) to N(MEAN, STD^2): d/dt of the map below."""
    return MEAN + (t * STD**2 - (1 - t)) / deviation(t) ** 2 * (x - t * MEAN)


def exact_map(x, t, r):
    """Where x at t is at r."""
    return r * MEAN + deviation(r) / deviation(t) * (x - t * MEAN)


def gaussian_model(**settings):
    """A model that says the exact mean velocities."""
    training = PriorTraining(num_steps=1)
    denoiser = transformer(width=16, depth=1, heads=2)
    config = flow_map.Config(denoiser=denoiser, training=training, **settings)
    model = flow_map.Model(config, spec(codebook_size=None, shape=(2, 2, 2)))

    def forward(x, t, labels, lengths):
        t, lengths = t.view(-1, 1, 1, 1), lengths.view(-1, 1, 1, 1)
        mean = (exact_map(x, t, t + lengths) - x) / lengths.clamp_min(1e-9)
        return torch.where(lengths > 1e-4, mean, exact_velocity(x, t))

    model.forward = forward
    return model, config


def test_the_derivative_along_a_known_flow_is_that_of_the_identity():
    """(r - t) du/dt = u - v, by closed forms."""
    model, _ = gaussian_model()
    x, t = torch.randn(64, 2, 2, 2), torch.rand(64) * 0.9
    lengths = (1 - t) * torch.rand(64).clamp_min(0.1)
    labels = torch.zeros(64, dtype=torch.long)
    found = flow_map.derivative(model, x, t, labels, lengths) * lengths.view(-1, 1, 1, 1)
    expected = model(x, t, labels, lengths) - model(x, t, labels, torch.zeros_like(t))
    torch.testing.assert_close(found, expected, atol=0.02, rtol=0.02)


@pytest.mark.parametrize("num_steps", [1, 2, 4])
def test_a_known_map_is_followed_exactly_in_any_number_of_calls(num_steps):
    model, _ = gaussian_model()
    noise = torch.randn(3, 2, 2, 2, generator=torch.Generator().manual_seed(0))
    sampling = flow_map.Sampling(num_steps=num_steps)
    found = model.sample(torch.tensor([0, 1, 1]), sampling, torch.Generator().manual_seed(0))
    torch.testing.assert_close(found, MEAN + STD * noise)


def test_at_the_exact_map_the_loss_is_that_of_the_exact_velocity():
    """Jumps or not, the least loss is the variance of x_1 - x_0 given x_t: nothing is gained by leaving the map."""
    batch = TokenBatch(MEAN + STD * torch.randn(20_000, 2, 2, 2), torch.zeros(20_000, dtype=torch.long))
    losses = {}
    for share in (0.0, 1.0):
        model, config = gaussian_model(flow_share=0.0, jump_share=share, label_dropout=0.0)
        torch.manual_seed(0)
        losses[share] = float(flow_map.Objective(model, config).loss(batch.tokens, batch.labels, 0)["loss"])
    # the variance of x_1 - x_0 given x_t is STD^2 / deviation(t)^2; jumps begin at the smaller of two times
    torch.manual_seed(1)
    times = torch.sigmoid(config.time_mean + config.time_std * torch.randn(2, 100_000))
    for share, t in ((0.0, times[0]), (1.0, times.amin(dim=0))):
        assert losses[share] == pytest.approx(float((STD / deviation(t)).square().mean()), rel=0.03)


def test_a_map_that_is_learnt_needs_one_call_where_the_flow_needs_many(job):
    """Three clusters: after one jump samples lie on them, which one step along the velocity leaves at their mean."""
    generator = torch.Generator().manual_seed(0)
    centres = torch.tensor([[-1.5, 0.0], [1.5, 1.0], [0.5, -1.5]])

    def draw(number):
        which = torch.multinomial(torch.tensor([0.5, 0.3, 0.2]), number, replacement=True, generator=generator)
        return centres[which] + 0.15 * torch.randn(number, 2, generator=generator)

    training = PriorTraining(num_steps=500, batch_size=256, learning_rate=3e-3, weight_decay=0.0, ema_decay=0.99)
    config = flow_map.Config(denoiser=transformer(width=64, depth=2, heads=2), training=training)
    job.resumable()
    objective = flow_map.Objective(flow_map.Model(config, spec(codebook_size=None, shape=(2, 1, 1))), config)
    data = Rows(draw(6000).view(-1, 2, 1, 1), torch.zeros(6000, dtype=torch.long))
    model = fit(objective, data, training, seed=0, job=job)
    labels = torch.zeros(2000, dtype=torch.long)
    noise = torch.randn(2000, 2, 1, 1, generator=generator)
    with torch.no_grad():
        along = (noise + model(noise, torch.zeros(2000), labels, torch.zeros(2000))).view(-1, 2)
    far = sliced_wasserstein(along, draw(2000))
    for num_steps in (1, 4):
        found = model.sample(labels, flow_map.Sampling(num_steps=num_steps), generator).view(-1, 2)
        assert sliced_wasserstein(found, draw(2000)) < far / 4

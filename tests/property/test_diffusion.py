"""The diffusion prior: parametrizations, noise levels and weights; guidance; a known distribution is learnt."""

import itertools
import math

import pytest
import torch
from torch import nn

from tessera.components import parse
from tessera.contracts import TokenBatch, TokenSpec
from tessera.nn import noise_levels
from tessera.priors import diffusion

PREDICTS = ("velocity", "noise", "data")


def spec(shape=(2, 1, 1), mean=0.0, std=1.0) -> TokenSpec:
    return TokenSpec(
        codebook_size=None,
        latent_shape=shape,
        index_grid=shape[1:],
        num_classes=2,
        class_counts=(1, 1),
        latent_mean=(mean,) * shape[0],
        latent_std=(std,) * shape[0],
        tokenizer_fingerprint="0" * 64,
    )


def config(training=None, **settings) -> diffusion.Config:
    network = {"kind": "transformer", "width": 64, "depth": 2, "heads": 2}
    training = training or {"num_steps": 1}
    return parse(diffusion.Config, {"kind": "diffusion", "denoiser": network, "training": training, **settings})


def levels(count=9):
    return torch.logspace(-2, 2, count, dtype=torch.float64).view(-1, 1)


@pytest.mark.parametrize("predicts", PREDICTS)
def test_the_data_are_found_again_from_what_is_predicted(predicts):
    generator = torch.Generator().manual_seed(0)
    data, noise = torch.randn(2, 9, 5, generator=generator, dtype=torch.float64)
    a, b = noise_levels.variance_preserving(levels())
    target = noise_levels.target_of(predicts, data, noise, a, b)
    found = noise_levels.data_of(predicts, target, a * data + b * noise, a, b)
    torch.testing.assert_close(found, data, atol=1e-11, rtol=1e-11)


def test_alpha_and_sigma_lie_on_the_circle_and_have_the_ratio_sigma():
    sigma = levels()
    a, b = noise_levels.variance_preserving(sigma)
    torch.testing.assert_close(a**2 + b**2, torch.ones_like(a))
    torch.testing.assert_close(b / a, sigma)


def test_the_velocity_is_the_derivative_by_the_angle():
    """Salimans and Ho: x = cos(angle) data + sin(angle) noise, v = dx / dangle."""
    data, noise, angle = torch.tensor(0.7).double(), torch.tensor(-1.2).double(), torch.tensor(0.6).double()
    angle.requires_grad_()
    x = angle.cos() * data + angle.sin() * noise
    (expected,) = torch.autograd.grad(x, angle)
    found = noise_levels.target_of("velocity", data, noise, angle.cos(), angle.sin())
    torch.testing.assert_close(found, expected)


def test_the_velocity_is_the_preconditioning_of_edm():
    """Karras et al., table 1 at sigma_data = 1: D = c_skip y + c_out F(c_in y), loss weight c_out^-2, with F = -velocity."""
    sigma, y, out = levels(), torch.randn(9, 5, dtype=torch.float64), torch.randn(9, 5, dtype=torch.float64)
    c_skip, c_out, c_in = 1 / (sigma**2 + 1), sigma / (sigma**2 + 1).sqrt(), 1 / (sigma**2 + 1).sqrt()
    a, b = noise_levels.variance_preserving(sigma)
    torch.testing.assert_close(a, c_in)
    torch.testing.assert_close(noise_levels.data_of("velocity", -out, c_in * y, a, b), c_skip * y + c_out * out)
    torch.testing.assert_close(noise_levels.loss_weight("velocity", sigma, None), torch.ones_like(sigma))
    in_data = (noise_levels.data_of("velocity", out, y, a, b) - noise_levels.data_of("velocity", 0 * out, y, a, b)) ** 2
    torch.testing.assert_close(in_data / c_out**2, out**2)


@pytest.mark.parametrize("min_snr", [None, 5.0])
def test_the_loss_is_the_same_whatever_is_predicted(min_snr):
    """One wrong guess of the data, said in three ways, costs the same, where the weight is not at its limit."""
    sigma = torch.logspace(-0.45, 0.45, 7, dtype=torch.float64).view(-1, 1)
    data, noise, guess = torch.randn(3, 7, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    a, b = noise_levels.variance_preserving(sigma)
    x = a * data + b * noise
    losses = []
    for predicts in PREDICTS:
        said = noise_levels.target_of(predicts, guess, (x - a * guess) / b, a, b)
        error = said - noise_levels.target_of(predicts, data, noise, a, b)
        losses.append(noise_levels.loss_weight(predicts, sigma, min_snr) * error**2)
    snr = sigma**-2
    wanted = 1 + snr if min_snr is None else snr.clamp_max(min_snr)
    torch.testing.assert_close(losses[0], wanted * (guess - data) ** 2)
    torch.testing.assert_close(losses[1], losses[0])
    torch.testing.assert_close(losses[2], losses[0])


def test_the_cosine_is_that_of_its_source_and_can_be_inverted():
    """alpha_bar(t) = f(t) / f(0), f(t) = cos((t + s) / (1 + s) * pi / 2)^2."""
    t = torch.linspace(0.02, 0.93, 9, dtype=torch.float64)
    kept = noise_levels.variance_preserving(noise_levels.cosine_sigma(t))[0] ** 2
    f = [math.cos((time + 0.008) / 1.008 * math.pi / 2) ** 2 for time in (0.0, *t.tolist())]
    torch.testing.assert_close(kept, torch.tensor([one / f[0] for one in f[1:]], dtype=torch.float64))
    for shift in (0.0, -1.5):
        sigma = noise_levels.cosine_sigma(t, shift)
        torch.testing.assert_close(noise_levels.cosine_time(sigma, shift), t)
        torch.testing.assert_close(-2 * sigma.log(), -2 * noise_levels.cosine_sigma(t).log() + shift)
    assert float(noise_levels.cosine_sigma(torch.tensor(0.0).double())) == pytest.approx(0, abs=1e-7)
    assert float(noise_levels.cosine_sigma(torch.tensor(1.0))) == noise_levels.SIGMA_MAX


@pytest.mark.parametrize("shift", [0.0, -1.0])
def test_grids_fall_from_the_noise_to_zero(shift):
    for grid in (noise_levels.cosine_grid(7, shift), noise_levels.edm_grid(7, 0.01, 80.0)):
        assert len(grid) == 8 and grid[-1] == 0 and all(one > other for one, other in itertools.pairwise(grid))
    assert noise_levels.cosine_grid(7, shift)[0] == pytest.approx(noise_levels.SIGMA_MAX, rel=1e-6)
    edm = noise_levels.edm_grid(3, 1.0, 128.0)
    assert edm == pytest.approx([128.0, 1.5**7, 1.0, 0.0])  # rho is 7


def test_noise_levels_of_a_batch_are_even_and_log_normal():
    torch.manual_seed(0)
    uniforms = noise_levels.even_uniforms(1000, torch.device("cpu"))
    assert torch.equal((uniforms * 1000).floor().long(), torch.arange(1000))
    logs = noise_levels.edm_sigma(uniforms, -0.5, 1.2).log()
    assert float(logs.mean()) == pytest.approx(-0.5, abs=0.02)
    assert float(logs.std()) == pytest.approx(1.2, rel=0.02)
    assert noise_levels.edm_sigma(torch.tensor([0.0, 1.0]), 0.0, 1.0).isfinite().all()


@pytest.mark.parametrize(("predicts", "schedule"), itertools.product(PREDICTS, ("cosine", "edm")))
def test_a_network_that_knows_the_data_has_no_loss_and_samples_them(predicts, schedule):
    """The conversions of training and of sampling, end to end: the right prediction, worked out from x and sigma."""
    data = torch.tensor([0.3, -1.1]).view(1, 2, 1, 1)
    settings = config(predicts=predicts, schedule=schedule)
    model = diffusion.Model(settings, spec())

    def knows(x, sigma, labels):
        a, b = (share.view(-1, 1, 1, 1) for share in noise_levels.variance_preserving(sigma))
        return noise_levels.target_of(predicts, data.expand_as(x), (x - a * data) / b, a, b)

    model.forward = knows
    loss = diffusion.Objective(model, settings)(
        TokenBatch(data.expand(8, -1, -1, -1), torch.zeros(8).long()), "prior", 0
    )
    assert float(loss["loss"]) < 1e-4
    for sampler in ("ancestral", "ddim", "heun", "dpm_solver"):
        sampling = diffusion.Sampling(sampler=sampler, num_steps=4)
        drawn = model.sample(torch.tensor([0, 1]), sampling, torch.Generator().manual_seed(0))
        torch.testing.assert_close(drawn, data.expand(2, -1, -1, -1), atol=1e-3, rtol=1e-3)


def test_a_scale_of_1_calls_the_network_once_and_guidance_acts_in_its_interval_alone():
    model = diffusion.Model(config(), spec())
    rows = []
    model.forward = lambda x, sigma, labels: rows.append((float(sigma[0]), len(x))) or torch.zeros_like(x)
    labels = torch.tensor([0, 1, 1])
    model.sample(labels, diffusion.Sampling(num_steps=6), torch.Generator().manual_seed(0))
    assert [count for _, count in rows] == [3] * 6
    rows.clear()
    sampling = diffusion.Sampling(num_steps=6, guidance_scale=2.0, guidance_interval=(0.2, 0.8))
    model.sample(labels, sampling, torch.Generator().manual_seed(0))
    assert {count for _, count in rows} == {3, 6}
    assert all((count == 6) == (0.25 <= sigma <= 4) for sigma, count in rows)  # times 0.8 and 0.2 are these levels


@pytest.mark.parametrize("predicts", PREDICTS)
def test_guidance_of_any_prediction_is_guidance_of_the_data(predicts):
    settings = config(predicts=predicts)
    model = diffusion.Model(settings, spec()).eval()
    model.forward = lambda x, sigma, labels: (labels.view(-1, 1, 1, 1) + 1) * 0.3 * x
    x, labels = torch.randn(3, 2, 1, 1), torch.tensor([0, 1, 0])
    plain = diffusion.Sampling()
    with_label = model.denoise(x, 0.7, labels, plain)
    without = model.denoise(x, 0.7, torch.full_like(labels, model.null_label), plain)
    found = model.denoise(x, 0.7, labels, diffusion.Sampling(guidance_scale=2.5))
    torch.testing.assert_close(found, without + 2.5 * (with_label - without))


def test_clipping_bounds_the_latents_as_the_tokenizer_gives_them():
    model = diffusion.Model(config(predicts="data"), spec(mean=-0.5, std=0.25))
    model.forward = lambda x, sigma, labels: torch.tensor([-9.0, 9.0]).view(1, 2, 1, 1).expand(len(x), -1, -1, -1)
    sampling = diffusion.Sampling(num_steps=3, clip_data=(-1.0, 1.0))
    drawn = model.sample(torch.tensor([0]), sampling, torch.Generator().manual_seed(0)).flatten()
    assert (drawn * 0.25 - 0.5).tolist() == pytest.approx([-1.0, 1.0])


def test_settings_that_have_no_effect_or_make_no_sense_are_refused():
    with pytest.raises(ValueError, match="eta 0.5 is for the sampler ddim, not heun"):
        parse(diffusion.Sampling, {"sampler": "heun", "eta": 0.5})
    with pytest.raises(ValueError, match="sigma_min 2.0 must be less than sigma_max 1.0"):
        parse(diffusion.Sampling, {"sigma_min": 2.0, "sigma_max": 1.0})


def test_labels_are_hidden_in_training_only():
    settings = config(label_dropout=1.0)
    model = diffusion.Model(settings, spec())
    seen = []
    model.forward = lambda x, sigma, labels: seen.append(labels.tolist()) or x
    objective = diffusion.Objective(model, settings)
    batch = TokenBatch(torch.randn(2, 2, 1, 1), torch.tensor([0, 1]))
    objective.train()(batch, "prior", 0)
    objective.eval()(batch, "prior", 0)
    assert seen == [[2, 2], [0, 1]]


def sliced_wasserstein(a, b, num_directions=64):
    angles = torch.linspace(0, torch.pi, num_directions + 1)[:-1]
    directions = torch.stack([angles.cos(), angles.sin()])
    return float(((a @ directions).sort(dim=0).values - (b @ directions).sort(dim=0).values).abs().mean())


class Points(nn.Module):
    """A small network on points, much faster than a transformer: what is learnt is the same."""

    def __init__(self):
        super().__init__()
        self.labels = nn.Embedding(3, 64)
        self.layers = nn.Sequential(
            nn.Linear(64 + 64 + 4, 96), nn.SiLU(), nn.Linear(96, 96), nn.SiLU(), nn.Linear(96, 2)
        )
        self.register_buffer("frequencies", torch.linspace(0.3, 8, 32))

    def forward(self, x, times, labels):
        angles = times.unsqueeze(1) * self.frequencies
        features = torch.cat([x.flatten(1), x.flatten(1) ** 2, angles.cos(), angles.sin(), self.labels(labels)], dim=1)
        return self.layers(features).view_as(x)


@pytest.mark.parametrize(
    ("predicts", "schedule", "sampler"),
    [
        ("velocity", "edm", "dpm_solver"),
        ("velocity", "cosine", "ddim"),
        ("noise", "cosine", "ancestral"),
        ("noise", "edm", "heun"),
        ("data", "edm", "dpm_solver"),
        ("data", "cosine", "heun"),
    ],
)
def test_diffusion_learns_a_mixture_in_two_dimensions(predicts, schedule, sampler):
    """Three clusters per label: samples lie on the label's clusters, in the right shares (sliced Wasserstein)."""
    generator = torch.Generator().manual_seed(0)
    centres = torch.tensor([[[-1.5, 0.0], [1.5, 1.0], [0.5, -1.5]], [[1.5, -1.0], [-1.0, 1.5], [0.0, 0.0]]])
    labels = torch.arange(6000) % 2

    def draw(labels):
        which = torch.multinomial(torch.tensor([0.5, 0.3, 0.2]), len(labels), replacement=True, generator=generator)
        return centres[labels, which] + 0.15 * torch.randn(len(labels), 2, generator=generator)

    settings = config(predicts=predicts, schedule=schedule)
    torch.manual_seed(0)
    model = diffusion.Model(settings, spec())
    model.denoiser = Points()
    objective = diffusion.Objective(model, settings).train()
    points, num_steps = draw(labels).view(-1, 2, 1, 1), 1000
    optimizer = torch.optim.Adam(model.parameters(), lr=1.5e-2, fused=True)  # a loop of its own: training.fit is slower
    for step in range(num_steps):
        optimizer.param_groups[0]["lr"] = 1.5e-2 * (1 - step / num_steps)
        rows = torch.randint(len(labels), (256,))
        objective(TokenBatch(points[rows], labels[rows]), "prior", step)["loss"].backward()
        optimizer.step()
        optimizer.zero_grad()
    asked = torch.arange(2000) % 2
    sampling = diffusion.Sampling(sampler=sampler, num_steps=60 if sampler in ("ddim", "ancestral") else 20)
    found = model.sample(asked, sampling, torch.Generator().manual_seed(1)).view(-1, 2)
    for label in range(2):
        real = sliced_wasserstein(draw(asked[asked == label]), draw(asked[asked == label]))
        distance = sliced_wasserstein(found[asked == label], draw(asked[asked == label]))
        assert distance < 3 * real + 0.08
        assert sliced_wasserstein(found[asked == label], draw(asked[asked != label])) > 0.3  # labels matter

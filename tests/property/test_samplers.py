"""Samplers of diffusion: they agree with diffusers' schedulers, with closed forms, and converge at their order."""

import math

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EDMDPMSolverMultistepScheduler,
    HeunDiscreteScheduler,
)

from tessera.nn import noise_levels, samplers

TRAINED = {"num_train_timesteps": 1000, "beta_schedule": "scaled_linear", "prediction_type": "epsilon"}


def said(x, sigma):
    """Some network that predicts noise from x of deviation 1; not linear in either argument."""
    return torch.tanh(1.3 * x + 0.4 * math.log(sigma)) + 0.2 * x


def denoise(x, sigma):
    a = 1 / math.sqrt(1 + sigma**2)
    return noise_levels.data_of("noise", said(a * x, sigma), a * x, a, sigma * a)


def start(dtype=torch.float64):
    return torch.randn(2, 3, 4, 2, generator=torch.Generator().manual_seed(0), dtype=dtype)


def draws(seed=1):
    generator = torch.Generator().manual_seed(seed)
    return lambda like: torch.randn(like.shape, generator=generator, dtype=like.dtype)


def no_draws(like):
    raise AssertionError("nothing should be drawn")


def levels_of(scheduler) -> list[float]:
    """The noise levels of a scheduler of discrete times, and 0."""
    kept = scheduler.alphas_cumprod[scheduler.timesteps].double()
    return [*((1 - kept) / kept).sqrt().tolist(), 0.0]


def run_discrete(scheduler, x, levels, **keywords):
    for t, sigma in zip(scheduler.timesteps, levels, strict=False):
        x = scheduler.step(said(x, sigma), t, x, **keywords).prev_sample
    return x


@pytest.mark.parametrize("eta", [0.0, 0.6, 1.0])
def test_ddim_is_that_of_diffusers(eta):
    scheduler = DDIMScheduler(**TRAINED, clip_sample=False, set_alpha_to_one=True)
    scheduler.set_timesteps(12)
    levels, x = levels_of(scheduler), start()
    generator = torch.Generator().manual_seed(1)
    expected = run_discrete(scheduler, x, levels, eta=eta, generator=generator)
    found = samplers.ddim(denoise, x * math.sqrt(1 + levels[0] ** 2), levels, draws() if eta else no_draws, eta)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_ancestral_is_that_of_diffusers_and_ddim_with_eta_1():
    scheduler = DDPMScheduler(**TRAINED, clip_sample=False, variance_type="fixed_small")
    scheduler.set_timesteps(12)
    levels, x = levels_of(scheduler), start()
    expected = run_discrete(scheduler, x, levels, generator=torch.Generator().manual_seed(1))
    scaled = x * math.sqrt(1 + levels[0] ** 2)
    found = samplers.ancestral(denoise, scaled, levels, draws())
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(samplers.ddim(denoise, scaled, levels, draws(), eta=1.0), found)


@pytest.mark.parametrize("num_steps", [2, 8, 20])
def test_dpm_solver_is_that_of_diffusers(num_steps):
    scheduler = DPMSolverMultistepScheduler(**TRAINED, solver_order=2, algorithm_type="dpmsolver++")
    scheduler.set_timesteps(num_steps)
    levels, x = scheduler.sigmas.tolist(), start()
    expected = run_discrete(scheduler, x, levels)
    found = samplers.dpm_solver(denoise, x * math.sqrt(1 + levels[0] ** 2), levels)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


def test_dpm_solver_on_edm_levels_is_that_of_diffusers():
    scheduler = EDMDPMSolverMultistepScheduler(sigma_min=0.01, sigma_max=80.0, sigma_data=1.0)
    scheduler.set_timesteps(10)
    levels = noise_levels.edm_grid(10, 0.01, 80.0)
    assert levels == pytest.approx(scheduler.sigmas.tolist(), rel=1e-5)
    x = found = start() * levels[0]
    for t, sigma in zip(scheduler.timesteps, levels, strict=False):
        velocity = said(scheduler.scale_model_input(x, t), sigma)  # EDM's F is minus the velocity
        x = scheduler.step(-velocity, t, x).prev_sample

    def edm(x, sigma):
        a, b = noise_levels.variance_preserving(torch.tensor(sigma, dtype=x.dtype))
        return noise_levels.data_of("velocity", said(a * x, sigma), a * x, a, b)

    torch.testing.assert_close(samplers.dpm_solver(edm, found, levels), x, atol=1e-4, rtol=1e-4)


def test_heun_is_that_of_diffusers():
    scheduler = HeunDiscreteScheduler(**TRAINED)
    scheduler.set_timesteps(9)
    levels = [*scheduler.sigmas[:-1:2].tolist(), 0.0]
    x = found = start() * levels[0]
    for number, t in enumerate(scheduler.timesteps):
        noise = said(scheduler.scale_model_input(x, t), float(scheduler.sigmas[number]))
        x = scheduler.step(noise, t, x).prev_sample
    assert len(levels) == 10 and len(scheduler.timesteps) == 17
    torch.testing.assert_close(samplers.heun(denoise, found, levels), x, atol=1e-4, rtol=1e-4)


def test_a_step_of_the_ancestral_sampler_has_the_posterior_mean_and_variance():
    """DDPM's equation 7, in its own terms: cumulated alpha 0.4 goes to 0.7."""
    now, following = 0.4, 0.7
    beta = 1 - now / following
    data, x = start(), start().flip(0)
    mean = following**0.5 * beta / (1 - now) * data + (now / following) ** 0.5 * (1 - following) / (1 - now) * x
    variance = (1 - following) / (1 - now) * beta
    levels = [((1 - kept) / kept) ** 0.5 for kept in (now, following)]
    at_mean = samplers.ancestral(lambda x, sigma: data, x / now**0.5, levels, torch.zeros_like)
    above = samplers.ancestral(lambda x, sigma: data, x / now**0.5, levels, torch.ones_like)
    torch.testing.assert_close(at_mean * following**0.5, mean)
    torch.testing.assert_close((above - at_mean) * following**0.5, torch.full_like(mean, variance**0.5))


MEAN, DEVIATION = 1.5, 0.4


def gaussian(x, sigma):
    """The exact denoiser of data N(MEAN, DEVIATION^2)."""
    return MEAN + DEVIATION**2 / (DEVIATION**2 + sigma**2) * (x - MEAN)


@pytest.mark.parametrize(("name", "order"), [("ddim", 1), ("heun", 2), ("dpm_solver", 2)])
def test_error_falls_with_the_order_of_the_sampler(name, order):
    """Against the exact solution of the probability flow of a Gaussian, down to a level above 0."""
    x = start() * 10
    errors = []
    for steps in (40, 80):
        levels = noise_levels.edm_grid(steps, 0.05, 10.0)[:-1]
        scale = math.sqrt((DEVIATION**2 + levels[-1] ** 2) / (DEVIATION**2 + levels[0] ** 2))
        exact = MEAN + scale * (x - MEAN)
        more = (no_draws,) if name == "ddim" else ()
        errors.append(float((getattr(samplers, name)(gaussian, x, levels, *more) - exact).norm()))
    assert math.log2(errors[0] / errors[1]) == pytest.approx(order, abs=0.25)


@pytest.mark.parametrize(
    ("name", "num_steps", "tolerance"),
    [("ancestral", 150, 0.06), ("ddim", 100, 0.04), ("heun", 16, 0.06), ("dpm_solver", 20, 0.06)],
)
def test_samples_of_a_gaussian_have_its_mean_and_deviation(name, num_steps, tolerance):
    levels = noise_levels.edm_grid(num_steps, 0.01, 40.0)
    x = torch.randn(20_000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    x = MEAN + math.sqrt(DEVIATION**2 + levels[0] ** 2) * (x - x.mean()) / x.std()
    more = {"ancestral": (draws(),), "ddim": (no_draws,)}.get(name, ())
    found = getattr(samplers, name)(gaussian, x, levels, *more)
    assert float(found.mean()) == pytest.approx(MEAN, abs=0.01)
    assert float(found.std()) == pytest.approx(DEVIATION, rel=tolerance)


def test_heun_calls_the_network_twice_a_step_and_once_in_the_last():
    calls = {}
    for name in ("heun", "dpm_solver", "ddim", "ancestral"):
        seen = []
        more = (draws(),) if name in ("ddim", "ancestral") else ()
        getattr(samplers, name)(lambda x, s, seen=seen: seen.append(s) or x / 2, start(), [4.0, 2.0, 1.0, 0.0], *more)
        calls[name] = seen
    assert calls["heun"] == [4.0, 2.0, 2.0, 1.0, 1.0]
    assert calls["dpm_solver"] == calls["ddim"] == calls["ancestral"] == [4.0, 2.0, 1.0]

"""Data conditioned on a measurement, observe(images) + normal noise: the posterior mean of latents, and draws of indices.

Latents: a denoiser gives the mean of the data given a noisy x and, by its derivative, their covariance; conditioning that
normal distribution on the measurement is a linear update. Indices: Gibbs sampling, each index given all others, by
importance resampling: a masked prior proposes, the likelihood of the measurement weighs.

Sources: the covariance: Rozet et al. (moment matching posterior sampling), "Learning Diffusion Priors from Observations by
Expectation Maximization", 2024, arXiv:2405.13712, section 4.2; the descent after it: Zhu et al. (DiffPIR), 2023,
arXiv:2305.08995, algorithm 1, and in latents Song et al. (ReSample), 2023, arXiv:2307.08123, section 3.2; iterated sampling
importance resampling: Andrieu, Lee and Vihola, 2018, arXiv:1312.6432, section 1.
Differs from them: two steps of conjugate gradients, because the derivative of a trained network is no covariance in every
direction; what they and the linearized decoder leave unexplained is left to Adam, with one uncertainty for all
directions. Where the derivative is exact, this counts the measurement a little more than once (a test says how much).
Indices are drawn at many places at once, so far apart that each is judged by the pixels nearest to it.
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from tessera.system import System

GRADIENT_STEPS = 2  # of conjugate gradients
MOST_DEVIATIONS = 2  # root mean square of what a measurement may move the posterior mean by
SPACING = 4  # codes between two places whose indices are drawn at once

Function = Callable[[Tensor], Tensor]


class Measurement(NamedTuple):
    """values = observe(data) + std * noise, where data are latents or images, as its user says."""

    observe: Function
    values: Tensor
    std: float


@torch.enable_grad()
def expected_data(
    x: Tensor, sigma: float, denoise: Function, measurement: Measurement, correction_steps: int
) -> Tensor:
    """(B, D, h, w) the mean of the data given x = data + sigma * noise and a measurement of the data."""
    mean, covariance = _moments(x, sigma, denoise)
    updated = _conditioned(mean, covariance, measurement, GRADIENT_STEPS)
    data_std = sigma / (1 + sigma**2) ** 0.5  # of the data given x, if they have unit deviation and are normal
    moved = updated - mean  # farther than plausible where the derivative is no covariance
    far = moved.flatten(1).square().mean(dim=1).sqrt() / (MOST_DEVIATIONS * data_std)
    updated = mean + moved / far.clamp_min(1.0).view(-1, 1, 1, 1)
    return _corrected(updated, data_std, measurement, correction_steps)


def _moments(x: Tensor, sigma: float, denoise: Function) -> tuple[Tensor, Function]:
    """The mean of the data given x, and their covariance times a vector: sigma^2 times the derivative of the mean.

    Rozet et al., section 4.2 (Tweedie's formula for the covariance).
    """
    x = x.detach().requires_grad_()
    data = denoise(x)

    def covariance(vector: Tensor) -> Tensor:
        return sigma**2 * torch.autograd.grad(data, x, vector, retain_graph=True)[0]

    return data.detach(), covariance


def _conditioned(mean: Tensor, covariance: Function, measurement: Measurement, steps: int) -> Tensor:
    """The mean of a normal distribution conditioned on the measurement, `observe` being linear around its mean:

    mean + C A^T (A C A^T + std^2)^-1 (values - observe(mean)), with A the derivative of `observe` at the mean.
    """
    origin = mean.clone().requires_grad_()
    seen = measurement.observe(origin)
    zeros = torch.zeros_like(seen, requires_grad=True)
    (pulled,) = torch.autograd.grad(seen, origin, zeros, create_graph=True)  # A^T zeros, whose derivative by zeros is A

    def gain(dual: Tensor) -> Tensor:  # C A^T
        return covariance(torch.autograd.grad(seen, origin, dual, retain_graph=True)[0])

    def marginal(dual: Tensor) -> Tensor:  # the covariance of the measurement
        return torch.autograd.grad(pulled, zeros, gain(dual), retain_graph=True)[0] + measurement.std**2 * dual

    return (mean + gain(conjugate_gradients(marginal, measurement.values - seen.detach(), steps))).detach()


def conjugate_gradients(matrix: Function, wanted: Tensor, steps: int) -> Tensor:
    """(B, ...) an approximate v with matrix(v) = wanted, for each of the B; no step where the curvature is not positive."""

    def product(a: Tensor, b: Tensor) -> Tensor:
        return (a * b).flatten(1).sum(dim=1).view(-1, *[1] * (a.dim() - 1))

    found, residual = torch.zeros_like(wanted), wanted
    direction, square = residual, product(residual, residual)
    for _ in range(steps):
        ahead = matrix(direction)
        curvature = product(direction, ahead)
        step = torch.where(curvature > 0, square / curvature.clamp_min(1e-20), 0.0)
        found, residual = found + step * direction, residual - step * ahead
        square_next = product(residual, residual)
        direction = residual + square_next / square.clamp_min(1e-20) * direction
        square = square_next
    return found


def _corrected(data: Tensor, data_std: float, measurement: Measurement, steps: int) -> Tensor:
    """The maximum a posteriori near the data, by Adam: data_std around them in all directions."""
    z = data.clone().requires_grad_()
    optimizer = torch.optim.Adam([z], betas=(0.9, 0.9))
    for number in range(steps):
        optimizer.param_groups[0]["lr"] = data_std / 2 * (1 - number / steps)
        misfit = (measurement.observe(z) - measurement.values).square().sum() / (2 * measurement.std**2)
        away = (z - data).square().sum() / (2 * data_std**2)
        (z.grad,) = torch.autograd.grad(misfit + away, [z])
        optimizer.step()
    return z.detach()


@torch.no_grad()
def resampled(
    indices: Tensor,
    labels: Tensor,
    system: System,
    measurement: Measurement,
    sweeps: int,
    candidates: int,
    generator: torch.Generator,
) -> Tensor:
    """(B, *index_grid) indices after so many Gibbs sweeps, in each of which every index is drawn once given the others.

    The measurement is of images. At a place the prior (PredictsMasked) proposes `candidates`; of them and the present index
    one is drawn in proportion to the likelihood of the measurement (Andrieu et al., section 1). That leaves prior times
    likelihood invariant, up to what places at SPACING share.
    """
    height, width = system.spec.index_grid
    per_code = width // system.grid[1]
    offsets = [(row, column) for row in range(min(SPACING, height)) for column in range(min(SPACING * per_code, width))]
    for _ in range(sweeps):
        for number in torch.randperm(len(offsets), generator=generator, device=generator.device).tolist():
            row, column = offsets[number]
            rows, columns = torch.arange(row, height, SPACING), torch.arange(column, width, SPACING * per_code)
            places = (rows.unsqueeze(1) * width + columns).flatten().to(indices.device)
            nearby = _nearest(rows, height), _nearest(columns // per_code, system.grid[1])
            misfit = partial(_misfit_around, nearby=nearby, measurement=measurement)
            indices = _drawn_at(places, indices, labels, system, misfit, candidates, generator)
    return indices


def _drawn_at(
    places: Tensor,
    indices: Tensor,
    labels: Tensor,
    system: System,
    misfit: Function,
    candidates: int,
    generator: torch.Generator,
) -> Tensor:
    """places: (P,) of the flattened grid. misfit: images -> (B, P), the negative log-likelihood near each place."""
    flat, prior = indices.flatten(1), system.prior
    hidden = flat.index_fill(1, places, prior.mask_index)
    probabilities = prior(hidden, labels)[:, places].float().softmax(dim=2).to(generator.device)  # (B, P, K)
    drawn = torch.multinomial(probabilities.flatten(0, 1), candidates, replacement=True, generator=generator)
    drawn = drawn.view(*probabilities.shape[:2], candidates).to(flat.device)
    pool = torch.cat([flat[:, places].unsqueeze(2), drawn], dim=2)  # (B, P, 1 + candidates)
    trials = [flat.index_copy(1, places, one).view(indices.shape) for one in pool.unbind(dim=2)]
    weights = (
        torch.stack([-misfit(system.decode(trial)) for trial in trials], dim=2).softmax(dim=2).to(generator.device)
    )
    chosen = torch.multinomial(weights.flatten(0, 1), 1, generator=generator).view(*weights.shape[:2], 1)
    return flat.index_copy(1, places, pool.gather(2, chosen.to(pool.device)).squeeze(2)).view(indices.shape)


def _nearest(places: Tensor, size: int) -> Tensor:
    """(size, P) one-hot rows: which of the places along an axis is nearest."""
    distances = (torch.arange(size).unsqueeze(1) - places).abs()
    return F.one_hot(distances.argmin(dim=1), len(places)).float()


def _misfit_around(images: Tensor, nearby: tuple[Tensor, Tensor], measurement: Measurement) -> Tensor:
    """(B, P) the measurement's negative log-likelihood, up to a constant, of the part that is nearest to each place."""
    rows, columns = (one.to(images.device) for one in nearby)
    error = (measurement.observe(images) - measurement.values).square()
    error = error.sum(dim=1, keepdim=True) / (2 * measurement.std**2)
    grid = len(rows), len(columns)
    cells = F.adaptive_avg_pool2d(error, grid).squeeze(1) * (error[0].numel() / (grid[0] * grid[1]))
    return torch.einsum("bhw,hp,wq->bpq", cells, rows, columns).flatten(1)

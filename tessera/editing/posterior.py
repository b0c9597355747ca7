"""What a measurement leaves possible: latents that a denoiser expects, and indices that a masked prior draws, given it too.

A measurement is observe(images) with normal noise. Latents: the denoiser says what data a noisy x comes from and, by its
derivative, how uncertain they are in each direction; a linear update gives what both tell. Indices: Gibbs sampling, place by
place, each given all others; the prior proposes and the measurement chooses.

Sources: the covariance: Rozet et al. (moment matching posterior sampling), "Learning Diffusion Priors from Observations by
Expectation Maximization", 2024, arXiv:2405.13712, section 4.2; the descent after it: Zhu et al. (DiffPIR), 2023,
arXiv:2305.08995, algorithm 1, and in latents Song et al. (ReSample), 2023, arXiv:2307.08123, section 3.2; iterated sampling
importance resampling: Andrieu, Lee and Vihola, 2018, arXiv:1312.6432, section 1.
Differs from them: two steps of conjugate gradients, because the derivative of a trained network is no covariance in every
direction; what they and the linear guess of the decoder leave unexplained is left to Adam, with one uncertainty for all
directions. Where the derivative is exact, this counts the measurement a little more than once (a test says how much).
Indices are drawn at many places at once, so far apart that each is judged by the pixels nearest to it.
"""

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from tessera.editing.trial import System

GRADIENT_STEPS = 2  # of conjugate gradients
MOST_DEVIATIONS = 2  # root mean square of what a measurement may move the expected data by
SPACING = 4  # codes between two places whose indices are drawn at once

Function = Callable[[Tensor], Tensor]


@torch.enable_grad()
def expected_data(
    x: Tensor, sigma: float, denoise: Function, observe: Function, measured: Tensor, std: float, correction_steps: int
) -> Tensor:
    """(B, D, h, w) the expected data of x = data + sigma * noise, where observe(data) + std * noise was measured."""
    around, covariance = _believed(x, sigma, denoise)
    updated = _updated(around, covariance, observe, measured, std, GRADIENT_STEPS)
    spread = sigma / (1 + sigma**2) ** 0.5  # of data around their expectation, where they have unit deviation
    moved = updated - around  # farther than believable where the derivative is no covariance
    far = moved.flatten(1).square().mean(dim=1).sqrt() / (MOST_DEVIATIONS * spread)
    updated = around + moved / far.clamp_min(1.0).view(-1, 1, 1, 1)
    return _nearest_explanation(updated, spread, observe, measured, std, correction_steps)


def _believed(x: Tensor, sigma: float, denoise: Function) -> tuple[Tensor, Function]:
    """The expected data of x, and their covariance times a vector: sigma^2 times the derivative of the expectation."""
    x = x.detach().requires_grad_()
    data = denoise(x)

    def covariance(vector: Tensor) -> Tensor:
        return sigma**2 * torch.autograd.grad(data, x, vector, retain_graph=True)[0]

    return data.detach(), covariance


def _updated(mean: Tensor, covariance: Function, observe: Function, measured: Tensor, std: float, steps: int) -> Tensor:
    """The mean of a normal distribution given the measurement, `observe` being linear around its mean."""
    origin = mean.clone().requires_grad_()
    seen = observe(origin)
    zeros = torch.zeros_like(seen, requires_grad=True)
    (pulled,) = torch.autograd.grad(seen, origin, zeros, create_graph=True)  # linear in zeros: its derivative pushes

    def gain(dual: Tensor) -> Tensor:
        return covariance(torch.autograd.grad(seen, origin, dual, retain_graph=True)[0])

    def spread(dual: Tensor) -> Tensor:
        return torch.autograd.grad(pulled, zeros, gain(dual), retain_graph=True)[0] + std**2 * dual

    return (mean + gain(conjugate_gradients(spread, measured - seen.detach(), steps))).detach()


def conjugate_gradients(matrix: Function, wanted: Tensor, steps: int) -> Tensor:
    """(B, ...) about v with matrix(v) = wanted, for each of the B; no step along a direction that is no covariance."""

    def product(a: Tensor, b: Tensor) -> Tensor:
        return (a * b).flatten(1).sum(dim=1).view(-1, *[1] * (a.dim() - 1))

    found, left = torch.zeros_like(wanted), wanted
    direction, square = left, product(left, left)
    for _ in range(steps):
        ahead = matrix(direction)
        bend = product(direction, ahead)
        step = torch.where(bend > 0, square / bend.clamp_min(1e-20), 0.0)
        found, left = found + step * direction, left - step * ahead
        following = product(left, left)
        direction = left + following / square.clamp_min(1e-20) * direction
        square = following
    return found


def _nearest_explanation(
    data: Tensor, spread: float, observe: Function, measured: Tensor, std: float, steps: int
) -> Tensor:
    """What explains the measurement best near the data, by `spread` in all directions."""
    z = data.clone().requires_grad_()
    optimizer = torch.optim.Adam([z], betas=(0.9, 0.9))
    for number in range(steps):
        optimizer.param_groups[0]["lr"] = spread / 2 * (1 - number / steps)
        misfit = (observe(z) - measured).square().sum() / (2 * std**2)
        away = (z - data).square().sum() / (2 * spread**2)
        (z.grad,) = torch.autograd.grad(misfit + away, [z])
        optimizer.step()
    return z.detach()


@torch.no_grad()
def resampled(
    indices: Tensor,
    labels: Tensor,
    system: System,
    observe: Function,
    measured: Tensor,
    std: float,
    sweeps: int,
    candidates: int,
    generator: torch.Generator,
) -> Tensor:
    """(B, *index_grid) indices after so many sweeps, in each of which every index is drawn once given the others.

    At a place the prior proposes `candidates`; of them and the present index one is drawn in proportion to how well it
    explains the measurement. That leaves prior times likelihood as it is, up to what places at SPACING share.
    """
    height, width = system.spec.index_grid
    per_code = width // system.grid[1]
    offsets = [(row, column) for row in range(min(SPACING, height)) for column in range(min(SPACING * per_code, width))]
    for _ in range(sweeps):
        for number in torch.randperm(len(offsets), generator=generator).tolist():
            row, column = offsets[number]
            rows, columns = torch.arange(row, height, SPACING), torch.arange(column, width, SPACING * per_code)
            places = (rows.unsqueeze(1) * width + columns).flatten().to(indices.device)
            nearby = _nearest(rows, height), _nearest(columns // per_code, system.grid[1])
            misfit = partial(_misfit_around, nearby=nearby, observe=observe, measured=measured, std=std)
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
    """places: (P,) of the flattened grid. misfit: images -> (B, P), what is not explained of the measurement near each."""
    flat, prior = indices.flatten(1), system.prior
    hidden = flat.index_fill(1, places, prior.mask_index)
    chances = prior(hidden, labels)[:, places].float().softmax(dim=2).cpu()  # (B, P, K)
    drawn = torch.multinomial(chances.flatten(0, 1), candidates, replacement=True, generator=generator)
    drawn = drawn.view(*chances.shape[:2], candidates).to(flat.device)
    pool = torch.cat([flat[:, places].unsqueeze(2), drawn], dim=2)  # (B, P, 1 + candidates)
    trials = [flat.index_copy(1, places, one).view(indices.shape) for one in pool.unbind(dim=2)]
    weights = torch.stack([-misfit(system.images_of(trial)) for trial in trials], dim=2).softmax(dim=2).cpu()
    chosen = torch.multinomial(weights.flatten(0, 1), 1, generator=generator).view(*weights.shape[:2], 1)
    return flat.index_copy(1, places, pool.gather(2, chosen.to(pool.device)).squeeze(2)).view(indices.shape)


def _nearest(places: Tensor, size: int) -> Tensor:
    """(size, P) one-hot rows: which of the places along an axis is nearest."""
    distances = (torch.arange(size).unsqueeze(1) - places).abs()
    return F.one_hot(distances.argmin(dim=1), len(places)).float()


def _misfit_around(
    images: Tensor, nearby: tuple[Tensor, Tensor], observe: Function, measured: Tensor, std: float
) -> Tensor:
    """(B, P) the measurement's negative log-likelihood, up to a constant, of the part that is nearest to each place."""
    rows, columns = (one.to(images.device) for one in nearby)
    error = (observe(images) - measured).square().sum(dim=1, keepdim=True) / (2 * std**2)
    grid = len(rows), len(columns)
    cells = F.adaptive_avg_pool2d(error, grid).squeeze(1) * (error[0].numel() / (grid[0] * grid[1]))
    return torch.einsum("bhw,hp,wq->bpq", cells, rows, columns).flatten(1)

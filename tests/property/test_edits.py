"""Edits over toy systems whose answers are known: a tokenizer of pixels, a Gaussian prior of latents, enumerated priors."""

import itertools
from functools import partial
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import BaseModel
from scipy import ndimage
from torch import Tensor, nn

from tessera.bases.optimization import PriorTraining
from tessera.components import InvalidParams, parse
from tessera.contracts import Denoises, Encoded, TokenSpec
from tessera.editing import ancestral, posterior
from tessera.editing.label_evidence import HIGHEST, LOWEST, NUM_LEVELS, label_log_probs
from tessera.edits import enhance, inpaint, interpolate, restyle, variations
from tessera.nn.membrane import close_seam
from tessera.priors import autoregressive, gan, masked
from tessera.quantizers import vector
from tessera.system import CannotEdit, System

EDITS = {module.__name__.rpartition(".")[2]: module for module in (enhance, inpaint, interpolate, restyle, variations)}


def spec_of(codebook_size: int | None, shape: tuple[int, int, int]) -> TokenSpec:
    return TokenSpec(
        codebook_size=codebook_size,
        latent_shape=shape,
        index_grid=shape[1:],
        num_classes=2,
        class_counts=(1, 1),
        latent_mean=(0.0,) * shape[0],
        latent_std=(1.0,) * shape[0],
        tokenizer_fingerprint="0" * 64,
    )


class Steps(BaseModel):
    """How the Gaussian prior is sampled."""

    num_steps: int = 60
    guidance_scale: float = 1.0


class Pixels(nn.Module):
    """Latents are the pixels."""

    def encode(self, images: Tensor) -> Encoded:
        return Encoded(images, None)

    def decode(self, latents: Tensor) -> Tensor:
        return latents


class Gaussian(nn.Module):
    """The prior of independent normal pixels of deviation 1; their mean is -shift, shift or 0 as the label is 0, 1 or null.

    The expected data of x = data + sigma * noise are (x + sigma^2 * mean) / (1 + sigma^2).
    """

    def __init__(self, shift: float = 0.0) -> None:
        super().__init__()
        self.means = nn.Parameter(torch.tensor([-shift, shift, 0.0]), requires_grad=False)
        self.config = SimpleNamespace(is_conditional=shift != 0)

    def levels(self, sampling: "Steps") -> list[float]:
        return [*torch.logspace(1.5, -2, sampling.num_steps).tolist(), 0.0]

    def denoise(self, x: Tensor, sigma: float, labels: Tensor, sampling: Any) -> Tensor:
        return (x + sigma**2 * self.means[labels].view(-1, 1, 1, 1)) / (1 + sigma**2)


class Patches(nn.Module):
    """Each 2x2 patch of a gray image is one of K constant codes."""

    def __init__(self, size: int) -> None:
        super().__init__()
        config = vector.Config(kind="vector", codebook_size=size, code_dim=1, init_step=0)
        self.quantizer = vector.Quantizer(config)
        with torch.no_grad():
            codes = torch.linspace(-1, 1, size).view(-1, 1)
            for value in self.quantizer.state_dict().values():
                if value.shape == codes.shape:
                    value.copy_(codes)

    def encode(self, images: Tensor) -> Encoded:
        latents = nn.functional.avg_pool2d(images, 2)
        return Encoded(latents, self.quantizer(latents).indices)

    def decoder(self, codes: Tensor) -> Tensor:
        return codes.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)

    def decode(self, latents: Tensor) -> Tensor:
        return self.decoder(self.quantizer(latents).codes)

    def decode_indices(self, indices: Tensor) -> Tensor:
        return self.decoder(self.quantizer.indices_to_codes(indices))


def gaussian_system(side: int = 8, shift: float = 0.0) -> System:
    return System(Pixels(), Gaussian(shift), spec_of(None, (1, side, side)), "latents", "toy")


def discrete_system(kind: str, side: int = 4, size: int = 4, **settings: Any) -> System:
    torch.manual_seed(0)
    module = {"masked": masked, "autoregressive": autoregressive}[kind]
    training = PriorTraining(num_steps=10, batch_size=2)
    config = module.Config(kind=kind, width=16, depth=1, heads=2, dropout=0.0, training=training, **settings)
    spec = spec_of(size, (1, side, side))
    prior = module.Model(config, spec).eval()
    with torch.no_grad():  # an untrained head is nearly uniform, so that no mistake would show
        prior.head.weight.normal_(std=1.0)
    return System(Patches(size).eval(), prior, spec, "indices", "toy")


def gan_system() -> System:
    config = gan.Config(kind="gan", training=gan.AdversarialTraining(num_steps=10, batch_size=2))
    return System(Pixels(), gan.Model(config, spec_of(None, (1, 8, 8))), spec_of(None, (1, 8, 8)), "latents", "toy-gan")


SYSTEMS = {
    "gaussian": lambda: gaussian_system(8),
    "masked": lambda: discrete_system("masked"),
    "autoregressive": lambda: discrete_system("autoregressive"),
    "any-order": lambda: discrete_system("autoregressive", random_order_until=(1.0, 1.0)),
}


def sampling_of(system: System) -> Any:
    if isinstance(system.prior, Denoises):
        return Steps()
    return masked.Sampling() if isinstance(system.prior, masked.Model) else autoregressive.Sampling()


def some_images(count: int = 6, side: int = 8) -> Tensor:
    return (torch.rand(count, 1, side, side, generator=torch.Generator().manual_seed(3)) * 2 - 1) * 0.9


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


# Pieces ---------------------------------------------------------------------------------------------------------------


def test_a_membrane_takes_the_border_s_difference_into_the_hole_and_leaves_known_pixels() -> None:
    """A linear function solves Laplace's equation, so with a linear difference the closed hole is the image itself."""
    rows, columns = torch.meshgrid(torch.linspace(-0.4, 0.4, 12), torch.linspace(-0.4, 0.4, 12), indexing="ij")
    images = (rows + 0.5 * columns).expand(1, 1, 12, 12)
    mask = torch.zeros(1, 12, 12, dtype=torch.bool)
    mask[:, 3:8, 4:9] = True
    closed = close_seam(images, torch.full_like(images, 0.2), mask)
    assert torch.equal(closed[:, :, ~mask[0]], images[:, :, ~mask[0]])
    assert (closed - images).abs().max() < 1e-3
    assert torch.equal(close_seam(images, images + 0.1, mask)[:, :, ~mask[0]], images[:, :, ~mask[0]])


def test_a_fading_membrane_loses_a_share_of_its_correction_with_every_pixel_from_the_border() -> None:
    images, filling = torch.ones(1, 1, 4, 40), torch.zeros(1, 1, 4, 40)
    mask = torch.zeros(1, 4, 40, dtype=torch.bool)
    mask[:, :, 10:] = True
    closed = close_seam(images, filling, mask, fade=3.0)
    true = torch.exp(-torch.arange(1, 13) / 3.0)  # the far side is too far away to matter
    assert torch.allclose(closed[0, 0, :, 10:22], true.expand(4, -1), atol=2e-3)
    assert torch.equal(closed[..., :10], images[..., :10])


def test_the_reach_of_tokens_is_what_the_decoder_does_with_them() -> None:
    assert torch.equal(gaussian_system(4).reach.view(16, 16), torch.eye(16))  # a pixel decides itself
    reach = discrete_system("masked").reach
    expected = torch.eye(16).view(4, 4, 4, 4).repeat_interleave(2, 2).repeat_interleave(2, 3)
    assert torch.equal(reach, expected)
    mask = torch.zeros(2, 8, 8, dtype=torch.bool)
    mask[0, 3, 5] = True
    touched = discrete_system("masked").touched(mask, 0.2)
    assert touched[0].nonzero().tolist() == [[1, 2]] and not touched[1].any()


@pytest.mark.parametrize("repeats", [1, 3])
def test_ancestral_steps_under_an_exact_prior_give_its_distribution(repeats: int) -> None:
    system, sampling = gaussian_system(), Steps(num_steps=400)
    levels = system.prior.levels(sampling)
    x = levels[0] * torch.randn(500, 1, 8, 8, generator=seeded())
    predict = ancestral.predictor(system, torch.zeros(500).long(), sampling)
    drawn = ancestral.denoise_along(predict, x, levels, seeded(1), repeats=repeats)
    assert abs(float(drawn.std()) - 1) < 0.03 and abs(float(drawn.mean())) < 0.03


def test_levels_begin_where_the_strength_says() -> None:
    levels = [80.0, 9.0, 2.0, 0.5, 0.0]
    assert ancestral.levels_from(levels, 0.5, (8, 8)) == ancestral.levels_from(levels, 0.5, (4, 4)) == [1.0, 0.5, 0.0]
    assert ancestral.levels_from(levels, 1.0, (8, 8)) == levels
    assert ancestral.levels_from(levels, 0.9, (8, 8)) == pytest.approx([9.0, 2.0, 0.5, 0.0])
    assert ancestral.levels_from(levels, 0.5, (32, 32)) == [
        4.0,
        2.0,
        0.5,
        0.0,
    ]  # each 4x4 of them average to noise of 1


def test_as_many_indices_are_drawn_as_noise_hides_of_latents() -> None:
    assert [ancestral.num_redrawn(strength, 100) for strength in (0.0, 0.2, 0.5, 0.8, 1.0)] == [0, 6, 50, 94, 100]


# Labels ---------------------------------------------------------------------------------------------------------------


def test_labels_are_as_probable_as_an_enumerated_prior_makes_the_known_indices() -> None:
    """All 2^4 images: the first two indices known; p(label | known) sums over the last two."""
    system = discrete_system("autoregressive", side=2, size=2)
    system.spec = system.spec.model_copy(update={"class_counts": (3, 1)})
    every = torch.tensor(list(itertools.product(range(2), repeat=4))).view(-1, 2, 2)
    is_known = torch.tensor([[True, True], [False, False]]).expand(16, 2, 2)
    joint = torch.stack(
        [(-system.prior.bits(every, torch.full((16,), label), seeded())).exp2() for label in (0, 1)], dim=1
    ) * torch.tensor([0.75, 0.25])
    of_first = joint.view(4, 4, 2).sum(dim=1)  # p(first two, label)
    true = (of_first / of_first.sum(dim=1, keepdim=True)).repeat_interleave(4, dim=0)
    found = label_log_probs(system, every, is_known, autoregressive.Sampling(), seeded()).exp()
    assert torch.allclose(found, true, atol=1e-5)
    assert (true[:, 0] - 0.75).abs().max() > 0.02  # the known ones say something


def test_a_masked_prior_explains_one_index_by_its_own_prediction() -> None:
    system = discrete_system("masked")
    indices = torch.randint(4, (5, 4, 4), generator=seeded())
    is_known = torch.zeros(5, 4, 4, dtype=torch.bool)
    is_known[:, 1, 2] = True
    labels = torch.zeros(5, dtype=torch.long)
    logits = system.prior(torch.full((5, 16), system.prior.mask_index), labels)
    true = logits.log_softmax(dim=2)[torch.arange(5), 6, indices[:, 1, 2]]
    found = system.prior.evidence(indices, is_known, labels, seeded())
    assert torch.allclose(found, true, atol=1e-5)
    is_known[:, 3, 3] = True  # two: in both orders, each given the one before
    given = torch.full((5, 16), system.prior.mask_index)
    after = []
    for first, then in ((6, 15), (15, 6)):
        read = given.clone()
        read[:, first] = indices.flatten(1)[:, first]
        one = logits.log_softmax(dim=2)[torch.arange(5), first, indices.flatten(1)[:, first]]
        two = system.prior(read, labels).log_softmax(dim=2)[torch.arange(5), then, indices.flatten(1)[:, then]]
        after.append(one + two)
    found = system.prior.evidence(indices, is_known, labels, seeded())
    low, high = torch.minimum(*after), torch.maximum(*after)
    assert ((found > low - 1e-5) & (found < high + 1e-5)).all()


def test_denoising_tells_labels_apart_as_the_likelihood_does() -> None:
    """Two normal distributions, whose log-odds are 2 * shift * the known pixels' sum: each level holds a known share of it."""
    system = gaussian_system(4, shift=0.4)
    truth = torch.arange(400) % 2
    latents = torch.randn(400, 1, 4, 4, generator=seeded(5)) + 0.4 * (2 * truth - 1).view(-1, 1, 1, 1)
    is_known = torch.ones(400, 4, 4, dtype=torch.bool)
    is_known[:, 2:] = False
    log_probs = label_log_probs(system, latents, is_known, Steps(), seeded())
    found = (log_probs[:, 1] - log_probs[:, 0]).double()
    exact = 2 * 0.4 * latents[:, 0, :2].sum(dim=(1, 2)).double()  # log-odds of 8 known pixels
    slope = float((found * exact).sum() / exact.square().sum())
    levels = np.geomspace(HIGHEST, LOWEST, NUM_LEVELS + 1)
    shares = (levels[1:] ** -2 - levels[:-1] ** -2) * (levels[:-1] ** 2 / (1 + levels[:-1] ** 2)) ** 2
    assert slope == pytest.approx(shares.sum(), abs=0.05)
    assert float(torch.corrcoef(torch.stack([found, exact]))[0, 1]) > 0.8


@pytest.mark.parametrize(("told", "shift"), [("inferred", 0.5), ("none", 0.0), ("own", -0.5)])
def test_a_hole_shows_the_label_that_is_told(told: str, shift: float) -> None:
    """Known pixels say 1, `labels` says 0."""
    system = gaussian_system(8, shift=0.5)
    images = torch.full((20, 1, 8, 8), 0.5)
    mask = torch.zeros(20, 8, 8, dtype=torch.bool)
    mask[:, 4:] = True
    tokens, is_known = system.encode(images), ~mask
    config = inpaint.Config(told_label=told, candidates=1)
    labels = torch.zeros(20).long()
    log_probs = inpaint._label_log_probs(tokens, is_known, labels, system, config, Steps(), seeded())
    wanted = {"inferred": 1, "none": 2, "own": 0}[told]
    assert (log_probs.argmax(dim=1) == wanted).all() and torch.allclose(log_probs.exp().sum(dim=1), torch.ones(20))
    drawn = inpaint._repainted(tokens, mask, log_probs.argmax(dim=1), system, 1, Steps(), seeded())
    expected = (torch.randn(10**5, generator=seeded()) + shift).clamp(-1, 1).mean()
    assert float(drawn[:, :, 4:].mean()) == pytest.approx(float(expected), abs=0.08)


# Inpainting -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SYSTEMS)
def test_known_pixels_stay_exactly_and_two_seeds_fill_differently(name: str) -> None:
    system, images = SYSTEMS[name](), some_images()
    mask = torch.zeros(6, 8, 8, dtype=torch.bool)
    mask[:, 4:, :] = True
    mask[3] = False  # nothing to do for this one
    spoilt = torch.where(mask.unsqueeze(1), 7.0, images)  # what the hole holds is not looked at
    fills = [
        inpaint.edit(given, torch.zeros(6).long(), system, inpaint.Config(), sampling_of(system), seeded(seed), mask)
        for given, seed in ((images, 0), (spoilt, 0), (images, 1))
    ]
    known = ~mask.unsqueeze(1)
    assert all(torch.equal(fill[known], images[known]) for fill in fills)
    assert torch.equal(fills[0], fills[1])
    assert (fills[0] != fills[2])[mask.unsqueeze(1)].float().mean() > 0.02
    none = torch.zeros_like(mask)
    assert torch.equal(
        inpaint.edit(images, torch.zeros(6).long(), system, inpaint.Config(), sampling_of(system), seeded(), none),
        images,
    )


def test_left_to_right_draws_weighted_by_what_they_did_not_read_are_the_true_conditional() -> None:
    """All 2^4 images enumerated: drawn first two places, known last two; weights make p(first) into p(first | last)."""
    system = discrete_system("autoregressive", side=2, size=2)
    prior, labels = system.prior, torch.zeros(16, dtype=torch.long)
    every = torch.tensor(list(itertools.product(range(2), repeat=4)))
    joint = (-prior.bits(every.view(-1, 2, 2), labels, seeded())).exp2()
    is_known = torch.tensor([[False, False], [True, True]]).expand(16, 2, 2)
    evidence = prior.evidence(every.view(-1, 2, 2), is_known, labels, seeded()).exp()
    of_last = (every[:, 2:] == torch.tensor([1, 0])).all(dim=1)
    true = joint[of_last] / joint[of_last].sum()
    first = joint.view(4, 4).sum(dim=1)  # p(first two)
    weighted = first * evidence[of_last]
    assert torch.allclose(weighted / weighted.sum(), true, atol=1e-5)
    assert not torch.allclose(first, true, atol=1e-2)  # without weights it would be something else


def test_fills_by_a_left_to_right_prior_are_draws_from_the_posterior_over_labels_and_indices() -> None:
    """The first row hidden, label 0 nine times as frequent: all 2^4 images of both labels enumerated."""
    system = discrete_system("autoregressive", side=2, size=2)
    system.spec = system.spec.model_copy(update={"class_counts": (9, 1)})
    with torch.no_grad():
        system.prior.label_embedding.weight.normal_(std=2.0, generator=seeded(4))
    every = torch.tensor(list(itertools.product(range(2), repeat=4)))
    joint = torch.stack(
        [(-system.prior.bits(every.view(-1, 2, 2), torch.full((16,), label), seeded())).exp2() for label in (0, 1)]
    )
    of_known = (every[:, 2:] == torch.tensor([1, 0])).all(dim=1)

    def shares_of_rows(shares: tuple[float, float]) -> Tensor:
        weights = (torch.tensor(shares).unsqueeze(1) * joint)[:, of_known].sum(dim=0)
        return weights / weights.sum()  # of the four first rows

    assert (shares_of_rows((0.9, 0.1)) - shares_of_rows((0.5, 0.5))).abs().max() > 0.1  # the shares matter
    images = system.decode(every[of_known][:1].view(1, 2, 2)).expand(3000, -1, -1, -1)
    mask = torch.zeros(3000, 4, 4, dtype=torch.bool)
    mask[:, :2] = True
    config = inpaint.Config(candidates=150)
    filled = inpaint.edit(images, torch.zeros(3000).long(), system, config, autoregressive.Sampling(), seeded(1), mask)
    row = system.encode(filled)[:, 0]
    found = torch.bincount(2 * row[:, 0] + row[:, 1], minlength=4) / 3000
    assert torch.allclose(found, shares_of_rows((0.9, 0.1)), atol=0.04)


# Enhancement ----------------------------------------------------------------------------------------------------------


def test_damages_are_what_they_say() -> None:
    images = some_images(2)
    blurred = enhance.damaged(images, enhance.Config(damage="blur", blur_std=0.8))
    expected = ndimage.gaussian_filter(images[1, 0].double().numpy(), 0.8, mode="nearest", radius=3)
    assert torch.allclose(blurred[1, 0].double(), torch.from_numpy(expected), atol=1e-6)
    small = enhance.damaged(images, enhance.Config(damage="downsample", factor=4))
    assert torch.allclose(small[0, 0, 0, 1], images[0, 0, :4, 4:].mean())
    noisy = enhance.measure(torch.zeros(50, 1, 8, 8), enhance.Config(damage="noise", noise_std=0.3), seeded())
    assert abs(float(noisy.std()) - 0.3) < 0.02
    with pytest.raises(ValueError, match="not divisible by enhance.factor 3"):
        enhance.damaged(images, enhance.Config(damage="downsample", factor=3))


@pytest.mark.parametrize(
    ("correction_steps", "slope"),
    [(0, 0.5), (20, 0.71)],  # Adam's correction counts the measurement again where it was counted exactly
)
def test_a_noisy_gaussian_is_denoised_as_its_posterior_says(correction_steps: int, slope: float) -> None:
    """Data N(0, 0.3^2), noise 0.3: the posterior mean is half the measurement, its deviation 0.21."""

    class Narrow(Gaussian):
        def denoise(self, x: Tensor, sigma: float, labels: Tensor, sampling: Any) -> Tensor:
            return x * 0.09 / (0.09 + sigma**2)

    system = System(Pixels(), Narrow(), spec_of(None, (1, 8, 8)), "latents", "toy")
    truth = 0.3 * torch.randn(100, 1, 8, 8, generator=seeded())
    config = enhance.Config(damage="noise", noise_std=0.3, correction_steps=correction_steps)
    measured = enhance.measure(truth, config, seeded(1))
    labels = torch.zeros(100).long()
    draws = [enhance.edit(measured, labels, system, config, Steps(), seeded(seed), (8, 8)) for seed in range(2, 10)]
    mean = torch.stack(draws).mean(dim=0)
    assert float((mean * measured).sum() / measured.square().sum()) == pytest.approx(slope, abs=0.03)
    assert (mean - truth).square().mean() < 0.065  # the posterior's variance is 0.045, the measurement's 0.09
    assert 0.15 < float(torch.stack(draws).std(dim=0).mean()) < 0.22


def test_expected_data_of_a_normal_prior_are_those_of_the_closed_form(monkeypatch: pytest.MonkeyPatch) -> None:
    """Six correlated normal numbers of which two sums are measured: what is expected of them solves a linear equation."""
    generator = seeded()
    factor = torch.randn(6, 6, generator=generator, dtype=torch.float64)
    spread = factor @ factor.T / 6
    seen, sigma, std = torch.randn(2, 6, generator=generator, dtype=torch.float64), 0.7, 0.3
    x, measured = (torch.randn(3, size, 1, 1, generator=generator, dtype=torch.float64) for size in (6, 2))
    noisy = spread + sigma**2 * torch.eye(6, dtype=torch.float64)

    def denoise(x: Tensor) -> Tensor:
        return (spread @ torch.linalg.solve(noisy, x.flatten(1).T)).T.view(x.shape)

    def observe(data: Tensor) -> Tensor:
        return (data.flatten(1) @ seen.T)[..., None, None]

    precision = spread.inverse() + torch.eye(6, dtype=torch.float64) / sigma**2 + seen.T @ seen / std**2
    both = x.flatten(1) / sigma**2 + measured.flatten(1) @ seen / std**2
    expected = torch.linalg.solve(precision, both.T).T
    found = posterior.expected_data(
        x, sigma, denoise, posterior.Measurement(observe, measured, std), 0
    )  # two numbers measured: two steps
    assert torch.allclose(found.flatten(1), expected, atol=1e-8)
    monkeypatch.setattr(posterior, "GRADIENT_STEPS", 1)
    fewer = posterior.expected_data(x, sigma, denoise, posterior.Measurement(observe, measured, std), 0)
    assert not torch.allclose(fewer.flatten(1), expected, atol=1e-2)


def test_a_derivative_that_is_no_covariance_moves_no_image_farther_than_believable() -> None:
    """A rotation by nearly a right angle: gradients see hardly any covariance along a measurement, and a step explodes."""
    turn = torch.tensor([[1e-6, -1.0], [1.0, 1e-6]])

    def denoise(x: Tensor) -> Tensor:
        return (x.flatten(1) @ turn.T).view(x.shape)

    x, measured = torch.zeros(1, 2, 1, 1), torch.ones(1, 1, 1, 1)
    found = posterior.expected_data(x, 1.0, denoise, posterior.Measurement(lambda data: data[:, :1], measured, 0.02), 0)
    assert found.square().mean().sqrt() <= posterior.MOST_DEVIATIONS * 0.5**0.5 + 1e-6


def test_conjugate_gradients_solve_for_each_image_and_go_no_way_that_bends_down() -> None:
    matrices = torch.randn(4, 5, 5, generator=seeded(), dtype=torch.float64)
    matrices = matrices @ matrices.mT + torch.eye(5)
    wanted = torch.randn(4, 5, generator=seeded(1), dtype=torch.float64)
    found = posterior.conjugate_gradients(lambda v: torch.einsum("bij,bj->bi", matrices, v), wanted, 5)
    assert torch.allclose(found, torch.linalg.solve(matrices, wanted), atol=1e-8)
    assert not posterior.conjugate_gradients(lambda v: -v, wanted, 3).any()


class Enumerated(nn.Module):
    """A prior of 2x2 indices below 3 of which the probability of all 81 is known; asked of one place given the others."""

    mask_index = 3

    def __init__(self) -> None:
        super().__init__()
        self.every = torch.cartesian_prod(*[torch.arange(3)] * 4)  # (81, 4)
        self.share = nn.Parameter((torch.randn(81, generator=seeded(5))).softmax(dim=0), requires_grad=False)
        self.config = SimpleNamespace(is_conditional=False)

    def forward(self, indices: Tensor, labels: Tensor) -> Tensor:
        fits = ((indices.unsqueeze(1) == self.every) | (indices == 3).unsqueeze(1)).all(dim=2) * self.share  # (B, 81)
        return torch.einsum("bn,nlk->blk", fits, nn.functional.one_hot(self.every, 3).float()).log()


class Stacked(Patches):
    """Two indices to a code, side by side: their numbers, the second a third as much, are added."""

    def decode_indices(self, indices: Tensor) -> Tensor:
        codes = self.quantizer.indices_to_codes(indices)
        return self.decoder(codes[..., 0::2] + codes[..., 1::2] / 3)


@pytest.mark.parametrize("tokenizer", [Patches, Stacked])
def test_resampled_indices_come_as_often_as_prior_and_measurement_say(tokenizer: type[Patches]) -> None:
    columns = 2 if tokenizer is Patches else 1
    prior, spec = Enumerated(), spec_of(3, (1, 2, columns)).model_copy(update={"index_grid": (2, 2)})
    system, std = System(tokenizer(3).eval(), prior, spec, "indices", "toy"), 0.8
    measured = torch.tensor([[0.3, -0.6], [0.9, 0.1]])[:, :columns].reshape(1, 1, 2, columns)

    def observe(images: Tensor) -> Tensor:
        return nn.functional.avg_pool2d(images, 2)

    likelihood = -(observe(system.decode(prior.every.view(-1, 2, 2))) - measured).square().sum(dim=(1, 2, 3))
    expected = (prior.share.log() + likelihood / (2 * std**2)).softmax(dim=0)
    count, start = 20_000, torch.randint(3, (20_000, 2, 2), generator=seeded(2))
    null, repeated = system.null_labels(count), measured.expand(count, -1, -1, -1)
    drawn = posterior.resampled(start, null, system, posterior.Measurement(observe, repeated, std), 12, 3, seeded(3))
    places = (drawn.flatten(1) * torch.tensor([27, 9, 3, 1])).sum(dim=1)
    found = torch.bincount(places, minlength=81) / count
    assert (found - expected).abs().sum() / 2 < 0.04  # of which 81 numbers of so many draws have .022
    assert (prior.share - expected).abs().sum() / 2 > 0.15  # the measurement matters


@pytest.mark.parametrize("per_code", [1, 3])
def test_each_sweep_draws_every_index_once_and_no_two_of_neighboring_codes_at_once(
    per_code: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = spec_of(3, (1, 6, 9)).model_copy(update={"index_grid": (6, 9 * per_code)})
    system = System(Patches(3).eval(), Enumerated(), spec, "indices", "toy")
    asked = []

    def recorded(places: Tensor, indices: Tensor, *rest: Any) -> Tensor:
        misfit = rest[2]
        assert misfit.keywords["nearby"][0].shape[0] == 6 and misfit.keywords["nearby"][1].shape[0] == 9
        owners = misfit.keywords["nearby"][1].argmax(dim=1)  # (9,) which column of places a column of codes belongs to
        columns = (places % (9 * per_code)).unique() // per_code
        assert (owners[columns] == torch.arange(len(columns))).all()
        asked.append(places)
        return indices

    monkeypatch.setattr(posterior, "_drawn_at", recorded)
    indices = torch.zeros(1, 6, 9 * per_code).long()
    posterior.resampled(
        indices, system.null_labels(1), system, posterior.Measurement(lambda x: x, torch.zeros(1), 1.0), 1, 2, seeded()
    )
    assert torch.equal(torch.cat(asked).sort().values, torch.arange(6 * 9 * per_code))
    for places in asked:
        rows, columns = places // (9 * per_code), places % (9 * per_code) // per_code
        apart = torch.maximum((rows.unsqueeze(1) - rows).abs(), (columns.unsqueeze(1) - columns).abs())
        assert (apart + 9 * torch.eye(len(places))).min() >= posterior.SPACING


def test_a_measurement_is_parted_among_the_places_nearest_to_it() -> None:
    images, measured = some_images(3), torch.zeros(3, 1, 4, 4)
    rows, columns = torch.tensor([1, 5]), torch.tensor([0, 4])
    nearby = posterior._nearest(rows, 8), posterior._nearest(columns, 8)
    observe = partial(enhance.damaged, config=enhance.Config(damage="downsample", factor=2))
    error = (observe(images) - measured).square()[:, 0] / 2  # (3, 4, 4), each for 2x2 cells
    found = posterior._misfit_around(images, nearby, posterior.Measurement(observe, measured, 1.0))
    rows, columns = error.new_tensor([[1, 1, 0, 0], [0, 0, 1, 1]]), error.new_tensor([[1, 0.5, 0, 0], [0, 0.5, 1, 1]])
    assert torch.allclose(found.view(3, 2, 2), rows @ error @ columns.T, atol=1e-5)  # the third column of cells is 0's


def test_what_a_masked_prior_makes_of_noisy_images_explains_the_noise_about_as_well_as_the_images_themselves() -> None:
    system = discrete_system("masked", size=8)
    images = system.decode(torch.randint(8, (16, 4, 4), generator=seeded(1)))
    config = enhance.Config(damage="noise", noise_std=0.5, pixel_std=0.01, sweeps=3, trust=1.0)
    measured = enhance.measure(images, config, seeded())
    drawn = enhance.edit(measured, torch.zeros(16).long(), system, config, sampling_of(system), seeded(), (8, 8))
    misfit = [float((one - measured).square().mean()) for one in (drawn, images)]
    assert misfit[0] < 1.3 * misfit[1]


# Restyling, variations, interpolation ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SYSTEMS)
@pytest.mark.parametrize("module", [restyle, variations])
def test_strength_leads_from_the_image_itself_farther_and_farther_away(name: str, module: Any) -> None:
    system, images = SYSTEMS[name](), some_images(24)
    if system.learns == "indices":
        images = system.decode(system.encode(images))  # what decoding alone changes is no distance
    distances = []
    for strength in (0.0, 0.25, 0.5, 1.0):
        config = module.Config(strength=strength)
        edited = module.edit(images, torch.zeros(24).long(), system, config, sampling_of(system), seeded())
        distances.append(float((edited - images).square().mean()))
    assert distances[0] == 0.0
    assert distances == sorted(distances) and distances[1] > 0


def test_indices_that_speak_against_the_label_are_drawn_first_though_they_suit_their_neighbors() -> None:
    """A prior that likes what it sees most of, and label 1 code 3: of twelve 0 and four 3, the 0 are to go."""
    system = discrete_system("masked")
    prior = system.prior

    def predict(given: Tensor, labels: Tensor) -> Tensor:
        seen = torch.stack([(given == code).float().mean(dim=1) for code in range(4)], dim=1)
        liked = (
            3 * nn.functional.one_hot(torch.tensor([0, 3, 0])[labels], 4) * (labels != prior.null_label).unsqueeze(1)
        )
        return (10 * seen + liked).unsqueeze(1).expand(-1, given.shape[1], -1)

    prior.forward = predict
    indices = torch.zeros(2, 4, 4, dtype=torch.long)
    indices[:, 3] = 3
    unlikely = restyle.unlikeliness(indices, torch.ones(2).long(), system, seeded())
    assert unlikely[:, :3].min() > unlikely[:, 3].max()


def test_a_style_is_the_statistics_of_the_reference_s_channels() -> None:
    latents, reference = torch.randn(3, 2, 6, 6), 3 * torch.randn(1, 2, 6, 6) + 1
    styled = restyle.with_statistics(latents, reference)
    assert torch.allclose(styled.mean(dim=(2, 3)), reference.mean(dim=(2, 3)).expand(3, -1), atol=1e-5)
    assert torch.allclose(styled.std(dim=(2, 3)), reference.std(dim=(2, 3)).expand(3, -1), atol=1e-5)


def test_a_target_that_is_no_class_is_refused() -> None:
    system, images = gaussian_system(), some_images(1)
    with pytest.raises(ValueError, match="restyle.target is 2, but there are 2 classes: expected 0 to 1"):
        restyle.edit(images, torch.zeros(1).long(), system, restyle.Config(target=2), None, seeded())


@pytest.mark.parametrize("name", SYSTEMS)
def test_interpolation_begins_at_one_image_and_ends_at_the_other(name: str) -> None:
    system, images = SYSTEMS[name](), some_images(4)
    others, labels = images.flip(0), torch.zeros(4).long()

    def at(share: float) -> Tensor:
        config = interpolate.Config()
        return interpolate.edit(images, labels, system, config, sampling_of(system), seeded(), others, share)

    assert torch.equal(at(0), images) and torch.equal(at(1), others)
    near, far = ((at(0.2) - end).square().mean() for end in (images, others))
    assert near < far


# Refusals -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [kind for kind in EDITS if kind != "interpolate"])
def test_what_a_gan_cannot_do_is_refused_naming_the_priors_that_can(kind: str) -> None:
    system, images = gan_system(), some_images(2)
    with pytest.raises(
        CannotEdit, match=r"toy-gan cannot .*: its prior gan .* choose a system with a .*(diffusion|masked)"
    ):
        EDITS[kind].trial(images, torch.zeros(2).long(), system, EDITS[kind].Config(), None, seeded())


def test_enhancement_by_a_left_to_right_prior_is_refused() -> None:
    system = discrete_system("autoregressive")
    with pytest.raises(CannotEdit, match="its prior autoregressive .* a diffusion, flow or masked prior"):
        enhance.trial(some_images(2), torch.zeros(2).long(), system, enhance.Config(), sampling_of(system), seeded())


def test_settings_are_checked() -> None:
    with pytest.raises(InvalidParams, match="strength"):
        parse(restyle.Config, {"kind": "restyle", "strength": 1.5}, "edits.restyle")
    with pytest.raises(InvalidParams, match="damage noise with noise_std 0 is no damage"):
        parse(enhance.Config, {"kind": "enhance", "noise_std": 0.0}, "edits.denoise")


def test_baselines_of_inpainting_differ_and_keep_known_pixels() -> None:
    system, images = discrete_system("masked"), some_images()
    trial = inpaint.trial(images, torch.zeros(6).long(), system, inpaint.Config(), sampling_of(system), seeded())
    hole = trial.mask.unsqueeze(1)
    fills = [baseline[hole] for baseline in trial.baselines.values()]
    assert all(torch.equal(baseline[~hole], images[~hole]) for baseline in trial.baselines.values())
    assert not any(torch.allclose(a, b) for a, b in itertools.combinations(fills, 2))
    assert torch.equal(trial.given[hole], torch.full_like(fills[0], -1))

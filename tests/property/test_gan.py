"""The GAN prior: its losses and penalties by their definitions, which phase moves which weights, and a known truth learnt."""

import math
import signal

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tessera.components import parse
from tessera.contracts import TokenBatch, TokenSpec
from tessera.nn.adversarial_networks import levels_of
from tessera.nn.augmentation import augmented
from tessera.priors import gan
from tessera.running.job import Job, Stopped
from tessera.training.loop import fit


def spec(shape=(3, 4, 2), num_classes=3) -> TokenSpec:
    return TokenSpec(
        codebook_size=None,
        latent_shape=shape,
        index_grid=shape[1:],
        num_classes=num_classes,
        class_counts=(1,) * num_classes,
        latent_mean=(0.2,) * shape[0],
        latent_std=(0.5,) * shape[0],
        tokenizer_fingerprint="0" * 64,
    )


def objective(shape=(3, 4, 2), training=None, **changes) -> gan.Objective:
    small = {"kind": "gan", "channels": 8, "noise_dim": 5, "smallest_side": 2, "training": {"num_steps": 9}}
    config = parse(gan.Config, {**small, **changes, "training": {**small["training"], **(training or {})}})
    torch.manual_seed(0)
    parts = gan.Objective(gan.Model(config, spec(shape)), config)
    for parameter in parts.parameters():  # branches that start at zero would hide mistakes
        nn.init.normal_(parameter, std=0.3)
    return parts


def batch(shape=(3, 4, 2), size=6) -> TokenBatch:
    generator = torch.Generator().manual_seed(1)
    return TokenBatch(torch.randn(size, *shape, generator=generator), torch.arange(size) % 3)


DCGAN = {
    "loss": "non_saturating",
    "normalization": "batch",
    "num_blocks": 0,
    "r1_weight": 0.0,
    "r2_weight": 0.0,
}


@pytest.mark.parametrize(
    ("shape", "patch_size", "grids"),
    [
        ((1, 28, 28), 1, [(28, 28), (14, 14), (7, 7)]),
        ((1, 28, 28), 4, [(7, 7)]),
        ((1, 8, 8), 1, [(8, 8), (4, 4)]),
        ((1, 18, 18), 1, [(18, 18), (9, 9)]),
        ((3, 32, 32), 2, [(16, 16), (8, 8), (4, 4)]),
        ((3, 8, 16), 1, [(8, 16), (4, 8)]),
        ((3, 12, 20), 3, [(4, 6)]),
        ((2, 1, 1), 1, [(1, 1)]),
        ((1, 8, 8), 8, [(1, 1)]),
    ],
)
def test_the_networks_take_any_grid(shape, patch_size, grids):
    if shape == (3, 12, 20):
        with pytest.raises(ValueError, match="12x20 are not divisible by patch_size 3"):
            levels_of(shape, patch_size, 8, 16, 4)
        return
    levels = levels_of(shape, patch_size, 8, 16, 4)
    assert [(level.height, level.width) for level in levels] == grids
    assert [level.channels for level in levels] == [8, 16, 16][: len(grids)]
    parts = objective(shape, patch_size=patch_size, smallest_side=4)
    noise, labels = torch.randn(2, 5), torch.tensor([0, 2])
    latents = parts.model(noise, labels)
    assert latents.shape == (2, *shape)
    assert parts.discriminator(latents, labels).shape == (2,)


def test_the_relativistic_losses_in_closed_form():
    real, fake = torch.tensor([2.0, -1.0]), torch.tensor([0.5, 1.0])
    of_discriminator = (math.log(1 + math.exp(-1.5)) + math.log(1 + math.exp(2.0))) / 2
    of_generator = (math.log(1 + math.exp(1.5)) + math.log(1 + math.exp(-2.0))) / 2
    assert gan.discriminator_loss(real, fake, "relativistic").item() == pytest.approx(of_discriminator)
    assert gan.generator_loss(real, fake, "relativistic").item() == pytest.approx(of_generator)
    assert gan.discriminator_loss(real + 7, fake + 7, "relativistic").item() == pytest.approx(of_discriminator)
    assert gan.accuracy(real, fake, "relativistic") == 0.5


def test_the_non_saturating_losses_are_cross_entropies():
    real, fake = torch.tensor([2.0, -1.0]), torch.tensor([0.5, 1.0])
    ones = torch.ones(2)
    expected = F.binary_cross_entropy_with_logits(real, ones) + F.binary_cross_entropy_with_logits(fake, 0 * ones)
    torch.testing.assert_close(gan.discriminator_loss(real, fake, "non_saturating"), expected)
    expected = F.binary_cross_entropy_with_logits(fake, ones)
    torch.testing.assert_close(gan.generator_loss(real, fake, "non_saturating"), expected)
    assert gan.accuracy(real, fake, "non_saturating") == 0.25


def slopes(discriminator, inputs, labels) -> torch.Tensor:
    """(B, D * h * w) by central differences, each image alone."""
    rows = []
    for image, label in zip(inputs, labels, strict=True):
        row = []
        for place in range(image.numel()):
            ends = []
            for sign in (1, -1):
                moved = image.clone()
                moved.view(-1)[place] += sign * 1e-6
                ends.append(discriminator(moved[None], label[None]).item())
            row.append((ends[0] - ends[1]) / 2e-6)
        rows.append(row)
    return torch.tensor(rows, dtype=torch.float64)


def test_the_penalty_is_the_mean_squared_slope_of_each_logit():
    parts, (inputs, labels) = objective().double(), batch()
    inputs = inputs.double().requires_grad_()
    found = gan.gradient_penalty(parts.discriminator(inputs, labels), inputs)
    with torch.no_grad():
        expected = slopes(parts.discriminator, inputs, labels).square().sum(dim=1).mean()
    assert found.item() == pytest.approx(expected.item(), rel=1e-4)


def test_the_penalty_moves_the_discriminator_as_its_definition_says():
    """The second derivative: the penalty's gradient by a weight, against the penalty at two values of the weight."""
    parts, (inputs, labels) = objective().double(), batch()
    inputs = inputs.double().requires_grad_()
    weight = parts.discriminator.to_features.weight
    gan.gradient_penalty(parts.discriminator(inputs, labels), inputs).backward()
    values = []
    for sign in (1, -1):
        weight.data[0, 0] += sign * 1e-5
        values.append(gan.gradient_penalty(parts.discriminator(inputs, labels), inputs).item())
        weight.data[0, 0] -= sign * 1e-5
    assert weight.grad[0, 0].item() == pytest.approx((values[0] - values[1]) / 2e-5, rel=1e-5)


def judged(parts: gan.Objective, step: int) -> dict[str, torch.Tensor]:
    parts._pending = [torch.full_like(batch().tokens, 0.3)]
    return parts(batch(), "discriminator", step)


def test_r1_is_of_real_and_r2_of_generated_images_and_each_is_weighed_by_half_its_gamma():
    parts, plain = objective(r1_weight=3.0, r2_weight=5.0), objective(r1_weight=0.0, r2_weight=0.0)
    terms, labels = judged(parts, 0), batch().labels
    with torch.no_grad():
        double = objective().double().discriminator
        r1 = slopes(double, batch().tokens.double(), labels).square().sum(dim=1).mean()
        r2 = slopes(double, torch.full((6, 3, 4, 2), 0.3, dtype=torch.float64), labels).square().sum(dim=1).mean()
    assert terms["r1_penalty"].item() == pytest.approx(r1.item(), rel=1e-3)
    assert terms["r2_penalty"].item() == pytest.approx(r2.item(), rel=1e-3)
    added = terms["loss"] - judged(plain, 0)["loss"]
    assert added.item() == pytest.approx((1.5 * r1 + 2.5 * r2).item(), rel=1e-3)


def test_lazy_penalties_add_up_to_those_of_every_step_and_the_last_ones_are_plotted():
    every, lazy, none = objective(), objective(penalty_interval=4), objective(r1_weight=0.0, r2_weight=0.0)
    losses = {
        name: sum(judged(parts, step)["loss"].item() for step in range(8))
        for name, parts in {"every": every, "lazy": lazy, "none": none}.items()
    }
    assert losses["every"] - losses["none"] > 0.1
    assert losses["lazy"] == pytest.approx(losses["every"], rel=1e-5)
    assert judged(lazy, 1)["loss"] == judged(none, 1)["loss"]  # nothing is added between
    assert judged(lazy, 1)["r1_penalty"] == judged(lazy, 4)["r1_penalty"] > 0


@pytest.mark.parametrize("settings", [{}, {"augmentation": "warp"}, {"augmentation": "translate_cutout"}, DCGAN])
def test_each_phase_moves_its_own_weights_only(settings):
    parts = objective(**settings)
    parts(batch(), "generator", 0)["loss"].backward()
    assert all(p.grad is None for p in parts.discriminator.parameters())
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in parts.model.generator.layers.parameters())
    parts.zero_grad(set_to_none=True)
    parts(batch(), "discriminator", 0)["loss"].backward()
    assert all(p.grad is None for p in parts.model.parameters())
    assert all(p.requires_grad and p.grad is not None for p in parts.discriminator.parameters())
    assert parts.discriminator.to_features.weight.grad.abs().sum() > 0
    assert not parts._pending


def test_the_discriminator_judges_what_the_generator_drew_for_the_same_labels():
    parts = objective(r1_weight=0.0, r2_weight=0.0)
    seen = []
    parts.discriminator.register_forward_hook(lambda module, inputs, output: seen.append(inputs))
    parts(batch(), "generator", 0)
    assert not parts._pending[0].requires_grad  # or the generator's graph would be kept until then
    parts(batch(), "discriminator", 0)
    (fake, _), (real, _), (real_again, _), (fake_again, labels) = seen
    assert torch.equal(fake, fake_again) and torch.equal(real, real_again) and not torch.equal(real, fake)
    assert torch.equal(labels, batch().labels)


def test_both_networks_hear_the_label_and_an_unconditional_gan_does_not():
    noise, latents = torch.randn(2, 5), batch(size=2).tokens
    for is_conditional in (True, False):
        parts = objective(is_conditional=is_conditional)
        drawn = [parts.model(noise, torch.full((2,), label)) for label in (0, 2)]
        assert torch.equal(*drawn) is not is_conditional
        shown = gan.condition(torch.full((2,), 2), parts.config)
        logits = [parts.discriminator(latents, labels) for labels in (torch.zeros(2, dtype=torch.long), shown)]
        assert torch.equal(*logits) is not is_conditional


def test_the_label_is_heard_by_projection():
    """Equation 3 of Miyato and Koyama: between two labels the logit differs by the features' product with their vectors."""
    parts, latents = objective(), batch(size=1).tokens
    discriminator = parts.discriminator
    flat = discriminator.layers(latents).flatten(1)
    features = F.leaky_relu(discriminator.to_features(flat), 0.2) / discriminator.to_features.out_features**0.5
    vectors = discriminator.label_embedding.weight
    found = discriminator(latents, torch.tensor([2])) - discriminator(latents, torch.tensor([0]))
    torch.testing.assert_close(found, features @ (vectors[2] - vectors[0]))


def test_blocks_start_as_the_identity_and_signals_keep_their_size():
    config = objective().config.model_copy(update={"num_blocks": 3})
    torch.manual_seed(0)
    parts = gan.Objective(gan.Model(config, spec((1, 16, 16))), config)
    drawn = parts.model(torch.randn(64, 5), torch.arange(64) % 3)
    assert 0.2 < drawn.std() < 5
    assert 0.1 < parts.discriminator(torch.randn(64, 1, 16, 16), torch.arange(64) % 3).std() < 5
    block = parts.discriminator.layers[2]
    x = torch.randn(2, 8, 16, 16)
    assert torch.equal(block(x), x)


def test_pixels_stay_in_their_range():
    parts = objective(output_range="pixels")
    latents = parts.model(100 * torch.randn(50, 5), torch.arange(50) % 3)
    pixels = latents * 0.5 + 0.2  # undoes the standardization of the spec
    assert pixels.abs().max() <= 1 + 1e-5 and pixels.abs().max() > 0.99


@pytest.mark.parametrize("truncation", [0.01, 0.5, 2.0, 50.0])
def test_truncated_noise_is_normal_between_its_bounds(truncation):
    noise = gan.draw_noise(400, 500, truncation, torch.Generator().manual_seed(0))
    assert noise.dtype == torch.float32 and noise.abs().max() <= truncation
    whole = torch.randn(4_000_000, generator=torch.Generator().manual_seed(1))
    kept = whole[whole.abs() <= truncation]
    for share in (0.1, 0.3, 0.5, 0.8):
        expected = kept[:200_000].quantile(share)
        assert noise.flatten().quantile(share).item() == pytest.approx(expected.item(), abs=0.02 * min(truncation, 1))


def test_truncated_noise_is_finite_at_the_very_end_of_its_distribution(monkeypatch):
    monkeypatch.setattr(torch, "rand", lambda *shape, dtype, **drawn: torch.zeros(shape, dtype=dtype))
    assert (gan.draw_noise(2, 3, 50.0, torch.Generator()) == -50).all()


def test_sampling_with_truncation_keeps_nearer_to_the_middle_and_none_is_off():
    model = objective().model
    labels = torch.zeros(64, dtype=torch.long)
    spread = [
        model.sample(labels, gan.Sampling(truncation=truncation), torch.Generator().manual_seed(0)).std(dim=0).mean()
        for truncation in (0.1, 1.0, None)
    ]
    assert spread[0] < spread[1] < spread[2]
    noise = torch.randn(64, 5, generator=torch.Generator().manual_seed(0))
    drawn = model.sample(labels, gan.Sampling(), torch.Generator().manual_seed(0))
    assert torch.equal(drawn, model(noise, labels))


@pytest.mark.parametrize("kind", ["warp", "translate_cutout"])
def test_augmentation_changes_the_asked_share_of_the_images_and_lets_gradients_through(kind):
    torch.manual_seed(0)
    images = torch.randn(2000, 1, 8, 6, requires_grad=True)
    changed = augmented(images, kind, 0.3)
    assert changed.shape == images.shape
    share = ((changed - images).abs().flatten(1).max(dim=1).values > 1e-4).float().mean().item()
    assert share == pytest.approx(0.3, abs=0.04)
    assert torch.equal(augmented(images, kind, 0.0), images) and torch.equal(augmented(images, "none", 1.0), images)
    changed.sum().backward()
    assert images.grad.abs().sum() > 0
    assert augmented(torch.randn(4, 2, 1, 1), kind, 1.0).isfinite().all()


def test_translation_moves_and_cutout_clears():
    torch.manual_seed(0)
    images = torch.arange(1.0, 65.0).view(1, 1, 8, 8).expand(500, 1, 8, 8)
    changed = augmented(images, "translate_cutout", 1.0)
    rows = torch.arange(1.0, 65.0).view(8, 8)
    moves = set()
    for image in changed[:, 0]:
        cleared = (image == 0).sum().item()
        assert 2 * 2 <= cleared <= 4 * 4 + 15  # a hole of half the sides, inside or not; a row and a column came in
        y, x = torch.nonzero(image)[0].tolist()
        source = torch.nonzero(rows == image[y, x])[0].tolist()
        moves.add((y - source[0], x - source[1]))
    assert moves == {(y, x) for y in (-1, 0, 1) for x in (-1, 0, 1)}


def test_the_discriminator_learns_at_its_own_rate_and_neither_has_momentum():
    optimizers = objective(discriminator_learning_rate_factor=0.25, training={"learning_rate": 0.004}).optimizers()
    rates = {phase: {group["lr"] for group in some[0].param_groups} for phase, some in optimizers.items()}
    assert rates == {"generator": {0.004}, "discriminator": {0.001}}
    assert all(some[0].defaults["betas"] == (0.0, 0.99) for some in optimizers.values())
    assert all(group["weight_decay"] == 0 for some in optimizers.values() for group in some[0].param_groups)


class Rows:
    def __init__(self, tokens, labels, on_step=None):
        self.tokens, self.labels, self.on_step, self.calls = tokens, labels, on_step, 0

    def __len__(self):
        return len(self.labels)

    def stored(self, rows, generator=None):
        return TokenBatch(self.tokens[rows], self.labels[rows])

    def batch_of(self, stored):
        self.calls += 1
        if self.on_step:
            self.on_step(self.calls)
        return stored


def test_accumulated_gradients_are_those_of_the_whole_batch(tmp_path, monkeypatch):
    """Losses, pairs and penalties are means over images, so means over micro-batches are the same; noise held still."""
    data = batch()
    monkeypatch.setattr(torch, "randn", lambda rows, width, device=None: torch.ones(rows, width))
    trained = []
    for parts in (1, 3):
        whole = objective(training={"batch_size": 6, "gradient_accumulation": parts, "num_steps": 3})
        job = Job("x", tmp_path / str(parts))
        job.resumable()
        fit(whole, Rows(*data), whole.config.training, seed=0, job=job)
        trained.append(whole)
    for a, b in zip(trained[0].parameters(), trained[1].parameters(), strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("settings", [{"penalty_interval": 2}, DCGAN], ids=["r3gan", "dcgan"])
def test_both_gans_train_in_both_precisions_and_both_networks_move(settings, precision, job):
    parts = objective(training={"batch_size": 6, "precision": precision, "num_steps": 4}, **settings)
    before = {name: value.clone() for name, value in parts.named_parameters()}
    job.resumable()
    fit(parts, Rows(*batch()), parts.config.training, seed=0, job=job)
    # A constant before a batch norm or before a difference of logits has no effect, and no gradient
    still = [name for name, value in parts.named_parameters() if torch.equal(before[name], value)]
    assert all(name.endswith("bias") for name in still), still
    lines = (job.state / "history.csv").read_text().splitlines()
    columns = "loss,discriminator_loss,real_logits,fake_logits,r1_penalty,r2_penalty,discriminator_accuracy"
    assert lines[0] == f"step,{columns},learning_rate" and len(lines) == 5


@pytest.mark.parametrize("stop_at", [1, 3])
def test_a_gan_stopped_and_resumed_is_bit_identical(stop_at, tmp_path):
    """Stopped between two penalties, whose plotted values must come back too."""

    def train(name, **data):
        torch.manual_seed(9)
        parts = objective(training={"batch_size": 4, "num_steps": 6}, penalty_interval=2, augmentation="warp")
        job = Job("x", tmp_path / name)
        job.resumable({"of": "inputs"})
        model = fit(parts, Rows(*batch(), **data), parts.config.training, seed=5, job=job)
        return model.state_dict(), parts.state_dict(), (job.state / "history.csv").read_bytes()

    whole = train("whole")
    stopping = Job("x", tmp_path / "parts")
    parts = objective(training={"batch_size": 4, "num_steps": 6}, penalty_interval=2, augmentation="warp")
    stopping.resumable({"of": "inputs"})
    data = Rows(*batch(), on_step=lambda call: stopping.request_stop(signal.SIGTERM) if call == stop_at else None)
    with pytest.raises(Stopped):
        fit(parts, data, parts.config.training, seed=5, job=stopping)
    again = train("parts")
    assert whole[2] == again[2]
    for before, after in zip(whole[:2], again[:2], strict=True):
        for name, value in before.items():
            assert torch.equal(value, after[name]), name


def sliced_wasserstein(a, b, num_directions=64):
    angles = torch.linspace(0, torch.pi, num_directions + 1)[:-1]
    directions = torch.stack([angles.cos(), angles.sin()])
    return float(((a @ directions).sort(dim=0).values - (b @ directions).sort(dim=0).values).abs().mean())


def test_the_gan_learns_a_mixture_in_two_dimensions_with_every_mode(job):
    """Three clusters per label: samples lie on the label's clusters, none is forgotten, in about the right shares."""
    generator = torch.Generator().manual_seed(0)
    centers = torch.tensor([[[-1.5, 0.0], [1.5, 1.0], [0.5, -1.5]], [[1.5, -1.0], [-1.0, 1.5], [0.0, 0.0]]])
    shares = torch.tensor([0.5, 0.3, 0.2])
    labels = torch.arange(6000) % 2

    def draw(labels):
        which = torch.multinomial(shares, len(labels), replacement=True, generator=generator)
        return centers[labels, which] + 0.15 * torch.randn(len(labels), 2, generator=generator)

    config = parse(
        gan.Config,
        {
            "kind": "gan",
            "channels": 64,
            "noise_dim": 4,
            "hidden_dim": 64,
            "r1_weight": 0.1,
            "r2_weight": 0.1,
            "training": {"num_steps": 900, "batch_size": 128, "learning_rate": 2e-3, "ema_decay": 0.99},
        },
    )
    job.resumable()
    torch.manual_seed(0)
    objective = gan.Objective(gan.Model(config, spec((2, 1, 1), 2)), config)
    model = fit(objective, Rows(draw(labels).view(-1, 2, 1, 1), labels), config.training, seed=0, job=job)
    asked = torch.arange(4000) % 2
    found = model.sample(asked, gan.Sampling(), torch.Generator().manual_seed(1)).view(-1, 2)
    for label in range(2):
        mine = found[asked == label]
        real = sliced_wasserstein(draw(asked[asked == label]), draw(asked[asked == label]))
        assert sliced_wasserstein(mine, draw(asked[asked == label])) < 3 * real + 0.06
        assert sliced_wasserstein(mine, draw(asked[asked != label])) > 0.3  # labels matter
        distances = torch.cdist(mine, centers[label])
        nearest, which = distances.min(dim=1)
        assert (nearest < 0.6).float().mean() > 0.8  # within 4 deviations; a continuous map must pass between clusters
        found_shares = torch.bincount(which[nearest < 0.6], minlength=3) / len(mine)
        assert (found_shares > 0.25 * shares).all(), found_shares  # no mode is forgotten

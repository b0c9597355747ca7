"""Feature networks: shapes, invariances, learning, and Inception-v3 against torch-fidelity's own extractor.

There are no published Inception-v3 weights in these tests: random ones of the same names and shapes stand in for them,
which shows that the network is wired and fed alike, not that a FID made with the true weights equals a published one.
"""

import hashlib
import math

import pytest
import safetensors.torch
import torch

from tessera.components import InvalidParams, parse
from tessera.contracts import ImageBatch, ImageSpec
from tessera.features import classifier, inception, random
from tessera.optimization import Training

SHAPES = [(1, 8, 8), (3, 28, 28), (1, 12, 40), (2, 5, 7), (3, 64, 48), (1, 1, 3)]


def spec(channels: int = 1, height: int = 8, width: int = 8, num_classes: int = 4) -> ImageSpec:
    names = tuple(str(number) for number in range(num_classes))
    return ImageSpec(
        name="dots",
        channels=channels,
        height=height,
        width=width,
        num_classes=num_classes,
        class_names=names,
        licence="none",
    )


def images(*shape: int, seed: int = 0) -> torch.Tensor:
    return 2 * torch.rand(*shape, generator=torch.Generator().manual_seed(seed)) - 1


def small_classifier(shape: tuple[int, int, int] = (1, 8, 8), **settings) -> classifier.Model:
    return classifier.Model(classifier.Config(channels=8, feature_dim=12, **settings), spec(*shape)).eval()


# Classifier and random features


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("batch", [1, 3])
def test_features_have_the_promised_shape_and_depend_on_each_image_alone(shape, batch):
    networks = [small_classifier(shape), random.Model(random.Config(channels=8, feature_dim=12), spec(*shape))]
    some = images(batch, *shape)
    for network in networks:
        found = network.features(some)
        assert found.shape == (batch, 12)
        assert network.feature_dim == 12
        assert found.dtype == torch.float32
        alone = torch.cat([network.features(image[None]) for image in some])
        torch.testing.assert_close(found, alone, rtol=1e-4, atol=1e-5)
        if batch > 1:
            assert (found[0] - found[1]).abs().max() > 1e-3
    assert networks[0].logits(some).shape == (batch, 4)
    assert [network.has_logits for network in networks] == [True, False]


def test_classifier_refuses_images_without_labels():
    with pytest.raises(ValueError, match="dots has no labels.*use features of kind random"):
        classifier.Model(classifier.Config(), spec(num_classes=1))


def test_classifier_learns_shapes_from_few_images():
    def batch(number: int) -> ImageBatch:
        """Bars, horizontal or vertical, bright on dark or dark on bright, under noise."""
        generator = torch.Generator().manual_seed(number)
        labels = torch.randint(4, (32,), generator=generator)
        place = torch.randint(1, 7, (32,), generator=generator)
        pictures = -torch.ones(32, 1, 8, 10)
        for picture, label, where in zip(pictures, labels.tolist(), place.tolist(), strict=True):
            (picture[0, where] if label % 2 else picture[0, :, where]).fill_(1)
            if label >= 2:
                picture.neg_()
        noise = 0.2 * torch.randn(pictures.shape, generator=generator)
        return ImageBatch((pictures + noise).clamp(-1, 1), labels)

    torch.manual_seed(0)
    settings = Training(num_steps=60, batch_size=32, learning_rate=5e-3)
    config = classifier.Config(channels=8, feature_dim=12, training=settings)
    objective = classifier.Objective(classifier.Model(config, spec(width=10)), config)
    assert list(objective.optimizers()) == list(objective.phases)
    optimizers = objective.optimizers()["classifier"]
    for step in range(settings.num_steps):
        terms = objective(batch(step), "classifier", step)
        assert set(terms) == {"loss", "accuracy"}
        terms["loss"].backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    fresh = batch(10**6)
    accuracy = (objective.model.logits(fresh.images).argmax(dim=1) == fresh.labels).float().mean()
    assert accuracy > 0.9


def test_every_weight_of_the_classifier_receives_a_gradient():
    torch.manual_seed(0)
    model = small_classifier((3, 28, 20))
    for block in model.modules():  # they start at 0, which holds back the gradient of what is before them
        if isinstance(block, classifier.Block):
            torch.nn.init.normal_(block.residual[-1].weight, std=0.1)
    objective = classifier.Objective(model, classifier.Config(channels=8, feature_dim=12))
    objective(ImageBatch(images(6, 3, 28, 20), torch.arange(6) % 4), "classifier", 0)["loss"].backward()
    assert [name for name, weight in model.named_parameters() if weight.grad is None or not weight.grad.any()] == []


def test_warps_follow_the_global_generator_and_strength_0_leaves_images_as_they_are():
    some = images(4, 2, 9, 14)
    torch.manual_seed(5)
    first = classifier.warped(some, 1.0)
    torch.manual_seed(5)
    again, other = classifier.warped(some, 1.0), classifier.warped(some, 1.0)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    torch.testing.assert_close(classifier.warped(some, 0.0), some, rtol=0, atol=1e-5)
    assert first.shape == some.shape


def test_a_warp_moves_a_dot_no_further_than_it_may_and_keeps_circles_round():
    height, width = 40, 80
    rows, cols = torch.meshgrid(torch.arange(height) + 0.5, torch.arange(width) + 0.5, indexing="ij")
    disc = ((rows - 20) ** 2 + (cols - 40) ** 2 < 15**2).float()[None, None]
    torch.manual_seed(0)
    found = classifier.warped(disc.expand(200, 1, height, width), 1.0)[:, 0]
    mass = found.sum(dim=(1, 2))
    row_shift = (found * rows).sum(dim=(1, 2)) / mass - 20
    col_shift = (found * cols).sum(dim=(1, 2)) / mass - 40
    # 5 % of each side, farther where the image is enlarged by 1 / 0.92 or a rotation turns one shift into the other
    down, across = 0.05 * height, 0.05 * width
    assert 0.9 * down < row_shift.abs().max() < (down + 0.1 * across) / 0.92
    assert 0.9 * across < col_shift.abs().max() < (across + 0.1 * down) / 0.92
    assert (mass / disc.sum()).min() > 0.92**2 / 1.05
    assert (mass / disc.sum()).max() < 1.09**2 * 1.05
    dy = rows - 20 - row_shift[:, None, None]
    dx = cols - 40 - col_shift[:, None, None]
    yy, xx, xy = ((found * product).sum(dim=(1, 2)) / mass for product in (dy * dy, dx * dx, dx * dy))
    torch.testing.assert_close(yy, xx, rtol=0.03, atol=0)
    assert (xy / xx).abs().max() < 0.02  # a shear would tilt it


def test_a_warp_rotates_by_up_to_a_tenth_of_a_radian_in_pixels():
    height, width = 40, 80
    rows, cols = torch.meshgrid(torch.arange(height) - 19.5, torch.arange(width) - 39.5, indexing="ij")
    bar = torch.exp(-((rows / 1.5) ** 2) - (cols / 12) ** 2)[None, None]
    torch.manual_seed(0)
    found = classifier.warped(bar.expand(300, 1, height, width), 1.0)[:, 0]
    mass = found.sum(dim=(1, 2), keepdim=True)
    dy = rows - (found * rows).sum(dim=(1, 2), keepdim=True) / mass
    dx = cols - (found * cols).sum(dim=(1, 2), keepdim=True) / mass
    xy, xx, yy = ((found * product).sum(dim=(1, 2)) for product in (dx * dy, dx * dx, dy * dy))
    angles = 0.5 * torch.atan2(2 * xy, xx - yy)  # of the long axis
    assert 0.09 < angles.max() < 0.103
    assert -0.103 < angles.min() < -0.09


def test_label_smoothing_is_in_the_loss_and_warping_only_where_asked():
    model = small_classifier()
    batch = ImageBatch(images(5, 1, 8, 8), torch.arange(5) % 4)
    config = classifier.Config(channels=8, feature_dim=12, warp=0.0, label_smoothing=0.2)
    terms = classifier.Objective(model, config)(batch, "classifier", 0)
    log_likelihood = model.logits(batch.images).log_softmax(dim=1)
    target = torch.full((5, 4), 0.05)
    target[range(5), batch.labels] += 0.8
    assert terms["loss"].item() == pytest.approx(-(target * log_likelihood).sum(dim=1).mean().item(), rel=1e-5)
    expected = (log_likelihood.argmax(dim=1) == batch.labels).float().mean()
    assert terms["accuracy"].item() == pytest.approx(expected.item())


def test_random_weights_follow_from_the_seed_and_leave_the_global_generator_alone():
    torch.manual_seed(1)
    state = torch.get_rng_state()
    first = random.Model(random.Config(), spec(3, 16, 24))
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(2)
    again, other = (random.Model(random.Config(seed=seed), spec(3, 16, 24)) for seed in (0, 1))
    assert first.state_dict().keys() == again.state_dict().keys()
    assert all(torch.equal(weight, again.state_dict()[name]) for name, weight in first.state_dict().items())
    assert not any(torch.equal(weight, other.state_dict()[name]) for name, weight in first.state_dict().items())
    assert not any(weight.requires_grad for weight in first.parameters())


def test_random_features_move_further_the_more_an_image_changes():
    model = random.Model(random.Config(), spec(3, 32, 32))
    some, noise = images(20, 3, 32, 32, seed=1), images(20, 3, 32, 32, seed=2)
    moved = [(model.features(some + x * noise) - model.features(some)).norm(dim=1).mean() for x in (0.1, 0.3, 0.9)]
    assert 0 < moved[0] < moved[1] < moved[2]
    assert 0.1 < model.features(some).std(dim=0).mean() < 10  # neither vanished nor exploded


@pytest.mark.parametrize(
    ("config", "values"),
    [
        (classifier.Config, {"kind": "classifier", "channels": 12}),  # not divisible into groups
        (classifier.Config, {"kind": "classifier", "label_smoothing": 1.0}),
        (classifier.Config, {"kind": "classifier", "wrap": 1.0}),
        (random.Config, {"kind": "random", "seed": -1}),
        (inception.Config, {"kind": "inception", "weights": "w.safetensors", "sha256": "abc"}),
    ],
)
def test_impossible_settings_are_refused(config, values):
    with pytest.raises(InvalidParams):
        parse(config, values)


# Inception-v3


@pytest.fixture(scope="module")
def stand_in():
    """Random weights under the names and shapes of the published file, scaled so that activations neither die nor grow."""
    network = inception.Model(inception.Config(weights="-", sha256="0" * 64), spec(3))
    generator = torch.Generator().manual_seed(0)
    weights = {}
    for name, tensor in network.blocks.state_dict().items():
        if name.endswith("conv.weight"):
            scale = math.sqrt(2 / tensor[0].numel())
            weights[name] = scale * torch.randn(tensor.shape, generator=generator)
        elif name.endswith(("running_var", "bn.weight")):
            weights[name] = 0.8 + 0.4 * torch.rand(tensor.shape, generator=generator)
        elif name.endswith(("running_mean", "bn.bias")):
            weights[name] = 0.1 * torch.randn(tensor.shape, generator=generator)
        else:
            weights[name] = tensor.clone()
    weights["fc.weight"] = torch.randn(1008, 2048, generator=generator)
    weights["fc.bias"] = torch.randn(1008, generator=generator)
    return weights


def saved(weights, path) -> inception.Config:
    safetensors.torch.save_file(weights, path)
    return inception.Config(weights=str(path), sha256=hashlib.sha256(path.read_bytes()).hexdigest())


def test_inception_features_equal_those_of_torch_fidelity_under_equal_weights(stand_in, tmp_path):
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    config = saved(stand_in, tmp_path / "weights.safetensors")
    model = inception.Model(config, spec(3, 20, 30))
    inception.prepare(model, config)
    torch.save(stand_in, tmp_path / "weights.pth")  # for the other side, which reads nothing else
    other = FeatureExtractorInceptionV3("other", ["2048"], feature_extractor_weights_path=str(tmp_path / "weights.pth"))
    pixels = torch.randint(256, (2, 3, 20, 30), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    found = model.features(pixels.float() / 127.5 - 1)
    assert found.shape == (2, 2048)
    assert found.dtype == torch.float32
    assert found.std() > 1e-3
    torch.testing.assert_close(found, other(pixels)[0], rtol=1e-5, atol=1e-6)

    model.train()  # must change nothing
    gray = pixels[:1, :1].float() / 127.5 - 1
    torch.testing.assert_close(model.features(gray), model.features(gray.repeat(1, 3, 1, 1)), rtol=1e-5, atol=1e-6)
    restored = inception.Model(config, spec(3, 20, 30))  # as an artifact is read: without the original file
    restored.load_state_dict(model.state_dict(), strict=True)
    assert torch.equal(restored.features(gray), model.features(gray))


def test_inception_refuses_what_is_missing_changed_pickled_or_another_network(stand_in, tmp_path):
    config = saved(stand_in, tmp_path / "weights.safetensors")
    model = inception.Model(config, spec(1))
    with pytest.raises(ValueError, match="does not exist.*save_file"):
        inception.prepare(model, config.model_copy(update={"weights": str(tmp_path / "nothing")}))
    with pytest.raises(ValueError, match=f"has sha256 {config.sha256}, expected 00"):
        inception.prepare(model, config.model_copy(update={"sha256": "0" * 64}))
    pickled = tmp_path / "weights.pth"
    torch.save({"a": torch.zeros(1)}, pickled)
    digest = hashlib.sha256(pickled.read_bytes()).hexdigest()
    with pytest.raises(ValueError, match="pickle.*Convert.*save_file"):
        inception.prepare(model, inception.Config(weights=str(pickled), sha256=digest))
    with pytest.raises(ValueError, match="another network"):
        inception.prepare(model, saved({"a": torch.zeros(1)}, tmp_path / "other.safetensors"))
    with pytest.raises(ValueError, match="2 channels.*expected 1 .* or 3"):
        inception.Model(config, spec(2))

"""Feature networks: shapes, invariances, learning, Inception-v3 against torch-fidelity's own extractor, DINOv2 against
torch's own layers.

There are no published weights in these tests: random ones of the same names and shapes stand in for them, which shows
that the network is wired and fed alike, not that a FID made with the true weights equals a published one.
"""

import hashlib
import importlib.util
import io
import math
import subprocess
import sys
import tarfile
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import timm
import torch
import yaml
from PIL import Image
from timm.layers import resample_abs_pos_embed

from tessera.bases import judging
from tessera.bases.optimization import Training
from tessera.components import InvalidParams, kinds, load, parse
from tessera.contracts import ImageBatch, ImageSpec
from tessera.features import classifier, dinov2, inception, random
from tessera.metrics import frechet

ROOT = Path(__file__).parents[2]
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


def warped(some: torch.Tensor, strength: float) -> torch.Tensor:
    """As the classifier has its images warped."""
    return judging.warped(
        some, *(strength * most for most in (classifier.ROTATION, classifier.SCALE, classifier.SHIFT))
    )


def small_classifier(shape: tuple[int, int, int] = (1, 8, 8), **settings) -> classifier.Model:
    return classifier.Model(classifier.Config(channels=8, feature_dim=12, **settings), spec(*shape)).eval()


@pytest.mark.parametrize(
    ("kind", "resize"),
    [
        ("classifier", "none"),
        ("contrastive", "none"),
        ("image_text", "none"),
        ("random", "none"),
        ("inception", "bilinear to 299x299 as TensorFlow 1"),
        ("dinov2", "bicubic to 224x224, antialiased"),
    ],
)
def test_a_network_says_how_it_resizes(kind, resize):
    assert load("features", kind).Model.resize == resize
    assert (
        len(kinds("features")) == 8
    )  # another one belongs into the list above, or, as timm's and clip's, says it once it is built


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
    with pytest.raises(ValueError, match="dots has no labels.*use features of kind timm .* or contrastive"):
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
    first = warped(some, 1.0)
    torch.manual_seed(5)
    again, other = warped(some, 1.0), warped(some, 1.0)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    torch.testing.assert_close(warped(some, 0.0), some, rtol=0, atol=1e-5)
    assert first.shape == some.shape


def test_a_warp_moves_a_dot_no_further_than_it_may_and_keeps_circles_round():
    height, width = 40, 80
    rows, cols = torch.meshgrid(torch.arange(height) + 0.5, torch.arange(width) + 0.5, indexing="ij")
    disc = ((rows - 20) ** 2 + (cols - 40) ** 2 < 15**2).float()[None, None]
    torch.manual_seed(0)
    found = warped(disc.expand(200, 1, height, width), 1.0)[:, 0]
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
    found = warped(bar.expand(300, 1, height, width), 1.0)[:, 0]
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
        (dinov2.Config, {"kind": "dinov2", "weights": "w.safetensors", "sha256": "abc"}),
        (dinov2.Config, {"kind": "dinov2", "weights": "w.safetensors", "sha256": "0" * 64, "variant": "giant"}),
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
    other = FeatureExtractorInceptionV3(
        "other", ["2048", "logits_unbiased"], feature_extractor_weights_path=str(tmp_path / "weights.pth")
    )
    pixels = torch.randint(256, (2, 3, 20, 30), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    found = model.features(pixels.float() / 127.5 - 1)
    assert found.shape == (2, 2048)
    assert found.dtype == torch.float32
    assert found.std() > 1e-3
    theirs, their_logits = other(pixels)
    torch.testing.assert_close(found, theirs, rtol=1e-5, atol=1e-6)
    logits = model.class_logits(pixels.float() / 127.5 - 1)
    assert logits.shape == (2, 1008)
    torch.testing.assert_close(logits, their_logits, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(model.fc(found), logits, rtol=1e-5, atol=1e-4)

    model.train()  # must change nothing
    gray = pixels[:1, :1].float() / 127.5 - 1
    torch.testing.assert_close(model.features(gray), model.features(gray.repeat(1, 3, 1, 1)), rtol=1e-5, atol=1e-6)
    restored = inception.Model(config, spec(3, 20, 30))  # as an artifact is read: without the original file
    restored.load_state_dict(model.state_dict(), strict=True)
    assert torch.equal(restored.features(gray), model.features(gray))


def test_inception_distance_of_real_images_equals_torch_fidelity_s(stand_in, tmp_path, shared_data):
    from torch_fidelity import calculate_metrics

    pixels = eurosat(shared_data, 20)
    config = saved(stand_in, tmp_path / "weights.safetensors")
    model = inception.Model(config, spec(3, 64, 64))
    inception.prepare(model, config)
    found = model.features(pixels.float() / 127.5 - 1)
    first, second = (frechet.moments(half) for half in found.chunk(2))
    torch.save(stand_in, tmp_path / "weights.pth")
    one, other = (Pixels(half) for half in pixels.chunk(2))
    theirs = calculate_metrics(
        input1=one,
        input2=other,
        fid=True,
        cuda=False,
        cache=False,
        verbose=False,
        feature_extractor_weights_path=str(tmp_path / "weights.pth"),
        save_cpu_ram=True,  # reads in this process
    )["frechet_inception_distance"]
    assert frechet.distance(first, second) == pytest.approx(theirs, rel=1e-4)
    assert theirs > 0.01


class Pixels(torch.utils.data.Dataset):
    """Images one by one, as torch-fidelity asks for them."""

    def __init__(self, pixels: torch.Tensor):
        self.pixels = pixels

    def __len__(self) -> int:
        return len(self.pixels)

    def __getitem__(self, number: int) -> torch.Tensor:
        return self.pixels[number]


def eurosat(folder: Path, count: int) -> torch.Tensor:
    """uint8 (count, 3, 64, 64), spread evenly over all classes."""
    with tarfile.open(folder / "eurosat64_5000.tar") as archive:
        members = [member for member in archive.getmembers() if member.name.endswith(".png")]
        chosen = np.linspace(0, len(members) - 1, count).astype(int)
        rows = [np.asarray(Image.open(io.BytesIO(archive.extractfile(members[i]).read()))) for i in chosen]
    return torch.from_numpy(np.stack(rows)).permute(0, 3, 1, 2)


def test_inception_refuses_what_is_missing_changed_pickled_or_another_network(stand_in, tmp_path):
    config = saved(stand_in, tmp_path / "weights.safetensors")
    model = inception.Model(config, spec(1))
    with pytest.raises(ValueError, match="does not exist.*make weights"):
        inception.prepare(model, config.model_copy(update={"weights": str(tmp_path / "nothing")}))
    with pytest.raises(ValueError, match=f"has sha256 {config.sha256}, expected features.sha256 00"):
        inception.prepare(model, config.model_copy(update={"sha256": "0" * 64}))
    pickled = tmp_path / "weights.pth"
    torch.save({"a": torch.zeros(1)}, pickled)
    digest = hashlib.sha256(pickled.read_bytes()).hexdigest()
    with pytest.raises(ValueError, match="pickle.*make weights"):
        inception.prepare(model, inception.Config(weights=str(pickled), sha256=digest))
    fewer = {name: tensor for name, tensor in stand_in.items() if name != "fc.weight"}
    with pytest.raises(
        ValueError, match=r"another network \(fc.weight has shape None, expected \(1008, 2048\); 0 others"
    ):
        inception.prepare(model, saved(fewer, tmp_path / "other.safetensors"))
    with pytest.raises(ValueError, match="2 channels.*expected 1 .* or 3"):
        inception.Model(config, spec(2))


# DINOv2

TINY = dinov2.Sizes(width=24, depth=3, heads=4)


@pytest.fixture
def tiny(monkeypatch):
    """Variant small, as small as it gets, and random weights for it under the published names."""
    monkeypatch.setitem(dinov2.VARIANTS, "small", TINY)
    generator = torch.Generator().manual_seed(0)
    shapes = dinov2.VisionTransformer(TINY).state_dict()
    weights = {name: 0.3 * torch.randn(tensor.shape, generator=generator) for name, tensor in shapes.items()}
    return {**weights, "mask_token": torch.zeros(1, TINY.width)}


def prepared(weights, path, *shape: int) -> dinov2.Model:
    settings = saved(weights, path)
    config = dinov2.Config(variant="small", weights=settings.weights, sha256=settings.sha256)
    model = dinov2.Model(config, spec(*shape))
    dinov2.prepare(model, config)
    return model


@pytest.mark.parametrize(("variant", "millions"), [("small", 22.06), ("base", 86.58), ("large", 304.37)])
def test_a_dinov2_has_as_many_weights_as_the_published_one(variant, millions):
    network = dinov2.VisionTransformer(dinov2.VARIANTS[variant])
    assert sum(weight.numel() for weight in network.parameters()) / 1e6 == pytest.approx(millions, abs=0.005)


def test_dinov2_weights_have_the_published_names(tiny):
    block = ["norm1", "attn.qkv", "attn.proj", "norm2", "mlp.fc1", "mlp.fc2"]
    names = {f"blocks.{n}.{layer}.{kind}" for n in range(TINY.depth) for layer in block for kind in ("weight", "bias")}
    names |= {f"blocks.{n}.{scale}.gamma" for n in range(TINY.depth) for scale in ("ls1", "ls2")}
    names |= {"cls_token", "mask_token", "pos_embed", "patch_embed.proj.weight", "patch_embed.proj.bias"}
    assert set(tiny) == names | {"norm.weight", "norm.bias"}


def test_dinov2_equals_torch_s_own_encoder_layers_with_the_layer_scale_in_their_last_weights(tiny):
    """Each side is put together from the weights by itself; patches are cut by unfold, positions left as trained."""
    network = dinov2.VisionTransformer(TINY).requires_grad_(False)
    network.load_state_dict({name: tensor for name, tensor in tiny.items() if name != "mask_token"})
    pixels = images(2, 3, 518, 518, seed=3)
    patches = torch.nn.functional.unfold(pixels, 14, stride=14).transpose(1, 2)  # (B, 37 * 37, 3 * 14 * 14)
    x = patches @ tiny["patch_embed.proj.weight"].flatten(1).T + tiny["patch_embed.proj.bias"]
    x = torch.cat([tiny["cls_token"].repeat(2, 1, 1), x], dim=1) + tiny["pos_embed"]
    for number in range(TINY.depth):
        own = {name.removeprefix(f"blocks.{number}."): w for name, w in tiny.items() if f"blocks.{number}." in name}
        layer = torch.nn.TransformerEncoderLayer(
            TINY.width,
            TINY.heads,
            4 * TINY.width,
            dropout=0,
            activation="gelu",
            layer_norm_eps=1e-6,
            batch_first=True,
            norm_first=True,
        ).requires_grad_(False)
        theirs = {
            "self_attn.in_proj_weight": own["attn.qkv.weight"],
            "self_attn.in_proj_bias": own["attn.qkv.bias"],
            "self_attn.out_proj.weight": own["ls1.gamma"][:, None] * own["attn.proj.weight"],
            "self_attn.out_proj.bias": own["ls1.gamma"] * own["attn.proj.bias"],
            "linear1.weight": own["mlp.fc1.weight"],
            "linear1.bias": own["mlp.fc1.bias"],
            "linear2.weight": own["ls2.gamma"][:, None] * own["mlp.fc2.weight"],
            "linear2.bias": own["ls2.gamma"] * own["mlp.fc2.bias"],
            **{name: w for name, w in own.items() if name.startswith("norm")},
        }
        layer.load_state_dict(theirs, strict=True)
        x = layer(x)
    expected = torch.nn.functional.layer_norm(x, (TINY.width,), tiny["norm.weight"], tiny["norm.bias"], eps=1e-6)[:, 0]
    torch.testing.assert_close(network(pixels), expected, rtol=1e-4, atol=1e-5)
    assert expected.std() > 0.1


def test_dinov2_positions_are_the_trained_ones_under_a_cubic_filter_stretched_by_a_tenth_of_a_patch(tiny):
    network = dinov2.VisionTransformer(TINY).requires_grad_(False)
    network.load_state_dict({name: tensor for name, tensor in tiny.items() if name != "mask_token"})

    def filter_matrix(side: int) -> np.ndarray:
        """(side, 37): Keys' cubic convolution with a = -0.75, edges repeated."""
        matrix = np.zeros((side, 37))
        for row in range(side):
            center = (row + 0.5) * 37 / (side + 0.1) - 0.5
            for place in range(math.floor(center) - 1, math.floor(center) + 3):
                d = abs(center - place)
                weight = (1.25 * d - 2.25) * d * d + 1 if d <= 1 else -0.75 * (((d - 5) * d + 8) * d - 4)
                matrix[row, min(max(place, 0), 36)] += weight
        return matrix

    grid = tiny["pos_embed"][0, 1:].double().numpy().reshape(37, 37, TINY.width)
    for height, width in [(16, 16), (5, 40)]:
        expected = np.einsum("ia,jb,abn->ijn", filter_matrix(height), filter_matrix(width), grid)
        found = network.positions(height, width)
        assert torch.equal(found[:, :1], tiny["pos_embed"][:, :1])
        np.testing.assert_allclose(found[0, 1:], expected.reshape(-1, TINY.width), atol=1e-5)
    assert torch.equal(network.positions(37, 37), tiny["pos_embed"])


def test_timm_s_dinov2_is_ours_but_for_its_size_and_its_positions_of_another_grid(tiny):
    """Why kind timm is no substitute: on 224 pixels it blurs the trained positions before it takes fewer of them."""
    weights = {name: tensor for name, tensor in tiny.items() if name != "mask_token"}
    ours = dinov2.VisionTransformer(TINY).eval().requires_grad_(False)
    ours.load_state_dict(weights)
    sizes = {"embed_dim": TINY.width, "depth": TINY.depth, "num_heads": TINY.heads, "init_values": 1.0}
    settings = {"pretrained": False, "num_classes": 0, **sizes}
    for side, positions, is_ours in [
        (518, weights["pos_embed"], True),
        (224, ours.positions(16, 16), True),
        (224, resample_abs_pos_embed(weights["pos_embed"], [16, 16]), False),
    ]:
        theirs = timm.create_model("vit_small_patch14_dinov2", img_size=side, **settings).eval()
        theirs.load_state_dict({**weights, "pos_embed": positions})
        pixels = images(1, 3, side, side)
        with torch.no_grad():
            difference = (theirs(pixels) - ours(pixels)).norm() / ours(pixels).norm()
        assert (difference < 1e-5) == is_ours, (side, difference)


@pytest.mark.parametrize("shape", [(64, 64), (300, 280), (20, 500)])
def test_dinov2_resizes_as_pillow_does_but_for_its_rounding(tiny, tmp_path, shape):
    model = prepared(tiny, tmp_path / "weights.safetensors", 3, *shape)
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(60, 190, (3, *shape), dtype=torch.uint8, generator=generator)
    found = model._resized(pixels[None].float() / 127.5 - 1)[0].permute(1, 2, 0).numpy()
    image = Image.fromarray(pixels.permute(1, 2, 0).numpy()).resize((224, 224), Image.Resampling.BICUBIC)
    unit = (np.asarray(image) / 255 - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225]
    assert found.shape == (224, 224, 3)
    assert np.abs(found - unit).max() < 1.6 / 255 / 0.224  # Pillow rounds twice, after each direction


def test_dinov2_features_are_of_each_image_alone_gray_is_repeated_and_an_artifact_needs_no_file(
    tiny, tmp_path, monkeypatch
):
    model = prepared(tiny, tmp_path / "weights.safetensors", 1, 20, 30)
    state = torch.get_rng_state()
    some = images(3, 1, 20, 30)
    found = model.features(some)
    assert found.shape == (3, 24) and model.feature_dim == 24 and found.dtype == torch.float32
    assert not model.has_logits and not any(weight.requires_grad for weight in model.parameters())
    assert (found[0] - found[1]).abs().max() > 1e-3
    torch.testing.assert_close(model.features(some.repeat(1, 3, 1, 1)), found, rtol=1e-5, atol=1e-6)
    monkeypatch.setattr(dinov2, "AT_ONCE", 2)
    torch.testing.assert_close(model.features(some), found, rtol=1e-4, atol=1e-5)
    assert torch.equal(torch.get_rng_state(), state)
    restored = dinov2.Model(dinov2.Config(variant="small", weights="gone", sha256="0" * 64), spec(1, 20, 30))
    restored.load_state_dict(model.state_dict(), strict=True)
    assert torch.equal(restored.features(some), model.features(some))


def test_dinov2_refuses_another_variant_missing_and_changed_files_and_two_channels(tiny, tmp_path):
    model = prepared(tiny, tmp_path / "weights.safetensors", 3)
    right = saved(tiny, tmp_path / "weights.safetensors")
    config = dinov2.Config(variant="base", weights=right.weights, sha256=right.sha256)
    base = dinov2.Model(config, spec(3))
    with pytest.raises(ValueError, match=r"another network.*expected the weights of DINOv2, variant base.*dinov2-base"):
        dinov2.prepare(base, config)
    with pytest.raises(ValueError, match=f"has sha256 {right.sha256}, expected features.sha256 00"):
        dinov2.prepare(model, config.model_copy(update={"sha256": "0" * 64}))
    with pytest.raises(ValueError, match="does not exist.*python data/download.py dinov2-small"):
        dinov2.prepare(model, config.model_copy(update={"weights": "nowhere", "variant": "small"}))
    with pytest.raises(ValueError, match="2 channels.*expected 1 .* or 3"):
        dinov2.Model(config, spec(2))


# Getting the weights: data/download.py


def downloader():
    spec = importlib.util.spec_from_file_location("download", ROOT / "data" / "download.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def published(weights, path: Path, **settings):
    """A file as a host has it, and what data/download.py knows of it."""
    torch.save(weights, path, **settings)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    download = downloader()
    return download, download.Weights(
        download.File(path.as_uri(), sha256=digest), "inception-v3-fid", "kind: inception"
    )


@pytest.mark.parametrize("is_zip", [True, False])  # PyTorch before 1.6 wrote no zip
def test_weights_are_checked_converted_and_named_in_a_line_that_the_features_accept(stand_in, tmp_path, capsys, is_zip):
    host = tmp_path / "weights-inception.pth"
    download, weights = published(OrderedDict(stand_in), host, _use_new_zipfile_serialization=is_zip)
    folder = tmp_path / "data" / "weights"
    download.get_weights(weights, folder)
    line = capsys.readouterr().out.splitlines()[-1]
    settings = yaml.safe_load(line)["features"]
    config = parse(inception.Config, settings)
    assert Path(config.weights) == folder / "inception-v3-fid.safetensors"
    model = inception.Model(config, spec(3))
    inception.prepare(model, config)
    assert torch.equal(model.fc.weight, stand_in["fc.weight"])
    assert torch.equal(model.blocks.Conv2d_1a_3x3.conv.weight, stand_in["Conv2d_1a_3x3.conv.weight"])
    host.unlink()
    (folder / "weights-inception.pth").unlink()
    download.get_weights(weights, folder)  # there already: neither the host nor the pickle is asked
    assert capsys.readouterr().out.splitlines()[-1] == line
    assert [path.name for path in folder.iterdir()] == ["inception-v3-fid.safetensors"]


def test_weights_of_another_checksum_or_with_more_than_tensors_in_them_become_no_file(tmp_path):
    download, weights = published({"a": torch.zeros(2)}, tmp_path / "weights.pth")
    forged = weights._replace(file=weights.file._replace(sha256="0" * 64))
    with pytest.raises(ValueError, match="with sha256 .* expected 00"):
        download.get_weights(forged, tmp_path / "out")
    assert list((tmp_path / "out").iterdir()) == []
    for content, sentence in [
        ({"a": Path("x")}, "no file of tensors"),  # a class that the unpickler does not know
        ({"a": 1}, "something else than tensors by name"),
        (torch.zeros(3), "something else than tensors by name"),
    ]:
        download, weights = published(content, tmp_path / "weights.pth")
        with pytest.raises(ValueError, match=sentence):
            download.get_weights(weights, tmp_path / "out")
        assert not list((tmp_path / "out").glob("*safetensors*"))


def test_a_published_file_that_lies_in_the_folder_is_converted_without_a_download(tmp_path):
    download, weights = published({"a": torch.zeros(2)}, tmp_path / "weights.pth")
    away = weights._replace(file=weights.file._replace(address="https://127.0.0.1:9/weights.pth"))
    download.get_weights(away, tmp_path)
    assert torch.equal(safetensors.torch.load_file(tmp_path / "inception-v3-fid.safetensors")["a"], torch.zeros(2))
    assert (tmp_path / "weights.pth").is_file()


def test_a_download_that_ends_early_is_refused(tmp_path, monkeypatch):
    download = downloader()

    class Response(io.BytesIO):
        headers = {"Content-Length": "10"}

    monkeypatch.setattr(download.urllib.request, "urlopen", lambda *_, **__: Response(b"short"))
    with pytest.raises(ValueError, match="ended after 5 of 10 bytes"):
        download.fetch(download.File("https://host/file", md5="0"), tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_make_weights_without_a_network_ends_with_a_sentence(tmp_path):
    command = [sys.executable, ROOT / "data" / "download.py", "inception", tmp_path]
    ended = subprocess.run(
        command, capture_output=True, text=True, env={"https_proxy": "http://127.0.0.1:9", "no_proxy": ""}
    )
    assert ended.returncode == 2 and "could not be had" in ended.stderr and "Traceback" not in ended.stderr
    assert "6726825d" in ended.stderr and list(tmp_path.iterdir()) == []

"""Judges that see garbage: a packaged network of timm, one that learns images without labels, the garbage they are tried on,
the trial, and the share of samples that lie nearest to a real image."""

import copy

import numpy as np
import pytest
import safetensors.torch
import torch
from sklearn.datasets import load_sample_image
from torch.utils._python_dispatch import TorchDispatchMode

from tessera.artifacts import folder as artifact
from tessera.artifacts.images import to_float
from tessera.bases.optimization import Training
from tessera.components import InvalidParams, parse
from tessera.contracts import ImageBatch, ImageSpec
from tessera.evaluation import garbage, trial
from tessera.evaluation.figures import Recorder, without_network
from tessera.evaluation.judge import Judge, judge_for
from tessera.features import contrastive, random, timm
from tessera.metrics import copy_rate
from tessera.metrics.nearest_real import is_nearest_real
from tessera.nn.neighbors import DEVICE_BYTES, nearest, number_within
from tessera.params import FeaturesConfig
from tessera.seeding import numpy_generator


def spec(channels: int = 3, side: int = 40, num_classes: int = 1) -> ImageSpec:
    names = tuple(str(number) for number in range(num_classes))
    shape = {"channels": channels, "height": side, "width": side}
    return ImageSpec(name="dots", **shape, num_classes=num_classes, class_names=names, licence="none")


def images(*shape: int, seed: int = 0) -> torch.Tensor:
    return 2 * torch.rand(*shape, generator=torch.Generator().manual_seed(seed)) - 1


# timm


@pytest.fixture(scope="module")
def packaged() -> timm.Model:
    model = timm.Model(timm.Config(), spec())
    timm.prepare(model, timm.Config())
    return model


def test_packaged_weights_are_those_of_timm_under_their_names(packaged, shared_data):
    path = shared_data / "weights/tf_efficientnet_lite0.safetensors"
    if not path.is_file():
        pytest.skip(f"no weights of timm at {path}")
    published = safetensors.torch.load_file(path)
    own = packaged.network.state_dict()
    assert published.keys() - own.keys() == {"classifier.weight", "classifier.bias"}
    assert all(torch.equal(tensor, published[name]) for name, tensor in own.items())
    config = timm.Config(weights=str(path), sha256=artifact.sha256(path))
    restored = timm.Model(config, spec())
    assert restored.resize == "bicubic to 224x224, antialiased"
    timm.prepare(restored, config)
    some = images(2, 3, 40, 40)
    torch.testing.assert_close(restored.features(some), packaged.features(some), rtol=0, atol=0)


def test_features_of_timm_are_the_means_of_its_grid_and_its_own_pooling_where_asked(packaged):
    import timm as library

    state = torch.get_rng_state()
    whole = timm.Model(timm.Config(layer=None), spec())
    assert torch.equal(torch.get_rng_state(), state)
    timm.prepare(whole, timm.Config())
    grid_mean, whole = copy.deepcopy(packaged).double(), whole.double()  # or the order of sums would show
    network = library.create_model("tf_efficientnet_lite0", pretrained=False, num_classes=0).eval()
    network.double().load_state_dict(packaged.network.state_dict())
    some = images(2, 3, 40, 40)
    pixels = torch.nn.functional.interpolate(
        (127.5 * (some + 1)).round(), size=(224, 224), mode="bicubic", antialias=True
    ).double()
    with torch.no_grad():
        grids = network.forward_intermediates(pixels / 127.5 - 1, intermediates_only=True)
        pooled = network(pixels / 127.5 - 1)
    assert (packaged.feature_dim, whole.feature_dim) == (112, 1280)
    torch.testing.assert_close(grid_mean.features(some), grids[-2].mean(dim=(2, 3)).float(), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(whole.features(some), pooled.float(), rtol=1e-6, atol=1e-6)
    assert packaged.features(some).std() > 0.1


DAISY, PALACE = 985, 698  # among the 1,000 classes of ImageNet


@pytest.mark.parametrize(("photograph", "shows"), [("flower.jpg", DAISY), ("china.jpg", PALACE)])
def test_the_network_sees_what_photographs_show(photograph, shows):
    """Its features, under ImageNet's own classifier, which is in the package too: no judge would do with mixed-up pixels.

    Of the square in the middle, 427 pixels a side: the whole photographs, 640 wide, are squashed to the network's square,
    and then the palace comes third, after bell cote and boathouse.
    """
    model = timm.Model(timm.Config(layer=None), spec(side=427))
    timm.prepare(model, timm.Config())
    weight, bias = list(torch.load(timm._packaged_path(), map_location="cpu", weights_only=True).values())[-2:]
    pixels = torch.from_numpy(load_sample_image(photograph)[:, 106:533].copy()).permute(2, 0, 1)[None]
    classes = model.features(to_float(pixels)) @ weight.T + bias
    assert shows in classes[0].topk(2).indices


def test_features_of_timm_are_of_each_image_alone_and_gray_is_repeated(packaged, monkeypatch):
    some = images(3, 1, 40, 40)
    found = packaged.train().features(some)  # train: must change nothing
    monkeypatch.setattr(timm, "AT_ONCE", 2)
    torch.testing.assert_close(packaged.features(some.repeat(1, 3, 1, 1)), found, rtol=1e-3, atol=1e-3)
    assert (found[0] - found[1]).abs().max() > 1e-2
    assert found.shape == (3, 112) and found.dtype == torch.float32


def test_timm_refuses_what_it_has_no_weights_for_before_anything_is_made(monkeypatch, tmp_path):
    with pytest.raises(InvalidParams, match="network resnet18 has no installed weights.*set both, or use tf_eff"):
        parse(timm.Config, {"kind": "timm", "network": "resnet18"})
    with pytest.raises(InvalidParams, match="weights and sha256 belong together"):
        parse(timm.Config, {"kind": "timm", "weights": "w.safetensors"})
    other = {"weights": "w.safetensors", "sha256": "0" * 64}
    with pytest.raises(ValueError, match=r"has no network resnet_18, expected.*correct features\.network"):
        timm.Model(timm.Config(network="resnet_18", **other), spec())
    with pytest.raises(ValueError, match=r"features\.layer 5: timm's tf_efficientnet_lite0 gives 5 layers.*-5 to 4"):
        timm.Model(timm.Config(layer=5), spec())
    with pytest.raises(ValueError, match="2 channels.*expected 1 .* or 3"):
        timm.Model(timm.Config(), spec(2))
    changed = tmp_path / "changed.pth"
    changed.write_bytes(b"other")
    monkeypatch.setattr(timm, "_packaged_path", lambda: changed)
    with pytest.raises(ValueError, match=f"has sha256 .*, expected {timm.PACKAGED_SHA256}.*make setup"):
        timm.prepare(timm.Model(timm.Config(), spec()), timm.Config())


# contrastive


@pytest.mark.parametrize("shape", [(1, 8), (3, 28), (2, 5), (1, 3)])
def test_contrastive_features_have_the_promised_shape_and_depend_on_each_image_alone(shape):
    channels, side = shape
    torch.manual_seed(0)
    model = contrastive.Model(contrastive.Config(channels=8, feature_dim=12), spec(channels, side)).eval()
    some = images(3, channels, side, side)
    found = model.features(some)
    assert found.shape == (3, 12) and found.dtype == torch.float32 and not model.has_logits
    alone = torch.cat([model.features(image[None]) for image in some])
    torch.testing.assert_close(found, alone, rtol=1e-4, atol=1e-5)


def test_mixtures_hold_both_images_and_a_rectangle_of_the_other():
    torch.manual_seed(0)
    one, other = torch.zeros(200, 1, 20, 40), torch.ones(200, 1, 20, 40)
    shares = contrastive.averaged(one, other)[:, 0, 0, 0]
    assert 0.3 <= shares.min() < 0.35 and 0.65 < shares.max() <= 0.7
    is_other = contrastive.pasted(one, other)[:, 0] == 1
    rows, columns = is_other.any(dim=2).sum(dim=1), is_other.any(dim=1).sum(dim=1)
    assert torch.equal(rows * columns, is_other.sum(dim=(1, 2)))  # a rectangle
    assert rows.min() >= 4 and rows.max() <= 16 and columns.min() >= 9 and columns.max() <= 31
    assert rows.unique().numel() > 5 and columns.unique().numel() > 10


def digits() -> np.ndarray:
    """(1797, 1, 8, 8) uint8, in another order."""
    from sklearn.datasets import load_digits

    found = np.rint(load_digits().images * (255 / 16)).astype(np.uint8)[:, None]
    return np.random.default_rng(0).permutation(found)


def contrastive_judge(pixels: np.ndarray, num_steps: int = 200) -> tuple[Judge, dict[str, float]]:
    """Trained for seconds; and the terms of its last step."""
    torch.manual_seed(0)
    training = Training(num_steps=num_steps, batch_size=48, learning_rate=4e-3)
    config = contrastive.Config(channels=16, feature_dim=32, training=training)
    objective = contrastive.Objective(contrastive.Model(config, spec(1, 8)), config)
    (optimizer,) = objective.optimizers()["contrastive"]
    for step in range(num_steps):
        rows = torch.randint(len(pixels), (48,)).numpy()
        batch = ImageBatch(to_float(torch.from_numpy(pixels[rows])), torch.zeros(48, dtype=torch.int64))
        terms = objective(batch, "contrastive", step)
        terms["loss"].backward()
        optimizer.step()
        optimizer.zero_grad()
    return Judge(objective.model, config), {name: term.item() for name, term in terms.items()}


@pytest.fixture(scope="module")
def learned() -> tuple[Judge, dict[str, float]]:
    return contrastive_judge(digits()[:600])


def test_the_contrastive_network_learns_to_tell_digits_apart_and_mixtures_from_digits(learned):
    _, terms = learned
    assert terms["loss"] == pytest.approx(terms["contrast"] + terms["told"], rel=1e-5)
    assert terms["contrast"] < 0.5 * np.log(48)  # the loss of a guess among 48 images
    assert terms["accuracy"] > 0.5  # of a guess among three kinds: 0.33


# The trial


class Kept:
    """What a trial asks of a reference: all training images' features."""

    def __init__(self, judge: Judge, pixels: np.ndarray):
        self.judge, self.pixels = judge, pixels

    def feature_rows(self, split: str) -> np.ndarray:
        return np.arange(len(self.pixels))

    def features(self, split: str) -> np.ndarray:
        return self.judge.features(self.pixels)

    def protocol_of(self, split: str, images: str, number: int, others: int):
        return without_network("digits", images, number)


class Train:
    def __init__(self, pixels: np.ndarray):
        self.labels = np.zeros(len(pixels), np.int64)
        self.pixels = self
        self.gather = pixels.__getitem__


def tried(judge: Judge, pixels: np.ndarray):
    found = Recorder()
    trial.measure(judge, Kept(judge, pixels), Train(pixels), 0, found.group("trial"))
    found.add("generation", judge.frechet_name, 0.0, without_network("digits", "samples", 1))
    return found.measured()


def test_a_judge_that_learns_digits_without_labels_sees_all_garbage_and_one_that_knows_brightness_alone_is_named(
    learned,
):
    pixels = digits()[:600]
    seen = tried(learned[0], pixels)
    assert {kind: is_far for kind, (_, is_far) in trial.ratios(seen, "fd_contrastive").items()} == dict.fromkeys(
        garbage.KINDS, True
    )
    assert trial.sentences(seen) == []
    blind = tried(Judge(BrightnessAlone(), random.Config(), "blind"), pixels)
    (sentence,) = trial.sentences(blind)
    assert "judge of fd_blind does not see garbage: shuffled (1.0 times), blurred (" in sentence
    assert "use features of kind classifier (labels), timm (color) or contrastive" in sentence


class BrightnessAlone(torch.nn.Module):
    """Takes garbage that keeps the mean for real images."""

    has_logits = False

    def features(self, images: torch.Tensor) -> torch.Tensor:
        mean = images.mean(dim=(1, 2, 3))
        return torch.stack([mean, mean.square()], dim=1)


def test_a_judge_that_was_not_tried_is_not_spoken_of():
    found = Recorder()
    found.add("generation", "fd_old", 0.0, without_network("digits", "samples", 1))
    assert trial.sentences(found.measured()) == []


@pytest.mark.parametrize(("value", "error", "is_far"), [(5.1, 0.1, True), (4.9, 0.1, False), (9.0, 2.0, False)])
def test_garbage_is_far_at_five_times_the_distance_and_beyond_five_errors(value, error, is_far):
    found, protocol = Recorder(), without_network("digits", "samples", 1)
    found.add("trial", "trial_fd_x", 1.0, protocol, 0.01)
    found.add("trial", "noise_fd_x", value, protocol, error)
    assert trial.ratios(found.measured(), "fd_x") == {"noise": (value, is_far)}


# The garbage


def test_each_kind_keeps_what_it_says_and_destroys_the_rest():
    some = np.random.default_rng(0).integers(40, 215, (8, 3, 32, 48), dtype=np.uint8)
    some[:, :, :16] //= 2
    found = garbage.made_of(some, numpy_generator(0, "garbage"))
    assert all(made.shape == some.shape and made.dtype == np.uint8 for made in found.values())
    mean = some.mean(axis=(2, 3))
    for kind in ("phases", "blurred", "tiles", "noise"):
        np.testing.assert_allclose(found[kind].mean(axis=(2, 3)), mean, atol=6)
    assert (found["tiles"].std(axis=(2, 3)) == 0).all()
    np.testing.assert_allclose(found["noise"].std(axis=(2, 3)), some.std(axis=(2, 3)), rtol=0.1)
    assert found["blurred"].std(axis=(2, 3)).max() < some.std(axis=(2, 3)).min()
    spectrum, other = (np.abs(np.fft.rfft2(x.astype(float)))[0, 0] for x in (some, found["phases"]))
    assert np.corrcoef(spectrum[:, 1:].ravel(), other[:, 1:].ravel())[0, 1] > 0.95
    assert np.abs(found["phases"].astype(float) - some).mean() > 20
    patches, shuffled = (
        x.reshape(8, 3, 4, 8, 4, 12).transpose(0, 2, 4, 1, 3, 5).reshape(8, 16, -1) for x in (some, found["shuffled"])
    )
    for before, after in zip(patches, shuffled, strict=True):
        assert sorted(map(bytes, before)) == sorted(map(bytes, after))
        assert not (before == after).all(axis=1).any()  # none stays in its place


def test_garbage_follows_its_seed_and_is_made_of_images_of_any_size():
    for shape in [(2, 1, 8, 8), (2, 3, 5, 31), (2, 2, 1, 3)]:
        some = np.random.default_rng(1).integers(0, 256, shape, dtype=np.uint8)
        first, again, other = (garbage.made_of(some, numpy_generator(seed, "garbage")) for seed in (0, 0, 1))
        assert all((first[kind] == again[kind]).all() for kind in garbage.KINDS)
        assert (first["noise"] != other["noise"]).any()


# Nearest real images


def test_nearest_real_is_half_of_equal_sets_zero_of_sets_apart_and_counts_copies_as_real():
    real, others = np.random.default_rng(0).normal(size=(2, 1500, 4))
    assert is_nearest_real(real, others).mean() == pytest.approx(0.5, abs=0.05)
    assert is_nearest_real(real, others + 9).mean() == 0
    assert is_nearest_real(real, np.zeros_like(real)).mean() == 0  # a heap in their middle
    assert is_nearest_real(real, real).mean() == 1
    by_hand = is_nearest_real(np.array([[0.0], [10.0], [20.0]]), np.array([[1.0], [12.5], [14.0]]))
    assert by_hand.tolist() == [True, False, False]


def test_nearest_real_refuses_sets_of_unequal_size():
    with pytest.raises(ValueError, match=r"\(3, 2\) and \(4, 2\).*take as many samples as real images"):
        is_nearest_real(np.zeros((3, 2)), np.zeros((4, 2)))


# Which judge


@pytest.mark.parametrize(
    ("images", "kind"),
    [
        (spec(1, 8, 10), "classifier"),
        (spec(3, 64, 10), "classifier"),
        (spec(3, 32), "timm"),
        (spec(3, 31), "contrastive"),
        (spec(1, 64), "contrastive"),
    ],
)
def test_the_judge_fits_the_images_and_is_one_that_params_take(images, kind):
    entry = judge_for(images, 40)
    assert entry["kind"] == kind
    assert entry.get("training", {"batch_size": 40})["batch_size"] == 40
    from pydantic import TypeAdapter

    assert TypeAdapter(FeaturesConfig).validate_python(entry).kind == kind


# Devices


class Elsewhere(TorchDispatchMode):
    """Inside, the meta device stands for one whose memory is not the host's: it has no data to copy, so that whoever copies a
    tensor of it to the host fails. It answers when asked for a single value, and counts how often it is."""

    asked = largest = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function is torch.ops.aten._local_scalar_dense.default and args[0].device.type == "meta":
            self.asked += 1
            return 1.0 if args[0].is_floating_point() else True
        found = function(*args, **(kwargs or {}))
        if isinstance(found, torch.Tensor) and found.device.type == "meta":
            self.largest = max(self.largest, found.nbytes)
        return found


def test_features_stay_on_their_device_and_are_compared_there():
    config = random.Config(kind="random")
    judge = Judge(random.Model(config, spec(1, 8)), config)
    judge.model, judge.device = judge.model.to("meta"), torch.device("meta")
    pixels = np.zeros((1200, 1, 8, 8), np.uint8)
    with Elsewhere() as device:
        seen = judge.summary(pixels, 1000).features
        assert device.asked == 2 * 3  # of each batch, whether it is finite
        near = nearest(seen, torch.empty(200_000, seen.shape[1], dtype=torch.float64, device="meta"), 5)
        within = number_within(near.distances, near.distances, 1.0)
        copies = copy_rate.share_of_copies(near.distances, near.distances[:500])
    assert {one.device.type for one in (seen, near.distances, near.rows, within)} == {"meta"}
    assert seen.shape[0] == 1000 and near.rows.shape == (1000, 5) and 0 <= copies.rate <= 1
    assert 100_000 * 8 < device.largest <= max(DEVICE_BYTES, 200_000 * 8 * (seen.shape[1] + 2))

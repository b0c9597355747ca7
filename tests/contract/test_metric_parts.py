"""What every metric promises, asked of every file in tessera/metrics: a new one gets these tests by being there."""

import fnmatch
import math
import re
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch

from tessera.artifacts import folder as artifact
from tessera.components import InvalidParams, kinds, load, parse
from tessera.contracts import ImageSpec, Predicted, Told
from tessera.evaluation.figures import Recorder, without_network
from tessera.metrics import frechet
from tessera.metrics.caption_agreement import AT, GROUPS
from tessera.nn.image_losses import VGG_BLOCKS
from tessera.nn.neighbors import nearest

ROOT = Path(__file__).parents[2]
GLOSSARY = set(re.findall(r"`([^`\n]+)`", (ROOT / "docs" / "glossary.md").read_text(encoding="utf-8")))
METRICS = kinds("metrics")
FUNCTIONS = ("of_samples", "of_real_images", "of_reconstructions", "of_tokens", "of_told", "of_probe")
NUM_IMAGES, WIDTH, NUM_CLASSES = 60, 6, 3
SPEC = ImageSpec(
    name="toy", channels=3, height=16, width=16, num_classes=3, class_names=("a", "b", "c"), licence="none"
)
NETWORKS = {"classifier": "classifier", "inception": "inception"}  # kinds by name


def normal(*shape: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape)


REAL = normal(NUM_IMAGES, WIDTH, seed=0)
PIXELS = np.random.default_rng(1).integers(0, 256, (NUM_IMAGES, 3, 16, 16), dtype=np.uint8)
LABELS = np.arange(NUM_IMAGES) % NUM_CLASSES
CERTAIN = 20.0 * np.eye(NUM_CLASSES)[LABELS]


def moments_of(features: np.ndarray) -> frechet.Moments:
    """As a reference that was changed by hand holds them: what makes moments in this project refuses NaN."""
    mean, covariance = features.mean(axis=0), np.atleast_2d(np.cov(features.T))
    return frechet.Moments(torch.from_numpy(mean), torch.from_numpy(covariance), len(features))


class Toy:
    """Whatever a metric may be handed, of features, images, logits and codes that are known."""

    prefix, are_real, spec, seed = "r", False, SPEC, 0
    times = np.array([0.25, 0.75])  # of what small priors make of tokens

    def __init__(self, features: np.ndarray, pixels: np.ndarray, logits: np.ndarray, counts: torch.Tensor):
        self._pixels, self._logits, self.counts = pixels, logits, counts
        self.networks = {name: ToySeen(name, kind, features) for name, kind in NETWORKS.items()}
        self.first = self.networks["classifier"]
        ranks, of_others = np.zeros(NUM_IMAGES), np.full(NUM_IMAGES, 30)
        groups, cosines = np.array(GROUPS)[LABELS], np.full(NUM_IMAGES, 0.4)
        self.told = Told("clip", True, (cosines, -cosines), (ranks, of_others), groups, 61, self.protocol())

    @property
    def nearest_training(self):
        return nearest(self.first.features, self.first.real_features("train"), 2)

    def pixels(self):
        yield from np.split(self._pixels, 4)

    def test_pixels(self):
        yield from np.split(PIXELS, 3)

    def predicted(self):
        return Predicted(torch.from_numpy(self._logits), LABELS, self.protocol())

    def class_logits(self):
        yield self.networks["inception"], self._logits

    def halves(self):
        for seen in self.networks.values():
            yield seen, ToySeen(seen.network, seen.kind, REAL)

    def originals(self, network: str):
        return REAL

    def velocity_errors(self, num_steps: int):
        return np.abs(self._pixels.reshape(NUM_IMAGES, -1)[:, :2] - PIXELS.reshape(NUM_IMAGES, -1)[:, :2]) / 255

    def bits(self, num_steps: int):
        return self._pixels.reshape(NUM_IMAGES, -1)[:, 0] / 10

    def beside(self, name: str):
        found = Recorder()
        found.add("reconstruction", name, 0.0, self.protocol(), 0.1)
        return found.groups["reconstruction"][name]

    def protocol(self, network: str = "none", network_sha256: str = "", **settings):
        return without_network(SPEC.name, "toys", NUM_IMAGES, **settings)


class ToySeen:
    def __init__(self, network: str, kind: str, features: np.ndarray):
        self.network, self.kind, self.features, self.labels = network, kind, features, LABELS
        self.num_images, self.moments = len(features), moments_of(features)

    def real_moments(self, split: str = "test"):
        return moments_of(REAL)

    def real_features(self, split: str = "test", is_limited: bool = False):
        return REAL if split == "test" else normal(2 * NUM_IMAGES, WIDTH, seed=9)

    def real_labels(self, split: str = "test"):
        return LABELS if split == "test" else np.repeat(LABELS, 2)

    def protocol(self, split: str = "test", num_images=None, num_real=None, **settings):
        return without_network(SPEC.name, self.network, num_images or self.num_images, **settings)


def same() -> Toy:
    """The very images and features that they are compared with, certain logits, every code equally often."""
    return Toy(REAL, PIXELS, CERTAIN, torch.full((8,), 5))


def worse() -> Toy:
    """Far features, brighter noise, labels at odds with the logits, one code alone, other captions nearer."""
    far = REAL[::-1] * 0.3 + 9
    noise = np.random.default_rng(2).integers(128, 256, PIXELS.shape, dtype=np.uint8)
    found = Toy(far, noise, np.roll(CERTAIN, 1, axis=1) * 0.01, torch.tensor([40, *[0] * 7]))
    found.told.ranks[0][:] = 20
    found.told.likeness[0][:] = 0.1
    return found


def broken(where: str) -> Toy:
    """As `same`, but a feature or a logit of one image is not a number."""
    features, logits = REAL.copy(), CERTAIN.copy()
    (features if where == "features" else logits)[7, 1] = math.nan
    return Toy(features, PIXELS, logits, torch.full((8,), 5))


@pytest.fixture(scope="session")
def required(tmp_path_factory) -> dict[str, dict]:
    """The keys of each metric that has no default for them; a new metric adds a line only if it cannot be built without."""
    generator = torch.Generator().manual_seed(0)
    weights, position, before = {}, 0, 3
    for level, block in enumerate(VGG_BLOCKS):
        for width in block:
            kernel = torch.randn(width, before, 3, 3, generator=generator) * (2 / (9 * before)) ** 0.5
            weights |= {f"features.{position}.weight": kernel, f"features.{position}.bias": torch.zeros(width)}
            position, before = position + 2, width
        position += 1
        weights[f"lin{level}.weight"] = torch.rand(1, block[-1], 1, 1, generator=generator)
    path = tmp_path_factory.mktemp("vgg") / "vgg.safetensors"
    safetensors.torch.save_file(weights, path)
    return {"lpips": {"weights": str(path), "sha256": artifact.sha256(path)}}


@pytest.fixture
def config(kind, required):
    return parse(load("metrics", kind).Config, {"kind": kind, **required.get(kind, {})})


def measured(kind: str, config, toy: Toy) -> Recorder:
    """What the metric records, in groups named after what was measured."""
    module, found = load("metrics", kind), Recorder()
    for ability in FUNCTIONS:
        if hasattr(module, ability):
            subject = toy.told if ability == "of_told" else toy
            getattr(module, ability)(config, subject, found.group(ability))
    if hasattr(module, "Pairs"):
        pairs = module.Pairs(config, SPEC, torch.device("cpu"))
        for originals, decoded in zip(np.split(PIXELS, 4), np.split(toy._pixels, 4), strict=True):
            pairs.update(torch.from_numpy(originals), torch.from_numpy(decoded))
        pairs.record(toy.protocol, found.group("pairs"))
    return found


def values(found: Recorder) -> dict[str, float]:
    return {f"{group}/{name}": one.value for group, some in found.groups.items() for name, one in some.items()}


def shown_as(kind: str, name: str):
    return next((shown for shown in load("metrics", kind).FIGURES if fnmatch.fnmatchcase(name, shown.name)), None)


@pytest.mark.parametrize("kind", METRICS)
def test_the_module_names_its_source_and_refuses_an_unknown_key(kind, required):
    module = load("metrics", kind)
    assert re.search(r"Source", module.__doc__), "say in the docstring: Source: ..."
    with pytest.raises(InvalidParams, match="no_such_key: unknown key"):
        parse(module.Config, {"kind": kind, **required.get(kind, {}), "no_such_key": 1})


@pytest.mark.parametrize("kind", METRICS)
def test_every_figure_is_listed_by_its_metric_and_is_in_the_glossary_and_nothing_else_is(kind, config):
    found = measured(kind, config, worse())
    names = {name for some in found.groups.values() for name in some}
    assert names, f"tessera/metrics/{kind}.py measures nothing: it needs one of {FUNCTIONS} or Pairs"
    assert not names - GLOSSARY, f"explain in docs/glossary.md: {sorted(names - GLOSSARY)}"
    assert all(shown_as(kind, name) for name in names), f"add a Shown to its FIGURES: {sorted(names)}"
    module = load("metrics", kind)
    prefixes = {"p": "r", "floor_": "r"}  # the toy has one set of reconstructions for all three
    for shown in module.FIGURES:
        alike = [shown.name, *(f"{own}{shown.name.removeprefix(p)}" for p, own in prefixes.items())]
        assert any(fnmatch.filter(names, one) for one in alike), f"{kind} lists {shown.name} but does not measure it"


@pytest.mark.parametrize("kind", METRICS)
def test_figures_are_finite_with_finite_errors_and_those_of_tokens_are_exact(kind, config):
    found = measured(kind, config, worse())
    for group, some in found.groups.items():
        for name, figure in some.items():
            assert math.isfinite(figure.value), name
            if group != "of_tokens":
                assert figure.standard_error is not None and math.isfinite(figure.standard_error), name


BEST = {
    **{f"of_told/caption_at_{at}_{group}": 1 for at in AT for group in GROUPS},
    **{f"of_told/caption_rank_{group}": 0 for group in GROUPS},
    **{f"of_told/clip_score_{group}": 1 for group in GROUPS},
    "of_samples/fd_classifier": 0,
    "of_samples/precision": 1,
    "of_samples/recall": 1,
    "of_samples/coverage": 1,
    "of_samples/label_agreement": 1,
    "of_samples/inception_score": NUM_CLASSES,
    "of_samples/brightness_shift": 0,
    "of_probe/probe_loss": 0,
    "of_reconstructions/rfd_classifier": 0,
    "pairs/psnr_db": 100,
    "pairs/ssim": 1,
    "pairs/lpips": 0,
    "pairs/reconstruction_brightness_shift": 0,
    "of_tokens/codebook_usage": 1,
    "of_tokens/codebook_perplexity": 8,
    "of_tokens/dead_codes": 0,
    "of_tokens/codebook_bits": 3,
}


@pytest.mark.parametrize("kind", METRICS)
def test_equal_sets_have_the_best_value_and_others_a_worse_one(kind, config):
    best, bad = (values(measured(kind, config, toy)) for toy in (same(), worse()))
    assert best.keys() == bad.keys()
    for key, value in best.items():
        assert value == pytest.approx(BEST.get(key, value), abs=1e-9 if key != "of_samples/inception_score" else 0.1)
        better = shown_as(kind, key.split("/")[1]).better
        assert {"lower": value < bad[key], "higher": value > bad[key], "neither": True}[better], (key, value, bad[key])


@pytest.mark.parametrize("where", ["features", "logits"])
@pytest.mark.parametrize("kind", METRICS)
def test_a_value_that_is_not_a_number_is_told_and_not_measured(kind, where, config):
    """A metric that does not look at it measures what it did."""
    expected = values(measured(kind, config, same()))
    try:
        found = values(measured(kind, config, broken(where)))
    except ValueError as error:
        assert "finite" in str(error)
    else:
        assert found == expected
        assert kind not in ("frechet", "kernel", "precision_recall", "nearest_real", "copy_rate") or where == "logits"
        assert kind not in ("inception_score", "label_agreement") or where == "features"


@pytest.mark.parametrize("kind", METRICS)
def test_the_same_images_have_the_same_figures(kind, config):
    assert values(measured(kind, config, worse())) == values(measured(kind, config, worse()))

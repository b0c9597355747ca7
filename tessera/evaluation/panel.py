"""Measuring images by all metrics and feature networks of a run, each figure recorded with its protocol.

A metric is a file of tessera/metrics; which of its functions are asked for what, and what they are handed, stands in
tessera/contracts.py. Nothing here knows any of them by name.
"""

from collections.abc import Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from tessera import seeding
from tessera.artifacts.images import Images
from tessera.artifacts.samples import floor_rows, quotas
from tessera.artifacts.shards import Shards, in_batches, spread
from tessera.components import Params, load
from tessera.contracts import Predicted, Record
from tessera.evaluation.figures import Figure, Measured, Protocol, Setting
from tessera.evaluation.judge import Judge, Summary
from tessera.evaluation.reference import Reference
from tessera.metrics.frechet import Moments
from tessera.nn.neighbors import Nearest, nearest
from tessera.params import Pipeline

NEAREST = 5  # training images that are looked for beside a sample


class Drawn(NamedTuple):
    """The images that are measured, wherever they lie."""

    pixels: Shards
    labels: np.ndarray  # of each of them
    rows: np.ndarray | None = None  # which of `pixels` they are; None: all
    are_real: bool = False  # training images in the place of samples


class Panel:
    """The metrics and the judges of a run, and what these saw in the data."""

    def __init__(self, params: Pipeline, features: Path, reference: Path, splits: dict[str, Images]):
        self.metrics: Mapping[str, Params] = params.evaluate.metrics
        self.max_images, self.seed = params.evaluate.max_neighbor_images, params.seed
        self.judges = {name: Judge.read(features / name, name) for name in params.features}
        self.references = {name: Reference(reference / name) for name in params.features}
        self.labels = {split: images.labels for split, images in splits.items()}

    def measure(self, ability: str, subject: Any, found: Record) -> None:
        """Ask every metric that has a function of this name (`of_samples`, ...) for its figures of the subject."""
        for config in self.metrics.values():
            function = getattr(load("metrics", config.kind), ability, None)
            if function is not None:
                function(config, subject, found)

    def seen(
        self, images: str, labels: np.ndarray, summaries: Mapping[str, Summary], **settings: Setting
    ) -> "dict[str, SeenBy]":
        """What each network has seen of images, which protocols call `images`; settings: those of how they were made."""
        return {name: SeenBy(self, name, images, labels, summaries[name], settings) for name in self.judges}

    def look(self, pixels: Shards, rows: np.ndarray | None) -> dict[str, Summary]:
        """What each network sees in these rows."""
        return {name: judge.summary(pixels, self.max_images, rows) for name, judge in self.judges.items()}

    def predicted(self, drawn: Drawn, images: str) -> Predicted | None:
        """By the first network that knows the classes, if there is one; images: what protocols call them."""
        for name, judge in self.judges.items():
            if judge.has_logits:
                protocol = self.references[name].protocol_of("test", images, len(drawn.labels), 0)
                return Predicted(judge.logits(drawn.pixels, drawn.rows), drawn.labels, protocol)
        return None


class SeenBy:
    """A set of images as one network sees it (contracts.Seen)."""

    def __init__(
        self,
        panel: Panel,
        network: str,
        images: str,
        labels: np.ndarray,
        summary: Summary,
        settings: dict[str, Setting],
    ):
        self.network, self.judge, self.reference = network, panel.judges[network], panel.references[network]
        self.kind, self._images, self._settings = self.judge.config.kind, images, settings
        self._max_images, self._labels_of = panel.max_images, panel.labels
        self.num_images, self.moments = len(labels), summary.moments
        self.features, self.kept, self.labels = summary.features, summary.kept, labels[summary.kept]

    def real_moments(self, split: str = "test") -> Moments:
        return self.reference.moments(split)

    def real_features(self, split: str = "test", is_limited: bool = False) -> Tensor:
        found = self.reference.features(split)
        return self.on_device(found[spread(len(found), self._max_images)] if is_limited else found)

    def on_device(self, features: np.ndarray) -> Tensor:
        """Features that were read, on the device of those that were seen."""
        return torch.from_numpy(features).to(self.features.device)

    def real_labels(self, split: str = "test") -> np.ndarray:
        return self._labels_of[split][self.reference.feature_rows(split)]

    def protocol(
        self, split: str = "test", num_images: int | None = None, num_real: int | None = None, **settings: Setting
    ) -> Protocol:
        number = self.num_images if num_images is None else num_images
        others = self.reference.described.splits[split].num_images if num_real is None else num_real
        return self.reference.protocol_of(split, self._images, number, others, **self._settings, **settings)


class SampleSet:
    """Samples of a system, or training images in their place, beside the test images (contracts.SeenSamples)."""

    def __init__(self, panel: Panel, drawn: Drawn, splits: dict[str, Images], others: tuple[Measured, ...] = ()):
        """others: what was measured of its tokenizer and its prior."""
        self._panel, self._drawn, self._test, self._others = panel, drawn, splits["test"], others
        self.spec, self.seed, self.are_real = splits["test"].spec, panel.seed, drawn.are_real
        self.networks = panel.seen("samples", drawn.labels, panel.look(drawn.pixels, drawn.rows))
        self.first = next(iter(self.networks.values()))

    def pixels(self) -> Iterator[np.ndarray]:
        return in_batches(self._drawn.pixels, self._drawn.rows)

    def test_pixels(self) -> Iterator[np.ndarray]:
        return in_batches(self._test.pixels)

    def predicted(self) -> Predicted | None:
        return self._panel.predicted(self._drawn, "samples")

    def class_logits(self) -> Iterator[tuple[SeenBy, np.ndarray]]:
        for seen in self.networks.values():
            if hasattr(seen.judge.model, "class_logits"):
                yield seen, seen.judge.class_logits(self._drawn.pixels, self._drawn.rows)

    @cached_property
    def nearest_training(self) -> Nearest:
        trained = self.first.real_features("train")
        return nearest(self.first.features, trained, min(NEAREST, len(trained)))

    def beside(self, name: str) -> Figure | None:
        found = (measured.figure(name) for measured in self._others)
        return next((figure for figure in found if figure is not None), None)

    def protocol(self, **settings: Setting) -> Protocol:
        without = {"network": "none", "network_sha256": "", "resize": "none", "dtype": "float64"}
        return self.first.protocol(**settings).model_copy(update=without)


class Floor:
    """Real images beside real images (contracts.RealImages)."""

    def __init__(self, panel: Panel, splits: dict[str, Images], at_most: int):
        """at_most: images of a half."""
        self._panel, self._train, self._test, self._at_most = panel, splits["train"], splits["test"], at_most

    def halves(self) -> Iterator[tuple[SeenBy, SeenBy]]:
        panel, train = self._panel, self._train
        first, second = (
            panel.seen("training images of one half", train.labels[rows], panel.look(train.pixels, rows))
            for rows in halves(train.labels, self._at_most, panel.seed)
        )
        return zip(first.values(), second.values(), strict=True)

    def predicted(self) -> Predicted | None:
        return self._panel.predicted(Drawn(self._test.pixels, self._test.labels), "test images")


def halves(labels: np.ndarray, at_most: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Rows of two disjoint sets of equal size and equal numbers of each class, at most at_most images each.

    Unequal class shares alone would set two halves apart.
    """
    generator = seeding.numpy_generator(seed, "halves")
    members = [np.flatnonzero(labels == label) for label in np.unique(labels)]
    number = min(at_most, sum(len(some) // 2 for some in members))
    wanted = quotas(number, tuple(len(some) // 2 for some in members))
    shuffled = [generator.permutation(some) for some in members]
    first = [some[:count] for some, count in zip(shuffled, wanted, strict=True)]
    second = [some[count : 2 * count] for some, count in zip(shuffled, wanted, strict=True)]
    return np.sort(np.concatenate(first)), np.sort(np.concatenate(second))


def training_images(train: Images, num_images: int, seed: int) -> Drawn:
    """As many training images as there are samples, to stand in their place."""
    rows = floor_rows(train.labels, train.spec.num_classes, num_images, seed)
    return Drawn(train.pixels, train.labels[rows], rows, are_real=True)

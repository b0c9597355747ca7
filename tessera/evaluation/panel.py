"""Measuring images by all judges of a run against the test images, each figure recorded with its protocol."""

from pathlib import Path

import numpy as np
import torch

from tessera import seeding
from tessera.artifacts.shards import Shards, in_batches, spread
from tessera.evaluation.figures import Recorder
from tessera.evaluation.judge import Judge
from tessera.evaluation.reference import Reference
from tessera.metrics import brightness, frechet, inception_score, kernel, precision_recall
from tessera.params import Pipeline

PRECISION_NEIGHBORS, DENSITY_NEIGHBORS = 3, 5  # those of the papers
NUM_SPLITS = 10  # of the Inception Score


class Panel:
    """The judges of a run and what they saw in the data. Figures go to `found`, group "generation".

    What is measured is called samples in the protocols: training images in their place are to be compared with them.
    """

    def __init__(self, found: Recorder, params: Pipeline, features: Path, reference: Path):
        self.found, self.settings, self.seed = found, params.evaluate, params.seed
        self.judges = {name: Judge.read(features / name, name) for name in params.features}
        self.references = {name: Reference(reference / name) for name in params.features}
        self.first = next(iter(self.judges))

    def distances(self, pixels: Shards, labels: np.ndarray, rows: np.ndarray | None = None) -> np.ndarray:
        """Fréchet and kernel distances of images, or of some rows of them, whose labels these are; what neighbors tell of
        them by the first judge. Returns the first judge's features, of at most max_neighbor_images images."""
        kept = {name: self._distance(name, pixels, labels, rows) for name in self.judges}
        self._neighborhoods(kept[self.first])
        return kept[self.first]

    def brightness(self, pixels: Shards, others: Shards, rows: np.ndarray | None = None) -> None:
        """How much brighter the rows of pixels are than the test images, in gray levels."""
        levels = [
            torch.cat([brightness.levels(batch) for batch in in_batches(*some)])
            for some in ((pixels, rows), (others, None))
        ]
        shift = brightness.shift(*levels)
        protocol = self.references[self.first].protocol("test", "samples", len(levels[0]))
        without = {"network": "none", "network_sha256": "", "resize": "none", "dtype": "float64"}
        protocol = protocol.model_copy(update=without)
        self.found.add("generation", "brightness_shift", shift.value, protocol, shift.standard_error)

    def agreement(self, pixels: Shards, labels: np.ndarray, group: str, name: str, images: str) -> None:
        """The share of images whose class, by the first judge that knows the classes, is their label."""
        knowing = next((network for network, judge in self.judges.items() if judge.has_logits), None)
        if knowing is not None:
            share = float(self.judges[knowing].agrees(pixels, labels).mean())
            self.found.add_share(
                group, name, share, self.references[knowing].protocol_of("test", images, len(labels), 0)
            )

    def inception_score(self, pixels: Shards, channels: int) -> None:
        """Only of RGB images, and by a network of kind inception: of gray digits it would mean nothing."""
        for network, judge in self.judges.items():
            if channels == 3 and hasattr(judge.model, "class_logits"):
                score = inception_score.score(judge.class_logits(pixels), NUM_SPLITS)
                protocol = self.references[network].protocol_of(
                    "test", "samples", len(pixels), 0, num_splits=NUM_SPLITS
                )
                self.found.add("generation", "inception_score", score.inception_score, protocol, score.standard_error)

    def between(self, pixels: Shards, labels: np.ndarray, first: np.ndarray, second: np.ndarray, images: str) -> None:
        """Fréchet distances of some rows from others of the training images, as `halves_...` in the group "floor"."""
        for network, judge in self.judges.items():
            one, other = (judge.summary(pixels, self.settings.max_neighbor_images, rows) for rows in (first, second))
            influences = frechet.influence(one.features, one.moments, other.moments)
            error = frechet.standard_error(influences, labels[first][one.kept], len(first))
            distance = frechet.distance(one.moments, other.moments)
            protocol = self.references[network].protocol_of("train", images, len(first), len(second))
            self.found.add("floor", f"halves_{judge.frechet_name}", distance, protocol, error)

    def _distance(self, network: str, pixels: Shards, labels: np.ndarray, rows: np.ndarray | None) -> np.ndarray:
        judge, reference, settings = self.judges[network], self.references[network], self.settings
        other = reference.moments("test")
        summary = judge.summary(pixels, settings.max_neighbor_images, rows)
        features = summary.features
        influences = frechet.influence(features, summary.moments, other)
        error = frechet.standard_error(influences, labels[summary.kept], len(labels))
        protocol = reference.protocol("test", "samples", len(labels))
        self.found.add("generation", judge.frechet_name, frechet.distance(summary.moments, other), protocol, error)
        others = reference.features("test")
        smaller = min(len(features), len(others))
        if settings.kernel_subset > smaller:
            raise ValueError(
                f"evaluate.kernel_subset {settings.kernel_subset} is larger than the {smaller} images at hand "
                f"({len(features)} samples, {len(others)} test images): lower it, or raise sample_images.num_images"
            )
        generator = seeding.numpy_generator(self.seed, "kernel_subsets")
        found = kernel.distance(features, others, generator, settings.kernel_subset, settings.num_kernel_subsets)
        subsets = {"subset": settings.kernel_subset, "num_subsets": settings.num_kernel_subsets}
        protocol = reference.protocol_of("test", "samples", len(features), len(others), **subsets)
        self.found.add("generation", judge.kernel_name, found.mean, protocol, found.standard_error)
        return features

    def _neighborhoods(self, features: np.ndarray) -> None:
        """Precision and recall, density and coverage of at most max_neighbor_images images on either side."""
        reference = self.references[self.first]
        others = reference.features("test")
        others = others[spread(len(others), self.settings.max_neighbor_images)]
        of_precision, of_density = (
            reference.protocol_of("test", "samples", len(features), len(others), neighbors=number)
            for number in (PRECISION_NEIGHBORS, DENSITY_NEIGHBORS)
        )
        near = precision_recall.neighborhoods(others, features, PRECISION_NEIGHBORS, DENSITY_NEIGHBORS)
        self.found.add_share("generation", "precision", near.precision, of_precision)
        self.found.add_share("generation", "recall", near.recall, of_precision, of=len(others))
        self.found.add("generation", "density", near.density, of_density, near.density_standard_error)
        self.found.add_share("generation", "coverage", near.coverage, of_density, of=len(others))

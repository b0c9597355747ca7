"""What is known of the images of a run before it begins: from the images artifact, or from the source itself."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from tessera.artifacts import captions
from tessera.artifacts import folder as artifact
from tessera.artifacts import images as image_artifact
from tessera.artifacts.captions import Said
from tessera.artifacts.images import SPLITS
from tessera.artifacts.shards import labels_of
from tessera.components import load
from tessera.contracts import ImageSpec, Planned
from tessera.params import Pipeline


def planned(params: Pipeline, spec: ImageSpec, labels: Mapping[str, np.ndarray], said: Said | None = None) -> Planned:
    """The run of these params on images with these labels, (N,) int64 of each split, of which metadata say this."""
    if getattr(params.dataset, "metadata", None) is None:
        said = Said(0, {})
    networks = tuple(config.kind for config in params.features.values())
    at_most = params.evaluate.max_neighbor_images
    return Planned(spec, labels, params.sample_images.num_images, at_most, networks, said)


def of_artifact(params: Pipeline, images: Path) -> Planned | None:
    """By what `prepare_images` wrote. None where it is missing or damaged, which the stage that reads it tells."""
    images = Path(images)
    names = [path.relative_to(images).as_posix() for path in sorted(images.glob("*/labels-*.npy"))]
    try:
        for name in ("meta.json", *names):
            if artifact.sha256(images / name) != artifact.file_sha256(images, name):
                return None
        spec = image_artifact.read_spec(images)
        labels = {split: labels_of(images / split, spec.num_classes) for split in SPLITS}
        return planned(params, spec, labels, _said(images, params))
    except (OSError, ValueError, KeyError):
        return None


def _said(images: Path, params: Pipeline) -> Said | None:
    return None if getattr(params.dataset, "metadata", None) is None else captions.said_of(images)


def of_source(params: Pipeline) -> Planned:
    """By the source. Raises ValueError, as the data set does, if that is no use.

    A data set may have `census(config)`: the labels of each split without the images, by the names of files alone.
    """
    config = params.dataset
    dataset = load("datasets", config.kind)
    spec = dataset.spec(config)
    if hasattr(dataset, "census"):
        found = dataset.census(config)
    else:
        found = {split: [] for split in SPLITS}
        for record in dataset.records(config):
            if record.image is not None:
                found[record.split].append(record.label)
    return planned(params, spec, {split: np.array(found[split], np.int64) for split in SPLITS})

"""What is known of the images of a run before it begins: from the images artifact, or from the source itself."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from tessera.artifacts import captions
from tessera.artifacts import folder as artifact
from tessera.artifacts import images as image_artifact
from tessera.artifacts.captions import Said, Values
from tessera.artifacts.images import SPLITS
from tessera.artifacts.shards import labels_of
from tessera.check import readable
from tessera.components import load
from tessera.contracts import ImageSpec, Planned
from tessera.params import Pipeline


class Asked(NamedTuple):
    """What metadata may say of images by the columns that params name, before they are read: as artifacts/captions.Said, where
    None stands for what only the images tell."""

    longest_caption: int | None
    attributes: dict[str, Values]
    embedding_dim: int | None
    longest_text: str
    picture_channels: int


def asked(metadata: Any) -> Asked:
    """metadata: of a data set, or None: it says nothing of its images."""
    if metadata is None:
        return Asked(0, {}, 0, "", 0)
    nothing = Values(math.inf, -math.inf, frozenset())  # of an attribute: beyond nobody's range
    return Asked(
        None if metadata.captions else 0,
        dict.fromkeys(metadata.attributes, nothing),
        None if metadata.embedding else 0,
        "",
        (metadata.picture_channels or 1) if metadata.picture else 0,
    )


def planned(params: Pipeline, spec: ImageSpec, labels: Mapping[str, np.ndarray], said: Said | None = None) -> Planned:
    """The run of these params on images with these labels, (N,) int64 of each split, of which metadata say this; None: no more
    is known than what is asked for."""
    networks = tuple(config.kind for config in params.features.values())
    at_most = params.evaluate.max_neighbor_images
    known = said or asked(getattr(params.dataset, "metadata", None))
    return Planned(spec, labels, params.sample_images.num_images, at_most, networks, known)


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


def _require_both_splits(source: str, counts: Mapping[str, int]) -> None:
    for split, count in counts.items():
        if not count:
            raise ValueError(
                f"{source} has {sum(counts.values()):,} images, none of them for the {split} split, expected some in either: "
                f"add images, or change test_fraction or split_seed"
            )


def of_source(params: Pipeline) -> Planned:
    """By the source. Raises ValueError, as the data set does, if that is no use.

    A data set may have `census(config)`: the labels of each split without the images, by the names of files alone. Of one that
    has it, some files are read.
    """
    config = params.dataset
    dataset = load("datasets", config.kind)
    if hasattr(dataset, "census"):
        found = dataset.census(config)
        with dataset.opened(config) as source:
            spec = source.spec
            readable.require_some(source, config, sum(map(len, found.values())))
    else:
        spec = dataset.spec(config)
        found = {split: [] for split in SPLITS}
        for record in dataset.records(config):
            if record.image is not None:
                found[record.split].append(record.label)
    _require_both_splits(config.source, {split: len(found[split]) for split in SPLITS})
    return planned(params, spec, {split: np.array(found[split], np.int64) for split in SPLITS})

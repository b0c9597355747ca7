"""A picture of samples, each beside its nearest training images: the most copy-like first, then evenly spread ones."""

from pathlib import Path

import numpy as np

from tessera.artifacts import pictures
from tessera.artifacts.images import Images
from tessera.artifacts.samples import Samples
from tessera.evaluation.panel import SampleSet

SHOWN_SAMPLES = 10


def draw(path: Path, samples: SampleSet, drawn: Samples, train: Images) -> None:
    first, near = samples.first, samples.nearest_training
    order = np.argsort(near.distances[:, 0].cpu().numpy(), kind="stable")
    half = SHOWN_SAMPLES // 2
    shown = np.concatenate([order[:half], order[np.linspace(half, len(order) - 1, SHOWN_SAMPLES - half).astype(int)]])
    among = near.rows.cpu().numpy()[shown]
    rows = first.reference.feature_rows("train")[among]  # (SHOWN_SAMPLES, k) of the training images
    originals = train.pixels.gather(rows.ravel()).reshape(*rows.shape, *drawn.pixels.row_shape)
    beside = np.concatenate([drawn.pixels.gather(first.kept[shown])[:, None], originals], axis=1)
    pictures.save_grid(path, beside.reshape(-1, *beside.shape[2:]), beside.shape[1])

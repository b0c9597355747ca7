"""Grids of images as PNG, enlarged by nearest neighbour: what a person looks at to judge a run."""

import math
from pathlib import Path

import numpy as np
from PIL import Image

from tessera.artifacts import whole

MARGIN = 1  # pixels between images, before enlarging
SHORTEST_SIDE = 48  # of one image on the screen, at least


def grid(images: np.ndarray, num_columns: int) -> np.ndarray:
    """(N, C, H, W) uint8 in reading order -> (rows, columns, 3) uint8 on a dark ground, each image enlarged alike."""
    count, channels, height, width = images.shape
    num_rows = math.ceil(count / num_columns)
    canvas = np.full((num_rows * (height + MARGIN) + MARGIN, num_columns * (width + MARGIN) + MARGIN, 3), 32, np.uint8)
    for number, image in enumerate(images):
        row, column = divmod(number, num_columns)
        top, left = MARGIN + row * (height + MARGIN), MARGIN + column * (width + MARGIN)
        colors = image if channels == 3 else np.repeat(image[:1], 3, axis=0)
        canvas[top : top + height, left : left + width] = colors.transpose(1, 2, 0)
    scale = max(1, math.ceil(SHORTEST_SIDE / min(height, width)))
    return canvas.repeat(scale, axis=0).repeat(scale, axis=1)


def picture(image: np.ndarray) -> Image.Image:
    """(C, H, W) uint8, gray or RGB."""
    return Image.fromarray(image[0] if len(image) == 1 else image.transpose(1, 2, 0))


def save_grid(path: Path, images: np.ndarray, num_columns: int) -> None:
    with whole.file(path) as beside:
        Image.fromarray(grid(images, num_columns)).save(beside, optimize=False)


def by_class(images: np.ndarray, labels: np.ndarray, num_columns: int = 10, max_rows: int = 10) -> np.ndarray:
    """The first images of each class, one class per row; without classes, simply the first ones. (N, C, H, W) uint8."""
    classes = np.unique(labels)
    if len(classes) == 1:
        return images[: num_columns * max_rows]
    rows = []
    for label in classes[:max_rows]:
        row = images[labels == label][:num_columns]
        blank = np.zeros((num_columns - len(row), *images.shape[1:]), np.uint8)
        rows.append(np.concatenate([row, blank]))
    return np.concatenate(rows)

"""Edits image files from the shell, by a trained system of this checkout.

    python -m stages.edit_images --system vqgan-masked --inpaint --mask mask.png in.png out.png
    python -m stages.edit_images --system vae-flow --enhance damage=downsample --set factor=2 in.png out.png
    python -m stages.edit_images --system vqgan-flow --restyle --set target=3 --set strength=0.7 in.png out.png

The image gets the data set's own preprocessing, and the result the size of the input. Where a mask is white, pixels are
drawn anew; the others come back as they were, every one.
"""

import argparse
import sys
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import yaml
from PIL import Image

from tessera import params as all_params
from tessera import seeding
from tessera.artifacts.decoding import PILLOW_MAX_PIXELS, decode, pillow_warnings
from tessera.artifacts.images import to_float, to_uint8
from tessera.artifacts.records import Unreadable
from tessera.components import InvalidParams, kinds, load, parse
from tessera.editing import System
from tessera.generation import ImageGenerator
from tessera.params import Pipeline

MAX_BYTES = 64 * 2**20  # of a file
MAX_SIDE = 8192  # pixels of a result


class Upload(NamedTuple):
    """A file that was checked: as the models see it, and as it was."""

    image: np.ndarray  # (C, H, W) uint8, preprocessed
    size: tuple[int, int]  # width and height of the file's image
    original: np.ndarray  # (C, height, width) uint8 at that size


def open_system(params: Pipeline, name: str) -> System:
    """A system of this checkout, from the artifacts where dvc.yaml puts them. Raises ValueError if it is not there."""
    if name not in params.systems:
        raise ValueError(f"there is no system '{name}' in params.yaml: expected one of {', '.join(params.systems)}")
    tokenizer, prior = Path("data/tokenizers") / params.systems[name].tokenizer, Path("data/priors") / name
    return System.of(ImageGenerator(tokenizer, prior), name)


def read_upload(data: bytes, params: Pipeline, what: str) -> Upload:
    """Raises ValueError with the reason for what is no picture, or too large a one."""
    dataset = params.dataset
    channels = getattr(dataset, "channels", 1)
    settings = {key: getattr(dataset, key, default) for key, default in DECODING.items()}
    if len(data) > MAX_BYTES:
        raise ValueError(f"{what} has {len(data):,} bytes, more than {MAX_BYTES:,}: make it smaller")
    try:
        with pillow_warnings():
            size = _size(data)
            if max(size) > MAX_SIDE:
                raise Unreadable(f"is {size[0]} x {size[1]}, a side of more than {MAX_SIDE} pixels")
            shape = {"channels": channels, "height": dataset.height, "width": dataset.width}
            image = decode(data, **shape, **settings)
            original = decode(data, **shape | {"height": size[1], "width": size[0]}, **settings | {"resize": "stretch"})
    except Unreadable as reason:
        raise ValueError(f"{what} {reason}: expected an image file such as PNG or JPEG") from None
    return Upload(image, size, original)


DECODING: dict[str, Any] = {
    "resize": "crop",
    "filter": "lanczos",
    "background": "white",
    "max_pixels": PILLOW_MAX_PIXELS,
}

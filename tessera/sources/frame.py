"""Which part of a picture of any size the models see, and the way of pixels there and back."""

from typing import Any

import numpy as np
import torch
from PIL import Image

from tessera.artifacts import pictures
from tessera.artifacts.images import to_float, to_uint8
from tessera.components import sets
from tessera.sources.bands import channels_of, require_picture

PREPROCESSING = {"resize": "crop", "filter": "lanczos", "background": "white"}  # where a data set says nothing else
WITHOUT_ROUNDING = (
    "has images of 16 bits, and pictures here have 8, expected images of 8: export the system, whose `sample` and `edit` in "
    "Python give uint16"
)
WITHOUT_PICTURES = "export the system, whose `sample` and `edit` in Python take tensors of any number of channels"


class Frame:
    """Which part of a picture the models see, by the data set's way of resizing, and the way there and back."""

    def __init__(self, dataset: Any, size: tuple[int, int], factor: int = 1):
        """factor: how much smaller than the models' images the picture is to be. Raises ValueError unless images are gray or
        RGB, of 8 bits."""
        self.height, self.width = dataset.height // factor, dataset.width // factor
        channels = channels_of(dataset)
        require_picture(channels, "the data set", WITHOUT_PICTURES)
        if sets(dataset, "bits"):
            raise ValueError(f"the data set {WITHOUT_ROUNDING}")
        self.mode = "L" if channels == 1 else "RGB"
        how = getattr(dataset, "resize", PREPROCESSING["resize"])
        self.filter = Image.Resampling[getattr(dataset, "filter", PREPROCESSING["filter"]).upper()]
        self.background = getattr(dataset, "background", PREPROCESSING["background"])
        width, height = size
        self.inner = (
            self.width,
            self.height,
        )  # what the picture becomes; smaller than the models' images where it is padded
        self.corner = (0, 0)  # where it lies in them
        if how == "pad":
            scale = min(self.width / width, self.height / height)
            self.inner = (max(1, round(width * scale)), max(1, round(height * scale)))
            self.corner = ((self.width - self.inner[0]) // 2, (self.height - self.inner[1]) // 2)
            across, down = width / self.inner[0], height / self.inner[1]  # pixels of the picture to one of the models'
            left, top = -self.corner[0] * across, -self.corner[1] * down
            self.box = (left, top, left + self.width * across, top + self.height * down)
        elif how == "crop":  # as large as fits into the picture, around its center
            scale = min(width / self.width, height / self.height)
            left, top = (width - self.width * scale) / 2, (height - self.height * scale) / 2
            self.box = (left, top, left + self.width * scale, top + self.height * scale)
        else:
            self.box = (0.0, 0.0, float(width), float(height))

    def tensor(self, picture: Image.Image) -> torch.Tensor:
        """(1, C, H, W) in [-1, 1]"""
        pixels = np.asarray(self._seen(picture.convert(self.mode), self.filter, self.background))
        pixels = pixels[None] if self.mode == "L" else pixels.transpose(2, 0, 1)
        return to_float(torch.from_numpy(np.array(pixels, order="C"))[None])

    def mask(self, mask: Image.Image) -> torch.Tensor:
        """(1, H, W): a pixel of the models is covered if any pixel of the picture below it is.

        Raises ValueError for a mask that reaches beyond what the models see: there nothing could be drawn.
        """
        holes = _holes(mask)
        left, top, right, bottom = (round(side) for side in self.box)
        beyond = np.asarray(holes).copy()
        beyond[max(top, 0) : bottom, max(left, 0) : right] = 0
        if beyond.any():
            raise ValueError(
                f"the mask is white outside of columns {left} to {right - 1} and rows {top} to {bottom - 1}, which is all that "
                f"the models see of {size_text(mask.size)}: expected white there alone; crop image and mask around the hole"
            )
        seen = self._seen(holes, Image.Resampling.BOX, "black")
        return torch.from_numpy(np.asarray(seen) > 0)[None]

    def put_back(self, picture: Image.Image, edited: torch.Tensor, mask: Image.Image | None = None) -> Image.Image:
        """The picture with the (1, C, H, W) result in its place; with a mask, only where that is white."""
        pixels = to_uint8(edited)[0].cpu().numpy()
        result = pictures.picture(pixels)
        left, top, right, bottom = (round(side) for side in self.box)
        result = result.resize((right - left, bottom - top), Image.Resampling.BICUBIC)
        whole = picture.convert(self.mode)
        changed = whole.copy()
        changed.paste(result, (left, top))
        return changed if mask is None else Image.composite(changed, whole, _holes(mask))

    def _seen(self, picture: Image.Image, filter: Image.Resampling, background: str) -> Image.Image:
        width, height = picture.size
        if self.inner != (self.width, self.height):
            canvas = Image.new(picture.mode, (self.width, self.height), background)
            canvas.paste(picture.resize(self.inner, filter), self.corner)
            return canvas
        left, top, right, bottom = self.box
        return picture.resize((self.width, self.height), filter, (left, top, min(right, width), min(bottom, height)))


def _holes(mask: Image.Image) -> Image.Image:
    """Mode L, 255 where the mask is lighter than half gray, else 0."""
    return mask.convert("L").point(lambda value: 255 if value > 127 else 0)


def size_text(size: tuple[int, int]) -> str:
    return f"{size[0]} x {size[1]} pixels"

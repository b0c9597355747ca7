"""Turns the bytes of an image file into pixels of one shape, by Pillow; whatever goes wrong becomes a reason.

Done: the first frame of an animation, the EXIF orientation, transparency on a plain background, 16 bits to 8 by
scaling. Not done: color profiles are ignored, as most training code does.
"""

import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from io import BytesIO
from typing import Literal

import numpy as np
from PIL import Image, ImageOps

from tessera.sources.records import Unreadable

Resize = Literal["crop", "pad", "stretch"]
Filter = Literal["lanczos", "bicubic", "bilinear", "box", "nearest"]
Background = Literal["white", "black"]
PILLOW_MAX_PIXELS = 89_478_485  # where Pillow itself begins to object
NOT_PICTURES = {"EPS", "WMF", "BUFR", "GRIB", "HDF5", "MPEG"}  # EPS would run Ghostscript on the file


@contextmanager
def pillow_warnings() -> Iterator[None]:
    """Inside, Pillow's warning of a decompression bomb is an error, and its remarks on odd metadata are silent.

    The filters belong to the whole process: enter it in one thread, around the work of all.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=UserWarning, module=r"PIL\.")
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        yield


@contextmanager
def opened(data: bytes, max_pixels: int) -> Iterator[Image.Image]:
    """The image of these bytes, its pixels not loaded yet. Raises Unreadable with the reason, also for what fails inside."""
    if not data:
        raise Unreadable("is empty")
    try:
        Image.init()  # otherwise Image.ID lists only the commonest formats
        with Image.open(BytesIO(data), formats=[name for name in Image.ID if name not in NOT_PICTURES]) as image:
            if image.width * image.height > max_pixels:
                raise Unreadable(f"has {image.width} x {image.height} pixels, more than max_pixels {max_pixels:,}")
            yield image
    except Unreadable:
        raise
    except Exception as error:  # Pillow's parsers of some 40 formats raise whatever damaged bytes lead them to
        raise Unreadable(_reason(error)) from None


def decode(
    data: bytes,
    *,
    channels: int,
    height: int | None,
    width: int | None,
    resize: Resize,
    filter: Filter,
    background: Background,
    max_pixels: int,
) -> np.ndarray:
    """(channels, height, width) uint8 from the bytes of an image file; None: its own. Raises Unreadable with the reason."""
    with opened(data, max_pixels) as image:
        image.load()
        picture = _plain(ImageOps.exif_transpose(image), background)
    picture = picture.convert("L" if channels == 1 else "RGB")
    height, width = height or picture.height, width or picture.width
    picture = _fit(picture, height, width, resize, Image.Resampling[filter.upper()], background)
    pixels = np.asarray(picture)
    return np.ascontiguousarray(pixels[None] if channels == 1 else pixels.transpose(2, 0, 1))


def pixels_of(
    picture: Image.Image,
    *,
    channels: int,
    height: int,
    width: int,
    resize: Resize,
    filter: Filter,
    background: Background,
) -> np.ndarray:
    """As `decode` makes of a file, of a picture that is open already. Raises Unreadable with the reason.

    Apart from it, because the code of `decode` is what the images of every checkout were made by.
    """
    try:
        picture = _plain(ImageOps.exif_transpose(picture), background)
    except Unreadable:
        raise
    except Exception as error:  # pixels are loaded only now
        raise Unreadable(_reason(error)) from None
    picture = picture.convert("L" if channels == 1 else "RGB")
    pixels = np.asarray(_fit(picture, height, width, resize, Image.Resampling[filter.upper()], background))
    return np.ascontiguousarray(pixels[None] if channels == 1 else pixels.transpose(2, 0, 1))


def _reason(error: Exception) -> str:
    if isinstance(error, Image.UnidentifiedImageError):
        return "Pillow cannot identify it as an image"
    text = re.sub(r"<[^<>]* object at 0x[0-9a-f]+>", "the file", str(error))  # addresses differ from run to run
    return f"{type(error).__name__}: {text}"


def _plain(image: Image.Image, background: Background) -> Image.Image:
    """The image in mode L or RGB."""
    if image.mode.startswith(("I", "F")):
        image = _to_8_bits(image)
    if image.has_transparency_data:
        image = image.convert("RGBA")
        canvas = Image.new("RGBA", image.size, background)
        canvas.alpha_composite(image)
        image = canvas
    return image if image.mode == "L" else image.convert("L" if image.mode == "1" else "RGB")


def _to_8_bits(image: Image.Image) -> Image.Image:
    """Scale 16-bit integers by 255/65535 and floats in [0, 1] by 255; Pillow's own convert would clip them at 255.

    32-bit integers count as 16-bit ones, which Pillow stores so for some formats. Values beyond these ranges have no
    known white, so they are refused rather than guessed.
    """
    values = np.asarray(image)
    white = 1 if image.mode.startswith("F") else 65535
    low, high = values.min(), values.max()
    if not (low >= 0 and high <= white):  # NaN fails this too
        raise Unreadable(
            f"has values from {low} to {high} in mode {image.mode}, expected 0 to {white}: save it in 8 bits"
        )
    gray = Image.fromarray(np.rint(values * (255 / white)).astype(np.uint8))
    transparent = image.info.get("transparency")
    if isinstance(transparent, int):
        gray.putalpha(Image.fromarray(np.where(values == transparent, 0, 255).astype(np.uint8)))
    return gray


def _fit(
    picture: Image.Image, height: int, width: int, resize: Resize, filter: Image.Resampling, background: Background
) -> Image.Image:
    if picture.size == (width, height):
        return picture
    if resize == "stretch":
        return picture.resize((width, height), filter)
    if resize == "crop":  # one call for "the shorter side to size, then the center": a strip never grows huge between
        scale = max(width / picture.width, height / picture.height)
        left, top = (picture.width - width / scale) / 2, (picture.height - height / scale) / 2
        box = (
            max(left, 0),
            max(top, 0),
            min(picture.width - left, picture.width),
            min(picture.height - top, picture.height),
        )
        return picture.resize((width, height), filter, box)
    scale = min(width / picture.width, height / picture.height)
    size = (max(1, round(picture.width * scale)), max(1, round(picture.height * scale)))
    canvas = Image.new(picture.mode, (width, height), background)
    canvas.paste(picture.resize(size, filter), ((width - size[0]) // 2, (height - size[1]) // 2))
    return canvas

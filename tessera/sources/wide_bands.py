"""Images of 1 to 16 channels of 16 bits each, `bits: 16` beside `bands`, as their files hold them: no value is rounded.

    1.npy                          (H, W, C) or (H, W) uint16, in either order of bytes
    1.tif                          a page of 16-bit gray for each channel, or one of 1 to 16 channels (sources/wide_tiff.py)
    1.png                          16-bit gray, gray and alpha, RGB or RGBA (sources/wide_png.py)

A file of 8 bits is refused: whether its white is 255 or 65535 is known to whoever made it alone. EXIF orientation is applied,
and each channel is resized by itself, as float32, which holds all 65,536 values.
"""

from collections.abc import Callable
from functools import partial
from io import BytesIO
from typing import Annotated, Any, Literal

import numpy as np
from PIL import Image
from pydantic import AfterValidator, ValidationInfo

from tessera.sources import wide_png, wide_tiff
from tessera.sources.bands import AS_WIDE_ARRAY, MOST, NARROW, NPY, NPY_HEADERS
from tessera.sources.decoding import Background, Filter, Resize
from tessera.sources.records import Unreadable

WHITE = 65535
TURNS = {  # by the orientation of EXIF
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def _beside_bands(bits: int, info: ValidationInfo) -> int:
    if info.data.get("bands") is None:
        raise ValueError(f"bits is {bits}, but bands is not set, expected the channels of each file, such as bands: 1")
    return bits


Bits = Annotated[Literal[16], AfterValidator(_beside_bands)]


def decoder_of(config: Any) -> Callable[[bytes], np.ndarray]:
    """config: of an image_folder that sets `bands` and `bits`."""
    keys = ("bands", "height", "width", "resize", "filter", "background", "max_pixels")
    return partial(decode, **{key: getattr(config, key) for key in keys})


def decode(
    data: bytes,
    *,
    bands: int,
    height: int,
    width: int,
    resize: Resize,
    filter: Filter,
    background: Background,
    max_pixels: int,
) -> np.ndarray:
    """(bands, height, width) uint16 from the bytes of a file. Raises Unreadable with the reason, also for another number of
    channels."""
    orientations = [1]
    if data.startswith(NPY):
        values = _of_array(data, bands, max_pixels)
    elif data.startswith(wide_png.SIGNATURE):
        values, orientations[0] = wide_png.decode(data, bands, max_pixels)
    elif data.startswith(wide_tiff.SIGNATURES):
        values, orientations = wide_tiff.decode(data, bands, max_pixels)
    else:
        raise Unreadable(f"is no npy, PNG or TIFF, which alone can hold 16 bits: {AS_WIDE_ARRAY}")
    orientations = orientations * (len(values) if len(orientations) == 1 else 1)
    size, scaled = (width, height), Image.Resampling[filter.upper()]
    planes = [
        fit(turned(plane, orientation), size, resize, scaled, background)
        for plane, orientation in zip(values, orientations, strict=True)
    ]
    return np.stack(planes)


def _of_array(data: bytes, bands: int, max_pixels: int) -> np.ndarray:
    """(bands, H, W) of an npy file. What its header says is looked at before any pixel is."""
    file = BytesIO(data)
    try:
        shape, _, dtype = NPY_HEADERS[np.lib.format.read_magic(file)](file)
    except Exception as error:  # numpy parses the header as Python, which fails in whatever way damaged bytes lead to
        raise Unreadable(f"has a header that numpy cannot read ({type(error).__name__}): {AS_WIDE_ARRAY}") from None
    _require_uint16(dtype)
    if len(shape) == 2:
        shape = (*shape, 1)
    if len(shape) != 3 or shape[2] != bands or 0 in shape:
        is_first = len(shape) == 3 and shape[0] == bands and shape[2] > MOST
        mend = "put the channels last, as np.moveaxis(array, 0, -1) does" if is_first else "correct it, or bands"
        expected = f"(H, W, {bands})" + (" or (H, W)" if bands == 1 else "")
        raise Unreadable(f"is an array of the shape {str(shape):.80}, expected {expected}: {mend}")
    if shape[0] * shape[1] > max_pixels:
        raise Unreadable(f"has {shape[1]} x {shape[0]} pixels, more than max_pixels {max_pixels:,}")
    number, stated = len(data) - file.tell(), 2 * shape[0] * shape[1] * bands
    if number != stated:
        raise Unreadable(
            f"has {number:,} bytes of pixels, expected {stated:,} by its shape: it is damaged; save it again"
        )
    return np.moveaxis(np.load(BytesIO(data), allow_pickle=False).reshape(shape), -1, 0).astype(np.uint16)


def _require_uint16(dtype: np.dtype) -> None:
    if dtype.hasobject:
        raise Unreadable(f"holds Python objects, which are never unpickled, expected uint16: {AS_WIDE_ARRAY}")
    if dtype == np.uint8:
        raise Unreadable(NARROW)
    if dtype.newbyteorder("=") != np.uint16:
        mend = (
            "add what makes its least value 0"
            if dtype.kind == "i" and dtype.itemsize == 2
            else "scale it to 0 to 65535"
        )
        raise Unreadable(f"holds {str(dtype):.40}, expected uint16: {mend}, by what is black and white in it")


def turned(plane: np.ndarray, orientation: int) -> np.ndarray:
    """(H, W) as this orientation of EXIF says."""
    if orientation not in TURNS:
        return plane
    return np.asarray(Image.fromarray(plane.astype(np.float32)).transpose(TURNS[orientation])).astype(np.uint16)


def fit(
    plane: np.ndarray, size: tuple[int, int], resize: Resize, filter: Image.Resampling, background: Background
) -> np.ndarray:
    """(H, W) uint16 -> (height, width) uint16 of size (width, height), by the rules of sources/decoding.py for 8 bits."""
    (own_height, own_width), (width, height) = plane.shape, size
    if (own_width, own_height) == size:
        return plane
    picture = Image.fromarray(plane.astype(np.float32))
    if resize == "pad":
        scale = min(width / own_width, height / own_height)
        inner = (max(1, round(own_width * scale)), max(1, round(own_height * scale)))
        left, top = (width - inner[0]) // 2, (height - inner[1]) // 2
        canvas = np.full((height, width), WHITE if background == "white" else 0, np.uint16)
        canvas[top : top + inner[1], left : left + inner[0]] = _whole(picture.resize(inner, filter))
        return canvas
    box = (0.0, 0.0, float(own_width), float(own_height))
    if resize == "crop":
        scale = max(width / own_width, height / own_height)
        left, top = max((own_width - width / scale) / 2, 0), max((own_height - height / scale) / 2, 0)
        box = (left, top, min(own_width - left, own_width), min(own_height - top, own_height))
    return _whole(picture.resize(size, filter, box))


def _whole(picture: Image.Image) -> np.ndarray:
    """float32 to the nearest of 16 bits; filters with negative lobes go beyond black and white, which is clipped."""
    return np.rint(np.asarray(picture)).clip(0, WHITE).astype(np.uint16)

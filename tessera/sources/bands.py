"""Images of 1 to 16 channels as their files hold them: nothing is converted to gray or color, and no bits are lost.

    1.npy                          (H, W, C) or (H, W) uint8, as numpy.save writes it
    1.tif                          a page for each channel, or one page of gray, gray and alpha, RGB or RGBA
    1.png, 1.jpg, 1.webp           gray, gray and alpha, RGB or RGBA

Alpha is a channel like others. EXIF orientation is applied, and each channel is resized by itself.
"""

from collections.abc import Callable, Collection, Iterator
from functools import partial
from io import BytesIO
from typing import Annotated, Any

import numpy as np
from PIL import Image
from pydantic import AfterValidator, Field, ValidationInfo

from tessera.sources.decoding import Background, Filter, Resize, opened, pixels_of
from tessera.sources.records import Unreadable

MOST = 16  # channels
NPY = b"\x93NUMPY"
NPY_HEADERS = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
TIFF = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
FORMATS = ("TIFF", "PNG", "JPEG", "WEBP")
MODES = ("L", "LA", "RGB", "RGBA")  # of Pillow: 8 bits for each channel, and no palette
BITS, SAMPLES, EXTRA = 258, 277, 338  # tags of TIFF: BitsPerSample, SamplesPerPixel, ExtraSamples
PREMULTIPLIED = 1  # an extra sample that Pillow divides colors by
DEPTH_OF_PNG = 24  # the byte that states it, in the header that comes first in every PNG
WIDE = (
    "has 16 bits for each channel, expected 8, because bits would be lost: write dataset.bits: 16 to keep them, or scale it, "
    'as by (values // 257).astype("uint8")'
)
AS_PAGES = "save it as npy, (H, W, C) uint8, or as TIFF with a page for each channel"
# Of data sets with `bits: 16` (sources/wide_bands.py)
NARROW = (
    "has 8 bits for each channel, expected 16, as dataset.bits says: leave out bits, or save it with 16, as by "
    'values.astype("uint16") * 257 if its white is 255'
)
AS_WIDE_ARRAY = "save it as npy, (H, W, C) uint16, or as TIFF with a page of 16-bit gray for each channel"


def _agreeing(bands: int, info: ValidationInfo) -> int:
    channels = info.data.get("channels")
    if channels == 1 != bands:
        raise ValueError(f"channels is {channels}, bands is {bands}, expected one of them: leave out channels")
    return bands


Bands = Annotated[int, Field(ge=1, le=MOST), AfterValidator(_agreeing)]


def channels_of(dataset: Any) -> int:
    """Of the images of a data set, by its params."""
    return getattr(dataset, "bands", None) or dataset.channels


def require_picture(channels: int, what: str, mend: str) -> None:
    """Raises ValueError for channels that no picture of gray or RGB has; what: of whom the sentence speaks."""
    if channels not in (1, 3):
        raise ValueError(f"{what} has images of {channels} channels, expected pictures of 1 (gray) or 3 (RGB): {mend}")


class ToldByReasons:
    """A layout of files none of which may give an image: prepare_images then tells their reasons, and not that classes lack
    images."""

    def __init__(self, layout: Any):
        self.layout = layout

    def __getattr__(self, name: str) -> Any:
        return getattr(self.layout, name)

    def require_images(self, labels: Collection[int]) -> None:
        if labels:
            self.layout.require_images(labels)


def decoder_of(config: Any) -> Callable[[bytes], np.ndarray]:
    """config: of an image_folder that sets `bands`."""
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
    """(bands, height, width) uint8 from the bytes of a file. Raises Unreadable with the reason, also for another number of
    channels."""
    planes = _of_array(data, bands, max_pixels) if data.startswith(NPY) else _of_picture(data, bands, max_pixels)
    how = {"height": height, "width": width, "resize": resize, "filter": filter, "background": background}
    return np.concatenate([pixels_of(plane, channels=1, **how) for plane in planes])


def _of_array(data: bytes, bands: int, max_pixels: int) -> Iterator[Image.Image]:
    """The channels of an npy file. What its header says is looked at before any pixel is."""
    file = BytesIO(data)
    try:
        shape, _, dtype = NPY_HEADERS[np.lib.format.read_magic(file)](file)
    except Exception as error:  # numpy parses the header as Python, which fails in whatever way damaged bytes lead to
        raise Unreadable(f"has a header that numpy cannot read ({type(error).__name__}): {AS_PAGES}") from None
    _require_uint8(dtype)
    if len(shape) == 2:
        shape = (*shape, 1)
    if len(shape) != 3 or shape[2] != bands or 0 in shape:
        is_first = len(shape) == 3 and shape[0] == bands and shape[2] > MOST
        mend = "put the channels last, as np.moveaxis(array, 0, -1) does" if is_first else "correct it, or bands"
        expected = f"(H, W, {bands})" + (" or (H, W)" if bands == 1 else "")
        raise Unreadable(f"is an array of the shape {str(shape):.80}, expected {expected}: {mend}")
    if shape[0] * shape[1] > max_pixels:
        raise Unreadable(f"has {shape[1]} x {shape[0]} pixels, more than max_pixels {max_pixels:,}")
    number, stated = len(data) - file.tell(), shape[0] * shape[1] * bands
    if number != stated:
        raise Unreadable(
            f"has {number:,} bytes of pixels, expected {stated:,} by its shape: it is damaged; save it again"
        )
    array = np.load(BytesIO(data), allow_pickle=False).reshape(shape)
    for band in range(bands):
        yield Image.fromarray(np.ascontiguousarray(array[..., band]))


def _require_uint8(dtype: np.dtype) -> None:
    if dtype.hasobject:
        raise Unreadable(f"holds Python objects, which are never unpickled, expected uint8: {AS_PAGES}")
    if dtype == np.uint16 or dtype == np.dtype(">u2"):
        raise Unreadable(WIDE)
    if dtype != np.uint8:
        raise Unreadable(
            f"holds {str(dtype):.40}, expected uint8: scale it to 0 to 255 by what is black and white in it"
        )


def _of_picture(data: bytes, bands: int, max_pixels: int) -> Iterator[Image.Image]:
    """The channels of a file that Pillow reads."""
    try:
        with opened(data, max_pixels) as image:
            if image.format not in FORMATS:
                raise Unreadable(f"is {image.format}, expected npy, TIFF, PNG, JPEG or WebP: {AS_PAGES}")
            num_pages = _num_pages(image, bands)
            image.seek(0)
            size = image.size
            if num_pages == 1:
                _require_as_it_is(image, data)
                yield from _channels(image, bands)
                return
            if image.format != "TIFF" or num_pages != bands:
                number = num_pages if num_pages <= bands else f"more than {bands}"
                raise Unreadable(
                    f"has {number} pages or frames, expected one, or of TIFF {bands}, one for each channel: correct it, "
                    f"or bands"
                )
            for page in range(bands):
                image.seek(page)
                if image.size != size:
                    raise Unreadable(
                        f"has pages of {_by(size)} and of {_by(image.size)} pixels, expected one size: save them alike"
                    )
                _require_as_it_is(image, data)
                if image.mode != "L":
                    raise Unreadable(f"has page {page + 1} in mode {image.mode}, expected gray pages: {AS_PAGES}")
                image.load()
                yield image.copy()
    except Unreadable as reason:
        if data[:4] in TIFF and "cannot identify" in str(reason):
            raise Unreadable(
                f"is no TIFF that Pillow can read, which has at most 4 channels in a page: {AS_PAGES}"
            ) from None
        raise


def _num_pages(image: Image.Image, most: int) -> int:
    """At most one more than `most`: a damaged file may have millions."""
    for page in range(1, most + 1):
        try:
            image.seek(page)
        except EOFError:
            return page
    return most + 1


def _require_as_it_is(image: Image.Image, data: bytes) -> None:
    """Raises Unreadable where Pillow would give other values than the page or picture has."""
    is_tiff = image.format == "TIFF"
    tags = image.tag_v2 if is_tiff else {}
    depths = set(tags.get(BITS, (1,))) if is_tiff else {data[DEPTH_OF_PNG]} if image.format == "PNG" else {8}
    if 16 in depths:
        raise Unreadable(WIDE)
    if depths != {8} or image.mode not in MODES:
        bits = " and ".join(map(str, sorted(depths)))
        raise Unreadable(
            f"is in Pillow's mode {image.mode} of {bits} bits, expected 8 bits for each channel and no palette: {AS_PAGES}"
        )
    number = len(image.getbands())
    if is_tiff and (tags.get(SAMPLES, 1) != number or PREMULTIPLIED in tags.get(EXTRA, ())):
        raise Unreadable(
            f"has {tags.get(SAMPLES, 1)} channels in a page, of which Pillow reads {number} or changes some: {AS_PAGES}"
        )
    if "transparency" in image.info:
        raise Unreadable(f"names a transparent color, which is no channel, expected none: {AS_PAGES}")


def _channels(image: Image.Image, bands: int) -> tuple[Image.Image, ...]:
    found = len(image.getbands())
    if found != bands:
        raise Unreadable(f"has {found} channel{'s' * (found > 1)}, expected {bands}: correct it, or bands")
    return image.split()  # each with the orientation, which pixels_of applies


def _by(size: tuple[int, int]) -> str:
    return f"{size[0]} x {size[1]}"

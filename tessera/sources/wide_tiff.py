"""TIFF of 16 bits: a page of gray for each channel, or one page of 1 to 16 channels, of which Pillow reads one without loss.

The directory of each page is read here, and its strips or tiles are given to Pillow as one gray picture, so many times as wide
as a pixel has samples: every compression without loss treats bytes so. Horizontal differences, which a pixel's samples have
each with its own kind, are undone here.

Source: Adobe, "TIFF Revision 6.0", 1992: the directory in section 2, differences in section 14, tiles in section 15; BigTIFF as
libtiff has it.
"""

import struct
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from tessera.sources.bands import AS_WIDE_ARRAY, NARROW
from tessera.sources.decoding import PILLOW_MAX_PIXELS, opened
from tessera.sources.records import Unreadable

SIGNATURES = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
SUBFILE, WIDTH, HEIGHT, BITS, COMPRESSION, PHOTOMETRIC, FILL = 254, 256, 257, 258, 259, 262, 266
STRIPS, ORIENTATION, SAMPLES, ROWS, STRIP_BYTES, PLANAR, PREDICTOR = 273, 274, 277, 278, 279, 284, 317
TILE_WIDTH, TILE_HEIGHT, TILES, TILE_BYTES, FORMAT = 322, 323, 324, 325, 339
USUAL = {SUBFILE: 0, BITS: 1, COMPRESSION: 1, FILL: 1, ORIENTATION: 1, SAMPLES: 1, PLANAR: 1, PREDICTOR: 1, FORMAT: 1}
TYPES = {1: "B", 3: "H", 4: "I", 13: "I", 16: "Q", 18: "Q"}  # of numbers that a directory holds
LOSSLESS = {1: "none", 5: "LZW", 8: "deflate", 32946: "deflate", 32773: "PackBits", 34925: "LZMA", 50000: "Zstandard"}
GRAY_OR_RGB = (1, 2)  # of PHOTOMETRIC: black is 0
SMALLER_OR_MASK = 1 | 4  # of SUBFILE: a page that only shows another one smaller, or where it is transparent
UNSIGNED = 1  # of FORMAT
MOST_ENTRIES, MOST_PARTS = 4096, 2**20  # of a directory, and strips or tiles of a page


class Page(NamedTuple):
    tags: dict[int, tuple[int, ...]]

    def one(self, tag: int) -> int:
        found = self.tags.get(tag) or (USUAL.get(tag, 0),)
        return found[0]

    @property
    def size(self) -> tuple[int, int]:
        return self.one(WIDTH), self.one(HEIGHT)


def decode(data: bytes, bands: int, max_pixels: int) -> tuple[np.ndarray, list[int]]:
    """(bands, H, W) uint16, and the orientation of EXIF of each channel, or of all. Raises Unreadable with the reason."""
    order = "<" if data[:2] == b"II" else ">"
    try:
        pages = [page for page in _pages(data, order, bands + 1) if not page.one(SUBFILE) & SMALLER_OR_MASK]
    except (struct.error, IndexError):
        raise Unreadable("has a directory that is damaged or cut off: save it again") from None
    if len(pages) not in (1, bands):
        number = len(pages) if len(pages) <= bands else f"more than {bands}"
        raise Unreadable(f"has {number} pages, expected one, or {bands}, one for each channel: correct it, or bands")
    samples = bands if len(pages) == 1 else 1
    for page in pages:
        if page.size != pages[0].size:
            sizes = " and of ".join(f"{width} x {height}" for width, height in (pages[0].size, page.size))
            raise Unreadable(f"has pages of {sizes} pixels, expected one size: save them alike")
        _require(page, samples, max_pixels)
    return np.concatenate([_values(data, order, page) for page in pages]), [page.one(ORIENTATION) for page in pages]


def _pages(data: bytes, order: str, most: int) -> Iterator[Page]:
    """At most so many: a damaged file may have millions."""
    is_big = data[2:4] in (b"+\0", b"\0+")
    offset, number, entry = ("Q", "Q", "HHQ8s") if is_big else ("I", "H", "HHI4s")
    start = 8 if is_big else 4
    seen: set[int] = set()
    for _ in range(most):
        (place,) = struct.unpack_from(order + offset, data, start)
        if not place or place in seen:
            return
        seen.add(place)
        (count,) = struct.unpack_from(order + number, data, place)
        if count > MOST_ENTRIES:
            raise Unreadable(f"has a directory of {count:,} entries: it is damaged; save it again")
        place += struct.calcsize(order + number)
        tags = {}
        for _ in range(count):
            tag, kind, length, value = struct.unpack_from(order + entry, data, place)
            if kind in TYPES and length <= MOST_PARTS:
                tags[tag] = _numbers(data, order, TYPES[kind], length, value, offset)
            place += struct.calcsize(order + entry)
        start = place
        yield Page(tags)


def _numbers(data: bytes, order: str, kind: str, length: int, value: bytes, offset: str) -> tuple[int, ...]:
    packed = f"{order}{length}{kind}"
    if struct.calcsize(packed) <= len(value):
        return struct.unpack_from(packed, value)
    return struct.unpack_from(packed, data, struct.unpack(order + offset, value)[0])


def _require(page: Page, samples: int, max_pixels: int) -> None:
    """Raises Unreadable for a page that is not of so many channels of 16 bits."""
    width, height = page.size
    if width < 1 or height < 1:
        raise Unreadable(f"has a page of {width} x {height} pixels: it is damaged; save it again")
    if width * height > max_pixels:
        raise Unreadable(f"has {width} x {height} pixels, more than max_pixels {max_pixels:,}")
    found, depths = page.one(SAMPLES), set(page.tags.get(BITS, (1,)))
    if depths == {8}:
        raise Unreadable(NARROW)
    if depths != {16} or set(page.tags.get(FORMAT, (UNSIGNED,))) != {UNSIGNED}:
        bits = " and ".join(map(str, sorted(depths)))
        kind = "whole numbers without sign" if depths == {16} else "16 bits for each channel"
        raise Unreadable(f"has samples of {bits} bits, expected {kind}: {AS_WIDE_ARRAY}")
    if found != samples:
        raise Unreadable(f"has {found} channel{'s' * (found > 1)} in a page, expected {samples}: correct it, or bands")
    if page.one(COMPRESSION) not in LOSSLESS or page.one(PREDICTOR) not in (1, 2) or page.one(FILL) != 1:
        names = ", ".join(dict.fromkeys(LOSSLESS.values()))
        raise Unreadable(
            f"is compressed by method {page.one(COMPRESSION)} with predictor {page.one(PREDICTOR)}, expected {names}, and "
            f"predictor 1 or 2: {AS_WIDE_ARRAY}"
        )
    if page.one(PHOTOMETRIC) not in GRAY_OR_RGB:
        raise Unreadable(
            f"has the photometric interpretation {page.one(PHOTOMETRIC)}, expected 1 (0 is black) or 2 (RGB): {AS_WIDE_ARRAY}"
        )
    if width * height * samples > PILLOW_MAX_PIXELS:
        raise Unreadable(
            f"has {width} x {height} pixels of {samples} channels in a page, more than {PILLOW_MAX_PIXELS:,} values, which is "
            f"the most of Pillow: save a page for each channel"
        )


def _values(data: bytes, order: str, page: Page) -> np.ndarray:
    """(samples, H, W) of a page."""
    samples, is_tiled = page.one(SAMPLES), TILES in page.tags
    starts, lengths = (page.tags.get(tag, ()) for tag in ((TILES, TILE_BYTES) if is_tiled else (STRIPS, STRIP_BYTES)))
    if not starts or len(starts) != len(lengths):
        raise Unreadable(
            f"has {len(starts)} places for {len(lengths)} parts of its pixels: it is damaged; save it again"
        )
    if any(start + length > len(data) for start, length in zip(starts, lengths, strict=True)):
        raise Unreadable("ends before its pixels do: save it again")
    parts = [data[start : start + length] for start, length in zip(starts, lengths, strict=True)]
    if page.one(PLANAR) == 1 or samples == 1:
        return np.moveaxis(_interleaved(order, page, parts, samples), -1, 0)
    each = len(parts) // samples
    planes = [_interleaved(order, page, parts[band * each : (band + 1) * each], 1) for band in range(samples)]
    return np.stack([plane[..., 0] for plane in planes])


def _interleaved(order: str, page: Page, parts: list[bytes], samples: int) -> np.ndarray:
    """(H, W, samples)"""
    (width, height), tile_width = page.size, page.one(TILE_WIDTH)
    with opened(_as_gray(order, page, parts, samples), PILLOW_MAX_PIXELS) as picture:
        values = np.asarray(picture).astype(np.uint16).reshape(height, width, samples)
    if page.one(PREDICTOR) == 1:
        return values
    starts = range(0, width, tile_width) if TILES in page.tags else (0,)
    pieces = [values[:, start : start + (tile_width if TILES in page.tags else width)] for start in starts]
    return np.concatenate([np.cumsum(piece, axis=1, dtype=np.uint16) for piece in pieces], axis=1)


def _as_gray(order: str, page: Page, parts: list[bytes], samples: int) -> bytes:
    """A TIFF of one page of 16-bit gray, the samples of a pixel side by side."""
    width, height = page.size
    tags = {WIDTH: (width * samples,), HEIGHT: (height,), BITS: (16,), PHOTOMETRIC: (1,), SAMPLES: (1,)}
    tags |= {COMPRESSION: (page.one(COMPRESSION),)}
    places, sizes = (STRIPS, STRIP_BYTES)
    if TILES in page.tags:
        places, sizes = TILES, TILE_BYTES
        tags |= {TILE_WIDTH: (page.one(TILE_WIDTH) * samples,), TILE_HEIGHT: (page.one(TILE_HEIGHT),)}
    else:
        tags[ROWS] = (min(page.one(ROWS) or height, height),)
    starts = np.cumsum([8, *map(len, parts)])[:-1].tolist()
    tags |= {places: tuple(starts), sizes: tuple(map(len, parts))}
    directory = 8 + sum(map(len, parts))
    beyond, tail, entries = directory + 2 + 12 * len(tags) + 4, b"", b""
    for tag, values in sorted(tags.items()):
        packed = struct.pack(f"{order}{len(values)}I", *values)
        if len(values) > 1:
            place, tail = beyond + len(tail), tail + packed
            packed = struct.pack(f"{order}I", place)
        entries += struct.pack(f"{order}HHI", tag, 4, len(values)) + packed
    header = (b"II*\0" if order == "<" else b"MM\0*") + struct.pack(f"{order}I", directory)
    count = struct.pack(f"{order}H", len(tags))
    return header + b"".join(parts) + count + entries + bytes(4) + tail

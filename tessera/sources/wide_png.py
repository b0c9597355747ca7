"""PNG of 16 bits, of gray, gray and alpha, RGB or RGBA, of which Pillow reads gray alone without loss.

A PNG predicts each byte from those of the pixel to the left and of the row above, at the same place in the pixel (W3C,
"Portable Network Graphics (PNG) Specification (Third Edition)", 2025, section 9). So no byte depends on bytes at other places:
those of 16-bit RGB, six to a pixel, are regrouped here as two pictures of 8-bit RGB with the same filters, which Pillow undoes
exactly.
"""

import struct
import zlib
from collections.abc import Iterator
from io import BytesIO

import numpy as np
from PIL import Image

from tessera.sources.bands import AS_WIDE_ARRAY, NARROW
from tessera.sources.decoding import opened
from tessera.sources.records import Unreadable

SIGNATURE = b"\x89PNG\r\n\x1a\n"
CHANNELS = {0: 1, 4: 2, 2: 3, 6: 4}  # by the color type; 3 is a palette
LANES = {
    2: (4, 1),
    4: (6, 1),
    6: (2, 2),
    8: (6, 2),
}  # by bytes of a pixel: the color type of 8 bits, and how many pictures
ORIENTATION = 0x0112


def decode(data: bytes, bands: int, max_pixels: int) -> tuple[np.ndarray, int]:
    """(bands, H, W) uint16 and the orientation of EXIF. Raises Unreadable with the reason."""
    with opened(data, max_pixels):  # Pillow looks at the header, the size and what is told beside the pixels
        width, height, depth, color, _, _, is_interlaced = struct.unpack(">IIBBBBB", data[16:29])
        _require(bands, depth, color, is_interlaced)
        compressed, others = _chunks(data)
        if b"tRNS" in others:
            raise Unreadable(f"names a transparent color, which is no channel, expected none: {AS_WIDE_ARRAY}")
        if b"acTL" in others:
            raise Unreadable("is an animation, expected one picture: save its frames as files")
        orientation = _orientation(others.get(b"eXIf", b""))
        row = 1 + 2 * bands * width  # a byte names its filter
        lines = _unpacked(compressed, row * height).reshape(height, row)
        color, number = LANES[2 * bands]
        lanes = lines[:, 1:].reshape(height, width, number, -1)
        found = [_of_8_bits(lines[:, :1], lanes[:, :, part], color) for part in range(number)]
    raw = np.concatenate(found, axis=2).reshape(height, width, bands, 2)
    return np.moveaxis(raw.view(">u2")[..., 0], -1, 0).astype(np.uint16), orientation


def _require(bands: int, depth: int, color: int, is_interlaced: int) -> None:
    if depth == 8 and color in CHANNELS:
        raise Unreadable(NARROW)
    if depth != 16 or color not in CHANNELS:
        raise Unreadable(f"has {depth} bits or a palette, expected 16 bits for each channel: {AS_WIDE_ARRAY}")
    if is_interlaced:
        raise Unreadable(f"is interlaced, expected none of 16 bits that is: {AS_WIDE_ARRAY}")
    if CHANNELS[color] != bands:
        found = CHANNELS[color]
        raise Unreadable(f"has {found} channel{'s' * (found > 1)}, expected {bands}: correct it, or bands")


def _chunks(data: bytes) -> tuple[bytes, dict[bytes, bytes]]:
    """The compressed pixels, and the first of each other kind of chunk. Raises Unreadable for a damaged file."""
    pixels, others, place = [], {}, len(SIGNATURE)
    while place + 12 <= len(data):
        length, kind = struct.unpack(">I4s", data[place : place + 8])
        body, end = data[place + 8 : place + 8 + length], data[place + 8 + length : place + 12 + length]
        if len(end) != 4 or struct.unpack(">I", end)[0] != zlib.crc32(kind + body):
            raise Unreadable(f"has a chunk {kind.decode('latin-1')} that is damaged or cut off: save it again")
        if kind == b"IEND":
            return b"".join(pixels), others
        if kind == b"IDAT":
            pixels.append(body)
        else:
            others.setdefault(kind, body)
        place += 12 + length
    raise Unreadable("ends before its pixels do: save it again")


def _unpacked(compressed: bytes, length: int) -> np.ndarray:
    """(length,) uint8: no more is unpacked, whatever the file holds."""
    try:
        found = zlib.decompressobj().decompress(compressed, length)
    except zlib.error as error:
        raise Unreadable(f"has pixels that cannot be unpacked ({error}): save it again") from None
    if len(found) != length:
        raise Unreadable(f"has {len(found):,} bytes of pixels, expected {length:,}: it is damaged; save it again")
    return np.frombuffer(found, np.uint8)


def _of_8_bits(filters: np.ndarray, lanes: np.ndarray, color: int) -> np.ndarray:
    """(H, 1) filters and (H, W, lanes) filtered bytes -> (H, W, lanes), by a PNG of 8 bits for Pillow to read."""
    height, width, _ = lanes.shape
    lines = np.concatenate([filters, lanes.reshape(height, -1)], axis=1).tobytes()
    header = struct.pack(">IIBBBBB", width, height, 8, color, 0, 0, 0)
    chunks = ((b"IHDR", header), (b"IDAT", zlib.compress(lines, 0)), (b"IEND", b""))
    with Image.open(BytesIO(SIGNATURE + b"".join(_packed(chunks))), formats=["PNG"]) as image:
        return np.asarray(image).reshape(height, width, -1)


def _packed(chunks: tuple[tuple[bytes, bytes], ...]) -> Iterator[bytes]:
    for kind, body in chunks:
        yield struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def _orientation(exif: bytes) -> int:
    found = Image.Exif()
    if exif:
        found.load(exif)
    return found.get(ORIENTATION, 1)

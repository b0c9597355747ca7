"""Images of 1 to 16 channels: every value arrives, and what would lose some is listed with its reason, or refused."""

import io
import pickle
import struct
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from stages import prepare_images
from tessera.artifacts import images as image_artifact
from tessera.components import InvalidParams, parse
from tessera.datasets import image_folder
from tessera.running.job import Job
from tessera.sources import bands, processes
from tessera.sources.decoding import pillow_warnings
from tessera.sources.records import Unreadable

RULES = {"height": 4, "width": 6, "resize": "crop", "filter": "lanczos", "background": "white", "max_pixels": 10**6}


def pixels(channels: int, seed: int = 0, height: int = 4, width: int = 6, dtype: Any = np.uint8) -> np.ndarray:
    """(H, W, C)"""
    values = np.random.default_rng(seed).integers(0, np.iinfo(dtype).max, (height, width, channels), endpoint=True)
    return values.astype(dtype)


def npy(array: np.ndarray, **options: Any) -> bytes:
    out = io.BytesIO()
    np.save(out, array, **options)
    return out.getvalue()


def encoded(image: Image.Image, format: str, **options: Any) -> bytes:
    out = io.BytesIO()
    image.save(out, format, **options)
    return out.getvalue()


def tiff(*pages: np.ndarray, **options: Any) -> bytes:
    """A page for each (H, W) array."""
    first, *others = map(Image.fromarray, pages)
    return encoded(first, "TIFF", save_all=True, append_images=others, **options)


def as_pages(array: np.ndarray) -> bytes:
    return tiff(*np.moveaxis(array, -1, 0))


def decoded(data: bytes, channels: int, **rules: Any) -> np.ndarray:
    return bands.decode(data, bands=channels, **{**RULES, **rules})


@pytest.mark.parametrize("channels", [1, 2, 3, 4, 5, 13, 16])
def test_every_value_of_every_channel_arrives(channels: int) -> None:
    array = pixels(channels)
    for data in (npy(array), npy(np.asfortranarray(array)), as_pages(array)):
        np.testing.assert_array_equal(decoded(data, channels), array.transpose(2, 0, 1))
    if channels == 1:
        np.testing.assert_array_equal(decoded(npy(array[..., 0]), 1), array.transpose(2, 0, 1))


OF_MODES = [(format, mode) for format in ("PNG", "TIFF") for mode in ("L", "LA", "RGB", "RGBA")]


@pytest.mark.parametrize(("format", "mode"), [*OF_MODES, ("WEBP", "RGB"), ("WEBP", "RGBA")])
def test_alpha_and_gray_stay_channels_of_their_own(format: str, mode: str) -> None:
    array = pixels(len(mode))
    data = encoded(
        Image.fromarray(array.squeeze(), mode), format, **{"lossless": True, "exact": True} if format == "WEBP" else {}
    )
    np.testing.assert_array_equal(decoded(data, len(mode)), array.transpose(2, 0, 1))


def test_each_channel_is_resized_as_a_gray_picture_is() -> None:
    from tessera.sources.decoding import decode

    array = pixels(5, height=9, width=17)
    for resize in ("crop", "pad", "stretch"):
        found = decoded(npy(array), 5, resize=resize)
        for band in range(5):
            alone = decode(encoded(Image.fromarray(array[..., band]), "PNG"), channels=1, **{**RULES, "resize": resize})
            np.testing.assert_array_equal(found[band], alone[0])


@pytest.mark.parametrize("orientation", [3, 6])
def test_the_orientation_of_pictures_and_of_pages_is_applied(orientation: int) -> None:
    array = pixels(3, height=6, width=4) if orientation == 6 else pixels(3)
    exif = Image.Exif()
    exif[0x0112] = orientation
    turned = np.rot90(array, -1 if orientation == 6 else 2).transpose(2, 0, 1)
    for data in (
        encoded(Image.fromarray(array), "PNG", exif=exif),
        encoded(Image.fromarray(array), "TIFF", exif=exif),
        tiff(*np.moveaxis(array, -1, 0), exif=exif),
    ):
        np.testing.assert_array_equal(decoded(data, 3), turned)


class Runs:
    """What unpickling would call."""

    def __reduce__(self) -> Any:
        return pytest.fail, ("it was unpickled",)


def with_samples(number: int, extra: int) -> bytes:
    """A TIFF of so many 8-bit samples in each pixel of one page, as programs for satellite images write it."""
    values = pixels(number).tobytes()
    beyond = [extra] * (number - 3)
    long = {BITS: [8] * number} | ({338: beyond} if beyond else {})
    tags: dict[int, list[int]] = {256: [6], 257: [4], 259: [1], 262: [2], 277: [number], 278: [4], 279: [len(values)]}
    tags |= long | {273: [0]}
    start = 8 + 2 + 12 * len(tags) + 4
    entries, tail = b"", b""
    for tag, value in sorted(tags.items()):
        packed = struct.pack(f"<{len(value)}H", *value)
        if tag == 273:
            packed = struct.pack("<H", start + 64)
        elif len(packed) > 4:
            place = start + len(tail)
            tail += packed
            packed = struct.pack("<I", place)
        entries += struct.pack("<HHI", tag, 3, len(value)) + packed.ljust(4, b"\0")
    return b"II*\0" + struct.pack("<IH", 8, len(tags)) + entries + bytes(4) + tail.ljust(64, b"\0") + values


BITS = 258
PALETTE = Image.fromarray(pixels(1)[..., 0] % 4)
PALETTE.putpalette(list(range(12)))
WIDE = pixels(1, dtype=np.uint16)[..., 0]


def wide_color_png() -> bytes:
    """RGB of 16 bits, which Pillow reads as 8 and does not write."""
    import zlib

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    lines = b"".join(b"\0" + bytes(range(36)) for _ in range(4))
    header = struct.pack(">IIBBBBB", 6, 4, 16, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(lines)) + chunk(b"IEND", b"")


def claiming(shape: tuple[int, ...]) -> bytes:
    """An npy file that states another shape than it has."""
    out = io.BytesIO()
    np.lib.format.write_array_header_1_0(out, {"descr": "|u1", "fortran_order": False, "shape": shape})
    return out.getvalue() + bytes(10)


UNREADABLE: dict[str, tuple[bytes, int, str]] = {  # the file, the channels that are asked for, and the reason
    "no channels enough": (npy(pixels(3)), 4, r"shape \(4, 6, 3\), expected \(H, W, 4\): correct it, or bands"),
    "17 channels": (npy(pixels(17)), 16, r"shape \(4, 6, 17\), expected \(H, W, 16\)"),
    "channels first": (npy(pixels(5, width=20).transpose(2, 0, 1)), 5, r"\(H, W, 5\): put the channels last, as np.moveaxis"),
    "gray for several": (npy(pixels(1)[..., 0]), 4, r"shape \(4, 6, 1\), expected \(H, W, 4\)"),
    "a stack": (npy(pixels(3)[None]), 3, r"shape \(1, 4, 6, 3\), expected \(H, W, 3\)"),
    "a number": (npy(np.uint8(3)), 1, r"shape \(\), expected \(H, W, 1\) or \(H, W\)"),
    "no pixels": (npy(np.zeros((0, 6, 3), np.uint8)), 3, r"shape \(0, 6, 3\), expected"),
    "uint16": (npy(pixels(3, dtype=np.uint16)), 3, "has 16 bits for each channel, expected 8, because bits would be lost"),
    "uint16, the other order of bytes": (npy(pixels(3, dtype=np.uint16).astype(">u2")), 3, "has 16 bits for each channel"),
    "int32": (npy(pixels(3).astype(np.int32)), 3, "holds int32, expected uint8: scale it to 0 to 255"),
    "float": (npy(pixels(3) / 255), 3, "holds float64, expected uint8: scale it to 0 to 255"),
    "NaN": (npy(np.full((4, 6), np.nan, np.float32)), 1, "holds float32, expected uint8"),
    "booleans": (npy(pixels(1) > 9), 1, "holds bool, expected uint8"),
    "fields": (npy(np.zeros((4, 6), [("r", "u1"), ("g", "u1")])), 2, "expected uint8"),
    "a pickled object": (npy(np.array([[Runs()]], object)), 1, "holds Python objects, which are never unpickled, expected"),
    "a bare pickle": (pickle.dumps(pixels(3)), 3, "Pillow cannot identify it as an image"),
    "cut short": (npy(pixels(3))[:-5], 3, "has 67 bytes of pixels, expected 72 by its shape: it is damaged"),
    "longer": (npy(pixels(3)) + b"x", 3, "has 73 bytes of pixels, expected 72 by its shape"),
    "cut in the header": (npy(pixels(3))[:40], 3, "has a header that numpy cannot read"),
    "another version": (b"\x93NUMPY\x09\x00" + npy(pixels(3))[8:], 3, "has a header that numpy cannot read"),
    "a shape beyond memory": (claiming((10**9, 10**9, 3)), 3, "has 1000000000 x 1000000000 pixels, more than max_pixels"),
    "a shape below zero": (claiming((-4, -6, 3)), 3, "has 10 bytes of pixels, expected 72"),
    "a TIFF of 16 bits": (tiff(WIDE, WIDE), 2, "has 16 bits for each channel, expected 8"),
    "one page of 16 bits": (tiff(pixels(1)[..., 0], WIDE), 2, "has 16 bits for each channel, expected 8"),
    "a PNG of 16 bits": (encoded(Image.fromarray(WIDE), "PNG"), 1, "has 16 bits for each channel, expected 8"),
    "a PNG of 16 bits in color": (wide_color_png(), 3, "has 16 bits for each channel, expected 8"),
    "pages of two sizes": (
        tiff(pixels(1)[..., 0], pixels(1, height=3)[..., 0]),
        2,
        "has pages of 6 x 4 and of 6 x 3 pixels, expected one size: save them alike",
    ),
    "a page too few": (as_pages(pixels(3)), 4, "has 3 pages or frames, expected one, or of TIFF 4, one for each channel"),
    "pages too many": (as_pages(pixels(17)), 4, "has more than 4 pages or frames, expected one, or of TIFF 4"),
    "pages for one channel": (as_pages(pixels(2)), 1, "has more than 1 pages or frames, expected one"),
    "pages in color": (tiff(pixels(3), pixels(3)), 2, "has page 1 in mode RGB, expected gray pages: save it as npy"),
    "an empty TIFF": (b"II*\0\0\0\0\0", 3, "is no TIFF that Pillow can read"),
    "a TIFF of 13 channels in a page": (with_samples(13, 0), 13, "is no TIFF that Pillow can read, which has at most 4"),
    "a TIFF of 4 channels, one unnamed": (with_samples(4, 0), 4, "has 4 channels in a page, of which Pillow reads 3"),
    "a TIFF of 5 channels": (with_samples(5, 0), 3, "has 5 channels in a page, of which Pillow reads 3 or changes some"),
    "a TIFF of multiplied colors": (with_samples(4, 1), 4, "has 4 channels in a page, of which Pillow reads 4 or"),
    "a TIFF cut short": (as_pages(pixels(4))[:-30], 4, "OSError|SyntaxError|has [123] page"),
    "a picture of fewer channels": (encoded(Image.fromarray(pixels(3)), "PNG"), 4, "has 3 channels, expected 4: correct it"),
    "a palette": (encoded(PALETTE, "PNG", bits=8), 3, "is in Pillow's mode P of 8 bits, expected 8 bits for each channel"),
    "a palette of 2 bits": (encoded(PALETTE, "PNG"), 3, "is in Pillow's mode P of 2 bits"),
    "one bit": (encoded(Image.fromarray(pixels(1)[..., 0] > 9), "PNG"), 1, "is in Pillow's mode 1 of 1 bits, expected 8"),
    "one bit in TIFF": (encoded(Image.fromarray(pixels(1)[..., 0] > 9), "TIFF"), 1, "is in Pillow's mode 1 of 1 bits"),
    "floats in TIFF": (tiff(WIDE.astype(np.float32)), 1, "is in Pillow's mode F of 32 bits, expected 8 bits"),
    "a transparent color": (
        encoded(Image.fromarray(pixels(1)[..., 0]), "PNG", transparency=7),
        1,
        "names a transparent color, which is no channel, expected none",
    ),
    "CMYK": (encoded(Image.fromarray(pixels(4), "CMYK"), "TIFF"), 4, "is in Pillow's mode CMYK of 8 bits"),
    "an animation": (
        encoded(Image.fromarray(pixels(3)), "PNG", save_all=True, append_images=[Image.fromarray(pixels(3, 1))]),
        2,
        "has 2 pages or frames, expected one",
    ),
    "another format": (encoded(Image.fromarray(pixels(3)), "BMP"), 3, "is BMP, expected npy, TIFF, PNG, JPEG or WebP"),
    "nothing": (b"", 3, "is empty"),
    "too many pixels": (npy(pixels(1, height=1001, width=1000)), 1, "has 1000 x 1001 pixels, more than max_pixels 1,000,000"),
}  # fmt: skip


@pytest.mark.parametrize("name", UNREADABLE)
def test_what_is_not_as_it_should_be_has_a_reason(name: str) -> None:
    data, channels, reason = UNREADABLE[name]
    with pillow_warnings(), pytest.raises(Unreadable, match=reason) as refused:
        decoded(data, channels)
    text = str(refused.value)
    assert "\n" not in text and len(text) < 400 and not text.endswith(".")


@pytest.mark.parametrize("whole", [npy(pixels(3)), as_pages(pixels(3)), encoded(Image.fromarray(pixels(3)), "PNG")])
def test_damaged_bytes_give_a_reason_or_an_image_and_nothing_else(whole: bytes) -> None:
    generator = np.random.default_rng(0)
    with pillow_warnings(), warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        for _ in range(400):
            data = bytearray(whole)
            for place in generator.integers(0, min(len(data), 200), 3):
                data[place] = generator.integers(256)
            try:
                assert decoded(bytes(data[: generator.integers(10, len(data) + 1)]), 3).shape == (3, 4, 6)
            except Unreadable as reason:
                assert str(reason)


def config(source: Path, number: int, **settings: Any) -> image_folder.Config:
    usual = {
        "kind": "image_folder",
        "source": str(source),
        "height": 4,
        "width": 6,
        "labels": "none",
        "bands": number,
    }
    return parse(image_folder.Config, usual | settings)


def prepared(folder: Path, config: image_folder.Config, monkeypatch: pytest.MonkeyPatch) -> Path:
    class Params:
        dataset = config

    monkeypatch.setattr(Job, "require_fit", lambda *of: None)
    prepare_images.run(Params(), folder / "images", Job("prepare_images", folder / "state"))
    return folder / "images"


WRITERS: dict[str, Callable[[np.ndarray], bytes]] = {"npy": npy, "tif": as_pages}


@pytest.mark.parametrize("channels", [2, 13])
def test_the_artifact_holds_the_channels_of_all_files(
    tmp_path: Path, channels: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = tmp_path / "source"
    source.mkdir()
    for number in range(30):
        suffix = list(WRITERS)[number % 2]
        (source / f"{number:02d}.{suffix}").write_bytes(WRITERS[suffix](pixels(channels, number)))
    images = prepared(tmp_path, config(source, channels, test_fraction=0.3), monkeypatch)
    spec, splits = image_artifact.read(images)
    assert spec.channels == channels
    index = pd.read_parquet(images / "index.parquet")
    assert index.kept.all() and len(index) == 30
    for row in index.itertuples():
        found = splits[row.split].uint8(np.array([row.row]))[0].numpy()
        np.testing.assert_array_equal(found, pixels(channels, int(row.source[:2])).transpose(2, 0, 1))


def test_processes_find_what_threads_find(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for number in range(70):
        (tmp_path / f"{number:02d}.npy").write_bytes(npy(pixels(5 + (number == 40), number)))
    of_threads = list(image_folder.records(config(tmp_path, 5)))
    for module in (image_folder, processes):
        monkeypatch.setattr(module, "num_cores", lambda: 2)
    monkeypatch.setattr(image_folder, "PROCESSES_FROM", 1)
    of_processes = list(image_folder.records(config(tmp_path, 5)))
    assert len(of_processes) == 70 and [one.image is None for one in of_processes].index(True) == 40
    for one, other in zip(of_threads, of_processes, strict=True):
        assert one._replace(image=None) == other._replace(image=None)
        assert one.image is other.image is None or np.array_equal(one.image, other.image)


@pytest.mark.parametrize("stray", ["no channels enough", "uint16", "a picture of fewer channels", "pages of two sizes"])
def test_files_of_other_channels_or_bits_among_the_others_stop_the_stage(
    tmp_path: Path, stray: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    data, channels, reason = UNREADABLE[stray]
    source = tmp_path / "source"
    source.mkdir()
    for number in range(20):
        (source / f"{number}.npy").write_bytes(npy(pixels(channels, number)))
    (source / "stray").write_bytes(data)
    with pytest.raises(
        ValueError, match=f"1 of 21 files give no image, expected at most .*'stray' .*{reason}.*Mend or"
    ) as told:
        prepared(tmp_path, config(source, channels), monkeypatch)
    assert "\n" not in str(told.value) and not (tmp_path / "images").exists()


@pytest.mark.parametrize("layout", [{}, {"labels": "folders"}, {"label_pattern": "([a-z])[0-9]+"}])
def test_a_folder_of_16_bits_alone_is_refused_by_that_reason(
    tmp_path: Path, layout: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    source = tmp_path / "source"
    for number in range(6):
        place = source / "ab"[number % 2] / f"{'xy'[number % 2]}{number}.npy"
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_bytes(npy(pixels(3, number, dtype=np.uint16)))
    with pytest.raises(
        ValueError, match=r"6 of 6 files give no image, .*'a/x0.npy' has 16 bits for each channel, expected 8"
    ):
        prepared(tmp_path, config(source, 3, **layout), monkeypatch)


def test_arrays_without_the_key_are_refused_by_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "source").mkdir()
    (tmp_path / "source" / "a.npy").write_bytes(npy(pixels(3)))
    with pytest.raises(ValueError, match=r"has no readable image .*: mend its files \(npy asks for dataset.bands\)"):
        prepared(tmp_path, config(tmp_path / "source", 3).model_copy(update={"bands": None}), monkeypatch)


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"bands": 17}, "bands: input should be less than or equal to 16, got 17"),
        ({"bands": 0}, "bands: input should be greater than or equal to 1, got 0"),
        ({"bands": 4, "channels": 1}, "bands: channels is 1, bands is 4, expected one of them: leave out channels"),
    ],
)
def test_impossible_numbers_of_channels_are_refused(tmp_path: Path, settings: dict[str, Any], sentence: str) -> None:
    with pytest.raises(InvalidParams) as refused:
        config(tmp_path, 4, **settings)
    assert str(refused.value) == sentence

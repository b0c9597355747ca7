"""Images of 16 bits: all 65,536 values arrive from every file, resizing is that of exact arithmetic, and what would lose bits
is refused; arithmetic on them is checked against the plainest form of it."""

import hashlib
import io
import struct
import tarfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
import yaml
from PIL import Image

from stages import prepare_images
from tessera.artifacts import bit_depth, pictures, shards
from tessera.artifacts import images as image_artifact
from tessera.artifacts.images import to_float
from tessera.code import entries
from tessera.components import InvalidParams, parse
from tessera.conditions import image as told_image
from tessera.datasets import image_folder
from tessera.evaluation import garbage
from tessera.metrics import brightness, reconstruction
from tessera.params import Pipeline
from tessera.running.job import Job
from tessera.sources import processes, wide_bands
from tessera.sources.decoding import pillow_warnings
from tessera.sources.records import Unreadable

ROOT = Path(__file__).parents[2]
ALL = np.arange(65536, dtype=np.uint16).reshape(256, 256)
RULES = {"resize": "crop", "filter": "lanczos", "background": "white", "max_pixels": 10**6}


def scattered(channels: int, height: int = 256, width: int = 256) -> np.ndarray:
    """(H, W, C): of 256 x 256 each channel holds every value there is, in an order of its own."""
    values = [np.random.default_rng(number).permutation(65536)[: height * width] for number in range(channels)]
    return np.stack(values, axis=-1).astype(np.uint16).reshape(height, width, channels)


def npy(array: np.ndarray) -> bytes:
    out = io.BytesIO()
    np.save(out, array)
    return out.getvalue()


def encoded(image: Image.Image, format: str, **options: Any) -> bytes:
    out = io.BytesIO()
    image.save(out, format, **options)
    return out.getvalue()


def as_pages(array: np.ndarray, **options: Any) -> bytes:
    first, *others = map(Image.fromarray, np.moveaxis(array, -1, 0))
    return encoded(first, "TIFF", save_all=True, append_images=others, **options)


def paeth(left: int, above: int, corner: int) -> int:
    """As the specification of PNG defines it, section 9.4."""
    p = left + above - corner
    distances = [abs(p - each) for each in (left, above, corner)]
    return (left, above, corner)[distances.index(min(distances))]


def chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def png(array: np.ndarray, depth: int = 16, interlaced: int = 0, before: bytes = b"") -> bytes:
    """Of (H, W, C) uint16, its rows with all five filters in turn, byte after byte by the specification."""
    height, width, channels = array.shape
    rows = array.astype(">u2").view(np.uint8).reshape(height, -1).tolist()
    step, lines, above = 2 * channels, b"", [0] * len(rows[0])
    for number, row in enumerate(rows):
        kind = number % 5
        left, corner = [0] * step + row[:-step], [0] * step + above[:-step]
        predicted = [(0, a, b, (a + b) // 2, paeth(a, b, c))[kind] for a, b, c in zip(left, above, corner, strict=True)]
        lines += bytes([kind]) + bytes((x - p) % 256 for x, p in zip(row, predicted, strict=True))
        above = row
    header = struct.pack(">IIBBBBB", width, height, depth, {1: 0, 2: 4, 3: 2, 4: 6}[channels], 0, 0, interlaced)
    body = before + chunk(b"IDAT", zlib.compress(lines)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + body


def tiff(array: np.ndarray, order: str, is_planar: bool, predictor: int = 1, **other: int) -> bytes:
    """One page of (H, W, C) uint16 in strips of 50 rows, deflated; other: tags by number, with a T before it."""
    height, width, channels = array.shape
    planes = [array[..., band : band + 1] for band in range(channels)] if is_planar else [array]
    if predictor == 2:
        planes = [np.diff(plane, axis=1, prepend=np.zeros_like(plane[:, :1])) for plane in planes]
    strips = [
        zlib.compress(plane[top : top + 50].astype(f"{order}u2").tobytes())
        for plane in planes
        for top in range(0, height, 50)
    ]
    starts = np.cumsum([8, *map(len, strips)]).tolist()
    tags = {256: [width], 257: [height], 258: [16] * channels, 259: [8], 262: [2 if channels > 2 else 1]}
    tags |= {273: starts[:-1], 277: [channels], 278: [50], 279: list(map(len, strips))}
    tags |= {284: [2 if is_planar else 1], 317: [predictor]} | {int(tag[1:]): [value] for tag, value in other.items()}
    place, entries_, tail = starts[-1] + 2 + 12 * len(tags) + 4, b"", b""
    for tag, values in sorted(tags.items()):
        packed = struct.pack(f"{order}{len(values)}I", *values)
        if len(values) > 1:
            tail, packed = tail + packed, struct.pack(f"{order}I", place + len(tail))
        entries_ += struct.pack(f"{order}HHI", tag, 4, len(values)) + packed
    header = (b"II*\0" if order == "<" else b"MM\0*") + struct.pack(f"{order}I", starts[-1])
    return header + b"".join(strips) + struct.pack(f"{order}H", len(tags)) + entries_ + bytes(4) + tail


def decoded(data: bytes, channels: int, size: tuple[int, int] = (256, 256), **rules: Any) -> np.ndarray:
    """size: height, width."""
    with pillow_warnings():
        return wide_bands.decode(data, bands=channels, height=size[0], width=size[1], **{**RULES, **rules})


FILES: dict[str, tuple[int, Callable[[np.ndarray], bytes]]] = {
    "npy": (3, npy),
    "npy of the other order": (3, lambda array: npy(array.astype(">u2"))),
    "npy, Fortran's order": (3, lambda array: npy(np.asfortranarray(array))),
    "npy of gray": (1, lambda array: npy(array[..., 0])),
    "PNG, gray by Pillow": (1, lambda array: encoded(Image.fromarray(array[..., 0]), "PNG")),
    "TIFF, pages": (5, as_pages),
    "TIFF, pages, LZW": (2, lambda array: as_pages(array, compression="tiff_lzw")),
    **{f"PNG of {channels}": (channels, png) for channels in (1, 2, 3, 4)},
    **{
        f"TIFF, one page of {channels}, {order}, {'planes' if is_planar else 'pixels'}, predictor {predictor}": (
            channels,
            lambda array, how=(order, is_planar, predictor): tiff(array, *how),
        )
        for channels, order, is_planar, predictor in (
            (1, ">", False, 1), (3, "<", False, 2), (4, ">", False, 2), (16, "<", False, 1), (5, ">", True, 2),
        )
    },
}  # fmt: skip


@pytest.mark.parametrize("kind", FILES)
def test_all_values_arrive(kind: str) -> None:
    channels, write = FILES[kind]
    array = scattered(channels)
    found = decoded(write(array), channels)
    assert found.dtype == np.uint16 and found.dtype.isnative
    np.testing.assert_array_equal(found, np.moveaxis(array, -1, 0))


def test_floats_are_the_values_from_minus_1_to_1_and_come_back() -> None:
    values = torch.from_numpy(ALL)
    floats = to_float(values)
    assert floats.dtype == torch.float32 and floats.min() == -1 and floats.max() == 1
    np.testing.assert_allclose(floats.numpy(), ALL.astype(np.float64) / 32767.5 - 1, rtol=0, atol=6e-8)
    assert torch.equal(bit_depth.to_uint16(floats), values)
    assert bit_depth.to_uint16(torch.tensor([-7.0, 7.0, 1 / 65535, -1 / 65535])).tolist() == [0, 65535, 32768, 32767]
    with pytest.raises(ValueError, match="not finite"):
        bit_depth.to_uint16(torch.tensor([torch.nan]))


def triangle(values: np.ndarray, size: int) -> np.ndarray:
    """Along the last axis, by the definition of Pillow's bilinear filter: a triangle as wide as the scale, in float64."""
    scale = max(values.shape[-1] / size, 1.0)
    centers = (np.arange(size) + 0.5) * values.shape[-1] / size
    weights = np.maximum(0, 1 - np.abs((np.arange(values.shape[-1]) + 0.5 - centers[:, None]) / scale))
    return values @ (weights / weights.sum(axis=1, keepdims=True)).T


@pytest.mark.parametrize("size", [(96, 33), (300, 411)])
def test_resizing_is_that_of_exact_arithmetic(size: tuple[int, int]) -> None:
    array = scattered(2, 150, 200)
    found = decoded(npy(array), 2, size, resize="stretch", filter="bilinear")
    exact = triangle(triangle(np.moveaxis(array, -1, 0).astype(np.float64), size[1]).swapaxes(1, 2), size[0]).swapaxes(
        1, 2
    )
    assert np.abs(found - exact).max() < 0.51  # rounded, of float32
    assert (np.abs(found - np.rint(exact)) == 0).mean() > 0.99


@pytest.mark.parametrize("resize", ["crop", "pad", "stretch"])
@pytest.mark.parametrize("filter", ["lanczos", "box", "nearest"])
def test_crop_and_pad_lie_where_those_of_8_bits_do(resize: str, filter: str) -> None:
    from tessera.sources.bands import decode

    rules = {**RULES, "bands": 1, "height": 32, "width": 40, "resize": resize, "filter": filter}
    for size in ((90, 61), (61, 150)):
        narrow = (96 + scattered(1, *size) % 64).astype(np.uint8)  # no filter goes beyond black and white
        of_8 = decode(npy(narrow), **rules)
        of_16 = wide_bands.decode(npy(narrow.astype(np.uint16) * 257), **rules)
        assert np.abs(of_16 / 257 - of_8).max() <= (0 if filter == "nearest" else 1.1)  # 8 bits are rounded twice


def test_filters_that_go_beyond_black_and_white_are_clipped() -> None:
    step = np.where(np.arange(40) < 20, 0, 65535).astype(np.uint16)[None].repeat(8, axis=0)
    found = decoded(npy(step), 1, (8, 100), resize="stretch")[0]
    assert (found[:, :48] < 20_000).all() and (found[:, 52:] > 45_000).all()  # below 0 comes 65535 otherwise
    assert found.min() == 0 and found.max() == 65535


@pytest.mark.parametrize("orientation", range(1, 9))
def test_the_orientation_is_applied(orientation: int) -> None:
    from PIL import ImageOps

    array, exif = scattered(1, 6, 4), Image.Exif()
    exif[0x0112] = orientation
    small = Image.fromarray((np.arange(24, dtype=np.uint8)).reshape(6, 4))
    small.info["exif"] = exif.tobytes()
    places = np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(encoded(small, "PNG", exif=exif)))))
    expected = array[..., 0].ravel()[places]
    for data in (
        encoded(Image.fromarray(array[..., 0]), "PNG", exif=exif),
        tiff(array, "<", False, T274=orientation),
    ):
        np.testing.assert_array_equal(decoded(data, 1, expected.shape)[0], expected)


SMALL = scattered(3, 4, 6)
NARROW = (
    r"has 8 bits for each channel, expected 16, as dataset.bits says: leave out bits, or save it with 16, as by values"
)
UNREADABLE: dict[str, tuple[bytes, int, str]] = {  # the file, the channels that are asked for, and the reason
    "8 bits, npy": (npy(SMALL.astype(np.uint8)), 3, NARROW),
    "8 bits, PNG": (encoded(Image.fromarray(SMALL.astype(np.uint8)), "PNG"), 3, NARROW),
    "8 bits, TIFF": (encoded(Image.fromarray(SMALL.astype(np.uint8)), "TIFF"), 3, NARROW),
    "JPEG": (encoded(Image.fromarray(SMALL.astype(np.uint8)), "JPEG"), 3, "is no npy, PNG or TIFF, which alone can hold 16"),
    "signed": (npy(SMALL.astype(np.int16)), 3, "holds int16, expected uint16: add what makes its least value 0"),
    "int32": (npy(SMALL.astype(np.int32)), 3, "holds int32, expected uint16: scale it to 0 to 65535"),
    "float": (npy(SMALL / 65535), 3, "holds float64, expected uint16"),
    "objects": (npy(np.array([[[None]]])), 1, "holds Python objects, which are never unpickled"),
    "channels first": (npy(scattered(5, 4, 20).transpose(2, 0, 1)), 5, r"\(H, W, 5\): put the channels last"),
    "npy cut off": (npy(SMALL)[:-1], 3, "has 143 bytes of pixels, expected 144 by its shape"),
    "other channels, PNG": (png(SMALL), 4, "has 3 channels, expected 4: correct it, or bands"),
    "other channels, TIFF": (tiff(SMALL, "<", False), 4, "has 3 channels in a page, expected 4"),
    "other pages": (as_pages(SMALL), 2, "has more than 2 pages, expected one, or 2, one for each channel"),
    "pages of two sizes": (
        encoded(Image.fromarray(SMALL[..., 0]), "TIFF", save_all=True, append_images=[Image.fromarray(SMALL[:3, :, 1])]),
        2, "has pages of 6 x 4 and of 6 x 3 pixels, expected one size",
    ),
    "interlaced": (png(SMALL, interlaced=1), 3, "is interlaced, expected none of 16 bits that is"),
    "a transparent color": (png(SMALL, before=chunk(b"tRNS", bytes(6))), 3, "names a transparent color, which is no channel"),
    "a damaged chunk": (png(SMALL)[:60] + b"\1" + png(SMALL)[61:], 3, "IDAT that is damaged or cut off"),
    "PNG cut off": (png(SMALL)[:-20], 3, "damaged or cut off"),
    "too few pixels": (
        png(SMALL).replace(struct.pack(">II", 6, 4) + b"\x10\2\0\0\0" + png(SMALL)[29:33], b"") and
        png(SMALL[:3]).replace(png(SMALL[:3])[8:33], png(SMALL)[8:33]), 3, "has 111 bytes of pixels, expected 148",
    ),
    "white is 0": (tiff(SMALL[..., :1], "<", False, T262=0), 1, r"photometric interpretation 0, expected 1 \(0 is black\)"),
    "signed TIFF": (tiff(SMALL[..., :1], "<", False, T339=2), 1, "samples of 16 bits, expected whole numbers without sign"),
    "12 bits": (tiff(SMALL[..., :1], "<", False, T258=12), 1, "samples of 12 bits, expected 16 bits for each channel"),
    "JPEG in TIFF": (tiff(SMALL, "<", False, T259=7), 3, "is compressed by method 7 with predictor 1, expected none, LZW"),
    "TIFF cut off": (tiff(SMALL, "<", False)[:60], 3, "has a directory that is damaged or cut off"),
    "strips beyond the end": (tiff(SMALL, "<", False, T279=10**6), 3, "ends before its pixels do"),
    "too large, TIFF": (tiff(SMALL, "<", False, T256=2000), 3, r"has 2000 x 4 pixels, more than max_pixels"),
    "too large, PNG": (png(scattered(1, 20, 300)), 1, r"has 300 x 20 pixels, more than max_pixels 5,000"),
}  # fmt: skip


@pytest.mark.parametrize("kind", UNREADABLE)
def test_what_would_lose_bits_or_is_damaged_has_its_reason(kind: str) -> None:
    data, channels, reason = UNREADABLE[kind]
    with pytest.raises(Unreadable, match=reason):
        decoded(data, channels, (4, 6), max_pixels=5000)


def config_of(source: Path, **others: Any) -> image_folder.Config:
    rules = {"height": 4, "width": 6, "labels": "none", "bands": 3, "bits": 16, "test_fraction": 0.5, "name": "deep"}
    return parse(image_folder.Config, {"kind": "image_folder", "source": str(source), **rules, **others})


def prepared(config: image_folder.Config, root: Path) -> Path:
    """The images artifact of a data set."""
    raw = yaml.safe_load((ROOT / "params.yaml").read_text())
    job = Job("prepare_images", root / "state")
    job.require_fit = lambda *given: None  # of params that are of other images
    prepare_images.run(parse(Pipeline, raw).model_copy(update={"dataset": config}), root / "images", job)
    return root / "images"


def test_folders_tars_and_shards_give_the_same_images_by_threads_and_by_processes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = {f"{number:02d}": scattered(3, 4, 6) + np.uint16(number) for number in range(12)}
    write = (npy, png, lambda array: npy(array.astype(">u2")), lambda array: tiff(array, ">", False, 2))
    names = ("npy", "png", "npy", "tif")
    files = {
        f"{name}.{names[number % 4]}": write[number % 4](array) for number, (name, array) in enumerate(made.items())
    }
    folder, shard = tmp_path / "folder", tmp_path / "shards"
    folder.mkdir()
    shard.mkdir()
    for name, data in files.items():
        (folder / name).write_bytes(data)
    for path in (tmp_path / "all.tar", shard / "000.tar"):
        with tarfile.open(path, "w") as tar:
            for name, data in files.items():
                info = tarfile.TarInfo(name)
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    table = pd.DataFrame({"image": [{"bytes": data, "path": name} for name, data in files.items()]})
    (tmp_path / "parquet").mkdir()
    table.to_parquet(tmp_path / "parquet/0.parquet")
    expected = sorted(hashlib.sha256(np.moveaxis(array, -1, 0).tobytes()).hexdigest() for array in made.values())
    sources = {
        "folder": config_of(folder), "tar": config_of(tmp_path / "all.tar"), "shards": config_of(shard, shards="tar"),
        "parquet": config_of(tmp_path / "parquet", shards="parquet"),
    }  # fmt: skip
    for kind, config in sources.items():
        spec, splits = image_artifact.read(prepared(config, tmp_path / f"of-{kind}"))
        assert spec.bits == 16
        pixels = [image for split in splits.values() for image in split.pixels.all()]
        assert sorted(hashlib.sha256(each.tobytes()).hexdigest() for each in pixels) == expected, kind
    monkeypatch.setattr(image_folder, "PROCESSES_FROM", 1)
    monkeypatch.setattr(image_folder, "num_cores", lambda: 2)
    monkeypatch.setattr(processes, "num_cores", lambda: 2)
    apart = prepared(config_of(folder), tmp_path / "by-processes")
    assert image_artifact.read(apart)[1]["train"].pixels.all().tobytes() == (
        image_artifact.read(tmp_path / "of-folder/images")[1]["train"].pixels.all().tobytes()
    )


def test_the_index_names_the_shard_of_each_image(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shards, "SHARD_BYTES", 3 * 2 * 3 * 4 * 6)  # three images
    for number in range(20):
        np.save(tmp_path / f"{number:02d}.npy", scattered(3, 4, 6) + np.uint16(number))
    folder = prepared(config_of(tmp_path), tmp_path / "made")
    index = pd.read_parquet(folder / "index.parquet")
    for one in index.itertuples():
        stored = np.load(folder / f"{one.split}/images-{one.shard:05d}.npy")[one.row % 3]
        np.testing.assert_array_equal(stored, np.moveaxis(np.load(tmp_path / one.source), -1, 0))


def test_images_on_a_device_are_the_same_floats(tmp_path: Path) -> None:
    for number in range(8):
        np.save(tmp_path / f"{number}.npy", scattered(3, 4, 6) + np.uint16(7919 * number))
    images = image_artifact.read(prepared(config_of(tmp_path), tmp_path / "made"))[1]["train"]
    rows = torch.arange(len(images))
    there = images.on(torch.device("cpu"))
    ours, theirs = images.batch_of(images.stored(rows)).images, there.batch_of(there.stored(rows)).images
    np.testing.assert_array_equal(ours.numpy(), theirs.numpy())
    np.testing.assert_allclose(ours.numpy(), images.pixels.all() / 32767.5 - 1, atol=1e-7)


def test_bits_stand_beside_bands(tmp_path: Path) -> None:
    with pytest.raises(
        InvalidParams, match="bits: bits is 16, but bands is not set, expected the channels of each file"
    ):
        config_of(tmp_path, bands=None)
    with pytest.raises(InvalidParams, match="bits"):
        config_of(tmp_path, bits=12)


def test_masks_from_files_stay_8_bits_beside_images_of_16(tmp_path: Path) -> None:
    for number in range(8):
        np.save(tmp_path / f"{number}.npy", scattered(3, 4, 6))
        Image.fromarray(np.full((4, 6), number, np.uint8)).save(tmp_path / f"{number}.mask.png")
    config = config_of(tmp_path, metadata={"file": "beside", "picture": "mask.png"})
    folder = prepared(config, tmp_path / "made")
    masks = np.concatenate([np.load(path) for path in sorted(folder.glob("*/pictures-*.npy"))])
    assert masks.dtype == np.uint8 and sorted(masks[:, 0, 0, 0]) == list(range(8))


def test_what_is_told_of_an_image_has_all_its_levels() -> None:
    images = torch.from_numpy(np.moveaxis(scattered(1, 8, 8), -1, 0)[None])
    for shows in ("gray", "edges"):
        config = parse(told_image.Config, {"kind": "image", "shows": shows, "pixels": [8, 8], "patch_size": 4})
        found = told_image.encoded(config, images)[:, 1:]
        x = torch.from_numpy(images.numpy().astype(np.float64)) / 65535
        expected = 2 * (told_image.edges(x) if shows == "edges" else x).clamp(0, 1) - 1
        np.testing.assert_allclose(found.numpy(), expected.flatten(1).numpy(), atol=1e-6)


def test_what_people_see_is_the_nearest_of_8_bits() -> None:
    np.testing.assert_array_equal(bit_depth.shown(ALL), np.rint(ALL / 257).astype(np.uint8))
    assert pictures.grid(ALL[None, None], 1)[1:257, 1:257, 0].tolist() == np.rint(ALL / 257).tolist()
    assert pictures.picture(ALL[None]).mode == "L"


def test_brightness_is_in_the_levels_of_8_bits_and_garbage_in_those_of_16() -> None:
    images = scattered(2, 16, 16).transpose(2, 0, 1)[:, None]
    np.testing.assert_allclose(brightness.levels(images).numpy(), images.mean(axis=(1, 2, 3)) / 257, rtol=1e-12)
    planted = garbage.made_of(images, np.random.default_rng(0))
    assert all(each.dtype == np.uint16 and each.max() > 20_000 for each in planted.values())
    np.testing.assert_array_equal(np.sort(planted["shuffled"].ravel()), np.sort(images.ravel()))


def test_psnr_sees_less_than_a_level_of_8_bits() -> None:
    originals = torch.from_numpy((scattered(2, 16, 16).transpose(2, 0, 1)[:, None] % 60_000).astype(np.uint16))
    decoded = torch.from_numpy(originals.numpy() + np.uint16(40))
    pairs = reconstruction.Pairs(parse(reconstruction.Config, {"kind": "reconstruction"}), None, torch.device("cpu"))
    pairs.update(originals, decoded)
    assert pairs.psnr == pytest.approx([20 * np.log10(65535 / 40)] * 2, abs=1e-3)
    assert 0.99 < min(pairs.ssim) <= 1


def test_every_stage_that_asks_for_bits_is_fingerprinted_with_that_code() -> None:
    raw = yaml.safe_load((ROOT / "presets/emoji.yaml").read_text())
    code, found = entries.all_code(), {}
    for bits in (None, 16):
        raw["dataset"] |= {"bands": 3, "bits": bits} if bits else {}
        listed = entries.read(parse(Pipeline, raw), ROOT / "dvc.yaml")
        found[bits] = {each.stage: entries.code_of(each.params, each.stage, code, each.keys) for each in listed}
    numbers = "tessera.artifacts.bit_depth.to_float"
    assert not any(numbers in reached for reached in found[None].values())
    assert "tessera.artifacts.bit_depth.append" in found[16]["prepare_images"]
    reading = {"train_features", "train_tokenizer", "encode_tokens", "evaluate_tokenizer", "evaluate"}
    assert reading <= {stage for stage, reached in found[16].items() if numbers in reached}
    assert "tessera.artifacts.bit_depth.to_uint16" in found[16]["sample_images"]

"""What lies in a folder (tar, zip) of images: how many, how large, of which colours, in which folders, and what is no image."""

import os
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from tessera.artifacts.shards import spread
from tessera.datasets.image_folder import TEST_FOLDERS, Config
from tessera.sources.archives import Limits, Reader, open_source
from tessera.sources.bands import NPY
from tessera.sources.decoding import opened, pillow_warnings
from tessera.sources.hashing import require_hashable
from tessera.sources.listing import Entry
from tessera.sources.records import Unreadable

MAX_LOOKED_AT = 3000  # files that are opened; of more, as many, evenly spread
DRAFT = (256, 256)  # pixels that a JPEG is decoded to, at least: enough to see damage and colour
SIDEWAYS = (5, 6, 7, 8)  # EXIF orientations that exchange width and height


class Seen(NamedTuple):
    """One file that was opened."""

    name: str
    width: int = 0  # as it is shown, by the EXIF orientation
    height: int = 0
    mode: str = ""  # Pillow's
    is_gray: bool = False
    reason: str = ""  # why it is no image
    loses: str = ""  # what of it a picture of 8 bits has not


class Survey(NamedTuple):
    source: Path
    num_files: int  # hidden ones and systems' droppings apart
    seen: list[Seen]  # of those that were looked at
    root: str  # the folder inside the source below which splits or classes lie
    splits: tuple[str, ...]  # of the folders train, test, val, ...: those that lie there, where there is a split
    class_counts: dict[str, int]  # images (of those looked at) in each folder; empty: the folders are no classes
    num_outside: int  # images (of those looked at) that lie in no split or in no class folder

    @property
    def images(self) -> list[Seen]:
        return [one for one in self.seen if not one.reason]

    @property
    def unreadable(self) -> list[Seen]:
        return [one for one in self.seen if one.reason]

    @property
    def num_images(self) -> int:
        """Of all files, if those that were not looked at are like the others."""
        return round(self.num_files * len(self.images) / max(1, len(self.seen)))

    @property
    def is_gray(self) -> bool:
        return all(one.is_gray for one in self.images)

    def sides(self) -> np.ndarray:
        """(n, 2) widths and heights of the images."""
        return np.array([(one.width, one.height) for one in self.images])


def survey(source: Path, labels: str | None = None) -> Survey:
    """labels: "folders" or "none", where the user says what the folders are. Raises ValueError if there is nothing to use."""
    limits = Limits(
        *(Config.model_fields[f"max_{name}"].default for name in ("file_bytes", "archive_bytes", "archive_files"))
    )
    require_hashable(source)
    with open_source(source, limits) as (entries, read), ThreadPoolExecutor(min(4, os.cpu_count() or 1)) as pool:
        entries = [entry for entry in entries if not entry.ignored]
        looked_at = [entries[row] for row in spread(len(entries), MAX_LOOKED_AT)] if entries else []
        with pillow_warnings():
            look_at = partial(_look, read)
            seen = list(pool.map(look_at, looked_at) if source.is_dir() else map(look_at, looked_at))
    names = [tuple(one.name.split("/")) for one in seen if not one.reason]
    if not names:
        first = f": {seen[0].name!r} {seen[0].reason}" if seen else ""
        raise ValueError(f"{source} holds no image that can be read among {len(entries):,} files{first}")
    root = _root(names)
    names = [parts[len(root) :] for parts in names]
    splits = _splits(names)
    inside = [parts[1:] for parts in names if parts[0] in splits] if splits else names
    counts = Counter(parts[0] for parts in inside if len(parts) > 1)
    loose = len(inside) - counts.total()
    are_classes = len(counts) >= 2 and loose <= 0.01 * len(inside) and min(counts.values()) >= 2
    if labels == "folders" and len(counts) < 2:
        raise ValueError(
            f"{source} has {len(counts)} folder(s) of images, expected a folder per class: leave --labels out"
        )
    if labels == "none" or (labels is None and not are_classes):
        counts, loose = Counter(), 0
    else:
        _require_images_in_classes(source, [one.name for one in seen if one.reason], len(root) + bool(splits), counts)
    outside = len(names) - len(inside) + loose
    return Survey(source, len(entries), seen, "/".join(root), splits, dict(sorted(counts.items())), outside)


def _require_images_in_classes(source: Path, unreadable: list[str], depth: int, counts: Counter[str]) -> None:
    """Every folder is a class, also one without images."""
    folders = {parts[depth] for name in unreadable if len(parts := name.split("/")) > depth + 1}
    barren = sorted(folders - set(counts))
    if barren:
        raise ValueError(
            f"{source}: the folder {barren[0]!r} holds no image, but each folder is a class: take it out, or say --labels none"
        )


def _look(read: Reader, entry: Entry) -> Seen:
    if entry.refusal:
        return Seen(entry.name, reason=entry.refusal)
    try:
        data = read(entry)
        if data.startswith(NPY):
            return Seen(entry.name, reason="is an array of numpy, which dataset.bands reads: write the params by hand")
        with opened(data, Config.model_fields["max_pixels"].default) as image:
            width, height, mode = *image.size, image.mode
            if image.getexif().get(0x0112) in SIDEWAYS:
                width, height = height, width
            image.draft("RGB", DRAFT)
            image.load()
            is_gray = _is_gray(image)
            return Seen(entry.name, width, height, mode, is_gray, loses=_lost(image, mode))
    except Unreadable as error:
        return Seen(entry.name, reason=str(error))


def _lost(image: Image.Image, mode: str) -> str:
    if mode.startswith("I;16"):
        return "has 16 bits, which are scaled to 8"
    try:
        image.seek(1)
    except (EOFError, OSError, SyntaxError):  # there is no second one, or none that can be read
        return ""
    return "has several pages or frames, of which the first is taken"


def _is_gray(image: Image.Image) -> bool:
    """Whether it has no colour: scans are often gray and stored as RGB."""
    if image.mode.startswith(("1", "L", "I", "F")):
        return True
    small = np.asarray(image.convert("RGB").resize((32, 32), Image.Resampling.BOX), np.int16)
    return bool((small.max(axis=2) - small.min(axis=2)).max() <= 2)


def _root(names: list[tuple[str, ...]]) -> tuple[str, ...]:
    """The folders that only wrap all others."""
    depth = 0
    while all(len(parts) > depth + 1 and parts[depth] == names[0][depth] for parts in names):
        depth += 1
    return names[0][:depth]


def _splits(names: list[tuple[str, ...]]) -> tuple[str, ...]:
    tops = {parts[0] for parts in names if len(parts) > 1}
    found = tuple(name for name in TEST_FOLDERS if name in tops)
    return ("train", *found) if "train" in tops and found else ()

"""Pictures in files that metadata name for images: masks, layouts, sketches, as pix2pix is told them.

    metadata: {file: metadata.jsonl, picture: mask}   the column with the file of each image, relative to the metadata's folder
    metadata: {file: beside, picture: mask.png}       a/1.mask.png beside a/1.jpg; of a/1.png beside a/1.jpg, picture: png
                                                      of shards of parquet, picture: mask is the column with their bytes

A picture has the size of its image, and is cropped and resized as that is, but to the nearest pixel: labels are never mixed.
Gray levels are kept as they are, and so are the indices of a palette, which are the classes of a mask; with picture_channels: 3
colors are. The file of a picture is no image, unless metadata speak of it as one.
"""

import posixpath
import sqlite3
from collections.abc import Callable, Iterable, Iterator
from io import BytesIO
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image, ImageOps

from tessera.components import sets
from tessera.sources.archives import PACKED
from tessera.sources.bands import NPY, NPY_HEADERS
from tessera.sources.decoding import Background, Resize, opened, pixels_of
from tessera.sources.listing import Entry, Listing
from tessera.sources.records import Record, Unreadable
from tessera.sources.shards import PictureOf

ORIENTATION, TURNED = 0x0112, (5, 6, 7, 8)  # of EXIF: a quarter of a turn
MOST = 255  # of gray levels
ITSELF = "is the image itself, expected another file: name the column of the pictures, or how their names alone end"


def in_folder(row: dict[str, Any], column: str, folder: Any) -> dict[str, Any]:
    """The row of a file with metadata in this folder, its picture by its name in the source."""
    name = row.get(column)
    return row | {column: posixpath.normpath(f"{folder}/{name}")} if isinstance(name, str) and name else row


def read(value: Any) -> tuple[str | None, str]:
    """What a cell says: the name of a picture; and what is there in its place, if it is none."""
    if value is None or value == "":
        return None, "no picture"
    return (value, "") if isinstance(value, str) else (None, f"{str(value)!r:.40}, which is no name of a file,")


def require_images(described: Any, entries: Iterable[Entry], are_beside: bool) -> None:
    """Raises ValueError where the pictures beside images, by how their names end, are all the files there are.

    described: a Table; are_beside: it is of files beside images.
    """
    if not are_beside or any(not (described.is_metadata(entry.name) or entry.refusal) for entry in entries):
        return
    raise ValueError(
        f"{described.source}: metadata.picture {described.config.picture!r} is how the names of all images end: none is "
        f"left for a picture to lie beside: write how those of pictures alone end, such as mask.png for 1.mask.png beside 1.png"
    )


class PicturedLayout:
    """A layout of images each of which has a picture; files of pictures are no images."""

    def __init__(self, layout: Any, config: Any, entries: Listing):
        """layout: a DescribedLayout; config: of an image_folder whose metadata set `picture`.

        Raises ValueError where no image has one.
        """
        self.layout, self.config = layout, config
        if _is_packed(Path(config.source)):
            raise ValueError(
                f"{config.source} is packed, and can be read from the front to the back alone, where images lie apart from "
                f"their pictures: unpack it, or pack it as a plain .tar or a .zip"
            )
        self._table = sqlite3.connect("", isolation_level=None, check_same_thread=False)
        self._table.execute(
            "CREATE TABLE named (name TEXT PRIMARY KEY, place, size INTEGER, refusal TEXT) WITHOUT ROWID"
        )
        names = ((name,) for name in layout.table.every("picture"))
        self._table.executemany("INSERT OR IGNORE INTO named (name) VALUES (?)", names)
        (number,) = self._table.execute("SELECT COUNT(*) FROM named").fetchone()
        if not number:
            raise ValueError(
                f"{config.source}: no image has a picture by {config.metadata.picture!r}: name another column, or, of "
                f"file: beside, how their names end, or leave out metadata.picture"
            )
        found = ((entry.place, entry.size, entry.refusal, entry.name) for entry in entries)
        self._table.executemany("UPDATE named SET place = ?, size = ?, refusal = ? WHERE name = ?", found)
        if config.labels == "folders" and config.metadata.label is None:
            self._leave_out_folders_of_pictures(entries)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.layout, name)

    def _leave_out_folders_of_pictures(self, entries: Listing) -> None:
        """A folder that holds pictures alone is no class. Raises ValueError where they leave none or one."""
        described, folders = self.layout, self.layout.layout
        names = (entry.name for entry in entries if not entry.refusal)
        found = {folders.place(name).label for name in names if not self.place(name).ignored}
        kept = [name for label, name in enumerate(folders.class_names) if label in found]
        if len(kept) < 2:
            raise ValueError(
                f"{self.config.source} has {len(kept)} folder{'s' * (not kept)} of images beside those of pictures, expected "
                f"one per class: set labels: none if there are no classes"
            )
        described.class_names = folders.class_names = kept
        described.numbers = folders.numbers = {name: label for label, name in enumerate(kept)}

    def place(self, name: str) -> Any:
        place = self.layout.place(name)
        if self._of(name) is not None and self.layout.said(name) is None:
            return place._replace(split="", label=-1, refusal="is the picture of an image", ignored=True)
        if place.refusal:
            return place
        picture = self._of(self.layout.said(name).picture)
        assert picture is not None
        refusal = ITSELF if picture.name == name else picture.refusal
        if not refusal:
            return place
        reason = f"has the picture {picture.name!r:.200}, which {refusal}"
        return place._replace(split="", label=-1, refusal=reason)

    def _of(self, name: str) -> Entry | None:
        """The file of a picture; None: it is none. One that the source lacks has a refusal."""
        found = self._table.execute("SELECT place, size, refusal FROM named WHERE name = ?", (name,)).fetchone()
        if found is None:
            return None
        place, size, refusal = found
        return Entry(name, refusal="is not there") if size is None else Entry(name, place, size, refusal)

    def beside(self, entry: Entry) -> Entry:
        """The entry of an image, whose place is its own and that of its picture."""
        return entry._replace(place=(entry.place, self._of(self.layout.said(entry.name).picture)))


class PicturedRows:
    """A layout of images each of which has a picture in its own row of a table."""

    def __init__(self, layout: Any):
        """layout: a DescribedLayout."""
        self.layout = layout

    def __getattr__(self, name: str) -> Any:
        return getattr(self.layout, name)

    def beside(self, entry: Entry) -> Entry:
        """The entry of an image, whose place is its own and that of its picture."""
        return entry._replace(place=(entry.place, Entry(self.layout.said(entry.name).picture, PictureOf(entry.place))))


def pictured(layout: Any, config: Any, entries: Listing) -> PicturedLayout | PicturedRows:
    """The DescribedLayout of images with their pictures. Raises ValueError as a PicturedLayout does."""
    return PicturedRows(layout) if layout.table.is_table else PicturedLayout(layout, config, entries)


def _is_packed(source: Path) -> bool:
    if not source.is_file():
        return False
    with source.open("rb") as file:
        return file.read(max(map(len, PACKED))).startswith(tuple(PACKED))


class Pair(bytes):
    """The bytes of an image, by which it is known, and with them those of its picture."""

    name: str
    picture: bytes


class PairReader(NamedTuple):
    """Reads an image and its picture."""

    read: Callable[[Entry], bytes]

    def __call__(self, entry: Entry) -> Pair:
        own, picture = entry.place
        data = Pair(self.read(entry._replace(place=own)))
        data.name = picture.name
        try:
            data.picture = self.read(picture)
        except Unreadable as reason:
            raise Unreadable(f"has the picture {picture.name!r:.200}, which {reason}") from None
        return data


class PairDecoder(NamedTuple):
    """(C + P, H, W) uint8 of the bytes of both, in whichever process."""

    decode: Callable[[bytes], np.ndarray]  # of the image
    channels: int  # P
    how: dict[str, Any]  # height, width, resize, background
    max_pixels: int

    def __call__(self, data: Pair) -> np.ndarray:
        image = self.decode(data)
        try:
            with opened(data.picture, self.max_pixels) as file:
                own, size = _turned(file), size_of(data, self.max_pixels)
                if own != size:
                    raise Unreadable(
                        f"has {own[0]} x {own[1]} pixels, expected {size[0]} x {size[1]}, as its image has"
                    )
                pixels = picture_of(file, channels=self.channels, **self.how)
        except Unreadable as reason:
            raise Unreadable(f"has the picture {data.name!r:.200}, which {reason}") from None
        return np.concatenate([image, pixels])


def paired(
    by: Callable[..., Iterator[Record]], listed: Iterable[Any], layout: Any, read: Any, decode: Any
) -> Iterator[Record]:
    """Records of images with their pictures. by: what makes records of listed files, given a reader and a decoder."""
    config = layout.config
    how = {key: getattr(config, key) for key in ("height", "width", "resize", "background")}
    channels = config.metadata.picture_channels or 1

    def with_places() -> Iterator[Any]:
        for each in listed:
            if not each.is_refused:
                each.entry = layout.beside(each.entry)
            yield each

    for record in by(with_places(), PairReader(read), PairDecoder(decode, channels, how, config.max_pixels)):
        if record.image is not None:
            image, picture = record.image[:-channels], record.image[-channels:]
            if sets(config, "bits"):  # those of the image alone; beside it the picture became as wide
                picture = picture.astype(np.uint8)
            record = record._replace(
                image=np.ascontiguousarray(image), metadata=record.metadata._replace(picture=picture)
            )
        yield record


def size_of(data: bytes, max_pixels: int) -> tuple[int, int]:
    """Width and height of an image that can be read, as its orientation has it."""
    if data.startswith(NPY):
        file = BytesIO(data)
        shape = NPY_HEADERS[np.lib.format.read_magic(file)](file)[0]
        return shape[1], shape[0]
    with opened(data, max_pixels) as image:
        return _turned(image)


def _turned(image: Image.Image) -> tuple[int, int]:
    width, height = image.size
    if image.format == "PNG" and "exif" not in image.info:  # it would be decoded to look behind its pixels
        return width, height
    return (height, width) if image.getexif().get(ORIENTATION) in TURNED else (width, height)


def picture_of(
    picture: Image.Image, *, channels: int, height: int, width: int, resize: Resize, background: Background
) -> np.ndarray:
    """(channels, height, width) uint8, by the nearest pixel. Raises Unreadable with the reason."""
    try:
        turned = ImageOps.exif_transpose(picture)
        plain = _gray(turned) if channels == 1 else _colors(turned)
    except Unreadable:
        raise
    except Exception as error:  # pixels are loaded only now
        raise Unreadable(f"cannot be read ({type(error).__name__}: {error})") from None
    return pixels_of(
        plain, channels=channels, height=height, width=width, resize=resize, filter="nearest", background=background
    )


def _gray(picture: Image.Image) -> Image.Image:
    if picture.mode in ("L", "1"):
        return picture.convert("L")
    if picture.mode == "P":  # a mask of classes: the colors of its palette are for people
        return Image.fromarray(np.asarray(picture))
    values = np.asarray(picture)
    if values.ndim == 2 and values.dtype.kind in "iu":
        if values.min() < 0 or values.max() > MOST:
            raise Unreadable(f"has values from {values.min()} to {values.max()}, expected gray levels from 0 to {MOST}")
        return Image.fromarray(values.astype(np.uint8))
    red, green, blue, alpha = np.moveaxis(np.asarray(picture.convert("RGBA")), 2, 0)
    if not (alpha == MOST).all() or not (red == green).all() or not (red == blue).all() or values.dtype.kind == "f":
        raise Unreadable(
            f"is in Pillow's mode {picture.mode} and not gray in every pixel: save it as gray levels, or write "
            f"metadata.picture_channels: 3"
        )
    return Image.fromarray(np.ascontiguousarray(red))


def _colors(picture: Image.Image) -> Image.Image:
    if picture.mode.startswith(("I", "F")):
        return _gray(picture).convert("RGB")
    rgba = picture.convert("RGBA")
    if rgba.getextrema()[3][0] < MOST:
        raise Unreadable("is transparent in some pixels, expected none: paint what lies below")
    return rgba.convert("RGB")


def decoded(data: bytes, max_pixels: int, **how: Any) -> np.ndarray:
    """As `picture_of`, of the bytes of a file. Raises Unreadable with the reason."""
    with opened(data, max_pixels) as file:
        return picture_of(file, **how)

"""Data sets in many files: tars as webdataset writes them, or parquet as the Hugging Face `datasets` package does.

Names of images are those in the tars, or the paths in the image column; without paths the file and the number of the row. Tars
are read anywhere, tables from the front to the back: their images come in the order of the files and rows.
"""

from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any, Literal, NamedTuple

from tessera.sources.archives import Limits, TarReader, open_source
from tessera.sources.listing import Entry, Listing
from tessera.sources.records import Unreadable

ShardKind = Literal["tar", "parquet"]
OF_ONE = 2**44  # places in one shard: bytes of a tar, rows of a table
ROWS_AT_ONCE = 64
AGAIN = "has the name of an earlier image, perhaps in an earlier shard"
Reader = Callable[[Entry], bytes]


def shards_in(path: Path, kind: ShardKind) -> list[Path]:
    """In order of name; a single file is one. Raises ValueError if there are none."""
    found = [path] if path.is_file() else sorted(each for each in path.rglob(f"*.{kind}") if each.is_file())
    if not found:
        raise ValueError(
            f"{path} holds no .{kind} files, expected shards of a data set: correct dataset.source or shards"
        )
    return found


@contextmanager
def open_shards(path: Path, kind: ShardKind, image: str, limits: Limits) -> Iterator[tuple[Listing, Reader]]:
    """As archives.open_source, of many files; image: the column of parquet that holds the images."""
    paths = shards_in(Path(path), kind)
    if kind == "tar":
        with closing(Listing(_in_tars(paths, limits))) as entries:
            yield entries, _tars_reader(paths)
        return
    tables = Tables(paths, image, limits)
    with closing(Listing(tables.entries(), is_sorted=False)) as entries:
        yield entries, tables


@contextmanager
def open_pictured_shards(
    path: Path, kind: ShardKind, image: str, picture: str, limits: Limits
) -> Iterator[tuple[Listing, Reader]]:
    """As open_shards, of images with pictures (sources/pictures.py); picture: the column of parquet that holds these."""
    if kind == "tar":
        with open_shards(path, kind, image, limits) as found:
            yield found
        return
    tables = PicturedTables(shards_in(path, kind), image, picture, limits)
    with closing(Listing(tables.entries(), is_sorted=False)) as entries:
        yield entries, tables


def _in_tars(paths: list[Path], limits: Limits) -> Iterator[Entry]:
    seen: set[int] = set()
    for number, path in enumerate(paths):
        with open_source(path, limits) as (entries, read):
            if not isinstance(read, TarReader):
                raise ValueError(f"{path} is packed, expected a plain .tar: unpack it with gzip, xz or bzip2")
            for entry in entries:
                if entry.refusal:
                    yield entry
                    continue
                refusal = "" if _is_new(entry.name, seen) else AGAIN
                place = number * OF_ONE + entry.place
                yield entry._replace(place=place, refusal=refusal, version=entries.fingerprint)


def _is_new(name: str, seen: set[int]) -> bool:
    """Whether no such name was seen before. Hashes of them are kept: a million take a few ten MB."""
    number = len(seen)
    seen.add(hash(name))
    return len(seen) > number


def _tars_reader(paths: list[Path]) -> Reader:
    def read(entry: Entry) -> bytes:
        number, offset = divmod(entry.place, OF_ONE)
        return TarReader(paths[number])(entry._replace(place=offset))

    return read


class Tables:
    """Images in a column of parquet files: bytes, or {bytes, path}."""

    def __init__(self, paths: list[Path], image: str, limits: Limits):
        self.paths, self.image, self.limits = paths, image, limits
        self._held: tuple[int, int, list[Any]] = (
            -1,
            0,
            [],
        )  # the shard, its first row here, and the images of some rows
        self._rows: Iterator[tuple[int, int, list[Any]]] = iter(())

    def entries(self) -> Iterator[Entry]:
        seen: set[int] = set()
        for number, path in enumerate(self.paths):
            found = path.stat()
            version = f"{found.st_size} {found.st_ino} {found.st_mtime_ns}"
            for row, name in enumerate(self._names(path)):
                refusal = "" if _is_new(name, seen) else AGAIN
                yield Entry(name, number * OF_ONE + row, refusal=refusal, version=version)

    def _names(self, path: Path) -> Iterator[str]:
        import pyarrow as pa  # here: few data sets are tables

        table = _opened(path)
        schema = table.schema_arrow
        if self.image not in schema.names:
            raise ValueError(
                f"{path} has no column {self.image!r}, expected it among {', '.join(map(repr, schema.names))[:200]}: name the "
                f"column with the images in dataset.image"
            )
        kind = schema.field(self.image).type
        if not (pa.types.is_struct(kind) or pa.types.is_binary(kind) or pa.types.is_large_binary(kind)):
            raise ValueError(
                f"{path}: the column {self.image!r} is of {kind}, expected the bytes of images, or {{bytes, path}} as the "
                f"package datasets writes them: name another column in dataset.image"
            )
        has_paths = pa.types.is_struct(kind) and kind.get_field_index("path") >= 0
        names = (f"{path.stem}/{row:09d}" for row in range(table.metadata.num_rows))
        if not has_paths:
            yield from names
            return
        for batch in table.iter_batches(columns=[f"{self.image}.path"]):
            for one, number in zip(batch.column(0).to_pylist(), names, strict=False):
                yield (one or {}).get("path") or number

    def rows(self) -> Iterator[tuple[str, dict[str, Any], str]]:
        """Of each image its name, the other columns, and where it stands; of one that is listed again nothing."""
        seen: set[int] = set()
        for path in self.paths:
            table, names = _opened(path), self._names(path)
            others = [name for name in table.schema_arrow.names if name != self.image]
            classes = _class_names(table.schema_arrow)
            for batch in table.iter_batches(columns=others):
                for row in batch.to_pylist():
                    told = {key: _named(value, classes.get(key)) for key, value in row.items()}
                    name = next(names)
                    if _is_new(name, seen):
                        yield name, told, f"{path}: {name}"

    def __call__(self, entry: Entry) -> bytes:
        number, row = divmod(entry.place, OF_ONE)
        shard, first, images = self._held
        if number != shard or not first <= row < first + len(images):
            self._held = shard, first, images = self._with(number, row)
        image = images[row - first]
        data = image.get("bytes") if isinstance(image, dict) else image
        if not isinstance(data, bytes):
            raise Unreadable("has no bytes in its row: the table names a file elsewhere, or nothing")
        if len(data) > self.limits.file_bytes:
            raise Unreadable(f"has {len(data):,} bytes, more than max_file_bytes {self.limits.file_bytes:,}")
        return data

    def _with(self, number: int, row: int) -> tuple[int, int, list[Any]]:
        """Some rows, with this one among them: the next ones, or from the beginning of the shard."""
        for found in self._rows:
            if found[:2] > (number, row):
                break
            if found[0] == number and found[1] <= row < found[1] + len(found[2]):
                return found
        self._rows = self._batches(number)
        return next(found for found in self._rows if found[1] <= row < found[1] + len(found[2]))

    def _batches(self, first: int) -> Iterator[tuple[int, int, list[Any]]]:
        for number in range(first, len(self.paths)):
            begin = 0
            for batch in _opened(self.paths[number]).iter_batches(ROWS_AT_ONCE, columns=[self.image]):
                yield number, begin, batch.column(0).to_pylist()
                begin += len(batch)


class PictureOf(NamedTuple):
    """The place of the picture of the image at this place."""

    image: int


class PicturedTables(Tables):
    """Images in one column of parquet files, their pictures in another one; both are read a few rows at a time."""

    def __init__(self, paths: list[Path], image: str, picture: str, limits: Limits):
        """Raises ValueError, naming the file, unless each has such a column of pictures."""
        super().__init__(paths, image, limits)
        self.picture, self.pictures = picture, Tables(paths, picture, limits)
        for path in paths:
            self._require_pictures(path)

    def _require_pictures(self, path: Path) -> None:
        import pyarrow as pa

        schema = _opened(path).schema_arrow
        others = [name for name in schema.names if name != self.image]
        if self.picture not in others:
            raise ValueError(
                f"{path} has no column {self.picture!r} beside that of the images, expected it among "
                f"{', '.join(map(repr, others))[:200]}: name the column with the pictures in metadata.picture"
            )
        kind = schema.field(self.picture).type
        if not (pa.types.is_struct(kind) or pa.types.is_binary(kind) or pa.types.is_large_binary(kind)):
            raise ValueError(
                f"{path}: the column {self.picture!r} is of {kind}, expected the bytes of pictures, or {{bytes, path}} as the "
                f"package datasets writes them: beside shards of parquet are no files that it could name"
            )

    def rows(self) -> Iterator[tuple[str, dict[str, Any], str]]:
        """As of other tables; of a picture the row says its name alone."""
        import pyarrow as pa

        seen: set[int] = set()
        for path in self.paths:
            table, names = _opened(path), self._names(path)
            schema = table.schema_arrow
            columns = [name for name in schema.names if name not in (self.image, self.picture)]
            kind, classes = schema.field(self.picture).type, _class_names(schema)
            if pa.types.is_struct(kind) and kind.get_field_index("path") >= 0:
                columns.append(f"{self.picture}.path")
            for batch in table.iter_batches(columns=columns):
                for row in batch.to_pylist():
                    name = next(names)
                    picture = (row.pop(self.picture, None) or {}).get("path") or f"{name}: {self.picture}"
                    told = {key: _named(value, classes.get(key)) for key, value in row.items()}
                    if _is_new(name, seen):
                        yield name, told | {self.picture: picture}, f"{path}: {name}"

    def __call__(self, entry: Entry) -> bytes:
        if isinstance(entry.place, PictureOf):
            return self.pictures(entry._replace(place=entry.place.image))
        return super().__call__(entry)


def _opened(path: Path) -> Any:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        return pq.ParquetFile(path, pre_buffer=False)  # else the column of a whole file is held in memory
    except (pa.ArrowInvalid, OSError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"{path} cannot be read as parquet ({reason:.200}): write it again") from None


def _class_names(schema: Any) -> dict[str, list[str]]:
    """By column the names of its classes, as `datasets` writes them into a table's schema."""
    import json

    try:
        features = json.loads((schema.metadata or {}).get(b"huggingface", b"{}"))["info"]["features"]
        return {key: each["names"] for key, each in features.items() if each.get("_type") == "ClassLabel"}
    except (ValueError, KeyError, TypeError, AttributeError):  # written by others: its numbers are its names
        return {}


def _named(value: Any, names: list[str] | None) -> Any:
    return names[value] if names and isinstance(value, int) and 0 <= value < len(names) else value

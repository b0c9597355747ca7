"""Lists and reads the files of a folder, a tar or a zip, and trusts no name, no size and no link in it.

Nothing is extracted to disk: files are read one by one into memory, up to a limit. What is not read is listed all the
same, with the reason. Python's tarfile ends silently at a damaged header and believes the lengths that headers state
about themselves, therefore both are checked here.
"""

import bz2
import gzip
import lzma
import os
import re
import sqlite3
import stat
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from tessera.sources.listing import Entry, Listing
from tessera.sources.records import Unreadable

PACKED = {b"\x1f\x8b": gzip.open, b"\xfd7zXZ\x00": lzma.open, b"BZh": bz2.open}
DAMAGE = (
    tarfile.TarError,
    zipfile.BadZipFile,
    OSError,
    EOFError,
    ValueError,
    OverflowError,
    RuntimeError,  # endless headers (RecursionError), an encrypted member, an unknown compression (NotImplementedError)
    zlib.error,
    lzma.LZMAError,
    struct.error,
)
MAX_HEADER_BYTES = 2**20  # what the headers of one tar member may take together
DROPPINGS = {"thumbs.db", "desktop.ini", "__macosx"}  # what Windows and macOS leave behind, besides hidden files


class Limits(NamedTuple):
    file_bytes: int  # of any single file
    archive_bytes: int  # of all files of an archive together, unpacked
    archive_files: int


Reader = Callable[[Entry], bytes]  # raises Unreadable


@contextmanager
def open_source(path: Path, limits: Limits) -> Iterator[tuple[Listing, Reader]]:
    """Yield all files of a folder, tar (plain, gz, xz, bz2) or zip, and the function that reads one of them.

    They are sorted by name, so the file system has no say; only those of a packed tar come in the tar's own order,
    because sorting would unpack it once per file. Raises ValueError if there is nothing to list.
    """
    path = Path(path)
    if path.is_dir():
        with closing(Listing(_check_size(entry, limits) for entry in _walk(path))) as entries:
            yield entries, FileReader(limits.file_bytes)
        return
    if not path.is_file():
        raise ValueError(f"{path} does not exist, expected a folder, a .tar(.gz, .xz, .bz2) or a .zip with images")
    with path.open("rb") as file:
        start = file.read(6)
        file.seek(0)
        if start[:4] in (b"PK\x03\x04", b"PK\x05\x06"):
            with _damage_named(path):
                archive = zipfile.ZipFile(file)
                listed = (_check_size(entry, limits) for entry in _list_zip(archive, path, limits))
                entries = Listing(listed, version=_version(path.stat()))
            with closing(entries):
                yield entries, _zip_reader(archive)
            return
        opener = next((opener for magic, opener in PACKED.items() if start.startswith(magic)), None)
        unpacked: Any = opener(file) if opener else file
        with _damage_named(path):
            listed = (_check_size(entry, limits) for entry in _list_tar(unpacked, path, limits))
            entries = Listing(listed, version=_version(path.stat()), is_sorted=opener is None)
        with closing(entries):
            yield entries, _tar_reader(unpacked) if opener else TarReader(path)


def _version(found: os.stat_result) -> str:
    """Another one for what changed since."""
    return f"{found.st_size} {found.st_ino} {found.st_mtime_ns} {found.st_ctime_ns}"


class _Refused(Exception):
    """The archive as a whole is refused; the text is the sentence."""


@contextmanager
def _damage_named(path: Path) -> Iterator[None]:
    try:
        yield
    except _Refused as error:
        raise ValueError(str(error)) from None
    except DAMAGE as error:
        raise ValueError(
            f"{path} cannot be listed ({type(error).__name__}: {error}), expected a whole .tar(.gz, .xz, .bz2) or .zip: "
            f"it is damaged or cut short. Get or pack it again"
        ) from None


def printable(name: str) -> str:
    """The name with undecodable bytes as \\xNN, so that it can be hashed and stored as UTF-8."""
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


def _is_dropping(part: str) -> bool:
    return part.startswith(".") or part.lower() in DROPPINGS


def _check_size(entry: Entry, limits: Limits) -> Entry:
    if entry.refusal or entry.size <= limits.file_bytes:
        return entry
    return entry._replace(refusal=f"has {entry.size:,} bytes, more than max_file_bytes {limits.file_bytes:,}")


def _walk(root: Path) -> Iterator[Entry]:
    root = root.resolve()
    waiting = [root]
    while waiting:
        folder = waiting.pop()
        try:
            with os.scandir(folder) as found:
                items = list(found)
        except OSError as error:
            name = printable(folder.relative_to(root).as_posix())
            yield Entry(f"{name}/", refusal=f"the folder cannot be listed: {error.strerror}")
            continue
        for item in items:
            path = Path(item.path)
            name = printable(path.relative_to(root).as_posix())
            try:
                if _is_dropping(item.name):
                    yield Entry(name, refusal="hidden, or left by an operating system", ignored=True)
                elif item.is_symlink():
                    yield _link(name, path, root)
                elif item.is_dir():
                    waiting.append(path)
                elif item.is_file():
                    found = item.stat()
                    yield Entry(name, os.fsencode(path), found.st_size, version=_version(found))
                else:
                    yield Entry(name, refusal="is no regular file but a pipe, socket or device")
            except OSError as error:
                yield Entry(name, refusal=f"cannot be examined: {error.strerror}")


def _link(name: str, path: Path, root: Path) -> Entry:
    try:
        target = path.resolve(strict=True)
    except (OSError, RuntimeError):  # a loop is a RuntimeError before Python 3.13
        return Entry(name, refusal="is a symbolic link to nothing, or to itself")
    if not target.is_relative_to(root):
        return Entry(name, refusal="is a symbolic link that leaves the source")
    if not target.is_file():
        return Entry(name, refusal="is a symbolic link to a folder or special file")
    found = target.stat()
    return Entry(name, os.fsencode(target), found.st_size, version=_version(found))


class FileReader(NamedTuple):
    """Reads files of a folder, in whichever process."""

    file_bytes: int  # at most

    def __call__(self, entry: Entry) -> bytes:
        try:
            with Path(os.fsdecode(entry.place)).open("rb") as file:
                data = file.read(self.file_bytes + 1)
        except OSError as error:
            raise Unreadable(f"cannot be read: {error.strerror}") from None
        if len(data) > self.file_bytes:
            raise Unreadable(f"grew beyond max_file_bytes {self.file_bytes:,}")
        return data


class _Census:
    """Counts the members of an archive and judges their names."""

    def __init__(self, path: Path, limits: Limits):
        self.path, self.limits = path, limits
        self.num_files = self.num_bytes = 0
        self._names = sqlite3.connect("")  # on disk once they are many
        self._names.execute("CREATE TABLE names (name TEXT PRIMARY KEY) WITHOUT ROWID")

    def count(self, size: int) -> None:
        """Raises _Refused as soon as the archive exceeds its limits, before anything is unpacked."""
        self.num_files += 1
        self.num_bytes += max(0, size)
        if self.num_files > self.limits.archive_files:
            raise _Refused(
                f"{self.path} has more than {self.limits.archive_files:,} members: raise max_archive_files "
                f"if you trust it, or unpack it into a folder"
            )
        if self.num_bytes > self.limits.archive_bytes:
            raise _Refused(
                f"{self.path} unpacks to more than {self.limits.archive_bytes:,} bytes: raise max_archive_bytes "
                f"if you trust it, or unpack it into a folder"
            )

    def judge(self, raw: str, refusal: str) -> Entry:
        """The entry, without its place, of a member: refused for `refusal`, or for what its name is."""
        name = printable("/".join(part for part in raw.split("/") if part not in ("", ".")))
        if raw.startswith("/") or re.match(r"[A-Za-z]:", raw):
            return Entry(printable(raw), refusal="has an absolute path as its name")
        if "\\" in raw or ".." in raw.split("/"):
            return Entry(printable(raw), refusal="has a name with '..' or a backslash in it")
        if any(_is_dropping(part) for part in name.split("/")):
            return Entry(name, refusal="hidden, or left by an operating system", ignored=True)
        if refusal:
            return Entry(name, refusal=refusal)
        if not self._names.execute("INSERT OR IGNORE INTO names VALUES (?)", (name.casefold(),)).rowcount:
            return Entry(name, refusal="has the name of an earlier member, up to upper and lower case")
        return Entry(name)


class _Headers:
    """What tarfile reads headers through: refuses what a header claims of itself beyond any honest length."""

    def __init__(self, file: Any):
        self.file, self.left = file, MAX_HEADER_BYTES
        self.block = b""  # what was read last

    def read(self, size: int = -1) -> bytes:
        if not 0 <= size <= self.left:
            raise tarfile.ReadError(f"the headers of a member claim more than {MAX_HEADER_BYTES:,} bytes")
        self.left -= size
        self.block = self.file.read(size)
        return self.block

    def seek(self, position: int, whence: int = 0) -> int:
        return self.file.seek(position, whence)

    def tell(self) -> int:
        return self.file.tell()


def _list_tar(file: Any, path: Path, limits: Limits) -> Iterator[Entry]:
    headers, census, end = _Headers(file), _Census(path, limits), -1
    archive = tarfile.TarFile(fileobj=headers)
    while True:
        headers.left = MAX_HEADER_BYTES
        member = archive.next()
        if member is None:
            break
        archive.members.clear()  # tarfile keeps them all, a kilobyte each
        if member.size < 0 or member.offset_data <= end:  # would send tarfile round in circles
            raise tarfile.ReadError(f"the member {member.name!r} has no sensible size or place")
        end = member.offset_data
        census.count(member.size)
        if member.isdir():
            continue
        refusal = ""
        if member.issym() or member.islnk():
            refusal = "is a link inside an archive"
        elif not member.isreg() or member.issparse():
            refusal = "is no plain file but a device, pipe or sparse file"
        entry = census.judge(member.name, refusal)
        yield entry._replace(place=member.offset_data, size=0 if entry.refusal else member.size)
    if headers.block != bytes(512) or any(file.read(2**20)):  # tarfile takes anything that is no header for the end
        raise tarfile.ReadError(f"a damaged header, or no end mark, after {census.num_files:,} members")


def _tar_reader(file: Any) -> Reader:
    def read(entry: Entry) -> bytes:
        try:
            file.seek(entry.place)
            data = file.read(entry.size)
        except DAMAGE as error:
            raise Unreadable(f"cannot be unpacked: {error}") from None
        if len(data) != entry.size:
            raise Unreadable(f"has {len(data):,} of {entry.size:,} bytes: the archive is cut short")
        return data

    return read


class TarReader(NamedTuple):
    """Reads members of a tar that is not packed, in whichever process."""

    path: Path

    def __call__(self, entry: Entry) -> bytes:
        try:
            file = self.path.open("rb")
        except OSError as error:
            raise Unreadable(f"cannot be unpacked: {error}") from None
        with file:
            return _tar_reader(file)(entry)


ANYWHERE = (FileReader, TarReader)  # these can be used by several threads and processes at once


def _list_zip(archive: zipfile.ZipFile, path: Path, limits: Limits) -> Iterator[Entry]:
    census = _Census(path, limits)
    for number, member in enumerate(archive.infolist()):
        census.count(member.file_size)
        if member.is_dir():
            continue
        kind = stat.S_IFMT(member.external_attr >> 16)  # 0 where the zip was not made on Unix
        refusal = ""
        if kind not in (0, stat.S_IFREG):
            refusal = "is a link or a special file inside an archive"
        elif member.flag_bits & 1:
            refusal = "is encrypted"
        yield census.judge(member.filename, refusal)._replace(place=number, size=member.file_size)


def _zip_reader(archive: zipfile.ZipFile) -> Reader:
    def read(entry: Entry) -> bytes:
        try:
            with archive.open(archive.infolist()[entry.place]) as file:
                return file.read(entry.size)  # zipfile yields no more than that, and checks the CRC at the end
        except DAMAGE as error:
            raise Unreadable(f"cannot be unpacked: {type(error).__name__}: {error}") from None

    return read

"""Files that appear whole or not at all: written beside, synced, renamed. Everything that a run leaves is written so.

What stood there is replaced and never written to: it may be a link into DVC's cache, whose objects are to stay what they are.
"""

import contextlib
import errno
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from safetensors import SafetensorError

FULL = {errno.ENOSPC, errno.EDQUOT}
LITTLE = 2**20  # bytes: with fewer left, a failed write is one for want of space


class ArtifactError(ValueError):
    """A file or folder between two stages is missing, damaged, of another kind than expected, or cannot be written."""


@contextlib.contextmanager
def file(path: Path) -> Iterator[Path]:
    """Yield a path beside `path`, of the same suffix; what is written there becomes `path` when the block ends well.

    Raises ArtifactError, which names `path`, for a full disk and whatever else the system refuses; then nothing is left behind.
    """
    path = Path(path)
    beside = path.with_name(f".partial-{path.name}")
    with naming(path, beside):
        path.parent.mkdir(parents=True, exist_ok=True)
        yield beside
        sync(beside)
        beside.replace(path)


@contextlib.contextmanager
def folder(out: Path) -> Iterator[Path]:
    """As `file`: yield an empty folder beside `out`, which is not there yet, and becomes it when the block ends well."""
    beside = out.parent / f".{out.name}.partial"
    with naming(out, beside):
        remove(beside)
        beside.mkdir(parents=True)
        yield beside
        for path in (*(path for path in beside.rglob("*") if path.is_file()), beside):
            sync(path)
        move(beside, out)


@contextlib.contextmanager
def naming(path: Path, beside: Path | None = None, keep: bool = False) -> Iterator[None]:
    """Inside, what the system refuses is an ArtifactError that names `path`, and the bytes that are free if they are too few.

    beside: the file or folder in which it is made; it is removed when the block ends, unless it is to be kept.
    """
    try:
        yield
    except (OSError, SafetensorError) as error:
        number = getattr(error, "errno", None)
        disk = next(folder for folder in path.absolute().parents if folder.is_dir())
        free = shutil.disk_usage(disk).free
        reason, remedy = getattr(error, "strerror", None) or str(error), "make it possible to write there"
        if number in FULL or (number is None and free < LITTLE):  # numpy, Pillow and safetensors give no number
            available = free + _num_bytes(beside)
            reason = f"{os.strerror(number or errno.ENOSPC)}: it needs more than the {available:,} bytes free in {disk}"
            remedy = "free some space"
        raise ArtifactError(
            f"{path} could not be written ({reason}); {remedy}, then run the same command again"
        ) from error
    finally:
        if beside is not None and not keep:
            remove(beside)


def sync(path: Path) -> None:
    """Make what was written to a file or folder survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def move(folder: Path, out: Path) -> None:
    """Rename a folder, to where nothing is yet; across file systems, where no rename reaches, it is copied first."""
    out.parent.mkdir(parents=True, exist_ok=True)
    try:
        folder.rename(out)
    except OSError as error:
        if error.errno != errno.EXDEV:
            raise
        copied = out.parent / f".{out.name}.partial"
        remove(copied)
        shutil.copytree(folder, copied)
        for path in (*(path for path in copied.rglob("*") if path.is_file()), copied):
            sync(path)
        copied.rename(out)
        remove(folder)
    sync(out.parent)


def remove(path: Path) -> None:
    """Remove a file, a link or a folder, if it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _num_bytes(path: Path | None) -> int:
    """Of a file, or of all files below a folder."""
    files = [] if path is None else path.rglob("*") if path.is_dir() else [path]
    return sum(each.stat().st_size for each in files if each.is_file())

"""What DVC cannot hash: it reads the source of the images before any stage of ours could speak, and hangs or stops there."""

import os
import stat
from collections.abc import Iterator
from pathlib import Path

MOST_NAMED = 5


def require_hashable(source: Path) -> None:
    """Raises ValueError, naming the first entries of a folder at which DVC would hang (pipes) or stop without a clear word."""
    found = [f"{name} {why}" for name, why in _unhashable(Path(source))]
    if found:
        more = f"; and {len(found) - MOST_NAMED} more" if len(found) > MOST_NAMED else ""
        raise ValueError(
            f"{'; '.join(found[:MOST_NAMED])}{more}: DVC hangs or stops at such entries before images are read: rename them, "
            f"or take them out of {source}"
        )


def _unhashable(source: Path) -> Iterator[tuple[str, str]]:
    """Names, printable, and what is wrong with them, in order of name. Hidden files count: DVC hashes them too."""
    why = _refusal(source) if source.is_symlink() or source.exists() else ""
    if why:
        yield _printable(source), why
    waiting = [source] if source.is_dir() else []
    while waiting:
        folder = waiting.pop()
        try:
            with os.scandir(folder) as entries:
                items = sorted(entries, key=lambda item: item.name)
        except OSError as error:
            yield _printable(folder), f"cannot be listed ({error.strerror})"
            continue
        waiting += [Path(item.path) for item in reversed(items) if item.is_dir(follow_symlinks=False)]
        for item in items:
            if not item.name.isascii() and _printable(item.name) != item.name:
                yield _printable(item.path), "has a name that is no UTF-8"
            elif not item.is_file(follow_symlinks=False) and (why := _refusal(Path(item.path))):
                yield _printable(item.path), why


def _refusal(path: Path) -> str:
    """Why the entry is neither a folder nor a file that can be opened; "" if it is one."""
    try:
        mode = path.stat().st_mode
    except OSError as error:
        return "is a link to nothing, or to itself" if path.is_symlink() else f"cannot be examined ({error.strerror})"
    return "" if stat.S_ISREG(mode) or stat.S_ISDIR(mode) else "is no regular file but a pipe, socket or device"


def _printable(name: str | Path) -> str:
    return os.fsencode(name).decode("utf-8", "backslashreplace")

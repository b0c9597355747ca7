"""The files of a source by name, on disk once they are many: memory does not grow with their number."""

import hashlib
import sqlite3
import tempfile
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

MOST = 2**62  # of a number that is stored: a tar may state more
HALVES = 2**256


class Entry(NamedTuple):
    """A file of the source."""

    name: str  # relative, with forward slashes
    place: Any = None  # where its reader finds it: bytes or a number
    size: int = 0  # bytes, as the source states it
    refusal: str = ""  # why it is not read
    ignored: bool = False  # by rule, because it is hidden or a system's dropping
    version: str = ""  # of the file, another one when it changed; not stored


class Listing:
    """Entries in order of name, or in their own, as often as one asks. `fingerprint` is of all of them, in any order.

    Raises ValueError if they do not fit where temporary files lie.
    """

    def __init__(self, entries: Iterable[Entry], version: str = "", is_sorted: bool = True):
        """version: of the archive that they lie in; is_sorted: by name, equal ones as they came."""
        self._order = "name, number" if is_sorted else "number"
        self._sum = int.from_bytes(hashlib.sha256(version.encode()).digest())
        self._table = sqlite3.connect(
            "", isolation_level=None, check_same_thread=False
        )  # a temporary file, if it is large
        self._table.execute("PRAGMA journal_mode = OFF")
        self._table.execute(
            "CREATE TABLE entries (number INTEGER PRIMARY KEY, name TEXT, place, size INTEGER, refusal TEXT, ignored INTEGER)"
        )
        try:
            self._table.execute("BEGIN")
            self._table.executemany("INSERT INTO entries VALUES (?, ?, ?, ?, ?, ?)", self._rows(entries))
            self._table.execute("COMMIT")
        except sqlite3.Error as error:
            self.close()
            raise ValueError(
                f"the list of its files could not be kept ({error}): make room in {tempfile.gettempdir()}"
            ) from None
        except BaseException:
            self.close()
            raise
        self._length = self._table.execute("SELECT COUNT(*) FROM entries").fetchone()[0]

    def _rows(self, entries: Iterable[Entry]) -> Iterator[tuple]:
        for number, entry in enumerate(entries):
            told = repr((entry.name, entry.size, entry.refusal, entry.version))
            self._sum = (self._sum + int.from_bytes(hashlib.sha256(told.encode()).digest())) % HALVES
            yield number, entry.name, entry.place, min(entry.size, MOST), entry.refusal, entry.ignored

    @property
    def fingerprint(self) -> str:
        return f"{self._sum:064x}"

    def __len__(self) -> int:
        return self._length

    def __iter__(self) -> Iterator[Entry]:
        return self.since(0)

    def since(self, first: int) -> Iterator[Entry]:
        """From the entry of this number on."""
        columns = "name, place, size, refusal, ignored"
        found = self._table.execute(f"SELECT {columns} FROM entries ORDER BY {self._order} LIMIT -1 OFFSET ?", (first,))
        for name, place, size, refusal, ignored in found:
            yield Entry(name, place, size, refusal, bool(ignored))

    def close(self) -> None:
        self._table.close()

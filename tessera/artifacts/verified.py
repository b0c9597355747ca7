"""Which files of an artifact were hashed before and have not changed since: not every stage and rank hashes them again.

A stamp, .state/verified/*.json of the checkout that an artifact lies in, holds of each file its hash and what the file system
says of it: device, inode, size, and both times of change in nanoseconds. Whoever writes to a file, through whichever of its
names, moves its ctime, which no program sets back (utime itself moves it); one that is put in its place has another inode. Such
a file is hashed again. So is one that DVC links, copies or protects, which also moves its ctime: that costs a hash, no more.

Not seen is what changes bits beneath the file system: a disk, or memory that holds a file's pages. TESSERA_VERIFY=1 hashes
everything, and so does opening an artifact outside of a checkout that has a .state. A stamp lies outside of the artifact, so
that nobody's artifact brings one along; whoever can write to .state can also write code.
"""

import contextlib
import hashlib
import json
import os
import time
from pathlib import Path

STATE, STAMPS, FORCE = ".state", "verified", "TESSERA_VERIFY"
SETTLED_SECONDS = 2.0  # file systems keep times in ticks: a file may change twice within one


def version(path: Path) -> str | None:
    """What changes with a file; None if there is none."""
    try:
        found = path.stat()
    except OSError:
        return None
    return f"{found.st_dev} {found.st_ino} {found.st_size} {found.st_mtime_ns} {found.st_ctime_ns}"


class Stamp:
    """What is known of the files of one artifact."""

    def __init__(self, folder: Path):
        self.folder = Path(folder).absolute()
        state = next((above / STATE for above in self.folder.parents if (above / STATE).is_dir()), None)
        is_within = state is not None and self.folder.is_relative_to(state)  # checkpoints, opened once
        self.path = None
        if state is not None and not is_within and os.name == "posix":  # elsewhere ctime is the time of creation
            self.path = state / STAMPS / f"{hashlib.sha256(os.fsencode(self.folder)).hexdigest()[:32]}.json"
        self._known = self._read()

    def _read(self) -> dict[str, list[str]]:
        if self.path is None or os.environ.get(FORCE, "0") not in ("", "0"):
            return {}
        try:
            found = json.loads(self.path.read_text(encoding="utf-8"))["files"]
            return found if isinstance(found, dict) else {}
        except (OSError, ValueError, KeyError, TypeError, RecursionError):  # none yet, or one that nobody here wrote
            return {}

    def vouches(self, name: str, digest: str) -> bool:
        """Whether the file had this hash, and is as it was then."""
        now = version(self.folder / name) if name in self._known else None
        return now is not None and self._known[name] == [digest, now]

    def remember(self, digests: dict[str, str], before: dict[str, str | None]) -> None:
        """digests: of all files, each as it is; before: what `version` said of those that were hashed just now, ahead of that.

        Files that changed meanwhile, or a moment before, are left out. What cannot be written is hashed again another time.
        """
        if self.path is None or not before:
            return
        files = {name: self._known[name] for name in digests.keys() - before.keys()}
        for name, then in before.items():
            if then is not None and then == version(self.folder / name) and _is_settled(then):
                files[name] = [digests[name], then]
        beside = self.path.with_name(
            f".{os.getpid()}-{self.path.name}"
        )  # stages that open it at the same time have their own
        with contextlib.suppress(OSError):
            self.path.parent.mkdir(exist_ok=True)
            beside.write_text(json.dumps({"folder": str(self.folder), "files": files}, indent=1), encoding="utf-8")
            beside.replace(self.path)
        with contextlib.suppress(OSError):
            beside.unlink(missing_ok=True)


def _is_settled(found: str) -> bool:
    changed = max(int(part) for part in found.split()[3:])
    return time.time_ns() - changed > SETTLED_SECONDS * 1e9

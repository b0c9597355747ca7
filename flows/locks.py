"""Locks between processes and users of one machine: one file per device or stage, which the kernel frees.

A queue inside a process would not see other flow runs, workers or checkouts. flock(2) does, needs no server, and ends with
the processes that hold it: the dvc of a stage inherits the descriptor, so a device stays taken until both are gone.
"""

import fcntl
import os
import stat
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path

POLL_SECONDS = 0.2


class Lock:
    """A lock that this process holds, and every process that it hands `descriptor` to."""

    def __init__(self, path: Path, descriptor: int):
        self.path, self.descriptor = path, descriptor

    def release(self) -> None:
        """Give it back for all that inherited it: only to be called when the stage's processes have ended."""
        fcntl.flock(self.descriptor, fcntl.LOCK_UN)
        os.close(self.descriptor)


def take(path: Path, owner: str) -> Lock | None:
    """The lock, or None if somebody has it. `owner` is shown to whoever waits for it."""
    descriptor = _open(path)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        return None
    if os.access(path, os.W_OK):
        path.write_text(f"process {os.getpid()}: {owner}\n", encoding="utf-8")
    return Lock(path, descriptor)


@contextmanager
def some_of(
    paths: list[Path],
    owner: str,
    say: Callable[[str], None],
    give_up: Callable[[], None] = lambda: None,
    number: int = 1,
) -> Iterator[list[Lock]]:
    """Hold the first `number` locks that are free, for as long as the block lasts.

    While fewer are free none is held, says once who holds them, and calls `give_up`, which may raise to end the wait.
    """
    told = False
    while True:
        give_up()
        held = list(islice(filter(None, (take(path, owner) for path in paths)), number))
        if len(held) == number:
            break
        for lock in held:  # somebody else may need but these
            lock.release()
        if not told:
            told = True
            say("waiting for " + "; ".join(f"{path.stem}, held by {_owner(path)}" for path in paths))
        time.sleep(POLL_SECONDS)
    try:
        yield held
    finally:
        for lock in held:
            lock.release()


def folder() -> Path:
    """Where the locks of this machine's devices lie: the user's own folder, or a shared one that the environment names."""
    shared = os.environ.get("TESSERA_DEVICE_LOCKS")
    if shared:
        if not Path(shared).is_dir():
            raise ValueError(
                f"TESSERA_DEVICE_LOCKS is {shared!r}, which is no folder: make it (for several users: install -d -m 1777 "
                f"{shared}), or leave it unset"
            )
        return Path(shared)
    own = Path(f"/var/tmp/tessera-devices-{os.getuid()}")  # not of an environment that a login has and a service lacks
    own.mkdir(mode=0o700, exist_ok=True)
    found = own.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid():
        raise ValueError(f"{own} belongs to somebody else: set TESSERA_DEVICE_LOCKS to a folder that all may write to")
    return own


def _open(path: Path) -> int:
    """A descriptor of the lock's file, made if need be. Reading is enough to lock what another user made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        return os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return os.open(path, os.O_RDONLY | os.O_CREAT | os.O_CLOEXEC, 0o644)


def _owner(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8").strip() or "somebody"
    except OSError:
        return "somebody"

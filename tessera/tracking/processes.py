"""The processes of tracking: those that write journals below .state/tracking, and the one per checkout that sends them on."""

import contextlib
import fcntl
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path


def enabled(switch: str = "TESSERA_TRACKING") -> bool:
    """Whether tracking, or what `switch` names, is on. Raises ValueError if the environment says neither on nor off."""
    value = os.environ.get(switch, "on")
    if value not in ("on", "off"):
        raise ValueError(f"{switch} is {value!r}: expected on or off; correct it in the environment or in .env")
    return value == "on"


def folder_of(root: Path) -> Path:
    """Where the journals of a checkout are."""
    return root / ".state" / "tracking"


def process_start(pid: int) -> int:
    """When a process began, in clock ticks since boot, to tell it from a later one with its number; 0 if unknown."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return 0
    state, *fields = stat.rpartition(")")[2].split()
    return 0 if state in "ZX" else int(fields[18])


def is_alive(pid: int, started: int) -> bool:
    """Whether the process that began at `started` (see `process_start`) still runs."""
    if started:
        return process_start(pid) == started
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


@contextlib.contextmanager
def uploader_lock(root: Path) -> Iterator[bool]:
    """Yield whether the uploader's lock could be taken; the kernel releases it when its holder dies."""
    with (folder_of(root) / "uploader.lock").open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
        else:
            file.truncate(0)
            file.write(f"{os.getpid()}\n")  # for people; the lock itself is what counts
            file.flush()
            yield True


def start_uploader(root: Path) -> None:
    """Start the process that mirrors the journals of this checkout into MLflow, unless it runs already."""
    global _uploader
    if not enabled():
        return
    try:
        folder_of(root).mkdir(parents=True, exist_ok=True)
        with uploader_lock(root) as free:
            pass
        if free:
            package = str(Path(__file__).resolve().parents[2])
            paths = [package, *filter(None, [os.environ.get("PYTHONPATH")])]
            _uploader = subprocess.Popen(
                [sys.executable, "-m", "tessera.tracking", "upload", "--root", str(root.resolve())],
                cwd=root,
                env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                start_new_session=True,  # it outlives the stage, and signals to the stage's group do not reach it
            )
    except OSError as error:
        print(
            f"the uploader to MLflow could not be started ({error}); what is tracked stays in {folder_of(root)}: "
            "send it later with python -m tessera.tracking replay",
            file=sys.stderr,
        )


_uploader: subprocess.Popen[bytes] | None = None  # kept, because Python warns when a running Popen is forgotten

"""Commands that a flow runs: each in a process group of its own, so that stopping the flow leaves nothing running.

A signal to dvc alone orphans the stage below it, and a thread that reads a child's output notices no cancellation. So
whoever ends first signals dvc, dvc signals its stage once, and no wait blocks for long.
"""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import IO

GRACE_SECONDS = 10.0
POLL_SECONDS = 0.1
DRAIN_SECONDS = 2.0

# dvc, but it dies with the flow (even by kill -9), and hands SIGTERM on to its stage and waits for it: a stage that has
# saved its state is gone before the lock of its device is.
DVC = """
import ctypes, os, signal, sys
def stop(number, frame):
    import psutil
    below = psutil.Process().children(recursive=True)
    for process in below:
        process.terminate()
    if not below:
        sys.exit(128 + number)
signal.signal(signal.SIGTERM, stop)
if sys.platform == "linux":
    ctypes.CDLL(None).prctl(1, signal.SIGTERM)
if os.getppid() != int(sys.argv.pop(1)):
    sys.exit(143)
from dvc.cli import main
sys.exit(main(sys.argv[1:]))
"""


class Stopped(RuntimeError):
    """The flow is ending and starts nothing more."""


def dvc(*arguments: str) -> list[str]:
    """The command line of a dvc that ends with this process."""
    return [sys.executable, "-c", DVC, str(os.getpid()), *arguments]


def search_path() -> str:
    """PATH with this Python first: commands of dvc.yaml say `python`, also where no environment is activated."""
    return f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', os.defpath)}"


class StageProcesses:
    """The commands of one flow run."""

    def __init__(self) -> None:
        self.stopping = threading.Event()
        self._lock = threading.Lock()
        self._running: set[subprocess.Popen[str]] = set()

    def run(
        self,
        command: list[str],
        say: Callable[[str], None],
        cwd: Path,
        env: dict[str, str],
        keep: Iterable[int] = (),
    ) -> int:
        """Run a command, pass its lines to `say`, return its exit code. After `stop` it starts nothing and raises Stopped.

        It inherits the descriptors `keep`.
        """
        with self._lock:  # so that `stop` either sees the process or prevents it
            if self.stopping.is_set():
                raise Stopped(f"not started, because the flow is ending: {' '.join(command)}")
            process = subprocess.Popen(
                command,
                cwd=cwd,
                env={**os.environ, "PYTHONUNBUFFERED": "1", **env},
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                encoding="utf-8",
                errors="replace",
                start_new_session=True,
                pass_fds=tuple(keep),
            )
            self._running.add(process)
        assert process.stdout is not None
        reader = threading.Thread(target=_pass_on, args=(process.stdout, say), daemon=True)
        reader.start()
        try:
            while process.poll() is None:
                time.sleep(POLL_SECONDS)
        except BaseException:  # Prefect cancels a task by raising in its thread
            _end([process])
            raise
        finally:
            with self._lock:
                self._running.discard(process)
        reader.join(DRAIN_SECONDS)  # not for ever: a process that the stage left behind may hold the pipe
        return process.returncode

    def stop(self) -> None:
        """End every group and start no other. Takes at most the grace period and a little."""
        with self._lock:
            self.stopping.set()
            running = list(self._running)
        _end(running)


def _pass_on(stream: IO[str], say: Callable[[str], None]) -> None:
    for line in stream:
        say(line.rstrip("\n"))


def _end(processes: Iterable[subprocess.Popen[str]]) -> None:
    """SIGTERM to the leaders (a training saves its state), then SIGKILL to the groups that still have members."""
    left = list(processes)
    for process in left:
        process.terminate()
    deadline = time.monotonic() + GRACE_SECONDS
    while left and time.monotonic() < deadline:
        time.sleep(0.05)
        left = [process for process in left if _signal(process, 0)]
    for process in left:
        _signal(process, signal.SIGKILL)
        process.wait()


def _signal(process: subprocess.Popen[str], number: int) -> bool:
    """Signal the process's group; False if nobody is left in it."""
    process.poll()  # an unreaped leader would count as a member
    try:
        os.killpg(process.pid, number)
    except ProcessLookupError:
        return False
    return True

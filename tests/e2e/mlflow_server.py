"""MLflow's server as tests start, freeze and kill it, and the uploader that sends to it."""

import os
import signal
import socket
import subprocess
import sys
import urllib.error
import urllib.request
from pathlib import Path

from waiting import wait_for

from tessera.tracking.processes import uploader_lock

REPOSITORY = Path(__file__).parents[2]
# Without jobs, as `make stack` starts it: their executors are eleven more processes, which nothing here asks for
QUIET = {"MLFLOW_DISABLE_TELEMETRY": "true", "DO_NOT_TRACK": "1", "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}


def environment(uri: str | None) -> dict[str, str]:
    cleared = ("MLFLOW_TRACKING_URI", "TESSERA_TRACKING", "TESSERA_PARENT_RUN")
    kept = {key: value for key, value in os.environ.items() if key not in cleared}
    # An id that somebody's shell exports must not capture our runs
    return {
        **kept,
        "PYTHONPATH": str(REPOSITORY),
        "MLFLOW_RUN_ID": "0" * 32,
        **({"MLFLOW_TRACKING_URI": uri} if uri else {}),
    }


def replay(root: Path, uri: str | None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "tessera.tracking", "replay", "--root", str(root), "--timeout", "60"],
        env=environment(uri),
        capture_output=True,
        text=True,
        timeout=120,
    )


def pid_of_uploader(root: Path) -> int | None:
    """The process that holds the uploader's lock."""
    lock = root / ".state" / "tracking" / "uploader.lock"
    if not lock.exists():
        return None
    with uploader_lock(root) as free:
        return None if free else int(lock.read_text() or 0) or None


class Server:
    """`mlflow server` on a free loopback port, with a database that outlives it."""

    def __init__(self, folder: Path) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.folder, self.uri, self.process = folder, f"http://127.0.0.1:{self.port}", None

    def begin(self) -> None:
        command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(self.port)]
        command += ["--workers", "1", "--backend-store-uri", f"sqlite:///{self.folder}/server.db"]
        self.process = subprocess.Popen(
            [*command, "--artifacts-destination", str(self.folder)],
            cwd=self.folder,
            env={**environment(None), **QUIET},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )

    def wait(self) -> None:
        wait_for("mlflow server answers", self.answers, 120)

    def start(self) -> None:
        self.begin()
        self.wait()

    def answers(self) -> bool:
        try:
            return urllib.request.urlopen(f"{self.uri}/health", timeout=2).status == 200
        except (urllib.error.URLError, OSError):
            return False

    def signal(self, number: int) -> None:
        os.killpg(self.process.pid, number)
        if number == signal.SIGKILL:
            self.process.wait(10)


def sent(done: subprocess.CompletedProcess[str]) -> None:
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith("; 0 left\n")


def replay_without_uploader(root: Path, uri: str) -> subprocess.CompletedProcess[str]:
    """Replay after the uploader was killed at some random moment, which may be in the middle of a push."""
    if (pid := pid_of_uploader(root)) is not None:
        os.kill(pid, signal.SIGKILL)
        wait_for("the uploader is gone", lambda: pid_of_uploader(root) is None, 10)
    return replay(root, uri)

"""Machines of a team as far as one computer can be several: checkouts with caches, homes and workers of their own.

What they share is what real ones would: git's origin, a server of Prefect, one of MLflow, and an S3 store as DVC's remote.
"""

import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from clones import Clone
from ports import free_ports
from prefect_api import Asks
from store import BUCKET, Store
from waiting import wait_for


class Team(Store, Asks):
    """The servers, and the origin that machines clone from."""

    def __init__(self, first: Clone, folder: Path, database: str = "") -> None:
        super().__init__(folder)
        self.first, self.origin = first, folder / "origin.git"
        (self.port,) = free_ports(1)
        self.machines: dict[str, Machine] = {}
        self.processes: list[subprocess.Popen] = []
        self.environment |= {
            "PREFECT_API_URL": f"http://127.0.0.1:{self.port}/api",
            "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
            "PREFECT_WORKER_QUERY_SECONDS": "2",
            "DO_NOT_TRACK": "1",
            "DVC_NO_ANALYTICS": "true",
            "CUDA_VISIBLE_DEVICES": "",
        }
        self.database = {"PREFECT_SERVER_DATABASE_CONNECTION_URL": database} if database else {}

    def open(self) -> None:
        home = {**os.environ, **self.environment, **self.database, "PREFECT_HOME": str(self.folder / "prefect")}
        command = [sys.executable, "-m", "prefect", "server", "start", "--host", "127.0.0.1", "--port", str(self.port)]
        self.processes.append(self._start("server", command, self.folder, home))
        super().open()
        wait_for("Prefect's server answers", lambda: self.ask("GET", "/health") is True, 180)
        self.share()

    def share(self) -> None:
        """The first clone names the remote and is the origin of the others."""
        first = self.first
        first.environment |= self.environment
        url = f"s3://{BUCKET}/dvc"
        for command in (
            ["remote", "add", "--default", "store", url],
            ["remote", "modify", "store", "endpointurl", self.url],
            ["remote", "modify", "store", "verify", "true"],
        ):
            assert first.run("dvc", *command).returncode == 0
        first.git("add", "--all")
        first.git("commit", "--quiet", "--message=the remote")
        first.git("clone", "--quiet", "--bare", ".", str(self.origin))

    def deploy(self, machine: "Machine") -> None:
        for pool in ("gpu", "control"):
            machine.prefect("work-pool", "create", pool, "--type", "process")
        machine.prefect("--no-prompt", "deploy", "--all")

    def machine(self, name: str, **environment: str) -> "Machine":
        subprocess.run(["git", "clone", "--quiet", str(self.origin), str(self.folder / name)], check=True)
        return self.join(name, self.folder / name, **environment)

    def join(self, name: str, checkout: Path, **environment: str) -> "Machine":
        devices = self.folder / f"{name}-devices"
        devices.mkdir()
        made = self.machines[name] = Machine(name, checkout, self)
        made.environment |= self.environment | environment
        made.environment |= {
            "PREFECT_HOME": str(self.folder / f"{name}-prefect"),
            "DVC_SITE_CACHE_DIR": str(self.folder / f"{name}-site"),
            "TESSERA_DEVICE_LOCKS": str(devices),
        }
        return made

    def _start(self, name: str, command: list[str], cwd: Path, environment: dict[str, str]) -> subprocess.Popen:
        log = (self.folder / f"{name}.log").open("a")
        return subprocess.Popen(command, cwd=cwd, env=environment, stdout=log, stderr=log, start_new_session=True)

    def below(self, run: str) -> list[dict[str, Any]]:
        """The flow runs that a run has handed to workers."""
        query = {"flow_runs": {"parent_flow_run_id": {"any_": [run]}}, "sort": "START_TIME_ASC"}
        return self.ask("POST", "/flow_runs/filter", query)

    def close(self) -> None:
        for machine in self.machines.values():
            machine.kill()
        for process in self.processes:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        super().close()


class Machine(Clone):
    """A checkout with workers of its own; `kill` ends all that it runs, as a power cut does."""

    def __init__(self, name: str, folder: Path, team: Team) -> None:
        super().__init__(folder)
        self.name, self.team = name, team
        self.workers: list[subprocess.Popen] = []

    def prefect(self, *arguments: str) -> str:
        done = self.run(sys.executable, "-m", "prefect", *arguments)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def work(self, pool: str = "gpu", limit: int = 1) -> None:
        """Start a worker of a pool."""
        line = "worker", "start", "--pool", pool, "--name", self.name, "--limit", str(limit)
        command = [sys.executable, "-m", "prefect", *line]
        # A number of its own, by which everything below it is found, whatever session it is in
        environment = {**self.environment, "TEST_MACHINE": self.mark}
        self.workers.append(self.team._start(f"{self.name}-{pool}", command, self.folder, environment))

    @property
    def mark(self) -> str:
        return f"{self.name} of {self.team.folder}"

    def processes(self) -> list[int]:
        mark = f"TEST_MACHINE={self.mark}".encode()
        found = []
        for entry in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                if mark in (entry / "environ").read_bytes().split(b"\0"):
                    found.append(int(entry.name))
        return found

    def at(self, stage: str) -> list[int]:
        """The processes of this machine that are at a stage: "train_prior vqgan-flow"."""
        command, found = f"tessera.running {stage}".replace(" ", "\0").encode(), []
        for pid in self.processes():
            with contextlib.suppress(OSError):
                if command in Path(f"/proc/{pid}/cmdline").read_bytes():
                    found.append(pid)
        return found

    def signal(self, stage: str, number: int) -> None:
        """To all that is at a stage."""
        for pid in self.at(stage):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)

    def kill(self) -> None:
        """kill -9 of everything, until nothing is left."""
        while found := self.processes():
            for pid in found:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            for worker in self.workers:
                worker.poll()
            time.sleep(0.1)

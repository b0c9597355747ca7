"""Deployments on a real Prefect server: a worker, artifacts, queueing, cancelling, and what kills leave behind.

The tests of this file share one server and one clone, and run in order. Each stage's bits are compared with those that
plain dvc makes of the same params.
"""

import contextlib
import itertools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from ports import free_ports
from prefect_api import Asks
from waiting import wait_for

from flows import champion

pytestmark = pytest.mark.e2e(seconds=300)
TRAINING = "train_tokenizer@vqgan"
OUT = "data/tokenizers/vqgan"
STEPS = 400


class Team(Asks):
    """A Prefect server, a worker of pool gpu, and a clone that both of them and the tests use."""

    def __init__(self, clone: Any, folder: Path):
        (self.port,) = free_ports(1)
        self.clone, self.folder = clone, folder
        self.devices = folder / "devices"
        self.devices.mkdir()
        self.environment = {
            "PREFECT_HOME": str(folder),
            "PREFECT_API_URL": f"http://127.0.0.1:{self.port}/api",
            "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
            "PREFECT_WORKER_QUERY_SECONDS": "1",
            "DO_NOT_TRACK": "1",
            "TESSERA_DEVICE_LOCKS": str(self.devices),
            "TESSERA_CHECKPOINT_SECONDS": "0.5",
            "CUDA_VISIBLE_DEVICES": "",
        }
        self.processes: dict[str, subprocess.Popen] = {}
        self.whole: dict[str, str] = {}  # the bits that plain dvc makes

    def start(self, name: str, *command: str, **environment: str) -> subprocess.Popen:
        log = (self.folder / f"{name}.log").open("a")
        self.processes[name] = subprocess.Popen(
            command,
            cwd=self.clone.folder,
            env={**self.clone.environment, **self.environment, **environment},
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
        return self.processes[name]

    def start_server(self) -> None:
        port = str(self.port)
        self.start("server", sys.executable, "-m", "prefect", "server", "start", "--host", "127.0.0.1", "--port", port)
        wait_for("the server answers", lambda: self.ask("GET", "/health") is True, 120)

    def start_worker(self, limit: int = 1, name: str = "worker", pool: str = "gpu", **environment: str) -> None:
        if name in self.processes and self.processes[name].poll() is None:
            self.kill(name)
        arguments = "worker", "start", "--pool", pool, "--name", name, "--limit", str(limit)
        self.start(name, sys.executable, "-m", "prefect", *arguments, **environment)

    def kill(self, name: str) -> None:
        """kill -9 of a process and of nothing below it, as the kernel does for want of memory."""
        self.processes[name].kill()
        self.processes[name].wait()

    def prefect(self, *arguments: str) -> str:
        done = self.clone.run(sys.executable, "-m", "prefect", *arguments, **self.environment)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def artifacts(self, run: str) -> dict[str, Any]:
        query = {"artifacts": {"flow_run_id": {"any_": [run]}}, "limit": 100}
        return {found["key"]: found for found in self.insist("POST", "/artifacts/filter", query)}

    def stages(self) -> list[int]:
        """The processes that work in the clone, but for the server, the worker and their flow runs."""
        found = []
        for entry in Path("/proc").glob("[0-9]*"):
            try:
                command = (entry / "cmdline").read_bytes()
                inside = str((entry / "cwd").readlink()).startswith(str(self.clone.folder))
                state = (entry / "stat").read_text().rpartition(")")[2].split()[0]
            except OSError:
                continue
            if inside and state not in "ZX" and (b"tessera.running" in command or b"repro" in command):
                found.append(int(entry.name))
        return found

    def trainings(self) -> list[int]:
        """The processes of stages, but not what one of them has forked and not yet turned into another command."""
        found = {pid for pid in self.stages() if b"tessera.running" in command_of(pid)}
        return [pid for pid in found if parent_of(pid) not in found]

    def is_training(self) -> bool:
        state = self.clone.folder / ".state" / TRAINING.replace("@", "-")
        return any(state.glob("*/step-*/manifest.json")) and bool(self.stages())

    def is_free(self) -> bool:
        from flows import locks

        lock = locks.take(self.devices / "cpu.lock", "the test")
        if lock:
            lock.release()
        return lock is not None

    def hashes(self) -> dict[str, str]:
        return json.loads((self.clone.folder / OUT / "manifest.json").read_text())

    def forget(self) -> None:
        """Make the training run again, from its first step, and not come from DVC's cache."""
        shutil.rmtree(self.clone.folder / OUT, ignore_errors=True)
        shutil.rmtree(self.clone.folder / ".dvc/cache/runs", ignore_errors=True)
        lock = yaml.safe_load((self.clone.folder / "dvc.lock").read_text())["stages"]
        for out in lock.get(TRAINING, {"outs": []})["outs"]:
            (self.clone.folder / ".dvc/cache/files/md5" / out["md5"][:2] / out["md5"][2:]).unlink(missing_ok=True)

    def end(self) -> None:
        for pid in self.stages():
            kill_group(pid)
        for process in self.processes.values():
            kill_group(process.pid)
            process.wait()


def kill_group(pid: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(os.getpgid(pid), signal.SIGKILL)


@pytest.fixture(scope="module")
def team(clone: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Team]:
    params = clone.params()
    params["tokenizers"]["vqgan"]["training"]["num_steps"] = STEPS
    del params["systems"]["vqgan-autoregressive"]  # the gan has no part in what changes here
    clone.write_params(params)
    clone.git("add", "--all")
    clone.git("commit", "--quiet", "--message=a longer training")
    team = Team(clone, tmp_path_factory.mktemp("prefect"))
    try:
        plain = clone.run(sys.executable, "-m", "dvc", "repro", TRAINING, **team.environment)
        assert plain.returncode == 0, plain.stdout + plain.stderr
        team.whole = team.hashes()
        team.start_server()
        for pool in ("gpu", "control"):
            team.prefect("work-pool", "create", pool, "--type", "process")
        team.prefect("--no-prompt", "deploy", "--all")
        yield team
    finally:
        team.end()


def test_every_deployment_is_made_on_a_fresh_server_and_the_nightly_one_is_off(team: Team) -> None:
    found = {f"{made['name']}": made for made in team.ask("POST", "/deployments/filter", {})}
    assert {name: made["work_pool_name"] for name, made in found.items()} == {
        "reproduce": "gpu", "nightly": "gpu", "part": "gpu", "sweep": "control", "spread": "control"
    }  # fmt: skip
    assert {name: made["parameters"].get("spread") for name, made in found.items()} == {
        "reproduce": False, "nightly": False, "part": None, "sweep": None, "spread": True
    }  # fmt: skip
    (schedule,) = found["nightly"]["schedules"]
    assert (schedule["active"], schedule["schedule"]["cron"]) == (False, "0 2 * * *")
    assert set(found["reproduce"]["parameter_openapi_schema"]["properties"]) == {
        "preset", "overrides", "targets", "force", "champion", "spread"
    }  # fmt: skip
    for name in found:  # the form on the page explains each of them
        properties = found[name]["parameter_openapi_schema"]["properties"]
        assert all(property.get("description") for property in properties.values()), name


def test_a_cancelled_training_leaves_no_process_and_the_next_run_resumes_it(team: Team) -> None:
    team.start_worker()
    team.forget()
    run = team.submit(targets=[TRAINING])
    wait_for("it trains", team.is_training, 180)
    assert not team.is_free()
    team.ask("POST", f"/flow_runs/{run}/set_state", {"state": {"type": "CANCELLING"}})  # as the page and the command do
    seconds = wait_for("no process is left", lambda: not team.stages(), 10)
    team.ends(run, "Cancelled", 60)
    assert team.is_free()
    assert not (team.clone.folder / OUT).exists()
    again = team.submit(targets=[TRAINING])
    team.ends(again)
    assert team.hashes() == team.whole
    resumed = re.search(r"resumed step (\d+)", team.logs(again))
    assert resumed and 1 <= int(resumed[1]) < STEPS, team.logs(again)
    print(f"cancelled: no process after {seconds:.1f} s")


def test_two_runs_at_once_wait_for_the_one_device_and_both_end_right(team: Team) -> None:
    """The limit of the worker is two: what makes one wait is the lock of the device."""
    team.start_worker(limit=2, TESSERA_PARALLEL="1")
    team.forget()
    runs = [team.submit(targets=targets) for targets in ([TRAINING], ["encode_tokens@vqgan"])]
    most = 0
    while any(team.state(run) not in ("Completed", "Failed", "Crashed") for run in runs):
        most = max(most, len(team.trainings()))
        time.sleep(0.05)
    for run in runs:
        team.ends(run)
    assert most == 1
    assert team.hashes() == team.whole
    logs = [team.logs(run) for run in runs]
    assert sum(log.count(f"Running stage '{TRAINING}'") for log in logs) == 1  # the other one found it done
    assert any("waiting for" in log for log in logs)


def command_of(pid: int) -> bytes:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return b""


def parent_of(pid: int) -> int:
    try:
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    except OSError:
        return 0


def test_a_training_that_is_killed_goes_on_from_its_checkpoint_in_the_same_run(team: Team) -> None:
    team.start_worker()
    team.forget()
    run = team.submit(targets=[TRAINING])
    wait_for("it trains", team.is_training, 180)
    (pid,) = team.trainings()
    os.kill(pid, signal.SIGKILL)
    team.ends(run)
    assert "continues from its checkpoint" in team.logs(run) and "resumed step" in team.logs(run)
    assert team.hashes() == team.whole


def test_kill_9_of_the_worker_and_of_the_server_harms_no_training(team: Team) -> None:
    team.start_worker()
    team.forget()
    team.submit(targets=[TRAINING])
    wait_for("it trains", team.is_training, 180)
    flow = int(re.search(r"process (\d+)", (team.devices / "cpu.lock").read_text())[1])
    team.kill("worker")
    kill_group(team.processes["server"].pid)
    assert team.stages()
    wait_for("the training is done", lambda: (team.clone.folder / OUT / "manifest.json").exists(), 120)
    wait_for("the device is free", team.is_free, 60)
    assert team.hashes() == team.whole
    seconds = wait_for("the flow's process is gone", lambda: not command_of(flow), 45)
    print(f"without a server: the flow's process is gone after {seconds:.1f} s")
    assert team.stages() == []
    team.start_server()


def test_a_run_shows_progress_pictures_and_the_table(team: Team) -> None:
    team.start_worker()
    run = team.submit(targets=["compare_systems"])
    team.ends(run)
    states = team.tasks(run)
    assert states["prepare_images"] == "Cached" and states["train_prior@vqgan-flow"] == "Completed"
    artifacts = team.artifacts(run)
    progress = artifacts["train-prior-vqgan-flow-progress"]
    assert (progress["type"], progress["data"]) == ("progress", 100.0)
    assert artifacts["sample-images-vqgan-flow-samples"]["data"].startswith("![vqgan-flow](data:image/png;base64,iVBOR")
    assert "| vqgan-flow" in artifacts["comparison"]["data"]
    assert "train_prior@vqgan-flow  step 60/60" in team.logs(run)


def test_a_sweep_in_the_pool_of_its_cells_runs_them_itself_and_the_checkout_stays_as_it_is(team: Team) -> None:
    team.start_worker()
    before = (team.clone.folder / "params.yaml").read_text(), team.clone.run("git", "status", "--short").stdout
    deployment = team.insist("GET", "/deployments/name/sweep/sweep")
    cells = {"systems.vqgan-flow.sampling.guidance_scale": [1.0, 3.0]}
    body = {"parameters": {"cells": cells, "targets": ["evaluate@vqgan-flow"]}}
    moved = {key: deployment[key] for key in ("flow_id", "entrypoint", "path", "pull_steps")}
    here = team.insist("POST", "/deployments/", moved | {"name": "sweep-here", "work_pool_name": "gpu"})
    run = team.insist("POST", f"/deployments/{here['id']}/create_flow_run", body)["id"]
    team.ends(run, seconds=400)
    assert (team.clone.folder / "params.yaml").read_text() == before[0]
    assert team.clone.run("git", "status", "--short").stdout == before[1]
    table = team.artifacts(run)["comparison-of-cells"]["data"]
    assert "vqgan-flow (guidance_scale=1.0)" in table and "vqgan-flow (guidance_scale=3.0)" in table
    shown = team.clone.run(sys.executable, "-m", "dvc", "exp", "list", "--name-only").stdout.split()
    assert [name.rpartition("-")[0] for name in sorted(shown)] == [
        "params-guidance-scale-1-0", "params-guidance-scale-3-0"
    ]  # fmt: skip
    assert not list((team.clone.folder / ".state/runs").glob("params-*/"))


def test_three_workers_share_a_sweep_of_four_cells_and_train_nothing_twice(team: Team) -> None:
    """Each cell is one run of one worker, and the two priors that the four cells need are trained once each."""
    workers = {"worker", "second", "third"}
    for name in workers:
        team.start_worker(name=name, TESSERA_PARALLEL="3")
    team.start_worker(name="control", pool="control")
    own = "systems.vqgan-flow"
    cells = {f"{own}.prior.training.num_steps": [40, 50], f"{own}.sampling.guidance_scale": [1.5, 2.0]}
    sweep = team.submit("sweep/sweep", cells=cells, targets=["evaluate@vqgan-flow"])
    team.ends(sweep, seconds=600)
    parents = {"flow_runs": {"parent_flow_run_id": {"any_": [sweep]}}}
    runs = team.insist("POST", "/flow_runs/filter", parents)
    labels = [f"num_steps={steps}, guidance_scale={scale}" for steps in (40, 50) for scale in (1.5, 2.0)]
    assert sorted(run["name"] for run in runs) == labels
    assert {run["state"]["type"] for run in runs} == {"COMPLETED"}
    assert {run["run_count"] for run in runs} == {1}
    assert {run["labels"]["prefect.worker.name"] for run in runs} == workers
    logs = "\n".join(team.logs(run["id"]) for run in runs)
    for stage, count in (("train_prior@vqgan-flow", 2), ("sample_images@vqgan-flow", 4), ("evaluate@vqgan-flow", 4)):
        assert logs.count(f"Running stage '{stage}'") == count, stage
    table = team.artifacts(sweep)["comparison-of-cells"]["data"]
    assert all(f"vqgan-flow ({label})" in table for label in labels)
    spans = sorted((run["start_time"], run["end_time"]) for run in runs)
    assert any(later < end for (_, end), (later, _) in itertools.pairwise(spans))  # side by side
    for name in workers - {"worker"}:
        team.kill(name)


def test_a_cancelled_sweep_takes_back_the_cells_that_wait_and_cancels_those_that_run(team: Team) -> None:
    team.start_worker()
    team.start_worker(name="control", pool="control")
    steps = {"tokenizers.vqgan.training.num_steps": [STEPS + 1, STEPS + 2]}
    sweep = team.submit("sweep/sweep", cells=steps, targets=[TRAINING])
    wait_for("a cell works", lambda: bool(team.stages()), 180)
    parents = {"flow_runs": {"parent_flow_run_id": {"any_": [sweep]}}}
    wait_for("both cells are there", lambda: len(team.insist("POST", "/flow_runs/filter", parents)) == 2, 60)
    team.ask("POST", f"/flow_runs/{sweep}/set_state", {"state": {"type": "CANCELLING"}})
    wait_for("no process is left", lambda: not team.stages(), 60)
    team.ends(sweep, "Cancelled", 60)
    for run in team.insist("POST", "/flow_runs/filter", parents):
        team.ends(run["id"], "Cancelled", 60)


@pytest.mark.parametrize("text", ["fd < 0.5", "generation/fd_classifier = 1", "generation/fd_classifier <"])
def test_a_condition_of_champions_that_is_none_is_refused_before_the_work(text: str) -> None:
    with pytest.raises(ValueError, match="expected a metric of systems, < or >, and a number"):
        champion.arguments(text)


def test_a_run_ends_with_a_champion_if_one_is_good_enough_and_fails_if_nobody_answers(team: Team) -> None:
    tracked = {"TESSERA_TRACKING": "on", "MLFLOW_TRACKING_URI": f"sqlite:///{team.folder}/mlflow.db"}
    given = {**team.environment, **tracked}
    stage = "evaluate@vqgan-flow"
    for arguments, settings in ([], team.environment), (["--force", "--single-item"], given):
        done = team.clone.run(sys.executable, "-m", "dvc", "repro", *arguments, stage, **settings)
        assert done.returncode == 0, done.stdout + done.stderr

    def run(condition: str, **environment: str) -> tuple[int, str]:
        command = sys.executable, "-m", "flows.reproduce", stage, "--champion", condition
        done = team.clone.run(*command, **given | environment)
        assert "nothing changed in 12 of the 12 stages" in done.stdout  # what was computed stays
        return done.returncode, done.stdout

    code, said = run("generation/fd_classifier < 0.000001")
    assert (code, "no version has generation/fd_classifier below 1e-06" in said) == (0, True), said
    code, said = run("generation/fd_classifier < 1000000")
    assert (code, "vqgan-flow (version 1) is champion of tessera-digits" in said) == (0, True), said
    (nobody,) = free_ports(1)
    code, said = run("generation/fd_classifier < 1000000", MLFLOW_TRACKING_URI=f"http://127.0.0.1:{nobody}")
    assert code == 1, said

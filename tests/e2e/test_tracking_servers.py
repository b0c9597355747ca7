"""The uploader against real MLflow: a database file, and a server that is dead, dies or freezes while a stage runs."""

import os
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from mlflow_server import Server, environment, pid_of_uploader, replay, replay_without_uploader, sent
from waiting import wait_for

from tessera.tracking import journal as journal_module
from tessera.tracking import uploader

pytestmark = pytest.mark.e2e(seconds=150)
STEPS = 300

# A stage that says how long the calls of tracking took it; "wait": at half its steps it waits for the test to do harm
STAGE = """
import sys, time
from pathlib import Path
from tessera.tracking import journal as journal_module
from tessera.tracking import processes
root, first, last, kill = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), sys.argv[4] == "kill"
spent, clock = 0.0, time.perf_counter
start = clock()
run = journal_module.open_run("train_prior@toy", experiment="tessera-toy", root=root, state=root / "state",
                        params={"prior": {"width": 8}}, tags={"dataset": "toy"})
processes.start_uploader(root)
spent += clock() - start
for step in range(first, last):
    start = clock()
    run.log(step, {"loss": 1 / (step + 1), "accuracy": step / 1000})
    spent += clock() - start
    while step == last // 2 and sys.argv[4] == "wait" and not (root / "go").exists():
        time.sleep(0.05)
print(f"{spent:.4f}", flush=True)
if not kill:
    (root / "grid.png").write_bytes(b"a grid")
    run.attach(root / "grid.png", "samples/grid.png")
    run.figures({"fd": 3.5})
    run.close("FINISHED")
"""


def stage(root: Path, uri: str | None, first: int = 0, last: int = STEPS, end: str = "end") -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", STAGE, str(root), str(first), str(last), end],
        env=environment(uri),
        stdout=subprocess.PIPE,
        text=True,
    )


def finish(process: subprocess.Popen[str]) -> float:
    """Wait for a stage; the seconds that tracking cost it."""
    out, _ = process.communicate(timeout=30)
    assert process.returncode == 0
    return float(out)


@pytest.fixture
def root(tmp_path: Path) -> Iterator[Path]:
    yield tmp_path
    if (pid := pid_of_uploader(tmp_path)) is not None:
        os.kill(pid, signal.SIGKILL)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    server = Server(tmp_path_factory.mktemp("server"))
    try:
        yield server
    finally:
        if server.process is not None and server.process.poll() is None:
            server.signal(signal.SIGKILL)


def runs(uri: str, uid: str) -> tuple[Any, list[Any]]:
    from mlflow import MlflowClient
    from mlflow.entities import ViewType

    client = MlflowClient(uri)
    experiment = client.get_experiment_by_name("tessera-toy")
    found = client.search_runs([experiment.experiment_id], f"tags.`tessera.run_uid` = '{uid}'", ViewType.ACTIVE_ONLY)
    return client, found


def uid_of(root: Path) -> str:
    (journal,) = root.glob(f".state/tracking/*/{journal_module.JOURNAL}")
    return journal.parent.name


def check_complete(uri: str, root: Path) -> None:
    """One run, ended well, with every point of the journal exactly once."""
    client, (run,) = runs(uri, uid_of(root))
    assert (run.info.run_name, run.info.status) == ("train_prior@toy", "FINISHED")
    for key in ("loss", "accuracy"):
        points = Counter(metric.step for metric in client.get_metric_history(run.info.run_id, key))
        assert points == Counter(range(STEPS)), key
    assert run.data.metrics["fd"] == 3.5
    assert run.data.params == {"prior.width": "8"}
    assert {key: run.data.tags[key] for key in ("dataset", "tessera.kind")} == {
        "dataset": "toy",
        "tessera.kind": "stage",
    }
    assert [file.path for file in client.list_artifacts(run.info.run_id, "samples")] == ["samples/grid.png"]


def test_a_killed_and_resumed_stage_is_one_run_in_the_database_of_the_checkout(root: Path) -> None:
    cost = finish(stage(root, None, 0, 200, "kill"))
    first = replay(root, None)
    assert (first.returncode, first.stdout) == (0, f"1 runs, 400 metrics sent to sqlite:///{root}/mlflow.db; 0 left\n")
    uri = f"sqlite:///{root}/mlflow.db"
    _, (run,) = runs(uri, uid_of(root))
    assert run.info.status == "KILLED"
    cost += finish(stage(root, None, 150, STEPS))  # its checkpoint was at step 150
    wait_for("the uploader sends the rest", lambda: runs(uri, uid_of(root))[1][0].info.status == "FINISHED", 60)
    check_complete(uri, root)
    assert run.info.artifact_uri.startswith((root / "mlruns").as_uri())
    again = replay(root, None)
    assert (again.returncode, again.stdout) == (0, f"0 runs, 0 metrics sent to {uri}; 0 left\n")
    assert cost < 0.5


def test_what_people_do_in_mlflow_is_respected(
    root: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from mlflow import MlflowClient

    for name in ("MLFLOW_TRACKING_URI", "TESSERA_TRACKING", "TESSERA_PARENT_RUN"):
        monkeypatch.delenv(name, raising=False)
    uri = f"sqlite:///{root}/mlflow.db"

    def begin(stage: str, experiment: str = "tessera-toy") -> journal_module.Run:
        return journal_module.open_run(stage, experiment=experiment, root=root, state=None, params={}, tags={})

    parent = begin("reproduce")
    monkeypatch.setenv("TESSERA_PARENT_RUN", parent.uid)
    child = begin("train_prior@toy")
    child.log(0, {"a loss/μ!": float("nan"), "x": float("inf")})
    assert uploader.replay(root, 60) == 0
    client, (nested,) = runs(uri, child.uid)
    _, (above,) = runs(uri, parent.uid)
    assert nested.data.tags["mlflow.parentRunId"] == above.info.run_id
    assert (nested.info.status, set(nested.data.metrics)) == ("RUNNING", {"a loss/μ_", "x"})

    # A server that was frozen may create a run twice: the one that was written to remains
    client.create_run(nested.info.experiment_id, tags={"tessera.run_uid": child.uid})
    child.close("FINISHED")
    assert uploader.replay(root, 60) == 0
    assert [run.info.run_id for run in runs(uri, child.uid)[1]] == [nested.info.run_id]

    # Sending everything again adds nothing, not even a point
    assert uploader.replay(root, 60, everything=True) == 0
    assert [run.info.run_id for run in runs(uri, child.uid)[1]] == [nested.info.run_id]
    assert len(client.get_metric_history(nested.info.run_id, "x")) == 1

    # A run that was deleted stays deleted, a database that was lost is filled again
    client.delete_run(above.info.run_id)
    parent.log(0, {"loss": 1.0})
    parent.close("FINISHED")
    assert [uploader.replay(root, 60), uploader.replay(root, 60)] == [0, 0]
    assert runs(uri, parent.uid)[1] == []
    (root / "mlflow.db").rename(root / "lost.db")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{root}/other.db")
    assert uploader.replay(root, 60) == 0
    assert [len(runs(f"sqlite:///{root}/other.db", run.uid)[1]) for run in (parent, child)] == [1, 1]

    # A deleted experiment is told with its remedy
    client = MlflowClient(f"sqlite:///{root}/other.db")
    client.delete_experiment(client.create_experiment("gone"))
    monkeypatch.delenv("TESSERA_PARENT_RUN")
    begin("train_prior@toy", "gone").close("FINISHED")
    capsys.readouterr()
    assert uploader.replay(root, 60) == 1
    assert (
        "experiment gone was deleted in MLflow: bring it back with mlflow experiments restore"
        in capsys.readouterr().err
    )

    # Passwords are for the server only
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://me:canary@127.0.0.1:9")
    assert uploader.replay(root, 60) == 1
    assert "http://127.0.0.1:9 did not take run" in (error := capsys.readouterr().err)
    assert "canary" not in error
    kept = [path for path in (root / ".state").rglob("*") if path.is_file()]
    assert [path for path in kept if b"canary" in path.read_bytes()] == []


def test_a_server_that_is_dead_freezes_or_dies_costs_a_stage_nothing_and_loses_nothing(
    server: Server, tmp_path_factory: pytest.TempPathFactory
) -> None:
    roots = {name: tmp_path_factory.mktemp(name) for name in ("absent", "frozen", "killed")}
    try:
        # Absent from the start
        root = roots["absent"]
        costs = [finish(stage(root, server.uri))]
        failed = replay_without_uploader(root, server.uri)
        assert failed.returncode == 1
        assert "1 runs, 601 metrics stay in" in failed.stderr
        server.start()
        sent(replay_without_uploader(root, server.uri))
        check_complete(server.uri, root)

        # Frozen midway: it keeps the requests and carries them out when it wakes up
        root = roots["frozen"]
        process = stage(root, server.uri, end="wait")
        wait_for("the run appears", lambda: bool(list(root.glob(".state/tracking/*/sent-*.json"))), 60)
        server.signal(signal.SIGSTOP)
        try:
            (root / "go").touch()
            costs.append(finish(process))
            wait_for("the uploader notices", (root / ".state/tracking/uploader.log").exists, 30)
        finally:
            server.signal(signal.SIGCONT)
        wait_for("the server is awake", server.answers, 60)
        sent(replay_without_uploader(root, server.uri))
        check_complete(server.uri, root)

        # Killed midway
        root = roots["killed"]
        process = stage(root, server.uri, end="wait")
        wait_for("the run appears", lambda: bool(list(root.glob(".state/tracking/*/sent-*.json"))), 60)
        server.signal(signal.SIGKILL)
        (root / "go").touch()
        costs.append(finish(process))
        server.start()
        sent(replay_without_uploader(root, server.uri))
        check_complete(server.uri, root)
        print("seconds that tracking cost a stage:", costs)
        assert max(costs) < 0.5
    finally:
        for root in roots.values():
            if (pid := pid_of_uploader(root)) is not None:
                os.kill(pid, signal.SIGKILL)

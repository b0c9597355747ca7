"""What is handed to workers: chains of stages, what of dvc.lock they need, training states, without servers."""

import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml

from flows import remote, spread
from flows.plan import Outcome, Plan

UPSTREAM = {
    "code": set(),
    "images": {"code"},
    "train@x": {"images"},
    "encode@x": {"train@x"},
    "judge": {"images"},
    "measure@x": {"encode@x", "judge"},
    "prior@y": {"encode@x"},
    "sample@y": {"prior@y"},
    "report": {"sample@y", "measure@x"},
}


def plan(folder: Path, *done: str, **fields: object) -> Plan:
    given = {"outputs": {}, "unversioned": [], "reads": {}, "digests": {}, "stale": set(), "force": False}
    made = Plan(root=folder, upstream=UPSTREAM, **(given | fields))
    made.outcomes |= {name: Outcome("ran") for name in done}
    return made


@pytest.mark.parametrize(
    ("first", "done", "chain"),
    [
        ("code", [], ["code", "images", "judge"]),
        ("train@x", ["code", "images"], ["train@x", "encode@x"]),  # what it measures waits for the judge
        ("train@x", ["code", "images", "judge"], ["train@x", "encode@x", "measure@x"]),
        ("prior@y", ["code", "images", "train@x", "encode@x"], ["prior@y", "sample@y"]),  # the report has another key
        ("sample@y", ["prior@y"], ["sample@y"]),
    ],
)
def test_a_chain_is_what_has_the_key_of_its_first_stage_and_waits_for_nothing_else(
    tmp_path: Path, first: str, done: list[str], chain: list[str]
) -> None:
    workers = spread.Workers.__new__(spread.Workers)
    workers.plan = plan(tmp_path, *done)
    assert workers._chain(first) == chain


def test_a_stage_reads_outputs_or_files_inside_them_and_small_files_travel_as_text(tmp_path: Path) -> None:
    data = tmp_path / "data"
    outputs = {
        "code": [data / "code"],
        "a": [data / "figures/a.json", data / "summary/a.json"],
        "b": [data / "weights"],
    }
    reads = {"s": {"code": [data / "code/s"], "a": [data], "b": [data / "weights"]}}
    made = plan(tmp_path, outputs=outputs, reads=reads, unversioned=["data/summary/a.json"])
    assert remote.inputs(made, "s", without=set()) == ["data/code/s", "data/figures/a.json", "data/weights"]
    assert remote.inputs(made, "s", without={"b"}) == ["data/code/s", "data/figures/a.json"]
    (data / "summary").mkdir(parents=True)
    (data / "summary/a.json").write_text("{}")
    assert remote.small_files(made, ["a"]) == {"data/summary/a.json": "{}"}
    (data / "summary/a.json").write_text(" " * (remote.SMALL_BYTES + 1))
    with pytest.raises(remote.Trouble, match="data/summary/a.json has 100,001 bytes"):
        remote.small_files(made, ["a"])


@pytest.fixture
def shared(tmp_path: Path) -> Path:
    """A checkout whose remote is a folder, as on a disk that machines share."""
    folder = tmp_path / "checkout"
    folder.mkdir()
    subprocess.run(["git", "init", "--quiet"], cwd=folder, check=True)
    for command in (["init", "--quiet"], ["remote", "add", "--default", "disk", str(tmp_path / "disk"), "--quiet"]):
        subprocess.run([sys.executable, "-m", "dvc", *command], cwd=folder, check=True)
    return folder


def test_entries_come_and_go_and_no_path_leads_out_of_the_checkout(shared: Path) -> None:
    entry = {"cmd": "true", "deps": [{"path": "x"}], "outs": [{"path": "y", "md5": "0", "size": 1}]}
    remote.write(shared, {"one": entry}, {"data/small.json": "{}"})
    remote.write(shared, {"two": entry}, {})
    assert remote.entries(shared, ["one"], ["two", "none"]) == {
        "one": {"cmd": "true", "outs": entry["outs"]}, "two": entry
    }  # fmt: skip
    with pytest.raises(remote.Trouble, match="does not say what none made"):
        remote.entries(shared, ["one", "none"], [])
    assert (shared / "data/small.json").read_text() == "{}"
    remote.write(shared, {"three": entry}, {}, is_all=True)
    assert set(yaml.safe_load((shared / "dvc.lock").read_text())["stages"]) == {"three"}
    with pytest.raises(remote.Trouble, match="no path within"):
        remote.write(shared, {}, {"../outside": ""})
    assert not (shared.parent / "outside").exists()


def test_entries_are_read_whole_while_others_are_written(shared: Path) -> None:
    entry = {"cmd": "true", "outs": [{"path": f"y{number}", "md5": "0", "size": 1} for number in range(40)]}
    remote.write(shared, {"one": entry, "two": entry}, {})
    stop, found = threading.Event(), []

    def look() -> None:
        while not stop.is_set():
            found.append(yaml.safe_load((shared / "dvc.lock").read_text()))

    thread = threading.Thread(target=look)
    thread.start()
    for number in range(8):
        remote.write(shared, {f"more-{number}": entry}, {})
    stop.set()
    thread.join()
    assert all(content and len(content["stages"]["two"]["outs"]) == 40 for content in found)


def test_the_newest_whole_state_travels_and_replaces_the_one_before(shared: Path, tmp_path: Path) -> None:
    def checkpoint(state: Path, step: int, is_whole: bool = True) -> None:
        folder = state / "0abc" / f"step-{step:09d}"
        folder.mkdir(parents=True)
        (folder / "weights").write_text(str(step))
        if is_whole:
            (folder / "manifest.json").write_text("{}")

    here, there = tmp_path / "here", tmp_path / "there"
    assert remote.send_state(shared, here, "key") is None and remote.fetch_state(shared, there, "key") is None
    checkpoint(here, 5)
    (here / "0abc/validations/step-3").mkdir(parents=True)
    (here / "0abc/validations/step-3/looks").write_text("looks")
    (here / "0abc/.step-9").mkdir()  # being written
    (here / "0abc/.step-9/weights").write_text("half")
    assert remote.send_state(shared, here, "key") == "step-000000005"
    checkpoint(here, 7)
    checkpoint(here, 9, is_whole=False)
    assert remote.send_state(shared, here, "key") == "step-000000007"
    checkpoint(there, 6)
    assert remote.fetch_state(shared, there, "key") == "step-000000007"
    files = {path.relative_to(there).as_posix() for path in there.rglob("*") if path.is_file()}
    step = "0abc/step-000000007"
    assert files == {f"{step}/weights", f"{step}/manifest.json", "0abc/validations/step-3/looks"}
    assert remote.fetch_state(shared, there, "key") is None  # nothing newer
    remote.remove_state(shared, "key")
    assert remote.fetch_state(shared, tmp_path / "third", "key") is None
    assert list((tmp_path / "disk/states").rglob("weights")) == []


def test_what_workers_could_not_fetch_is_refused_but_for_params_and_results(shared: Path) -> None:
    git = ["git", "-c", "user.name=test", "-c", "user.email=test@localhost"]
    (shared / "params.yaml").write_text("a: 1\n")
    subprocess.run([*git, "add", "--all"], cwd=shared, check=True)
    subprocess.run([*git, "commit", "--quiet", "--message=start"], cwd=shared, check=True)
    (shared / "params.yaml").write_text("a: 2\n")
    (shared / "dvc.lock").write_text("schema: '2.0'\n")
    assert len(spread.committed(shared)) == 40
    (shared / "new.py").write_text("")
    with pytest.raises(ValueError, match=r"^new.py of .* are not committed as they are"):
        spread.committed(shared)


def test_only_an_old_pending_run_of_a_worker_that_is_gone_is_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    from datetime import UTC, datetime, timedelta

    from flows import pool

    monkeypatch.setattr(pool, "workers_online", lambda name: ["b"])

    def forgotten(worker: str, seconds: float, is_pending: bool = True) -> bool:
        moment = datetime.now(UTC) - timedelta(seconds=seconds)
        state = SimpleNamespace(is_pending=lambda: is_pending, timestamp=moment)
        return pool.is_forgotten(SimpleNamespace(state=state, labels={"prefect.worker.name": worker}), "gpu")

    assert forgotten("a", 200)
    assert not forgotten("a", 5) and not forgotten("b", 200) and not forgotten("", 200)
    assert not forgotten("a", 200, is_pending=False)


def test_a_chain_that_is_under_way_or_done_is_joined_and_one_that_failed_is_run_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also that of a coordinator that was killed: the key says what is computed, not who asks."""
    from flows import pool

    states = {"key-0": "failed", "key-1": "done, but one stage", "key-2": "works"}

    def hand_over(deployment: str, parameters: dict, name: str, key: str) -> SimpleNamespace:
        return SimpleNamespace(id=key, state=SimpleNamespace(is_final=lambda: states[key] != "works"))

    results = {"key-0": {"code": 1}, "key-1": None, "key-2": None}
    monkeypatch.setattr(pool, "hand_over", hand_over)
    monkeypatch.setattr(pool, "shown", lambda run, key: results[run])
    workers = spread.Workers.__new__(spread.Workers)
    assert workers._run_of({}, ["a", "b"], "key").id == "key-2"
    results["key-1"] = {"code": 0}
    assert workers._run_of({}, ["a", "b"], "key").id == "key-1"

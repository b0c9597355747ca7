"""The journal side of tracking: what a stage calls, with neither MLflow nor an uploader in sight."""

import json
import os
import resource
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tessera.tracking import journal as journal_module
from tessera.tracking import mirror, processes, uploader, view


def begin(root: Path, state: Path | None = None, **extra: Any) -> journal_module.Run:
    arguments: dict[str, Any] = {"experiment": "toy", "root": root, "state": state, "params": {}, "tags": {}} | extra
    return journal_module.open_run("train_prior@toy", **arguments)


def events(run: journal_module.Run) -> list[dict[str, Any]]:
    assert run.folder is not None
    return [json.loads(line) for line in (run.folder / journal_module.JOURNAL).read_text().splitlines() if line]


@pytest.fixture(autouse=True)
def tracking_is_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TESSERA_TRACKING", raising=False)
    monkeypatch.delenv("TESSERA_PARENT_RUN", raising=False)


def test_every_call_is_one_line_on_disk_before_it_returns(tmp_path: Path) -> None:
    run = begin(tmp_path, params={"prior": {"width": 8, "kind": "masked"}, "seed": 0}, tags={"dataset": "digits"})
    before = time.time_ns() // 1_000_000
    run.log(3, {"loss": 0.5, "accuracy": 0.25})
    last = events(run)[-1]
    assert last["time"] >= before
    assert (last["step"], last["values"]) == (3, {"loss": 0.5, "accuracy": 0.25})
    run.figures({"fd": 1.5})
    run.tag({"note": "fine"})
    run.param({"steps": 10})
    run.close("FINISHED")
    assert [event["event"] for event in events(run)] == ["open", "log", "log", "tag", "param", "close"]
    opening = events(run)[0]
    assert opening["params"] == {"prior.width": "8", "prior.kind": "masked", "seed": "0"}
    assert (opening["uid"], opening["stage"], opening["kind"]) == (run.uid, "train_prior@toy", "stage")


def test_a_killed_stage_continues_its_journal_without_logging_a_step_twice(tmp_path: Path) -> None:
    first = begin(tmp_path, tmp_path / "state")
    for step in range(5):
        first.log(step, {"loss": float(step)})
    second = begin(tmp_path, tmp_path / "state")  # no close: the first was killed
    for step in range(3, 7):  # its last checkpoint was at step 3
        second.log(step, {"loss": float(step)})
    assert second.uid == first.uid
    assert [event["step"] for event in events(second) if event["event"] == "log"] == list(range(7))


def test_a_finished_stage_that_is_executed_again_is_another_run(tmp_path: Path) -> None:
    with begin(tmp_path, tmp_path / "state") as first:
        pass
    assert begin(tmp_path, tmp_path / "state").uid != first.uid


def test_other_params_are_another_run(tmp_path: Path) -> None:
    first = begin(tmp_path, tmp_path / "state", params={"prior": {"width": 8}})
    assert begin(tmp_path, tmp_path / "state", params={"prior": {"width": 16}}).uid != first.uid


def test_a_resumed_run_with_other_values_loses_none_of_them(tmp_path: Path) -> None:
    begin(tmp_path, tmp_path / "state").log(1, {"loss": 1.0, "accuracy": 0.5})
    second = begin(tmp_path, tmp_path / "state")
    second.log(1, {"loss": 1.0, "accuracy": 0.75})
    assert events(second)[-1]["values"] == {"accuracy": 0.75}


def test_half_a_line_of_a_killed_process_spoils_no_other_line(tmp_path: Path) -> None:
    first = begin(tmp_path, tmp_path / "state")
    first.log(0, {"loss": 1.0})
    journal = first.folder / journal_module.JOURNAL
    with journal.open("a") as file:
        file.write('{"event": "log", "time": 1, "st')
    second = begin(tmp_path, tmp_path / "state")
    second.log(1, {"loss": 2.0})
    found = [event for _, event in journal_module.events_of(journal)]
    assert [event["event"] for event in found] == ["open", "log", "nothing", "open", "log"]
    assert [event["values"]["loss"] for event in found if event["event"] == "log"] == [1.0, 2.0]


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (None, "FINISHED"),
        (SystemExit(0), "FINISHED"),
        (ValueError("loss is nan"), "FAILED"),
        (SystemExit(1), "FAILED"),
        (KeyboardInterrupt(), "KILLED"),
        (SystemExit(143), "KILLED"),
        (SystemExit(130), "KILLED"),
    ],
)
def test_how_the_block_ends_is_how_the_run_ends(tmp_path: Path, error: BaseException | None, status: str) -> None:
    def execute() -> None:
        nonlocal run
        with begin(tmp_path) as run:
            if error is not None:
                raise error

    run = journal_module.Run("")
    if error is None:
        execute()
    else:
        with pytest.raises(type(error)):
            execute()
    assert events(run)[-1]["status"] == status


def test_tracking_off_writes_nothing_and_accepts_every_call(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TESSERA_TRACKING", "off")
    with begin(tmp_path, tmp_path / "state") as run:
        run.log(0, {"loss": 1.0})
        run.figures({"fd": 1.0})
        run.tag({"a": "b"})
        run.param({"c": 1})
        run.attach(Path(__file__))
    processes.start_uploader(tmp_path)
    assert run.uid is None
    assert list(tmp_path.iterdir()) == []


def test_a_wrong_switch_is_refused_with_the_choices(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TESSERA_TRACKING", "false")
    with pytest.raises(ValueError, match="TESSERA_TRACKING is 'false': expected on or off"):
        begin(tmp_path)


def test_an_attached_file_is_copied_and_cannot_leave_its_folder(tmp_path: Path) -> None:
    grid = tmp_path / "grid.png"
    grid.write_bytes(b"one")
    run = begin(tmp_path)
    run.attach(grid, "samples/grid.png")
    grid.write_bytes(b"two")
    assert (run.folder / "files" / "samples" / "grid.png").read_bytes() == b"one"
    assert events(run)[-1]["name"] == "samples/grid.png"
    for name in ("../grid.png", "/grid.png", "a/../../b"):
        with pytest.raises(ValueError, match="expected a relative path"):
            run.attach(grid, name)


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        (
            "http://a:canary1@h:5000/x did not answer about train_prior@gan",
            "http://h:5000/x did not answer about train_prior@gan",
        ),
        ("http://127.0.0.1:5000 did not take train_prior@gan", "http://127.0.0.1:5000 did not take train_prior@gan"),
        ("http://h/train_prior@gan", "http://h/train_prior@gan"),
        ("postgresql://a:can@ary1@h/db refuses", "postgresql://h/db refuses"),
        ("postgresql://a:can ary1@h/db refuses", "postgresql://h/db refuses"),
        ("http://canary1@h and ftp://b:canary1@g", "http://h and ftp://g"),
        ("https://h/x?token=canary1&page=2#end", "https://h/x?token=***&page=2#end"),
        ("https://h/x?page=2&X-Amz-Signature=canary1 failed", "https://h/x?page=2&X-Amz-Signature=*** failed"),
        ("h/x?api_key=canary1'", "h/x?api_key=***'"),
        ("the server says: canary-of/my @own", "the server says: ***"),
        ("the server says: canary-of%2Fmy%20%40own", "the server says: ***"),
        ("canary-of-s3 is no key", "*** is no key"),
    ],
)
def test_no_secret_is_shown(monkeypatch: pytest.MonkeyPatch, text: str, shown: str) -> None:
    monkeypatch.setenv("DATABASE_URL", "postgresql://tessera:canary-of%2Fmy%20%40own@h/db")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "canary-of-s3")
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "answer")
    assert journal_module.redact(text) == shown


def test_passwords_in_addresses_reach_no_journal(tmp_path: Path) -> None:
    address = "https://me:canary@example.org/data"
    run = begin(tmp_path, params={"source": {"url": address}}, tags={"remote": address})
    run.tag({"again": f"see {address}"})
    run.param({"url": address})
    assert "canary" not in (run.folder / journal_module.JOURNAL).read_text()
    assert "https://example.org/data" in (run.folder / journal_module.JOURNAL).read_text()


def test_a_place_that_cannot_be_written_gives_one_sentence_and_no_error(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / ".state").write_text("a file where a folder should be")
    with begin(tmp_path, tmp_path / ".state" / "key") as run:
        run.log(0, {"loss": 1.0})
        run.attach(tmp_path / "absent.png")
    processes.start_uploader(tmp_path)
    tracked, uploader = capsys.readouterr().err.splitlines()
    assert tracked.startswith("train_prior@toy lost a part of its tracking (")
    assert "the stage continues" in tracked
    assert uploader.startswith("the uploader to MLflow could not be started")


FULL_DISK = """
import resource, signal, sys
from pathlib import Path
from tessera.tracking import journal as journal_module
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (2000, resource.RLIM_INFINITY))
with journal_module.open_run("toy", experiment="e", root=Path(sys.argv[1]), state=None, params={}, tags={}) as run:
    for step in range(1000):
        run.log(step, {"loss": 1.0})
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
"""


def test_a_disk_that_fills_up_stops_the_journal_only(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", FULL_DISK, str(tmp_path)],
        cwd=Path(journal_module.__file__).parents[2],
        capture_output=True,
        text=True,
        timeout=30,
    )
    assert done.returncode == 0
    assert len(done.stderr.splitlines()) == 1
    assert "toy lost a part of its tracking" in done.stderr
    (journal,) = tmp_path.glob(f".state/tracking/*/{journal_module.JOURNAL}")
    kept = [event for _, event in journal_module.events_of(journal)]
    steps = [event["step"] for event in kept if event["event"] == "log"]
    assert 5 < len(steps) < 1000
    assert steps == list(range(len(steps)))
    assert kept[-1]["status"] == "FINISHED"  # space was free again: the end is told, though steps are missing


def test_a_replay_that_lasts_longer_than_it_would_wait_for_another_is_told_by_what_is_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with begin(tmp_path) as run:
        run.log(0, {"loss": 1.0})

    def push_slowly(root: Path, mirrors: list[Any], client: Any) -> tuple[Any, str]:
        for one in mirrors:
            one.sent.offset, one.sent.status = one.journal.stat().st_size, "FINISHED"
            one._save()
        time.sleep(0.2)
        return client, ""

    monkeypatch.setattr(uploader, "_push_all", push_slowly)
    assert uploader.replay(tmp_path, timeout=0.1) == 0
    assert capsys.readouterr().out.startswith("1 runs, 1 metrics sent to ")
    run = begin(tmp_path)
    monkeypatch.setattr(uploader, "_push_all", lambda root, mirrors, client: (run.log(1, {"loss": 1.0}), ""))
    assert uploader.replay(tmp_path, timeout=0.1) == 1  # a stage that goes on writing is not waited for
    assert "1 runs, " in capsys.readouterr().err


def test_a_value_costs_less_than_a_seventh_of_a_millisecond(tmp_path: Path) -> None:
    run = begin(tmp_path)
    values = {f"loss_{index}": 1 / (index + 1) for index in range(5)}
    before = resource.getrusage(resource.RUSAGE_SELF)
    for step in range(400):
        run.log(step, values)
    after = resource.getrusage(resource.RUSAGE_SELF)
    spent = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    assert spent / 2000 < 0.15e-3


def test_importing_tracking_loads_nothing_heavy() -> None:
    check = "import sys, tessera.tracking.journal; print(*{'mlflow', 'torch', 'numpy', 'pydantic'} & set(sys.modules))"
    done = subprocess.run(
        [sys.executable, "-c", check],
        cwd=Path(journal_module.__file__).parents[2],
        capture_output=True,
        text=True,
        timeout=30,
    )
    assert (done.returncode, done.stdout.strip()) == (0, "")


def test_a_relative_database_lies_in_the_checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    assert mirror.tracking_uri(tmp_path) == f"sqlite:///{tmp_path}/mlflow.db"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "sqlite:///runs/my.db")
    assert mirror.tracking_uri(tmp_path) == f"sqlite:///{tmp_path}/runs/my.db"
    for uri in (f"sqlite:///{tmp_path}/my.db", "http://127.0.0.1:5000"):
        monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
        assert mirror.tracking_uri(tmp_path) == uri


def test_a_process_is_told_from_a_later_one_with_its_number() -> None:
    own = processes.process_start(os.getpid())
    assert processes.is_alive(os.getpid(), own)
    if own:  # only Linux tells when a process began
        assert not processes.is_alive(os.getpid(), own - 1)
    child = subprocess.Popen([sys.executable, "-c", ""])
    began = processes.process_start(child.pid)
    child.wait()
    assert not processes.is_alive(child.pid, began)


@pytest.mark.parametrize(
    ("key", "name"), [("a b/c-1.x", "a b/c-1.x"), ("/fd@1k//x", "fd_1k/x"), ("../..", "unnamed"), ("", "unnamed")]
)
def test_keys_are_made_acceptable_to_mlflow(key: str, name: str) -> None:
    assert mirror._name(key) == name


def test_the_view_of_systems_has_their_figures_the_distance_first_and_its_link_knows_the_newest_experiment(
    tmp_path: Path,
) -> None:
    tags = {}
    client = SimpleNamespace(set_experiment_tag=lambda *given: tags.update({given[:2]: given[2]}))
    figures = ["recall", "fd_classifier", "fd_classifier_standard_error", "precision", "density"]
    names = [f"generation/{name}" for name in figures] + ["prior/test_loss"]
    run = SimpleNamespace(
        info=SimpleNamespace(experiment_id="7"), data=SimpleNamespace(metrics=dict.fromkeys(names, 1.0))
    )
    view.share(client, run)
    state = json.loads(tags["7", "mlflow.sharedViewState.tessera"])
    shown = [f"metrics.`generation/{name}`" for name in ("fd_classifier", "precision", "recall")]
    assert state["selectedColumns"] == [*shown, "attributes.`Duration`"] and state["orderByKey"] == shown[0]

    assert view.link(tmp_path, "http://x") is None
    for uid, experiment in (("a", "3"), ("b", "7"), ("c", "")):
        record = processes.folder_of(tmp_path) / uid / "sent-0.json"
        record.parent.mkdir(parents=True)
        record.write_text(json.dumps({"run_id": "r", "experiment_id": experiment}))
        os.utime(record, (ord(uid), ord(uid)))
    address = "http://x/#/experiments/7/runs?workflowType=machine_learning&viewStateShareKey=tessera"
    assert view.link(tmp_path, "http://x/") == address

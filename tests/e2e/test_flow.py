"""The flow against real DVC and Prefect's own server, on a diamond of four stages: prepare -> left, right -> join."""

import base64
import contextlib
import io
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from PIL import Image
from waiting import wait_for

from flows import board, experiments, locks, processes, reproduce, sweep
from flows import plan as plans
from flows.places import Places
from flows.plan import Plan, opened, read_plan
from tessera.evaluation import figures
from tessera.tracking import journal, mirror

pytestmark = pytest.mark.e2e(seconds=100)
REPOSITORY = Path(__file__).parents[2]

DVC_YAML = """
stages:
  prepare: {cmd: PYTHON step.py prepare, deps: [step.py, seed.txt], outs: [prepare.txt]}
  left: {cmd: PYTHON step.py left prepare, deps: [left.txt.how, prepare.txt], outs: [left.txt]}
  right: {cmd: PYTHON step.py right prepare, deps: [prepare.txt], outs: [right.txt]}
  join: {cmd: PYTHON step.py join left right, deps: [left.txt, right.txt], outs: [join.txt]}
"""

# `left` does what left.txt.how says; every stage adds a line to order.log
STEP = """
import subprocess, sys, time
from pathlib import Path
name, *inputs = sys.argv[1:]
text = name + "".join(Path(f"{given}.txt").read_text() for given in inputs or ["seed"])
with Path("order.log").open("a") as file:
    print(name, file=file)
how = Path("left.txt.how").read_text().strip() if name == "left" else "write"
if how == "fail":
    sys.exit("left fails on purpose")
if how == "wait":
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(300)"])
    Path("child.pid").write_text(str(child.pid))
    while not Path("go").exists():
        time.sleep(0.05)
    child.kill()
    child.wait()
if how == "sign":
    text += " signed"
print("made", name)
Path(f"{name}.txt").write_text(text)
"""


@pytest.fixture
def toy(tmp_path: Path) -> Path:
    folder = tmp_path / "toy"
    folder.mkdir()
    subprocess.run(["git", "init", "--quiet"], cwd=folder, check=True)
    subprocess.run([sys.executable, "-m", "dvc", "init", "--quiet"], cwd=folder, check=True, env=environment())
    (folder / "dvc.yaml").write_text(DVC_YAML.replace("PYTHON", sys.executable))
    (folder / "step.py").write_text(STEP)
    (folder / "seed.txt").write_text("0")
    (folder / "left.txt.how").write_text("write")
    return folder


def environment() -> dict[str, str]:
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("PREFECT_", "TESSERA_", "DVC_"))}
    return {**kept, "PYTHONPATH": str(REPOSITORY), "CUDA_VISIBLE_DEVICES": "", "DVC_NO_ANALYTICS": "true"}


@pytest.fixture(autouse=True)
def device_locks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Tests of two pytest processes, and flows that run beside them, must not wait for each other's devices."""
    folder = tmp_path / "devices"
    folder.mkdir()
    monkeypatch.setenv("TESSERA_DEVICE_LOCKS", str(folder))
    return folder


@pytest.fixture
def launch(
    toy: Path, device_locks: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Callable[..., subprocess.Popen[str]]]:
    home = tmp_path_factory.getbasetemp() / "prefect"  # shared: creating its database takes seconds
    started: list[subprocess.Popen[str]] = []

    def start(*arguments: str) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [sys.executable, "-m", "flows.reproduce", *arguments],
            cwd=toy,
            env={**environment(), "PREFECT_HOME": str(home), "TESSERA_DEVICE_LOCKS": str(device_locks)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        started.append(process)
        return process

    yield start
    for process in started:
        for group in (process.pid, *children_groups(toy)):
            try:
                os.killpg(group, signal.SIGKILL)
            except ProcessLookupError:
                continue
        process.wait()


def children_groups(toy: Path) -> list[int]:
    """The process groups of stages that a test left behind."""
    if not (toy / "child.pid").exists() or not alive(int((toy / "child.pid").read_text())):
        return []
    return [os.getpgid(int((toy / "child.pid").read_text()))]


def alive(pid: int) -> bool:
    """Whether a process runs; one that waits to be reaped does not."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False
    return stat.rpartition(")")[2].split()[0] not in "ZX"


def outcomes(output: str) -> dict[str, str]:
    """The list at the end: {stage: ran, cached, failed or not run}."""
    lines = output.splitlines()[-4:]
    return {line.split()[0]: " ".join(line.split()[1:-2]) for line in lines}


def order(toy: Path) -> list[str]:
    return (toy / "order.log").read_text().split() if (toy / "order.log").exists() else []


def plan_of(toy: Path, monkeypatch: pytest.MonkeyPatch, targets: tuple[str, ...] = (), force: bool = False) -> Plan:
    monkeypatch.chdir(toy)
    return read_plan(toy, list(targets), force)


def carry_out(plan: Plan) -> list[str]:
    """What the flow's tasks do, one after the other and without Prefect."""
    places = Places()
    return [plan.reproduce(stage, lambda line: None, places).what for stage in plan.upstream]


def test_a_second_run_starts_nothing_and_a_change_runs_what_depends_on_it(
    toy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = plan_of(toy, monkeypatch)
    assert first.upstream["join"] == {"left", "right"}
    assert carry_out(first) == ["ran"] * 4
    assert (order(toy)[0], set(order(toy)[1:3]), order(toy)[3]) == ("prepare", {"left", "right"}, "join")

    second = plan_of(toy, monkeypatch)
    monkeypatch.setattr(second.processes, "run", None)  # any process would be an error
    assert carry_out(second) == ["cached"] * 4

    (toy / "left.txt.how").write_text("write ")  # left runs and writes what it wrote before: join has nothing to do
    third = plan_of(toy, monkeypatch)
    assert dict(zip(third.upstream, carry_out(third), strict=True)) == {
        "prepare": "cached",
        "left": "ran",
        "right": "cached",
        "join": "cached",
    }
    assert order(toy)[4:] == ["left"]
    assert not third.outcomes["join"].changed  # so that nothing after it would start a process

    (toy / "left.txt.how").write_text("sign")  # left writes something else: join was clean at the start, and is not now
    fourth = plan_of(toy, monkeypatch)
    assert fourth.stale == {"left"}
    assert carry_out(fourth).count("ran") == 2
    assert order(toy)[5:] == ["left", "join"]
    assert (toy / "join.txt").read_text() == "joinleftprepare0 signedrightprepare0"


PARTS = """
  split: {cmd: PYTHON parts.py, deps: [parts.py, one.how, two.how], outs: [parts]}
  whole: {cmd: PYTHON step.py whole parts/one parts/two, deps: [parts], outs: [whole.txt]}
  one: {cmd: PYTHON step.py one parts/one, deps: [parts/one.txt], outs: [one.txt]}
  two: {cmd: PYTHON step.py two parts/two, deps: [parts/two.txt], outs: [two.txt]}
  after: {cmd: PYTHON step.py after one two, deps: [one.txt, two.txt], outs: [after.txt]}
"""
SPLIT = """
from pathlib import Path
Path("parts").mkdir(exist_ok=True)
for name in ("one", "two"):
    Path(f"parts/{name}.txt").write_text(Path(f"{name}.how").read_text().strip())
"""


def test_of_a_folder_that_an_upstream_stage_writes_a_changed_file_concerns_those_alone_that_read_it(
    toy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (toy / "dvc.yaml").write_text(DVC_YAML.replace("PYTHON", sys.executable) + PARTS.replace("PYTHON", sys.executable))
    (toy / "parts.py").write_text(SPLIT)
    (toy / "one.how").write_text("1")
    (toy / "two.how").write_text("2")
    asked: list[str] = []
    run = processes.StageProcesses.run

    def ask(self: processes.StageProcesses, command: list[str], *arguments: Any) -> int:
        asked.append(command[command.index("--single-item") + 1])
        return run(self, command, *arguments)

    monkeypatch.setattr(processes.StageProcesses, "run", ask)

    def changed() -> tuple[set[str], set[str]]:
        """The stages that dvc is asked about, and those that run."""
        asked.clear()
        plan = plan_of(toy, monkeypatch, ("whole", "after"))
        carry_out(plan)
        assert not read_plan(toy, ["whole", "after"], False).stale  # dvc: whoever was not asked about had nothing to do
        return set(asked), {stage for stage, outcome in plan.outcomes.items() if outcome.what == "ran"}

    assert changed()[1] == {"split", "whole", "one", "two", "after"}
    (toy / "two.how").write_text("2 ")  # split writes what it wrote
    assert changed() == ({"split", "whole"}, {"split"})
    (toy / "two.how").write_text("3")
    assert changed() == ({"split", "whole", "two", "after"}, {"split", "whole", "two", "after"})
    (toy / "parts.py").write_text(SPLIT.replace('"two"', '"two", "three"'))
    (toy / "three.how").write_text("new")
    assert changed() == ({"split", "whole"}, {"split", "whole"})  # a further file is not read by the others
    assert (toy / "after.txt").read_text() == "afterone1two3"
    monkeypatch.setattr(plans, "SMALL_BYTES", 0)  # as if the files were large: of those, dvc is asked
    (toy / "two.how").write_text("3 ")
    assert changed() == ({"split", "whole", "one", "two"}, {"split"})


def test_a_target_is_reproduced_with_what_it_depends_on_and_a_wrong_one_is_refused(
    toy: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert set(plan_of(toy, monkeypatch, ("right",)).upstream) == {"prepare", "right"}
    monkeypatch.setattr(sys, "argv", ["reproduce", "rihgt"])
    assert reproduce.main() == 2
    assert "cannot reproduce rihgt" in capsys.readouterr().err
    monkeypatch.setattr(sys, "argv", ["reproduce"])
    monkeypatch.setenv("TESSERA_PARALLEL", "two")
    assert reproduce.main() == 2
    assert "TESSERA_PARALLEL is 'two': expected" in capsys.readouterr().err


def test_the_first_system_is_finished_first_though_the_second_one_asks_for_the_free_place_before(
    toy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = plan_of(toy, monkeypatch)
    first, second = [stage for stage in plan.upstream if stage in ("left", "right")]
    places, ran = Places(), list[str]()

    def note(command: list[str], *rest: object) -> int:
        ran.append(command[command.index("--single-item") + 1])
        return 0

    monkeypatch.setattr(plan.processes, "run", note)
    plan.reproduce("prepare", lambda line: None, places)
    other = threading.Thread(target=plan.reproduce, args=(second, lambda line: None, places))
    other.start()
    time.sleep(0.5)  # Prefect starts the tasks in any order, and needs some time for each
    plan.reproduce(first, lambda line: None, places)
    other.join()
    assert ran == ["prepare", first, second]


def test_what_another_dvc_is_using_is_waited_for(toy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    carry_out(plan_of(toy, monkeypatch))
    (toy / "left.txt.how").write_text("wait")  # it reads what prepare writes
    other = subprocess.Popen(
        [sys.executable, "-m", "dvc", "repro", "--single-item", "left"],
        cwd=toy,
        env=environment(),
        stdout=subprocess.DEVNULL,
    )
    try:
        wait_for("left works", (toy / "child.pid").exists, 60)
        plan, said = plan_of(toy, monkeypatch, force=True), list[str]()
        threading.Timer(4, (toy / "go").touch).start()
        assert plan.reproduce("prepare", said.append, Places()).what == "ran"
    finally:
        (toy / "go").touch()
        other.wait(60)
    assert said[0] == f"prepare waits for another dvc in this checkout, which uses its files: process {other.pid}"
    assert not [line for line in said if "is busy" in line or "PID" in line]


@pytest.mark.parametrize(
    ("cores", "systems", "at_once", "threads"),
    [(2, 6, 2, "1"), (2, 1, 1, None), (16, 6, 6, "2"), (1, 6, 1, None), (8, 2, 2, "4")],
)
def test_without_a_gpu_systems_share_the_cores(
    device_locks: Path, monkeypatch: pytest.MonkeyPatch, cores: int, systems: int, at_once: int, threads: str | None
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(cores)))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.delenv("TESSERA_PARALLEL", raising=False)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    places = Places(systems)
    assert places.number == len(places.environments) == at_once
    assert {added.get("OMP_NUM_THREADS") for added in places.environments.values()} == {threads}
    monkeypatch.setenv("OMP_NUM_THREADS", "3")  # whoever said so knows why
    assert all("OMP_NUM_THREADS" not in added for added in Places(systems).environments.values())


UUIDS = ["GPU-aaaaaaaa-0000", "GPU-bbbbbbbb-1111"]


@pytest.mark.parametrize(
    ("visible", "parallel", "expected", "turns"),
    [
        ("", None, {"cpu": ""}, 1),
        ("-1", "2", {"cpu": "", "cpu-share-2": ""}, 2),
        ("0,3", None, {"gpu-0": "0", "gpu-3": "3"}, 2),
        ("0,3", "1", {"gpu-0": "0", "gpu-3": "3"}, 1),  # any of them, one at a time
        ("3", None, {"gpu-3": "3"}, 1),
        ("0,1", "3", {"gpu-0": "0", "gpu-1": "1", "gpu-0-share-2": "0"}, 3),
        (UUIDS[1], None, {"gpu-1": "1"}, 1),  # the same lock as that of who says 1
        (None, None, {"gpu-0": "0", "gpu-1": "1"}, 2),
    ],
)
def test_each_stage_has_a_gpu_of_its_own_with_one_lock_whatever_it_is_called(
    device_locks: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    visible: str | None,
    parallel: str | None,
    expected: dict[str, str],
    turns: int,
) -> None:
    program = tmp_path / "bin" / "nvidia-smi"
    program.parent.mkdir()
    listing = "\n".join(f"GPU {index}: NVIDIA H100 (UUID: {uuid})" for index, uuid in enumerate(UUIDS))
    program.write_text(f"#!/bin/sh\ncat <<END\n{listing}\nEND\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.delenv("TESSERA_PARALLEL", raising=False)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    if parallel:
        monkeypatch.setenv("TESSERA_PARALLEL", parallel)
    places = Places()
    found = {path.stem: added.get("CUDA_VISIBLE_DEVICES", "") for path, added in places.environments.items()}
    assert found == expected
    assert {path.parent for path in places.environments} == {device_locks}
    assert places.number == turns


def test_a_stage_of_several_processes_has_as_many_devices_at_once_or_none(device_locks, monkeypatch) -> None:
    monkeypatch.setattr("flows.places.devices", lambda: ["0", "1", "2"])
    monkeypatch.delenv("TESSERA_PARALLEL", raising=False)
    monkeypatch.setenv("TESSERA_PROCESSES", "2")
    monkeypatch.setenv("TESSERA_PROCESSES_TRAIN_TOKENIZER", "auto")
    places, said = Places(), []
    stages = (
        "train_prior@a",
        "train_tokenizer@b",
        "encode_tokens@b",
        "sample_images@a",
        "evaluate@a",
        "prepare_images",
    )
    assert [places.wanted(stage) for stage in stages] == [2, 3, 2, 2, 1, 1]
    asked = iter(range(2))

    def give_up() -> None:
        if next(asked) == 1:
            raise processes.Stopped

    with places.some(2, "one", said.append, lambda: None, lambda: False) as (held, environment):
        assert len(held) == 2 and environment["CUDA_VISIBLE_DEVICES"] == "0,1"
        with pytest.raises(processes.Stopped), Places().some(2, "two", said.append, give_up, lambda: False):
            raise AssertionError("three devices are four")
        assert locks.take(device_locks / "gpu-2.lock", "a third").release() is None  # nobody holds on to it
        assert len(said) == 1 and "gpu-1, held by process" in said[0]
    monkeypatch.setenv("TESSERA_PROCESSES", "4")
    with pytest.raises(ValueError, match="train_prior@a is to run as 4 processes, but here are 3 GPUs: lower TESSERA"):
        places.wanted("train_prior@a")


HOLDER = """
import os, subprocess, sys
from pathlib import Path
from flows import locks
lock = locks.take(Path(sys.argv[1]), "a test")
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"], pass_fds=[lock.descriptor])
print(child.pid, flush=True)
child.wait()
"""


def test_a_device_is_taken_until_the_last_process_of_its_stage_is_gone_even_by_kill_9(device_locks: Path) -> None:
    path = device_locks / "cpu.lock"
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(path)], env=environment(), stdout=subprocess.PIPE, text=True
    )
    assert holder.stdout is not None
    child = int(holder.stdout.readline())
    assert locks.take(path, "another") is None
    assert path.read_text() == f"process {holder.pid}: a test\n"
    holder.kill()
    holder.wait()
    assert locks.take(path, "another") is None  # the stage still runs
    os.kill(child, signal.SIGKILL)
    wait_for("the device is free", lambda: not alive(child), 5)
    lock = locks.take(path, "another")
    assert lock is not None
    assert locks.take(path, "a third") is None  # in one process too
    lock.release()


def test_who_waits_for_a_device_hears_whom_for_and_can_be_stopped(device_locks: Path) -> None:
    lock = locks.take(device_locks / "cpu.lock", "train_prior@toy in /somewhere")
    said: list[str] = []
    asked = iter(range(3))

    def give_up() -> None:
        if next(asked) == 2:
            raise processes.Stopped

    with (
        pytest.raises(processes.Stopped),
        locks.some_of([device_locks / "cpu.lock"], "another", said.append, give_up),
    ):
        raise AssertionError("two have it")
    assert said == [f"waiting for cpu, held by process {os.getpid()}: train_prior@toy in /somewhere"]
    assert lock is not None
    lock.release()
    with locks.some_of([device_locks / "cpu.lock"], "another", said.append):
        assert locks.take(device_locks / "cpu.lock", "a third") is None
    assert len(said) == 1


@pytest.mark.parametrize(
    ("line", "percent"),
    [
        ("train_prior@vqgan-flow  step  35/700  loss 2.1  eta 4s", 5.0),
        ("train_prior@vqgan-flow  step 700/700  loss 2.1", 100.0),
        ("sample_images@gan  30/40  eta 4s", 75.0),
        ("sample_images@gan  done in 3.1s, 12 images/s", None),
        ("Running stage 'train_prior@gan':", None),
        ("> exec python -m tessera.running train_prior --images data/1/2", None),
    ],
)
def test_progress_is_read_from_the_lines_of_stages(line: str, percent: float | None) -> None:
    assert board.progress_of(line) == percent


def test_the_link_to_mlflow_is_that_of_the_stages_newest_run_once_it_was_sent(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TESSERA_TRACKING", "on")
    uids = {}
    for stage in ("evaluate@real", "train_prior@a", "train_prior@b", "train_prior@a"):
        run = journal.open_run(stage, experiment="toy", root=tmp_path, state=None, params={}, tags={})
        run.close("FINISHED")
        uids[stage] = run.uid
        os.utime(run.folder / journal.JOURNAL, (1000.0 + len(uids), 1000.0 + len(uids)))
        time.sleep(0.01)
    newest = tmp_path / ".state/tracking" / uids["train_prior@a"]
    os.utime(newest / journal.JOURNAL, (2000.0, 2000.0))
    assert board.mlflow_run(tmp_path, "train_prior@a", 0.0) is None  # the uploader was not there yet
    (newest / "sent-0123456789ab.json").write_text('{"run_id": "f00", "experiment_id": "7"}')
    assert board.mlflow_run(tmp_path, "train_prior@a", 1500.0) == "experiments/7/runs/f00"
    assert board.mlflow_run(tmp_path, "train_prior@a", 2001.0) is None  # that was another flow run
    assert board.mlflow_run(tmp_path, "train_prior@b", 0.0) is None
    (tmp_path / ".state/tracking" / uids["evaluate@real"] / "sent-0123456789ab.json").write_text('{"run_id": "f01"}')
    assert board.mlflow_run(tmp_path, "evaluate_real", 0.0) == "runs/f01"  # as dvc.yaml calls it


def test_the_paths_of_pictures_in_a_table_become_the_pictures_where_there_are_some(tmp_path: Path) -> None:
    (tmp_path / "data/pictures/samples").mkdir(parents=True)
    (tmp_path / "data/comparison").mkdir()
    Image.new("L", (480, 960), 128).save(tmp_path / "data/pictures/samples/a.png")
    lines = ["| a | data/pictures/samples/a.png   | data/pictures/samples/b.png |", "see data/pictures/samples/a.png"]
    (tmp_path / "data/comparison/comparison.md").write_text("\n".join(lines))
    first, second = board.page(tmp_path / "data/comparison/comparison.md").splitlines()
    data = re.fullmatch(r"\| a \| !\[a\]\(data:image/png;base64,(\S+)\)   \| data/pictures/samples/b.png \|", first)
    assert data, first
    shown = Image.open(io.BytesIO(base64.b64decode(data[1])))
    assert (shown.size, shown.getpixel((0, 0))) == ((120, 240), 128)
    assert second == lines[1]


def test_a_dead_server_costs_a_board_a_second(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(**settings: object) -> None:
        raise OSError("connection refused")

    monkeypatch.setattr(board, "get_client", refuse)
    monkeypatch.setattr(board, "INTERVAL_SECONDS", 0.1)
    shown = board.Board(None)
    shown.line("train_prior@a", "train_prior@a  step 1/2  loss 1", None)
    shown.markdown("comparison", "| a |")
    time.sleep(0.5)
    began = time.monotonic()
    shown.close()
    assert time.monotonic() - began < 1.5


def test_the_end_waits_for_links_to_mlflow_unless_it_is_in_trouble(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TESSERA_TRACKING", "on")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    monkeypatch.setattr(board, "get_client", lambda sync_client: contextlib.nullcontext())
    monkeypatch.setattr(board, "INTERVAL_SECONDS", 0.1)
    monkeypatch.setattr(board, "LINK_SECONDS", 2.0)
    root = journal.open_run(
        "train_prior@a", experiment="toy", root=tmp_path, state=None, params={}, tags={}
    ).folder.parent
    seconds = {}
    for told in ("the journals are being sent again", "http://127.0.0.1:9 did not take run 0123 (refused)"):
        shown = board.Board(None)
        time.sleep(0.1)  # clocks of files are coarse
        mirror.note(root, told)
        shown.link("train_prior@a", tmp_path, 0.0, None)
        time.sleep(0.3)
        began = time.monotonic()
        shown.close()
        seconds[told] = time.monotonic() - began
    assert list(seconds.values())[1] < 1.0 < list(seconds.values())[0]


def test_keys_of_artifacts_are_as_prefect_demands() -> None:
    assert board.key_of("train_prior@vqgan-flow", "progress") == "train-prior-vqgan-flow-progress"


def test_importing_the_flows_takes_two_seconds_and_a_half_and_no_torch() -> None:
    code = "import time, sys; import flows.sweep; print(time.process_time(), 'torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], env=environment(), capture_output=True, text=True, check=True)
    seconds, has_torch = done.stdout.split()
    assert has_torch == "False"
    assert float(seconds) < 2.5  # of the processor: the wall clock is that of whoever else is at work


COPY = """
  copy:
    cmd: PYTHON -c "import sys; open('copy.txt', 'w').write(sys.argv[1] + open('raw/given.txt').read())" ${how.text}
    params: [how.text]
    deps: [raw/given.txt]
    outs: [copy.txt]
    metrics: [{made.json: {cache: false}}]
"""


@pytest.fixture
def project(toy: Path) -> Path:
    """The toy as a repository with a commit, params, a preset, and data that git ignores."""
    (toy / "dvc.yaml").write_text((toy / "dvc.yaml").read_text() + COPY.replace("PYTHON", sys.executable))
    text = (
        (toy / "dvc.yaml")
        .read_text()
        .replace(" ${how.text}\n", " ${how.text} && echo '[\"'$DVC_EXP_NAME'\"]' > made.json\n")
    )
    (toy / "dvc.yaml").write_text(text)
    (toy / "params.yaml").write_text("how: {text: plain}  # a remark\nsource: raw/given.txt\n")
    (toy / "presets").mkdir()
    (toy / "presets/loud.yaml").write_text("how: {text: LOUD}\nsource: raw/given.txt\n")
    (toy / "raw").mkdir()
    (toy / "raw/given.txt").write_text(" words")
    (toy / ".gitignore").write_text("/raw\n/.state\n/*.txt\n!/seed.txt\n/order.log\n")
    (toy / ".dvcignore").write_text(".state\n")
    git(toy, "add", "--all")
    git(toy, "-c", "user.name=test", "-c", "user.email=test@localhost", "commit", "--quiet", "--message=start")
    return toy


def git(folder: Path, *arguments: str) -> str:
    return subprocess.run(["git", *arguments], cwd=folder, check=True, capture_output=True, text=True).stdout


def test_a_run_with_other_params_is_an_experiment_and_the_checkout_stays_as_it_is(
    project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(project)
    monkeypatch.setenv("TESSERA_TRACKING", "off")
    (project / "step.py").write_text(STEP + "# not committed\n")
    assert carry_out(plan_of(project, monkeypatch, ("prepare",))) == ["ran"]
    git(project, "add", "dvc.lock")
    before = git(project, "status", "--short"), (project / "params.yaml").read_text()
    overrides = {"how.text": "bold"}
    for attempt in ("interrupted", "whole", "again"):
        with opened(["copy", "prepare"], False, None, overrides) as plan:
            assert plan.experiment is not None and plan.root == plan.experiment.folder
            assert plan.experiment.name.startswith("params-text-bold-")
            assert re.match("how: {text: bold} +# a remark", (plan.root / "params.yaml").read_text())
            assert (plan.root / "step.py").read_text().endswith("# not committed\n")
            assert (plan.root / "left-over").exists() == (attempt == "whole")  # the interrupted one goes on there
            if attempt == "interrupted":
                (plan.root / "left-over").touch()
                continue
            (plan.root / "left-over").unlink(missing_ok=True)
            carry_out(plan)
            assert {stage: outcome.what for stage, outcome in plan.outcomes.items()} == {
                "copy": "ran" if attempt == "whole" else "cached",
                "prepare": "cached",  # by the checkout
            }
            assert (plan.root / "copy.txt").read_text() == "bold words"
            experiments.keep(plan.experiment, ["copy", "prepare"], plan.unversioned)
        assert not plan.root.exists()
        (reference,) = git(project, "for-each-ref", "--format=%(refname)", "refs/exps/*/*/*").split()
        assert json.loads(git(project, "show", f"{reference}:made.json")) == [plan.experiment.name]
    assert (git(project, "status", "--short"), (project / "params.yaml").read_text()) == before
    assert not (project / "copy.txt").exists()
    listed = subprocess.run([sys.executable, "-m", "dvc", "exp", "list", "--name-only"], capture_output=True, text=True)
    assert listed.stdout.split() == [plan.experiment.name]
    assert git(project, "stash", "list") == ""


@pytest.mark.parametrize(
    ("preset", "overrides", "sentence"),
    [
        ("loud", ["how.txet=1"], "do not fit"),
        ("laud", None, "there is no preset 'laud': expected one of loud"),
        ("../params", None, "there is no preset"),
    ],
)
def test_a_preset_or_override_that_is_not_there_is_refused(
    project: Path, monkeypatch: pytest.MonkeyPatch, preset: str, overrides: list[str] | None, sentence: str
) -> None:
    monkeypatch.chdir(project)
    with pytest.raises(ValueError, match=re.escape(sentence)):
        experiments.define(project, preset, overrides)


def test_the_same_params_have_one_name_and_a_changed_file_gives_another(project: Path) -> None:
    names = [experiments.define(project, "loud", overrides).name for overrides in (None, [], ["how.text=LOUD"])]
    assert names[0] == names[1] and names[0].startswith("loud-")
    (project / "step.py").write_text(STEP + "# another\n")
    assert experiments.define(project, "loud", None).name not in names
    assert experiments.define(project, None, None) is None
    given = experiments.define(project, None, {"how.text": 'é "1"', "+more": {"list": [1, None, True, 2.5]}})
    found = yaml.safe_load(given.params)
    assert (found["how"]["text"], found["more"]) == ('é "1"', {"list": [1, None, True, 2.5]})


def test_a_grid_has_every_combination_and_a_wrong_one_is_refused() -> None:
    assert sweep.combinations({"a.b": [1, 2], "c": [3, 4]}) == [
        {"a.b": 1, "c": 3},
        {"a.b": 1, "c": 4},
        {"a.b": 2, "c": 3},
        {"a.b": 2, "c": 4},
    ]
    assert sweep.label_of({"systems.x.prior.depth": 6, "seed": 1}) == "depth=6, seed=1"
    for cells in ({}, {"seed": []}, {"seed": 3}, [{}]):
        with pytest.raises(ValueError, match="expected"):
            sweep.combinations(cells)


@pytest.mark.parametrize(
    ("cells", "sentence"),
    [("sed=0,1", "the overrides sed=0 do not fit"), ("seed=a,1", "seed: input should be a valid integer")],
)
def test_a_sweep_with_a_mistake_is_refused_before_anything_runs(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], cells: str, sentence: str
) -> None:
    monkeypatch.chdir(Path(__file__).parents[2])
    monkeypatch.setattr(sys, "argv", ["sweep", cells])
    assert sweep.main() == 2
    assert sentence in capsys.readouterr().err


def test_cells_that_differ_in_the_seed_alone_are_one_row(tmp_path: Path) -> None:
    def cell(fd: float) -> dict[str, Any]:
        found = figures.Recorder()
        found.add("generation", "fd_x", fd, figures.without_network("digits", "samples", 100), 0.01)
        found.measured().write(tmp_path / "metrics.json")
        return {"experiment": "e", "metrics": {"flow": (tmp_path / "metrics.json").read_text()}}

    cells = {"depth=2, seed=0": cell(0.2), "depth=2, seed=1": cell(0.3), "depth=4, seed=0": cell(0.5)}
    text = sweep.compare(cells)
    assert "| flow (depth=2) | 0.250 ± 0.050 |" in text and "| flow (depth=4) | 0.500 ± 0.010 |" in text
    assert "2 seeds" in text


def test_a_group_that_ignores_sigterm_is_killed_after_the_grace_period(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(processes, "GRACE_SECONDS", 0.5)
    stubborn = (
        "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('up', flush=True); time.sleep(60)"
    )
    running = processes.StageProcesses()

    def stop_when_up(line: str) -> None:
        assert line == "up"
        running.stop()

    began = time.monotonic()
    assert running.run([sys.executable, "-c", stubborn], stop_when_up, tmp_path, {}) == -signal.SIGKILL
    assert time.monotonic() - began < 10
    with pytest.raises(processes.Stopped, match="not started"):
        running.run([sys.executable, "-c", ""], print, tmp_path, {})


def test_a_failing_stage_fails_the_flow_and_then_a_dead_server_does_not(
    toy: Path, launch: Callable[..., subprocess.Popen[str]]
) -> None:
    (toy / "left.txt.how").write_text("fail")
    process = launch()
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 255, output  # DVC's code for a stage that failed
    assert outcomes(output) == {"prepare": "ran", "left": "failed", "right": "ran", "join": "not run"}, output
    assert "left fails on purpose" in output
    assert output.count("made prepare") == 1

    (toy / "left.txt.how").write_text("wait")
    process = launch()
    wait_for("left runs", (toy / "child.pid").exists, 90)
    (server,) = servers(process.pid)
    os.kill(server, signal.SIGKILL)
    (toy / "go").touch()
    wait_for("join is made", (toy / "join.txt").exists, 60)
    output, _ = process.communicate(timeout=45)  # Prefect alone would need minutes
    assert process.returncode == 0, output
    assert "nothing changed in 2 of the 4 stages" in output
    assert (toy / "join.txt").read_text() == "joinleftprepare0rightprepare0"
    first, *branches, again, last = order(toy)
    assert (first, sorted(branches), again, last) == ("prepare", ["left", "right"], "left", "join")


def servers(parent: int) -> list[int]:
    """Prefect's own server: the child of a flow that runs it."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            parts = (entry / "stat").read_text().rpartition(")")[2].split()
            if int(parts[1]) == parent and b"prefect_server" in (entry / "cmdline").read_bytes():
                found.append(int(entry.name))
        except (FileNotFoundError, ProcessLookupError):
            continue
    return found


def test_a_stopped_flow_leaves_no_process_of_its_stages(
    toy: Path, launch: Callable[..., subprocess.Popen[str]]
) -> None:
    (toy / "left.txt.how").write_text("wait")
    process = launch("left")
    wait_for("left runs", lambda: (toy / "child.pid").exists() and bool((toy / "child.pid").read_text()), 90)
    child = int((toy / "child.pid").read_text())
    group = os.getpgid(child)
    (server,) = servers(process.pid)
    assert alive(child)
    process.send_signal(signal.SIGTERM)
    wait_for("the stage is gone", lambda: not alive(child) and not alive(group), 8)  # before any grace period ends
    output, _ = process.communicate(timeout=45)
    assert process.returncode == 143, output
    assert not (toy / "left.txt").exists()
    wait_for("the server is gone", lambda: not alive(server), 10)

"""The flow against real DVC and Prefect's own server, on a diamond of four stages: prepare -> left, right -> join."""

import os
import queue
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from flows import reproduce, stage_process

pytestmark = pytest.mark.e2e
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


@pytest.fixture
def launch(toy: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., subprocess.Popen[str]]]:
    home = tmp_path_factory.getbasetemp() / "prefect"  # shared: creating its database takes seconds
    started: list[subprocess.Popen[str]] = []

    def start(*arguments: str) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [sys.executable, "-m", "flows.reproduce", *arguments],
            cwd=toy,
            env={**environment(), "PREFECT_HOME": str(home)},
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


def wait_for(what: str, condition: Callable[[], bool], seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"{what}: not within {seconds:g} s"
        time.sleep(0.1)


def outcomes(output: str) -> dict[str, str]:
    """The list at the end: {stage: ran, cached, failed or not run}."""
    lines = output.splitlines()[-4:]
    return {line.split()[0]: " ".join(line.split()[1:-2]) for line in lines}


def order(toy: Path) -> list[str]:
    return (toy / "order.log").read_text().split() if (toy / "order.log").exists() else []


def plan(
    toy: Path, monkeypatch: pytest.MonkeyPatch, targets: tuple[str, ...] = (), force: bool = False
) -> reproduce.Plan:
    monkeypatch.chdir(toy)
    return reproduce.read_plan(list(targets), force)


def carry_out(plan: reproduce.Plan) -> list[str]:
    """What the flow's tasks do, one after the other and without Prefect."""
    places: queue.Queue[dict[str, str]] = queue.Queue()
    places.put({})
    return [plan.reproduce(stage, lambda line: None, places).what for stage in plan.upstream]


def test_a_second_run_starts_nothing_and_a_change_runs_what_depends_on_it(
    toy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = plan(toy, monkeypatch)
    assert first.upstream["join"] == {"left", "right"}
    assert carry_out(first) == ["ran"] * 4
    assert (order(toy)[0], set(order(toy)[1:3]), order(toy)[3]) == ("prepare", {"left", "right"}, "join")

    second = plan(toy, monkeypatch)
    monkeypatch.setattr(second.processes, "run", None)  # any process would be an error
    assert carry_out(second) == ["cached"] * 4

    (toy / "left.txt.how").write_text("write ")  # left runs and writes what it wrote before: join has nothing to do
    third = plan(toy, monkeypatch)
    assert dict(zip(third.upstream, carry_out(third), strict=True)) == {
        "prepare": "cached",
        "left": "ran",
        "right": "cached",
        "join": "cached",
    }
    assert order(toy)[4:] == ["left"]
    assert not third.outcomes["join"].changed  # so that nothing after it would start a process

    (toy / "left.txt.how").write_text("sign")  # left writes something else: join was clean at the start, and is not now
    fourth = plan(toy, monkeypatch)
    assert fourth.stale == {"left"}
    assert carry_out(fourth).count("ran") == 2
    assert order(toy)[5:] == ["left", "join"]
    assert (toy / "join.txt").read_text() == "joinleftprepare0 signedrightprepare0"


def test_a_target_is_reproduced_with_what_it_depends_on_and_a_wrong_one_is_refused(
    toy: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert set(plan(toy, monkeypatch, ("right",)).upstream) == {"prepare", "right"}
    monkeypatch.setattr(sys, "argv", ["reproduce", "rihgt"])
    assert reproduce.main() == 2
    assert "cannot reproduce rihgt" in capsys.readouterr().err
    monkeypatch.setattr(sys, "argv", ["reproduce"])
    monkeypatch.setenv("TESSERA_PARALLEL", "two")
    assert reproduce.main() == 2
    assert "TESSERA_PARALLEL is 'two': expected" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("visible", "parallel", "expected"),
    [
        ("", None, [""]),
        ("-1", "2", ["", ""]),
        ("0,3", None, ["0", "3"]),
        ("3", None, [""]),
        ("0,1", "3", ["0", "1", "0"]),
    ],
)
def test_stages_side_by_side_have_a_gpu_each(
    monkeypatch: pytest.MonkeyPatch, visible: str, parallel: str | None, expected: list[str]
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    monkeypatch.delenv("TESSERA_PARALLEL", raising=False)
    if parallel:
        monkeypatch.setenv("TESSERA_PARALLEL", parallel)
    places = reproduce.slots()
    assert [places.get_nowait().get("CUDA_VISIBLE_DEVICES", "") for _ in range(places.qsize())] == expected


def test_a_group_that_ignores_sigterm_is_killed_after_the_grace_period(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stage_process, "GRACE_SECONDS", 0.5)
    stubborn = (
        "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('up', flush=True); time.sleep(60)"
    )
    processes = stage_process.StageProcesses()

    def stop_when_up(line: str) -> None:
        assert line == "up"
        processes.stop()

    began = time.monotonic()
    assert processes.run([sys.executable, "-c", stubborn], stop_when_up, tmp_path, {}) == -signal.SIGKILL
    assert time.monotonic() - began < 10
    with pytest.raises(stage_process.Stopped, match="not started"):
        processes.run([sys.executable, "-c", ""], print, tmp_path, {})


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
    output, _ = process.communicate(timeout=30)  # Prefect alone would need minutes
    assert process.returncode == 0, output
    assert "prepare  cached" in output
    assert (toy / "join.txt").read_text() == "joinleftprepare0rightprepare0"
    first, *branches, again, last = order(toy)
    assert (first, sorted(branches), again, last) == ("prepare", ["left", "right"], "left", "join")


def servers(parent: int) -> list[int]:
    """Prefect's own server: the child of a flow that runs uvicorn."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            parts = (entry / "stat").read_text().rpartition(")")[2].split()
            if int(parts[1]) == parent and b"uvicorn" in (entry / "cmdline").read_bytes():
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

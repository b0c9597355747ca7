"""One run on several machines: which of them did what, the same bits as on one, a machine that is killed, a cancellation.

The machines are checkouts with caches, homes and workers of their own (machines.py), and share what real ones would. The
tests share them and run in order.
"""

import itertools
import os
import re
import shutil
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from clones import AT_THE_END, Clone, cell
from machines import Machine, Team
from postgres import postgres_server
from waiting import wait_for

pytestmark = pytest.mark.e2e(seconds=400)
PARENT = "0123456789abcdef0123456789abcdef"
SYSTEMS = ("gan", "vqgan-flow")  # of which no image is drawn yet when the tests begin
DRAWN = [f"sample_images@{system}" for system in SYSTEMS]
TRAINING, PROCESS = "train_prior@gan", "train_prior gan"
CHECKPOINT = ".state/train_prior-gan/*/step-*/manifest.json"
STEPS = 2500
OUT = "data/priors/gan"
PASSWORD = "a-password-of-tests"


def forget(machine: Machine, stages: set[str]) -> None:
    """As if the stages had never run on this machine."""
    lock = machine.folder / "dvc.lock"
    content = yaml.safe_load(lock.read_text())
    for stage in stages:
        for out in content["stages"].pop(stage)["outs"]:
            path = machine.folder / out["path"]
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    lock.write_text(yaml.safe_dump(content, sort_keys=False))


def bits(folder: Path) -> dict[str, bytes]:
    """Everything that the pipeline makes, but for how long it took, and the report, which names the commit."""
    files = [path for path in (folder / "data").rglob("*") if not {"timings", "previews", "reports"} & {*path.parts}]
    return {str(path.relative_to(folder)): path.read_bytes() for path in files if path.is_file()}


@pytest.fixture(scope="module")
def team(clone: Clone, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Team]:
    """Machines a and b with a worker each; on c, which has everything but two systems, runs are coordinated."""
    with postgres_server(PASSWORD) as (_, port):
        database = f"postgresql+asyncpg://tessera:{PASSWORD}@127.0.0.1:{port}/postgres"
        team = Team(clone, tmp_path_factory.mktemp("team"), database)
        try:
            team.open()
            c = team.join("c", clone.folder)
            done = c.run("dvc", "push")
            assert done.returncode == 0, done.stderr
            shutil.rmtree(c.folder / ".dvc/cache/runs")
            forget(c, {*AT_THE_END}.union(*(cell(system) for system in SYSTEMS)))
            team.deploy(c)
            often = {"TESSERA_CHECKPOINT_SECONDS": "1", "TESSERA_STATE_SECONDS": "1"}
            for name in ("a", "b"):
                team.machine(name, **often).work()
            c.work("control", 4)
            yield team
        finally:
            team.close()


@pytest.fixture(scope="module")
def c(team: Team) -> Machine:
    return team.machines["c"]


def workers(team: Team, run: str) -> dict[str, str]:
    """{stage: the worker that had it} of a run."""
    found = {}
    for below in team.below(run):
        found |= dict.fromkeys(below["name"].split(", "), below["labels"]["prefect.worker.name"])
    return found


@pytest.mark.parametrize(
    ("environment", "told"),
    [
        ({"PREFECT_API_URL": ""}, "there is no PREFECT_API_URL"),
        ({"PREFECT_API_URL": "http://127.0.0.1:9/api", "PREFECT_CLIENT_MAX_RETRIES": "0"}, "does not answer"),
    ],
)
def test_without_a_server_it_is_refused(c: Machine, environment: dict[str, str], told: str) -> None:
    done = c.run(sys.executable, "-m", "flows.reproduce", "--spread", **environment)
    assert (done.returncode, done.stdout) == (2, "") and told in done.stderr, done.stderr


def test_without_a_remote_and_with_code_that_is_not_committed_it_is_refused_in_a_sentence(c: Machine) -> None:
    config = c.folder / ".dvc/config"
    whole = config.read_text()
    config.write_text("[core]\n    analytics = false\n")
    done = c.run(sys.executable, "-m", "flows.reproduce", "--spread")
    assert done.returncode == 2 and ".dvc/config of" in done.stderr and "are not committed" in done.stderr, done.stderr
    c.git("commit", "--quiet", "--all", "--message=no remote")
    done = c.run(sys.executable, "-m", "flows.reproduce", "--spread")
    assert done.returncode == 2 and "no default remote of DVC" in done.stderr, done.stderr
    assert "dvc remote add --default" in done.stderr and done.stderr.count("\n") == 1
    c.git("reset", "--quiet", "--soft", "HEAD~1")
    config.write_text(whole)
    c.git("reset", "--quiet")


def test_a_run_in_the_pool_that_is_to_do_its_stages_is_refused(team: Team, c: Machine) -> None:
    run = team.submit("reproduce/reproduce", spread=True)
    c.work("gpu")
    try:
        team.ends(run, "Failed", 120)
    finally:
        os.killpg(c.workers[-1].pid, signal.SIGKILL)
    assert "Run the deployment reproduce/spread, in the pool control" in team.whole_state(run)["message"]


def test_two_machines_share_a_run_and_make_the_bits_of_one(team: Team, c: Machine, finished: Clone) -> None:
    run = team.submit("reproduce/spread", targets=DRAWN)
    team.ends(run, seconds=600)

    def ended() -> bool:  # a part shows what it made before it ends
        return {below["state"]["name"] for below in team.below(run)} == {"Completed"}

    wait_for("its parts end", ended, 60)
    by = workers(team, run)
    assert set(by) == {*DRAWN, *(f"train_prior@{system}" for system in SYSTEMS)}
    assert {by[f"train_prior@{system}"] for system in SYSTEMS} == {"a", "b"}
    spans = sorted((below["start_time"], below["end_time"]) for below in team.below(run))
    assert any(later < end for (_, end), (later, _) in itertools.pairwise(spans))  # side by side
    found = {"train_prior@gan": "Completed", "train_tokenizer@vqgan": "Cached"}  # which Prefect writes down in time
    wait_for("both are shown", lambda: found.items() <= team.tasks(run).items(), 120)
    made = bits(c.folder)
    assert {"data/priors/gan/weights.safetensors", "data/pictures/samples/vqgan-flow.png"} <= made.keys()
    there = bits(finished.folder)
    assert made == {name: there[name] for name in made}
    assert "Data and pipelines are up to date" in c.run("dvc", "status", *DRAWN).stdout
    for name in ("a", "b"):  # what a part had for itself is gone
        assert not list((team.machines[name].folder / ".state/runs").glob("part-*/"))
    again = team.submit("reproduce/spread", targets=DRAWN)
    seconds = team.ends(again, seconds=600)
    assert team.below(again) == []
    print(f"everything cached: {seconds:.1f} s")


def train_longer(c: Machine) -> None:
    params = c.params()
    params["systems"]["gan"]["prior"]["training"]["num_steps"] = STEPS
    c.write_params(params)


def held(team: Team) -> Machine:
    """The machine that trains, standing still once it has a checkpoint, which has been sent: else it might be done by then."""
    found: list[Machine] = []

    def trains() -> bool:
        for machine in (team.machines["a"], team.machines["b"]):
            if machine.at(PROCESS) and any(machine.folder.glob(f".state/runs/part-*/{CHECKPOINT}")):
                machine.signal(PROCESS, signal.SIGSTOP)
                found.append(machine)
        return bool(found)

    def is_sent() -> bool:
        objects = team.store.list_objects_v2(Bucket="tessera", Prefix="dvc/states/").get("Contents", [])
        return any("/step-" in each["Key"] and each["Key"].endswith("manifest.json") for each in objects)

    wait_for("a machine trains", trains, 240)
    wait_for("its checkpoint is sent", is_sent, 120)
    return found[0]


def test_a_cancelled_run_takes_back_what_waits_and_ends_what_works(team: Team, c: Machine) -> None:
    train_longer(c)
    run = team.submit("reproduce/spread", targets=["sample_images@gan"])
    held(team).signal(PROCESS, signal.SIGCONT)
    team.ask("POST", f"/flow_runs/{run}/set_state", {"state": {"type": "CANCELLING"}})
    team.ends(run, "Cancelled", 60)
    for below in team.below(run):
        wait_for(
            "its parts have ended",
            lambda below=below: team.state(below["id"]) in ("Cancelled", "Completed"),
            60,
        )
    assert not any(team.machines[name].at(PROCESS) for name in ("a", "b"))


def test_a_machine_that_is_killed_while_it_trains_is_replaced_and_the_training_goes_on(team: Team, c: Machine) -> None:
    """With what the other one had: the newest checkpoint that was sent. The bits are those of a training on one machine."""
    alone = team.machine("d")
    train_longer(alone)
    run = team.submit("reproduce/spread", targets=["sample_images@gan"])
    lost = held(team)
    other = team.machines["b" if lost.name == "a" else "a"]
    lost.kill()
    assert alone.run("dvc", "pull", "encode_tokens@none").returncode == 0
    alone.repro(TRAINING, "--pull")
    team.ends(run, seconds=300)
    assert f"{lost.name} lost {TRAINING} (no heartbeat for 90 s" in team.logs(run)
    parts = {below["labels"]["prefect.worker.name"]: below for below in team.below(run) if TRAINING in below["name"]}
    assert {name: below["state"]["name"] for name, below in parts.items()} == {
        lost.name: "Crashed", other.name: "Completed"
    }  # fmt: skip
    resumed = re.search(r"resumed step (\d+)", team.logs(parts[other.name]["id"]))
    assert resumed and 1 <= int(resumed[1]) < STEPS, team.logs(parts[other.name]["id"])
    assert c.hashes(OUT) == alone.hashes(OUT)
    states = team.store.list_objects_v2(Bucket="tessera", Prefix="dvc/states/part").get("Contents", [])
    assert states == []  # nothing is left of what was sent for the case

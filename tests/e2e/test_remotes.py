"""Clones that share data by an S3 store and experiments by git, as machines do: what runs again, what a mistake says.

The store is moto's server in a process of its own, which checks keys and signatures. The tests share it and the first
clone, a copy of the finished one, and run in order; whoever breaks something mends it.
"""

import hashlib
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from clones import AT_THE_END, cell, ran
from store import BUCKET, Store

pytestmark = pytest.mark.e2e(seconds=120)
WEIGHTS = "data/tokenizers/vqgan/weights.safetensors"
GUIDANCE = "systems.vqgan-flow.sampling.guidance_scale"

# What `python -m flows.reproduce -S ...` does, without Prefect
EXPERIMENT = """
import subprocess, sys
from flows import experiments
from flows.plan import opened
with opened([], False, None, sys.argv[1:]) as plan:
    subprocess.run([sys.executable, "-m", "dvc", "repro"], cwd=plan.root, check=True)
    experiments.keep(plan.experiment, [], plan.unversioned)
    print("kept", plan.experiment.name)
"""

STALE = """
from flows.plan import opened
with opened([], False, None, None) as plan:
    print(len(plan.upstream), "stages, stale:", sorted(plan.stale))
"""

# What docs/operations.md gives for a store whose objects are gone or damaged
SEND_AGAIN = """
import sys, s3fs
s3fs.S3FileSystem(endpoint_url=sys.argv[1]).put(".dvc/cache/files/md5/", "tessera/dvc/files/md5/", recursive=True)
"""


class Team(Store):
    """A store, a git repository that clones share, and clones, each with a cache of its own; in the first the pipeline ran."""

    def __init__(self, first: Any, folder: Path):
        super().__init__(folder)
        self.first, self.origin = first, folder / "origin.git"
        first.environment = {key: value for key, value in first.environment.items() if not key.startswith("AWS_")}
        self.output = folder / "output.log"  # of every command

    def machine(self, name: str) -> Any:
        """A new clone, with an empty cache."""
        subprocess.run(["git", "clone", "--quiet", str(self.origin), str(self.folder / name)], check=True)
        made = type(self.first)(self.folder / name)
        made.environment = self.first.environment
        return made

    def run(self, machine: Any, *command: str, fails: bool = False, **environment: str) -> str:
        """What it prints."""
        done = machine.run(*command, **{**self.environment, **environment})
        said = done.stdout + done.stderr
        with self.output.open("a") as output:
            output.write(f"$ {' '.join(command)}\n{said}\n")
        assert (done.returncode != 0) == fails, said[-3000:]
        return said

    def key(self, path: str) -> str:
        """Of an output of the first clone, in the store."""
        md5 = hashlib.md5((self.first.folder / path).read_bytes()).hexdigest()
        return f"dvc/files/md5/{md5[:2]}/{md5[2:]}"

    def has(self, key: str) -> bool:
        return self.store.list_objects_v2(Bucket=BUCKET, Prefix=key)["KeyCount"] == 1


def bits(machine: Any) -> dict[str, str]:
    """{path: sha256} of everything that the pipeline makes, but for how long it took."""
    files = [
        path
        for path in (machine.folder / "data").rglob("*")
        if path.is_file() and not {"timings", "previews"} & {*path.parts}
    ]
    return {str(path.relative_to(machine.folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


@pytest.fixture(scope="module")
def team(clone: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Team]:
    first = clone
    team = Team(first, tmp_path_factory.mktemp("remotes"))
    try:
        team.open()
        # As docs/operations.md has it
        team.run(first, "dvc", "remote", "add", "--default", "store", f"s3://{BUCKET}/dvc")
        team.run(first, "dvc", "remote", "modify", "store", "endpointurl", team.url)
        team.run(first, "dvc", "remote", "modify", "store", "verify", "true")
        first.git("add", "--all")
        first.git("commit", "--quiet", "--message=results")
        team.run(first, "dvc", "push", "--run-cache", "--verbose")
        first.git("clone", "--quiet", "--bare", ".", str(team.origin))
        first.git("remote", "add", "origin", str(team.origin))
        yield team
    finally:
        team.close()


@pytest.fixture(scope="module")
def second(team: Team) -> Any:
    """A clone that pulls; it never has an experiment."""
    return team.machine("second")


@pytest.fixture(scope="module")
def third(team: Team) -> Any:
    return team.machine("third")


def pulled(clone: Any) -> set[str]:
    return {path.name for path in (clone.folder / "data").iterdir()} - {"README.md", "download.py", "metrics"}


def local(clone: Any, **settings: str) -> None:
    """Settings of the remote for this clone alone; none: as git has them."""
    lines = [f"    {key} = {value}" for key, value in settings.items()]
    (clone.folder / ".dvc/config.local").write_text("\n".join(["['remote \"store\"']", *lines, ""]) if lines else "")


@pytest.mark.parametrize(
    "settings, environment, told",
    [
        ({}, {"AWS_SECRET_ACCESS_KEY": "wrong"}, "failed to connect to s3 (tessera/dvc/files/md5) - Forbidden"),
        ({}, {"AWS_ACCESS_KEY_ID": "", "AWS_SECRET_ACCESS_KEY": ""}, "Unable to locate credentials"),
        ({"endpointurl": "http://127.0.0.1:9"}, {"AWS_MAX_ATTEMPTS": "1"}, "Could not connect to the endpoint URL"),
        ({"url": "s3://nothing/dvc"}, {}, "The specified bucket does not exist"),
    ],
    ids=["wrong-secret", "no-key", "store-is-down", "wrong-bucket"],
)
def test_a_pull_that_cannot_work_says_why_and_changes_nothing(
    team: Team, second: Any, settings: dict[str, str], environment: dict[str, str], told: str
) -> None:
    local(second, **settings)
    said = team.run(second, "dvc", "pull", fails=True, **environment)
    local(second)
    assert told in said and "Traceback" not in said and said.count("ERROR") <= 2, said
    assert not pulled(second)


@pytest.fixture(scope="module")
def careless(team: Team) -> Any:
    """A clone whose user does not pull first."""
    return team.machine("careless")


def test_repro_pull_of_a_wrong_bucket_computes_instead_of_refusing(team: Team, careless: Any) -> None:
    local(careless, url="s3://nothing/dvc")
    said = team.run(careless, "dvc", "repro", "--pull", "prepare_images")
    local(careless)
    assert "Unable to pull data for stage: 'prepare_images'" in said and ran(said) == ["prepare_images"]


def test_without_the_lock_the_run_cache_brings_back_all_but_the_evaluation_of_systems(
    team: Team, careless: Any
) -> None:
    """Git keeps their summaries, so `dvc push` sends none: results are shared by a commit, or as an experiment."""
    for path in "data/images", ".dvc/cache":
        shutil.rmtree(careless.folder / path)
    (careless.folder / "dvc.lock").unlink()
    said = team.run(careless, "dvc", "repro", "--pull", "evaluate_real")
    for stage in ("prepare_images", "train_features@classifier", "train_features@random"):
        assert f"Stage '{stage}' is cached - skipping run" in said, said
    assert "name: data/metrics/summary/real.json" in said.partition("Missing cache files")[2]
    assert ran(said) == ["evaluate_real"]


def test_a_missing_object_is_told_and_only_sent_again_as_the_document_says(team: Team, second: Any) -> None:
    key = team.key(WEIGHTS)
    team.store.delete_object(Bucket=BUCKET, Key=key)
    said = team.run(second, "dvc", "pull", "data/tokenizers/vqgan", fails=True)
    assert f"failed to transfer '{''.join(key.split('/')[-2:])}' - The specified key does not exist" in said, said
    assert not pulled(second)
    assert "up to date" in team.run(team.first, "dvc", "push") and not team.has(key)
    team.run(team.first, sys.executable, "-c", SEND_AGAIN, team.url)
    assert team.has(key)


def test_a_flipped_bit_in_the_store_comes_into_no_clone(team: Team, second: Any) -> None:
    key, whole = team.key(WEIGHTS), (team.first.folder / WEIGHTS).read_bytes()
    team.store.put_object(Bucket=BUCKET, Key=key, Body=whole[:-5] + bytes([whole[-5] ^ 1]) + whole[-4:])
    said = team.run(second, "dvc", "pull", "data/tokenizers/vqgan", fails=True)
    assert "Checkout failed for following targets:\ndata/tokenizers/vqgan" in said, said
    assert not (second.folder / WEIGHTS).exists()
    team.run(team.first, sys.executable, "-c", SEND_AGAIN, team.url)
    assert team.store.get_object(Bucket=BUCKET, Key=key)["Body"].read() == whole


def test_a_second_clone_pulls_and_repro_runs_no_stage(team: Team, second: Any) -> None:
    assert WEIGHTS not in bits(second)
    team.run(second, "dvc", "pull")
    said = team.run(second, "dvc", "repro")
    assert ran(said) == [] and "Data and pipelines are up to date" in said
    assert " stages, stale: []" in team.run(second, sys.executable, "-c", STALE)  # neither does a flow
    assert bits(second) == bits(team.first) and WEIGHTS in bits(second)
    assert second.run("git", "status", "--short").stdout == ""


def test_repro_pull_in_an_empty_clone_runs_no_stage(team: Team, third: Any) -> None:
    assert not (third.folder / ".dvc/cache").exists() and not pulled(third)
    said = team.run(third, "dvc", "repro", "--pull")
    assert ran(said) == [] and "Pulling data for stage: 'train_prior@vqgan-flow'" in said
    assert bits(third) == bits(team.first)
    assert third.run("git", "status", "--short").stdout == ""


@pytest.fixture(scope="module")
def experiment(team: Team) -> str:
    """The name of a run with another guidance scale, which the first clone has kept and pushed."""
    said = team.run(team.first, sys.executable, "-c", EXPERIMENT, f"{GUIDANCE}=2.5")
    assert set(ran(said)) == cell("vqgan-flow", "sample_images", "evaluate", "edit_images") | set(AT_THE_END)
    name = said.rpartition("kept ")[2].split()[0]
    team.run(team.first, "dvc", "exp", "push", "origin", name)
    return name


def test_an_experiment_of_one_clone_is_applied_in_another_and_no_stage_runs(team: Team, experiment: str) -> None:
    clone = team.machine("other")
    assert experiment in team.run(clone, "dvc", "exp", "list", "origin")
    clone.git("commit", "--quiet", "--allow-empty", "--message=later")
    assert experiment not in team.run(
        clone, "dvc", "exp", "list", "origin"
    )  # which is of the commit that is checked out
    assert experiment in team.run(clone, "dvc", "exp", "list", "--all-commits", "origin")
    team.run(clone, "dvc", "exp", "pull", "origin", experiment)
    assert experiment in team.run(clone, "dvc", "exp", "show", "--all-commits", "--csv")
    team.run(clone, "dvc", "exp", "apply", experiment)
    assert ran(team.run(clone, "dvc", "repro")) == []
    assert clone.params()["systems"]["vqgan-flow"]["sampling"]["guidance_scale"] == 2.5
    changed = clone.run("git", "status", "--short").stdout.split()[1::2]
    assert changed == ["data/metrics/summary/vqgan-flow.json", "dvc.lock", "params.yaml"]
    team.run(team.first, "dvc", "exp", "apply", experiment)
    assert bits(clone) == bits(team.first)


def test_gc_cloud_takes_the_data_of_experiments_it_does_not_know_and_a_push_sends_them_again(
    team: Team, second: Any, third: Any, experiment: str
) -> None:
    team.run(second, "dvc", "gc", "--workspace", "--cloud", "--force")
    assert "Some of the cache files do not exist" in team.run(third, "dvc", "exp", "pull", "origin", experiment)
    team.run(team.first, "dvc", "exp", "push", "origin", experiment)
    team.run(third, "dvc", "exp", "pull", "origin", experiment)
    team.run(third, "dvc", "exp", "apply", experiment)


def test_the_secret_of_the_store_is_in_no_file_and_no_log(team: Team, experiment: str) -> None:
    assert len(team.secret) >= 20 and team.environment["AWS_SECRET_ACCESS_KEY"] == team.secret
    folders = team.folder, team.first.folder  # every clone with .git and .dvc, what commands printed, the store's log
    files = [path for folder in folders for path in folder.rglob("*") if path.is_file() and not path.is_symlink()]
    assert {"output.log", "store.log", "config", "dvc.lock"} <= {path.name for path in files}
    assert "$ dvc push" in team.output.read_text() and "GET /tessera" in (team.folder / "store.log").read_text()
    assert [path for path in files if team.secret.encode() in path.read_bytes()] == []

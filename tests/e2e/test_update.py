"""What an update of the code does to what a user has trained: nothing, unless it means something; and who decides then.

The tests of this file share one copy of the finished clone and run in order; each leaves the pipeline up to date.
"""

import csv
import json
import re
import shutil
import subprocess
import sys

import pytest
import yaml
from clones import ROOT, Clone

pytestmark = pytest.mark.e2e(seconds=120)
ANY_FILE = ("running", "tracking", "training", "nn", "priors", "tokenizers", "artifacts", "evaluation")


def every_stage_that_ran(output: str) -> list[str]:
    return re.findall(r"Running stage '([^']+)'", output)


def code(clone: Clone, *arguments: str, fails: bool = False) -> str:
    done = clone.run(sys.executable, "-m", "tessera.code", *arguments)
    assert done.returncode == (2 if fails else 0), done.stdout + done.stderr
    return done.stderr if fails else done.stdout


def stale(clone: Clone) -> set[str]:
    done = clone.run("dvc", "status", "--json")
    return set(json.loads(done.stdout))


def test_a_pull_of_comments_docs_and_new_parts_conflicts_with_nothing_and_trains_nothing(clone, tmp_path):
    """Two git repositories: the project's, and that of a person who cloned it, ran it and committed what it made."""
    first = subprocess.run(
        ["git", "rev-list", "--max-parents=0", "HEAD"], cwd=clone.folder, capture_output=True, text=True
    )
    upstream = Clone(tmp_path / "upstream")
    clone.git("clone", "--quiet", str(clone.folder), str(upstream.folder))
    upstream.git("reset", "--quiet", "--hard", first.stdout.strip())
    clone.git("add", "dvc.lock", "data/metrics")
    clone.git("commit", "--quiet", "--message=my results")

    files = [path for folder in ANY_FILE for path in sorted((upstream.folder / "tessera" / folder).glob("*.py"))]
    files = [path for path in files if path.stat().st_size]
    for path in files:
        path.write_text(path.read_text() + "\n# A comment.\n")
    assert len(files) >= 40
    journal = upstream.folder / "tessera/tracking/journal.py"
    journal.write_text(journal.read_text() + "\n\ndef another_line() -> str:\n    return 'said otherwise'\n")
    for folder in ("quantizers", "metrics", "denoisers"):
        some = sorted(path for path in (upstream.folder / "tessera" / folder).glob("*.py") if path.stem != "__init__")[
            0
        ]
        shutil.copy(some, some.with_name("brand_new.py"))
    params = upstream.folder / "params.yaml"
    params.write_text("# What is run.\n" + params.read_text())
    (upstream.folder / "docs/edits.md").write_text("# Other words\n")
    upstream.git("add", "--all")
    upstream.git("commit", "--quiet", "--message=better words")

    clone.git("pull", "--quiet", "--no-rebase", "--no-edit", str(upstream.folder), "main")
    assert every_stage_that_ran(clone.repro()) == ["fingerprint_code"]
    assert every_stage_that_ran(clone.repro()) == []


def test_a_constant_of_one_prior_makes_its_cell_stale_and_the_change_is_named(clone):
    path = clone.folder / "tessera/priors/autoregressive.py"
    path.write_text(path.read_text() + "\nUNUSED = 1\n")
    told = code(clone, "changes")  # before anything has run
    output = clone.repro("fingerprint_code")
    cell = {f"{stage}@vqgan-autoregressive" for stage in ("train_prior", "sample_images", "edit_images")}
    assert cell <= stale(clone) <= cell | {"compare_systems", "write_report"}
    assert "new: tessera.priors.autoregressive.UNUSED" in output
    assert "train_prior@vqgan-autoregressive" in told and told == code(clone, "changes")


def test_a_person_keeps_a_training_whose_code_changed_and_that_is_written_down(clone):
    stage, weights = "train_prior@vqgan-autoregressive", clone.hashes("data/priors/vqgan-autoregressive")
    assert "is up to date: there is nothing to accept" in code(
        clone, "accept", "train_prior@gan", "--why", "x", fails=True
    )
    assert "--why is empty" in code(clone, "accept", stage, "--why", " ", fails=True)
    before = clone.params()
    changed = clone.params()
    changed["systems"]["vqgan-autoregressive"]["prior"]["depth"] = 2
    clone.write_params(changed)
    assert "is stale for more than its code" in code(clone, "accept", stage, "--why", "x", fails=True)
    clone.write_params(before)
    clone.git("config", "user.name", "")
    assert "git config user.name NAME" in code(clone, "accept", stage, "--why", "x", fails=True)
    assert not (clone.folder / "data/accepted.csv").exists()
    clone.git("config", "user.name", "a name")

    code(clone, "accept", stage, "--why", "a constant that nothing uses")
    (row,) = csv.DictReader((clone.folder / "data/accepted.csv").open())
    assert (row["by"], row["stage"], row["why"]) == ("a name", stage, "a constant that nothing uses")
    assert row["changed"] == "new: tessera.priors.autoregressive.UNUSED" and row["code_before"] != row["code_now"]
    ran = every_stage_that_ran(clone.repro())
    assert "sample_images@vqgan-autoregressive" in ran and not [name for name in ran if name.startswith("train_")]
    assert clone.hashes("data/priors/vqgan-autoregressive") == weights


def as_before_fingerprints(clone: Clone) -> None:
    """Make the lock one of the last version without fingerprints: its commands, and md5s of its source files."""
    known = json.loads((ROOT / "tessera/code/before.json").read_text())
    path = clone.folder / "dvc.lock"
    lock = yaml.safe_load(path.read_text())
    del lock["stages"]["fingerprint_code"]
    for stage in lock["stages"].values():
        stage["cmd"] = re.sub(r"-m tessera\.running (\w+)", r"-m stages.\1", stage["cmd"])
        files = [{"path": file, "hash": "md5", "md5": md5, "size": 1} for file, md5 in known.items()]
        stage["deps"] = files + [dep for dep in stage["deps"] if not dep["path"].startswith("data/code")]
    path.write_text(yaml.safe_dump(lock))
    shutil.rmtree(clone.folder / "data/code")


def test_what_the_version_before_fingerprints_has_trained_is_adopted_by_one_command(clone):
    as_before_fingerprints(clone)
    path = clone.folder / "dvc.lock"
    lock = yaml.safe_load(path.read_text())
    foreign = "sample_images@vqgan-flow"  # ran with a file of the user's own
    next(dep for dep in lock["stages"][foreign]["deps"] if dep["path"] == "tessera/seeding.py")["md5"] = "0" * 32
    path.write_text(yaml.safe_dump(lock))
    measuring = {name for name in lock["stages"] if name.startswith("evaluate")}
    said = code(clone, "adopt")
    number = len(lock["stages"])
    assert f"adopted {number - len(measuring) - 1} stages of {number}" in said
    assert f"not {foreign}: it ran with other code: tessera/seeding.py" in said
    assert "not evaluate@vqgan-flow: it measures otherwise since then" in said
    assert stale(clone) == measuring | {foreign}
    ran = every_stage_that_ran(clone.repro())  # DVC may take some of them from its cache of runs
    assert set(ran) <= measuring | {foreign, "compare_systems", "write_report"}
    assert stale(clone) == set()
    assert "tells of nothing that was made by the code before fingerprints" in code(clone, "adopt", fails=True)

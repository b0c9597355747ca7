"""Runs with other params: each in a git worktree of its own, kept as a DVC experiment of the commit it started from.

`dvc exp run` writes params.yaml of the checkout, and `dvc exp run --temp` throws the training state of a killed run away
and cannot run a stage at a time. A worktree under .state/runs does neither: the checkout stays as it is, the same
params come back to the same folder and resume there, and what was computed before comes from DVC's shared cache.
"""

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from flows import locks

RUNS = Path(".state/runs")
PARAMS = "params.yaml"
NAME_CHARACTERS = 60
IDENTITY = {"NAME": "tessera", "EMAIL": "tessera@localhost"}

Overrides = dict[str, Any] | list[str] | None


class Experiment(NamedTuple):
    name: str  # of its folder; as `dvc exp show` lists it
    checkout: Path
    head: str  # the commit that it belongs to
    base: str  # that commit, or the stash of uncommitted changes, that its files are of
    params: str  # the text of its params.yaml
    is_kept: bool = True  # False: it is a part of a run elsewhere, which keeps what it makes

    @property
    def folder(self) -> Path:
        return self.checkout / RUNS / self.name

    @property
    def lock(self) -> Path:
        return self.checkout / RUNS / f"{self.name}.lock"


def define(checkout: Path, preset: str | None, overrides: Overrides) -> Experiment | None:
    """The experiment of a preset and overrides; None if they ask for nothing but the checkout itself.

    It starts from the files that git tracks, as they are now. Raises ValueError for a preset that is not there and for
    overrides that do not fit it.
    """
    settings = as_list(overrides)
    if not preset and not settings:
        return None
    source = checkout / PARAMS
    if preset:
        known = sorted(path.stem for path in checkout.glob("presets/*.yaml"))
        if preset not in known:
            raise ValueError(f"there is no preset {preset!r}: expected one of {', '.join(known)}, files of presets/")
        source = checkout / "presets" / f"{preset}.yaml"
    params = _apply(source.read_text(encoding="utf-8"), settings)
    head = _git(checkout, "rev-parse", "HEAD")
    base = _git(checkout, "stash", "create") or head
    tree = _git(checkout, "rev-parse", f"{base}^{{tree}}")
    key = hashlib.sha256(f"{head} {tree} {params}".encode()).hexdigest()
    values = [setting.partition("=")[0].rpartition(".")[2] + "-" + setting.partition("=")[2] for setting in settings]
    slug = re.sub(r"[^a-z0-9]+", "-", "-".join([preset or "params", *values]).lower()).strip("-")
    return Experiment(f"{slug[:NAME_CHARACTERS].strip('-')}-{key[:6]}", checkout, head, base, params)


def part(checkout: Path, commit: str, params: str, stage: str) -> Experiment:
    """Where this machine does a stage of a run that another one coordinates: at its commit, with its params.

    Raises ValueError if the commit cannot be had.
    """
    has = ["git", "cat-file", "-e", f"{commit}^{{commit}}"]
    if subprocess.run(has, cwd=checkout, capture_output=True).returncode:
        fetched = subprocess.run(["git", "fetch", "--all", "--quiet"], cwd=checkout, capture_output=True, text=True)
        if subprocess.run(has, cwd=checkout, capture_output=True).returncode:
            said = f" ({fetched.stderr.strip()[-200:]})" if fetched.returncode else ""
            raise ValueError(
                f"{checkout} has no commit {commit[:12]}, and git fetch brought none{said}: push it to where this checkout "
                "fetches from"
            )
    key = hashlib.sha256(f"{commit} {params} {stage}".encode()).hexdigest()
    slug = re.sub(r"[^a-z0-9]+", "-", stage.lower())
    return Experiment(f"part-{slug[:NAME_CHARACTERS]}-{key[:6]}", checkout, commit, commit, params, is_kept=False)


def prepare(experiment: Experiment) -> None:
    """Make its worktree, unless an interrupted run left it: then that goes on. To be called with its lock held."""
    if not (experiment.folder / ".state" / "ready").exists():
        with locks.some_of([experiment.checkout / RUNS / "git.lock"], experiment.name, print):  # one list of worktrees
            _make(experiment)


def as_list(overrides: Overrides) -> list[str]:
    """Overrides as `dvc exp run -S` takes them."""
    if isinstance(overrides, dict):
        return [f"{key}={_hydra(value)}" for key, value in overrides.items()]
    return list(overrides or [])


def keep(experiment: Experiment, targets: list[str], unversioned: list[str]) -> None:
    """Save what the worktree holds as a DVC experiment, and remove the worktree.

    `unversioned` are outputs that git keeps, not DVC's cache: metrics.
    """
    include = [part for path in unversioned for part in ("--include-untracked", path)]
    with locks.some_of(
        [experiment.checkout / RUNS / "git.lock"], experiment.name, print
    ):  # DVC has one set of refs for it
        command = [sys.executable, "-m", "dvc", "exp", "save", "--force", "--name", experiment.name, *include, *targets]
        done = subprocess.run(
            command, cwd=experiment.folder, env=_environment(experiment.checkout), capture_output=True, text=True
        )
        if done.returncode:
            raise RuntimeError(
                f"the experiment could not be saved ({done.stderr.strip()[-500:]}); its results stay in {experiment.folder}"
            )
        _git(experiment.checkout, "worktree", "remove", "--force", str(experiment.folder))


def drop(experiment: Experiment) -> None:
    """Remove the worktree; what was made there is elsewhere."""
    with locks.some_of([experiment.checkout / RUNS / "git.lock"], experiment.name, print):
        _git(experiment.checkout, "worktree", "remove", "--force", str(experiment.folder))


def environment(experiment: Experiment) -> dict[str, str]:
    """The environment in which stages in the worktree report to the checkout's tracker, named as DVC names the experiment."""
    from tessera.tracking.mirror import tracking_uri

    named = {"DVC_EXP_NAME": experiment.name} if experiment.is_kept else {}
    return {"MLFLOW_TRACKING_URI": tracking_uri(experiment.checkout), **named}


def shared_lock(experiment: Experiment, recipe: str) -> Path:
    """The lock of one computation in all experiments of the checkout: the second to run finds its result in DVC's cache.

    There are at most 4,096 files: two computations that share one by chance only wait for each other.
    """
    return experiment.checkout / RUNS / "locks" / f"recipe-{recipe[:3]}.lock"


def _make(experiment: Experiment) -> None:
    """The worktree, with the params and with what git does not know: DVC's cache, data sets, weights, the tracker."""
    checkout, folder = experiment.checkout, experiment.folder
    if folder.exists():  # a run that was killed right here
        shutil.rmtree(folder)
    _git(checkout, "worktree", "prune")
    _git(checkout, "worktree", "add", "--quiet", "--detach", str(folder), experiment.head)
    _git(folder, "restore", f"--source={experiment.base}", "--worktree", "--", ".")
    (folder / PARAMS).write_text(experiment.params, encoding="utf-8")

    from dvc.config import Config
    from dvc.repo import Repo

    with Repo(str(checkout)) as repo:
        cache = repo.cache.local_cache_dir  # outputs, and which run made them
    local = checkout / ".dvc/config.local"
    if local.exists():
        shutil.copyfile(local, folder / ".dvc/config.local")
    with Config(dvc_dir=str(folder / ".dvc")).edit("local") as config:
        config.setdefault("cache", {})["dir"] = cache

    for text in _strings(yaml.safe_load(experiment.params)):
        path = Path(text)
        is_inside = not path.is_absolute() and ".." not in path.parts
        if is_inside and (checkout / path).exists() and not (folder / path).exists():
            (folder / path).parent.mkdir(parents=True, exist_ok=True)
            (folder / path).symlink_to((checkout / path).resolve())
    tracking = checkout / ".state/tracking"
    tracking.mkdir(parents=True, exist_ok=True)
    (folder / ".state").mkdir(exist_ok=True)
    (folder / ".state/tracking").symlink_to(tracking.resolve())
    (folder / ".state/ready").touch()


def _apply(text: str, settings: list[str]) -> str:
    """Params with overrides in the grammar of `dvc exp run -S`; comments stay."""
    from dvc.utils.hydra import apply_overrides

    if not settings:
        return text
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / PARAMS
        path.write_text(text, encoding="utf-8")
        try:
            apply_overrides(path, settings)
        except ValueError as error:
            raise ValueError(
                f"the overrides {', '.join(settings)} do not fit ({error.__cause__ or error}): expected KEY=VALUE with a key "
                f"of {PARAMS} or of the preset, or +KEY=VALUE to add one"
            ) from None
        return path.read_text(encoding="utf-8")


def _hydra(value: Any) -> str:
    """A value in the grammar of overrides, which is JSON but for the keys of dictionaries."""
    if isinstance(value, dict):
        return "{" + ",".join(f"{key}:{_hydra(item)}" for key, item in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ",".join(map(_hydra, value)) + "]"
    return json.dumps(value, ensure_ascii=False)


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list):
        for item in value:
            yield from _strings(item)
    elif isinstance(value, str) and value:
        yield value


def _environment(checkout: Path) -> dict[str, str]:
    """Commits need an author: git's own setting, or IDENTITY without one."""
    known = subprocess.run(["git", "var", "GIT_COMMITTER_IDENT"], cwd=checkout, capture_output=True).returncode == 0
    ours = {f"GIT_{role}_{key}": value for role in ("AUTHOR", "COMMITTER") for key, value in IDENTITY.items()}
    return {**os.environ, "DVC_NO_ANALYTICS": "true", **({} if known else ours)}


def _git(folder: Path, *arguments: str) -> str:
    environment = _environment(folder) if arguments[0] == "stash" else None
    done = subprocess.run(["git", *arguments], cwd=folder, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise ValueError(
            f"git {' '.join(arguments[:2])} failed in {folder}: {done.stderr.strip()}. Runs with a preset or overrides need a "
            "git repository with a commit"
        )
    return done.stdout.strip()

"""What machines hand each other: outputs and training states by DVC's remote, entries of dvc.lock and small files as text.

DVC's remote may be any that it knows: an S3 store, or a folder on a disk that all machines share.
"""

import contextlib
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from flows.plan import Plan, repository
from tessera.code.changes import LOCK, read_lock

SCHEMA = "2.0"  # of dvc.lock
SMALL_BYTES = 100_000  # of a file that git keeps: a dozen figures
STATES = "states"  # beside DVC's own folders in the remote
MEND = "dvc remote add --default NAME URL (docs/operations.md, Remotes), and commit .dvc/config"
COLOUR = re.compile(r"\x1b\[[0-9;]*m")


class Trouble(RuntimeError):
    """What was to pass between the machines did not; the message tells people why."""


def require(root: Path) -> None:
    """Raises ValueError if there is no remote by which machines could hand each other anything."""
    from dvc.config import NoRemoteError

    with repository(root) as repo:
        try:
            repo.cloud.get_remote(command="push")
        except NoRemoteError:
            raise ValueError(
                f"{root} has no default remote of DVC, by which workers get what a stage reads and send what it makes: {MEND}"
            ) from None


def require_answer(root: Path) -> None:
    """Raises Trouble if this machine cannot write to the remote now."""
    with _telling("cannot be written to"):
        fs, folder = _states(root)
        probe = fs.join(folder, "probe")
        fs.makedirs(folder, exist_ok=True)
        fs.pipe_file(probe, b"written by a run that spreads its stages")
        fs.remove(probe)


def entries(root: Path, stages: list[str], whole: list[str]) -> dict[str, Any]:
    """What dvc.lock says that these stages made, and all that it says of `whole`, where it may say nothing yet.

    Raises Trouble if it does not know one of `stages`.
    """
    with repository(root) as repo, repo.lock:  # dvc may be writing it for another stage
        known = read_lock(root)
    if missing := [stage for stage in stages if "outs" not in known.get(stage, {})]:
        raise Trouble(f"dvc.lock in {root} does not say what {', '.join(missing)} made: run it again")
    made = {stage: {key: known[stage][key] for key in ("cmd", "outs")} for stage in stages}
    return made | {stage: known[stage] for stage in whole if stage in known}


def small_files(plan: Plan, stages: list[str]) -> dict[str, str]:
    """{path: text} of what these stages made and DVC's cache does not keep. Raises Trouble if one is not small."""
    found = {}
    for path in (path for stage in stages for path in plan.outputs[stage]):
        name = path.relative_to(plan.root).as_posix()
        if name in plan.unversioned and path.is_file():
            if path.stat().st_size > SMALL_BYTES:
                raise Trouble(
                    f"{name} has {path.stat().st_size:,} bytes, and DVC's cache does not keep it: expected at most "
                    f"{SMALL_BYTES:,}; remove cache: false from it in dvc.yaml"
                )
            found[name] = path.read_text(encoding="utf-8")
    return found


def write(root: Path, lock: dict[str, Any], files: dict[str, str], is_all: bool = False) -> None:
    """Put entries into dvc.lock, and small files into their places. is_all: it is to have no other entries."""
    from dvc.utils.serialize import dump_yaml

    with repository(root) as repo, repo.lock:
        content = {"schema": SCHEMA, "stages": ({} if is_all else read_lock(root)) | lock}
        beside = root / f".{LOCK}.new"
        dump_yaml(beside, content)
        beside.replace(root / LOCK)
        for name, text in files.items():
            path = (root / name).resolve()
            if not path.is_relative_to(root.resolve()):
                raise Trouble(f"{name} is no path within the checkout")
            path.parent.mkdir(parents=True, exist_ok=True)
            path.unlink(missing_ok=True)  # it may be a link
            path.write_text(text, encoding="utf-8")


def pull(root: Path, targets: list[str], what: str) -> None:
    """Put outputs that dvc.lock names into their places, from the cache or the remote. Raises Trouble."""
    if targets:
        with _telling(f"did not give {what}"), repository(root) as repo:
            repo.pull(targets=targets, force=True)


def push(root: Path, stage: str) -> None:
    """Send what a stage made. Raises Trouble."""
    with _telling(f"did not take what {stage} made"), repository(root) as repo:
        repo.push(targets=[stage])


def inputs(plan: Plan, stage: str, without: set[str]) -> list[str]:
    """What a stage reads of other stages' outputs but those of `without`, as targets of DVC."""
    found = set()
    for above, paths in plan.reads[stage].items():
        if above not in without:
            for out in plan.outputs[above]:
                inside = [path for path in paths if path.is_relative_to(out)]
                holding = [out] if any(out.is_relative_to(path) for path in paths) else []
                found |= {path.relative_to(plan.root).as_posix() for path in holding or inside}
    return sorted(found - set(plan.unversioned))


def _states(root: Path) -> tuple[Any, str]:
    """The remote's file system, and the folder of training states there."""
    with repository(root) as repo:
        remote = repo.cloud.get_remote(command="push")
        return remote.fs, remote.fs.join(remote.path, STATES)


@contextlib.contextmanager
def _telling(what: str) -> Iterator[None]:
    try:
        yield
    except Trouble:
        raise
    except Exception as error:  # DVC's, the store's and the operating system's errors
        said = " ".join(COLOUR.sub("", str(error)).split()) or type(error).__name__
        raise Trouble(f"DVC's remote {what}: {said}; docs/operations.md, Remotes, says what that is") from error


# ------------------------------------------------------------------------------------------------ states of trainings


def newest(state: Path) -> Path | None:
    """The folder of the newest whole checkpoint."""
    whole = (path.parent for path in state.glob("*/step-*/manifest.json"))
    return max(whole, key=lambda path: path.name, default=None)


def send_state(root: Path, state: Path, key: str) -> str | None:
    """Send the newest checkpoint of a training, and all that lies beside it. Its name; None if there is no whole one.

    Its manifest is sent last, so that half a checkpoint has none.
    """
    step = newest(state)
    if step is None:
        return None
    files = [path for path in step.iterdir() if path.name != "manifest.json"]
    beside = [path for path in state.rglob("*") if path.is_file() and not _is_unwanted(path.relative_to(state).parts)]
    fs, folder = _states(root)
    folder = fs.join(folder, key)
    for path in [*files, step / "manifest.json", *beside]:  # what lies beside is at least as new as the checkpoint
        target = fs.join(folder, *path.relative_to(state).parts)
        fs.makedirs(fs.parent(target), exist_ok=True)
        fs.put_file(str(path), target)
    for name in _steps(fs, folder)[:-1]:
        fs.remove(fs.join(folder, name), recursive=True)
    return step.name


def fetch_state(root: Path, state: Path, key: str) -> str | None:
    """Bring the training state that another machine sent, unless here is one as new. The name of its checkpoint."""
    fs, folder = _states(root)
    folder = fs.join(folder, key)
    there = _steps(fs, folder)
    here = newest(state)
    if not there or (here is not None and here.name >= there[-1].rpartition("/")[2]):
        return None
    shutil.rmtree(state, ignore_errors=True)
    for found in fs.find(folder):
        name = fs.relpath(found, folder)
        path = (state / name).resolve()
        if path.is_relative_to(state.resolve()):
            path.parent.mkdir(parents=True, exist_ok=True)
            fs.get_file(found, str(path))
    return there[-1].rpartition("/")[2]


def remove_state(root: Path, key: str) -> None:
    fs, folder = _states(root)
    if fs.exists(fs.join(folder, key)):
        fs.remove(fs.join(folder, key), recursive=True)


def _steps(fs: Any, folder: str) -> list[str]:
    """The whole checkpoints in a folder of the remote, HASH/step-N, the newest last."""
    if not fs.exists(folder):
        return []
    names = [fs.relpath(found, folder) for found in fs.find(folder)]
    found = [name.split("/") for name in names if name.endswith("/manifest.json")]
    whole = ["/".join(parts[:2]) for parts in found if len(parts) == 3 and parts[1].startswith("step-")]
    return sorted(whole, key=lambda name: name.rpartition("/")[2])


def _is_unwanted(parts: tuple[str, ...]) -> bool:
    """Whether a file of a state is of a checkpoint, or is being written."""
    return any(part.startswith(".") for part in parts) or (len(parts) > 2 and parts[1].startswith("step-"))

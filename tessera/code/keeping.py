"""Writes the fingerprints of all entries, and keeps results whose code changed in a way that cannot matter."""

import csv
import hashlib
import json
import subprocess
import sys
import tempfile
from datetime import date
from pathlib import Path
from typing import Any

from tessera import params as all_params
from tessera.artifacts import whole
from tessera.code import changes, entries

ACCEPTED = Path("data/accepted.csv")
COLUMNS = ("date", "by", "stage", "code_before", "code_now", "changed", "why")
BEFORE = Path(__file__).with_name("before.json")  # md5 of each source file of the last version without fingerprints
MEASURES_ANEW = (
    "evaluate",
    "evaluate_real",
    "evaluate_tokenizer",
)  # their figures have changed since; see CHANGELOG.md
OF_BEFORE = "exec python -m stages."  # how that version's commands begin


def write(root: Path, out: Path) -> None:
    """A file for each entry of root/dvc.yaml under root/params.yaml, and a line for each that is stale by its code."""
    fingerprint(root, out)
    for line in changes.sentences(changes.since_last_run(root, out)):
        print(f"fingerprint_code  {line}", flush=True)


def told(root: Path) -> list[str]:
    """A sentence for each stage whose code, as it is now, is not the one that it ran with."""
    with tempfile.TemporaryDirectory() as folder:  # data/code is of the last run
        fingerprint(root, Path(folder) / "code")
        return changes.sentences(changes.since_last_run(root, Path(folder) / "code"))


def fingerprint(root: Path, out: Path) -> None:
    """A file for each entry of root/dvc.yaml under root/params.yaml."""
    params = all_params.read(root / "params.yaml")
    code = entries.all_code()
    with whole.naming(out):
        whole.remove(out)
        out.mkdir(parents=True)
        for entry in entries.read(params, root / "dvc.yaml"):
            settings = {key: entries.plain(value) for key, value in entry.params.items()}
            reached = entries.code_of(entry.params, entry.stage, code, entry.keys)
            (out / entry.name).write_text(changes.as_text(reached, settings), encoding="utf-8")


def accept(root: Path, stages: list[str], why: str) -> None:
    """Record the present outputs of these stages as those of the code as it is now, and who decided so.

    Raises ValueError, before anything is recorded, for a stage that is stale for another reason than its code.
    """
    if not why.strip():
        raise ValueError("--why is empty: say in a sentence why the change of code cannot change the result")
    _refresh(root)
    status, lock = _status(root), changes.read_lock(root)
    found = changes.since_last_run(root, root / changes.FOLDER)
    for stage in stages:
        if stage not in lock:
            raise ValueError(f"{stage} has not run yet, or is no stage of dvc.yaml: there is no result to keep")
        if stage not in status:
            raise ValueError(f"{stage} is up to date: there is nothing to accept")
        others = _reasons(status[stage], besides=f"{changes.FOLDER}/{stage}")
        if others:
            raise ValueError(f"{stage} is stale for more than its code ({'; '.join(others)}): run dvc repro {stage}")
    by = _name_in_git(root)
    rows = []
    for stage in stages:
        before = next(dep["md5"] for dep in lock[stage]["deps"] if dep["path"] == f"{changes.FOLDER}/{stage}")
        now = hashlib.md5((root / changes.FOLDER / stage).read_bytes(), usedforsecurity=False).hexdigest()
        what = str(found[stage]) if found.get(stage) else "not known"
        rows.append((date.today().isoformat(), by, stage, before, now, what, why.strip()))
    _commit(root, stages)
    is_new = not (root / ACCEPTED).exists()
    with (root / ACCEPTED).open("a", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerows([COLUMNS, *rows] if is_new else rows)
    print(f"kept: {', '.join(stages)}. Recorded in dvc.lock and {ACCEPTED}; commit both to git")


def adopt(root: Path) -> None:
    """Keep what the last version without fingerprints made: what it trained and drew is what the code of now would.

    A stage is adopted if its own record in dvc.lock shows the code of that version, the params and inputs of now, and the
    outputs that lie there. Whatever is not adopted is named, with the reason, and `dvc repro` runs it.
    """
    lock = changes.read_lock(root)
    old = {name: stage for name, stage in lock.items() if stage["cmd"].startswith(OF_BEFORE)}
    if not old:
        raise ValueError(
            f"{changes.LOCK} tells of nothing that was made by the code before fingerprints: expected the dvc.lock of your "
            f"own runs. If git has taken it away, put it back: git checkout COMMIT -- {changes.LOCK} data/metrics"
        )
    _refresh(root)
    status, known = _status(root), json.loads(BEFORE.read_text(encoding="utf-8"))
    adopted, refused = [], {}
    for name, stage in old.items():
        files = {dep["path"]: dep["md5"] for dep in stage.get("deps", ()) if dep["path"].endswith(".py")}
        others = sorted(path for path, md5 in files.items() if known.get(path) != md5)
        reasons = [f"it ran with other code: {', '.join(others)}"] if others else []
        if name.partition("@")[0] in MEASURES_ANEW:
            reasons.append("it measures otherwise since then")
        reasons += _reasons(status.get(name, []), besides=f"{changes.FOLDER}/{name}", command=False)
        if reasons:
            refused[name] = "; ".join(reasons)
        elif name in status:
            adopted.append(name)
    if adopted:
        _commit(root, adopted)
    print(f"adopted {len(adopted)} stages of {len(old)}; dvc repro runs what is left")
    for name, reason in refused.items():
        print(f"  not {name}: {reason}")


def _reasons(status: list[Any], besides: str, command: bool = True) -> list[str]:
    """Why a stage is stale, in words, of what `dvc status --json` says; without the dependency `besides`.

    command: whether a changed command counts.
    """
    found = []
    for part in status:
        if isinstance(part, str):
            found += [part] if command or part != "changed command" else []
            continue
        for what, items in part.items():
            named = [f"{path} {_state(how)}" for path, how in items.items() if path != besides]
            found += [f"{what}: {', '.join(named)}"] if named else []
    return found


def _state(how: Any) -> str:
    """What DVC says of a file, or of the params in one."""
    return how if isinstance(how, str) else ", ".join(f"{key} {state}" for key, state in how.items())


def _refresh(root: Path) -> None:
    _output(root, sys.executable, "-m", "dvc", "repro", "--quiet", "--single-item", entries.FINGERPRINTS)


def _status(root: Path) -> dict[str, list[Any]]:
    return json.loads(_output(root, sys.executable, "-m", "dvc", "status", "--json"))


def _name_in_git(root: Path) -> str:
    done = subprocess.run(("git", "config", "user.name"), cwd=root, capture_output=True, text=True)
    name = done.stdout.strip()
    if not name:
        raise ValueError(f"git knows no name for you, and {ACCEPTED} tells who decided: git config user.name NAME")
    return name


def _commit(root: Path, stages: list[str]) -> None:
    _output(root, sys.executable, "-m", "dvc", "commit", "--quiet", "--force", *stages)


def _output(root: Path, *command: str) -> str:
    """What a command prints. Raises ValueError with its last line if it fails."""
    done = subprocess.run(command, cwd=root, capture_output=True, text=True)
    if done.returncode:
        lines = (done.stderr or done.stdout).strip().splitlines() or ["it said nothing"]
        raise ValueError(f"{' '.join(command[-4:])} ended with {done.returncode}: {lines[-1]}")
    return done.stdout

"""Files between stages that have no manifest (figures, pictures, curves), compared with the hashes that dvc.lock has of them.

DVC itself goes by size and time of change: a bit that a disk has flipped moves neither.
"""

import hashlib
import time
from collections.abc import Collection, Iterable, Iterator
from pathlib import Path
from typing import Any

import yaml

from tessera.artifacts.whole import ArtifactError

LOCK = "dvc.lock"
ATTEMPTS, PAUSE_SECONDS = 3, 1.0  # a dvc that ends a stage beside this one writes the lock anew


def require_as_written(inputs: Iterable[Path], root: Path, but: str = "", among: Collection[str] | None = None) -> None:
    """Raises ArtifactError for a file that is, or lies below, one of the inputs and is not what its stage wrote.

    root: the checkout whose dvc.lock says so; without one nothing is known.
    but: the stage that reads them; what it writes itself is no input.
    among: the stages of the pipeline as it is now; None: all that the lock has.
    """
    inputs = [path.resolve() for path in inputs]
    for attempt in range(ATTEMPTS):
        wrong = next(_wrong(inputs, root.resolve(), but, among), None)
        if wrong is None:
            return
        if attempt < ATTEMPTS - 1:
            time.sleep(PAUSE_SECONDS)
    raise ArtifactError(wrong)


def require_all_as_written(folder: Path) -> None:
    """The same of all files below a folder, by the lock of the checkout that it lies in, if it lies in one."""
    checkouts = (above for above in folder.resolve().parents if (above / LOCK).is_file())
    if (root := next(checkouts, None)) is not None:
        require_as_written([folder], root)


def _wrong(inputs: list[Path], root: Path, but: str, among: Collection[str] | None) -> Iterator[str]:
    for stage, content in _stages(root / LOCK).items():
        if stage == but or (among is not None and stage not in among):
            continue
        for out in content.get("outs") or ():
            if not {"path", "md5"} <= set(out or ()) or out.get("hash") != "md5":  # the rest of it is being written
                continue
            path = root / out["path"]
            if not path.is_file() or not any(path.is_relative_to(given) for given in inputs):
                continue
            found = hashlib.md5(path.read_bytes(), usedforsecurity=False).hexdigest()
            if found != out["md5"]:
                yield (
                    f"{path} is not what {stage} wrote: its md5 is {found}, {LOCK} has {out['md5']}. If it is damaged: dvc "
                    f"repro --force --single-item {stage}; if you ran {stage} by hand: dvc commit --force {stage}"
                )


def _stages(lock: Path) -> dict[str, Any]:
    """By name, what DVC has recorded of them: less of it while the file is being written."""
    if not lock.is_file():
        return {}
    try:
        content = yaml.load(lock.read_text(encoding="utf-8"), Loader=yaml.CSafeLoader)  # noqa: S506  a safe loader, in C
    except yaml.YAMLError:
        return {}
    stages = content.get("stages") if isinstance(content, dict) else None
    return {stage: recorded for stage, recorded in (stages or {}).items() if isinstance(recorded, dict)}

"""The folder of a training's resumable state, and those beside it that no longer fit anything."""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tessera.artifacts.folder import write_json
from tessera.code import changes

INPUTS = "inputs.json"  # what the state in a folder was made of


def folder_for(
    root: Path, inputs: dict[str, Any], code: dict[str, str], say: Callable[[str], None], is_made: bool = True
) -> Path:
    """The folder below `root` of exactly these inputs and this code. is_made: it is made, and says what it is of.

    Says of each other folder with a checkpoint why it is not resumed: a training of 30 hours should not begin anew in
    silence. They are left where they are; they go when the stage has finished.
    """
    named = json.loads(json.dumps({"inputs": inputs, "code": code}, default=str))
    key = hashlib.sha256(json.dumps(named, sort_keys=True).encode()).hexdigest()[:16]
    for other in sorted(path for path in root.glob("*") if path.is_dir() and path.name != key):
        steps = sorted(other.glob("step-*/manifest.json"))
        if steps:
            step = int(steps[-1].parent.name.removeprefix("step-"))
            say(f"{other} holds a training up to step {step:,} that is not resumed: {_difference(other, named)}")
    folder = root / key
    if is_made:
        write_json(folder / INPUTS, named)
    return folder


def _difference(other: Path, now: dict[str, Any]) -> str:
    """What another state was made of, compared with now, in words."""
    try:
        before = json.loads((other / INPUTS).read_text(encoding="utf-8"))
        changed = str(changes.between(before["code"], now["code"]))
        values = _flat(before["inputs"]), _flat(now["inputs"])
    except (OSError, ValueError, KeyError, TypeError):
        return "it does not say what it was made of"
    names = sorted(key for key in values[0].keys() | values[1].keys() if values[0].get(key) != values[1].get(key))
    found = [f"{key} was {_short(values[0].get(key))}, is {_short(values[1].get(key))}" for key in names]
    return "; ".join(found + ([f"code {changed}"] if changed else []))


def _flat(value: Any, above: str = "") -> dict[str, Any]:
    """Values by their dotted keys."""
    if not isinstance(value, dict):
        return {above: value}
    found: dict[str, Any] = {}
    for name, inner in value.items():
        found |= _flat(inner, f"{above}.{name}" if above else name)
    return found


def _short(value: Any) -> str:
    text = str(value)
    return text[:12] if len(text) == 64 and not set(text) - set("0123456789abcdef") else text

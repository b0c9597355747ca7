"""What became of the code and settings of each entry since it ran last: data/code now, beside what dvc.lock was written with.

An entry's file holds the hashes of the definitions it reaches, by module, and its params. DVC keeps the file that a stage
ran with in its cache, under the md5 that dvc.lock names.
"""

import configparser
import hashlib
import json
from pathlib import Path
from typing import Any, NamedTuple

import yaml

FOLDER = Path("data/code")
LOCK = Path("dvc.lock")
SHOWN = 6  # definitions in a line


class Change(NamedTuple):
    """How the code that an entry reaches differs from that of its last run, by dotted names of definitions."""

    changed: list[str]
    added: list[str]
    removed: list[str]

    def __str__(self) -> str:
        named = (("changed", self.changed), ("new", self.added), ("gone", self.removed))
        return "; ".join(f"{what}: {_some(names)}" for what, names in named if names)


def _some(names: list[str]) -> str:
    rest = len(names) - SHOWN
    return ", ".join(names[:SHOWN]) + (f" and {rest} more" if rest > 0 else "")


def as_text(code: dict[str, str], params: dict[str, Any]) -> str:
    """The file of an entry."""
    modules: dict[str, dict[str, str]] = {}
    for name, digest in code.items():
        module, _, definition = name.rpartition(".")
        modules.setdefault(module, {})[definition] = digest
    return json.dumps({"code": modules, "params": params}, indent=1, sort_keys=True) + "\n"


def code_in(text: str) -> dict[str, str]:
    """The digests by dotted names of an entry's file."""
    modules = json.loads(text)["code"]
    return {f"{module}.{name}": digest for module, some in modules.items() for name, digest in some.items()}


def between(before: dict[str, str], now: dict[str, str]) -> Change:
    return Change(
        changed=sorted(name for name in before.keys() & now.keys() if before[name] != now[name]),
        added=sorted(now.keys() - before.keys()),
        removed=sorted(before.keys() - now.keys()),
    )


def read_lock(root: Path) -> dict[str, Any]:
    """The stages of dvc.lock; none where nothing has run yet."""
    path = root / LOCK
    if not path.is_file():
        return {}
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # ten times as fast
    return yaml.load(path.read_text(encoding="utf-8"), loader)["stages"] or {}  # noqa: S506  both are safe


def since_last_run(root: Path, folder: Path) -> dict[str, Change | None]:
    """By entry, the change of its code since the run that dvc.lock tells of; None where that run's file is not kept.

    Entries that never ran, and those whose file is the same, are left out.
    """
    cache, found = _cache(root), {}
    for name, stage in read_lock(root).items():
        now = folder / name
        before = next((dep["md5"] for dep in stage.get("deps", ()) if dep["path"] == f"{FOLDER}/{name}"), None)
        if before is None or not now.is_file():
            continue
        text = now.read_bytes()
        if hashlib.md5(text, usedforsecurity=False).hexdigest() == before:
            continue
        kept = cache / before[:2] / before[2:]
        found[name] = between(code_in(kept.read_text()), code_in(text.decode())) if kept.is_file() else None
    return found


def _cache(root: Path) -> Path:
    """Where DVC keeps files by their md5: .dvc/cache, or the folder that its configuration names."""
    place = root / ".dvc" / "cache"
    for name in ("config", "config.local"):
        settings = configparser.ConfigParser()
        settings.read(root / ".dvc" / name)
        place = root / ".dvc" / settings.get("cache", "dir", fallback=str(place.resolve()))
    return place / "files" / "md5"


def sentences(found: dict[str, Change | None]) -> list[str]:
    """One line per set of entries that the same definitions have changed for."""
    entries: dict[str, list[str]] = {}
    for name, change in found.items():
        if change is None:
            entries.setdefault(
                "the code of their last run is not in DVC's cache, so what changed cannot be told", []
            ).append(name)
        elif str(change):
            entries.setdefault(str(change), []).append(name)
    return [f"{', '.join(names)}: {what}" for what, names in entries.items()]

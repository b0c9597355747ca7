"""The JSON files of artifacts as models: what somebody else made may say anything, also with a manifest that fits."""

import json
from pathlib import Path
from typing import Any, TypeVar

from tessera.artifacts import folder as artifact
from tessera.artifacts.folder import ArtifactError
from tessera.components import InvalidParams, Params, parse

MOST_BYTES = 16 * 2**20  # of a file: 100,000 names of classes take 2
MOST_TOLD = 3  # mistakes, in a sentence
P = TypeVar("P", bound=Params)


def read(path: Path, model: type[P]) -> P:
    """A JSON file of an artifact. Raises ArtifactError, naming it, for anything that the model does not say."""
    return parsed(path, model, plain(path))


def plain(path: Path) -> Any:
    """What the file says, unchecked. Raises ArtifactError if it is too large, nested without end, or no JSON."""
    try:
        if path.stat().st_size > MOST_BYTES:
            raise ValueError(f"it has {path.stat().st_size:,} bytes, expected at most {MOST_BYTES:,}")
        return json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise ArtifactError(f"{path} cannot be read ({error}). {artifact.remedy(path.parent)}") from None


def parsed(path: Path, model: type[P], value: Any, where: str = "") -> P:
    """A part of what the file says, as the model has it; where: its key. Raises ArtifactError."""
    try:
        return parse(model, value, where)
    except (InvalidParams, RecursionError) as error:
        lines = str(error).splitlines()
        more = f"; and {len(lines) - MOST_TOLD} more" if len(lines) > MOST_TOLD else ""
        raise ArtifactError(
            f"{path} is not as this version writes it: {'; '.join(lines[:MOST_TOLD])}{more}. {artifact.remedy(path.parent)}"
        ) from None

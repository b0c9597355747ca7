"""Two-stage image generators: `tessera.load(FOLDER)` opens one that `python -m tessera.export SYSTEM FOLDER` wrote."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tessera.export.loaded import ArtifactError, CannotDraw, CannotEdit, TrainedSystem, load

__all__ = ["ArtifactError", "CannotDraw", "CannotEdit", "TrainedSystem", "load"]


def __getattr__(name: str) -> Any:
    """The public names, when they are first asked for: whoever imports one module of the package need not wait for others."""
    if name not in __all__:
        raise AttributeError(f"module 'tessera' has no attribute '{name}'")
    return getattr(importlib.import_module("tessera.export.loaded"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})

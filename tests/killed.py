"""A stage that is killed while it keeps images, in the process of a test."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from tessera.artifacts.growing import Growing


class Death(BaseException):
    """Ends a stage as a kill does."""


@contextmanager
def killed_after(number: int, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Any]]:
    """Inside, a stage dies when it has kept so many positions; what it gives counts those that are kept then and later."""
    keep, kept = Growing.keep, []

    def keep_and_die(self: Growing, position: Any) -> None:
        keep(self, position)
        kept.append(position)
        if len(kept) == number:
            raise Death

    monkeypatch.setattr(Growing, "keep", keep_and_die)
    with pytest.raises(Death):
        yield kept

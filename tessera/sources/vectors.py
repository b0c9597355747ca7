"""Vectors in a column of metadata: a list of numbers for each image, equally many in all; an image may have none.

They are kept as float32, on their way in base64, so that what is said of an image stays one line of text.
"""

import base64
from typing import Any

import numpy as np

LENGTHS = range(1, 65_537)


def read(value: Any) -> tuple[str | None, str]:
    """What a cell says: the vector in base64, or None where nothing is said; and why it is none, if it is not."""
    if value is None or value == "":
        return None, ""
    if not isinstance(value, list) or any(isinstance(one, bool) for one in value):
        return None, f"is {str(value)!r:.40} and no list of numbers"
    try:
        numbers = np.array(value, np.float64) if value else np.empty(0)
    except (TypeError, ValueError, OverflowError):  # text, lists of lists of several lengths, 10**400
        numbers = np.empty(0)
    if numbers.ndim != 1 or len(numbers) not in LENGTHS or any(isinstance(one, str) for one in value):
        return None, f"is {str(value)!r:.40} and no list of numbers"
    with np.errstate(over="ignore"):
        numbers = numbers.astype("<f4")
    if not np.isfinite(numbers).all():
        return None, "has numbers that are not finite, or beyond float32"
    return base64.b64encode(numbers.tobytes()).decode(), ""


def length(vector: str) -> int:
    return len(decoded(vector))


def decoded(vector: str) -> np.ndarray:
    """(E,) float32"""
    return np.frombuffer(base64.b64decode(vector), "<f4")


def common_length(known: int | None, vector: str | None, column: str, where: str) -> int | None:
    """The length of all vectors so far. Raises ValueError, naming the line, for one of another."""
    if vector is None or known in (None, length(vector)):
        return known if vector is None else length(vector)
    raise ValueError(
        f"{where} has {length(vector):,} numbers in the column {column!r}, and others before it {known:,}: expected equally "
        f"many for every image"
    )


def require_some(length: int | None, column: str, source: str) -> None:
    """Raises ValueError where no image has a vector."""
    if length is None:
        raise ValueError(
            f"{source}: no image has a vector in the column {column!r}: name another, or leave out metadata.embedding"
        )


def or_missing(vector: str | None, length: int | None) -> str:
    """The vector, or NaN in all places where there is none."""
    assert length is not None
    return vector or base64.b64encode(np.full(length, np.nan, "<f4").tobytes()).decode()

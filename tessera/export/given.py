"""What a caller of the library gives: each mistake is a ValueError of one sentence, before anything is computed."""

import operator
from collections.abc import Collection, Iterable, Mapping
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from tessera.editing import words

STORED = (torch.uint8, torch.uint16)  # as images lie in shards


def labels(given: Any) -> np.ndarray:
    """(n,) int64 of a list of at least one whole number."""
    values = given.tolist() if isinstance(given, Tensor | np.ndarray) else given
    values = list(values) if isinstance(values, Iterable) and not isinstance(values, str | bytes) else [values]
    if not values or not isinstance(given, Iterable) or any(_index(value) is None for value in values):
        if values and all(isinstance(value, str) for value in values):
            raise ValueError(f"labels are text, {values[0]!r:.40}: expected whole numbers; words are given as captions")
        raise ValueError(f"labels are {given!r:.80}: expected a list of at least one whole number, such as [3, 7]")
    if not all(-(2**63) <= value < 2**63 for value in values):
        raise ValueError(f"labels are {given!r:.80}: expected labels of the system, see its `labels`")
    return np.array([_index(value) for value in values], dtype=np.int64)


def said(given: Mapping[str, Any], negative: Any) -> list[Any] | None:
    """What is said of images, by its name (NAME of a condition): a list of at least one of one of them; negative: none, or one
    such. None where nothing is said."""
    names = [name for name, found in given.items() if found is not None]
    if not names:
        if negative is not None:
            raise ValueError(f"negative is given without {', '.join(given)}: expected what to draw, too")
        return None
    if len(names) > 1:
        raise ValueError(f"{names[0]} and {names[1]} are given: expected those that the prior was told")
    name, found = names[0], given[names[0]]
    if negative is not None and not words.is_named(name, negative):
        raise ValueError(f"negative is {_kind(negative)}: expected one of what {name} are")
    if name == "embeddings":
        return _vectors(found)
    if name == "pictures":
        return _pictures(found)
    if isinstance(found, str | Mapping) or not isinstance(found, Collection) or not len(found):
        raise ValueError(
            f"{name} are {found!r:.80}: expected a list of at least one, no single {name.removesuffix('s')}"
        )
    if name == "captions" and any(one is None for one in found):
        raise ValueError("a caption is None: expected words, or labels alone")
    if name == "attributes" and not all(isinstance(one, Mapping) for one in found):
        raise ValueError(
            f"attributes are {found!r:.80}: expected of each image a mapping, such as {{'thickness': 3.0}}"
        )
    return list(found)


def _vectors(given: Any) -> list[Any]:
    """(B, E) numbers, or a list of B vectors, of which some may be None."""
    is_array = isinstance(given, Tensor | np.ndarray)
    rows = list(given) if isinstance(given, list | tuple) or (is_array and given.ndim == 2) else []
    if not rows or not all(one is None or _is_vector(one) for one in rows):
        found = f"{given.dtype} of the shape {tuple(given.shape)}" if is_array else _kind(given)
        wrong = next((f" with {_kind(one)}" for one in rows if one is not None and not _is_vector(one)), "")
        raise ValueError(
            f"embeddings are {found}{wrong}: expected (B, E) numbers, a vector for each image, or None for none"
        )
    return rows


def _pictures(given: Any) -> list[Any]:
    """(B, C, H, W) uint8."""
    if not isinstance(given, Tensor) or given.dtype not in STORED or given.ndim != 4 or not len(given):
        found = f"{given.dtype} of the shape {tuple(given.shape)}" if isinstance(given, Tensor) else _kind(given)
        raise ValueError(
            f"pictures are {found}: expected torch.uint8 of (B, C, H, W) (or torch.uint16 of images with 16 bits); preprocess "
            f"makes them of pictures"
        )
    return list(given)


def _is_vector(given: Any) -> bool:
    return isinstance(given, list | tuple) or (isinstance(given, Tensor | np.ndarray) and given.ndim == 1)


def seed(given: Any) -> int:
    found = _index(given)
    if found is None:
        raise ValueError(f"seed is {given!r:.40}: expected a whole number")
    return found


def images(given: Any, shape: tuple[int, int, int], what: str = "images", dtype: torch.dtype = torch.uint8) -> Tensor:
    """(B, C, H, W) of this (C, H, W) and dtype."""
    if not isinstance(given, Tensor):
        raise ValueError(f"{what} are {_kind(given)}: expected a {dtype} tensor; preprocess makes it of pictures")
    if given.dtype != dtype or tuple(given.shape[1:]) != shape or not len(given):
        made = "; preprocess makes them of pictures" if dtype == torch.uint8 else ", as sample gives them"
        raise ValueError(
            f"{what} are {given.dtype} of the shape {tuple(given.shape)}: expected {dtype} of (B, "
            f"{', '.join(map(str, shape))}){made}"
        )
    return given


def tokens(given: Any, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """(B, ...) of this shape and type."""
    if not isinstance(given, Tensor) or given.dtype != dtype or tuple(given.shape[1:]) != shape or not len(given):
        found = f"{given.dtype} of the shape {tuple(given.shape)}" if isinstance(given, Tensor) else _kind(given)
        raise ValueError(
            f"tokens are {found}: expected {dtype} of (B, {', '.join(map(str, shape))}), as encode gives them"
        )
    return given


def mask(given: Any, size: tuple[int, int], number: int) -> Tensor:
    """(B, H, W) booleans of (H, W) ones, or of as many as there are images."""
    is_tensor = isinstance(given, Tensor)
    shapes = (size, (1, *size), (number, *size))
    if not is_tensor or given.dtype != torch.bool or tuple(given.shape) not in shapes:
        found = "none" if given is None else _kind(given)
        found = f"{given.dtype} of the shape {tuple(given.shape)}" if is_tensor else found
        raise ValueError(
            f"inpaint needs a mask: expected torch.bool of ({size[0]}, {size[1]}) or ({number}, {size[0]}, {size[1]}), got "
            f"{found}"
        )
    return given.expand(number, *size)


def pictures(given: Any) -> list[Image.Image]:
    """A list of at least one picture of Pillow's."""
    found = [given] if isinstance(given, str) or not isinstance(given, Iterable) else list(given)
    if isinstance(given, Image.Image) or not found or not all(isinstance(one, Image.Image) for one in found):
        wrong = next((one for one in found if not isinstance(one, Image.Image)), given)
        raise ValueError(
            f"pictures are {_kind(wrong)}: expected a list of at least one PIL.Image.Image, as Image.open gives it"
        )
    return found


def device(given: Any) -> torch.device:
    """One that this machine has."""
    try:
        found = torch.device(given)
        torch.empty(1, device=found)
    except (RuntimeError, TypeError, AssertionError) as error:
        first = str(error).strip().partition("\n")[0]
        raise ValueError(
            f"device {given!r:.40} cannot be used ({first}): expected cpu, or a GPU of this machine"
        ) from None
    if found.type == "meta":
        raise ValueError("device meta holds no values: expected cpu, or a GPU of this machine")
    return found


def _index(value: Any) -> int | None:
    """A whole number, of Python or of numpy; None for all else, booleans too."""
    if isinstance(value, bool | np.bool_ | Tensor):
        return None
    try:
        return operator.index(value)
    except TypeError:
        return None


def _kind(value: Any) -> str:
    return "an empty list" if isinstance(value, list | tuple) and not value else f"a {type(value).__name__}"

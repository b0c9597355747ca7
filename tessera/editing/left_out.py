"""What may not be left out when something is drawn: what every image was told, where a training left nothing out.

A prior with label dropout learned what it is to be told nothing. One without it, such as a GAN, did not, and would draw noise;
but where some images had no caption, no vector, or not each attribute, it learned that of these. Which it is, its weights say:
what stands in the place of something missing begins as zeros, and stays so unless something was missing once.
"""

from typing import Any

import torch
from torch import Tensor

from tessera.components import load, sets
from tessera.system import CannotDraw, System


def require_told(system: System, rows: Tensor | None = None) -> None:
    """rows: (B, 1 + ...) what is to be told of images beside their labels; None: labels alone.

    Raises CannotDraw for what is left out of an image, and was told of every image in training; of a condition whose network
    does not say so (neither `nothing` nor `missing`), where nothing at all is told beside a label.
    """
    config = system.prior.config
    if not sets(config, "condition") or getattr(config.condition, "replaces_label", False):
        return
    if getattr(config, "label_dropout", 0.0):
        return
    part = load("conditions", config.condition.kind)
    is_known = _known_as_missing(system, part.Network)
    left_out = torch.ones_like(is_known).unsqueeze(0) if rows is None else _left_out(part, rows, len(is_known))
    wrong = (left_out & ~is_known).any(dim=0).tolist()
    if not any(wrong):
        return
    columns = getattr(config.condition, "columns", [])
    if len(columns) == len(wrong) > 1:
        told = " and ".join(column for column, is_wrong in zip(columns, wrong, strict=True) if is_wrong)
        raise CannotDraw(
            f"{system.name} was told {told} of every image in training: expected that of each image, too, in its {part.NAME}"
        )
    raise CannotDraw(
        f"{system.name} was told the {part.NAME} of every image in training: expected {part.NAME} beside labels, one of each "
        f"image"
    )


def _known_as_missing(system: System, network: type[torch.nn.Module]) -> Tensor:
    """(A,) booleans of parts, each of which may be missing, or (1,) of what is told as a whole: whether it ever was."""
    found = next((part for part in system.prior.modules() if isinstance(part, network)), None)
    if isinstance(missing := getattr(found, "missing", None), Tensor):
        return (missing.detach() != 0).any(dim=1).cpu()
    if isinstance(nothing := getattr(found, "nothing", None), Tensor):
        return (nothing.detach() != 0).any().reshape(1).cpu()
    return torch.zeros(1, dtype=torch.bool)


def _left_out(part: Any, rows: Tensor, number: int) -> Tensor:
    """(B, 1 + ...) -> (B, number) which of so many parts beside the labels are told as the null condition tells them."""
    null = part.null(rows)
    is_null = ((rows == null) | (rows.isnan() & null.isnan()))[:, 1:].cpu()
    return is_null if number == is_null.shape[1] else is_null.all(dim=1, keepdim=True)

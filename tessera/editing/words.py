"""Captions for a system whose prior was trained on them (tessera/conditions/caption.py)."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tessera.artifacts.images import to_uint8
from tessera.components import load, sets
from tessera.system import CannotDraw, System


class NoCaption(ValueError):
    """What was given is no caption that this system can read; the sentence says why."""


def told(system: System, captions: Sequence[str]) -> Tensor:
    """Captions as the system's prior takes them in the place of labels, on its device.

    Raises CannotDraw for a prior that knows no captions, NoCaption for what is none or is too long.
    """
    config = system.prior.config
    condition = config.condition if sets(config, "condition") else None
    if condition is None or condition.kind != "caption":
        raise CannotDraw(
            f"{system.name} was trained on labels, not on captions: expected labels, or a system whose prior has "
            f"condition: {{kind: caption}}"
        )
    try:
        return load("conditions", "caption").encoded(captions, condition.max_bytes).to(system.device)
    except ValueError as error:
        raise NoCaption(str(error)) from None


@torch.no_grad()
def draw(system: System, captions: Sequence[str], sampling: Any, generator: torch.Generator) -> np.ndarray:
    """(B,) captions -> (B, C, H, W) uint8, as `System.draw` draws those of labels. Raises as `told` does."""
    given = told(system, captions)
    system = system.computing_in(sampling.precision)
    return to_uint8(system.decode(system.prior.sample(given, sampling, generator))).cpu().numpy()

"""What an edit did to test images, to be measured.

An edit is a file of tessera/edits: its Config; `edit(images, labels, system, config, sampling, generator, ...)`, which takes
and gives (B, C, H, W) float32 images in [-1, 1]; and `trial(...)`, which damages test images, edits them, and does what
anybody could do without a prior, to compare with.
"""

from typing import NamedTuple

import torch
from torch import Tensor


class Trial(NamedTuple):
    """All images are (B, C, H, W) in [-1, 1]."""

    given: Tensor  # what the edit was given to see
    edited: Tensor
    baselines: dict[str, Tensor]  # by name: the same without a prior
    labels: Tensor | None  # (B,) what the results should show; None: nobody can say
    mask: Tensor | None = None  # (B, H, W) the pixels that the edit may change; None: all

    @staticmethod
    def joined(parts: "list[Trial]") -> "Trial":
        """One trial of all images, on the CPU."""

        def cat(values: list[Tensor | None]) -> Tensor | None:
            return None if values[0] is None else torch.cat(values).cpu()

        baselines = {key: cat([part.baselines[key] for part in parts]) for key in parts[0].baselines}
        return Trial(
            cat([part.given for part in parts]),
            cat([part.edited for part in parts]),
            baselines,
            cat([part.labels for part in parts]),
            cat([part.mask for part in parts]),
        )

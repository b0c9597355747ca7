"""Finite scalar quantization: each of D squashed channels is rounded to one of `levels[d]` values.

No codebook is learned, so there is no codebook term, no commitment, and nothing that can collapse.

Source: Mentzer et al., "Finite Scalar Quantization: VQ-VAE Made Simple", 2023, arXiv:2309.15505, section 3.1 and
appendix A.1.
Differs from it: the shift that makes room for an even number of levels is atanh(1 / (2 * half width)), where the authors'
code has tan of it: z = 0 then lies exactly at the code 0. Two levels to a channel are refused, for want of such a shift.
"""

from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from tessera.components import Params
from tessera.contracts import Quantized
from tessera.nn.nearest import nearest_others
from tessera.nn.straight_through import straight_through

MARGIN = (
    1e-3  # the squashed interval ends this share before the outermost level, so that rounding never leaves the grid
)


class Config(Params):
    kind: Literal["fsq"] = "fsq"
    levels: Annotated[tuple[Annotated[int, Field(ge=3)], ...], Field(min_length=1)] = (8, 5, 5, 5)  # values per channel

    @property
    def code_dim(self) -> int:
        return len(self.levels)

    @property
    def codebook_size(self) -> int:
        return int(torch.tensor(self.levels).prod())

    @property
    def residual_scale(self) -> float:
        """What rounding leaves over, as a share of the code's range: the next level of a residual quantizer spans it."""
        return 0.5 / (min(self.levels) // 2)


class Quantizer(nn.Module):
    indices_per_code = 1

    def __init__(self, config: Config):
        super().__init__()
        self.codebook_size = config.codebook_size
        levels = torch.tensor(config.levels)
        place_values = torch.cat([torch.ones(1, dtype=torch.long), levels.cumprod(0)[:-1]])
        self.register_buffer("levels", levels.view(-1, 1, 1), persistent=False)  # (D, 1, 1)
        self.register_buffer("place_values", place_values.view(-1, 1, 1), persistent=False)  # (D, 1, 1)

    def forward(self, z: Tensor) -> Quantized:
        """Mentzer et al., section 3.1. z: (B, D, h, w), any real numbers. Rounding is float32 also under autocast."""
        with torch.autocast(z.device.type, enabled=False):
            bounded = self.bound(z.float())
            digits = (bounded.detach() * (self.levels // 2)).round()
            indices = ((digits.long() + self.levels // 2) * self.place_values).sum(dim=1)  # (B, h, w)
            return Quantized(straight_through(bounded, digits / (self.levels // 2)), indices, bounded.new_zeros(()))

    def bound(self, z: Tensor) -> Tensor:
        """Mentzer et al., appendix A.1: squash channel d into [-1, 1], around levels[d] multiples of 1 / (levels[d] // 2)."""
        half_width = (self.levels - 1) * (1 - MARGIN) / 2
        offset = 0.5 * (self.levels % 2 == 0)  # an even number of levels sits around -1/2: 8 are -4 ... 3
        return (torch.tanh(z + torch.atanh(offset / half_width)) * half_width - offset) / (self.levels // 2)

    def indices_to_codes(self, indices: Tensor) -> Tensor:
        """(B, h, w) int64 -> (B, D, h, w) float."""
        digits = indices.unsqueeze(1) // self.place_values % self.levels - self.levels // 2
        return digits / (self.levels // 2)

    def neighbors(self, indices: Tensor, count: int) -> Tensor:
        """(N,) -> (N, count) the other codes nearest to each, nearest first."""
        every = torch.arange(self.codebook_size, device=indices.device)
        codebook = self.indices_to_codes(every.view(1, -1, 1))[0, :, :, 0].T  # (K, D)
        return nearest_others(codebook, indices, count)

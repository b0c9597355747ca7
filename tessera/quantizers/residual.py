"""Residual quantization: a code is a sum, each level quantizing what the levels before it left over.

Any quantizer with a codebook serves as the levels. The indices of one place stand side by side, those of level i counted
from i * K, so that every index means one code.

Source: Lee et al. (RQ-VAE), "Autoregressive Image Generation using Residual Quantization", 2022, arXiv:2203.01941,
section 3.1; a codebook per level: Zeghidour et al. (SoundStream), 2021, arXiv:2107.03312, section III-C.
Differs from it: the levels need not be vector quantizers; a quantizer whose codes cannot learn to shrink is scaled down
by its `residual_scale` from level to level; the decoder's gradient passes through the first level alone, because the sum
over levels would count it once per level.
"""

from typing import Annotated, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from tessera.components import Params, QuantizerConfig, load
from tessera.contracts import LeavesScaledResidual, Quantized


class Config(Params):
    kind: Literal["residual"] = "residual"
    quantizer: QuantizerConfig  # of each level
    num_levels: Annotated[int, Field(ge=1)] = 4

    @model_validator(mode="after")
    def _levels_have_a_codebook(self) -> "Config":
        if self.quantizer.codebook_size is None or self.quantizer.kind == self.kind:
            raise ValueError(
                f"quantizer residual cannot have levels of kind {self.quantizer.kind}; choose one with a codebook of its "
                f"own, such as vector"
            )
        return self

    @property
    def code_dim(self) -> int:
        return self.quantizer.code_dim

    @property
    def codebook_size(self) -> int:
        return self.num_levels * self.quantizer.codebook_size


class Quantizer(nn.Module):
    def __init__(self, config: Config):
        super().__init__()
        self.codebook_size = config.codebook_size
        self.indices_per_code = config.num_levels
        self.codes_per_level = config.quantizer.codebook_size
        part = load("quantizers", config.quantizer.kind)
        self.levels = nn.ModuleList(part.Quantizer(config.quantizer) for _ in range(config.num_levels))
        inner = config.quantizer
        shrinking = inner.residual_scale if isinstance(inner, LeavesScaledResidual) else 1.0
        self.scales = [shrinking**level for level in range(config.num_levels)]

    def forward(self, z: Tensor) -> Quantized:
        """Lee et al., section 3.1. z: (B, D, h, w). The loss is the sum over levels."""
        with torch.autocast(z.device.type, enabled=False):
            left = z.float()
            total, indices, loss = 0.0, [], left.new_zeros(())
            for level, (quantizer, scale) in enumerate(zip(self.levels, self.scales, strict=True)):
                quantized = quantizer(left / scale)
                codes = scale * quantized.codes
                total = total + (codes.detach() if level else codes)
                left = left - codes.detach()
                indices.append(quantized.indices + level * self.codes_per_level)
                loss = loss + quantized.loss
            return Quantized(total, torch.stack(indices, dim=-1).flatten(2), loss)  # (B, h, w * levels)

    def indices_to_codes(self, indices: Tensor) -> Tensor:
        """(B, h, w * levels) int64 -> (B, D, h, w) float.

        An index names its level, so that an unlikely draw of a prior, of another level than its place has, is a code too.
        """
        flat = indices.flatten()
        codes = None
        for level, (quantizer, scale) in enumerate(zip(self.levels, self.scales, strict=True)):
            rows = (flat // self.codes_per_level == level).nonzero().squeeze(1)
            found = quantizer.indices_to_codes(
                (flat[rows] - level * self.codes_per_level).view(1, 1, -1)
            )  # (1, D, 1, n)
            found = scale * found[0, :, 0].T
            if codes is None:
                codes = found.new_empty(flat.shape[0], found.shape[1])
            codes[rows] = found
        batch, height, _ = indices.shape
        return codes.view(batch, height, -1, self.indices_per_code, codes.shape[1]).sum(dim=3).permute(0, 3, 1, 2)

    def neighbors(self, indices: Tensor, count: int) -> Tensor:
        """(N,) -> (N, count) the other codes of the same level nearest to each, nearest first."""
        found = indices.new_empty(len(indices), count)
        for level, quantizer in enumerate(self.levels):
            first = level * self.codes_per_level
            rows = ((indices >= first) & (indices < first + self.codes_per_level)).nonzero().squeeze(1)
            found[rows] = first + quantizer.neighbors(indices[rows] - first, count)
        return found

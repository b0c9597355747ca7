"""SimVQ: vector quantization whose codes are a frozen random codebook times one learned matrix.

A step of the matrix moves every code, used or not, so none is left behind.

Source: Zhu et al., "Addressing Representation Collapse in Vector Quantized Models with One Linear Layer", 2024,
arXiv:2411.02038; the two terms and beta are those of van den Oord et al., arXiv:1711.00937.
Differs from it: frozen channels have a standard deviation of `frozen_scale`, where the authors' have D ** -0.5, and the
matrix starts as a rotation that brings them to `code_scale`, so that a step of the optimizer moves codes far enough for
short trainings (docs/log.md).
"""

from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from tessera.components import Params, Weight
from tessera.contracts import Quantized
from tessera.nn.nearest import nearest, nearest_others
from tessera.nn.straight_through import rotated, straight_through


class Config(Params):
    kind: Literal["simvq"] = "simvq"
    codebook_size: Annotated[int, Field(ge=2)] = 1024
    code_dim: Annotated[int, Field(ge=1)] = 8
    commitment_weight: Weight = 0.25  # beta, on the encoder's term
    codebook_weight: Weight = 1.0  # of the codes' term
    code_scale: Annotated[float, Field(ge=1e-4, le=1e4)] = 0.3  # standard deviation of a code's channel at the start
    frozen_scale: Annotated[float, Field(ge=1e-4, le=1e4)] = (
        3.0  # of the frozen codebook: how far a step moves the codes
    )
    rotation_trick: bool = False


class Quantizer(nn.Module):
    indices_per_code = 1

    def __init__(self, config: Config):
        super().__init__()
        self.config = config
        self.codebook_size = config.codebook_size
        self.register_buffer("frozen", config.frozen_scale * torch.randn(config.codebook_size, config.code_dim))
        self.linear = nn.Linear(config.code_dim, config.code_dim)
        nn.init.orthogonal_(self.linear.weight, gain=config.code_scale / config.frozen_scale)
        nn.init.zeros_(self.linear.bias)

    def forward(self, z: Tensor) -> Quantized:
        """z: (B, D, h, w). Codes and distances are float32 also under autocast."""
        with torch.autocast(z.device.type, enabled=False):
            return self._quantize(z.float())

    def _quantize(self, z: Tensor) -> Quantized:
        """Zhu et al.: van den Oord et al., equations 1 to 3, with codes `linear(frozen)`."""
        batch, width, height, columns = z.shape
        flat = z.permute(0, 2, 3, 1).reshape(-1, width)  # (B * h * w, D)
        indices = nearest(flat.detach(), self._codes().detach())
        codes = self.linear(self.frozen[indices])  # only the chosen codes carry a gradient
        loss = self.config.commitment_weight * F.mse_loss(flat, codes.detach())
        loss = loss + self.config.codebook_weight * F.mse_loss(codes, flat.detach())
        codes = rotated(flat, codes) if self.config.rotation_trick else straight_through(flat, codes)
        codes = codes.view(batch, height, columns, width).permute(0, 3, 1, 2)
        return Quantized(codes, indices.view(batch, height, columns), loss)

    def indices_to_codes(self, indices: Tensor) -> Tensor:
        """(B, h, w) int64 -> (B, D, h, w) float."""
        with torch.autocast(indices.device.type, enabled=False):
            return self.linear(self.frozen[indices]).permute(0, 3, 1, 2)

    def neighbors(self, indices: Tensor, count: int) -> Tensor:
        """(N,) -> (N, count) the other codes nearest to each, nearest first."""
        return nearest_others(self._codes().detach(), indices, count)

    def _codes(self) -> Tensor:
        with torch.autocast(self.frozen.device.type, enabled=False):
            return self.linear(self.frozen)

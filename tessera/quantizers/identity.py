"""No quantization: latents stay continuous, for priors that model latents, and as the upper bound of every codebook.

Source: the continuous autoencoder of Rombach et al., "High-Resolution Image Synthesis with Latent Diffusion Models",
2022, arXiv:2112.10752, section 3.1, without its regularization.
"""

from typing import Annotated, Literal

from pydantic import Field
from torch import Tensor, nn

from tessera.components import Params
from tessera.contracts import Quantized


class Config(Params):
    kind: Literal["identity"] = "identity"
    code_dim: Annotated[int, Field(ge=1)] = 8

    @property
    def codebook_size(self) -> None:
        return None


class Quantizer(nn.Module):
    indices_per_code = 1
    codebook_size = None

    def __init__(self, config: Config):
        super().__init__()

    def forward(self, z: Tensor) -> Quantized:
        """z: (B, D, h, w), returned as it is."""
        return Quantized(z, None, z.new_zeros(()))

    def indices_to_codes(self, indices: Tensor) -> Tensor:
        raise ValueError("quantizer identity has no codebook, so there are no indices; use quantizer vector")

    def neighbors(self, indices: Tensor, count: int) -> Tensor:
        raise ValueError("quantizer identity has no codebook, so codes have no neighbors; use quantizer vector")

"""No tokenizer: the latents are the pixels, so that a prior of latents works in pixel space with the same code.

Source: the identity encoder of Karras et al., "Analyzing and Improving the Training Dynamics of Diffusion Models", 2024,
arXiv:2312.02696, whose pixel and latent models share one loop. There is nothing to train.
"""

from typing import Literal

from pydantic import model_validator
from torch import Tensor, nn

from tessera.components import Params, QuantizerConfig, sets
from tessera.contracts import Encoded, ImageSpec


class Config(Params):
    kind: Literal["none"] = "none"
    quantizer: QuantizerConfig  # identity, nothing else; every entry of `tokenizers` has this key

    @model_validator(mode="after")
    def _quantizer_is_identity(self) -> "Config":
        if self.quantizer.kind != "identity":
            raise ValueError(
                f"tokenizer none takes quantizer identity, not {self.quantizer.kind}: pixels are not quantized"
            )
        return self

    @property
    def downsample_factor(self) -> int:
        return 1

    @property
    def codebook_size(self) -> None:
        return None


class Model(nn.Module):
    codebook_size = None

    def __init__(self, config: Config, spec: ImageSpec):
        super().__init__()
        if sets(spec, "bits"):
            self.bits = spec.bits
        self.latent_shape = (spec.channels, spec.height, spec.width)
        self.index_grid = (spec.height, spec.width)

    def encode(self, images: Tensor) -> Encoded:
        return Encoded(images, None)

    def decode(self, latents: Tensor) -> Tensor:
        return latents

    def decode_indices(self, indices: Tensor) -> Tensor:
        raise ValueError("tokenizer none has no codebook, so there are no indices to decode; use vqvae or vqgan")

"""What every tokenizer with an encoder shares: its settings, encode and decode, and the reconstruction terms.

A tokenizer file adds its own losses and networks to this; see tokenizers/vqvae.py for the smallest.
"""

import hashlib
from pathlib import Path
from typing import Annotated, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from tessera.artifacts.checkpoints import read_weights
from tessera.components import Params, QuantizerConfig, load
from tessera.contracts import Encoded, ImageSpec, Quantized
from tessera.nn.autoencoder import Decoder, Encoder
from tessera.nn.image_losses import Lpips, laplacian_loss, pixel_loss
from tessera.optimization import Training

Weight = Annotated[float, Field(ge=0)]


class AutoencoderConfig(Params):
    quantizer: QuantizerConfig
    patch_size: Annotated[int, Field(ge=1)] = 4  # side of the pixels that the first convolution takes at once
    channels: Annotated[int, Field(ge=1)] = 64
    channel_multipliers: Annotated[tuple[Annotated[int, Field(ge=1)], ...], Field(min_length=1)] = (1,)  # one per level
    num_blocks: Annotated[int, Field(ge=1)] = 2  # residual blocks per level
    pixel_loss: Literal["l1", "l2"] = "l2"
    pixel_weight: Weight = 4.0
    perceptual: Literal["none", "laplacian", "lpips"] = "none"
    perceptual_weight: Weight = 1.0
    lpips_weights: str = ""  # path of a safetensors file; nothing is downloaded
    lpips_sha256: str = ""
    training: Training

    @property
    def downsample_factor(self) -> int:
        return self.patch_size * 2 ** (len(self.channel_multipliers) - 1)

    @property
    def codebook_size(self) -> int | None:
        return self.quantizer.codebook_size

    @model_validator(mode="after")
    def _lpips_has_its_file(self) -> "AutoencoderConfig":
        if self.perceptual == "lpips" and not (self.lpips_weights and self.lpips_sha256):
            raise ValueError(
                "perceptual: lpips needs lpips_weights, the path of a safetensors file, and its lpips_sha256; "
                "perceptual: laplacian needs no weights"
            )
        return self


class Autoencoder(nn.Module):
    """Encoder, quantizer, decoder: a Tokenizer (contracts.py)."""

    def __init__(self, config: AutoencoderConfig, spec: ImageSpec):
        super().__init__()
        widths = tuple(config.channels * multiplier for multiplier in config.channel_multipliers)
        shape = (spec.channels, config.quantizer.code_dim, widths, config.num_blocks, config.patch_size)
        self.encoder, self.decoder = Encoder(*shape), Decoder(*shape)
        self.quantizer = load("quantizers", config.quantizer.kind).Quantizer(config.quantizer)
        self.codebook_size = config.codebook_size
        factor = config.downsample_factor
        if spec.height % factor or spec.width % factor:
            raise ValueError(
                f"images of {spec.height}x{spec.width} are not divisible by the tokenizer's downsampling of {factor}; "
                f"change patch_size or channel_multipliers"
            )
        grid = (spec.height // factor, spec.width // factor)
        self.latent_shape = (config.quantizer.code_dim, *grid)
        self.index_grid = (grid[0], grid[1] * self.quantizer.indices_per_code)

    def encode(self, images: Tensor) -> Encoded:
        latents = self.encoder(images)
        return Encoded(latents.float(), self.quantizer(latents).indices)

    def decode(self, latents: Tensor) -> Tensor:
        """Latents of the encoder's kind: they are quantized on the way, where there is a codebook."""
        return self.decoder(self.quantizer(latents).codes).float()

    def decode_indices(self, indices: Tensor) -> Tensor:
        return self.decoder(self.quantizer.indices_to_codes(indices)).float()

    def forward(self, images: Tensor) -> tuple[Tensor, Quantized]:
        """Reconstructions, and the quantizer's answer with its loss."""
        quantized = self.quantizer(self.encoder(images))
        return self.decoder(quantized.codes).float(), quantized


class ReconstructionLoss(nn.Module):
    """The weighted pixel and perceptual terms of a config."""

    def __init__(self, config: AutoencoderConfig):
        super().__init__()
        self.config = config
        self.lpips = [_local_lpips(config)] if config.perceptual == "lpips" else []  # a list: its weights stay out of
        # this module's state, so that no checkpoint carries a copy of VGG

    def forward(self, reconstructions: Tensor, images: Tensor) -> dict[str, Tensor]:
        """The terms to plot and their weighted sum "loss"."""
        config = self.config
        terms = {"reconstruction_loss": pixel_loss(reconstructions, images, config.pixel_loss)}
        loss = config.pixel_weight * terms["reconstruction_loss"]
        if config.perceptual != "none":
            if config.perceptual == "lpips":
                distance = self.lpips[0].to(images.device)(reconstructions, images)
            else:
                distance = laplacian_loss(reconstructions, images)
            terms["perceptual_loss"] = distance
            loss = loss + config.perceptual_weight * distance
        return {"loss": loss, **terms}


def _local_lpips(config: AutoencoderConfig) -> Lpips:
    path = Path(config.lpips_weights)
    if not path.is_file():
        raise ValueError(f"lpips_weights {path} does not exist; give the path of LPIPS' VGG weights as safetensors")
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    if digest != config.lpips_sha256:
        raise ValueError(f"lpips_weights {path} has sha256 {digest}, expected lpips_sha256 {config.lpips_sha256}")
    return Lpips(read_weights(path)).eval()


def codebook_terms(quantized: Quantized, codebook_size: int | None) -> dict[str, Tensor]:
    """What to plot of a batch's indices: the perplexity of their histogram."""
    if quantized.indices is None or codebook_size is None:
        return {}
    counts = torch.bincount(quantized.indices.flatten(), minlength=codebook_size).float()
    shares = counts / counts.sum()
    return {"codebook_perplexity": torch.exp(-(shares * shares.clamp_min(1e-12).log()).sum())}

"""What every tokenizer with an encoder shares: its settings, encode and decode, and the reconstruction terms.

A tokenizer file adds its own losses and networks to this; see tokenizers/vqvae.py for the smallest.

Latent perturbation, Source: Qiu et al. (RobustTok), "Robust Latent Matters: Boosting Image Generation with Sampling Error
Synthesis", 2025, arXiv:2503.08354, section 3: the decoder becomes robust to the sampling errors of a prior.
Differs from it: indices of all images are replaced alike, where the authors choose some images of a batch first.
"""

from pathlib import Path
from typing import Annotated, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from tessera.artifacts import weights_file
from tessera.bases.diagnostics import Diagnostics
from tessera.bases.initialization import Initialization
from tessera.bases.latents import LatentRegularization, Regularizer
from tessera.bases.optimization import Training
from tessera.components import AddedKey, Fraction, Params, PerceptualConfig, QuantizerConfig, Weight, load, sets
from tessera.contracts import Encoded, HasLevels, ImageSpec, Quantized
from tessera.nn.autoencoder import Decoder, Encoder
from tessera.nn.draw import count
from tessera.nn.image_losses import Lpips, laplacian_loss, pixel_loss


class AutoencoderConfig(Params):
    quantizer: QuantizerConfig
    patch_size: Annotated[int, Field(ge=1)] = 4  # side of the pixels that the first convolution takes at once
    channels: Annotated[int, Field(ge=1)] = 64
    channel_multipliers: Annotated[tuple[Annotated[int, Field(ge=1)], ...], Field(min_length=1)] = (1,)  # one per level
    num_blocks: Annotated[int, Field(ge=1)] = 2  # residual blocks per level
    pixel_loss: Literal["l1", "l2"] = "l2"
    pixel_weight: Weight = 4.0
    perceptual: PerceptualConfig = "none"
    perceptual_weight: Weight = 1.0
    lpips_weights: str = ""  # path of a safetensors file; nothing is downloaded
    lpips_sha256: str = ""
    perturbation_share: Fraction = 0.0  # of the indices, replaced by near ones for the decoder at the first step
    perturbation_until: Annotated[float, Field(gt=0, le=1)] = 1.0  # share of the training after which none is left
    perturbation_neighbors: Annotated[int, Field(ge=1)] = 8  # nearest other codes to choose from
    health: Diagnostics = Diagnostics()
    init: AddedKey[Initialization] = None  # begin from these weights
    latents: AddedKey[LatentRegularization] = None  # that a prior models more easily
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

    @model_validator(mode="after")
    def _perturbation_has_neighbors(self) -> "AutoencoderConfig":
        if not self.perturbation_share:
            return self
        if self.codebook_size is None:
            raise ValueError(
                f"perturbation_share replaces codes by near ones, but quantizer {self.quantizer.kind} has no codebook; "
                f"choose a quantizer with one (vector), or latents: {{noise: 1.0}} in the place of perturbation_share"
            )
        levels = self.quantizer.num_levels if isinstance(self.quantizer, HasLevels) else 1  # neighbors are of one level
        codes = self.codebook_size // levels
        if self.perturbation_neighbors >= codes:
            raise ValueError(
                f"perturbation_neighbors {self.perturbation_neighbors} must be below the number of codes, {codes}"
            )
        return self

    def perturbed_share(self, step: int) -> float:
        """The share of indices to replace at a step: from perturbation_share down to 0, linearly."""
        until = self.perturbation_until * self.training.num_steps
        return self.perturbation_share * max(0.0, 1 - step / until)


class Autoencoder(nn.Module):
    """Encoder, quantizer, decoder: a Tokenizer (contracts.py)."""

    channels_per_latent = 1  # of the encoder's head

    def __init__(self, config: AutoencoderConfig, spec: ImageSpec):
        super().__init__()
        self.config = config
        if sets(spec, "bits"):
            self.bits = spec.bits
        widths = tuple(config.channels * multiplier for multiplier in config.channel_multipliers)
        depth, shape = config.quantizer.code_dim, (widths, config.num_blocks, config.patch_size)
        self.encoder = Encoder(spec.channels, self.channels_per_latent * depth, *shape)
        self.decoder = Decoder(spec.channels, depth, *shape)
        self.quantizer = load("quantizers", config.quantizer.kind).Quantizer(config.quantizer)
        self.codebook_size = config.codebook_size
        factor = config.downsample_factor
        if spec.height % factor or spec.width % factor:
            raise ValueError(
                f"images of {spec.height}x{spec.width} are not divisible by the tokenizer's downsampling of {factor}; "
                f"change patch_size or channel_multipliers"
            )
        grid = (spec.height // factor, spec.width // factor)
        self.latent_shape = (depth, *grid)
        self.index_grid = (grid[0], grid[1] * self.quantizer.indices_per_code)
        if sets(config, "latents"):
            self.regularizer = Regularizer(config, spec)

    def encode(self, images: Tensor) -> Encoded:
        latents = self.encoder(images)
        return Encoded(latents.float(), self.quantizer(latents).indices)

    def decode(self, latents: Tensor) -> Tensor:
        """Latents of the encoder's kind: they are quantized on the way, where there is a codebook."""
        return self.decoder(self.quantizer(latents).codes).float()

    def decode_indices(self, indices: Tensor) -> Tensor:
        return self.decoder(self.quantizer.indices_to_codes(indices)).float()

    def forward(self, images: Tensor, step: int) -> tuple[Tensor, Quantized]:
        """Reconstructions (B, C, H, W) at a step of the training, and the quantizer's output with its loss.

        With `latents` they are of the images as `regularizer.transformed` makes them at this step.
        """
        if sets(self.config, "latents"):
            quantized = self.quantizer(self.regularizer.transformed(self.encoder(images), step))
            share = self.config.perturbed_share(step) if self.training else 0.0
            codes = self._perturbed(quantized, share) if share else quantized.codes
            return self.decoder(self.regularizer.noised(codes, step)).float(), quantized
        quantized = self.quantizer(self.encoder(images))
        share = self.config.perturbed_share(step) if self.training else 0.0
        codes = self._perturbed(quantized, share) if share else quantized.codes
        return self.decoder(codes).float(), quantized

    def _perturbed(self, quantized: Quantized, share: float) -> Tensor:
        """Qiu et al., section 3: the codes, a share of them replaced by near ones; gradients reach the latents all the same."""
        codes, indices = quantized.codes, quantized.indices
        with torch.no_grad():
            is_replaced = torch.rand(indices.shape, device=indices.device) < share
            asked = indices[is_replaced]
            near = self.quantizer.neighbors(asked, self.config.perturbation_neighbors)
            choice = torch.randint(self.config.perturbation_neighbors, (len(asked), 1), device=indices.device)
            replaced = indices.clone()
            replaced[is_replaced] = near.gather(1, choice).squeeze(1)
            # a difference, because a codebook of moving averages may have moved since it gave the codes
            shift = self.quantizer.indices_to_codes(replaced) - self.quantizer.indices_to_codes(indices)
        return codes + shift


class ReconstructionLoss(nn.Module):
    """The weighted pixel and perceptual terms of a Config (nn/image_losses.py)."""

    def __init__(self, config: AutoencoderConfig):
        super().__init__()
        self.config = config
        self.lpips = [_local_lpips(config)] if config.perceptual == "lpips" else []  # a list: its weights stay out of
        # this module's state, so that no checkpoint carries a copy of VGG
        if isinstance(config.perceptual, Params):
            self.distance = load("perceptual", config.perceptual.kind).Distance(config.perceptual)

    def forward(self, reconstructions: Tensor, images: Tensor) -> dict[str, Tensor]:
        """The terms to plot and their weighted sum "loss"."""
        config = self.config
        terms = {"reconstruction_loss": pixel_loss(reconstructions, images, config.pixel_loss)}
        loss = config.pixel_weight * terms["reconstruction_loss"]
        if config.perceptual != "none":
            if isinstance(config.perceptual, Params):
                distance = self.distance(reconstructions, images)
            elif config.perceptual == "lpips":
                distance = self.lpips[0].to(images.device)(reconstructions, images)
            else:
                distance = laplacian_loss(reconstructions, images)
            terms["perceptual_loss"] = distance
            loss = loss + config.perceptual_weight * distance
        return {"loss": loss, **terms}


def _local_lpips(config: AutoencoderConfig) -> Lpips:
    keys, remedy = ("lpips_weights", "lpips_sha256"), "perceptual: laplacian needs no weights"
    weights = weights_file.read(
        Path(config.lpips_weights), config.lpips_sha256, keys, "the VGG weights of LPIPS", remedy
    )
    return Lpips(weights).eval()


def codebook_terms(quantized: Quantized, codebook_size: int | None) -> dict[str, Tensor]:
    """To plot of a batch's indices: exp of the entropy of their histogram, which is its perplexity."""
    if quantized.indices is None or codebook_size is None:
        return {}
    counts = count(quantized.indices.flatten(), codebook_size)
    probs = counts / counts.sum()
    return {"codebook_perplexity": torch.exp(-(probs * probs.clamp_min(1e-12).log()).sum())}

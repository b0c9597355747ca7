"""A published autoencoder of the package diffusers, frozen or tuned: AutoencoderKL, VQModel, AutoencoderTiny, AutoencoderDC.

`train_tokenizer` reads the weights from a local folder, once; its artifact holds them, and no later stage sees the folder.
With training.num_steps 0, the default, they stay as they were published. Nothing is downloaded.

Latents are those of the encoder, of AutoencoderKL the means of their posteriors, so that a run is deterministic. The published
scaling_factor and shift_factor are not applied: they are one affine map for all channels, and priors learn latents that are
standardized per channel on the images at hand (artifacts/tokens.py), which undoes any such map. Indices are those of VQModel's
codebook.

Source: Rombach et al., "High-Resolution Image Synthesis with Latent Diffusion Models", 2022, arXiv:2112.10752, section 3.1 and
appendix G (AutoencoderKL, VQModel); Chen et al., "Deep Compression Autoencoder for Efficient High-Resolution Diffusion Models",
2024, arXiv:2410.10733 (AutoencoderDC); Bohan, "TAESD", https://github.com/madebyollin/taesd, 2023 (AutoencoderTiny). The
networks are those of diffusers (Apache-2.0). Tuned by the objective of bases/adversarial.py, AutoencoderKL with the divergence
of Kingma and Welling, 2013, arXiv:1312.6114, appendix B, as in vae.py.
Differs from them: no scaling; VQModel's codes are found and moved by quantizers/vector.py.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import BeforeValidator, Field, SerializeAsAny, model_validator
from torch import Tensor, nn

from tessera.artifacts import weights_file
from tessera.bases.adversarial import AdversarialConfig, AdversarialObjective
from tessera.bases.autoencoder import codebook_terms
from tessera.bases.latents import Regularizer
from tessera.bases.optimization import Rate, Training
from tessera.components import MissingPackage, QuantizerConfig, Weight, load, sets
from tessera.contracts import Encoded, ImageSpec, Planned, Quantized
from tessera.sources import diffusers as published

# What gradient_checkpointing recomputes
BLOCKS = ("ResnetBlock2D", "ResnetBlockCondNorm2D", "AutoencoderTinyBlock", "ResBlock", "EfficientViTBlock")
PARTS = ("encoder", "decoder", "quant_conv", "post_quant_conv")  # of a published network, beside its codebook
AS_PUBLISHED = ("kind", "codebook_size", "code_dim", "init")  # keys of the quantizer that are not free


class Tuning(Training):
    num_steps: Annotated[int, Field(ge=0)] = 0  # 0: the weights stay as they were published
    learning_rate: Rate = 1e-4


class Config(AdversarialConfig):
    kind: Literal["diffusers"] = "diffusers"
    folder: Annotated[str, Field(min_length=1)]  # config.json and diffusion_pytorch_model.safetensors
    sha256: Annotated[str, Field(pattern="^[0-9a-f]{64}$")]  # of the latter
    # What config.json says; of VQModel also its codebook, as quantizer vector has it
    network: Annotated[SerializeAsAny[published.Network], BeforeValidator(published.network_of)]
    quantizer: QuantizerConfig = Field({"kind": "identity"}, validate_default=True)
    perceptual: Literal["none", "laplacian", "lpips"] = "laplacian"
    adversarial_weight: Weight = 0.0
    kl_weight: Weight = 1e-4  # of AutoencoderKL
    training: Tuning = Tuning()

    # No keys here: they shape our own networks, or ask for the last layer of our own decoder
    patch_size: ClassVar[None] = None
    channels: ClassVar[None] = None
    channel_multipliers: ClassVar[None] = None
    num_blocks: ClassVar[None] = None
    perturbation_share: ClassVar[float] = 0.0
    perturbation_until: ClassVar[None] = None
    perturbation_neighbors: ClassVar[None] = None
    adversarial_balance: ClassVar[str] = "fixed"
    adaptive_weight_limit: ClassVar[None] = None

    @property
    def downsample_factor(self) -> int:
        return self.network.downsample_factor

    @property
    def codebook_size(self) -> int | None:
        return self.network.codebook_size

    @model_validator(mode="after")
    def _quantizer_is_that_of_the_network(self) -> "Config":
        network, quantizer = self.network, self.quantizer
        if network.codebook_size is None:
            if quantizer.kind != "identity":
                raise ValueError(
                    f"{network.class_name} takes quantizer identity, not {quantizer.kind}: leave the key out"
                )
            return self
        wanted = published.quantizer_of(network)
        wrong = [key for key in AS_PUBLISHED if getattr(quantizer, key, None) != wanted[key]]
        if wrong:
            told = ", ".join(f"{key}: {wanted[key]}" for key in wanted)
            raise ValueError(
                f"the quantizer of this {network.class_name} has {wrong[0]} {getattr(quantizer, wrong[0], None)}, expected "
                f"{wanted[wrong[0]]}, so that its codes can be the published ones: write quantizer: {{{told}}}"
            )
        return self

    @model_validator(mode="after")
    def _moves_by_adamw(self) -> "Config":
        if self.training.optimizer != "adamw":
            raise ValueError(
                "published networks name no matrices that Muon could move: write training.optimizer: adamw"
            )
        return self


def problems(config: Config, planned: Planned) -> Iterator[str]:
    """What is wrong with the folder, as long as no stage has read it."""
    if planned.is_begin:
        try:
            published.require(Path(config.folder), config.sha256, config.network)
        except ValueError as refusal:
            yield str(refusal)


class Model(nn.Module):
    """Without meaningful weights until the Objective or `load_state_dict` has put them in. Names are the published ones,
    but for `quantize.embedding.weight`, which is `quantizer.codebook`."""

    def __init__(self, config: Config, spec: ImageSpec):
        """Raises ValueError for images that the network does not take, MissingPackage without diffusers."""
        super().__init__()
        if sets(spec, "bits"):
            self.bits = spec.bits
        network = config.network
        network.require_fit(spec)
        autoencoder = _built(network)
        self.config, self.image_channels, self.codebook_size = config, spec.channels, network.codebook_size
        self.encoder, self.decoder = autoencoder.encoder, autoencoder.decoder
        for name in ("quant_conv", "post_quant_conv"):
            layer = getattr(autoencoder, name, None)
            self.add_module(name, nn.Identity() if layer is None else layer)
        self.quantizer = load("quantizers", config.quantizer.kind).Quantizer(config.quantizer)
        self.has_posterior = network.class_name == "AutoencoderKL"
        self.decoder_sees_codes = getattr(network, "norm_type", "group") == "spatial"
        grid = (spec.height // network.downsample_factor, spec.width // network.downsample_factor)
        self.latent_shape, self.index_grid = (network.code_dim, *grid), grid
        if sets(config, "latents"):
            self.regularizer = Regularizer(config, spec)
        _mark(self.encoder)
        _mark(self.decoder)

    def moments(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Of AutoencoderKL: mean and log-variance of each latent, (B, D, h, w) each, float32."""
        mean, log_variance = self.quant_conv(self.encoder(images)).float().chunk(2, dim=1)
        return mean, log_variance.clamp(-30, 20)

    def latents(self, images: Tensor) -> Tensor:
        """(B, D, h, w) float32, before quantization."""
        return self.moments(images)[0] if self.has_posterior else self.quant_conv(self.encoder(images)).float()

    def encode(self, images: Tensor) -> Encoded:
        latents = self.latents(images)
        return Encoded(latents, self.quantizer(latents).indices)

    def decode(self, latents: Tensor) -> Tensor:
        return self.decode_codes(self.quantizer(latents).codes)

    def decode_indices(self, indices: Tensor) -> Tensor:
        return self.decode_codes(self.quantizer.indices_to_codes(indices))

    def decode_codes(self, codes: Tensor) -> Tensor:
        """(B, D, h, w) -> (B, C, H, W) float32."""
        latents = self.post_quant_conv(codes)
        return (self.decoder(latents, codes) if self.decoder_sees_codes else self.decoder(latents)).float()


def _built(network: published.Network) -> nn.Module:
    """The class of diffusers, its weights random. Never from a name on the hub: those would be downloaded."""
    try:
        import diffusers  # here because it takes seconds, which only those who use it should wait
    except ImportError:
        raise MissingPackage(
            "tokenizers of kind diffusers need the package diffusers: pip install 'tessera[pretrained]'"
        ) from None
    try:
        return getattr(diffusers, network.class_name)(**network.arguments())
    except Exception as error:  # its constructors check little, and fail as they may
        raise ValueError(
            f"diffusers {diffusers.__version__} cannot build this {network.class_name} ({type(error).__name__}: "
            f"{str(error)[:200]}): write network as its config.json has it"
        ) from None


def _mark(network: nn.Module) -> None:
    """What training/loop.py compiles, and what it may run again in the backward pass; running averages would move twice."""
    network.compiles = True
    for block in network.modules():
        if type(block).__name__ in BLOCKS and not any(isinstance(each, nn.BatchNorm2d) for each in block.modules()):
            block.recomputes = True


@torch.no_grad()
def fill(model: Model, config: Config) -> None:
    """Put the published weights in. Raises ValueError, in a sentence, for a folder that is not the one that was meant."""
    folder, network = Path(config.folder), config.network
    weights = published.read_weights(folder, config.sha256, network)
    parts = nn.ModuleDict({name: getattr(model, name) for name in PARTS})
    if network.codebook_size is not None:
        parts["quantize"] = nn.ModuleDict({"embedding": nn.Embedding(network.codebook_size, network.code_dim)})
    path, expected = folder / published.WEIGHTS, f"those of the {network.class_name} in {published.CONFIG}"
    weights_file.fill(parts, weights, path, "folder", expected, "Get both files again, from one place")
    if network.codebook_size is not None:
        codes = parts["quantize"]["embedding"].weight
        model.quantizer.codebook.copy_(codes)
        if hasattr(model.quantizer, "code_sums"):  # with counts of 1: the codes are their averages
            model.quantizer.code_sums.copy_(codes)


class Regularized:
    """A model at a step of its training, with what `latents` does to its latents (bases/latents.py)."""

    def __init__(self, model: Model, step: int):
        self.model, self.step = model, step
        self.moments, self.latents = model.moments, model.latents
        self.has_posterior, self.codebook_size = model.has_posterior, model.codebook_size

    def quantizer(self, latents: Tensor) -> Quantized:
        return self.model.quantizer(self.model.regularizer.transformed(latents, self.step))

    def decode_codes(self, codes: Tensor) -> Tensor:
        regularizer = self.model.regularizer
        if self.has_posterior:  # nothing has quantized them
            codes = regularizer.transformed(codes, self.step)
        return self.model.decode_codes(regularizer.noised(codes, self.step))


class Objective(AdversarialObjective):
    """Tunes the published weights, which it puts into the model."""

    def __init__(self, model: Model, config: Config):
        super().__init__(model, config)
        fill(model, config)

    def reconstruct(self, images: Tensor, step: int) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """Rombach et al., appendix G: the loss of the latents is a slight KL penalty, or the quantizer's."""
        model = self.model
        if sets(self.config, "latents"):
            model = Regularized(self.model, step)
        if model.has_posterior:
            mean, log_variance = model.moments(images)
            drawn = mean + torch.exp(0.5 * log_variance) * torch.randn_like(mean)
            divergence = 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).mean()
            return model.decode_codes(drawn), self.config.kl_weight * divergence, {"kl_loss": divergence}
        quantized = model.quantizer(model.latents(images))
        self.watch.note_codes(quantized.indices, step)
        terms = codebook_terms(quantized, model.codebook_size)
        if model.codebook_size is not None:
            terms = {"quantizer_loss": quantized.loss, **terms}
        return model.decode_codes(quantized.codes), quantized.loss, terms

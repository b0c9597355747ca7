"""GAN prior: a generator from noise and label to latents, trained against a discriminator. One network call a sample.

With tokenizer `none` the latents are pixels. Defaults are the modern baseline: pairs of real and generated are compared,
and the discriminator's gradient is penalized on both. The classic DCGAN is `loss: non_saturating, normalization: batch,
num_blocks: 0, r1_weight: 0.0, r2_weight: 0.0`.

Source: Huang et al., "The GAN is dead; long live the GAN!" (R3GAN), 2024, arXiv:2501.05441, equations 3 to 5 (the
relativistic pairing loss is Jolicoeur-Martineau's, arXiv:1807.00734; R1: Mescheder et al., arXiv:1801.04406, equation 9);
Goodfellow et al., 2014, arXiv:1406.2661, section 3 (non-saturating loss); penalties every few steps: Karras et al., 2019,
arXiv:1912.04958, section 3.2; truncation: Brock et al. (BigGAN), 2018, arXiv:1809.11096, section 3.1.
What is told other than labels: bases/unguided.py.
Differs from it: real and generated of a pair have one label; the generated images of the generator's phase are those that
the discriminator then judges, which saves a pass; penalties are on what the discriminator sees, after augmentation;
truncated noise is drawn by the inverse of its distribution function, which ends after one draw at any threshold. Batch
normalization takes each process's share of the batch by itself.
"""

from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn
from torch.optim import Optimizer

from tessera.bases.conditional import PriorSettings
from tessera.bases.optimization import Decay, Training, optimizers_for
from tessera.bases.unguided import ToldOnce, embedding
from tessera.components import AddedKey, ConditionConfig, Fraction, Params, RateFactor, Weight, sets
from tessera.contracts import Count, Learns, TokenBatch, TokenSpec
from tessera.nn.adversarial_networks import Generator, Normalization, ProjectionDiscriminator, Sizes, levels_of
from tessera.nn.augmentation import Augmentation, augmented

LEARNS: Learns = "latents"


class AdversarialTraining(Training):
    """Momentum harms the training against a moving opponent, so there is none by default."""

    betas: tuple[Decay, Decay] = (0.0, 0.99)
    weight_decay: Annotated[float, Field(ge=0, le=100)] = 0.0


class Config(PriorSettings):
    kind: Literal["gan"] = "gan"
    patch_size: Count = 1  # the layer next to the latents has this stride
    channels: Count = 64  # at the finest level, of both networks
    max_channels: Count = 256  # channels double with each level up to here
    smallest_side: Count = 4  # the grid is halved while it is even and stays at least this
    num_blocks: Annotated[int, Field(ge=0)] = 1  # residual blocks a level
    noise_dim: Count = 64
    hidden_dim: Annotated[int, Field(ge=0)] = 0  # of a layer between noise and the coarsest grid; 0: none
    normalization: Normalization = "none"
    output_range: Literal["unbounded", "pixels"] = "unbounded"  # pixels: latents lie in [-1, 1] before standardizing
    is_conditional: bool = True  # False: every label is label 0
    condition: AddedKey[ConditionConfig] = None  # what is told of an image in the place of its label: bases/unguided.py
    loss: Literal["relativistic", "non_saturating"] = "relativistic"
    r1_weight: Weight = 1.0  # gamma of the penalty on real
    r2_weight: Weight = 1.0  # gamma of the penalty on generated
    penalty_interval: Count = 1  # steps between penalties, which count this many times as much
    augmentation: Augmentation = "none"
    augment_probability: Fraction = 0.5
    discriminator_learning_rate_factor: RateFactor = 1.0  # times training.learning_rate
    training: AdversarialTraining


class Sampling(Params):
    truncation: Annotated[float, Field(ge=0.01, le=100)] | None = None  # noise beyond this is drawn anew; None: off


class Model(nn.Module):
    def __init__(self, config: Config, spec: TokenSpec):
        super().__init__()
        self.config, self.spec = config, spec
        self.generator = Generator(network_sizes(config, spec), config.noise_dim, config.hidden_dim)
        if sets(config, "condition"):
            self.generator.label_embedding = embedding(config, spec, config.noise_dim)
        shape = (1, -1, 1, 1)
        self.register_buffer("mean", torch.tensor(spec.latent_mean).view(shape), persistent=False)
        self.register_buffer("std", torch.tensor(spec.latent_std).view(shape), persistent=False)

    def forward(self, noise: Tensor, labels: Tensor) -> Tensor:
        """(B, noise_dim) standard normal noise, (B,) labels -> (B, D, h, w) standardized latents."""
        x = self.generator(noise, condition(labels, self.config)).float()
        return x if self.config.output_range == "unbounded" else (x.tanh() - self.mean) / self.std

    @torch.no_grad()
    def sample(self, labels: Tensor, sampling: Sampling, generator: torch.Generator) -> Tensor:
        """(B,) labels -> (B, D, h, w) standardized latents."""
        noise = draw_noise(len(labels), self.config.noise_dim, sampling.truncation, generator)
        return self(noise.to(labels.device), labels)


def network_sizes(config: Config, spec: TokenSpec) -> Sizes:
    levels = levels_of(spec.latent_shape, config.patch_size, config.channels, config.max_channels, config.smallest_side)
    num_labels = spec.num_classes if config.is_conditional else 1
    return Sizes(spec.latent_shape, num_labels, config.patch_size, levels, config.num_blocks, config.normalization)


def condition(labels: Tensor, config: Config) -> Tensor:
    """(B,) labels -> (B,) what both networks are conditioned on."""
    return labels if config.is_conditional else torch.zeros_like(labels)


def draw_noise(batch: int, noise_dim: int, truncation: float | None, generator: torch.Generator) -> Tensor:
    """BigGAN, section 3.1: (batch, noise_dim) normal numbers, none beyond +-truncation, on the generator's device."""
    drawn = {"generator": generator, "device": generator.device}
    if truncation is None:
        return torch.randn(batch, noise_dim, **drawn)
    within = torch.erf(torch.tensor(truncation / 2**0.5, dtype=torch.float64))
    uniform = 2 * torch.rand(batch, noise_dim, dtype=torch.float64, **drawn) - 1
    return (torch.erfinv(uniform * within) * 2**0.5).clamp(-truncation, truncation).float()


def generator_loss(real_logits: Tensor, fake_logits: Tensor, kind: str) -> Tensor:
    """What the generator minimizes, a scalar, of (B,) logits: Huang et al., section 2, or Goodfellow et al., section 3."""
    return F.softplus((real_logits if kind == "relativistic" else 0.0) - fake_logits).mean()


def discriminator_loss(real_logits: Tensor, fake_logits: Tensor, kind: str) -> Tensor:
    """What the discriminator minimizes, a scalar, from the same sources as `generator_loss`."""
    if kind == "relativistic":
        return F.softplus(fake_logits - real_logits).mean()
    return F.softplus(-real_logits).mean() + F.softplus(fake_logits).mean()


def gradient_penalty(logits: Tensor, inputs: Tensor) -> Tensor:
    """Mescheder et al., equation 9 (R1) of real inputs, 10 (R2) of generated ones, less gamma / 2: a scalar, differentiable.

    The squared norm of the gradient of each logit by its own input, the mean over the batch.
    """
    gradients = torch.autograd.grad(logits.sum(), inputs, create_graph=True)[0]
    gradients = gradients.to(torch.promote_types(gradients.dtype, torch.float32))  # bf16 under autocast
    return gradients.flatten(1).square().sum(dim=1).mean()


def accuracy(real_logits: Tensor, fake_logits: Tensor, kind: str) -> Tensor:
    """The share that the discriminator classifies correctly: of the pairs, or of all images; 0.5 is guessing."""
    if kind == "relativistic":
        return (real_logits > fake_logits).float().mean()
    return 0.5 * ((real_logits > 0).float().mean() + (fake_logits < 0).float().mean())


class Objective(nn.Module):
    phases = ("generator", "discriminator")

    def __init__(self, model: Model, config: Config):
        super().__init__()
        self.model, self.config = model, config
        sizes = network_sizes(config, model.spec)
        self.discriminator = ProjectionDiscriminator(sizes, feature_dim=sizes.levels[-1].channels)
        if sets(config, "condition"):
            self.discriminator.label_embedding = embedding(config, model.spec, sizes.levels[-1].channels)
            self._told = ToldOnce()
        self.register_buffer("last_penalties", torch.zeros(2))  # of real and fake: what is plotted between penalties
        self._pending: list[Tensor] = []  # what the generator's phase drew, one for each micro-batch

    def forward(self, batch: TokenBatch, phase: str, step: int) -> dict[str, Tensor]:
        labels = condition(batch.labels, self.config)
        if sets(self.config, "condition"):
            labels = self._told.in_phase(phase, labels, self.model.generator.label_embedding)
        return (
            self._generator(batch.tokens, labels) if phase == "generator" else self._discriminator(batch, labels, step)
        )

    def _augmented(self, latents: Tensor) -> Tensor:
        return augmented(latents, self.config.augmentation, self.config.augment_probability)

    def _generator(self, real: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """The generator's phase: `generator_loss`."""
        noise = torch.randn(len(labels), self.config.noise_dim, device=labels.device)
        fake = self.model(noise, labels)
        self._pending.append(fake.detach())
        self.discriminator.requires_grad_(False)  # its gradients belong to its own phase
        fake_logits = self.discriminator(self._augmented(fake), labels).float()
        real_logits = fake_logits.detach()
        if self.config.loss == "relativistic":
            with torch.no_grad():
                real_logits = self.discriminator(self._augmented(real), labels).float()
        self.discriminator.requires_grad_(True)
        return {"loss": generator_loss(real_logits, fake_logits, self.config.loss)}

    def _discriminator(self, batch: TokenBatch, labels: Tensor, step: int) -> dict[str, Tensor]:
        """The discriminator's phase: `discriminator_loss` + r1_weight / 2 R1 + r2_weight / 2 R2 (Huang et al., section 2).

        Penalties are taken every penalty_interval steps, and count this many times as much: Karras et al., section 3.2.
        """
        config = self.config
        weights = (config.r1_weight, config.r2_weight)
        if step % config.penalty_interval:
            weights = (0.0, 0.0)
        logits, penalties = [], []
        for latents, weight in zip((batch.tokens, self._pending.pop(0)), weights, strict=True):
            shown = self._augmented(latents).detach().requires_grad_(weight > 0)
            logits.append(self.discriminator(shown, labels).float())
            penalties.append(gradient_penalty(logits[-1], shown) if weight else logits[-1].new_zeros(()))
        real_logits, fake_logits = logits
        loss = discriminator_loss(real_logits, fake_logits, config.loss)
        if any(weights):
            penalty = sum(weight / 2 * value for weight, value in zip(weights, penalties, strict=True))
            loss = loss + config.penalty_interval * penalty
            self.last_penalties.copy_(torch.stack(penalties).detach())
        return {
            "loss": loss,
            "real_logits": real_logits.mean().detach(),
            "fake_logits": fake_logits.mean().detach(),
            "r1_penalty": self.last_penalties[0].clone(),
            "r2_penalty": self.last_penalties[1].clone(),
            "discriminator_accuracy": accuracy(real_logits, fake_logits, config.loss),
        }

    def optimizers(self) -> dict[str, list[Optimizer]]:
        training = self.config.training
        rate = training.learning_rate * self.config.discriminator_learning_rate_factor
        settings = training.model_copy(update={"learning_rate": rate})
        return {
            "generator": optimizers_for(self.model, training),
            "discriminator": optimizers_for(self.discriminator, settings),
        }

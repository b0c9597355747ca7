"""KL autoencoder: continuous latents that are nearly standard normal, for priors that model latents.

The encoder gives a mean and a variance per latent; the decoder learns on draws, priors learn the mean.

Source: Rombach et al., "High-Resolution Image Synthesis with Latent Diffusion Models", 2022, arXiv:2112.10752, section
3.1 and appendix G (KL regularization); Kingma and Welling, "Auto-Encoding Variational Bayes", 2013, arXiv:1312.6114,
appendix B (the divergence in closed form) and section 2.4 (the draw as a function of noise).
Differs from it: the divergence is a mean over latent values as the pixel term is one over pixels, where the authors have
sums, so that `kl_weight` means the same for images of every size; no discriminator by default; priors learn the mean,
not a draw.
"""

from typing import Literal

import torch
from pydantic import model_validator
from torch import Tensor

from tessera.bases.adversarial import AdversarialAutoencoder, AdversarialConfig, AdversarialObjective
from tessera.components import Weight, sets
from tessera.contracts import Encoded


class Config(AdversarialConfig):
    kind: Literal["vae"] = "vae"
    kl_weight: Weight = 1e-4
    adversarial_weight: Weight = 0.0

    @model_validator(mode="after")
    def _quantizer_is_identity(self) -> "Config":
        if self.quantizer.kind != "identity":
            raise ValueError(
                f"tokenizer vae takes quantizer identity, not {self.quantizer.kind}: its latents are not quantized"
            )
        return self


class Model(AdversarialAutoencoder):
    channels_per_latent = 2  # mean and log-variance

    def moments(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and log-variance of each latent, (B, D, h, w) each, float32."""
        mean, log_variance = self.encoder(images).float().chunk(2, dim=1)
        return mean, log_variance.clamp(-30, 20)

    def encode(self, images: Tensor) -> Encoded:
        return Encoded(self.moments(images)[0], None)

    def forward(self, images: Tensor, step: int) -> tuple[Tensor, Tensor]:
        """Reconstructions (B, C, H, W), of draws in training (Kingma and Welling, section 2.4) and of means otherwise; the
        divergence."""
        mean, log_variance = self.moments(images)
        latents = mean
        if self.training:
            latents = mean + torch.exp(0.5 * log_variance) * torch.randn_like(mean)
        if sets(self.config, "latents"):
            latents = self.regularizer.noised(self.regularizer.transformed(latents, step), step)
        return self.decoder(latents).float(), kl_divergence(mean, log_variance)


def kl_divergence(mean: Tensor, log_variance: Tensor) -> Tensor:
    """Kingma and Welling, appendix B: KL(N(mean, variance) || N(0, 1)) in nats, the mean over latent values."""
    return 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).mean()


class Objective(AdversarialObjective):
    def reconstruct(self, images: Tensor, step: int) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """Rombach et al., section 3.1: the loss of the latents is a slight KL penalty."""
        reconstructions, divergence = self.model(images, step)
        return reconstructions, self.config.kl_weight * divergence, {"kl_loss": divergence}

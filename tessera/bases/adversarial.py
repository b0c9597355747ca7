"""What tokenizers with a discriminator share: its settings, its network, its losses, and the two phases of training.

Source: Esser et al., "Taming Transformers for High-Resolution Image Synthesis", 2021, arXiv:2012.09841, equations 4 to 7
(perceptual and adversarial terms, the adaptive weight lambda); hinge loss: Lim and Ye 2017, arXiv:1705.02894; patches:
Isola et al. 2017, arXiv:1611.07004, section 3.2.2; LeCam: Tseng et al. 2021, arXiv:2104.03310, equation 5.
Differs from it: the weight is fixed by default, as in MaskBit and TiTok (arXiv:2409.16211, 2406.07550), and the adaptive
one is clamped at `adaptive_weight_limit`, not 10,000, where it explodes; LeCam is taken on the mean logits of a batch;
GroupNorm in the discriminator, so that a batch of one works.
"""

from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn
from torch.optim import Optimizer

from tessera.bases.autoencoder import Autoencoder, AutoencoderConfig, ReconstructionLoss
from tessera.bases.diagnostics import Diagnosis, Monitor
from tessera.bases.optimization import optimizers_for
from tessera.components import RateFactor, Weight, sets
from tessera.contracts import ImageBatch, ImageSpec
from tessera.nn.autoencoder import group_norm
from tessera.nn.processes import over_processes


class AdversarialConfig(AutoencoderConfig):
    adversarial_weight: Weight = 0.1  # 0: there is no discriminator
    adversarial_balance: Literal["fixed", "adaptive"] = "fixed"
    adaptive_weight_limit: Weight = 100.0
    discriminator_start_step: Annotated[int, Field(ge=0)] = 0
    discriminator_channels: Annotated[int, Field(ge=8)] = 32
    discriminator_layers: Annotated[int, Field(ge=1)] = 2  # with stride 2, each doubles the patch
    discriminator_learning_rate_factor: RateFactor = 1.0  # times training.learning_rate
    lecam_weight: Weight = 0.001


class AdversarialAutoencoder(Autoencoder):
    def __init__(self, config: AdversarialConfig, spec: ImageSpec):
        super().__init__(config, spec)
        self.image_channels = spec.channels


class PatchDiscriminator(nn.Module):
    """Isola et al., section 3.2.2: (B, C, H, W) -> (B, 1, h, w) logits, one per overlapping patch, high for real."""

    def __init__(self, image_channels: int, channels: int, num_layers: int):
        super().__init__()
        layers: list[nn.Module] = [nn.Conv2d(image_channels, channels, 3, padding=1), nn.LeakyReLU(0.2)]
        for _ in range(num_layers):
            wider = min(2 * channels, 512)
            layers += [nn.Conv2d(channels, wider, 4, stride=2, padding=1), group_norm(wider), nn.LeakyReLU(0.2)]
            channels = wider
        self.layers = nn.Sequential(*layers, nn.Conv2d(channels, 1, 3, padding=1))

    def forward(self, images: Tensor) -> Tensor:
        return self.layers(images)


def hinge_loss(real_logits: Tensor, fake_logits: Tensor) -> Tensor:
    """Lim and Ye: what the discriminator minimizes, a scalar; 1 where it cannot tell real from fake."""
    return 0.5 * (F.relu(1 - real_logits).mean() + F.relu(1 + fake_logits).mean())


def adaptive_weight(reconstruction: Tensor, adversarial: Tensor, last_layer: nn.Parameter, limit: float) -> Tensor:
    """Esser et al., equation 7: the ratio of the gradient norms of two scalars at the decoder's last layer, at most `limit`.

    In float32 also under autocast. One for all processes: the gradients are those of the whole batch.
    """
    with torch.autocast(reconstruction.device.type, enabled=False):
        gradients = [
            torch.autograd.grad(loss, last_layer, retain_graph=True)[0].float()
            for loss in (reconstruction, adversarial)
        ]
        of_reconstruction, of_adversarial = (over_processes(gradient).norm() for gradient in gradients)
        return (of_reconstruction / (of_adversarial + 1e-6)).clamp(0, limit).detach()


class AdversarialObjective(nn.Module):
    """Reconstruction, the loss of the latents, and an adversarial loss; the discriminator trains in a phase of its own.

    A tokenizer defines `reconstruct`. With adversarial_weight 0 there is neither a discriminator nor its phase.
    """

    def __init__(self, model: AdversarialAutoencoder, config: AdversarialConfig):
        super().__init__()
        self.model, self.config = model, config
        self.phases = ("autoencoder", "discriminator") if config.adversarial_weight else ("autoencoder",)
        if config.adversarial_weight:
            self.discriminator = PatchDiscriminator(
                model.image_channels, config.discriminator_channels, config.discriminator_layers
            )
            self.register_buffer("average_logits", torch.zeros(2))  # of real and fake, for LeCam
        self.reconstruction_loss = ReconstructionLoss(config)
        # not named monitor: the checkpoints of trainings hold its counters under this name
        steps = config.training.num_steps - config.discriminator_start_step if config.adversarial_weight else 0
        self.watch = Monitor(config.health, config.quantizer, discriminator_steps=max(0, steps))
        self.micro_batches = 1  # MovesOncePerStep: LeCam's averages are of whole batches
        self._logits: list[Tensor] = []  # (2,) mean logits of the micro-batches of this step
        self._pending: list[tuple[Tensor, Tensor]] = []  # images and their reconstructions, for the second phase

    def reconstruct(self, images: Tensor, step: int) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """Reconstructions, the loss of the latents, and terms to plot; with a codebook, `self.watch` notes the codes."""
        raise NotImplementedError("the objectives of vqgan.py and vae.py say how")

    def forward(self, batch: ImageBatch, phase: str, step: int) -> dict[str, Tensor] | None:
        if phase == "autoencoder":
            return self._autoencoder(batch.images, step)
        return self._discriminator() if step >= self.config.discriminator_start_step else None

    def _autoencoder(self, images: Tensor, step: int) -> dict[str, Tensor]:
        """Esser et al., equation 6, the minimum over encoder, decoder and codebook: the loss in full in vqgan.py."""
        reconstructions, of_latents, plotted = self.reconstruct(images, step)
        if sets(self.config, "latents"):
            images = self.model.regularizer.transformed(images, step)  # which is what they are of
        terms = self.reconstruction_loss(reconstructions, images)
        reconstruction = terms["loss"]
        loss = reconstruction + of_latents
        if self.config.adversarial_weight:
            adversarial = weight = loss.new_zeros(())
            if step >= self.config.discriminator_start_step:
                adversarial, weight = self._adversarial(reconstructions, reconstruction)
                loss = loss + weight * adversarial
                self._pending.append((images, reconstructions.detach()))
            terms |= {"adversarial_loss": adversarial, "adversarial_weight": weight}
        return {**terms, **plotted, "loss": loss}

    def _adversarial(self, reconstructions: Tensor, reconstruction: Tensor) -> tuple[Tensor, Tensor]:
        """The adversarial loss, minus the mean logit of reconstructions, and its weight; `reconstruction` is their loss."""
        self.discriminator.requires_grad_(False)  # its gradients belong to its own phase
        adversarial = -self.discriminator(reconstructions).float().mean()
        self.discriminator.requires_grad_(True)
        weight = torch.full_like(adversarial.detach(), self.config.adversarial_weight)
        if self.config.adversarial_balance == "adaptive":
            layer, limit = self.model.decoder.last_layer, self.config.adaptive_weight_limit
            weight = weight * adaptive_weight(reconstruction, adversarial, layer, limit)
        return adversarial, weight

    def _discriminator(self) -> dict[str, Tensor] | None:
        """Hinge loss (Lim and Ye) and LeCam (Tseng et al., equation 5), on the images of this step's first phase."""
        if not self._pending:
            return None
        images, reconstructions = self._pending.pop(0)
        real_logits, fake_logits = self.discriminator(images).float(), self.discriminator(reconstructions).float()
        loss = hinge_loss(real_logits, fake_logits)
        real, fake = real_logits.mean(), fake_logits.mean()
        if self.config.lecam_weight:
            loss = loss + self.config.lecam_weight * self._lecam(over_processes(torch.stack([real, fake])))
        accuracy = 0.5 * ((real_logits > 0).float().mean() + (fake_logits < 0).float().mean())
        self.watch.note_discriminator(real - fake, accuracy)
        return {"loss": loss, "real_logits": real, "fake_logits": fake, "discriminator_accuracy": accuracy}

    def _lecam(self, logits: Tensor) -> Tensor:
        """Tseng et al., equation 5, of (2,) mean logits of images and reconstructions."""
        average_real, average_fake = self.average_logits.unbind()
        real, fake = logits.unbind()
        self._logits.append(logits.detach())
        lecam = F.relu(real - average_fake).square() + F.relu(average_real - fake).square()
        if len(self._logits) == self.micro_batches:
            self.average_logits.lerp_(torch.stack(self._logits).mean(dim=0), 0.01)
            self._logits.clear()
        return lecam

    def observe(self, step: int) -> None:
        self.watch.observe(step)

    def diagnose(self) -> Diagnosis:
        return self.watch.diagnose()

    def optimizers(self) -> dict[str, list[Optimizer]]:
        training = self.config.training
        found = {"autoencoder": optimizers_for(self.model, training)}
        if self.config.adversarial_weight:
            rate = training.learning_rate * self.config.discriminator_learning_rate_factor
            settings = training.model_copy(update={"learning_rate": rate, "betas": (0.5, 0.9), "weight_decay": 0.0})
            found["discriminator"] = optimizers_for(self.discriminator, settings)
        return found

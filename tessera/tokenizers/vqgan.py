"""VQGAN: a VQ-VAE trained with a perceptual loss and against a patch discriminator.

With x the image, y its reconstruction, z the latents, e their codes, d the discriminator's logits, sg the stopped gradient,
and means over all elements, encoder, decoder and codebook minimize

    L   = pixel_weight |y - x|^p + perceptual_weight perceptual(y, x)
        + beta |z - sg(e)|^2 + codebook_weight |sg(z) - e|^2
        - lambda d(y)

    lambda = adversarial_weight from discriminator_start_step on, 0 before; with adversarial_balance: adaptive times
             min(|grad_last of the first line| / (|grad_last of d(y)| + 1e-6), adaptive_weight_limit)

and the discriminator minimizes, with moving averages a_real and a_fake of its mean logits,

    L_d = (relu(1 - d(x)) + relu(1 + d(y))) / 2
        + lecam_weight (relu(mean d(x) - a_fake)^2 + relu(a_real - mean d(y))^2)

The first line is ReconstructionLoss (bases/autoencoder.py), p is 1 or 2 by pixel_loss; the second is the quantizer's, here
quantizers/vector.py (with update: ema its last term is absent); the third and L_d are AdversarialObjective's
(bases/adversarial.py).

Source: Esser et al., "Taming Transformers for High-Resolution Image Synthesis", 2021, arXiv:2012.09841, equations 4 to 7.
Differs from it: the discriminator and lambda, as bases/adversarial.py explains; beta is on the commitment term, as in the
paper but not in the authors' code.
"""

from typing import Literal

from torch import Tensor

from tessera.bases.adversarial import AdversarialAutoencoder, AdversarialConfig, AdversarialObjective
from tessera.bases.autoencoder import codebook_terms
from tessera.components import PerceptualConfig


class Config(AdversarialConfig):
    kind: Literal["vqgan"] = "vqgan"
    perceptual: PerceptualConfig = "laplacian"


class Model(AdversarialAutoencoder):
    pass


class Objective(AdversarialObjective):
    def reconstruct(self, images: Tensor, step: int) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """Esser et al., equation 4, less its reconstruction term: the loss of the latents is the quantizer's."""
        reconstructions, quantized = self.model(images, step)
        self.watch.note_codes(quantized.indices, step)
        terms = {"quantizer_loss": quantized.loss, **codebook_terms(quantized, self.model.codebook_size)}
        return reconstructions, quantized.loss, terms

"""VQGAN: a VQ-VAE whose reconstructions must also look right to a patch discriminator.

Source: Esser et al., "Taming Transformers for High-Resolution Image Synthesis", 2021, arXiv:2012.09841, equations 4 to 7.
Differs from it: what the discriminator does differently stands in tessera/bases/adversarial.py; beta is on the commitment term,
where the paper has it and the authors' code has not.
"""

from typing import Literal

from torch import Tensor

from tessera.bases.adversarial import AdversarialAutoencoder, AdversarialConfig, AdversarialObjective
from tessera.bases.autoencoder import codebook_terms


class Config(AdversarialConfig):
    kind: Literal["vqgan"] = "vqgan"
    perceptual: Literal["none", "laplacian", "lpips"] = "laplacian"


class Model(AdversarialAutoencoder):
    pass


class Objective(AdversarialObjective):
    def reconstruct(self, images: Tensor, step: int) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        reconstructions, quantized = self.model(images, step)
        self.watch.note_codes(quantized.indices, step)
        terms = {"quantizer_loss": quantized.loss, **codebook_terms(quantized, self.model.codebook_size)}
        return reconstructions, quantized.loss, terms

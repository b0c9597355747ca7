"""VQ-VAE: an autoencoder with a codebook in the middle, trained on reconstruction alone.

Source: van den Oord et al., "Neural Discrete Representation Learning", 2017, arXiv:1711.00937, equation 3:
loss = reconstruction + codebook + beta * commitment; the last two are the quantizer's (quantizers/vector.py).
Differs from it: the reconstruction may add a perceptual term (off by default).
"""

from typing import Literal

from torch import Tensor, nn
from torch.optim import Optimizer

from tessera.bases.autoencoder import Autoencoder, AutoencoderConfig, ReconstructionLoss, codebook_terms
from tessera.bases.diagnostics import Diagnosis, Monitor
from tessera.bases.optimization import optimizers_for
from tessera.components import sets
from tessera.contracts import ImageBatch


class Config(AutoencoderConfig):
    kind: Literal["vqvae"] = "vqvae"


class Model(Autoencoder):
    pass


class Objective(nn.Module):
    phases = ("autoencoder",)

    def __init__(self, model: Model, config: Config):
        super().__init__()
        self.model, self.config = model, config
        self.reconstruction_loss = ReconstructionLoss(config)
        # not named monitor: the checkpoints of trainings hold its counters under this name
        self.watch = Monitor(config.health, config.quantizer)

    def forward(self, batch: ImageBatch, phase: str, step: int) -> dict[str, Tensor]:
        """Van den Oord et al., equation 3."""
        reconstructions, quantized = self.model(batch.images, step)
        self.watch.note_codes(quantized.indices, step)
        if sets(self.config, "latents"):
            batch = batch._replace(images=self.model.regularizer.transformed(batch.images, step))
        terms = self.reconstruction_loss(reconstructions, batch.images)
        terms["loss"] = terms["loss"] + quantized.loss
        return {**terms, "quantizer_loss": quantized.loss, **codebook_terms(quantized, self.model.codebook_size)}

    def observe(self, step: int) -> None:
        self.watch.observe(step)

    def diagnose(self) -> Diagnosis:
        return self.watch.diagnose()

    def optimizers(self) -> dict[str, list[Optimizer]]:
        return {"autoencoder": optimizers_for(self.model, self.config.training)}

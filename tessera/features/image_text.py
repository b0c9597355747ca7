"""Features of a small network that learns which caption belongs to which image: the judge of words.

It learns the training images and their captions alone, and is asked for the caption of an image among all captions of the data
set (metric caption_agreement). How far its answers can be trusted is seen on real images, whose captions it finds more or less
often; of captions with words that it never read it knows little.

Source: Radford et al., "Learning Transferable Visual Models From Natural Language Supervision" (CLIP), 2021,
arXiv:2103.00020, figure 3 (both directions of the contrastive loss, a learned temperature); Khosla et al., "Supervised
Contrastive Learning", 2020, arXiv:2004.11362, equation 2 (images of one caption are no negatives of each other).
Differs from CLIP: captions are read by bytes; images are warped a little, without crops; it begins from nothing.
"""

import math
from collections.abc import Iterator
from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import model_validator
from torch import Tensor, nn
from torch.optim import Optimizer

from tessera.bases.captions import Reader, Reads, is_said, unreadable
from tessera.bases.judging import GROUPS, LearnsImages, PooledFeatures, first_stride, warped
from tessera.bases.optimization import Training, optimizers_for
from tessera.components import AddedKey
from tessera.contracts import ImageBatch, ImageSpec, Planned

VIEW = (0.1, 0.1, 0.05)  # rotation in radians, fraction of the size, fraction of the side: each up to this much
FIRST_TEMPERATURE = 0.07
LEAST_TEMPERATURE = 0.01


class Config(LearnsImages):
    kind: Literal["image_text"] = "image_text"
    captions: AddedKey[Reads] = Reads(max_bytes=64)  # how they are read
    training: Training = Training(num_steps=1500, batch_size=128, learning_rate=2e-3)

    @model_validator(mode="after")
    def _reads_captions(self) -> "Config":
        if self.captions is None:
            raise ValueError(
                "captions is null, but this network learns captions: say how they are read, or leave the key out"
            )
        return self


def problems(config: Config, planned: Planned) -> Iterator[str]:
    """Of the params: images without captions, or with longer ones."""
    yield from unreadable(config.captions, planned.said)


class Model(PooledFeatures):
    """`features` are what it compares with captions; equal directions mean that an image and a caption belong together."""

    def __init__(self, config: Config, spec: ImageSpec):
        super().__init__()
        self.feature_dim, self.max_bytes = config.feature_dim, config.captions.max_bytes
        width, side, stride = config.channels, min(spec.height, spec.width), first_stride(spec)
        layers, side = _layer(spec.channels, width, stride), -(-side // stride)
        while side > 4:
            wider = min(2 * width, 4 * config.channels)
            layers += _layer(width, wider, 2) + _layer(wider, wider)
            width, side = wider, -(-side // 2)
        self.blocks = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(2))
        self.to_features = nn.Linear(4 * width, config.feature_dim)
        self.text = Reader(config.captions, config.feature_dim, 1.0)
        self.log_temperature = nn.Parameter(torch.tensor(math.log(FIRST_TEMPERATURE)))

    def of_captions(self, told: Tensor) -> Tensor:
        """(B, 1 + T) captions, whose labels are not looked at -> (B, feature_dim) unit vectors."""
        return F.normalize(self.text.read(told[:, 1:]).float(), dim=1)

    def of_images(self, images: Tensor) -> Tensor:
        """(B, C, H, W) float in [-1, 1] -> (B, feature_dim) unit vectors."""
        return F.normalize(self.features(images), dim=1)


def _layer(in_channels: int, out_channels: int, stride: int = 1) -> list[nn.Module]:
    convolution = nn.Conv2d(in_channels, out_channels, 3, stride, padding=1)
    return [convolution, nn.GroupNorm(GROUPS, out_channels), nn.SiLU()]


class Objective(nn.Module):
    """CLIP, figure 3; warps draw from torch's global generator, as dropout would."""

    phases = ("contrastive",)

    def __init__(self, model: Model, config: Config):
        super().__init__()
        self.model, self.config = model, config

    def forward(self, batch: ImageBatch, phase: str, step: int) -> dict[str, Tensor]:
        told = batch.labels[:, 1:]
        images, captions = self.model.of_images(warped(batch.images, *VIEW)), self.model.of_captions(batch.labels)
        logits = images @ captions.T / self.model.log_temperature.exp().clamp_min(LEAST_TEMPERATURE)
        has_caption = is_said(told).any(dim=1)  # of others nothing is to be learned
        logits = logits.masked_fill(~(has_caption[:, None] & has_caption[None, :]), -1e4)
        same = (told[None] == told[:, None]).all(dim=2)
        wanted = same / same.sum(dim=1, keepdim=True)
        of_each = [F.cross_entropy(each, wanted, reduction="none") for each in (logits, logits.T)]
        number = has_caption.sum().clamp_min(1)
        loss = (sum(of_each) / 2 * has_caption).sum() / number
        is_right = same.gather(1, logits.argmax(dim=1, keepdim=True)).squeeze(1)
        return {"loss": loss, "accuracy": (is_right & has_caption).sum() / number}

    def optimizers(self) -> dict[str, list[Optimizer]]:
        return {"contrastive": optimizers_for(self, self.config.training)}

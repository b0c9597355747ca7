"""Features of a small network that learns the training images without labels: the judge of gray or tiny images.

It learns two things of each image: which of the others is a small warp of it, and whether it is one image or is mixed of
two, by averaging their pixels or by pasting a rectangle of one into the other. The first keeps different images apart,
the second knows what an image of this data set is not. Which garbage a run tries its judges on (tessera/evaluation/garbage.py)
it never sees.

Source: Chen et al., "A Simple Framework for Contrastive Learning of Visual Representations" (SimCLR), 2020,
arXiv:2002.05709, equation 1; Zhang et al., "mixup: Beyond Empirical Risk Minimization", 2017, arXiv:1710.09412, section 1, and
Yun et al., "CutMix", 2019, arXiv:1905.04899, section 3.1 (images mixed of two); Sinha et al., "Negative Data Augmentation",
2021, arXiv:2102.05113 (such images as examples of what is not data).
Differs from SimCLR: views are small warps without crops, flips or colors, so that it works on digits of 8x8 pixels too; the
negatives of a view are the second views of the other images alone.
"""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer

from tessera.bases.judging import GROUPS, LearnsImages, PooledFeatures, first_stride, warped
from tessera.bases.optimization import Training, optimizers_for
from tessera.contracts import ImageBatch, ImageSpec

VIEW = (0.1, 0.15, 0.08)  # rotation in radians, fraction of the size, fraction of the side: each up to this much
TEMPERATURE = 0.1
LEAST_SHARE = 0.3  # of either image in a mixture of pixels
ONE, AVERAGED, PASTED = range(3)  # what an image is


class Config(LearnsImages):
    kind: Literal["contrastive"] = "contrastive"
    training: Training = Training(num_steps=400, batch_size=64, learning_rate=2e-3)


class Model(PooledFeatures):
    def __init__(self, config: Config, spec: ImageSpec):
        super().__init__()
        self.feature_dim = config.feature_dim
        width, side, stride = config.channels, min(spec.height, spec.width), first_stride(spec)
        layers, side = _layer(spec.channels, width, stride), -(-side // stride)
        while side > 4:
            layers += _layer(width, 2 * config.channels, stride=2)
            width, side = 2 * config.channels, -(-side // 2)
        layers += _layer(width, width)
        self.blocks = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(2))
        self.to_features = nn.Linear(4 * width, config.feature_dim)  # of 2 x 2 pooled cells


def _layer(in_channels: int, out_channels: int, stride: int = 1) -> list[nn.Module]:
    convolution = nn.Conv2d(in_channels, out_channels, 3, stride, padding=1)
    return [convolution, nn.GroupNorm(GROUPS, out_channels), nn.SiLU()]


class Objective(nn.Module):
    """Both losses, added; views and mixtures draw from torch's global generator, as dropout would."""

    phases = ("contrastive",)

    def __init__(self, model: Model, config: Config):
        super().__init__()
        self.model, self.config = model, config
        self.project = nn.Sequential(nn.SiLU(), nn.Linear(config.feature_dim, config.feature_dim))  # SimCLR's g
        self.tell = nn.Sequential(nn.SiLU(), nn.Linear(config.feature_dim, 3))

    def forward(self, batch: ImageBatch, phase: str, step: int) -> dict[str, Tensor]:
        images = batch.images
        others = images[torch.randperm(len(images), device=images.device)]
        sets = [images, images, averaged(images, others), pasted(images, others)]
        first, second, *mixed = self.model.features(warped(torch.cat(sets), *VIEW)).chunk(len(sets))
        similarity = F.normalize(self.project(first)) @ F.normalize(self.project(second)).T
        rows = torch.arange(len(images), device=images.device)
        contrast = F.cross_entropy(similarity / TEMPERATURE, rows)
        logits = self.tell(torch.cat([first, *mixed]))
        kinds = torch.tensor([ONE, AVERAGED, PASTED], device=images.device).repeat_interleave(len(images))
        told = F.cross_entropy(logits, kinds)
        accuracy = (logits.argmax(dim=1) == kinds).float().mean()
        return {"loss": contrast + told, "contrast": contrast, "told": told, "accuracy": accuracy}

    def optimizers(self) -> dict[str, list[Optimizer]]:
        return {"contrastive": optimizers_for(self, self.config.training)}


def averaged(images: Tensor, others: Tensor) -> Tensor:
    """mixup, section 1: (B, C, H, W) twice -> weighted means of their pixels, at least LEAST_SHARE of each."""
    share = LEAST_SHARE + (1 - 2 * LEAST_SHARE) * torch.rand(len(images), 1, 1, 1, device=images.device)
    return share * images + (1 - share) * others


def pasted(images: Tensor, others: Tensor) -> Tensor:
    """CutMix, section 3.1: (B, C, H, W) twice -> images with a rectangle of the others in them.

    Each side of it is a quarter to three quarters of the image's.
    """
    starts, lengths = torch.rand(2, 2, len(images), 1, device=images.device)
    is_inside = []
    for side, start, length in zip(images.shape[2:], starts / 2, 0.25 + lengths / 2, strict=True):
        place = (torch.arange(side, device=images.device) + 0.5) / side
        is_inside.append((place >= start) & (place < start + length))  # (B, side)
    rows, columns = is_inside
    return torch.where((rows[:, :, None] & columns[:, None, :])[:, None], others, images)

"""Features of a small residual network that learns to classify the data set at hand: what fd_classifier is made of.

Where no Inception-v3 weights can be had, or images look nothing like ImageNet, distances between sets of images need a
network that knows what matters in these images. Such figures compare only under one and the same features artifact.

Source: He et al., "Identity Mappings in Deep Residual Networks", 2016, arXiv:1603.05027 (blocks with the activation
first); Wu and He, "Group Normalization", 2018, arXiv:1803.08494; Szegedy et al., "Rethinking the Inception
Architecture", 2015, arXiv:1512.00567, section 7 (label smoothing); Simard, Steinkraus and Platt, "Best Practices for
Convolutional Neural Networks Applied to Visual Document Analysis", 2003 (learning from warped copies).
"""

from typing import Annotated, Literal

import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn
from torch.optim import Optimizer

from tessera.bases.judging import GROUPS, LearnsImages, PooledFeatures, first_stride, warped
from tessera.bases.optimization import Training, optimizers_for
from tessera.contracts import ImageBatch, ImageSpec

ROTATION, SCALE, SHIFT = 0.1, 0.08, 0.05  # radians, fraction of the size, fraction of the side: each up to this much


class Config(LearnsImages):
    kind: Literal["classifier"] = "classifier"
    label_smoothing: Annotated[float, Field(ge=0, lt=1)] = 0.1
    warp: Annotated[float, Field(ge=0, le=5)] = (
        1.0  # times 0.1 rad rotation, 8 % scale, 5 % shift; 0: images as they are
    )
    training: Training = Training(num_steps=600)


class Model(PooledFeatures):
    has_logits = True

    def __init__(self, config: Config, spec: ImageSpec):
        super().__init__()
        if spec.num_classes == 1:
            raise ValueError(
                f"the data set {spec.name} has no labels, and features of kind classifier are learnt from labels: "
                f"use features of kind timm (color images of 32 pixels and more) or contrastive"
            )
        self.feature_dim = config.feature_dim
        width, side, stride = config.channels, min(spec.height, spec.width), first_stride(spec)
        blocks: list[nn.Module] = [nn.Conv2d(spec.channels, width, 3, stride, padding=1), Block(width, width)]
        side = -(-side // stride)
        while side >= 8:
            blocks += [Block(width, 2 * config.channels, stride=2)]
            width, side = 2 * config.channels, -(-side // 2)
        self.blocks = nn.Sequential(*blocks, nn.GroupNorm(GROUPS, width), nn.SiLU(), nn.AdaptiveAvgPool2d(2))
        self.to_features = nn.Linear(4 * width, config.feature_dim)  # of 2 x 2 pooled cells
        self.to_logits = nn.Linear(config.feature_dim, spec.num_classes)

    def logits(self, images: Tensor) -> Tensor:
        """images: (B, C, H, W) float in [-1, 1] -> (B, num_classes) float32."""
        return self.to_logits(F.silu(self.features(images))).float()


class Block(nn.Module):
    """Two 3x3 convolutions around which the input passes unchanged, or by a strided 1x1 convolution."""

    def __init__(self, in_channels: int, out_channels: int, stride: int = 1):
        super().__init__()
        self.residual = nn.Sequential(
            nn.GroupNorm(GROUPS, in_channels),
            nn.SiLU(),
            nn.Conv2d(in_channels, out_channels, 3, stride, padding=1),
            nn.GroupNorm(GROUPS, out_channels),
            nn.SiLU(),
            nn.Conv2d(out_channels, out_channels, 3, padding=1),
        )
        self.shortcut = nn.Identity() if stride == 1 else nn.Conv2d(in_channels, out_channels, 1, stride)
        nn.init.zeros_(self.residual[-1].weight)  # each block starts as its shortcut

    def forward(self, x: Tensor) -> Tensor:
        return self.shortcut(x) + self.residual(x)


class Objective(nn.Module):
    """Cross-entropy on warped images; warps draw from torch's global generator, as dropout would."""

    phases = ("classifier",)

    def __init__(self, model: Model, config: Config):
        super().__init__()
        self.model, self.config = model, config

    def forward(self, batch: ImageBatch, phase: str, step: int) -> dict[str, Tensor]:
        amounts = (self.config.warp * most for most in (ROTATION, SCALE, SHIFT))
        images = warped(batch.images, *amounts) if self.config.warp else batch.images
        logits = self.model.logits(images)
        loss = F.cross_entropy(logits, batch.labels, label_smoothing=self.config.label_smoothing)
        return {"loss": loss, "accuracy": (logits.argmax(dim=1) == batch.labels).float().mean()}

    def optimizers(self) -> dict[str, list[Optimizer]]:
        return {"classifier": optimizers_for(self.model, self.config.training)}

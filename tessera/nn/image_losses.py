"""Distances of a reconstruction from its image: per pixel, over scales, and LPIPS where its weights are at hand.

Sources: Burt and Adelson, "The Laplacian pyramid as a compact image code", 1983 (the pyramid; L1 over its levels as in
Bojanowski et al., arXiv:1707.05776, section 2.2); Zhang et al., "The Unreasonable Effectiveness of Deep Features",
2018, arXiv:1801.03924 (LPIPS, VGG-16 version).
Differs from them: three levels of equal weight, 2x2 average pooling in the place of the Gaussian filter.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# LPIPS: the VGG-16 convolutions (blocks of them, a max pooling between), tapped after the last ReLU of each block.
VGG_BLOCKS = ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512))


def pixel_loss(reconstructions: Tensor, images: Tensor, kind: str) -> Tensor:
    """Mean absolute ("l1") or squared ("l2") difference, a scalar."""
    difference = reconstructions.float() - images.float()
    return difference.abs().mean() if kind == "l1" else difference.square().mean()


def laplacian_pyramid(images: Tensor, num_levels: int = 3) -> list[Tensor]:
    """Burt and Adelson: band-pass levels, then the low-pass rest; fewer where a side would be below 2 pixels."""
    levels = []
    for _ in range(num_levels - 1):
        if min(images.shape[-2:]) < 4:
            break
        low = F.avg_pool2d(images, 2)
        levels.append(images - F.interpolate(low, size=images.shape[-2:], mode="bilinear", align_corners=False))
        images = low
    return [*levels, images]


def laplacian_loss(reconstructions: Tensor, images: Tensor) -> Tensor:
    """Bojanowski et al., section 2.2, with equal weights: L1 over levels, a scalar. Pyramids are linear: one of the difference
    serves."""
    levels = laplacian_pyramid(reconstructions.float() - images.float())
    return torch.stack([level.abs().mean() for level in levels]).mean()


class Lpips(nn.Module):
    """LPIPS distance of two image batches (B, 3 or 1, H, W) in [-1, 1]; a scalar, the mean over the batch.

    `weights` are VGG-16's convolutions under their torchvision names (features.N.weight, features.N.bias) and the five
    1x1 layers of the metric (lin0.weight ... lin4.weight, shape (1, channels, 1, 1)).
    """

    def __init__(self, weights: dict[str, Tensor]):
        super().__init__()
        self.register_buffer("shift", torch.tensor([-0.030, -0.088, -0.188]).view(1, 3, 1, 1))
        self.register_buffer("scale", torch.tensor([0.458, 0.448, 0.450]).view(1, 3, 1, 1))
        self.blocks = nn.ModuleList()
        position, channels = 0, 3
        for block in VGG_BLOCKS:
            convolutions = nn.ModuleList()
            for width in block:
                layer = nn.Conv2d(channels, width, 3, padding=1)
                layer.load_state_dict({name: weights[f"features.{position}.{name}"] for name in ("weight", "bias")})
                convolutions.append(layer)
                position, channels = position + 2, width  # a convolution and its ReLU
            position += 1  # the max pooling
            self.blocks.append(convolutions)
        self.weights = [f"lin{level}" for level in range(len(VGG_BLOCKS))]
        for name in self.weights:
            self.register_buffer(name, weights[f"{name}.weight"].view(1, -1, 1, 1))
        self.requires_grad_(False)

    def _levels(self, images: Tensor) -> list[Tensor]:
        x = (images.expand(-1, 3, -1, -1) - self.shift) / self.scale
        levels = []
        for number, block in enumerate(self.blocks):
            if number:
                x = F.max_pool2d(x, 2)
            for layer in block:
                x = F.relu(layer(x))
            levels.append(x / (x.square().sum(dim=1, keepdim=True) + 1e-10).sqrt())
        return levels

    def forward(self, reconstructions: Tensor, images: Tensor) -> Tensor:
        return self.of_each(reconstructions, images).mean()

    def of_each(self, reconstructions: Tensor, images: Tensor) -> Tensor:
        """Zhang et al., equation 1: (B,) the distance of each image."""
        pairs = zip(self._levels(reconstructions.float()), self._levels(images.float()), self.weights, strict=True)
        return sum((getattr(self, name) * (a - b).square()).sum(dim=1).mean(dim=(1, 2)) for a, b, name in pairs)

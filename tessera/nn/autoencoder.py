"""Convolutional encoder and decoder: a patch stem, then levels of residual blocks with a factor 2 between them.

With one level and a patch stem it is a small patch autoencoder, cheap on a CPU; with patch_size 1 and several levels it
is the shape of VQGAN's (Esser et al. 2021, arXiv:2012.09841, appendix table 7). Differs from it: no attention (as in
MaskBit's VQGAN+, arXiv:2409.16211, section 3), upsampling by pixel shuffle at the patch.

Shape letters: B batch, C H W image, D latent channels, h w grid, N channels inside.
"""

import torch.nn.functional as F
from torch import Tensor, nn


def group_norm(channels: int) -> nn.GroupNorm:
    """At most 32 groups of at least 8 channels each."""
    groups = max(g for g in range(1, 33) if channels % g == 0 and (channels // g >= 8 or g == 1))
    return nn.GroupNorm(groups, channels, eps=1e-6)


class ResBlock(nn.Module):
    """x + f(x) with f = norm, SiLU, 3x3, norm, SiLU, 3x3; the last convolution starts at zero, so f does too."""

    recomputes = True  # training/loop.py

    def __init__(self, channels: int):
        super().__init__()
        self.norm1, self.norm2 = group_norm(channels), group_norm(channels)
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1)
        nn.init.zeros_(self.conv2.weight)
        nn.init.zeros_(self.conv2.bias)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        return x + self.conv2(F.silu(self.norm2(h)))


class Encoder(nn.Module):
    """(B, C, H, W) -> (B, D, h, w) with h = H / (patch_size * 2 ** (levels - 1))."""

    compiles = True  # training/loop.py

    def __init__(
        self, image_channels: int, latent_channels: int, channels: tuple[int, ...], num_blocks: int, patch_size: int
    ):
        super().__init__()
        self.stem = nn.Conv2d(
            image_channels, channels[0], 3 if patch_size == 1 else patch_size, patch_size, padding=int(patch_size == 1)
        )
        layers: list[nn.Module] = []
        for level, width in enumerate(channels):
            if level:
                layers.append(nn.Conv2d(channels[level - 1], width, 3, stride=2, padding=1))
            layers += [ResBlock(width) for _ in range(num_blocks)]
        self.blocks = nn.Sequential(*layers)
        self.norm = group_norm(channels[-1])
        self.head = nn.Conv2d(channels[-1], latent_channels, 1)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(F.silu(self.norm(self.blocks(self.stem(images)))))

    def hidden_matrices(self) -> list[nn.Parameter]:
        """What Muon optimizes: the kernels between stem and head."""
        return [p for p in self.blocks.parameters() if p.ndim == 4]


class Decoder(nn.Module):
    """(B, D, h, w) -> (B, C, H, W): the mirror of Encoder."""

    compiles = True  # training/loop.py

    def __init__(
        self, image_channels: int, latent_channels: int, channels: tuple[int, ...], num_blocks: int, patch_size: int
    ):
        super().__init__()
        self.stem = nn.Conv2d(latent_channels, channels[-1], 3, padding=1)
        layers: list[nn.Module] = []
        for level in reversed(range(len(channels))):
            layers += [ResBlock(channels[level]) for _ in range(num_blocks)]
            if level:
                layers += [
                    nn.Upsample(scale_factor=2, mode="nearest"),
                    nn.Conv2d(channels[level], channels[level - 1], 3, padding=1),
                ]
        self.blocks = nn.Sequential(*layers)
        self.norm = group_norm(channels[0])
        self.head = nn.Conv2d(channels[0], image_channels * patch_size**2, 3, padding=1)
        self.patch_size = patch_size

    @property
    def last_layer(self) -> nn.Parameter:
        """The weight whose gradients an adaptive adversarial weight balances."""
        return self.head.weight

    def forward(self, latents: Tensor) -> Tensor:
        x = self.head(F.silu(self.norm(self.blocks(self.stem(latents)))))
        return F.pixel_shuffle(x, self.patch_size)

    def hidden_matrices(self) -> list[nn.Parameter]:
        """What Muon optimizes: the kernels between stem and head."""
        return [p for p in self.blocks.parameters() if p.ndim == 4]

"""A U-Net on noisy latents or pixels: residual convolutions on grids that halve and double, conditioned on time and label.

A patch stem (pixel unshuffle) spares the finest grid, which costs the most: 28x28 pixels become 14x14 places.

Sources: Ho et al., "Denoising Diffusion Probabilistic Models", 2020, arXiv:2006.11239, appendix B (the shape); Dhariwal
and Nichol, "Diffusion Models Beat GANs on Image Synthesis", 2021, arXiv:2105.05233, section 3 (adaptive group norm, 64
channels to a head); Karras et al., 2022, arXiv:2206.00364, table 8 (one set of conditions for all blocks).
Differs from them: attention stands at the coarsest grid alone; the skip connections join one block each.

Shape letters: B batch, D latent channels, h w grid, N channels inside, E width of the condition.
"""

from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from tessera.components import Params
from tessera.nn.autoencoder import group_norm
from tessera.nn.time_features import time_features

HEAD_WIDTH = 64  # channels to an attention head, at most


class Config(Params):
    kind: Literal["unet"] = "unet"
    patch_size: Annotated[int, Field(ge=1)] = 1  # side of the latents that one place of the finest grid holds
    channels: Annotated[int, Field(ge=8, multiple_of=8)] = 64
    channel_multipliers: Annotated[tuple[Annotated[int, Field(ge=1)], ...], Field(min_length=1)] = (1, 2)
    num_blocks: Annotated[int, Field(ge=1)] = 2  # residual blocks per level, going down and going up
    has_attention: bool = True  # at the coarsest grid
    dropout: Annotated[float, Field(ge=0, le=1)] = 0.0


class Model(nn.Module):
    compiles = True  # training/loop.py

    def __init__(self, config: Config, latent_shape: tuple[int, int, int], num_labels: int):
        super().__init__()
        self.config = config
        depth, height, width = latent_shape
        factor = config.patch_size * 2 ** (len(config.channel_multipliers) - 1)
        if height % factor or width % factor:
            raise ValueError(
                f"a {height}x{width} grid of latents is not divisible by the denoiser's patch_size {config.patch_size} "
                f"times 2 for each further level, {factor}: take fewer channel_multipliers or another patch_size"
            )
        widths = [config.channels * multiplier for multiplier in config.channel_multipliers]
        condition = 4 * config.channels
        self.time = nn.Sequential(nn.Linear(config.channels, condition), nn.SiLU(), nn.Linear(condition, condition))
        self.label_embedding = nn.Embedding(num_labels, condition)
        nn.init.normal_(
            self.label_embedding.weight, std=0.5
        )  # as wide as the time's part, so that labels count at once
        self.enter = nn.Conv2d(depth * config.patch_size**2, widths[0], 3, padding=1)

        self.down, self.up = nn.ModuleList(), nn.ModuleList()
        skips, now = [widths[0]], widths[0]
        for level, channels in enumerate(widths):
            if level:
                self.down.append(nn.Conv2d(now, now, 3, stride=2, padding=1))
                skips.append(now)
            for _ in range(config.num_blocks):
                self.down.append(Block(now, channels, condition, config.dropout))
                now = channels
                skips.append(now)
        self.middle = nn.ModuleList([Block(now, now, condition, config.dropout)])
        if config.has_attention:
            self.middle += [Attention(now), Block(now, now, condition, config.dropout)]
        for level, channels in reversed(list(enumerate(widths))):
            for _ in range(
                config.num_blocks + 1
            ):  # one more than going down: for the entry, or the halving, of the level
                self.up.append(Block(now + skips.pop(), channels, condition, config.dropout))
                now = channels
            if level:
                self.up.append(Double(now))
        self.norm = group_norm(now)
        self.leave = nn.Conv2d(now, depth * config.patch_size**2, 3, padding=1)
        nn.init.zeros_(self.leave.weight)
        nn.init.zeros_(self.leave.bias)
        self.to(memory_format=torch.channels_last)  # on a CPU an eighth faster

    def forward(self, x: Tensor, times: Tensor, labels: Tensor) -> Tensor:
        """(B, D, h, w) noisy latents, (B,) times of any scale near [0, 1], (B,) labels -> (B, D, h, w) float32."""
        condition = self.time(time_features(times, self.config.channels)) + self.label_embedding(labels)
        condition = F.silu(condition)  # (B, E)
        x = self.enter(F.pixel_unshuffle(x, self.config.patch_size))
        skips = [x]
        for layer in self.down:
            x = layer(x, condition) if isinstance(layer, Block) else layer(x)
            skips.append(x)
        for layer in self.middle:
            x = layer(x, condition) if isinstance(layer, Block) else layer(x)
        for layer in self.up:
            x = layer(torch.cat([x, skips.pop()], dim=1), condition) if isinstance(layer, Block) else layer(x)
        return F.pixel_shuffle(self.leave(F.silu(self.norm(x))), self.config.patch_size).float()

    def hidden_matrices(self) -> list[nn.Parameter]:
        """What Muon optimizes: the kernels inside, neither those of the entry and exit nor what carries the condition."""
        return [p for part in (self.down, self.middle, self.up) for p in part.parameters() if p.ndim == 4]


class Block(nn.Module):
    """shortcut(x) + f(x), f = norm, SiLU, 3x3, adaptive norm, SiLU, 3x3; f starts at zero.

    Dhariwal and Nichol, section 3: the adaptive norm is scaled and shifted by the condition.
    """

    recomputes = True  # training/loop.py

    def __init__(self, in_channels: int, channels: int, condition: int, dropout: float):
        super().__init__()
        self.norm1, self.norm2 = group_norm(in_channels), group_norm(channels)
        self.conv1 = nn.Conv2d(in_channels, channels, 3, padding=1)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1)
        self.modulation = nn.Linear(condition, 2 * channels)
        self.dropout = nn.Dropout(dropout)
        self.shortcut = nn.Identity() if in_channels == channels else nn.Conv2d(in_channels, channels, 1)
        for layer in (self.conv2, self.modulation):
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        scale, shift = self.modulation(condition)[:, :, None, None].chunk(2, dim=1)
        h = self.conv1(F.silu(self.norm1(x)))
        h = self.norm2(h) * (1 + scale) + shift
        return self.shortcut(x) + self.conv2(self.dropout(F.silu(h)))


class Attention(nn.Module):
    """x + attention between all places of the grid; starts as x."""

    def __init__(self, channels: int):
        super().__init__()
        self.heads = max(1, channels // HEAD_WIDTH) if channels % HEAD_WIDTH == 0 else 1
        self.norm = group_norm(channels)
        self.qkv = nn.Conv2d(channels, 3 * channels, 1)
        self.out = nn.Conv2d(channels, channels, 1)
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)

    def forward(self, x: Tensor) -> Tensor:
        batch, channels, height, width = x.shape
        qkv = self.qkv(self.norm(x)).view(batch, 3, self.heads, channels // self.heads, height * width)
        query, key, value = qkv.transpose(3, 4).unbind(1)  # each (B, heads, h * w, N / heads)
        h = F.scaled_dot_product_attention(query, key, value)
        return x + self.out(h.transpose(2, 3).reshape(batch, channels, height, width))


class Double(nn.Module):
    """(B, N, h, w) -> (B, N, 2 h, 2 w)."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2, mode="nearest"))

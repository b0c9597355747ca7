"""A transformer over patches of noisy latents, conditioned on time and label by adaptive norms.

Source: Peebles and Xie, "Scalable Diffusion Models with Transformers" (DiT), 2022, arXiv:2212.09748, section 3.2
(adaLN-zero); the body is nn/transformer.py.
Differs from it: RMSNorm, SwiGLU, rotary positions beside learned ones, queries and keys normalized.

Shape letters: B batch, D latent channels, h w grid, L patches, N width.
"""

from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from tessera.bases.transformer import TransformerConfig
from tessera.nn.time_features import time_features
from tessera.nn.transformer import Transformer


class Config(TransformerConfig):
    kind: Literal["transformer"] = "transformer"
    patch_size: Annotated[int, Field(ge=1)] = 1  # side of the latents that one place of the sequence holds


class Model(nn.Module):
    def __init__(self, config: Config, latent_shape: tuple[int, int, int], num_labels: int):
        super().__init__()
        self.config = config
        channels, height, width = latent_shape
        patch = config.patch_size
        if height % patch or width % patch:
            raise ValueError(
                f"a {height}x{width} grid of latents is not divisible by the denoiser's patch_size {patch}"
            )
        self.grid = (height // patch, width // patch)
        self.enter = nn.Linear(channels * patch**2, config.width)
        self.position = nn.Parameter(torch.randn(self.grid[0] * self.grid[1], config.width) * 0.02)
        self.time = nn.Sequential(
            nn.Linear(config.width, config.width), nn.SiLU(), nn.Linear(config.width, config.width)
        )
        self.label_embedding = nn.Embedding(num_labels, config.width)
        nn.init.normal_(self.label_embedding.weight, std=0.02)
        self.transformer = Transformer(
            config.width, config.depth, config.heads, self.grid, config.dropout, is_causal=False, is_conditioned=True
        )
        self.leave = nn.Linear(config.width, channels * patch**2)
        nn.init.zeros_(self.leave.weight)
        nn.init.zeros_(self.leave.bias)

    def forward(self, x: Tensor, times: Tensor, labels: Tensor) -> Tensor:
        """(B, D, h, w) noisy latents, (B,) times of any scale near [0, 1], (B,) labels -> (B, D, h, w) float32."""
        patch = self.config.patch_size
        sequence = F.pixel_unshuffle(x, patch).flatten(2).transpose(1, 2)  # (B, L, D * patch ** 2)
        condition = self.time(time_features(times, self.config.width)) + self.label_embedding(labels)  # (B, N)
        h = self.transformer(self.enter(sequence) + self.position, condition)
        out = self.leave(h).transpose(1, 2).unflatten(2, self.grid)
        return F.pixel_shuffle(out, patch).float()

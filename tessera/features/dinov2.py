"""Features of DINOv2, a vision transformer that learned without labels: what fd_dinov2 is made of.

Distances on its features follow what people say of images more closely than those on Inception-v3, whose features are
those of ImageNet's classes; EDM2 reports both. The weights are read from a local file, never downloaded here.

Source: Oquab et al., "DINOv2: Learning Robust Visual Features without Supervision", 2023, arXiv:2304.07193 (weights,
names and network); Dosovitskiy et al., 2020, arXiv:2010.11929 (ViT); Touvron et al., 2021, arXiv:2103.17239, section 2
(layer scale); Stein et al., "Exposing flaws of generative model evaluation metrics", 2023, arXiv:2306.04675 (as a
judge); Karras et al., "Analyzing and Improving the Training Dynamics of Diffusion Models" (EDM2), 2024,
arXiv:2312.02696 (ViT-L/14, and its resizing, which is the one here).
Differs from them: Stein et al. resize with Pillow, which rounds to 8 bits once more.

Features of kind timm with network vit_small_patch14_dinov2 are no substitute, though the network is the same: with equal
weights and 518 pixels, or 224 and the positions below, timm 1.0.31 gave these features bit for bit on a CPU. It looks at
518 pixels, however, and for 224 it antialiases the trained positions, where the published code does not: with random
weights that moves the features of ViT-S/14 by 0.7 % of their length if positions are smooth, by 9 % if they are white noise.
"""

from collections import OrderedDict
from functools import partial
from pathlib import Path
from typing import Annotated, Literal, NamedTuple

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn
from torch.nn.utils import skip_init

from tessera.artifacts import weights_file
from tessera.artifacts.images import to_uint8
from tessera.bases.judging import require_gray_or_rgb
from tessera.components import Params
from tessera.contracts import ImageSpec

PATCH = 14  # pixels a side
SIDE = 224  # pixels that the network sees: 16 x 16 patches
TRAINED_GRID = 37  # patches a side that the published position embeddings are of: 518 pixels
AT_ONCE = 50  # images in the network: ViT-L's widest layer takes 4 MB of each
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet's pixels in [0, 1]


class Sizes(NamedTuple):
    width: int
    depth: int
    heads: int


VARIANTS = {"small": Sizes(384, 12, 6), "base": Sizes(768, 12, 12), "large": Sizes(1024, 24, 16)}


class Config(Params):
    kind: Literal["dinov2"] = "dinov2"
    variant: Literal["small", "base", "large"] = "large"  # ViT-S/14, ViT-B/14, ViT-L/14
    weights: Annotated[str, Field(min_length=1)]  # path of a safetensors file
    sha256: Annotated[str, Field(pattern="^[0-9a-f]{64}$")]  # of that file


class Model(nn.Module):
    """Without meaningful weights until `prepare` or `load_state_dict` has put them in."""

    has_logits = False
    resize = f"bicubic to {SIDE}x{SIDE}, antialiased"

    def __init__(self, config: Config, spec: ImageSpec):
        super().__init__()
        require_gray_or_rgb(spec, "DINOv2")
        sizes = VARIANTS[config.variant]
        self.feature_dim = sizes.width
        self.network = VisionTransformer(sizes)
        self.register_buffer("mean", 255 * torch.tensor(MEAN).view(3, 1, 1), persistent=False)
        self.register_buffer("std", 255 * torch.tensor(STD).view(3, 1, 1), persistent=False)
        self.eval().requires_grad_(False)

    @torch.no_grad()
    def features(self, images: Tensor) -> Tensor:
        """images: (B, C, H, W) float in [-1, 1], C 1 or 3, any size -> (B, feature_dim) float32."""
        return torch.cat([self.network(self._resized(some)) for some in images.split(AT_ONCE)]).float()

    def _resized(self, images: Tensor) -> Tensor:
        """As the network wants them, (B, 3, 224, 224); gray is repeated. Overshoots of the filter are kept."""
        pixels = F.interpolate(to_uint8(images).float(), size=(SIDE, SIDE), mode="bicubic", antialias=True)
        return (pixels - self.mean) / self.std


class VisionTransformer(nn.Module):
    """(B, 3, H, W), H and W divisible by 14 -> (B, N), the class token at the end. Names are those of the published files.

    Shape letters: B batch, L = 1 + patches, N width, E = N / heads.
    """

    def __init__(self, sizes: Sizes):
        super().__init__()
        width = sizes.width
        # skip_init: all weights come from a file; the global generator is left alone
        self.patch_embed = nn.ModuleDict({"proj": skip_init(nn.Conv2d, 3, width, PATCH, stride=PATCH)})
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + TRAINED_GRID**2, width))
        self.blocks = nn.ModuleList(Block(width, sizes.heads) for _ in range(sizes.depth))
        self.norm = nn.LayerNorm(width, eps=1e-6)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch_embed["proj"](x)
        positions = self.positions(x.shape[2], x.shape[3])
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x.flatten(2).transpose(1, 2)], dim=1) + positions
        for block in self.blocks:
            x = block(x)
        return self.norm(x[:, 0])

    def positions(self, height: int, width: int) -> Tensor:
        """(1, 1 + height * width, N): the position embeddings of a grid of patches, the class token's first.

        Those of other grids than the trained one are interpolated as the published code does it: bicubically, not
        antialiased, and by the factor (side + 0.1) / 37, so that patch i lies at (i + 0.5) * 37 / (side + 0.1) - 0.5.
        The 0.1 guards against a side that rounding makes one too small; it moves the far edge by 0.2 of a trained patch.
        """
        if (height, width) == (TRAINED_GRID, TRAINED_GRID):
            return self.pos_embed
        grid = self.pos_embed[:, 1:].transpose(1, 2).unflatten(2, (TRAINED_GRID, TRAINED_GRID))
        factors = ((height + 0.1) / TRAINED_GRID, (width + 0.1) / TRAINED_GRID)
        grid = F.interpolate(grid, scale_factor=factors, mode="bicubic")
        assert grid.shape[2:] == (height, width)
        return torch.cat([self.pos_embed[:, :1], grid.flatten(2).transpose(1, 2)], dim=1)


class Block(nn.Module):
    """Attention and a GELU perceptron, each on a norm of the residual stream and scaled per channel."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        linear = partial(skip_init, nn.Linear)
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width, eps=1e-6), nn.LayerNorm(width, eps=1e-6)
        self.attn = nn.ModuleDict({"qkv": linear(width, 3 * width), "proj": linear(width, width)})
        layers = [("fc1", linear(width, 4 * width)), ("gelu", nn.GELU()), ("fc2", linear(4 * width, width))]
        self.mlp = nn.Sequential(OrderedDict(layers))
        self.ls1, self.ls2 = (nn.ParameterDict({"gamma": torch.ones(width)}) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        """(B, L, N) -> (B, L, N)."""
        x = x + self.ls1["gamma"] * self._attention(self.norm1(x))
        return x + self.ls2["gamma"] * self.mlp(self.norm2(x))

    def _attention(self, x: Tensor) -> Tensor:
        qkv = self.attn["qkv"](x).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)  # (3, B, heads, L, E)
        return self.attn["proj"](F.scaled_dot_product_attention(*qkv).transpose(1, 2).flatten(2))


def prepare(model: Model, config: Config) -> None:
    """Read the weights from config.weights, once, when the features artifact is made; the artifact then holds them."""
    path, expected = Path(config.weights), f"the weights of DINOv2, variant {config.variant}, without registers"
    remedy = f"`python data/download.py dinov2-{config.variant}` gets them and prints the line for params.yaml"
    weights = weights_file.read(path, config.sha256, ("features.weights", "features.sha256"), expected, remedy)
    weights.pop("mask_token", None)  # stood for hidden patches in training only
    weights_file.fill(model.network, weights, path, "features.weights", expected, remedy)

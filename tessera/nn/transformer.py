"""The transformer body of every token prior: pre-RMSNorm, rotary positions on the grid, SwiGLU, normalized queries and keys.

Sources: Vaswani et al. 2017, arXiv:1706.03762; RMSNorm, Zhang and Sennrich 2019, arXiv:1910.07467; SwiGLU, Shazeer 2020,
arXiv:2002.05202; RoPE, Su et al. 2021, arXiv:2104.09864, here on two axes; query-key normalization, Henry et al. 2020,
arXiv:2010.04245; adaLN-zero conditioning, Peebles and Xie 2022 (DiT), arXiv:2212.09748, section 3.2.

Shape letters: B batch, L sequence, N width, H heads, E = N / H.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tessera.nn import handwritten
from tessera.nn.steps import Number, put

NORM_EPSILON = 1e-6


def is_handwritten_faster(x: Tensor) -> bool:
    return x.device.type == "cpu" and x.dtype == torch.float32 and not torch.compiler.is_compiling()


class RMSNorm(nn.Module):
    """Zhang and Sennrich, equation 4: x / rms(x) * weight over the last axis, in float32."""

    def __init__(self, width: int, has_weight: bool = True):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width)) if has_weight else None
        self.width = width

    def forward(self, x: Tensor) -> Tensor:
        if is_handwritten_faster(x):
            return handwritten.rms_norm(x, self.weight, NORM_EPSILON)
        return F.rms_norm(x.float(), (self.width,), self.weight, eps=NORM_EPSILON).to(x.dtype)


def rotary_angles(height: int, width: int, head_width: int, base: float = 100.0) -> Tensor:
    """(h * w, E / 2) angles in raster order, half of them proportional to the row, half to the column."""
    quarter = head_width // 4
    frequencies = base ** (-torch.arange(quarter) / quarter)
    rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    return torch.cat([rows.reshape(-1, 1) * frequencies, columns.reshape(-1, 1) * frequencies], dim=1)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Su et al., section 3.2.2: rotate the pairs (x[i], x[i + E/2]) of the last axis.

    x (B, H, L, E), cos and sin (L, E / 2) or (B, 1, L, E / 2).
    """
    a, b = x.chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, a * sin + b * cos], dim=-1)


class Past(NamedTuple):
    """What a layer remembers of the elements before the one at `number`, the only one that is given to it."""

    keys: Tensor  # (B, H, L, E), allocated once for the whole sequence, as the values
    values: Tensor
    number: Number
    is_past: (
        Tensor | None
    )  # (1, L) whether an element is there, the given one too; None: the number is an int, and tells

    def attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Remember the key and the value; all are (B, H, 1, E)."""
        put(self.keys, self.number, key, dim=2)
        put(self.values, self.number, value, dim=2)
        if self.is_past is not None:
            return F.scaled_dot_product_attention(query, self.keys, self.values, attn_mask=self.is_past)
        end = self.number + 1
        return F.scaled_dot_product_attention(query, self.keys[:, :, :end], self.values[:, :, :end])


class Attention(nn.Module):
    """Vaswani et al., equation 1, with queries and keys normalized (Henry et al.) and rotated."""

    def __init__(self, width: int, heads: int, dropout: float):
        super().__init__()
        self.heads, self.dropout = heads, dropout
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.out = nn.Linear(width, width, bias=False)
        self.query_norm, self.key_norm = RMSNorm(width // heads), RMSNorm(width // heads)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, is_causal: bool, past: Past | None) -> Tensor:
        batch, length, width = x.shape
        qkv = self.qkv(x)
        if is_handwritten_faster(qkv):
            norms = self.query_norm.weight, self.key_norm.weight
            query, key, value = handwritten.query_key_value(qkv, *norms, cos, sin, self.heads, NORM_EPSILON)
        else:
            query, key, value = qkv.view(batch, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4)  # (B, H, L, E) each
            query = rotate(self.query_norm(query), cos, sin)
            key = rotate(self.key_norm(key), cos, sin)
        dropout = self.dropout if self.training else 0.0
        if past is not None:
            x = past.attend(query, key, value)
        elif length <= handwritten.LONGEST_ATTENTION and is_handwritten_faster(query):
            x = handwritten.attention(query, key, value, dropout, is_causal)
        else:
            x = F.scaled_dot_product_attention(query, key, value, dropout_p=dropout, is_causal=is_causal)
        return self.out(x.transpose(1, 2).reshape(batch, length, width))


class SwiGLU(nn.Module):
    """Shazeer, section 2: (SiLU(x W) * x V) U, as wide as keeps the number of weights of a layer of 4 N."""

    def __init__(self, width: int):
        super().__init__()
        hidden = (8 * width // 3 + 15) // 16 * 16
        self.gate_up = nn.Linear(width, 2 * hidden, bias=False)
        self.down = nn.Linear(hidden, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_up(x).chunk(2, dim=-1)
        return self.down(F.silu(gate) * up)


class Block(nn.Module):
    """Attention and SwiGLU, each on a norm of the residual stream; with a condition (B, N), each shifted, scaled and gated.

    The condition enters by adaLN-zero: Peebles and Xie, section 3.2.
    """

    recomputes = True  # training/loop.py

    def __init__(self, width: int, heads: int, dropout: float, is_conditioned: bool):
        super().__init__()
        self.attention_norm = RMSNorm(width, has_weight=not is_conditioned)
        self.mlp_norm = RMSNorm(width, has_weight=not is_conditioned)
        self.attention, self.mlp = Attention(width, heads, dropout), SwiGLU(width)
        self.dropout = nn.Dropout(dropout)
        self.modulation = nn.Linear(width, 6 * width) if is_conditioned else None
        if is_conditioned:  # adaLN-zero: each block starts as the identity
            nn.init.zeros_(self.modulation.weight)
            nn.init.zeros_(self.modulation.bias)

    def forward(
        self, x: Tensor, cos: Tensor, sin: Tensor, condition: Tensor | None, is_causal: bool, past: Past | None
    ) -> Tensor:
        if self.modulation is None:
            x = x + self.dropout(self.attention(self.attention_norm(x), cos, sin, is_causal, past))
            return x + self.dropout(self.mlp(self.mlp_norm(x)))
        shift1, scale1, gate1, shift2, scale2, gate2 = self.modulation(F.silu(condition)).unsqueeze(1).chunk(6, dim=-1)
        h = self.attention_norm(x) * (1 + scale1) + shift1
        x = x + gate1 * self.dropout(self.attention(h, cos, sin, is_causal, past))
        h = self.mlp_norm(x) * (1 + scale2) + shift2
        return x + gate2 * self.dropout(self.mlp(h))


class Transformer(nn.Module):
    """(B, L, N) -> (B, L, N), normalized at the end. The grid gives each of the L = h * w places its rotary angles."""

    compiles = True  # training/loop.py

    def __init__(
        self,
        width: int,
        depth: int,
        heads: int,
        grid: tuple[int, int],
        dropout: float,
        is_causal: bool,
        is_conditioned: bool = False,
    ):
        super().__init__()
        self.width, self.heads, self.is_causal = width, heads, is_causal
        self.blocks = nn.ModuleList(Block(width, heads, dropout, is_conditioned) for _ in range(depth))
        self.norm = RMSNorm(width)
        angles = rotary_angles(*grid, width // heads)
        self.register_buffer("cos", angles.cos(), persistent=False)
        self.register_buffer("sin", angles.sin(), persistent=False)
        for block in self.blocks:
            for layer in (block.attention.qkv, block.mlp.gate_up):
                nn.init.normal_(layer.weight, std=width**-0.5)
            for layer in (block.attention.out, block.mlp.down):  # GPT-2's scaling of what adds to the residual stream
                nn.init.normal_(layer.weight, std=width**-0.5 / (2 * depth) ** 0.5)

    def forward(
        self,
        x: Tensor,
        condition: Tensor | None = None,
        places: Tensor | None = None,
    ) -> Tensor:
        """`places` (B, L): the grid place of each element of x, for each image its own; None is raster order."""
        if places is None:
            cos, sin = self.cos[: x.shape[1]], self.sin[: x.shape[1]]
        else:
            cos, sin = self.cos[places].unsqueeze(1), self.sin[places].unsqueeze(1)  # (B, 1, L, E / 2)
        cos, sin = cos.to(x.dtype), sin.to(x.dtype)
        for block in self.blocks:
            x = block(x, cos, sin, condition, self.is_causal, None)
        return self.norm(x)

    def hidden_matrices(self) -> list[nn.Parameter]:
        """What Muon optimizes: the matrices inside the blocks."""
        return [p for block in self.blocks for p in block.parameters() if p.ndim == 2]

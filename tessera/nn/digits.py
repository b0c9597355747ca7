"""Numbers by their digits in mixed radix: what embeds them, and a head that predicts some digits given the others.

Sources: the head: Yu et al. (BAR), "Autoregressive Image Generation with Masked Bit Modeling", 2026, arXiv:2602.09024; its
adaptive norm: Peebles and Xie (DiT), 2022, arXiv:2212.09748, section 3.2.
Differs from BAR: digits of any sizes, not bits alone; what is given to the head is its first input, too, beside modulating its
layers, whose gates begin at 1 and not at 0; nothing tells it how many digits are hidden, which it can count.

Shape letters: N width, J digits of a number, S all values of all digits, V values of the largest digit.
"""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tessera.nn.transformer import RMSNorm, SwiGLU


def prime_factors(number: int) -> tuple[int, ...]:
    """Of a number of 1 or more, rising; those of 1 are (1,)."""
    found, factor = [], 2
    while factor * factor <= number:
        if number % factor:
            factor += 1
        else:
            found.append(factor)
            number //= factor
    return (*found, number) if number > 1 or not found else tuple(found)


class Radix(nn.Module):
    """Numbers below the product of the sizes, and their digits, the least significant first; digit j is below sizes[j]."""

    def __init__(self, sizes: Sequence[int]):
        super().__init__()
        place_values = [math.prod(sizes[:place]) for place in range(len(sizes))]
        self.register_buffer("sizes", torch.tensor(sizes), persistent=False)  # (J,)
        self.register_buffer("place_values", torch.tensor(place_values), persistent=False)  # (J,)

    def digits(self, numbers: Tensor) -> Tensor:
        """(...) int64 -> (..., J)"""
        return numbers.unsqueeze(-1) // self.place_values % self.sizes

    def numbers(self, digits: Tensor) -> Tensor:
        """(..., J) -> (...) int64"""
        return (digits * self.place_values).sum(dim=-1)


class DigitEmbedding(nn.Module):
    """(..., J) digits -> (..., N), the sum of a row for each, of a table of the values of digits and not of numbers."""

    def __init__(self, sizes: Sequence[int], width: int, std: float):
        super().__init__()
        self.table = nn.Embedding(sum(sizes), width)
        nn.init.normal_(self.table.weight, std=std)
        first_rows = [sum(sizes[:place]) for place in range(len(sizes))]
        self.register_buffer("first_rows", torch.tensor(first_rows), persistent=False)  # (J,)

    def forward(self, digits: Tensor) -> Tensor:
        return self.table(digits + self.first_rows).sum(dim=-2)


class ModulatedMLP(nn.Module):
    """SwiGLU on a norm of the residual stream, shifted, scaled and gated by a condition, which begins by doing neither."""

    recomputes = True  # training/loop.py

    def __init__(self, width: int, dropout: float):
        super().__init__()
        self.norm, self.mlp = RMSNorm(width, has_weight=False), SwiGLU(width)
        self.dropout = nn.Dropout(dropout)
        self.modulation = nn.Linear(width, 3 * width)
        nn.init.zeros_(self.modulation.weight)
        nn.init.zeros_(self.modulation.bias)

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        """Both (..., N). Peebles and Xie, section 3.2."""
        shift, scale, gate = self.modulation(F.silu(condition)).chunk(3, dim=-1)
        return x + (1 + gate) * self.dropout(self.mlp(self.norm(x) * (1 + scale) + shift))


class DigitHead(nn.Module):
    """(..., N) what is thought of a number, and those of its digits that are not hidden -> (..., S) logits of all digits.

    Those of digit j stand behind those of the digits before it; `by_digit` tells them apart.
    """

    compiles = True  # training/loop.py

    def __init__(self, sizes: Sequence[int], width: int, depth: int, dropout: float):
        super().__init__()
        self.sizes = tuple(sizes)
        # a row more for each digit: that it is hidden; together they are as large as what is thought
        self.embedding = DigitEmbedding([size + 1 for size in sizes], width, std=len(sizes) ** -0.5)
        self.blocks = nn.ModuleList(ModulatedMLP(width, dropout) for _ in range(depth))
        self.norm = RMSNorm(width, has_weight=False)
        self.out = nn.Linear(width, sum(sizes))
        nn.init.normal_(self.out.weight, std=width**-0.5)
        self.register_buffer("hidden_digits", torch.tensor(self.sizes), persistent=False)  # (J,)
        for block in self.blocks:
            nn.init.normal_(block.mlp.gate_up.weight, std=width**-0.5)
            nn.init.normal_(block.mlp.down.weight, std=width**-0.5 / depth**0.5)

    def forward(self, thought: Tensor, digits: Tensor, is_hidden: Tensor) -> Tensor:
        """thought (..., N), digits (..., J), of which those that are hidden may be anything."""
        x = thought + self.embedding(torch.where(is_hidden, self.hidden_digits, digits))
        for block in self.blocks:
            x = block(x, thought)
        return self.out(self.norm(x))

    def by_digit(self, logits: Tensor) -> Tensor:
        """(..., S) -> (..., J, V), -inf for values that a digit does not have."""
        largest = max(self.sizes)
        if min(self.sizes) == largest:
            return logits.unflatten(-1, (len(self.sizes), largest))
        parts = logits.split(self.sizes, dim=-1)
        return torch.stack([F.pad(part, (0, largest - part.shape[-1]), value=-torch.inf) for part in parts], dim=-2)

    def hidden_matrices(self) -> list[nn.Parameter]:
        """What Muon optimizes: the matrices inside the blocks."""
        return [p for block in self.blocks for p in block.parameters() if p.ndim == 2]

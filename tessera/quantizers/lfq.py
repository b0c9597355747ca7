"""Lookup-free quantization: each latent channel becomes its sign, and the signs are the bits of the index.

There is no codebook to search, so 2**20 codes cost no more than 2**8. Two entropies keep all of them in use: that of each
latent's soft assignment is made small, that of the batch's mean assignment large.

Source: Yu et al. (MAGVIT-v2), "Language Model Beats Diffusion", 2023, arXiv:2310.05737, section 3.1.
Differs from it: soft assignments are independent per bit, so the first entropy is an exact sum over bits; the second is
taken over groups of `entropy_group_bits` bits, which is exact for one group and otherwise counts them as independent.
The temperature is much higher than the 0.01 in use elsewhere, at which assignments are hard and give hardly a gradient.
"""

import itertools
from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from tessera.components import Params, Weight
from tessera.contracts import Quantized
from tessera.nn.nearest import require_others
from tessera.nn.processes import over_processes
from tessera.nn.straight_through import straight_through

Temperature = Annotated[float, Field(ge=1e-4, le=1e4)]


class Config(Params):
    kind: Literal["lfq"] = "lfq"
    code_dim: Annotated[int, Field(ge=1, le=30)] = 10  # bits per token
    entropy_weight: Weight = 0.03
    diversity_gamma: Weight = 1.0  # of the batch's entropy, relative to the tokens'
    entropy_temperature: Temperature = 0.3  # of soft assignments: exp(-||z - code||^2 / temperature)
    entropy_group_bits: Annotated[int, Field(ge=1, le=20)] = 10
    commitment_weight: Weight = 0.05

    @property
    def codebook_size(self) -> int:
        return 2**self.code_dim

    @property
    def residual_scale(self) -> float:
        """Signs leave latents in [-2, 2] over by at most 1, so each level of a residual quantizer is half the last."""
        return 0.5


class Quantizer(nn.Module):
    indices_per_code = 1

    def __init__(self, config: Config):
        super().__init__()
        self.config = config
        self.codebook_size = config.codebook_size
        self.register_buffer("place_values", 2 ** torch.arange(config.code_dim), persistent=False)  # (D,)

    def forward(self, z: Tensor) -> Quantized:
        """Yu et al., section 3.1. z: (B, D, h, w). Signs and entropies are float32 also under autocast."""
        with torch.autocast(z.device.type, enabled=False):
            z = z.float()
            is_positive = z > 0
            codes = 2 * is_positive.float() - 1
            indices = (is_positive * self.place_values.view(1, -1, 1, 1)).sum(dim=1)  # (B, h, w)
            loss = self.config.commitment_weight * F.mse_loss(z, codes)
            if self.config.entropy_weight:
                of_tokens, of_batch = self.entropies(z)
                loss = loss + self.config.entropy_weight * (of_tokens - self.config.diversity_gamma * of_batch)
            return Quantized(straight_through(z, codes), indices, loss)

    def entropies(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """Yu et al., section 3.1: E[H(q(z))] and H(E[q(z)]) of soft assignments q, in nats, both at most D log 2."""
        flat = z.permute(0, 2, 3, 1).flatten(0, 2)  # (N, D)
        logits = 4 * flat / self.config.entropy_temperature  # ||z + 1||^2 - ||z - 1||^2 = 4 z
        on, off = torch.sigmoid(logits), torch.sigmoid(-logits)
        of_tokens = (F.softplus(-logits) * on + F.softplus(logits) * off).sum(dim=1).mean()
        groups = zip(
            on.split(self.config.entropy_group_bits, dim=1),
            off.split(self.config.entropy_group_bits, dim=1),
            strict=True,
        )
        of_batch = sum(_entropy(over_processes(_mean_assignment(*group))) for group in groups)
        return of_tokens, of_batch

    def indices_to_codes(self, indices: Tensor) -> Tensor:
        """(B, h, w) int64 -> (B, D, h, w) float."""
        is_positive = indices.unsqueeze(1) // self.place_values.view(1, -1, 1, 1) % 2
        return 2 * is_positive.float() - 1

    def neighbors(self, indices: Tensor, count: int) -> Tensor:
        """(N,) -> (N, count) the other codes nearest to each, nearest first: those of fewest other bits."""
        require_others(self.codebook_size, count)
        bits = self.place_values.tolist()
        flips = (sum(some) for size in range(1, len(bits) + 1) for some in itertools.combinations(bits, size))
        flips = torch.tensor(list(itertools.islice(flips, count)), device=indices.device)
        return indices.unsqueeze(1) ^ flips


def _joint(on: Tensor, off: Tensor) -> Tensor:
    """(N, g), (N, g) -> (N, 2**g) the probability of each combination of bits, for a token's independent bits."""
    joint = on.new_ones(on.shape[0], 1)
    for bit in range(on.shape[1]):
        joint = torch.cat([joint * off[:, bit : bit + 1], joint * on[:, bit : bit + 1]], dim=1)
    return joint


def _mean_assignment(on: Tensor, off: Tensor) -> Tensor:
    """(N, g), (N, g) -> (2**g,) the mean over tokens of `_joint`.

    A mean of outer products is one matrix product of the two halves, so (N, 2**g) never exists.
    """
    half = on.shape[1] // 2
    low, high = _joint(on[:, :half], off[:, :half]), _joint(on[:, half:], off[:, half:])
    return (high.T @ low).flatten() / on.shape[0]


def _entropy(probs: Tensor) -> Tensor:
    return -(probs * probs.clamp_min(1e-20).log()).sum()

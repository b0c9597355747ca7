"""Distributions that are known in full, for priors to learn: grids of 2x2 with 4 codes, another one for each of two labels."""

import itertools

import torch
from torch import Tensor

from tessera.contracts import TokenBatch, TokenSpec

GRIDS = torch.tensor(list(itertools.product(range(4), repeat=4)))  # (256, 4): every grid


def spec(codebook_size=4, shape=(2, 2, 2), num_classes=2) -> TokenSpec:
    depth = shape[0]
    return TokenSpec(
        codebook_size=codebook_size,
        latent_shape=shape,
        index_grid=shape[1:],
        num_classes=num_classes,
        class_counts=(1,) * num_classes,
        latent_mean=(0.0,) * depth,
        latent_std=(1.0,) * depth,
        tokenizer_fingerprint="0" * 64,
    )


class Rows:
    """Training data: every row of two tensors, as `fit` asks for them."""

    def __init__(self, tokens, labels):
        self.tokens, self.labels = tokens, labels

    def __len__(self):
        return len(self.labels)

    def stored(self, rows, generator=None):
        return TokenBatch(self.tokens[rows], self.labels[rows])

    def batch_of(self, stored):
        return stored


def known_distribution() -> Tensor:
    """(2, 256): the probability of each grid, given the label."""
    generator = torch.Generator().manual_seed(0)
    return torch.stack([torch.randn(256, generator=generator).mul(1.5).softmax(dim=0) for _ in range(2)])


def few_grids() -> Tensor:
    """(2, 256): the same, with 98 % on four grids of each label: quick to learn, and no two places are independent."""
    generator = torch.Generator().manual_seed(0)
    truth = torch.full((2, 256), 0.02 / 256)
    for label in range(2):
        truth[label, torch.randperm(256, generator=generator)[:4]] += 0.98 * torch.tensor([0.4, 0.3, 0.2, 0.1])
    return truth


def draws(truth: Tensor, number: int = 40_000) -> Rows:
    labels = torch.arange(number) % 2
    generator = torch.Generator().manual_seed(1)
    rows = torch.multinomial(truth, number // 2, replacement=True, generator=generator).T.flatten()
    return Rows(GRIDS[rows].view(-1, 2, 2), labels)


def total_variation(a: Tensor, b: Tensor) -> float:
    return 0.5 * float((a - b).abs().sum())

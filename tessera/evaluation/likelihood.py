"""What a prior makes of images: its loss on them, and their bits where it has a likelihood."""

import numpy as np
import torch
from torch import Tensor, nn

from tessera import seeding
from tessera.artifacts.samples import quotas
from tessera.artifacts.tokens import Tokens
from tessera.contracts import Objective, TokenBatch

BATCH = 500  # images at a time; fixed, because it decides the noise


def proportional_rows(labels: np.ndarray, number: int, seed: int, purpose: str = "follow_rows") -> np.ndarray:
    """(number,) rows of a split, a stratified sample without replacement of its (N,) labels; in ascending order.

    purpose: the random stream that they are drawn from."""
    generator = seeding.numpy_generator(seed, purpose)
    wanted = quotas(number, tuple(np.bincount(labels)))
    rows = [generator.permutation(np.flatnonzero(labels == label))[:count] for label, count in enumerate(wanted)]
    return np.sort(np.concatenate(rows))


@torch.no_grad()
def mean_loss(objective: Objective, dataset: Tokens, rows: Tensor, seed: int) -> float:
    """The training loss, without dropout, of the first views of (n,) rows: nats per token, or squared error."""
    objective.eval()
    torch.manual_seed(seed)
    total = 0.0
    for piece in rows.split(BATCH):
        total += float(objective(_batch(objective, dataset, piece), "prior", 0)["loss"]) * len(piece)
    return total / len(rows)


def bits_of_each(model: nn.Module, dataset: Tokens, rows: Tensor, seed: int) -> Tensor:
    """(n,) bits of the first views of (n,) rows under a prior that has `bits`."""
    model.eval()
    generator = seeding.generator(seed, "bits", device=next(model.parameters()).device)
    found = torch.empty(
        len(rows), dtype=torch.float64
    )  # in one piece: many small ones keep a process's memory from shrinking
    for into, piece in zip(found.split(BATCH), rows.split(BATCH), strict=True):
        into.copy_(model.bits(*_batch(model, dataset, piece), generator))
    return found


def _batch(module: nn.Module, dataset: Tokens, rows: Tensor) -> TokenBatch:
    device = next(module.parameters()).device
    return TokenBatch(*(tensor.to(device) for tensor in dataset.batch(rows)))

"""Counts and random rows of all latents of a step, however it is divided into micro-batches and processes.

A step's images lie in order of micro-batch, then of process (training/reading.py): that numbers its rows.
"""

from typing import Protocol, runtime_checkable

import torch
import torch.distributed as dist
from torch import Tensor

from tessera.nn.processes import all_reduce

NOISE = 1e-3  # of the deviation: a trace, by which repeated rows part


@runtime_checkable
class MovesOncePerStep(Protocol):
    """A module whose buffers move by what it sees in training: the micro-batches of a step, of which it is told, together."""

    micro_batches: int


def count(indices: Tensor, size: int) -> Tensor:
    """(M,) int64 in [0, size) -> (size,) float32, how often each occurs. As bincount, which would wait for the device."""
    ones = torch.ones(len(indices), device=indices.device)
    return torch.zeros(size, device=indices.device).index_add_(0, indices, ones)


class Draw:
    """`number` random rows among all those of a step, distinct while they last; equal in all processes.

    Every process makes one at the first micro-batch and shows it every micro-batch.
    """

    def __init__(self, number: int, flat: Tensor, micro_batches: int):
        """flat: (M, D) the rows of the first micro-batch of this process; all others have as many."""
        self.share, self.world, self.rank = len(flat), 1, 0
        if dist.is_initialized():
            self.world, self.rank = dist.get_world_size(), dist.get_rank()
        total = self.share * self.world * micro_batches
        self._number_seen = 0
        orders = [torch.randperm(total, device=flat.device) for _ in range(-(-number // total))]
        self._order = torch.cat(orders)[:number]
        self._noise = torch.randn(number, flat.shape[1], device=flat.device) if number > total else None
        for drawn in (self._order, self._noise):
            if drawn is not None and dist.is_initialized():  # the generators of processes differ
                dist.broadcast(drawn, src=0)
        self._rows = flat.new_zeros(number, flat.shape[1])
        self._moments = torch.zeros(2, flat.shape[1], dtype=torch.double, device=flat.device)
        self._is_whole, self._std = total == self.share, None

    def see(self, flat: Tensor) -> None:
        """The rows of one more micro-batch of this process."""
        part = self._number_seen * self.world + self.rank
        is_here = (self._order // self.share == part).unsqueeze(1)
        self._rows = torch.where(is_here, flat[self._order % self.share], self._rows)
        self._number_seen += 1
        if self._noise is None:
            return
        if self._is_whole:
            self._std = flat.std(dim=0)
        else:
            wide = flat.double()
            self._moments += torch.stack([wide.sum(dim=0), wide.square().sum(dim=0)])

    def rows(self) -> Tensor:
        """(number, D)"""
        all_reduce(self._rows)
        if self._noise is None:
            return self._rows
        if not self._is_whole:
            all_reduce(self._moments)
            total = self.share * self.world * self._number_seen
            mean, square = self._moments / total
            self._std = ((square - mean.square()).clamp_min(0) * total / (total - 1)).sqrt().float()
        return self._rows + NOISE * self._std * self._noise

"""The batches of a training, read ahead: which rows a step takes, and a thread that has them ready before it."""

import time
from collections.abc import Iterator
from functools import lru_cache
from typing import Any, Protocol

import torch
from torch import Tensor

from tessera import seeding
from tessera.artifacts.background import read_ahead

STEPS_AHEAD = 3
WORTH_A_THREAD = 2**20  # bytes of a step's rows


class Data(Protocol):
    """What a part is trained on. A batch is read by `stored`, in a thread, and becomes what a step is given by `batch_of`."""

    def __len__(self) -> int: ...
    def stored(self, rows: Tensor, generator: torch.Generator | None) -> Any: ...  # a NamedTuple of tensors of the host
    def batch_of(self, stored: Any) -> Any: ...  # from that on any device: a NamedTuple, on the same device
    def on(self, device: torch.device) -> "Data": ...  # the same data, held there; asked for by data_on_device


def rows_of_step(step: int, batch_size: int, num_rows: int, seed: int) -> Tensor:
    """(batch_size,) the rows of a step: consecutive pieces of one seeded permutation per epoch. A function of its
    arguments alone, so there is no sampler state to save."""
    pieces, position, wanted = [], step * batch_size, batch_size
    while wanted:
        epoch, offset = divmod(position, num_rows)
        piece = _order_of_epoch(num_rows, seed, epoch)[offset : offset + wanted]
        pieces.append(piece)
        position += len(piece)
        wanted -= len(piece)
    return torch.cat(pieces)


@lru_cache(maxsize=2)  # at the border of two epochs a step has rows of both; 10**7 rows take half a second to draw
def _order_of_epoch(num_rows: int, seed: int, epoch: int) -> Tensor:
    return torch.randperm(num_rows, generator=seeding.generator(seed, "epoch", epoch))


class Reader:
    """The micro-batches of the steps from `start` on, on the device, of one process's share of the rows.

    Bytes travel as they are stored, and become floats on the device. Its thread does what needs no device: while a step
    computes, the rows of the next ones are gathered and, for a GPU, put where it can fetch them by itself.
    """

    def __init__(
        self,
        data: Data,
        device: torch.device,
        *,
        steps: range,
        batch_size: int,
        micro_batches: int,
        seed: int,
        rank: int = 0,
        processes: int = 1,
    ):
        self.data, self.device, self.steps, self.seed = data, device, steps, seed
        self.batch_size, self.shares, self.rank = batch_size, (micro_batches, processes, -1), rank
        self.seconds_waited = 0.0  # by the training, for rows that were not there yet

    def rows(self, step: int) -> Tensor:
        """(micro-batches, share) what this process takes of a step."""
        return rows_of_step(step, self.batch_size, len(self.data), self.seed).view(self.shares)[:, self.rank]

    def __iter__(self) -> Iterator[list[Any]]:
        is_ahead = self._is_worth_a_thread()
        source = read_ahead(self._stored, self.steps, STEPS_AHEAD) if is_ahead else map(self._stored, self.steps)
        for _ in self.steps:
            began = time.perf_counter()
            stored = next(source)
            self.seconds_waited += time.perf_counter() - began
            yield [self.data.batch_of(_to(self.device, each)) for each in stored]

    def _is_worth_a_thread(self) -> bool:
        """Handing over costs a third of a millisecond: on a CPU more than it takes to gather a few small images."""
        if self.device.type != "cpu" or not self.steps:
            return True
        return sum(tensor.nbytes for each in self._stored(self.steps[0]) for tensor in each) >= WORTH_A_THREAD

    def _stored(self, step: int) -> list[Any]:
        draws = seeding.generator(self.seed, "batch", step, self.rank)
        found = [self.data.stored(rows, draws) for rows in self.rows(step)]
        if self.device.type == "cuda":  # from pinned memory it is copied while other work goes on
            found = [type(each)(*(tensor.pin_memory() for tensor in each)) for each in found]
        return found


def _to(device: torch.device, stored: Any) -> Any:
    return type(stored)(*(tensor.to(device, non_blocking=True) for tensor in stored))

"""What processes that share their work tell each other: sums and means of tensors where they lie, and all else on their hosts.

With one process each of these is the value itself, and nobody is asked.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from tessera.nn.straight_through import straight_through

Item, Made = TypeVar("Item"), TypeVar("Made")


def all_reduce(tensor: Tensor) -> None:
    """The sum over all processes, in place."""
    if dist.is_initialized():
        dist.all_reduce(tensor)


def over_processes(share: Tensor) -> Tensor:
    """The mean over all processes in value. Each passes on the gradient of its own share; DDP takes their mean."""
    if not dist.is_initialized():
        return share
    total = share.detach().clone()
    dist.all_reduce(total)
    return straight_through(share, total / dist.get_world_size())


class Processes:
    """All processes, on one machine or several. They speak on their hosts, so that no device is waited for."""

    def __init__(self, number: int):
        self.number = number
        self.group = dist.new_group(backend="gloo") if number > 1 else None
        self.rank = dist.get_rank() if number > 1 else 0
        self.is_main = self.rank == 0

    def any(self, *flags: Callable[[], bool]) -> list[bool]:
        """Of each flag whether it is up in any process: what they do together, they must do at the same step."""
        here = [flag() for flag in flags]
        if self.group is None:
            return here
        seen = torch.tensor(here, dtype=torch.float)
        dist.all_reduce(seen, group=self.group)
        return [bool(each) for each in seen.tolist()]

    def from_main(self, value: Made) -> Made:
        """The first process's value, in all of them: plain, and small. What the others give is not looked at."""
        if self.group is None:
            return value
        values = [value]
        dist.broadcast_object_list(values, src=0, group=self.group)
        return values[0]

    def tensors_from_main(self, tensors: dict[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
        """The first process's tensors, on the CPU, in all of them: one after the other, for those that keep a part of each."""
        if self.group is None:
            yield from tensors.items()
            return
        shapes = self.from_main({name: (tensor.shape, tensor.dtype) for name, tensor in tensors.items()})
        for name, (shape, dtype) in shapes.items():
            received = tensors[name].contiguous() if self.is_main else torch.empty(shape, dtype=dtype)
            dist.broadcast(received, src=0, group=self.group)
            yield name, received

    def part(self, items: Sequence[Item]) -> Sequence[Item]:
        """Those of the items that `in_order` gives to this process."""
        return items[self.rank :: self.number]

    def in_order(self, items: Sequence[Item], work: Callable[[Item], Made]) -> Iterator[Made]:
        """work(item) of all items, in order, in the first process; each works on its part, and the others yield nothing."""
        if self.group is None:
            yield from map(work, items)
            return
        for start in range(0, len(items), self.number):
            some = items[start : start + self.number]
            made: Any = work(some[self.rank]) if self.rank < len(some) else None
            gathered = [None] * self.number if self.is_main else None
            dist.gather_object(made, gathered, group=self.group)
            yield from (gathered or ())[: len(some)]

"""What the processes of one training tell each other on their hosts, so that no device is waited for."""

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


class Processes:
    """All processes of a training, on one machine or several; alone, nothing is asked of anybody."""

    def __init__(self, number: int):
        self.group = dist.new_group(backend="gloo") if number > 1 else None
        self.is_main = self.group is None or dist.get_rank() == 0

    def any(self, flag: Callable[[], bool]) -> bool:
        """Whether the flag is up in any process: all of them must stop at the same step."""
        here = flag()
        if self.group is None:
            return here
        seen = torch.tensor(float(here))
        dist.all_reduce(seen, group=self.group)
        return bool(seen)

    def from_main(self, value: Any) -> Any:
        """The first process's value, in all of them: plain, and small."""
        if self.group is None:
            return value
        values = [value]
        dist.broadcast_object_list(values, src=0, group=self.group)
        return values[0]

    def tensors_from_main(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """The first process's tensors, on the CPU, in all of them; what the others give is not looked at."""
        if self.group is None:
            return tensors
        shapes = self.from_main({name: (tensor.shape, tensor.dtype) for name, tensor in tensors.items()})
        received = {}
        for name, (shape, dtype) in shapes.items():
            received[name] = tensors[name].contiguous() if self.is_main else torch.empty(shape, dtype=dtype)
            dist.broadcast(received[name], src=0, group=self.group)
        return received

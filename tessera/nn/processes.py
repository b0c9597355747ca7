"""Sums and means over the processes of a training; the value itself where there is one process."""

import torch.distributed as dist
from torch import Tensor

from tessera.nn.straight_through import straight_through


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

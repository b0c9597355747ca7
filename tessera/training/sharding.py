"""One training's weights, gradients, optimizer state and weight average, divided among its processes: each keeps one N-th.

A block's weights are gathered while the block computes, in the forward and again in the backward pass, and its gradients are
added up where their weights are kept. Whatever leaves the training (checkpoints, validations, the result) is gathered
whole, so that nobody behind it notices.

Sources: Rajbhandari et al., "ZeRO", 2019, arXiv:1910.02054, section 5 (its third stage); Zhao et al., "PyTorch FSDP", 2023,
arXiv:2304.11277; of that the second version, torch's fully_shard, which divides each tensor by its rows.
Differs from them: the weight average is divided as well.
"""

import copy

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from tessera.bases.optimization import PriorTraining, Training


def is_sharded(settings: Training, processes: int) -> bool:
    """Whether weights are to be divided; a single process keeps all there is anyway."""
    return isinstance(settings, PriorTraining) and settings.sharding == "full" and processes > 1


def shard(objective: nn.Module, average: nn.Module, device: torch.device) -> None:
    """Leave this process its shards, on the device, of an objective and of its model's average, equal in all processes.

    They may lie on the CPU until then: a device never holds more of them whole than a block at a time and what is no block.
    """
    # By torch itself, where Accelerate would: its FullyShardedDataParallelPlugin calls the same function, but on GPUs alone.
    # On a CPU, where this is tested, Accelerate 1.15 passes over the plugin in silence and takes DDP.
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    for weight in objective.parameters():
        weight.data = weight.data.contiguous()  # a kernel that is laid out channels last has no rows to be cut into
    for block in objective.modules():
        if getattr(block, "recomputes", False):  # what is run again as one is gathered as one
            fully_shard(block, mesh=mesh)
    fully_shard(objective, mesh=mesh)  # the rest of it
    average.load_state_dict(
        {name: each.detach().clone() for name, each in objective.model.state_dict().items()}, assign=True
    )


def whole(tensor: Tensor) -> Tensor:
    """The tensor itself, or that of which each process has a shard: all processes must ask for it together."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def shard_like(tensor: Tensor, like: Tensor) -> Tensor:
    """This process's shard of a tensor that all processes have whole, where `like` is sharded; otherwise the tensor itself."""
    if not isinstance(like, DTensor):
        return tensor
    return distribute_tensor(tensor.to(like.device), like.device_mesh, like.placements, src_data_rank=None)


def gathered(model: nn.Module, is_main: bool) -> nn.Module | None:
    """The model with its weights whole, in the first process, None in the others: all must ask together.

    It is the model itself if that is whole.
    """
    state = model.state_dict()
    if not any(isinstance(tensor, DTensor) for tensor in state.values()):
        return model if is_main else None
    found = copy.deepcopy(model) if is_main else None
    weights = {}
    for name, tensor in state.items():
        each = whole(tensor)
        if is_main:
            weights[name] = each
    if found is not None:
        found.load_state_dict(weights, assign=True)
    return found

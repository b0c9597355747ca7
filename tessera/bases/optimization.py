"""How weights move: the settings of one training, its learning-rate schedule, its optimizers, its weight average.

Sources: AdamW: Loshchilov and Hutter, 2017, arXiv:1711.05101, algorithm 2; Muon: nn/muon.py; the schedule: Loshchilov and
Hutter (SGDR), 2016, arXiv:1608.03983, equation 5, one cycle of it after a linear warm-up; the average: Polyak and
Juditsky, 1992, with exponential weights.
"""

import math
from typing import Annotated, Literal, Self

import torch
from pydantic import Field, model_validator
from torch import nn
from torch.optim import Optimizer

from tessera.components import AddedKey, Fraction, Params, added_later
from tessera.nn.muon import Muon

Rate = Annotated[float, Field(ge=1e-8, le=10)]
Decay = Annotated[float, Field(ge=0, lt=1)]


class Training(Params):
    """One training. All amounts are per optimizer step and global: the same on one device or many."""

    num_steps: Annotated[int, Field(ge=1)]
    batch_size: Annotated[int, Field(ge=1)] = 64  # images per optimizer step, over all devices
    gradient_accumulation: Annotated[int, Field(ge=1)] = 1  # micro-batches per step; divides batch_size
    optimizer: Literal["adamw", "muon"] = "adamw"
    learning_rate: Rate = 1e-3
    muon_learning_rate: Rate = 2e-3  # of the hidden matrices, when optimizer is muon; scaled to match AdamW's RMS
    betas: tuple[Decay, Decay] = (0.9, 0.95)
    weight_decay: Annotated[float, Field(ge=0, le=100)] = 0.05  # of matrices and kernels only
    warmup_fraction: Fraction = 0.03  # of num_steps, linear from 0
    final_learning_rate_fraction: Fraction = 0.05  # the cosine ends here
    gradient_clip: Annotated[float, Field(ge=1e-6, le=1e6)] = 1.0  # largest gradient norm
    ema_decay: Decay = 0.998  # of the weight average that is kept; 0: the raw weights
    precision: Literal["fp32", "bf16"] = "fp32"  # bf16: autocast of the networks; losses and optimizer stay fp32
    compile: bool = False  # torch.compile of the networks: minutes at the start, faster steps on a GPU
    gradient_checkpointing: bool = False  # blocks are run again in the backward pass: a third slower, far less memory
    data_on_device: bool = False  # the training data lie on the GPU as stored (uint8 images), for sets that fit there
    # which of these keys are left to the machine: the faster precision, and whether compiling pays
    by_speed: AddedKey[Annotated[tuple[Literal["precision", "compile"], ...], Field(min_length=1)]] = None


class PriorTraining(Training):
    """The training of a prior that learns in one phase: the processes that share it may share its weights too."""

    # full: each process keeps its share of weights, average, gradients and optimizer state (training/sharding.py); one process
    # has all of them as ever
    sharding: Literal["none", "full"] = added_later("none")

    @model_validator(mode="after")
    def _can_be_sharded(self) -> Self:
        if self.sharding == "full" and self.optimizer == "muon":
            raise ValueError(
                "optimizer muon needs whole matrices, and sharding full divides them among the processes: write optimizer: "
                "adamw, or sharding: none"
            )
        return self


def learning_rate_factor(step: int, settings: Training) -> float:
    """SGDR, equation 5, from 1 to `final_learning_rate_fraction` after a linear warm-up; step counts from 0."""
    warmup = settings.warmup_fraction * settings.num_steps
    if step < warmup:
        return (step + 1) / (warmup + 1)
    progress = (step - warmup) / max(1.0, settings.num_steps - warmup)
    floor = settings.final_learning_rate_fraction
    return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * progress))


def optimizers_for(module: nn.Module, settings: Training) -> list[Optimizer]:
    """AdamW on the trainable parameters of `module`; with optimizer: muon, Muon on the hidden matrices among them.

    A network names these in a method `hidden_matrices`: neither embeddings, norms and biases nor the layers of its entry and
    exit. Weight decay acts on parameters of two and more dimensions, except embeddings.
    """
    embeddings = {id(layer.weight) for layer in module.modules() if isinstance(layer, nn.Embedding)}
    hidden: list[nn.Parameter] = []
    if settings.optimizer == "muon":
        networks = [part for part in module.modules() if hasattr(part, "hidden_matrices")]
        hidden = [p for network in networks for p in network.hidden_matrices() if p.requires_grad]
    muon = {id(p) for p in hidden}
    rest = [p for p in module.parameters() if p.requires_grad and id(p) not in muon]
    decayed = [p for p in rest if p.ndim >= 2 and id(p) not in embeddings]
    kept = [p for p in rest if p.ndim < 2 or id(p) in embeddings]
    groups = [{"params": decayed, "weight_decay": settings.weight_decay}, {"params": kept, "weight_decay": 0.0}]
    groups = [group for group in groups if group["params"]]
    optimizers: list[Optimizer] = [
        torch.optim.AdamW(groups, lr=settings.learning_rate, betas=settings.betas, fused=True)
    ]
    if muon:
        optimizers.append(Muon(hidden, lr=settings.muon_learning_rate, weight_decay=settings.weight_decay))
    return optimizers


@torch.no_grad()
def update_average(average: nn.Module, model: nn.Module, decay: float, step: int) -> None:
    """average = d * average + (1 - d) * model with d = min(decay, (1 + step) / (10 + step)), as in TensorFlow's
    ExponentialMovingAverage; buffers are copied."""
    decay = min(decay, (1 + step) / (10 + step))
    averages, weights = list(average.parameters()), list(model.parameters())
    torch._foreach_lerp_(averages, [weight.detach() for weight in weights], 1 - decay)
    for kept, current in zip(average.buffers(), model.buffers(), strict=True):
        kept.copy_(current)

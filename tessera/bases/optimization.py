"""How weights move: the settings of one training, its learning-rate schedule, its optimizers, its weight average.

Muon orthogonalises the update of each hidden matrix, and of the kernels that a denoiser names; everything else (embeddings,
norms, biases, output heads, other convolutions) is AdamW's (Loshchilov & Hutter, arXiv:1711.05101).
"""

import math
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.optim import Optimizer

from tessera.components import Params

Positive = Annotated[float, Field(gt=0)]
Fraction = Annotated[float, Field(ge=0, le=1)]


class Training(Params):
    """One training. All amounts are per optimizer step and global: the same on one device or many."""

    num_steps: Annotated[int, Field(ge=1)]
    batch_size: Annotated[int, Field(ge=1)] = 64  # images per optimizer step, over all devices
    gradient_accumulation: Annotated[int, Field(ge=1)] = 1  # micro-batches per step; divides batch_size
    optimizer: Literal["adamw", "muon"] = "adamw"
    learning_rate: Positive = 1e-3
    muon_learning_rate: Positive = 2e-3  # of the hidden matrices, when optimizer is muon; scaled to match AdamW's RMS
    betas: tuple[Fraction, Fraction] = (0.9, 0.95)
    weight_decay: Annotated[float, Field(ge=0)] = 0.05  # of matrices and kernels only
    warmup_fraction: Fraction = 0.03  # of num_steps, linear from 0
    final_learning_rate_fraction: Fraction = 0.05  # the cosine ends here
    gradient_clip: Positive = 1.0  # largest gradient norm
    ema_decay: Annotated[float, Field(ge=0, lt=1)] = 0.998  # of the weight average that is kept; 0: the raw weights
    precision: Literal["fp32", "bf16"] = "fp32"  # bf16: autocast of the networks; losses and optimizer stay fp32
    compile: bool = False  # torch.compile of the networks: minutes at the start, faster steps on a GPU
    gradient_checkpointing: bool = False  # blocks are run again in the backward pass: a third slower, far less memory
    data_on_device: bool = False  # the training data lie on the GPU as stored (uint8 images), for sets that fit there


def learning_rate_factor(step: int, settings: Training) -> float:
    """Linear warm-up, then half a cosine down to `final_learning_rate_fraction`; step counts from 0."""
    warmup = settings.warmup_fraction * settings.num_steps
    if step < warmup:
        return (step + 1) / (warmup + 1)
    progress = (step - warmup) / max(1.0, settings.num_steps - warmup)
    floor = settings.final_learning_rate_fraction
    return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * progress))


def optimizers_for(module: nn.Module, settings: Training) -> list[Optimizer]:
    """AdamW on the trainable parameters of `module`; with optimizer: muon, Muon on the hidden matrices among them.

    Which these are, a network says itself, by a method `hidden_matrices`. Weight decay acts on parameters of two and more
    dimensions, except embeddings.
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


class Muon(Optimizer):
    """Momentum whose update of a matrix, or of a convolution's kernel, is replaced by its nearest semi-orthogonal one, nearly.

    Source: Jordan et al., "Muon: An optimizer for hidden layers in neural networks", 2024 (Nesterov momentum, five
    Newton-Schulz iterations); Liu et al., 2025, arXiv:2502.16982, section 2.2 (the factor 0.2 sqrt(max(A, B)), under which
    AdamW's learning rates and decay serve).
    Differs from it: on a CPU the iterations are taken in float32. torch.optim.Muon, which this equals otherwise, takes them
    in bfloat16 everywhere, and a CPU without instructions for that type needs 10 to 80 times as long (docs/log.md).
    """

    def __init__(self, matrices: list[nn.Parameter], lr: float, weight_decay: float, momentum: float = 0.95):
        super().__init__(matrices, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        for group in self.param_groups:
            alike: dict[Any, list[nn.Parameter]] = {}
            for matrix in group["params"]:
                if matrix.grad is not None:
                    alike.setdefault((matrix.shape, matrix.device), []).append(matrix)
            for matrices in alike.values():  # one product of a stack is faster than one after the other
                self._move(matrices, group)

    def _move(self, matrices: list[nn.Parameter], group: dict[str, Any]) -> None:
        for matrix in matrices:
            if not self.state[matrix]:
                self.state[matrix]["momentum_buffer"] = torch.zeros_like(matrix)
        gradients = [matrix.grad for matrix in matrices]
        averages = [self.state[matrix]["momentum_buffer"] for matrix in matrices]
        torch._foreach_lerp_(averages, gradients, 1 - group["momentum"])
        updates = torch.stack(torch._foreach_lerp(gradients, averages, group["momentum"]))
        rows = updates.flatten(2)  # a kernel (N, M, k, k) is a matrix (N, M k^2)
        rate = 0.2 * max(rows.shape[1:]) ** 0.5 * group["lr"]
        rows = orthogonalized(rows, torch.bfloat16 if rows.is_cuda else torch.float32).to(updates.dtype)
        torch._foreach_mul_(matrices, 1 - group["lr"] * group["weight_decay"])
        torch._foreach_add_(matrices, list(rows.view_as(updates).unbind()), alpha=-rate)


def orthogonalized(matrices: Tensor, dtype: torch.dtype) -> Tensor:
    """(..., A, B) -> the same shape in dtype, with the same singular vectors and every singular value near 1 (0.7 to 1.2).

    x <- p(g) x with g = x x^T and p(g) = a + b g + c g^2 drives singular values in (0, 1] there; a, b, c are Jordan's.
    All p(g) commute, so the five of them can be multiplied first, each g being p^2 times the one before, and meet the
    matrix once: less work where one side is much shorter. It squares the rounding, which bfloat16 cannot afford.
    """
    x = matrices.to(dtype, copy=True)
    is_tall = x.shape[-2] > x.shape[-1]
    if is_tall:  # the products are then of the shorter side
        x = x.mT
    x /= torch.linalg.matrix_norm(x, keepdim=True).clamp_min(1e-7)
    if dtype == torch.bfloat16 or x.shape[-1] < 1.5 * x.shape[-2]:
        for _ in range(5):
            gram = x @ x.mT
            x = _step_of(gram) @ x
    else:
        gram = x @ x.mT
        product = power = _step_of(gram)
        for _ in range(4):
            gram = power @ gram @ power
            power = _step_of(gram)
            product = power @ product
        x = product @ x
    return x.mT if is_tall else x


def _step_of(gram: Tensor) -> Tensor:
    """a + b g + c g^2, symmetric (..., A, A)."""
    gram_square = gram @ gram
    step = gram_square.mul_(2.0315).add_(gram, alpha=-4.775)
    step.diagonal(dim1=-2, dim2=-1).add_(3.4445)
    return step


@torch.no_grad()
def update_average(average: nn.Module, model: nn.Module, decay: float, step: int) -> None:
    """Move `average` towards `model`: decay min(ema_decay, (1 + step) / (10 + step)); buffers are copied."""
    decay = min(decay, (1 + step) / (10 + step))
    averages, weights = list(average.parameters()), list(model.parameters())
    torch._foreach_lerp_(averages, [weight.detach() for weight in weights], 1 - decay)
    for kept, current in zip(average.buffers(), model.buffers(), strict=True):
        kept.copy_(current)

"""Muon: momentum orthogonalized, for the hidden matrices of a network.

Source: Jordan et al., "Muon: An optimizer for hidden layers in neural networks", 2024 (Nesterov momentum, five
Newton-Schulz iterations); Liu et al., 2025, arXiv:2502.16982, section 2.2 (the factor 0.2 sqrt(max(A, B)), with which
the learning rates and weight decay of AdamW serve).
Differs from it: on a CPU the iterations are in float32. torch.optim.Muon, which this equals otherwise, takes bfloat16
everywhere, and a CPU without instructions for that type needs 10 to 80 times as long (docs/log.md).
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer


class Muon(Optimizer):
    """Nesterov momentum whose update of each matrix, or convolution kernel, is orthogonalized; decoupled weight decay."""

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
        """Liu et al., section 2.2: W <- (1 - lr * decay) W - lr * 0.2 sqrt(max(A, B)) O, with O the orthogonalized update."""
        for matrix in matrices:
            if not self.state[matrix]:
                self.state[matrix]["momentum_buffer"] = torch.zeros_like(matrix)
        gradients = [matrix.grad for matrix in matrices]
        averages = [self.state[matrix]["momentum_buffer"] for matrix in matrices]
        is_skipped = None if (found_inf := getattr(self, "found_inf", None)) is None else found_inf > 0
        if (
            is_skipped is not None
        ):  # as in torch's fused optimizers: training/terms.py. The momentum then stays as it is
            gradients = [torch.where(is_skipped, old, new) for old, new in zip(averages, gradients, strict=True)]
        torch._foreach_lerp_(averages, gradients, 1 - group["momentum"])
        updates = torch.stack(torch._foreach_lerp(gradients, averages, group["momentum"]))
        rows = updates.flatten(2)  # a kernel (N, M, k, k) is a matrix (N, M k^2)
        rate = 0.2 * max(rows.shape[1:]) ** 0.5 * group["lr"]
        rows = orthogonalized(rows, torch.bfloat16 if rows.is_cuda else torch.float32).to(updates.dtype)
        kept = 1 - group["lr"] * group["weight_decay"]
        if is_skipped is not None:
            rows, kept = rows.masked_fill(is_skipped, 0), torch.where(is_skipped, 1.0, kept)
        torch._foreach_mul_(matrices, kept)
        torch._foreach_add_(matrices, list(rows.view_as(updates).unbind()), alpha=-rate)


def orthogonalized(matrices: Tensor, dtype: torch.dtype) -> Tensor:
    """Jordan et al., "Newton-Schulz": (..., A, B) -> the same shape in dtype, with the same singular vectors and every singular
    value near 1 (0.7 to 1.2).

    Five iterations x <- p(g) x with g = x x^T and p(g) = a + b g + c g^2, from singular values in (0, 1]. All p(g) commute, so
    they can be multiplied first, each g being p^2 times the one before, and meet the matrix once: less work where one side is
    much shorter. It squares the rounding, which bfloat16 cannot afford.
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
    """p(g) = a + b g + c g^2, symmetric (..., A, A), with the coefficients of Jordan et al."""
    gram_square = gram @ gram
    step = gram_square.mul_(2.0315).add_(gram, alpha=-4.775)
    step.diagonal(dim1=-2, dim2=-1).add_(3.4445)
    return step

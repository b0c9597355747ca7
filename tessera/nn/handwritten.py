"""Pieces of the transformer body with a backward written by hand: fewer passes over memory than autograd takes on a CPU.

The values are those of the plain formulas in nn/transformer.py up to rounding. On a GPU, and under torch.compile, the plain
formulas are used: there kernels are fused already. Second derivatives are refused.

Shape letters: B batch, L sequence, N width, H heads, E = N / H.
"""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

LONGEST_ATTENTION = 64  # places; from 128 on PyTorch's is as fast, and without dropout holds no (L, L) weights


def rms_norm(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    """x / sqrt(mean(x ** 2) + eps) * weight over the last axis.

    Where no gradient is wanted the formula is called as it is: for the single places of sampling an autograd.Function costs
    as much as what it computes.
    """
    if torch.is_grad_enabled():
        return RootMeanSquareNorm.apply(x, weight, eps)
    normed = x * inverse_rms(x, eps)
    return normed if weight is None else normed.mul_(weight)


def query_key_value(
    qkv: Tensor, query_weight: Tensor, key_weight: Tensor, cos: Tensor, sin: Tensor, heads: int, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """(B, L, 3 N) -> query, key, value, each (B, H, L, E); queries and keys normalized, weighted and rotated."""
    given = (qkv, query_weight, key_weight, cos, sin, heads, eps)
    return QueryKeyValue.apply(*given) if torch.is_grad_enabled() else _query_key_value(*given)[0]


def inverse_rms(x: Tensor, eps: float) -> Tensor:
    """(..., 1) 1 / sqrt(mean(x ** 2) + eps) over the last axis."""
    mean_square = torch.linalg.vector_norm(x, dim=-1, keepdim=True).square_().div_(x.shape[-1])
    return mean_square.add_(eps).rsqrt_()


def _query_key_value(
    qkv: Tensor, query_weight: Tensor, key_weight: Tensor, cos: Tensor, sin: Tensor, heads: int, eps: float
) -> tuple[tuple[Tensor, Tensor, Tensor], tuple[Tensor, Tensor, Tensor]]:
    """`query_key_value`, and what its backward needs: normed (B, L, 2, H, E), inverse (B, L, 2, H, 1), weights (2, 1, E)."""
    batch, length, _ = qkv.shape
    qkv = qkv.view(batch, length, 3, heads, -1)
    both = qkv[:, :, :2]
    weights = torch.stack([query_weight, key_weight]).unsqueeze(1)
    inverse = inverse_rms(both, eps)
    normed = both * inverse
    turned = qkv.new_empty(2, batch, heads, length, both.shape[-1])
    turn((normed * weights).permute(2, 0, 3, 1, 4), cos, sin, 1, turned)
    return (turned[0], turned[1], qkv[:, :, 2].transpose(1, 2)), (normed, inverse, weights)


class RootMeanSquareNorm(torch.autograd.Function):
    """`rms_norm`."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
        inverse = inverse_rms(x, eps)
        normed = x * inverse
        ctx.save_for_backward(normed, inverse, weight)
        return normed if weight is None else normed * weight

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, Tensor | None, None]:
        """With n = x * inverse and g the gradient of n, that of x is inverse * (g - n * mean(g * n))."""
        normed, inverse, weight = ctx.saved_tensors
        width = normed.shape[-1]
        product = gradient * normed
        if weight is None:
            weight_gradient, mean = None, product.mean(dim=-1, keepdim=True)
        else:
            weight_gradient = product.flatten(0, -2).sum(dim=0)
            mean = (product @ (weight / width)).unsqueeze(-1)
            gradient = gradient * weight
        return torch.addcmul(gradient, normed, mean, value=-1).mul_(inverse), weight_gradient, None


class QueryKeyValue(torch.autograd.Function):
    """`query_key_value`; the gradient is written where it belongs instead of being gathered from three."""

    @staticmethod
    def forward(
        ctx, qkv: Tensor, query_weight: Tensor, key_weight: Tensor, cos: Tensor, sin: Tensor, heads: int, eps: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        (query, key, value), saved = _query_key_value(qkv, query_weight, key_weight, cos, sin, heads, eps)
        ctx.save_for_backward(*saved, cos, sin)
        return query, key, value.contiguous()

    @staticmethod
    @once_differentiable
    def backward(ctx, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor | None, ...]:
        normed, inverse, weights, cos, sin = ctx.saved_tensors
        batch, length, _, heads, width = normed.shape
        gradient = torch.empty_like(normed)
        turn(query, cos, sin, -1, gradient[:, :, 0].transpose(1, 2))
        turn(key, cos, sin, -1, gradient[:, :, 1].transpose(1, 2))
        product = gradient * normed
        query_weight, key_weight = product.sum(dim=(0, 1, 3))
        mean = product @ (weights[:, 0] / width).T  # (B, L, 2, H, 2): the diagonal of the twos is wanted
        mean = mean.diagonal(dim1=2, dim2=4).transpose(2, 3).unsqueeze(-1)
        out = normed.new_empty(batch, length, 3, heads, width)
        torch.mul(torch.addcmul(gradient.mul_(weights), normed, mean, value=-1), inverse, out=out[:, :, :2])
        out[:, :, 2] = value.transpose(1, 2)
        return out.view(batch, length, -1), query_weight, key_weight, None, None, None, None


def turn(x: Tensor, cos: Tensor, sin: Tensor, direction: int, out: Tensor) -> None:
    """Rotate the pairs (x[i], x[i + E/2]) of the last axis; direction -1 is the backward."""
    (a, b), (first, second) = x.chunk(2, dim=-1), out.chunk(2, dim=-1)
    torch.mul(a, cos, out=first).addcmul_(b, sin, value=-direction)
    torch.mul(b, cos, out=second).addcmul_(a, sin, value=direction)


def attention(query: Tensor, key: Tensor, value: Tensor, dropout: float, is_causal: bool) -> Tensor:
    """Vaswani et al. 2017, equation 1, over (B, H, L, E) with all (L, L) weights at once: the fastest for short sequences."""
    batch, heads, length, width = query.shape
    query, key, value = (x.reshape(batch * heads, length, width) for x in (query, key, value))
    bias = torch.zeros((), dtype=query.dtype)
    if is_causal:
        bias = torch.full((length, length), -torch.inf, dtype=query.dtype).triu(1)
    weights = torch.baddbmm(bias, query, key.transpose(1, 2), alpha=width**-0.5).softmax(dim=-1)
    return torch.bmm(F.dropout(weights, dropout), value).view(batch, heads, length, width)

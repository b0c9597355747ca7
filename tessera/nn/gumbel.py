"""Drawing indices from logits with a generator on the CPU: the same draws on every device."""

import torch
from torch import Tensor


def gumbel_noise(shape: torch.Size, generator: torch.Generator) -> Tensor:
    """Standard Gumbel noise: the largest of logits + noise is a draw from their softmax."""
    uniform = torch.rand(shape, generator=generator).clamp_min(1e-20)
    return -torch.log(-torch.log(uniform))

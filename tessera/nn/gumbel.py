"""The Gumbel-max trick with a generator on the CPU: the same draws on every device.

Source: Maddison et al., "A* Sampling", 2014, arXiv:1411.0030.
"""

import torch
from torch import Tensor


def gumbel_noise(shape: torch.Size, generator: torch.Generator) -> Tensor:
    """Standard Gumbel noise: argmax(logits + noise) is a draw from softmax(logits)."""
    uniform = torch.rand(shape, generator=generator).clamp_min(1e-20)
    return -torch.log(-torch.log(uniform))

"""The Gumbel-max trick, and the uniform numbers that it is made of.

Source: Maddison et al., "A* Sampling", 2014, arXiv:1411.0030.
"""

import torch
from torch import Tensor


def uniform(like: Tensor, generator: torch.Generator) -> Tensor:
    """Uniform numbers of [0, 1) in the shape of `like`, float32 and on its device.

    They are drawn where the generator is: on a GPU by one of that GPU, and nothing is copied; a generator on the CPU gives the
    same draws on every device.
    """
    return torch.rand(like.shape, generator=generator, device=generator.device).to(like.device)


def gumbel_noise(like: Tensor, generator: torch.Generator) -> Tensor:
    """Standard Gumbel noise in the shape of `like`, drawn as `uniform`: argmax(logits + noise) draws from softmax(logits)."""
    return uniform(like, generator).clamp_min_(1e-20).log_().neg_().log_().neg_()

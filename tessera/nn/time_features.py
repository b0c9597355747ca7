"""Sinusoidal features of a time or noise level.

Source: Vaswani et al. 2017, arXiv:1706.03762, section 3.5, of a real number in the place of a position (Ho et al. 2020,
arXiv:2006.11239, appendix B).
"""

import math

import torch
from torch import Tensor


def time_features(t: Tensor, width: int) -> Tensor:
    """Vaswani et al., section 3.5: (B,) near [0, 1] -> (B, width) cosines and sines at periods from about 1/160 to 60."""
    frequencies = torch.exp(-math.log(10_000) * torch.arange(width // 2, device=t.device) / (width // 2)) * 1000
    angles = t.float().unsqueeze(1) * frequencies
    return torch.cat([angles.cos(), angles.sin()], dim=1)

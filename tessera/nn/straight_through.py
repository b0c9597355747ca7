"""Gradient estimators for a quantizer, whose own derivative is zero almost everywhere.

Source: straight through: Bengio et al., 2013, arXiv:1308.3432; the rotation: Fifty et al., "Restructuring Vector
Quantization with the Rotation Trick", 2024, arXiv:2410.06424, section 4.
Differs from it: the value is the code itself, where rotating the latent would give it up to rounding.
"""

import torch.nn.functional as F
from torch import Tensor


def straight_through(z: Tensor, codes: Tensor) -> Tensor:
    """Bengio et al.: the codes in value; the gradient reaches z unchanged."""
    return z + (codes - z).detach()


def rotated(z: Tensor, codes: Tensor) -> Tensor:
    """Fifty et al., section 4: (M, D), (M, D) -> the codes in value; the gradient is that of the rotation and scaling that
    takes z to its code.

    With unit vectors u of z and q of its code, and w = (u + q) / ||u + q||: R = 1 - 2 w w^T + 2 q u^T turns u into q.
    """
    codes = codes.detach()
    length = z.detach().norm(dim=1, keepdim=True).clamp_min(1e-6)
    code_length = codes.norm(dim=1, keepdim=True)
    u, q = z.detach() / length, codes / code_length.clamp_min(1e-6)
    w = F.normalize(u + q, dim=1)
    turned = z - 2 * (z * w).sum(dim=1, keepdim=True) * w + 2 * (z * u).sum(dim=1, keepdim=True) * q
    return straight_through(code_length / length * turned, codes)

"""The share of samples whose nearest other image is a real one: one number that sees garbage of every kind.

Among as many other samples and real images, the nearest image of a sample is real as often as not if nothing tells them
apart: the figure of real images is near 0.5. Where samples lie apart from the real images, by fidelity or because they are
too alike, it falls to 0. Precision does not: one outlier among the real images makes a ball that holds garbage, and a
heap of garbage near the middle of the real images lies in many (docs/log.md, judges that see garbage).

Source: Lopez-Paz and Oquab, "Revisiting Classifier Two-Sample Tests", 2016, arXiv:1610.06545, section 3 (by one nearest
neighbor); Xu et al., "An empirical study on evaluation metrics of generative adversarial networks", 2018, arXiv:1806.07755,
section 2 (one of the two, of six, that they recommend).
Differs from them: it is 1 minus the accuracy on the samples alone, which reads as a share of samples. Of equal distances, as
copies have them, the real image counts as the nearer.
"""

from typing import Literal

import numpy as np
import torch
from torch import Tensor

from tessera.artifacts.shards import spread
from tessera.components import Params
from tessera.contracts import Record, SeenSamples, Shown
from tessera.nn.neighbors import nearest

FIGURES = (Shown("nearest_real", better="higher", has_error=True),)


class Config(Params):
    kind: Literal["nearest_real"]


def of_samples(config: Config, samples: SeenSamples, found: Record) -> None:
    """`nearest_real` by the first network, of as many samples as test images."""
    seen = samples.first
    features, others = seen.features, seen.real_features(is_limited=True)
    number = min(len(features), len(others))
    some, real = (rows[spread(len(rows), number)] for rows in (features, others))
    protocol = seen.protocol(num_images=number, num_real=number)
    found.add_share("nearest_real", float(is_nearest_real(real, some).mean()), protocol)


def is_nearest_real(real: Tensor, samples: Tensor) -> np.ndarray:
    """real, samples: (N, D) features of one network, N >= 2 -> (N,) whether a sample's nearest other image is real.

    Raises ValueError for features that are not finite, and unless both sets are of one size: the larger one would be nearest
    by its number alone.
    """
    if real.shape != samples.shape or len(real) < 2:
        raise ValueError(
            f"features of shapes {tuple(real.shape)} and {tuple(samples.shape)} cannot be compared, expected two of one "
            f"shape (N, D), N at least 2: take as many samples as real images"
        )
    among = nearest(samples, samples, 2)  # the image itself is one of the two, the first but for rounding and copies
    rows = torch.arange(len(samples), device=among.rows.device)[:, None]
    others = among.distances.masked_fill(among.rows == rows, torch.inf).amin(dim=1)
    return (nearest(samples, real).distances[:, 0] <= others).cpu().numpy()

"""How well images and their captions belong together by a pretrained image and text model (features/clip.py).

Source: Hessel et al., "CLIPScore: A Reference-free Evaluation Metric for Image Captioning", 2021, arXiv:2104.08718, equation 1.
Differs from it: any such model; of captions that were trained on, of others of known words, and of those with new words apart;
beside each stands the score of the captions of other images of its group, which is what chance gives.
"""

from typing import Literal

import numpy as np

from tessera.artifacts.captions import GROUPS
from tessera.components import Params
from tessera.contracts import Record, Shown, Told

WEIGHT = 2.5  # equation 1
FIGURES = (
    *(Shown(f"clip_score_{group}", better="higher", has_error=True) for group in GROUPS),
    Shown("shuffled_clip_score_*", form=None),
)


class Config(Params):
    kind: Literal["clip_score"]


def of_told(config: Config, told: Told, found: Record) -> None:
    """`clip_score_seen`, ...: the mean of 2.5 * max(cosine, 0) of each image and the caption that it was told."""
    if told.kind != "clip":
        return
    for group in GROUPS:
        of_group = told.groups == group
        if of_group.any():
            for prefix, cosines in zip(("", "shuffled_"), told.likeness, strict=True):
                found.add_mean(f"{prefix}clip_score_{group}", score(cosines[of_group]), told.protocol)


def score(cosines: np.ndarray) -> np.ndarray:
    """Hessel et al., equation 1."""
    return WEIGHT * np.maximum(cosines, 0)

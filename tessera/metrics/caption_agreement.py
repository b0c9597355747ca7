"""How often a judge that reads captions finds the one that an image was drawn for among all captions of the data set.

Source: Xu et al., "AttnGAN: Fine-Grained Text to Image Generation with Attentional Generative Adversarial Networks", 2018,
arXiv:1711.10485, section 4 (R-precision).
Differs from it: among all captions, and not among a hundred; of captions that were trained on, of others of known words, and
of those with new words apart. Beside the share for the images' own captions stands that for the captions of other images of
the same group, which is what chance gives; and on real images, which is what the judge can see.
"""

from typing import Literal

from tessera.artifacts.captions import GROUPS
from tessera.components import Params
from tessera.contracts import Record, Shown, Told

AT = (1, 10)
FIGURES = (
    *(Shown(f"caption_at_10_{group}", better="higher", has_error=True) for group in GROUPS),
    *(Shown(f"caption_at_1_{group}", form=None, better="higher", has_error=True) for group in GROUPS),
    *(Shown(f"caption_rank_{group}", better="lower", has_error=True) for group in GROUPS),
    Shown("shuffled_caption_*", form=None),
)


class Config(Params):
    kind: Literal["caption_agreement"]


def of_told(config: Config, told: Told, found: Record) -> None:
    """`caption_at_1_seen`, `caption_at_10_held_out`, ...: the share whose caption is among the nearest 1 or 10.

    `caption_rank_seen`, ...: the mean share of all other captions that are nearer, 0 to 1.
    """
    if not told.is_first:
        return
    for group in GROUPS:
        of_group = told.groups == group
        number = int(of_group.sum())
        for prefix, ranks in zip(("", "shuffled_"), (each[of_group] for each in told.ranks), strict=True):
            if not number:
                continue
            for at in AT:
                share = float((ranks < at).mean())
                found.add_share(f"{prefix}caption_at_{at}_{group}", share, told.protocol, of=number)
            found.add_mean(f"{prefix}caption_rank_{group}", ranks / max(1, told.num_captions - 1), told.protocol)

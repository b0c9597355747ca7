"""Variations: images around one image, the farther from it the larger the strength; other seeds give other ones.

Source: Meng et al. (SDEdit), 2021, arXiv:2108.01073, section 3.1, under the image's own label; for tokens: Chang et al.
(MaskGIT), 2022, arXiv:2202.04200, section 4.3.
Differs from them: the tokens to draw again are random ones, so that every part of an image can vary.
"""

from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from tessera.components import Params
from tessera.contracts import Completes, Denoises
from tessera.editing.ancestral import drawn_around, num_redrawn
from tessera.editing.trial import Trial
from tessera.nn.gumbel import uniform
from tessera.system import System

NEEDS = (Completes, Denoises)  # a prior with one of these abilities


class Config(Params):
    kind: Literal["variations"] = "variations"
    strength: Annotated[float, Field(ge=0, le=1)] = 0.5


def edit(
    images: Tensor, labels: Tensor, system: System, config: Config, sampling: Any, generator: torch.Generator
) -> Tensor:
    system.require("vary", *NEEDS, means="a masked, autoregressive, diffusion or flow prior")
    if config.strength == 0:
        return images
    tokens = system.encode(images)
    if isinstance(system.prior, Denoises):
        return drawn_around(system, tokens, config.strength, labels, sampling, generator)
    number = num_redrawn(config.strength, tokens[0].numel())
    order = uniform(tokens.flatten(1), generator).argsort(dim=1)
    is_known = (order >= number).view(tokens.shape)
    return system.decode(system.prior.complete(tokens, is_known, labels, sampling, generator)).clamp(-1, 1)


def trial(
    images: Tensor, labels: Tensor, system: System, config: Config, sampling: Any, generator: torch.Generator
) -> Trial:
    return Trial(images, edit(images, labels, system, config, sampling, generator), {"unchanged": images}, labels)

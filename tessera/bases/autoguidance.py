"""Autoguidance: sampling is led away from what a worse version of the same prior predicts under the same condition.

Classifier-free guidance leads away from the prediction without the label, and so needs labels; this needs none.

Source: Karras et al., "Guiding a Diffusion Model with a Bad Version of Itself", 2024, arXiv:2406.02507: equation 3 with an
inferior model in the place of D_0, which is their method.
Differs from it: the worse version is an early snapshot of the same training and of the same size (theirs is smaller, too);
priors of indices are guided as well, in their logits; beside classifier-free guidance, the two add up.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from tessera.bases.conditional import ConditionalModel, guided
from tessera.bases.guide import EXAMPLE
from tessera.components import sets
from tessera.nn.cross_attention import told_decoder
from tessera.nn.decoding import decoder
from tessera.nn.steps import Number, element

Predict = Callable[[Any, Tensor], Tensor]  # a model, the (B,) labels that it is told -> its prediction


def away(good: Tensor, bad: Tensor, scale: float | Tensor) -> Tensor:
    """Karras et al., equation 3, as what is added to `good`: bad + scale * (good - bad) = good + (scale - 1) * (good - bad)."""
    return (scale - 1) * (good - bad)


def guide_of(model: nn.Module, sampling: Any) -> Any:
    """The worse version that the model was read with. Raises ValueError if there is none."""
    guide = getattr(model, "guide", None)
    if guide is None:
        raise ValueError(
            f"autoguidance_scale is {sampling.autoguidance_scale:g}, but this prior has no guide to lead away from: leave it "
            f"out, or train the prior with {EXAMPLE}"
        )
    return guide


def as_guidance(sampling: Any) -> Any:
    """The settings with the scale of autoguidance in the place of guidance's, for intervals and ramps act on both alike."""
    return sampling.model_copy(update={"guidance_scale": sampling.autoguidance_scale, "autoguidance_scale": None})


def away_at(model: nn.Module, sampling: Any, time: float, good: Tensor, predict: Callable[[Any], Tensor]) -> Tensor:
    """What autoguidance adds at this time, 0 noise and 1 data, to a prediction; predict: of the guide.

    good: what the model itself predicts under the condition.
    """
    guide = guide_of(model, sampling)
    if not as_guidance(sampling).is_guided_at(time):
        return torch.zeros_like(good)
    return away(good, predict(guide), sampling.autoguidance_scale)


def guided_twice(model: ConditionalModel, sampling: Any, time: float, labels: Tensor, predict: Predict) -> Tensor:
    """The prediction under (B,) labels with both kinds of guidance, each within the interval of times."""
    good = found = predict(model, labels)
    if model.config.is_conditional and sampling.is_guided_at(time):
        found = guided(good, predict(model, model.null_labels(labels)), sampling.guidance_scale)
    return found + away_at(model, sampling, time, good, lambda guide: predict(guide, labels))


class Reading:
    """The guide of an autoregressive prior, as it reads the sequences that are being drawn, with a memory of its own.

    On a GPU its steps are part of the same graph as those of the prior (nn/steps.py).
    """

    def __init__(self, model: nn.Module, sampling: Any, labels: Tensor, length: int):
        """(B,) what the prior is conditioned on; length: of the sequences."""
        self.guide = guide_of(model, sampling)
        scales = [as_guidance(sampling).scale_at(number / length) for number in range(length)]
        self.scales = torch.tensor(scales, device=labels.device)
        self.x = self.guide.label_embedding(labels)  # (B, N): what the next step reads
        self.decoder = decoder(self.guide.transformer, like=self.x)
        if sets(self.guide.config, "condition"):
            self.decoder = told_decoder(self.guide.transformer, self.decoder, like=self.x)

    def away(self, good: Tensor, number: Number, places: Tensor | None) -> Tensor:
        """What is added to the (B, K) logits of the index at `number`; places: (B, 1) of the grid, None: raster order."""
        guide = self.guide
        position = element(guide.position, number) if places is None else guide.position[places].squeeze(1)
        bad = guide.head(self.decoder.step(self.x + position, number, places)).float()
        return away(good, bad, element(self.scales, number))

    def read(self, drawn: Tensor, places: Tensor | None) -> None:
        """(B, 1) the indices that were drawn, or known, for the next step."""
        x = self.guide.index_embedding(drawn)
        if self.guide.read_position is not None:
            x = x + self.guide.read_position[places]
        self.x.copy_(x.squeeze(1))

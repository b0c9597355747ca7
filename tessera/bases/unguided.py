"""Conditions (tessera/conditions) told to a prior without label dropout and guidance: a GAN.

The pooled vector of a condition stands in the place of a label's embedding, in the generator beside the noise, and in the
discriminator in the projection, each with a network of its own; nothing attends to the sequence behind it. Nothing is left out
in training, so that the prior can be told only what images were told.

Sources: Reed et al., "Generative Adversarial Text to Image Synthesis", 2016, arXiv:1605.05396, section 4.1 (what is told goes
into both networks, joined to the noise in the generator); Miyato and Koyama, "cGANs with Projection Discriminator", 2018,
arXiv:1802.05637, equation 3 (the discriminator's inner product of features and an embedding of what is told).
Differs from them: images beside another's caption are not shown as fakes (Reed et al., section 4.2), as the relativistic
loss compares pairs that are told the same.
"""

from typing import Any

from torch import Tensor, nn

from tessera.bases.conditional import require_conditional
from tessera.components import load
from tessera.contracts import TokenSpec


def embedding(config: Any, spec: TokenSpec, width: int) -> nn.Module:
    """What embeds config.condition, (B, ...) -> (B, width), in the place of a table of labels.

    Raises ValueError where nothing would be told, and for attention, which no layer would pay.
    """
    require_conditional(config)
    if getattr(config.condition, "cross_attention", False):
        raise ValueError(
            "condition.cross_attention is true, but no layer of this prior attends to a sequence, it is told the mean: "
            "write cross_attention: false"
        )
    labels = nn.Embedding(spec.num_classes + 1, width)  # of deviation 1; the last one, of no label, is never told
    network = load("conditions", config.condition.kind).Network(config.condition, spec, labels)
    network.context = None
    return network


class ToldOnce:
    """What is told of the micro-batches of a step: the same of an image in both phases, also where a label is read as one of
    several captions, drawn anew each time."""

    def __init__(self) -> None:
        self._pending: list[Tensor] = []

    def in_phase(self, phase: str, labels: Tensor, network: nn.Module) -> Tensor:
        """(B,) labels, or (B, ...) another condition -> (B, ...); network: what reads labels."""
        if phase != "generator":
            return self._pending.pop(0)
        drawn = network.of_labels(labels) if labels.ndim == 1 and hasattr(network, "of_labels") else labels
        self._pending.append(drawn)
        return drawn

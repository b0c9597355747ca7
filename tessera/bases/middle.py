"""The keys `alignment` and `dispersive` of a prior: what its middle features are asked for, beside its own loss.

alignment: they are to tell, place by place, what the clean image looks like to a network that is not asked to draw it: to one
that learned photographs (`to: features`), or, where there is none, to the tokenizer (`to: latents`). dispersive: those of
different images are to lie apart, which needs no other network. Both act in training alone, on the mean of the batch that one
process sees; samples, artifacts and held-out losses know nothing of them.

With h the features (B, L, N) behind the block `layer`, u a projection of them, and v the (B, C, h, w) target:

    alignment   L_a = 1 - mean over images and places of cos(u(h), v)
    dispersive  L_d = log mean over pairs (i, j) of exp(-|h_i - h_j|^2 / (L N tau))
    loss        L + alignment.weight L_a + dispersive.weight L_d

Sources: Yu et al. (REPA), "Representation Alignment for Generation", 2024, arXiv:2410.06940, equation 8; to the latents: Wang
et al. (SRA 2), 2026, arXiv:2601.17830; Wang and He, "Diffuse and Disperse", 2025, arXiv:2506.09027, the variant of InfoNCE with
l2 distances.
Differs from them: of an autoregressive or masked transformer, too, whose places then tell of what they predict; cosines also
for latents; the target is averaged or repeated to the grid of the features; pairs of an image with itself are left out, so that
the term does not depend on the size of the batch.
"""

import math
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Annotated, Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor, nn

from tessera.bases.latents import Settings
from tessera.components import Weight, load, sets

NETWORK = "tf_efficientnet_lite0"  # whose weights are installed (features/timm.py)
# Priors whose loss asks their network once for each image: what it thought of it is then one thing
ASKED_ONCE = ("autoregressive", "diffusion", "flow_matching", "masked")
Layer = Annotated[int, Field(ge=1)] | None  # of a transformer, from 1; unset: the one in the middle


class Alignment(Settings):
    to: Literal["features", "latents"]
    weight: Weight = 0.5
    layer: Layer = None
    network: Annotated[str, Field(pattern="^[a-z0-9_]+$")] = NETWORK  # to features: timm's name of it
    network_layer: int = -2  # whose grid is the target, as timm counts them, from the end if negative
    weights: Annotated[str, Field(min_length=1)] | None = None  # path of a safetensors file; unset: the installed ones
    sha256: Annotated[str, Field(pattern="^[0-9a-f]{64}$")] | None = None  # of that file

    @model_validator(mode="after")
    def _latents_have_no_network(self) -> "Alignment":
        of_network = ("network", "network_layer", "weights", "sha256")
        set_anyway = [key for key in of_network if getattr(self, key) != type(self).model_fields[key].default]
        if self.to == "latents" and set_anyway:
            raise ValueError(
                f"alignment to latents asks no other network, and {set_anyway[0]} is set: leave it out, or write to: features"
            )
        return self


class Dispersive(Settings):
    weight: Weight = 0.25
    temperature: Annotated[float, Field(gt=0, le=1e4)] = 0.5  # tau, of squared distances per number
    layer: Layer = None


class AlignedBatch(NamedTuple):
    """A TokenBatch, and what another network sees in its images."""

    tokens: Tensor
    labels: Tensor
    features: Tensor  # (B, C, h, w) float


def require(config: Any) -> None:
    """Raises ValueError, in a sentence, for a prior that has no such features, or a training that cannot look at them."""
    key = "alignment" if sets(config, "alignment") else "dispersive"
    if config.kind not in ASKED_ONCE:
        raise ValueError(
            f"{key} looks at what a network thinks of an image, which {config.kind} asks more than once: take one of "
            f"{', '.join(ASKED_ONCE)}, or leave it out"
        )
    if sets(config, "alignment"):
        learns = load("priors", config.kind).LEARNS
        if config.alignment.to == "latents" and learns != "latents":
            raise ValueError(
                f"alignment.to latents: {config.kind} learns indices, which say nothing of likeness: write to: features, or "
                f"take dispersive"
            )
        if getattr(config, "has_random_orders", False):
            raise ValueError(
                "alignment says what stands at each place, and random orders move the places: leave random_order_until out, "
                "or alignment"
            )
        if config.alignment.to == "features" and config.num_views != 1:
            raise ValueError(
                "alignment.to features shows the network an image as it is, and not its views: write prior.num_views: 1"
            )
    for name, settings in (("alignment", config.alignment), ("dispersive", config.dispersive)):
        if settings is not None:
            _require_layer(name, settings.layer, getattr(config, "denoiser", config))
    training = config.training
    for setting, is_set, mend in (
        ("compile: true", training.compile, "compile: false"),
        ("by_speed: compile", "compile" in (training.by_speed or ()), "compile: false, and leave it out of by_speed"),
        ("gradient_checkpointing: true", training.gradient_checkpointing, "gradient_checkpointing: false"),
        ("sharding: full", training.sharding == "full", "sharding: none"),
        ("data_on_device: true", training.data_on_device, "data_on_device: false"),
    ):
        if is_set:
            raise ValueError(
                f"{key} looks into the network as it trains, which {setting} does not let it: write {mend}"
            )


def _require_layer(name: str, layer: int | None, body: Any) -> None:
    depth = getattr(body, "depth", None)
    if layer is not None and depth is None:
        raise ValueError(f"{name}.layer: {body.kind} has its middle alone, which needs no number: leave layer out")
    if layer is not None and layer > depth:
        raise ValueError(f"{name}.layer {layer} is beyond the {depth} layers of this prior: choose one of 1 to {depth}")


def block_of(model: Any, layer: int | None) -> nn.Module:
    """The block behind which the features are: of a transformer, or the first one in the middle of a U-Net."""
    body = getattr(model, "denoiser", model)
    if not hasattr(body, "transformer"):
        return body.middle[0]
    blocks = body.transformer.blocks
    return blocks[(layer or max(1, len(blocks) // 2)) - 1]


@contextmanager
def looking_at(block: nn.Module) -> Iterator[list[Tensor]]:
    """Inside, what the block gives is noted."""
    seen: list[Tensor] = []
    handle = block.register_forward_hook(lambda module, inputs, output: seen.append(output))
    try:
        yield seen
    finally:
        handle.remove()


class Head(nn.Module):
    """The projection u of REPA, three layers with SiLU between; only training has it."""

    def __init__(self, model: Any, channels: int):
        super().__init__()
        body = getattr(model, "denoiser", model)
        self.grid = tuple(body.grid) if hasattr(body, "transformer") else None  # of the places of a sequence
        width = body.transformer.width if self.grid else body.middle[0].conv2.out_channels
        hidden = 2 * width
        self.layers = nn.Sequential(
            nn.Linear(width, hidden), nn.SiLU(), nn.Linear(hidden, hidden), nn.SiLU(), nn.Linear(hidden, channels)
        )

    def forward(self, features: Tensor, target: Tensor) -> Tensor:
        """Yu et al., equation 8: features (B, L, N) or (B, N, h, w), target (B, C, ., .) -> 1 less the mean cosine."""
        with torch.autocast(features.device.type, enabled=False):
            grid = self.grid or tuple(features.shape[-2:])
            places = features.float() if self.grid else features.float().flatten(2).transpose(1, 2)
            wanted = F.adaptive_avg_pool2d(target.float(), grid).flatten(2).transpose(1, 2)
            return 1 - F.cosine_similarity(self.layers(places), wanted, dim=2).mean()


def dispersion(features: Tensor, temperature: float) -> Tensor:
    """Wang and He: (B, ...) -> log of the mean over all pairs of exp(-distance^2 / temperature), per number; at least -log B.

    Pairs of an image with itself are among them: without them it would pay without end to let features grow.
    """
    with torch.autocast(features.device.type, enabled=False):
        flat = features.float().flatten(1)
        pairs = -F.pdist(flat).square() / (flat.shape[1] * temperature)
        return torch.logsumexp(torch.cat([pairs, pairs, pairs.new_zeros(len(flat))]), 0) - 2 * math.log(len(flat))


def with_terms(objective: Any, batch: Any, step: int) -> dict[str, Tensor]:
    """The terms of the prior's own loss, and in training those of its middle features; "loss" is then their sum."""
    labels, config = objective.dropped(batch.labels), objective.config
    if not objective.training:
        return objective.loss(batch.tokens, labels, step)
    asked = {key: settings for key in ("alignment", "dispersive") if (settings := getattr(config, key)) is not None}
    with ExitStack() as looking:
        seen = {
            key: looking.enter_context(looking_at(block_of(objective.model, settings.layer)))
            for key, settings in asked.items()
        }
        found = objective.loss(batch.tokens, labels, step)
    terms = {"prior_loss": found["loss"].detach()}
    loss = found["loss"]
    if "alignment" in asked:
        target = batch.tokens if config.alignment.to == "latents" else batch.features
        term = objective.head(seen["alignment"][0], target)
        loss, terms["alignment_loss"] = loss + config.alignment.weight * term, term.detach()
    if "dispersive" in asked:
        term = dispersion(seen["dispersive"][0], config.dispersive.temperature)
        loss, terms["dispersive_loss"] = loss + config.dispersive.weight * term, term.detach()
    return found | terms | {"loss": loss}

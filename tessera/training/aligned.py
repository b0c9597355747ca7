"""The target of a prior's middle features (the key `alignment`, bases/middle.py): computed once, before a training begins.

Of `to: features` they are the network's grids of the training images, averaged to the grid of the tokens, in float16 in the
training's state: the network then takes no time in the steps. They are part of the training, not a stage of the pipeline, as
the features of captions are (conditions/text_model.py).
"""

from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tessera.artifacts import images as image_artifact
from tessera.artifacts.growing import Growing
from tessera.artifacts.images import to_float
from tessera.artifacts.shards import Shards
from tessera.artifacts.tokens import Tokens
from tessera.bases.middle import AlignedBatch, Alignment, Head
from tessera.components import parse
from tessera.contracts import ImageSpec, Job, TokenBatch
from tessera.features import timm

AT_ONCE = 50  # images in the network
TRIED_CHANNELS = 256  # of a target, in a trial of the speed


def begin(objective: Any, settings: Alignment, tokens: Tokens, images: Path, job: Job) -> Any:
    """Give the objective its head, and what it is trained on the target. Raises ValueError, in a sentence, for a network that
    is missing, changed, or has no such layer."""
    if settings.to == "latents":
        objective.head = Head(objective.model, objective.model.spec.latent_shape[0])
        return tokens
    features = computed(settings, tokens, images, job)
    objective.head = Head(objective.model, features.row_shape[0])
    return AlignedTokens(tokens, features)


def for_trial(objective: Any, settings: Alignment, batch: TokenBatch) -> Any:
    """As `begin`, of a batch of noise: how long a step takes does not depend on what the features are."""
    if settings.to == "latents":
        objective.head = Head(objective.model, objective.model.spec.latent_shape[0])
        return batch
    spec = objective.model.spec
    objective.head = Head(objective.model, TRIED_CHANNELS)
    grid = spec.index_grid if len(batch.tokens.shape) == 3 else spec.latent_shape[1:]
    return AlignedBatch(*batch, torch.randn(len(batch.labels), TRIED_CHANNELS, *grid))


class AlignedTokens:
    """Tokens whose batches hold the features of their images, too; all else is theirs."""

    def __init__(self, tokens: Tokens, features: Shards):
        """features: of all images of the split, of which `tokens` may be some."""
        self.tokens, self.features = tokens, features

    def __len__(self) -> int:
        return len(self.tokens)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.tokens, name)

    def stored(self, rows: Tensor, generator: torch.Generator | None = None) -> AlignedBatch:
        found = self.tokens.stored(rows, generator)
        return AlignedBatch(*found, torch.from_numpy(self.features.gather(self.tokens.rows[rows.numpy()])))

    def batch_of(self, stored: AlignedBatch) -> AlignedBatch:
        found = self.tokens.batch_of(TokenBatch(stored.tokens, stored.labels))
        return AlignedBatch(*found, stored.features.float())


def computed(settings: Alignment, tokens: Tokens, images: Path, job: Job) -> Shards:
    """(C, h, w) float16 of each image of the split, by all processes of the training; into job.state."""
    spec, splits = image_artifact.read(images)
    pixels = splits[tokens.split].pixels
    grid = tokens.spec.index_grid if tokens.learns == "indices" else tokens.spec.latent_shape[1:]
    network = Network(settings, spec).to("cuda" if torch.cuda.is_available() else "cpu")
    folder = job.state / "alignment" / tokens.split
    grown = Growing(folder, folder.with_suffix(".json"), job.checkpoint_seconds) if job.is_main else None
    done = job.from_main((grown.restored(job.say) or 0) if grown else 0)
    starts = range(done, len(pixels), AT_ONCE)

    def seen(start: int) -> np.ndarray:
        some = pixels.gather(np.arange(start, min(start + AT_ONCE, len(pixels))))
        return network(to_float(torch.from_numpy(some)), grid).numpy().astype(np.float16)

    for start, rows in zip(starts, job.track(job.share(starts, seen), len(starts), "features"), strict=False):
        assert grown is not None  # other processes are given nothing
        grown.append("features", rows)
        if grown.is_due() or start == starts[-1]:
            grown.keep(start + len(rows))
    if grown is not None:
        grown.finish()
    job.from_main(None)  # until all are there
    return Shards(folder, "features", np.float16)


class Network(nn.Module):
    """A network of timm with its weights, as features of kind timm have it."""

    def __init__(self, settings: Alignment, spec: ImageSpec):
        super().__init__()
        config = config_of(settings)
        try:
            self.model = timm.Model(config, spec)
            timm.prepare(self.model, config)
        except ValueError as refusal:
            raise ValueError(in_our_words(refusal)) from None
        self.layer, self.side = settings.network_layer, self.model.network.pretrained_cfg["input_size"][-1]

    @torch.no_grad()
    def forward(self, images: Tensor, grid: tuple[int, int]) -> Tensor:
        """(B, 1 or 3, H, W) float in [-1, 1] -> (B, C, *grid) float32, on the CPU."""
        pixels = 127.5 * (images.to(self.model.mean.device) + 1)
        pixels = F.interpolate(pixels, (self.side, self.side), mode="bicubic", antialias=True).expand(-1, 3, -1, -1)
        scaled = ((pixels - self.model.mean) / self.model.std).contiguous(memory_format=torch.channels_last)
        (found,) = self.model.network.forward_intermediates(
            scaled, indices=[self.layer], intermediates_only=True, stop_early=True
        )
        return F.adaptive_avg_pool2d(found.float(), grid).cpu().contiguous()


def config_of(settings: Alignment) -> timm.Config:
    """Raises ValueError if the network is without weights."""
    own = {"network": settings.network, "layer": settings.network_layer}
    return parse(timm.Config, own | {"weights": settings.weights, "sha256": settings.sha256})


def in_our_words(refusal: ValueError) -> str:
    """What features of kind timm say, of the keys that stand here."""
    return str(refusal).replace("features.layer", "alignment.network_layer").replace("features.", "alignment.")

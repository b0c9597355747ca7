"""Pictures of a part while it trains, for whoever waits: samples of a prior, reconstructions of a tokenizer.

When one is due follows from the clock, and no result depends on any: they draw from generators of their own, and from
the global one, which every training step seeds anew.
"""

import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import nn

from tessera import seeding
from tessera.artifacts import checkpoints
from tessera.artifacts.images import Images
from tessera.artifacts.shards import spread
from tessera.components import load, sets
from tessera.contracts import Job, TokenSpec
from tessera.evaluation.reconstructions import reconstruction
from tessera.params import Pipeline
from tessera.system import System

FIRST_SECONDS = 15.0  # of a training, before its first picture
SHARE = 0.02  # of the time since the training began, at most, for the later ones
COLUMNS, ROWS = 10, 4

Draw = Callable[[nn.Module], np.ndarray]  # a part -> (N, C, H, W) uint8, a row of COLUMNS after the other


class Previews:
    """The pictures of one training, of its averaged weights; each takes the place of the one before."""

    def __init__(self, draw: Draw, job: Job):
        self._draw, self._job = draw, job
        self._began = time.monotonic()
        self._spent = self._longest = 0.0

    def is_due(self) -> bool:
        """Whether a picture may be made now, by the time that those before it took."""
        elapsed = time.monotonic() - self._began
        return elapsed >= FIRST_SECONDS and not (self._longest and self._spent + self._longest > SHARE * elapsed)

    def show(self, model: nn.Module) -> None:
        began, was_training = time.monotonic(), model.training
        try:
            with torch.no_grad():
                images = self._draw(model.eval())
            self._job.preview(images, COLUMNS)
        except ValueError as refusal:  # of images that are not finite yet: no training ends for want of a picture
            self._job.say(f"no picture this time: {refusal}")
        model.train(was_training)
        seconds = time.monotonic() - began
        self._spent += seconds
        self._longest = max(self._longest, seconds)


def of_tokenizer(images: Images) -> Draw:
    """Test images, and below each row of them what the tokenizer makes of it."""
    originals = images.uint8(spread(len(images), COLUMNS * ROWS // 2))

    def draw(model: nn.Module) -> np.ndarray:
        decoded = reconstruction(model, next(model.parameters()).device)(originals)
        pairs = [half for some in zip(originals.split(COLUMNS), decoded.split(COLUMNS), strict=True) for half in some]
        return torch.cat(pairs).numpy()

    return draw


def of_prior(params: Pipeline, name: str, spec: TokenSpec, tokenizer: Path) -> Draw:
    """Samples with the settings of the system `name`, a column for each of the first classes: the same labels and noise
    each time, so that two pictures differ by the weights alone."""
    learns, sampling = load("priors", params.systems[name].prior.kind).LEARNS, params.sampling(name)
    if sets(sampling, "autoguidance_scale"):  # what trains has no guide yet
        sampling = sampling.model_copy(update={"autoguidance_scale": None})
    decoder, _, _ = checkpoints.load_model(tokenizer, "tokenizers")
    known = np.flatnonzero(spec.class_counts)
    labels = known[np.arange(COLUMNS * ROWS) % COLUMNS % len(known)]

    def draw(model: nn.Module) -> np.ndarray:
        system = System(decoder.to(next(model.parameters()).device), model, spec, learns, name)
        return system.draw(labels, sampling, seeding.generator(params.seed, "preview", device=system.device))

    return draw

"""What a pretrained text model makes of the captions of images (conditions/text_model.py): computed before a training begins.

Each different caption is read once, by the processes of the training together; features lie on disk in float16, as shards in
the training's private state, and of a kill the last ones are lost alone. They are part of the training, not a stage of the
pipeline: an edge that DVC would know of must stand at every training, and would make those stale that read no text.
"""

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from tessera.artifacts.captions import Captions
from tessera.artifacts.growing import Growing
from tessera.artifacts.shards import Shards
from tessera.conditions import text_model
from tessera.contracts import Job
from tessera.sources import text_models
from tessera.training.told import chosen

AT_ONCE = 64  # captions


class OfTextFeatures:
    """The captions of the images of a split, as a text model reads them; `compute` comes before `told`."""

    def __init__(self, captions: Captions, config: text_model.Config, split: str):
        self.captions, self.config, self.split = captions, config, split
        self.every = captions.all()
        self._number = {caption: number for number, caption in enumerate(self.every)}
        self._shards: Shards | None = None

    def __len__(self) -> int:
        return len(self.captions)

    def fingerprint(self) -> str:
        return self.captions.fingerprint()

    def compute(self, job: Job) -> None:
        """By all processes of the training; into job.state. Raises ValueError, in a sentence, for a caption of too many tokens,
        and for features beyond the range of float16."""
        if self._shards is not None:  # images held out of the training share them
            return
        config = self.config
        model = text_models.opened(Path(config.folder), config.sha256, config.feature_dim, config.max_tokens)
        folder = job.state / "text_features" / self.split
        grown = Growing(folder, folder.with_suffix(".json"), job.checkpoint_seconds) if job.is_main else None
        done = job.from_main((grown.restored(job.say) or 0) if grown else 0)
        starts = range(done, len(self.every), AT_ONCE)

        def read(start: int) -> np.ndarray:
            features = model.features(self.every[start : start + AT_ONCE], config.max_tokens).numpy()
            return as_float16(features, self.every[start])

        for start, rows in zip(starts, job.track(job.share(starts, read), len(starts), "captions"), strict=False):
            assert grown is not None  # other processes are given nothing
            grown.append("features", rows)
            if grown.is_due() or start == starts[-1]:
                grown.keep(start + len(rows))
        if grown is not None:
            grown.finish()
        job.from_main(None)  # until all are there
        self._shards = Shards(folder, "features", np.float16)

    def told(self, rows: Tensor, generator: torch.Generator | None, labels: Tensor) -> Tensor:
        """(B,) rows -> (B, 1 + S * C) one of the captions of each, drawn from the generator, or the first, beside its label."""
        if self._shards is None:
            raise RuntimeError("the features of captions are asked for before they were computed")
        features = torch.zeros(len(rows), self.config.max_tokens, self.config.feature_dim)
        captions = chosen(self.captions, rows, generator)
        said = [place for place, caption in enumerate(captions) if caption]
        if said:
            found = self._shards.gather(np.array([self._number[captions[place]] for place in said]))
            features[said] = torch.from_numpy(found).float()
        return text_model.beside(features, labels)


def as_float16(features: np.ndarray, caption: str) -> np.ndarray:
    """Raises ValueError for features that float16 does not hold. caption: the first of them."""
    if (largest := np.abs(features).max(initial=0)) > (limit := np.finfo(np.float16).max):
        raise ValueError(
            f"the text model's features of captions from {caption!r:.80} on reach {largest:.3g}, expected at most {limit:.0f}, "
            f"the largest number of float16: choose another text model"
        )
    return features.astype(np.float16)

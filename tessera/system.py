"""A tokenizer and the prior that was trained on its tokens, as one thing that draws images for labels.

What is evaluated and what is served draw by the same lines of code.
"""

from pathlib import Path
from typing import Any

import numpy as np
import torch

from tessera.artifacts import checkpoints
from tessera.artifacts import folder as artifact
from tessera.artifacts import tokens as token_artifact
from tessera.artifacts.images import to_uint8
from tessera.components import load


class ImageGenerator:
    """Reads and verifies both artifacts. Raises ValueError if the prior is of another tokenizer's tokens."""

    def __init__(self, tokenizer: Path, prior: Path):
        self.decoder, _, _ = checkpoints.load_model(tokenizer, "tokenizers")
        self.model, config, self.spec = checkpoints.load_model(prior, "priors")
        self.tokenizer_fingerprint = artifact.fingerprint(tokenizer)
        if self.tokenizer_fingerprint != self.spec.tokenizer_fingerprint:
            raise ValueError(
                f"{prior} was trained on tokens of another tokenizer ({self.spec.tokenizer_fingerprint[:12]}) than "
                f"{tokenizer} ({self.tokenizer_fingerprint[:12]}): decoded so, its samples would be noise. "
                f"Run: dvc repro train_prior@{prior.name}"
            )
        self.module = load("priors", config.kind)  # its Sampling says what may be set
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.decoder.to(self.device), self.model.to(self.device)

    @torch.no_grad()
    def draw(self, labels: np.ndarray, sampling: Any, generator: torch.Generator) -> np.ndarray:
        """(B,) labels -> (B, C, H, W) uint8; sampling: a Sampling of the prior's file; generator: a CPU one.

        Equal labels in equal order, sampling and generator give equal bits, on one machine and number of threads.
        """
        tokens = self.model.sample(torch.from_numpy(labels).to(self.device), sampling, generator)
        if self.module.LEARNS == "indices":
            decoded = self.decoder.decode_indices(tokens)
        else:
            decoded = self.decoder.decode(token_artifact.unstandardize(tokens, self.spec))
        return to_uint8(decoded).cpu().numpy()

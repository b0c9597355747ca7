"""Captions of single images as a pretrained text model reads them: any of the package transformers, from a local folder.

    condition: {kind: text_model, folder: data/weights/clip, sha256: ..., feature_dim: 512, max_tokens: 64}

`python -m tessera.sources.text_models FOLDER` prints this line. The model is frozen. Its features are computed once for each
caption, before a training begins (training/text_features.py), and anew for what somebody wants to see drawn; the prior's
artifact does not hold it, so that the folder is needed wherever captions are read. They are told beside the label, as in
conditions/caption.py, and left out as there; a label without a caption is told alone.

Source: Saharia et al. (Imagen), 2022, arXiv:2205.11487, section 2.1 (features of a frozen text model), section 2.3 (the mean of
them, and attention to each of them); Brooks et al. (InstructPix2Pix), 2023, arXiv:2211.09800, section 3.2.1.

What is told is a row of 1 + S * C float32: the label plus 1, or 0 for none, then the features of each token, 0 behind the last.
Zeros alone are the null condition.

Shape letters: B batch, S max_tokens, C feature_dim, N width of the prior's condition.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from tessera.bases.beside_label import BesideLabel
from tessera.bases.conditional import either_dropped
from tessera.components import MissingPackage, Params
from tessera.contracts import Planned, TokenSpec
from tessera.nn.cross_attention import Context
from tessera.sources import text_models


class Config(Params):
    kind: Literal["text_model"] = "text_model"
    folder: Annotated[str, Field(min_length=1)]  # config.json, safetensors and a tokenizer, as transformers writes them
    sha256: Annotated[str, Field(pattern="^[0-9a-f]{64}$")]  # of what is read of the folder
    feature_dim: Annotated[int, Field(ge=1, le=2**16)]
    max_tokens: Annotated[int, Field(ge=1, le=1024)] = 64  # of a caption, with those that begin and end it
    cross_attention: bool = True  # each layer of the prior attends to the tokens, beside their mean


def problems(config: Config, planned: Planned) -> Iterator[str]:
    """Images without captions; a folder that is not the one that params.yaml says."""
    if planned.said is not None and planned.said.longest_caption == 0:
        yield "the images have no captions: name the file and the column that hold them in dataset.metadata"
    try:
        text_models.require(Path(config.folder), config.sha256, config.feature_dim, config.max_tokens)
        if planned.said is not None and planned.said.longest_caption:
            longest = planned.said.longest_text
            found = len(text_models.tokenizer_of(Path(config.folder))(longest)["input_ids"])
            if found > config.max_tokens:
                yield (
                    f"max_tokens {config.max_tokens} is too few: the longest caption of the images, {longest!r:.80}, has "
                    f"{found:,} tokens; write max_tokens: {found}, or shorten it"
                )
    except (ValueError, MissingPackage) as refusal:
        yield str(refusal)


def encoded(config: Config, captions: Sequence[str], labels: Tensor | None = None) -> Tensor:
    """(B,) captions, "" for none, and (B,) labels, if any -> (B, 1 + S * C). Raises ValueError, in a sentence."""
    model = text_models.opened(Path(config.folder), config.sha256, config.feature_dim, config.max_tokens)
    features = torch.zeros(len(captions), config.max_tokens, config.feature_dim)
    said = [place for place, caption in enumerate(captions) if caption]
    if said:
        features[said] = model.features([captions[place] for place in said], config.max_tokens)
    return beside(features, labels)


def beside(features: Tensor, labels: Tensor | None) -> Tensor:
    """(B, S, C) features, and (B,) labels, if any -> (B, 1 + S * C), what is told."""
    first = features.new_zeros(len(features), 1) if labels is None else (labels + 1).to(features.dtype).unsqueeze(1)
    return torch.cat([first, features.flatten(1)], dim=1)


def null(told: Tensor) -> Tensor:
    """(B, 1 + S * C) -> the same number of null conditions."""
    return torch.zeros_like(told)


def partly_dropped(told: Tensor, rate: float) -> Tensor:
    """(B, 1 + S * C) -> a share `rate` of them without their caption, and another one without their label.

    Brooks et al., section 3.2.1: so that each may be told alone.
    """
    return either_dropped(told, null(told), rate)


class Network(BesideLabel):
    """(B, 1 + S * C) conditions, or (B,) labels up to and including the null label -> (B, N)."""

    def __init__(self, config: Config, spec: TokenSpec, replaced: nn.Embedding):
        context = Context(config.feature_dim) if config.cross_attention else None
        super().__init__(spec, replaced, context, config.feature_dim)
        self.sizes = (config.max_tokens, config.feature_dim)

    def silent(self, number: int) -> Tensor:
        return torch.zeros(number, self.sizes[0] * self.sizes[1])

    def elements(self, beside: Tensor) -> tuple[Tensor, Tensor]:
        features = beside.unflatten(1, self.sizes)
        return features, (features != 0).any(dim=2)

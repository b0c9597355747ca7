"""Embedding: a vector of each image that another network made, such as one of CLIP, from the user's own metadata.

    dataset:
      metadata: {embedding: clip, ...}              # the column with a list of numbers
    condition: {kind: embedding, embedding_dim: 512}

It is told beside the label; an image without a vector is told its label alone. In training a share `label_dropout` is told
nothing, and of the rest as many lack their vector, and as many others their label, so that each may be told alone.

Sources: Ramesh et al. (unCLIP), 2022, arXiv:2204.06125, section 2.1 (an embedding of an image is projected and added to what
the time is); Brooks et al. (InstructPix2Pix), 2023, arXiv:2211.09800, section 3.2.1 (conditions are left out together and
alone).
Differs from them: any vector; it passes a hidden layer, as its length and its direction apart, so that the scale of its numbers
does not matter.

What is told is a row of 1 + E float32: the label plus 1, or 0 for none; the vector, or NaN where it is missing. The row
(0, NaN, ...) is the null condition.

Shape letters: B batch, E numbers of a vector, N width of the prior's condition.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor, nn

from tessera.artifacts.captions import Example
from tessera.artifacts.vectors import Vectors
from tessera.bases.conditional import either_dropped
from tessera.bases.of_images import ToldSplit, examples_of_rows, told_rows
from tessera.components import Params
from tessera.contracts import Planned, TokenSpec

NAME = "embeddings"
SMALLEST = 1e-12  # mean square of a vector that has a direction


class Config(Params):
    kind: Literal["embedding"] = "embedding"
    embedding_dim: Annotated[int, Field(ge=1, le=65_536)]  # numbers of each vector
    width: Annotated[int, Field(ge=1, le=8192)] = 256  # of the hidden layer that a vector passes


def problems(config: Config, planned: Planned) -> Iterator[str]:
    """Of the params: images without vectors, or with vectors of another length."""
    found = None if planned.said is None else planned.said.embedding_dim
    if found == 0:
        yield "the images have no vectors: name the column that holds them as dataset.metadata.embedding"
    elif found is not None and found != config.embedding_dim:
        yield (
            f"embedding_dim is {config.embedding_dim:,}, but the vectors of the images have {found:,} numbers: write "
            f"embedding_dim: {found}"
        )


def encoded(config: Config, said: Sequence[Any], labels: Tensor | None = None) -> Tensor:
    """(B,) vectors, each (E,) numbers or None for none, and (B,) labels, if any -> (B, 1 + E) float32.

    Raises ValueError, in a sentence, for what is no such vector.
    """
    rows = torch.full((len(said), 1 + config.embedding_dim), math.nan)
    rows[:, 0] = 0 if labels is None else labels + 1
    for row, one in zip(rows, said, strict=True):
        if one is not None:
            row[1:] = _vector(config, one)
    return rows


def _vector(config: Config, given: Any) -> Tensor:
    try:
        found = np.asarray(given.numpy(force=True) if isinstance(given, Tensor) else given)
    except (TypeError, ValueError):  # lists of several lengths, bfloat16
        found = np.empty(0, object)
    if found.dtype.kind not in "iuf" or found.ndim != 1:
        raise ValueError(f"an embedding is {str(given)!r:.60}: expected a list of {config.embedding_dim:,} numbers")
    if len(found) != config.embedding_dim:
        raise ValueError(f"an embedding has {len(found):,} numbers: expected embedding_dim {config.embedding_dim:,}")
    with np.errstate(over="ignore"):
        found = found.astype(np.float32)
    if not np.isfinite(found).all():
        raise ValueError("an embedding has numbers that are not finite: expected finite ones within float32")
    return torch.from_numpy(found)


def is_one(said: Any) -> bool:
    """Whether this is what is said of an image: numbers, or None for none."""
    if isinstance(said, Tensor):
        return said.ndim != 3  # which a picture has
    return said is None or isinstance(said, list | tuple | np.ndarray)


class OfEmbeddings:
    """The vectors of the images of a split, as they are told; they stay on the disk until a batch asks for them."""

    def __init__(self, vectors: Vectors, embedding_dim: int):
        """Raises ValueError for vectors of another length."""
        self.vectors = vectors
        if vectors.dim != embedding_dim:
            raise ValueError(
                f"embedding_dim is {embedding_dim:,}, but the vectors of {vectors.split} images have {vectors.dim:,} numbers: "
                f"write embedding_dim: {vectors.dim}"
            )

    def __len__(self) -> int:
        return len(self.vectors)

    def fingerprint(self) -> str:
        return self.vectors.fingerprint()

    def told(self, rows: Tensor, generator: torch.Generator | None, labels: Tensor) -> Tensor:
        """(B,) rows -> (B, 1 + E) the vector of each beside its label."""
        found = torch.from_numpy(self.vectors.of(rows.numpy()))
        return torch.cat([labels.unsqueeze(1) + 1.0, found], dim=1)


def of_images(config: Config, images: Path, split: str) -> OfEmbeddings:
    return OfEmbeddings(Vectors(images, split), config.embedding_dim)


def examples(config: Config, splits: Mapping[str, ToldSplit], seed: int) -> list[Example]:
    """The vectors of the first test images."""
    return examples_of_rows(splits)


def of_examples(config: Config, examples: Sequence[Example], labels: Tensor) -> Tensor:
    """(B,) examples, and (B,) labels beside them -> (B, 1 + E)."""
    return told_rows(examples, labels)


def card(config: Config) -> str:
    """What was told, and how to tell it."""
    return (
        f"It was told an embedding of each image beside the label, {config.embedding_dim:,} numbers that another "
        "network made: `system.sample(embeddings=..., labels=[0])`. Name that network here."
    )


def null(told: Tensor) -> Tensor:
    """(B, 1 + E) -> the same number of null conditions."""
    found = torch.full_like(told, math.nan)
    found[:, 0] = 0
    return found


def partly_dropped(told: Tensor, rate: float) -> Tensor:
    """(B, 1 + E) -> a share `rate` of them without their vector, and another one without their label.

    Brooks et al., section 3.2.1: so that each may be told alone.
    """
    return either_dropped(told, null(told), rate)


class Network(nn.Module):
    """(B, 1 + E) conditions, or (B,) labels up to and including the null label -> (B, N), a sum over what is told.

    It stands where a table of labels would.
    """

    def __init__(self, config: Config, spec: TokenSpec, replaced: nn.Embedding):
        """replaced: the table of labels, which is kept for these, and whose scale what a vector says has."""
        super().__init__()
        self.context = None  # there is no sequence
        self.num_classes, self.embedding_dim = spec.num_classes, config.embedding_dim
        self.labels = replaced
        self.nothing = nn.Parameter(torch.zeros(replaced.embedding_dim))  # what no vector is
        self.read = nn.Sequential(
            nn.Linear(config.embedding_dim + 1, config.width),
            nn.SiLU(),
            nn.Linear(config.width, replaced.embedding_dim),
        )
        scale = float(replaced.weight.detach().std())
        nn.init.normal_(self.read[2].weight, std=2 * scale / config.width**0.5)

    def forward(self, told: Tensor) -> Tensor:
        if told.ndim == 1:
            labels = told
            vectors = told.new_full((len(told), self.embedding_dim), math.nan, dtype=torch.float32)
        else:
            labels, vectors = (told[:, 0].long() - 1) % (self.num_classes + 1), told[:, 1:]
        is_missing = vectors[:, :1].isnan()
        said = torch.where(is_missing, self.nothing, self.read(direction_and_length(vectors.nan_to_num(0.0))))
        return self.labels(labels) + said


def direction_and_length(vectors: Tensor) -> Tensor:
    """(B, E) -> (B, E + 1): numbers of mean square 1, and the logarithm of what they were divided by; of zeros, zeros and the
    least such logarithm."""
    mean_square = vectors.square().mean(dim=1, keepdim=True).clamp_min(SMALLEST)
    return torch.cat([vectors * mean_square.rsqrt(), mean_square.log() / 2], dim=1)

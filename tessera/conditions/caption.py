"""Captions: what an image shows, in words, read byte by byte by a small transformer that is trained with the prior.

Bytes of UTF-8 need no vocabulary, no download and no language: 七 is three of them. A caption is a row of max_bytes numbers,
its bytes and then zeros; zeros alone are the null caption, which says nothing and has a vector of its own. All captions are of
one length for the network, so that none depends on the others of its batch.

A label is read as a caption of its class: in training as any of them, drawn anew each time, otherwise as the first. What
speaks of labels (quotas, judges, edits) therefore works as it does without captions.

Sources: Xue et al., "ByT5", 2021, arXiv:2105.13626, section 3 (bytes in the place of words); Saharia et al. (Imagen), 2022,
arXiv:2205.11487, section 2.3 (the pooled text enters where the time does); the body is nn/transformer.py.
Differs from them: learned from the captions of the images alone; no attention to single words.

Shape letters: B batch, T max_bytes, N width of the prior's condition, E width of the encoder.
"""

from collections.abc import Iterator, Sequence
from typing import Annotated, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from tessera.bases.transformer import TransformerConfig
from tessera.contracts import Planned, TokenSpec
from tessera.nn.transformer import RMSNorm, Transformer

NUM_BYTES = 256
Caption = Annotated[str, Field(min_length=1)]


class Config(TransformerConfig):
    kind: Literal["caption"] = "caption"
    width: Annotated[int, Field(ge=8)] = 64
    depth: Annotated[int, Field(ge=1)] = 2
    heads: Annotated[int, Field(ge=1)] = 2
    max_bytes: Annotated[int, Field(ge=1, le=1024)] = 32  # of a caption, in UTF-8
    # of each class, in the order of the labels: what its images are called. The first caption stands for the label
    of_classes: Annotated[tuple[Annotated[tuple[Caption, ...], Field(min_length=1)], ...], Field(min_length=1)]

    @model_validator(mode="after")
    def _captions_can_be_read(self) -> "Config":
        for captions in self.of_classes:
            encoded(captions, self.max_bytes)
        return self


def problems(config: Config, planned: Planned) -> Iterator[str]:
    """Of the params: a caption that two classes share says neither."""
    owners: dict[str, int] = {}
    for label, captions in enumerate(config.of_classes):
        for caption in captions:
            owner = owners.setdefault(caption, label)
            if owner != label:
                yield f"of_classes: {caption!r} is a caption of class {owner} and of class {label}: leave it to one of them"


def encoded(captions: Sequence[str], max_bytes: int) -> Tensor:
    """(B,) captions -> (B, max_bytes) int64, bytes of UTF-8, then zeros. Raises ValueError, in a sentence, for what is none."""
    rows = torch.zeros(len(captions), max_bytes, dtype=torch.long)
    for row, caption in zip(rows, captions, strict=True):
        if not isinstance(caption, str):
            raise ValueError(f"{caption!r:.80} is no caption: expected text")
        try:
            found = caption.encode()
        except UnicodeEncodeError:
            raise ValueError(f"the caption {caption!r:.80} is no Unicode text: write its characters anew") from None
        if not caption.strip() or "\0" in caption:
            raise ValueError(f"the caption {caption!r:.80} is empty or has the character NUL: expected words")
        if len(found) > max_bytes:
            raise ValueError(
                f"the caption {caption!r:.80} has {len(found):,} bytes in UTF-8, expected at most max_bytes {max_bytes}: "
                f"say it in fewer words, or raise max_bytes and train again"
            )
        row[: len(found)] = torch.tensor(list(found))
    return rows


def null(captions: Tensor) -> Tensor:
    """(B, T) captions -> (B, T) null captions."""
    return torch.zeros_like(captions)


class Network(nn.Module):
    """(B, T) captions, or (B,) labels up to and including the null label -> (B, N). It stands where a table of labels would.

    Saharia et al., section 2.3: the mean over the bytes read, which is added to what the time or the start of a sequence is.
    """

    table: Tensor
    counts: Tensor

    def __init__(self, config: Config, spec: TokenSpec, replaced: nn.Embedding):
        """replaced: the table of labels, whose width and scale it has. Raises ValueError unless each class has captions."""
        super().__init__()
        if len(config.of_classes) != spec.num_classes:
            raise ValueError(
                f"condition.of_classes has captions of {len(config.of_classes)} classes, expected {spec.num_classes}, a list "
                f"for each label in their order: add or take out lists"
            )
        most = max(map(len, config.of_classes))
        table = torch.zeros(
            spec.num_classes + 1, most, config.max_bytes, dtype=torch.long
        )  # the last: the null caption
        for label, captions in enumerate(config.of_classes):
            table[label, : len(captions)] = encoded(captions, config.max_bytes)
        self.register_buffer("table", table, persistent=False)
        self.register_buffer("counts", torch.tensor([*map(len, config.of_classes), 1]), persistent=False)
        self.embedding = nn.Embedding(NUM_BYTES, config.width)
        self.position = nn.Parameter(torch.randn(config.max_bytes, config.width) * 0.02)
        self.transformer = Transformer(
            config.width, config.depth, config.heads, (1, config.max_bytes), config.dropout, is_causal=False
        )
        self.norm = RMSNorm(config.width)
        self.leave = nn.Linear(config.width, replaced.embedding_dim)
        self.nothing = nn.Parameter(torch.zeros(replaced.embedding_dim))  # what the null caption is
        scale = float(replaced.weight.detach().std())
        nn.init.normal_(self.embedding.weight, std=0.02)
        nn.init.normal_(self.leave.weight, std=scale / config.width**0.5)
        nn.init.zeros_(self.leave.bias)

    def of_labels(self, labels: Tensor) -> Tensor:
        """(B,) labels -> (B, T): in training one of the captions of each, at random, otherwise its first."""
        if not self.training:
            return self.table[labels, 0]
        number = torch.rand(labels.shape, device=labels.device) * self.counts[labels]
        return self.table[labels, number.long()]

    def forward(self, told: Tensor) -> Tensor:
        captions = self.of_labels(told) if told.ndim == 1 else told
        is_read = (captions != 0).unsqueeze(2)  # (B, T, 1)
        h = self.transformer(self.embedding(captions) + self.position)
        mean = (h * is_read).sum(dim=1) / is_read.sum(dim=1).clamp_min(1)
        return torch.where(is_read.any(dim=1), self.leave(self.norm(mean)), self.nothing)

"""Captions as bytes, and the small transformer that reads them: what conditions and judges of words share.

Bytes of UTF-8 need no vocabulary, no download and no language: 七 is three of them. All captions are of one length for the
network, so that none depends on the others of its batch.

Sources: Xue et al., "ByT5", 2021, arXiv:2105.13626, section 3 (bytes in the place of words); Saharia et al. (Imagen), 2022,
arXiv:2205.11487, section 2.3 (the pooled text); the body is nn/transformer.py.
Differs from them: learned from the captions of the images alone.

What is told is a row of 1 + max_bytes numbers: the label plus 1, or 0 for none; the bytes of the caption, then zeros.

Shape letters: B batch, T max_bytes, N what is given out, E width of the encoder.
"""

from collections.abc import Iterator, Sequence
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor, nn

from tessera.bases.transformer import TransformerConfig
from tessera.nn.transformer import RMSNorm, Transformer

NUM_BYTES = 256


class Reads(TransformerConfig):
    """The settings of what reads captions."""

    width: Annotated[int, Field(ge=8)] = 64
    depth: Annotated[int, Field(ge=1)] = 2
    heads: Annotated[int, Field(ge=1)] = 2
    max_bytes: Annotated[int, Field(ge=1, le=1024)] = 32  # of a caption, in UTF-8


def unreadable(config: Reads, said: Any) -> Iterator[str]:
    """A sentence if images of which metadata say this (contracts.Planned) have no captions, or longer ones."""
    longest = None if said is None else said.longest_caption
    if longest == 0:
        yield (
            "the images have no captions: name the file and the column that hold them in dataset.metadata, or, for a prior, "
            "write condition.of_classes, with captions of each class"
        )
    elif longest is not None and longest > config.max_bytes:
        yield too_few(config.max_bytes, longest, "the images")


def too_few(max_bytes: int, longest: int, images: str) -> str:
    """The sentence about captions that do not fit."""
    return (
        f"max_bytes {max_bytes} is too few: the longest caption of {images} has {longest:,} bytes in UTF-8; write "
        f"max_bytes: {longest}, or shorten it"
    )


def encoded(captions: Sequence[str], max_bytes: int, labels: Tensor | None = None) -> Tensor:
    """(B,) captions, "" for none, and (B,) labels, if any -> (B, 1 + max_bytes) int64.

    Raises ValueError, in a sentence, for what is no caption.
    """
    rows = torch.zeros(len(captions), 1 + max_bytes, dtype=torch.long)
    if labels is not None:
        rows[:, 0] = labels + 1
    for row, caption in zip(rows, captions, strict=True):
        if caption == "":
            continue
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
        row[1 : 1 + len(found)] = torch.tensor(list(found))
    return rows


class Reader(nn.Module):
    """(B, T) captions -> (B, N). Saharia et al., section 2.3: a linear map of the mean over the bytes read."""

    def __init__(self, config: Reads, out_dim: int, scale: float):
        """scale: the deviation of what is given out, about."""
        super().__init__()
        self.embedding = nn.Embedding(NUM_BYTES, config.width)
        self.position = nn.Parameter(torch.randn(config.max_bytes, config.width) * 0.02)
        self.transformer = Transformer(
            config.width, config.depth, config.heads, (1, config.max_bytes), config.dropout, is_causal=False
        )
        self.norm = RMSNorm(config.width)
        self.leave = nn.Linear(config.width, out_dim)
        nn.init.normal_(self.embedding.weight, std=0.02)
        nn.init.normal_(self.leave.weight, std=scale / config.width**0.5)
        nn.init.zeros_(self.leave.bias)

    def read(self, captions: Tensor) -> Tensor:
        """Of a caption without bytes it says the same as of any other such one."""
        return self.pooled(self.sequence(captions), captions)

    def sequence(self, captions: Tensor) -> Tensor:
        """(B, T) captions -> (B, T, E) what each byte is among the others; of places without a byte nothing is meant."""
        return self.transformer(self.embedding(captions) + self.position)

    def pooled(self, sequence: Tensor, captions: Tensor) -> Tensor:
        """(B, T, E) -> (B, N)."""
        is_read = is_said(captions).unsqueeze(2)  # (B, T, 1)
        mean = (sequence * is_read).sum(dim=1) / is_read.sum(dim=1).clamp_min(1)
        return self.leave(self.norm(mean))


def is_said(captions: Tensor) -> Tensor:
    """(B, T) captions -> (B, T) which places hold a byte."""
    return captions != 0

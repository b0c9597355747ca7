"""Captions: what an image shows, in words, read byte by byte by a small transformer that is trained with the prior.

Captions are of single images (dataset.metadata) or of classes (of_classes). Those of images are told beside the label, in
training one of the captions of an image, drawn anew each time; a label without a caption is told alone. Those of classes are
told in the place of the label, which is read as one of them: in training as any, otherwise as the first. What speaks of labels
(quotas, judges, edits) therefore works as it does without captions.

Source: Brooks et al. (InstructPix2Pix), 2023, arXiv:2211.09800, section 3.2.1 (two conditions are left out together, and each
alone); what reads captions is bases/captions.py. With cross_attention every place of the image attends to single bytes as well
(nn/cross_attention.py).

What is told is a row of 1 + max_bytes numbers: the label plus 1, or 0 for none; the bytes of the caption, then zeros. Zeros
alone are the null condition, which says nothing.

Shape letters: B batch, T max_bytes, N width of the prior's condition.
"""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from tessera.artifacts import captions as image_captions
from tessera.artifacts.captions import Example
from tessera.bases import captions
from tessera.bases.captions import Reader, Reads, is_said, unreadable
from tessera.bases.conditional import either_dropped
from tessera.bases.of_images import OfCaptions, ToldSplit, examples_of_captions
from tessera.contracts import Planned, TokenSpec
from tessera.nn.cross_attention import Context

NAME = "captions"
Caption = Annotated[str, Field(min_length=1)]


class Config(Reads):
    kind: Literal["caption"] = "caption"
    # of each class, in the order of the labels: what its images are called. The first caption stands for the label.
    # None: the captions of the images
    of_classes: (
        Annotated[tuple[Annotated[tuple[Caption, ...], Field(min_length=1)], ...], Field(min_length=1)] | None
    ) = None
    cross_attention: bool = (
        False  # each layer of the prior attends to the bytes, beside the mean of all that it is told
    )

    @property
    def replaces_label(self) -> bool:
        """Whether a label is read as what is told, in the place of being told beside it."""
        return self.of_classes is not None

    @model_validator(mode="after")
    def _captions_can_be_read(self) -> "Config":
        for each in self.of_classes or ():
            captions.encoded(each, self.max_bytes)
        return self


def problems(config: Config, planned: Planned) -> Iterator[str]:
    """Of the params: images without captions, or with longer ones; a caption that two classes share says neither."""
    if config.of_classes is None:
        yield from unreadable(config, planned.said)
    owners: dict[str, int] = {}
    for label, of_class in enumerate(config.of_classes or ()):
        for caption in of_class:
            owner = owners.setdefault(caption, label)
            if owner != label:
                yield f"of_classes: {caption!r} is a caption of class {owner} and of class {label}: leave it to one of them"


def is_one(said: Any) -> bool:
    """Whether this is what is said of an image."""
    return isinstance(said, str)


def encoded(config: Config, said: Sequence[str], labels: Tensor | None = None) -> Tensor:
    """(B,) captions, "" for none, and (B,) labels, if any -> (B, 1 + T). Raises ValueError, in a sentence."""
    return captions.encoded(said, config.max_bytes, labels)


def of_images(config: Config, images: Path, split: str) -> OfCaptions:
    return OfCaptions(image_captions.read(images, split), config.max_bytes, split)


def examples(config: Config, splits: Mapping[str, ToldSplit], seed: int) -> list[Example]:
    """Captions that were trained on, and others."""
    return examples_of_captions(splits, seed)


def of_examples(config: Config, examples: Sequence[Example], labels: Tensor) -> Tensor:
    """(B,) examples, and (B,) labels beside them -> (B, 1 + T)."""
    return encoded(config, [one.caption for one in examples], labels)


def text_of(example: Example) -> str:
    """What stands below a sample that was told this."""
    return example.caption


def card(config: Config) -> str:
    """What was told, and how to tell it."""
    if config.of_classes is None:
        return (
            f"It was told the captions of single images, of at most {config.max_bytes} bytes, beside the label: "
            f'`system.sample(captions=["..."], labels=[0])`.'
        )
    shown = [repr(each[-1]) for each in config.of_classes[:3]]
    return (
        f"It was told captions of at most {config.max_bytes} bytes, such as {', '.join(shown)} (all are below): "
        "`system.sample(captions=[...])`. A label is read as the first caption of its class."
    )


def null(told: Tensor) -> Tensor:
    """(B, 1 + T) -> the same number of null conditions."""
    return torch.zeros_like(told)


def partly_dropped(told: Tensor, rate: float) -> Tensor:
    """(B, 1 + T) -> a share `rate` of them without their caption, and another one without their label.

    Brooks et al., section 3.2.1: so that each may be told alone.
    """
    return either_dropped(told, null(told), rate)


class Network(Reader):
    """(B, 1 + T) conditions, or (B,) labels up to and including the null label -> (B, N). It stands where a table of labels
    would: what is said is added to what the time or the start of a sequence is.
    """

    table: Tensor
    counts: Tensor

    def __init__(self, config: Config, spec: TokenSpec, replaced: nn.Embedding):
        """replaced: the table of labels, whose width and scale it has. Raises ValueError unless all classes have captions."""
        super().__init__(config, replaced.embedding_dim, float(replaced.weight.detach().std()))
        self.nothing = nn.Parameter(torch.zeros(replaced.embedding_dim))  # what no caption is
        self.context = Context(config.width) if config.cross_attention else None
        self.num_classes, self.max_bytes = spec.num_classes, config.max_bytes
        self.labels = replaced if config.of_classes is None else None  # beside captions of images
        if config.of_classes is not None:
            self._keep(config.of_classes, spec)

    def _keep(self, of_classes: Sequence[Sequence[str]], spec: TokenSpec) -> None:
        if len(of_classes) != spec.num_classes:
            raise ValueError(
                f"condition.of_classes has captions of {len(of_classes)} classes, expected {spec.num_classes}, a list "
                f"for each label in their order: add or take out lists"
            )
        most = max(map(len, of_classes))
        table = torch.zeros(spec.num_classes + 1, most, 1 + self.max_bytes, dtype=torch.long)  # the last: null
        for label, each in enumerate(of_classes):
            table[label, : len(each)] = captions.encoded(each, self.max_bytes)
        self.register_buffer("table", table, persistent=False)
        self.register_buffer("counts", torch.tensor([*map(len, of_classes), 1]), persistent=False)

    def of_labels(self, labels: Tensor) -> Tensor:
        """(B,) labels -> (B, 1 + T): each alone; or, where classes have captions, one of them, in training at random."""
        if self.labels is not None:
            alone = labels.new_zeros(len(labels), 1 + self.max_bytes)
            alone[:, 0] = (labels + 1) % (self.num_classes + 1)
            return alone
        if not self.training:
            return self.table[labels, 0]
        number = torch.rand(labels.shape, device=labels.device) * self.counts[labels]
        return self.table[labels, number.long()]

    def forward(self, told: Tensor) -> Tensor:
        told = self.of_labels(told) if told.ndim == 1 else told
        read = told[:, 1:]
        is_there, sequence = is_said(read), self.sequence(read)
        if self.context is not None:
            self.context.tell(sequence, is_there)
        said = torch.where(is_there.any(dim=1, keepdim=True), self.pooled(sequence, read), self.nothing)
        if self.labels is None:
            return said
        return said + self.labels((told[:, 0] - 1) % (self.num_classes + 1))

"""What conditions tell of the images of a split, where several of them tell it alike: captions, and rows of numbers.

A condition's `of_images` gives an object that training/told.py asks for the rows of a batch (OfImages); its
`examples` are what a prior keeps of them, by which its samples are drawn: captions that it was trained on, and those of test
images, which are told apart by what of them is new.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from tessera import seeding
from tessera.artifacts.captions import Captions, Example, grouping
from tessera.bases.captions import encoded, too_few

MOST_EXAMPLES = 10_000  # of a split, that a prior keeps
MOST_NUMBERS = 2**24  # in all rows that a prior keeps


class OfImages(Protocol):
    """What a condition (tessera/conditions) tells of the images of a split: `of_images(config, images, split)` of its file.

    One that takes computing also has `compute(job)`, called once before a training begins.
    """

    def __len__(self) -> int: ...  # of all images of the split
    def fingerprint(self) -> str: ...  # of all that is told of them

    def told(self, rows: Tensor, generator: torch.Generator | None, labels: Tensor) -> Tensor: ...

    # (B,) rows and (B,) labels -> (B, ...) what is told of each; from the generator what is drawn anew each time, where there
    # is a choice; without one the first


class ToldSplit(Protocol):
    """Tokens of a split beside what is told of their images."""

    said: Any  # OfImages
    rows: np.ndarray  # (N,) int64 which of the images of the split these are
    labels: np.ndarray  # (N,) int64

    def __len__(self) -> int: ...


def chosen(captions: Captions, rows: Tensor, generator: torch.Generator | None) -> list[str]:
    """(B,) rows -> one of the captions of each, drawn from the generator, or the first; "" where there is none."""
    draws = torch.zeros(len(rows)) if generator is None else torch.rand(len(rows), generator=generator)
    some = [captions.of(row) or [""] for row in rows.tolist()]
    return [each[int(draw * len(each))] for each, draw in zip(some, draws.tolist(), strict=True)]


class OfCaptions:
    """The captions of the images of a split, as they are told."""

    def __init__(self, captions: Captions, max_bytes: int, split: str):
        """Raises ValueError for a caption of more bytes."""
        self.captions, self.max_bytes = captions, max_bytes
        if captions.longest > max_bytes:
            raise ValueError(too_few(max_bytes, captions.longest, f"{split} images"))

    def __len__(self) -> int:
        return len(self.captions)

    def fingerprint(self) -> str:
        return self.captions.fingerprint()

    def told(self, rows: Tensor, generator: torch.Generator | None, labels: Tensor) -> Tensor:
        """(B,) rows -> (B, 1 + T) one of the captions of each, drawn from the generator, or the first, beside its label."""
        return encoded(chosen(self.captions, rows, generator), self.max_bytes, labels)


def examples_of_captions(splits: Mapping[str, ToldSplit], seed: int) -> list[Example]:
    """At most MOST_EXAMPLES captions of either split, each with a label that an image of it had."""
    group_of = grouping(splits["train"].said.captions)
    both = [(name, pair) for name in ("train", "test") for pair in _some(splits[name], seed, name)]
    return [Example(caption, label, group_of(caption)) for _, (caption, label) in both]


def _some(split: ToldSplit, seed: int, name: str) -> Iterator[tuple[str, int]]:
    """Different captions with their labels, at most MOST_EXAMPLES, drawn evenly."""
    pairs = dict.fromkeys(
        (caption, int(split.labels[row]))
        for row in range(len(split))
        for caption in split.said.captions.of(int(split.rows[row]))
    )
    each = sorted(pairs)
    order = seeding.numpy_generator(seed, "captions", name).permutation(len(each))
    yield from (each[place] for place in np.sort(order[:MOST_EXAMPLES]))


def examples_of_rows(splits: Mapping[str, ToldSplit]) -> list[Example]:
    """What is told beside the labels of the first test images: at most MOST_EXAMPLES rows, and MOST_NUMBERS in them."""
    test = splits["test"]
    (width,) = test.said.told(torch.arange(1), None, torch.zeros(1))[0, 1:].shape
    number = min(len(test), MOST_EXAMPLES, max(1, MOST_NUMBERS // width))
    labels = torch.from_numpy(test.labels[:number])
    rows = test.said.told(torch.arange(number), None, labels)[:, 1:].numpy()
    return [Example("", label, "held_out", {}, row) for label, row in zip(labels.tolist(), rows, strict=True)]


def told_rows(examples: Sequence[Any], labels: Tensor) -> Tensor:
    """(B,) examples that are rows, and (B,) labels -> (B, 1 + width) float32, as these were told in training."""
    rows = torch.from_numpy(np.stack([one.vector for one in examples]))
    return torch.cat([labels.unsqueeze(1) + 1.0, rows], dim=1)

"""Tokens with what is told of their images in the place of labels: the captions, attributes or vectors that metadata gave them.

A prior keeps some of these in its artifact, by which its samples are drawn: captions that it was trained on, and those of test
images, which are told apart by what of them is new.
"""

import hashlib
import itertools
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from tessera import seeding
from tessera.artifacts import captions as image_captions
from tessera.artifacts import folder as artifact
from tessera.artifacts import images as image_artifact
from tessera.artifacts.captions import Attributes, Captions, Example, grouping, write_examples_file
from tessera.artifacts.images import Images
from tessera.artifacts.tokens import Places, Tokens, TokensOnDevice
from tessera.artifacts.vectors import Vectors
from tessera.bases.captions import encoded, too_few
from tessera.components import Params, load
from tessera.contracts import ImageBatch, Job, TokenBatch

MOST_EXAMPLES = 10_000  # captions of a split that a prior keeps
MOST_NUMBERS = 2**24  # in all vectors that a prior keeps
AT_ONCE = 1000  # images whose attributes are encoded together


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


class OfAttributes:
    """The attributes of the images of a split, as they are told."""

    def __init__(self, config: Params, said: Iterable[Attributes]):
        """Raises ValueError, in a sentence, for what is no value of an attribute."""
        encode = load("conditions", config.kind).encoded
        told = ({column: one.get(column) for column in config.columns} for one in said)
        pieces = [encode(config, some) for some in iter(lambda: list(itertools.islice(told, AT_ONCE)), [])]
        self.rows = torch.cat(pieces)  # (N, 1 + A), without labels

    def __len__(self) -> int:
        return len(self.rows)

    def fingerprint(self) -> str:
        return hashlib.sha256(self.rows.numpy().tobytes()).hexdigest()

    def told(self, rows: Tensor, generator: torch.Generator | None, labels: Tensor) -> Tensor:
        """(B,) rows -> (B, 1 + A) the attributes of each beside its label."""
        found = self.rows[rows]
        found[:, 0] = labels + 1
        return found


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


class OfPictures:
    """What pictures show of the images of a split (conditions/image.py), made of their pixels as a batch asks for them."""

    def __init__(self, config: Params, images: Images, fingerprint: str):
        self.config, self.images, self._fingerprint = config, images, fingerprint

    def __len__(self) -> int:
        return len(self.images)

    def fingerprint(self) -> str:
        return self._fingerprint

    def told(self, rows: Tensor, generator: torch.Generator | None, labels: Tensor) -> Tensor:
        """(B,) rows -> (B, 1 + C * H * W) the picture of each beside its label."""
        return load("conditions", self.config.kind).encoded(self.config, self.images.uint8(rows.numpy()), labels)


class ToldTokens(Tokens):
    """Tokens whose batches hold (B, ...) conditions where those of others hold labels; `labels` are the images' still."""

    def __init__(self, tokens: Tokens, said: Any):
        """said: one of the classes above, of all images of the split, of which `tokens` may be some.

        Raises ValueError for another number.
        """
        self.__dict__.update(tokens.__dict__)
        self.said = said
        if len(said) != len(tokens.values):
            raise ValueError(
                f"something is said of {len(said):,} images of {tokens.split}, expected the {len(tokens.values):,} that the "
                f"tokens are of: run dvc repro encode_tokens"
            )

    def told(self, rows: Tensor, generator: torch.Generator | None) -> Tensor:
        labels, rows = torch.from_numpy(self.labels[rows.numpy()]), torch.from_numpy(self.rows[rows.numpy()])
        return self.said.told(rows, generator, labels)

    def stored(self, rows: Tensor, generator: torch.Generator | None = None) -> TokenBatch:
        return super().stored(rows, generator)._replace(labels=self.told(rows, generator))

    def on(self, device: torch.device) -> "ToldOnDevice":
        return ToldOnDevice(self, device)


class ToldImages:
    """Images whose batches hold captions, as those of ToldTokens do, where those of others hold labels."""

    def __init__(self, images: Images, said: OfCaptions):
        self.images, self.said = images, said
        self.pixels, self.labels = images.pixels, images.labels

    def __len__(self) -> int:
        return len(self.images)

    def stored(self, rows: Tensor, generator: torch.Generator | None = None) -> ImageBatch:
        found = self.images.stored(rows, generator)
        return found._replace(labels=self.said.told(rows, generator, found.labels))

    def batch_of(self, stored: ImageBatch) -> ImageBatch:
        return self.images.batch_of(stored)

    def on(self, device: torch.device) -> "ToldImages":
        """Themselves: they stay on the host."""
        return self


class ToldPlaces(NamedTuple):
    """What is stored of a batch where all tokens lie on the device already."""

    rows: Tensor  # (B,) int64
    views: Tensor  # (B,) int64
    told: Tensor  # (B, 1 + T) int64, or (B, 1 + A) or (B, 1 + E) float32


class ToldOnDevice(TokensOnDevice):
    """The tokens lie on the device; captions are read on the host, as they become batches."""

    def stored(self, rows: Tensor, generator: torch.Generator | None = None) -> Any:
        return ToldPlaces(*super().stored(rows, generator), self.tokens.told(rows, generator))

    def batch_of(self, stored: Any) -> TokenBatch:
        return super().batch_of(Places(stored.rows, stored.views))._replace(labels=stored.told)


def told_tokens(condition: Params, splits: dict[str, Tokens], images: Path) -> dict[str, Tokens]:
    """The same tokens, with what the condition tells of their images. Raises ValueError where nothing is said of these."""
    if condition.kind == "attributes":
        return {
            name: ToldTokens(tokens, OfAttributes(condition, image_captions.attributes_of(images, tokens.split)))
            for name, tokens in splits.items()
        }
    if condition.kind == "text_model":
        from tessera.training.text_features import OfTextFeatures  # here, as others do not wait for it

        return {
            name: ToldTokens(tokens, OfTextFeatures(image_captions.read(images, tokens.split), condition, tokens.split))
            for name, tokens in splits.items()
        }
    if condition.kind == "image":
        if any(tokens.num_views > 1 for tokens in splits.values()):
            raise ValueError(
                "the condition shows the image itself, expected one view of each: write prior.num_views: 1"
            )
        found, made = artifact.fingerprint(images), image_artifact.read(images)[1]
        return {name: ToldTokens(each, OfPictures(condition, made[each.split], found)) for name, each in splits.items()}
    if condition.kind == "embedding":
        return {
            name: ToldTokens(tokens, OfEmbeddings(Vectors(images, tokens.split), condition.embedding_dim))
            for name, tokens in splits.items()
        }
    if condition.of_classes is not None:
        return splits
    return {
        name: ToldTokens(
            tokens, OfCaptions(image_captions.read(images, tokens.split), condition.max_bytes, tokens.split)
        )
        for name, tokens in splits.items()
    }


def told_images(config: Params, splits: dict[str, Images], images: Path) -> dict[str, Any]:
    """The same images, with their captions. Raises ValueError without any."""
    return {
        name: ToldImages(each, OfCaptions(image_captions.read(images, name), config.max_bytes, name))
        for name, each in splits.items()
    }


def compute(splits: dict[str, Tokens], job: Job) -> None:
    """What is told, where that takes computing: after `job` has its state, and before a batch is asked for."""
    for tokens in splits.values():
        if isinstance(tokens, ToldTokens) and hasattr(tokens.said, "compute"):
            tokens.said.compute(job)


def fingerprint(splits: dict[str, Tokens]) -> str | None:
    """Of all that a training is told of images; None where it is told of classes alone."""
    found = [tokens.said.fingerprint() for tokens in splits.values() if isinstance(tokens, ToldTokens)]
    return "-".join(found) or None


def write_examples(place: Path, condition: Params, splits: dict[str, Tokens], images: Path, seed: int) -> None:
    """told.json of a prior: at most MOST_EXAMPLES captions of either split, each with a label that an image of it had; or the
    attributes, or the vectors, of as many test images."""
    train, test = splits["train"], splits["test"]
    if condition.kind == "attributes":
        said = list(itertools.islice(image_captions.attributes_of(images, "test"), MOST_EXAMPLES))
        told = [{column: one.get(column) for column in condition.columns} for one in said]
        labels = test.labels.tolist()
        found = [Example("", label, "held_out", one) for one, label in zip(told, labels, strict=False)]
        write_examples_file(place, found)
        return
    if condition.kind in ("image", "embedding"):
        (width,) = test.said.told(torch.arange(1), None, torch.zeros(1))[0, 1:].shape
        number = min(len(test), MOST_EXAMPLES, max(1, MOST_NUMBERS // width))
        labels = torch.from_numpy(test.labels[:number])
        beside = test.said.told(torch.arange(number), None, labels)[:, 1:].numpy()
        both = zip(labels.tolist(), beside, strict=True)
        write_examples_file(place, [Example("", label, "held_out", {}, one) for label, one in both])
        return
    if not isinstance(train, ToldTokens) or not isinstance(test, ToldTokens):
        return
    group_of = grouping(train.said.captions)
    write_examples_file(
        place,
        [
            Example(caption, label, group_of(caption))
            for split in (train, test)
            for caption, label in _some(split, seed)
        ],
    )


def _some(split: ToldTokens, seed: int) -> Iterable[tuple[str, int]]:
    """Different captions with their labels, at most MOST_EXAMPLES, drawn evenly."""
    pairs = dict.fromkeys(
        (caption, int(split.labels[row]))
        for row in range(len(split))
        for caption in split.said.captions.of(int(split.rows[row]))
    )
    each = sorted(pairs)
    order = seeding.numpy_generator(seed, "captions", split.split).permutation(len(each))
    return [each[place] for place in np.sort(order[:MOST_EXAMPLES])]

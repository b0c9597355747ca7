"""Tokens with what is told of their images in the place of labels, as a condition (tessera/conditions) makes it."""

from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tessera.artifacts import captions as image_captions
from tessera.artifacts.captions import write_examples_file
from tessera.artifacts.images import Images
from tessera.artifacts.tokens import Places, Tokens, TokensOnDevice
from tessera.bases.of_images import OfCaptions, OfImages
from tessera.components import Params, load
from tessera.contracts import ImageBatch, Job, TokenBatch


class ToldTokens(Tokens):
    """Tokens whose batches hold (B, ...) conditions where those of others hold labels; `labels` are the images' still."""

    def __init__(self, tokens: Tokens, said: OfImages):
        """said: of all images of the split, of which `tokens` may be some.

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
    """The same tokens, with what the condition tells of their images; as they are where labels are read as that.

    Raises ValueError where nothing is said of these, and for more views of an image than what is told is true of.
    """
    if getattr(condition, "replaces_label", False):
        return splits
    part = load("conditions", condition.kind)
    most = getattr(part, "MOST_VIEWS", None)
    if most is not None and any(tokens.num_views > most for tokens in splits.values()):
        raise ValueError(
            f"the condition shows an image as it is, and not its views, expected at most {most} of each: write "
            f"prior.num_views: {most}"
        )
    return {name: ToldTokens(each, part.of_images(condition, images, each.split)) for name, each in splits.items()}


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


def write_examples(place: Path, condition: Params, splits: dict[str, Tokens], seed: int) -> None:
    """told.json of a prior: some of what is told of images, by which its samples are drawn; none where labels are read as
    that."""
    if all(isinstance(tokens, ToldTokens) for tokens in splits.values()):
        write_examples_file(place, load("conditions", condition.kind).examples(condition, splits, seed))

"""A picture that is to be painted over: the image in gray, its edges, the image made small, or a mask or layout from a file.

    condition: {kind: image, shows: gray, pixels: [64, 64], patch_size: 8}     # colorization
    condition: {kind: image, shows: edges, pixels: [64, 64], patch_size: 8}    # edges to image
    condition: {kind: image, shows: color, pixels: [16, 16], patch_size: 2}    # super-resolution
    condition: {kind: image, shows: file, pixels: [64, 64], patch_size: 8}     # of dataset.metadata.picture, gray levels
    condition: {kind: image, shows: file, channels: 3, pixels: [64, 64], patch_size: 8}

What is told of an image is made of its own pixels, so that data need nothing more, or lies in a file beside it
(sources/pictures.py), of which the nearest pixels are told, so that the classes of a mask are never mixed. prior.num_views must
be 1, as other views of an image are not what it shows. A small transformer reads the picture's patches, to which every place of
the prior attends (nn/cross_attention.py). It is told beside the label, and each of the two is left out in a share of the
training.

Source: Saharia et al. (Palette), 2021, arXiv:2111.05826, section 3 (one network for such tasks, told the other image); Rombach
et al. (latent diffusion), 2022, arXiv:2112.10752, section 3.3 (cross-attention to what an encoder makes of the condition);
Dosovitskiy et al. (ViT), 2020, arXiv:2010.11929, section 3.1 (patches as a sequence); Isola et al. (pix2pix), 2016,
arXiv:1611.07004, section 4 (labels, maps and sketches to photographs); edges by the Sobel operator, as the
square root of the sum of both squares. Gray is the luma of ITU-R BT.601.
Differs from them: the picture is not laid beside the noisy image, which in the latents of a tokenizer has no pixels.

What is told is a row of 1 + C * H * W float32: the label plus 1, or 0 for none, then the picture in [-1, 1], NaN where there is
none. The row (0, NaN, ...) is the null condition.

Shape letters: B batch, C H W the picture, S its patches, E width of the encoder, N width of the prior's condition.
"""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor, nn

from tessera.artifacts import bit_depth
from tessera.artifacts import folder as artifact
from tessera.artifacts import images as image_artifact
from tessera.artifacts.captions import Example
from tessera.artifacts.images import Images, to_uint8
from tessera.artifacts.shown import ShownPictures
from tessera.bases.beside_label import BesideLabel
from tessera.bases.conditional import either_dropped
from tessera.bases.of_images import ToldSplit, examples_of_rows, told_rows
from tessera.bases.transformer import TransformerConfig
from tessera.components import sets
from tessera.contracts import Planned, TokenSpec
from tessera.nn.cross_attention import Context
from tessera.nn.transformer import Transformer

NAME = "pictures"
MOST_VIEWS = 1  # of an image that a prior learns: other views are not what the picture shows
LUMA = (0.299, 0.587, 0.114)
STEEPEST = 4.0  # of the Sobel operator, for values from 0 to 1 along one axis
Side = Annotated[int, Field(ge=1, le=1024)]


class Config(TransformerConfig):
    kind: Literal["image"] = "image"
    shows: Literal["gray", "edges", "color", "file"] = "gray"
    channels: Literal[1, 3] | None = None  # of pictures from files, as dataset.metadata.picture_channels; None: 1
    pixels: tuple[Side, Side]  # height and width of what is told, to which the image is averaged, and a file thinned
    patch_size: Annotated[int, Field(ge=1)] = 8  # side of the patches that are attended to
    width: Annotated[int, Field(ge=8)] = 64
    depth: Annotated[int, Field(ge=1)] = 2
    heads: Annotated[int, Field(ge=1)] = 2

    @property
    def shape(self) -> tuple[int, int, int]:
        """C, H, W."""
        return (self.file_channels or (3 if self.shows == "color" else 1), *self.pixels)

    @property
    def file_channels(self) -> int | None:
        """Of pictures from files; None: they are made of images."""
        return (self.channels or 1) if self.shows == "file" else None

    @model_validator(mode="after")
    def _has_whole_patches(self) -> "Config":
        height, width = self.pixels
        if self.channels is not None and self.shows != "file":
            raise ValueError(
                f"channels is {self.channels}, but it shows {self.shows}: leave out channels, or write shows: file"
            )
        if height % self.patch_size or width % self.patch_size:
            raise ValueError(
                f"pixels {height}x{width} are not divisible by patch_size {self.patch_size}: expected whole patches"
            )
        return self


def problems(config: Config, planned: Planned) -> Iterator[str]:
    """Of the params: pictures that the images cannot give."""
    spec = planned.spec
    if spec.height % config.pixels[0] or spec.width % config.pixels[1]:
        yield (
            f"pixels {config.pixels[0]}x{config.pixels[1]} do not divide the images of {spec.height}x{spec.width}: expected "
            f"sides that go into theirs, such as [{spec.height}, {spec.width}]"
        )
    if config.file_channels is not None and planned.said is not None:
        found = planned.said.picture_channels
        if not found:
            yield "the images have no pictures in files: name the column of their files as dataset.metadata.picture"
        elif found != config.file_channels:
            yield (
                f"its pictures have channels {config.file_channels}, but those in files have {found}: write channels: {found}, "
                f"or dataset.metadata.picture_channels: {config.file_channels}"
            )
    if config.shows == "color" and config.pixels == (spec.height, spec.width):
        yield "shows color in as many pixels as the images have, so that nothing is left to draw: expected fewer pixels"
    if config.shows == "color" and spec.channels != 3:
        yield f"shows color, but the images have channels {spec.channels}: expected 3, or shows: gray"


def shown(config: Config, images: Tensor) -> Tensor:
    """(B, channels, height, width) uint8 or uint16 images, or uint8 pictures of files -> (B, C, H, W) float in [-1, 1].

    Raises ValueError for those that cannot give it.
    """
    height, width = images.shape[2:]
    if config.file_channels not in (None, images.shape[1]):
        raise ValueError(
            f"the pictures have channels {images.shape[1]}: expected {config.file_channels}, as those of files had"
        )
    if height % config.pixels[0] or width % config.pixels[1] or (config.shows == "color" and images.shape[1] != 3):
        raise ValueError(
            f"images of {images.shape[1]}x{height}x{width} cannot be shown in {config.shows} by "
            f"{config.pixels[0]}x{config.pixels[1]} pixels: expected those of the data set that the prior was trained on"
        )
    x = images.float() / 255
    if sets(bit_depth.of(images), "bits"):
        x = bit_depth.to_shares(images)
    if config.file_channels is not None:
        return 2 * F.interpolate(x, config.pixels, mode="nearest-exact") - 1
    if config.shows != "color":
        weights = x.new_tensor(LUMA) if x.shape[1] == 3 else x.new_full((x.shape[1],), 1 / x.shape[1])
        x = (x * weights.view(1, -1, 1, 1)).sum(dim=1, keepdim=True)
    if config.shows == "edges":
        x = edges(x)
    return 2 * F.adaptive_avg_pool2d(x, config.pixels).clamp(0, 1) - 1


def edges(gray: Tensor) -> Tensor:
    """(B, 1, H, W) in [0, 1] -> the same shape: the length of the Sobel gradient, 1 for a step from 0 to 1 along an axis."""
    across = gray.new_tensor([[-1.0, 0, 1], [-2, 0, 2], [-1, 0, 1]])
    kernels = torch.stack([across, across.T]).unsqueeze(1)
    return (
        F.conv2d(F.pad(gray, (1, 1, 1, 1), mode="replicate"), kernels).square().sum(1, keepdim=True).sqrt() / STEEPEST
    )


def encoded(config: Config, images: Tensor | Sequence[Tensor], labels: Tensor | None = None) -> Tensor:
    """(B, channels, height, width) uint8, or uint16 of a data set with 16 bits, and (B,) labels, if any -> (B, 1 + C * H * W).

    Raises ValueError, in a sentence.
    """
    if sets(bit_depth.of(images[0]), "bits"):
        return _of_16_bits(config, images, labels)
    if any(image.dtype != torch.uint8 or image.shape != images[0].shape for image in images):
        raise ValueError(
            "the pictures differ in their shapes, or are no bytes: expected torch.uint8 of (channels, height, width)"
        )
    pixels = shown(config, images if isinstance(images, Tensor) else torch.stack(list(images))).flatten(1)
    first = pixels.new_zeros(len(pixels)) if labels is None else (labels + 1).to(pixels)
    return torch.cat([first.unsqueeze(1), pixels], dim=1)


def _of_16_bits(config: Config, images: Tensor | Sequence[Tensor], labels: Tensor | None) -> Tensor:
    """As `encoded`."""
    if config.file_channels is not None or any(
        image.dtype != images[0].dtype or image.shape != images[0].shape for image in images
    ):
        raise ValueError(
            "the pictures differ in their shapes or dtypes, or are files of 16 bits: expected torch.uint16 of (channels, "
            "height, width) of images, and torch.uint8 of pictures from files"
        )
    pixels = shown(config, images if isinstance(images, Tensor) else torch.stack(list(images))).flatten(1)
    first = pixels.new_zeros(len(pixels)) if labels is None else (labels + 1).to(pixels)
    return torch.cat([first.unsqueeze(1), pixels], dim=1)


def is_one(said: Any) -> bool:
    """Whether this is what is said of an image: a picture."""
    return isinstance(said, Tensor) and said.ndim == 3


class OfPictures:
    """What pictures show of the images of a split, made of their pixels, or of their files, as a batch asks for them."""

    def __init__(self, config: Config, images: Images | ShownPictures, fingerprint: str):
        self.config, self.images, self._fingerprint = config, images, fingerprint

    def __len__(self) -> int:
        return len(self.images)

    def fingerprint(self) -> str:
        return self._fingerprint

    def told(self, rows: Tensor, generator: torch.Generator | None, labels: Tensor) -> Tensor:
        """(B,) rows -> (B, 1 + C * H * W) the picture of each beside its label."""
        return encoded(self.config, self.images.uint8(rows.numpy()), labels)


def of_images(config: Config, images: Path, split: str) -> OfPictures:
    if config.file_channels is not None:
        found = ShownPictures(images, split)
        if found.channels != config.file_channels:
            raise ValueError(
                f"the pictures of {split} images have channels {found.channels}, expected {config.file_channels}: write "
                f"condition.channels: {found.channels}"
            )
        return OfPictures(config, found, found.fingerprint())
    return OfPictures(config, image_artifact.read(images)[1][split], artifact.fingerprint(images))


def examples(config: Config, splits: Mapping[str, ToldSplit], seed: int) -> list[Example]:
    """The pictures of the first test images."""
    return examples_of_rows(splits)


def of_examples(config: Config, examples: Sequence[Example], labels: Tensor) -> Tensor:
    """(B,) examples, and (B,) labels beside them -> (B, 1 + C * H * W)."""
    return told_rows(examples, labels)


def pictures_of(config: Config, examples: Sequence[Example]) -> Tensor:
    """(B,) examples -> (B, C, H, W) uint8, what stands above the samples that were told these."""
    return to_uint8(torch.from_numpy(np.stack([one.vector for one in examples])).view(-1, *config.shape))


def card(config: Config) -> str:
    """What was told, and how to tell it."""
    if config.file_channels is not None:
        return (
            f"It was told a picture from a file beside each image, and its label ({config.pixels[0]} x {config.pixels[1]} "
            f"pixels, {'gray levels' if config.file_channels == 1 else 'colors'}): "
            "`system.sample(pictures=system.preprocess([...], are_told=True), labels=[0])`."
        )
    return (
        f"It was told a picture of each image beside the label ({config.shows}, {config.pixels[0]} x {config.pixels[1]} "
        "pixels): `system.sample(pictures=system.preprocess([...]), labels=[0])`."
    )


def null(told: Tensor) -> Tensor:
    """(B, 1 + C * H * W) -> the same number of null conditions."""
    found = torch.full_like(told, torch.nan)
    found[:, 0] = 0
    return found


def partly_dropped(told: Tensor, rate: float) -> Tensor:
    """(B, 1 + C * H * W) -> a share `rate` of them without their picture, and another one without their label."""
    return either_dropped(told, null(told), rate)


class Network(BesideLabel):
    """(B, 1 + C * H * W) conditions, or (B,) labels up to and including the null label -> (B, N)."""

    def __init__(self, config: Config, spec: TokenSpec, replaced: nn.Embedding):
        super().__init__(spec, replaced, Context(config.width), config.width)
        self.shape, self.patch_size = config.shape, config.patch_size
        channels, *pixels = config.shape
        grid = (pixels[0] // config.patch_size, pixels[1] // config.patch_size)
        self.enter = nn.Linear(channels * config.patch_size**2, config.width)
        self.position = nn.Parameter(torch.randn(grid[0] * grid[1], config.width) * 0.02)
        self.transformer = Transformer(config.width, config.depth, config.heads, grid, config.dropout, is_causal=False)

    def silent(self, number: int) -> Tensor:
        channels, height, width = self.shape
        return torch.full((number, channels * height * width), torch.nan)

    def elements(self, beside: Tensor) -> tuple[Tensor, Tensor]:
        picture = beside.view(-1, *self.shape)
        is_there = ~picture[:, 0, 0, 0].isnan().unsqueeze(1)  # (B, 1)
        patches = F.pixel_unshuffle(picture.nan_to_num(0.0), self.patch_size).flatten(2).transpose(1, 2)
        sequence = self.transformer(self.enter(patches) + self.position)  # (B, S, E)
        return sequence, is_there.expand(-1, sequence.shape[1])

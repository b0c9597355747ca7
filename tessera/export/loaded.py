"""A trained system as a library's user holds it: opened from a folder, on uint8 (or uint16) images, without the pipeline.

system = tessera.load("digits-masked")
images = system.sample(labels=[3, 3, 7], seed=1)
tokens = system.encode(images)
system.pictures(system.decode(tokens))[0].save("three.png")
"""

import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from tessera import seeding
from tessera.artifacts import bit_depth, checkpoints, pictures
from tessera.artifacts.images import to_float, to_uint8
from tessera.artifacts.tokens import require_codes, require_finite
from tessera.artifacts.whole import ArtifactError
from tessera.components import kinds, missing_package, parse, sets
from tessera.components import load as part
from tessera.editing import words
from tessera.editing.beside import HALFWAY, Beside, require_used
from tessera.editing.left_out import require_told
from tessera.export import given, layout
from tessera.export.layout import Exported
from tessera.sources.bands import require_picture
from tessera.sources.decoding import pillow_warnings, pixels_of
from tessera.sources.pictures import picture_of
from tessera.sources.records import Unreadable
from tessera.system import CannotDraw, CannotEdit, System

__all__ = ["ArtifactError", "CannotDraw", "CannotEdit", "TrainedSystem", "load"]


REMEDIES_OF_STAGES = re.compile(r"(?:Make it again with|Run): dvc")  # in errors of artifacts, which a stage makes anew


class TrainedSystem:
    """A tokenizer and its prior. Images are (B, C, H, W) tensors of `image_dtype`, of `image_shape`; `pictures` makes them
    Pillow's.

    Tokens are what the prior learned: (B, *index_grid) int64 indices of the codebook, or (B, D, h, w) float32 standardized
    latents. Everything is drawn with a seed: equal calls give equal bits, on one machine and number of threads.
    """

    def __init__(self, system: System, exported: Exported, class_names: tuple[str, ...]):
        self._system, self._exported = system, exported
        self.class_names = class_names  # of each label; one name where the data set has no labels

    @property
    def name(self) -> str:
        return self._exported.name

    @property
    def labels(self) -> list[int]:
        """Those that can be drawn: each had training images."""
        return self._system.labels.tolist()

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(C, H, W)"""
        images = self._exported.preprocessing
        return images.channels, images.height, images.width

    @property
    def image_dtype(self) -> torch.dtype:
        """torch.uint8; torch.uint16 where the data set has images of 16 bits."""
        return torch.uint16 if sets(self._system.tokenizer, "bits") else torch.uint8

    @property
    def sampling(self) -> dict[str, Any]:
        """The settings that it was evaluated with, and draws with unless told otherwise."""
        return dict(self._exported.sampling)

    @property
    def device(self) -> torch.device:
        return self._system.device

    def sample(
        self,
        labels: Sequence[int] | None = None,
        seed: int = 0,
        *,
        captions: Sequence[str] | None = None,
        attributes: Sequence[Mapping[str, Any]] | None = None,
        embeddings: Any = None,
        pictures: Tensor | None = None,
        negative: Any = None,
        **sampling: Any,
    ) -> Tensor:
        """An image of each label, of each caption, of the attributes or the embedding of each, or of what is shown of each
        picture; None: one of each label that there is.

        embeddings: (B, E) numbers, or a list of vectors, some of which may be None. pictures: (B, C, H, W) uint8, as
        `preprocess` makes them: in gray, in edges or small, as the prior was told images, they are painted over. All these, and
        captions of single images, go together with labels, as many of either, or without. negative: one of what is given, that
        guidance leads away from, where guidance_scale is above 1.

        sampling: settings other than `self.sampling`. Images of labels are drawn in batches as the pipeline draws them: its
        samples come out of its labels and its seed. Raises CannotDraw for a label without training images and for captions
        where the prior learned none, ValueError for settings that make no sense.
        """
        told = {"captions": captions, "attributes": attributes, "embeddings": embeddings, "pictures": pictures}
        told |= {
            name: sampling.pop(name) for name in words.names() if name in sampling
        }  # of conditions that others add
        seed, settings = given.seed(seed), self._settings(sampling)
        said = given.said(told, negative)
        if said is None:
            require_told(self._system)
            wanted = np.array(self.labels) if labels is None else self._known_labels(labels)
            return self._in_batches(System.draw, wanted, settings, seed)
        beside = None if labels is None else self._known_labels(labels)
        if beside is not None and len(beside) != len(said):
            raise ValueError(f"there are {len(beside)} labels for {len(said)} images: expected as many")

        def draw(system: System, rows: np.ndarray, settings: Any, generator: torch.Generator) -> np.ndarray:
            some = None if beside is None else beside[rows]
            return words.draw(system, [said[row] for row in rows], settings, generator, some, negative)

        return self._in_batches(draw, np.arange(len(said)), settings, seed)

    def _in_batches(self, draw: Callable[..., np.ndarray], wanted: Any, settings: Any, seed: int) -> Tensor:
        """draw(system, some of what is wanted, settings, generator) of all that is wanted."""
        size, drawn = self._exported.batch_size, []
        for start in range(0, len(wanted), size):
            generator = seeding.generator(seed, "sample_images", start, device=self.device)
            drawn.append(draw(self._system, wanted[start : start + size], settings, generator))
        return torch.from_numpy(np.concatenate(drawn))

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """Images -> their tokens, on the CPU. Raises ValueError for images of another type or shape."""
        return self._system.encode(self._to_float(images)).cpu()

    @torch.no_grad()
    def decode(self, tokens: Tensor) -> Tensor:
        """Tokens -> images. Raises ValueError for what are no tokens of this system."""
        spec, of_indices = self._system.spec, self._system.learns == "indices"
        shape, dtype = (spec.index_grid, torch.int64) if of_indices else (spec.latent_shape, torch.float32)
        tokens = given.tokens(tokens, shape, dtype)
        if spec.codebook_size is not None and of_indices:
            require_codes(tokens.numpy(force=True), spec.codebook_size)
        else:
            require_finite(tokens.numpy(force=True))
        return self._stored(self._system.decode(tokens.to(self.device)))

    def edit(
        self,
        kind: str,
        images: Tensor,
        *,
        labels: Sequence[int] | None = None,
        seed: int = 0,
        mask: Tensor | None = None,
        other: Tensor | None = None,
        share: float = HALFWAY,
        settings: dict[str, Any] | None = None,
        **sampling: Any,
    ) -> Tensor:
        """Edited images; kind: inpaint, enhance, restyle, variations or interpolate (tessera/edits).

        labels: of the images, where they are known. mask, of inpaint: (H, W) or (B, H, W) booleans, True where to draw anew.
        other, of interpolate: images to go to, `share` of the way; of restyle: one image whose look is wanted. enhance
        takes images that are smaller than `image_shape` by its `factor`. settings: those of the edit's Config.
        Raises CannotEdit if the prior has no means for it, ValueError for what does not fit together.
        """
        if kind not in kinds("edits"):
            raise ValueError(f"there is no edit {kind!r}: expected one of {', '.join(kinds('edits'))}")
        module = part("edits", kind)
        if settings is not None and not isinstance(settings, dict):
            raise ValueError(f"settings are a {type(settings).__name__}: expected a dict, such as {{'strength': 0.5}}")
        wanted = {"kind": kind} | (settings or {})
        if labels is not None and "told_label" in module.Config.model_fields:
            wanted = {"told_label": "own"} | wanted
        config = parse(module.Config, wanted, kind)
        if labels is None and getattr(config, "told_label", "") == "own":
            raise ValueError("told_label is own, but no labels are given: expected labels, or another told_label")
        require_used(kind, mask=mask is not None, other=other is not None, share=share != HALFWAY)
        self._require_beside(kind, config, other, share)
        factor = getattr(config, "factor", 1) if getattr(config, "damage", "") == "downsample" else 1
        pixels = self._to_float(images, factor)
        told = self._system.null_labels(len(pixels))
        if labels is not None:
            known = self._known_labels(labels)
            if len(known) != len(pixels):
                raise ValueError(f"there are {len(known)} labels for {len(pixels)} images: expected one for each")
            told = torch.from_numpy(known).to(self.device)
        generator = seeding.generator(given.seed(seed), "edit_file", device=self.device)
        size = self.image_shape[1:]
        beside = Beside(
            size=size,
            mask=given.mask(mask, size, len(pixels)).to(self.device) if kind == "inpaint" else None,
            others=None if other is None else self._others(kind, other, len(pixels)),
            share=share,
        )
        drawn_by = self._settings(sampling)
        system = self._system.computing_in(drawn_by.precision)
        edited = module.edit(pixels, told, system, config, drawn_by, generator, *beside.arguments(kind))
        return self._stored(edited.detach())

    def preprocess(self, pictures: Sequence[Image.Image], *, are_told: bool = False) -> Tensor:
        """Pictures of any size and mode -> images, as the data set's were made of files: turned as EXIF says, on a background
        where they are transparent, in 8 bits, cropped or padded, and resized. Raises ValueError for one that cannot be read,
        and where images are neither gray nor RGB.

        are_told: masks and the like instead, as a prior takes them that was told pictures from files: by the nearest pixel, in
        gray levels or colors as those were. Raises ValueError for another prior."""
        if are_told:
            return self._told_of_files(given.pictures(pictures))
        kind = str(self.image_dtype).removeprefix("torch.")
        require_picture(
            self.image_shape[0], self.name, f"give a {kind} tensor of (B, C, H, W) in the place of pictures"
        )
        if self.image_dtype == torch.uint16:
            raise ValueError(
                f"{self.name} has images of 16 bits, and most pictures of Pillow have 8: expected a uint16 tensor of "
                f"(B, C, H, W) in their place"
            )
        how, made = self._exported.preprocessing.model_dump(), []
        for number, picture in enumerate(given.pictures(pictures)):
            try:
                with pillow_warnings():
                    made.append(pixels_of(picture, **how))
            except Unreadable as reason:
                raise ValueError(f"picture {number} cannot be read: it {reason}") from None
        return torch.from_numpy(np.stack(made))

    def _told_of_files(self, pictures: list[Image.Image]) -> Tensor:
        channels = words.file_channels(self._system.prior.config)
        if channels is None:
            raise ValueError(f"{self.name} was told no pictures from files: leave out are_told")
        how, made = self._exported.preprocessing.model_dump(include={"height", "width", "resize", "background"}), []
        for number, picture in enumerate(pictures):
            try:
                made.append(picture_of(picture, channels=channels, **how))
            except Unreadable as reason:
                raise ValueError(f"picture {number} cannot be told: it {reason}") from None
        return torch.from_numpy(np.stack(made))

    def pictures(self, images: Tensor) -> list[Image.Image]:
        """Images -> Pillow's, gray or RGB, and of 16 bits gray alone, in mode I;16, which PNG and TIFF keep.

        Raises ValueError for images of another type or number of channels.
        """
        if isinstance(images, Tensor) and images.dtype == self.image_dtype == torch.uint16 and images.ndim == 4:
            if images.shape[1] != 1:
                raise ValueError(
                    f"images have {images.shape[1]} channels of 16 bits, and Pillow has gray pictures alone of so many: choose "
                    f"a channel, such as images[:, :1], or save them by numpy.save"
                )
            return [Image.fromarray(one[0]) for one in images.numpy(force=True)]
        if (
            not isinstance(images, Tensor)
            or images.dtype != torch.uint8
            or images.ndim != 4
            or images.shape[1] not in (1, 3)
        ):
            of = (
                f"{images.dtype} of the shape {tuple(images.shape)}"
                if isinstance(images, Tensor)
                else type(images).__name__
            )
            raise ValueError(
                f"images are {of}: expected {self.image_dtype} of (B, 1 or 3, H, W), as sample gives them; of more channels, "
                f"choose some"
            )
        return [pictures.picture(one) for one in images.numpy(force=True)]

    def _known_labels(self, labels: Any) -> np.ndarray:
        """(n,) int64, all of classes that it was trained on. Raises CannotDraw for others."""
        found = given.labels(labels)
        self._system.require_trained_on(found)
        if (found == self._system.spec.num_classes).any():
            raise CannotDraw(
                f"label {found.max()} is of no class of {self.name}: expected one of {self.labels}, see `labels`"
            )
        return found

    def _others(self, kind: str, other: Tensor, number: int) -> Tensor:
        """The other images of an edit of so many, (number, C, H, W) in [-1, 1]."""
        found = self._to_float(other, what="other")
        if len(found) not in ((1,) if kind == "restyle" else (1, number)):
            expected = "one image" if kind == "restyle" else f"one image, or one for each of {number}"
            raise ValueError(f"other has {len(found)} images: expected {expected}")
        return found.expand(number, -1, -1, -1)

    def _settings(self, changed: dict[str, Any]) -> Any:
        return parse(self._system.sampling_schema, self.sampling | changed, "sampling")

    def _to_float(self, images: Tensor, factor: int = 1, what: str = "images") -> Tensor:
        channels, height, width = self.image_shape
        shape = (channels, height // factor, width // factor)
        return to_float(given.images(images, shape, what, self.image_dtype).to(self.device))

    def _stored(self, images: Tensor) -> Tensor:
        """(B, C, H, W) in [-1, 1] -> of `image_dtype`, on the CPU."""
        if self.image_dtype == torch.uint16:
            return bit_depth.to_uint16(images).cpu()
        return to_uint8(images).cpu()

    def _require_beside(self, kind: str, config: Any, other: Tensor | None, share: float) -> None:
        """Raises ValueError unless the edit has what it needs beside images and settings."""
        is_share = isinstance(share, int | float) and not isinstance(share, bool) and 0 <= share <= 1
        if kind == "interpolate" and (other is None or not is_share):
            raise ValueError("interpolate needs other images to go to, and a share of the way from 0 to 1")
        if kind == "restyle" and other is not None and config.target is not None:
            raise ValueError("restyle takes a target or the look of another image: expected one of them, not both")


def load(folder: str | Path, device: str | torch.device | None = None) -> TrainedSystem:
    """Open an exported folder; device: the GPU if there is one.

    Both parts are verified before they are used, by the hashes in config.json, and weights are safetensors: nothing in the
    folder is run as code. Raises ArtifactError for a folder that is damaged, not whole, or of a newer version, ValueError for a
    device that is not there.
    """
    if not isinstance(folder, str | Path) or not str(folder):
        raise ArtifactError(f"{folder!r:.40} is no folder: expected the path of one that was exported")
    place = None if device is None else given.device(device)
    folder = Path(folder)
    try:
        exported = layout.read(folder)
        system = System.read(folder / "tokenizer", folder / "prior", exported.name)
        _, images = checkpoints.described(folder / "tokenizer", "tokenizers")
        parse(system.sampling_schema, exported.sampling, f"{folder / layout.CONFIG}: sampling")
        shapes = [(one.channels, one.height, one.width) for one in (images, exported.preprocessing)]
        if shapes[0] != shapes[1]:
            raise ArtifactError(
                f"{folder} has a tokenizer of images {shapes[0]}, expected {shapes[1]} of its config.json"
            )
    except ValueError as error:
        if missing := missing_package(error):  # nothing is wrong with the folder
            raise ArtifactError(f"{folder} cannot be opened here: {missing}") from None
        told, *of_stages = REMEDIES_OF_STAGES.split(str(error))
        again = f"{told.strip()} Export or download {folder} again"
        raise ArtifactError(again if of_stages else told) from None
    if place is not None:
        system = System(system.tokenizer.to(place), system.prior.to(place), system.spec, system.learns, system.name)
    return TrainedSystem(system, exported, images.class_names)

"""A trained system as a library's user holds it: opened from a folder, on uint8 images, without anything of the pipeline.

system = tessera.load("digits-masked")
images = system.sample(labels=[3, 3, 7], seed=1)
tokens = system.encode(images)
system.pictures(system.decode(tokens))[0].save("three.png")
"""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from tessera import seeding
from tessera.artifacts import checkpoints, pictures
from tessera.artifacts.images import to_float, to_uint8
from tessera.artifacts.tokens import require_codes, require_finite
from tessera.artifacts.whole import ArtifactError
from tessera.components import kinds, missing_package, parse
from tessera.components import load as part
from tessera.editing import words
from tessera.editing.beside import HALFWAY, Beside
from tessera.export import layout
from tessera.export.layout import Exported
from tessera.sources.frame import Frame
from tessera.system import CannotDraw, CannotEdit, System

__all__ = ["ArtifactError", "CannotDraw", "CannotEdit", "TrainedSystem", "load"]


REMEDIES_OF_STAGES = re.compile(r"(?:Make it again with|Run): dvc")  # in errors of artifacts, which a stage makes anew


class TrainedSystem:
    """A tokenizer and its prior. Images are (B, C, H, W) uint8 tensors, of `image_shape`; `pictures` makes them Pillow's.

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
        **sampling: Any,
    ) -> Tensor:
        """An image of each label, or of each caption; None: one of each label that there is.

        sampling: settings other than `self.sampling`. Images of labels are drawn in batches as the pipeline draws them: its
        samples come out of its labels and its seed. Raises CannotDraw for a label without training images and for captions
        where the prior learned none, ValueError for settings that make no sense.
        """
        if captions is not None:
            return self._of_captions(captions, labels, seed, sampling)
        wanted = np.array(self.labels if labels is None else labels, dtype=np.int64)
        if wanted.ndim != 1 or not len(wanted):
            raise ValueError(f"labels have the shape {wanted.shape}: expected a list of at least one label")
        settings, size = self._settings(sampling), self._exported.batch_size
        batches = []
        for start in range(0, len(wanted), size):
            generator = seeding.generator(seed, "sample_images", start, device=self.device)
            batches.append(self._system.draw(wanted[start : start + size], settings, generator))
        return torch.from_numpy(np.concatenate(batches))

    def _of_captions(
        self, captions: Sequence[str], labels: Sequence[int] | None, seed: int, sampling: dict[str, Any]
    ) -> Tensor:
        if labels is not None or isinstance(captions, str) or not len(captions):
            raise ValueError("expected labels or a list of at least one caption, not both and no single text")
        settings, size = self._settings(sampling), self._exported.batch_size
        batches = []
        for start in range(0, len(captions), size):
            generator = seeding.generator(seed, "sample_images", start, device=self.device)
            batches.append(words.draw(self._system, captions[start : start + size], settings, generator))
        return torch.from_numpy(np.concatenate(batches))

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """Images -> their tokens, on the CPU. Raises ValueError for images of another type or shape."""
        return self._system.encode(self._to_float(images)).cpu()

    @torch.no_grad()
    def decode(self, tokens: Tensor) -> Tensor:
        """Tokens -> images. Raises ValueError for what are no tokens of this system."""
        spec, of_indices = self._system.spec, self._system.learns == "indices"
        shape, dtype = (spec.index_grid, torch.int64) if of_indices else (spec.latent_shape, torch.float32)
        if tokens.dtype != dtype or tuple(tokens.shape[1:]) != shape or not len(tokens):
            raise ValueError(
                f"tokens are {tokens.dtype} of the shape {tuple(tokens.shape)}: expected {dtype} of (B, "
                f"{', '.join(map(str, shape))}), as encode gives them"
            )
        if spec.codebook_size is not None and of_indices:
            require_codes(tokens.numpy(force=True), spec.codebook_size)
        else:
            require_finite(tokens.numpy(force=True))
        return to_uint8(self._system.decode(tokens.to(self.device))).cpu()

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
        given = {"kind": kind} | (settings or {})
        if labels is not None and "told_label" in module.Config.model_fields:
            given = {"told_label": "own"} | given
        config = parse(module.Config, given, kind)
        self._require_beside(kind, config, mask, other, share)
        factor = getattr(config, "factor", 1) if getattr(config, "damage", "") == "downsample" else 1
        pixels = self._to_float(images, factor)
        told = self._system.null_labels(len(pixels)) if labels is None else torch.tensor(labels, device=self.device)
        if tuple(told.shape) != (len(pixels),):
            raise ValueError(
                f"labels have the shape {tuple(told.shape)}: expected one for each of {len(pixels)} images"
            )
        self._system.require_trained_on(told.cpu().numpy())
        generator = seeding.generator(seed, "edit_file", device=self.device)
        _, height, width = self.image_shape
        beside = Beside(
            size=(height, width),
            mask=None if mask is None else mask.to(self.device).expand(len(pixels), -1, -1),
            others=None if other is None else self._to_float(other).expand(len(pixels), -1, -1, -1),
            share=share,
        )
        drawn_by = self._settings(sampling)
        system = self._system.computing_in(drawn_by.precision)
        edited = module.edit(pixels, told, system, config, drawn_by, generator, *beside.arguments(kind))
        return to_uint8(edited.detach()).cpu()

    def preprocess(self, pictures: Sequence[Image.Image]) -> Tensor:
        """Pictures of any size -> images, as the data set's were made of files: cropped or padded, and resized."""
        return to_uint8(torch.cat([Frame(self._exported.preprocessing, one.size).tensor(one) for one in pictures]))

    def pictures(self, images: Tensor) -> list[Image.Image]:
        """Images -> Pillow's, gray or RGB."""
        return [pictures.picture(one) for one in images.numpy(force=True)]

    def _settings(self, changed: dict[str, Any]) -> Any:
        return parse(self._system.sampling_schema, self.sampling | changed, "sampling")

    def _to_float(self, images: Tensor, factor: int = 1) -> Tensor:
        channels, height, width = self.image_shape
        shape = (channels, height // factor, width // factor)
        if images.dtype != torch.uint8 or tuple(images.shape[1:]) != shape or not len(images):
            raise ValueError(
                f"images are {images.dtype} of the shape {tuple(images.shape)}: expected torch.uint8 of (B, "
                f"{', '.join(map(str, shape))}); preprocess makes them of pictures"
            )
        return to_float(images.to(self.device))

    def _require_beside(self, kind: str, config: Any, mask: Tensor | None, other: Tensor | None, share: float) -> None:
        """Raises ValueError unless the edit has what it needs beside images and settings."""
        _, height, width = self.image_shape
        if kind == "inpaint" and (
            mask is None or mask.dtype != torch.bool or tuple(mask.shape[-2:]) != (height, width)
        ):
            found = "none" if mask is None else f"{mask.dtype} of the shape {tuple(mask.shape)}"
            raise ValueError(f"inpaint needs a mask: expected torch.bool of ({height}, {width}), got {found}")
        if kind == "interpolate" and (other is None or not 0 <= share <= 1):
            raise ValueError("interpolate needs other images to go to, and a share of the way from 0 to 1")
        if kind == "restyle" and other is not None and config.target is not None:
            raise ValueError("restyle takes a target or the look of another image: expected one of them, not both")


def load(folder: str | Path, device: str | torch.device | None = None) -> TrainedSystem:
    """Open an exported folder; device: the GPU if there is one.

    Every file is verified before it is used, and weights are safetensors: nothing in the folder is run as code.
    Raises ArtifactError for a folder that is damaged, not whole, or of a newer version.
    """
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
    if device is not None:
        place = torch.device(device)
        system = System(system.tokenizer.to(place), system.prior.to(place), system.spec, system.learns, system.name)
    return TrainedSystem(system, exported, images.class_names)

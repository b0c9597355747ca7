"""Features of a pretrained image and text model, such as CLIP or SigLIP, from a local folder of the package transformers.

A judge of images by what their captions would say, and of whether a caption belongs to an image: the metrics clip_score and,
where it is the first network that reads captions, caption_agreement. Nothing is downloaded. The artifact holds the weights;
config.json and the tokenizer are read of the folder, which must stay.

Source: Radford et al., "Learning Transferable Visual Models From Natural Language Supervision" (CLIP), 2021,
arXiv:2103.00020, section 2.3; the words before a caption: Hessel et al., "CLIPScore", 2021, arXiv:2104.08718, section 3.
Differs from its preprocessing: the whole image is resized to a square, nothing is cropped. Of a caption the first tokens are
read, as many as the model takes (CLIP: 77).
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from tessera.artifacts.images import to_uint8
from tessera.bases.judging import require_gray_or_rgb
from tessera.components import MissingPackage, Params
from tessera.contracts import ImageSpec, Planned
from tessera.sources import text_models

AT_ONCE = 50  # images in the network


class Config(Params):
    kind: Literal["clip"] = "clip"
    folder: Annotated[str, Field(min_length=1)]  # config.json, safetensors, tokenizer and preprocessor_config.json
    sha256: Annotated[str, Field(pattern="^[0-9a-f]{64}$")]  # of what is read of it, as sources/text_models.py says
    prompt: str = "A photo depicts "  # before each caption
    max_bytes: Annotated[int, Field(ge=1, le=4096)] = 1024  # of a caption, in UTF-8


class Model(nn.Module):
    """Without meaningful weights until `prepare` or `load_state_dict` has put them in."""

    has_logits = False

    def __init__(self, config: Config, spec: ImageSpec):
        """Raises ValueError for images of other than 1 or 3 channels and for a folder of no such model, MissingPackage without
        transformers."""
        super().__init__()
        require_gray_or_rgb(spec, "an image and text model")
        self.max_bytes, self.prompt = config.max_bytes, config.prompt
        folder = Path(config.folder)
        with torch.random.fork_rng(devices=[]):  # its weights come from a file; the global generator is left alone
            self.network = text_models.untrained(folder)
        seen, self.tokenizer = text_models.preprocessing(folder), text_models.tokenizer_of(folder)
        self._side = seen.side
        self.resize = f"bicubic to {seen.side}x{seen.side}, antialiased"
        for name, values in (("mean", seen.mean), ("std", seen.std)):  # of pixels in [0, 1]
            self.register_buffer(name, 255 * torch.tensor(values).view(3, 1, 1), persistent=False)
        self.eval().requires_grad_(False)
        with torch.no_grad():
            self.feature_dim = self.of_captions(torch.zeros(1, 2, dtype=torch.long)).shape[1]

    def train(self, mode: bool = True) -> "Model":
        """Stays in evaluation mode."""
        return super().train(False)

    @torch.no_grad()
    def features(self, images: Tensor) -> Tensor:
        """images: (B, C, H, W) float in [-1, 1], C 1 or 3, any size -> (B, feature_dim) float32, projected, of any length."""
        return torch.cat([self._features(some) for some in images.split(AT_ONCE)]).float()

    def _features(self, images: Tensor) -> Tensor:
        size = (self._side, self._side)
        pixels = F.interpolate(to_uint8(images).float(), size=size, mode="bicubic", antialias=True)
        found = self.network.get_image_features(pixel_values=(pixels.expand(-1, 3, -1, -1) - self.mean) / self.std)
        return found.pooler_output

    @torch.no_grad()
    def of_captions(self, told: Tensor) -> Tensor:
        """(B, 1 + T) captions as bytes (bases/captions.py), whose labels are not looked at -> (B, feature_dim) unit vectors."""
        texts = [self.prompt + bytes(row[row != 0].tolist()).decode() for row in told[:, 1:].cpu()]
        given = self.tokenizer(texts, padding="max_length", truncation=True, return_tensors="pt").to(self.mean.device)
        found = self.network.get_text_features(input_ids=given["input_ids"], attention_mask=given["attention_mask"])
        return F.normalize(found.pooler_output.float(), dim=1)


def prepare(model: Model, config: Config) -> None:
    """Read the weights once, when the features artifact is made; the artifact then holds them as safetensors."""
    folder = Path(config.folder)
    text_models.require_fingerprint(folder, config.sha256)
    model.network.load_state_dict(text_models.whole(folder).state_dict())


def problems(config: Config, planned: Planned) -> Iterator[str]:
    """A folder that is not the one that params.yaml says."""
    if planned.is_begin:
        try:
            text_models.require_fingerprint(Path(config.folder), config.sha256)
        except (ValueError, MissingPackage) as refusal:
            yield str(refusal)

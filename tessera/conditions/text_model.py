"""Captions of single images as a pretrained text model reads them: any of the package transformers, from a local folder.

    condition: {kind: text_model, folder: data/weights/clip, sha256: ..., feature_dim: 512, max_tokens: 64}

`python -m tessera.sources.text_models FOLDER` prints this line. The model is frozen. Its features are computed once for each
caption, before a training begins, by its processes together, and lie in its private state. They are part of the training, not a
stage of the pipeline: an edge that DVC would know of must stand at every training, and make those stale that read no text. What
somebody wants to see drawn is read anew; the prior's artifact does not hold the model, so that the folder is needed wherever
captions are read. They are told beside the label, as in conditions/caption.py, and left out as there; a label without a caption
is told alone.

Source: Saharia et al. (Imagen), 2022, arXiv:2205.11487, section 2.1 (features of a frozen text model), section 2.3 (the mean of
them, and attention to each of them); Brooks et al. (InstructPix2Pix), 2023, arXiv:2211.09800, section 3.2.1.

What is told is a row of 1 + S * C float32: the label plus 1, or 0 for none, then the features of each token, 0 behind the last.
Zeros alone are the null condition.

Shape letters: B batch, S max_tokens, C feature_dim, N width of the prior's condition.
"""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor, nn

from tessera.artifacts import captions as image_captions
from tessera.artifacts.captions import Captions, Example
from tessera.artifacts.growing import Growing
from tessera.artifacts.shards import Shards
from tessera.bases.beside_label import BesideLabel
from tessera.bases.conditional import either_dropped
from tessera.bases.of_images import ToldSplit, chosen, examples_of_captions
from tessera.components import MissingPackage, Params
from tessera.contracts import Job, Planned, TokenSpec
from tessera.nn.cross_attention import Context
from tessera.sources import text_models

NAME = "captions"
AT_ONCE = 64  # captions


class Config(Params):
    kind: Literal["text_model"] = "text_model"
    folder: Annotated[str, Field(min_length=1)]  # config.json, safetensors and a tokenizer, as transformers writes them
    sha256: Annotated[str, Field(pattern="^[0-9a-f]{64}$")]  # of what is read of the folder
    feature_dim: Annotated[int, Field(ge=1, le=2**16)]
    max_tokens: Annotated[int, Field(ge=1, le=1024)] = 64  # of a caption, with those that begin and end it
    cross_attention: bool = True  # each layer of the prior attends to the tokens, beside their mean


def problems(config: Config, planned: Planned) -> Iterator[str]:
    """Images without captions; a folder that is not the one that params.yaml says."""
    if planned.said is not None and planned.said.longest_caption == 0:
        yield "the images have no captions: name the file and the column that hold them in dataset.metadata"
    try:
        text_models.require(Path(config.folder), config.sha256, config.feature_dim, config.max_tokens)
        if planned.said is not None and planned.said.longest_caption:
            longest = planned.said.longest_text
            found = len(text_models.tokenizer_of(Path(config.folder))(longest)["input_ids"])
            if found > config.max_tokens:
                yield (
                    f"max_tokens {config.max_tokens} is too few: the longest caption of the images, {longest!r:.80}, has "
                    f"{found:,} tokens; write max_tokens: {found}, or shorten it"
                )
    except (ValueError, MissingPackage) as refusal:
        yield str(refusal)


def encoded(config: Config, captions: Sequence[str], labels: Tensor | None = None) -> Tensor:
    """(B,) captions, "" for none, and (B,) labels, if any -> (B, 1 + S * C). Raises ValueError, in a sentence."""
    model = text_models.opened(Path(config.folder), config.sha256, config.feature_dim, config.max_tokens)
    features = torch.zeros(len(captions), config.max_tokens, config.feature_dim)
    said = [place for place, caption in enumerate(captions) if caption]
    if said:
        features[said] = model.features([captions[place] for place in said], config.max_tokens)
    return beside(features, labels)


def beside(features: Tensor, labels: Tensor | None) -> Tensor:
    """(B, S, C) features, and (B,) labels, if any -> (B, 1 + S * C), what is told."""
    first = features.new_zeros(len(features), 1) if labels is None else (labels + 1).to(features.dtype).unsqueeze(1)
    return torch.cat([first, features.flatten(1)], dim=1)


def is_one(said: Any) -> bool:
    """Whether this is what is said of an image."""
    return isinstance(said, str)


class OfTextFeatures:
    """The captions of the images of a split, as a text model reads them; `compute` comes before `told`.

    Each different caption is read once; features lie on disk in float16, as shards, and of a kill the last ones are lost alone.
    """

    def __init__(self, captions: Captions, config: Config, split: str):
        self.captions, self.config, self.split = captions, config, split
        self.every = captions.all()
        self._number = {caption: number for number, caption in enumerate(self.every)}
        self._shards: Shards | None = None

    def __len__(self) -> int:
        return len(self.captions)

    def fingerprint(self) -> str:
        return self.captions.fingerprint()

    def compute(self, job: Job) -> None:
        """By all processes of the training; into job.state. Raises ValueError, in a sentence, for a caption of too many tokens,
        and for features beyond the range of float16."""
        if self._shards is not None:  # images held out of the training share them
            return
        config = self.config
        model = text_models.opened(Path(config.folder), config.sha256, config.feature_dim, config.max_tokens)
        folder = job.state / "text_features" / self.split
        grown = Growing(folder, folder.with_suffix(".json"), job.checkpoint_seconds) if job.is_main else None
        done = job.from_main((grown.restored(job.say) or 0) if grown else 0)
        starts = range(done, len(self.every), AT_ONCE)

        def read(start: int) -> np.ndarray:
            features = model.features(self.every[start : start + AT_ONCE], config.max_tokens).numpy()
            return as_float16(features, self.every[start])

        for start, rows in zip(starts, job.track(job.share(starts, read), len(starts), "captions"), strict=False):
            assert grown is not None  # other processes are given nothing
            grown.append("features", rows)
            if grown.is_due() or start == starts[-1]:
                grown.keep(start + len(rows))
        if grown is not None:
            grown.finish()
        job.from_main(None)  # until all are there
        self._shards = Shards(folder, "features", np.float16)

    def told(self, rows: Tensor, generator: torch.Generator | None, labels: Tensor) -> Tensor:
        """(B,) rows -> (B, 1 + S * C) one of the captions of each, drawn from the generator, or the first, beside its label."""
        if self._shards is None:
            raise RuntimeError("the features of captions are asked for before they were computed")
        features = torch.zeros(len(rows), self.config.max_tokens, self.config.feature_dim)
        captions = chosen(self.captions, rows, generator)
        said = [place for place, caption in enumerate(captions) if caption]
        if said:
            found = self._shards.gather(np.array([self._number[captions[place]] for place in said]))
            features[said] = torch.from_numpy(found).float()
        return beside(features, labels)


def as_float16(features: np.ndarray, caption: str) -> np.ndarray:
    """Raises ValueError for features that float16 does not hold. caption: the first of them."""
    if (largest := np.abs(features).max(initial=0)) > (limit := np.finfo(np.float16).max):
        raise ValueError(
            f"the text model's features of captions from {caption!r:.80} on reach {largest:.3g}, expected at most {limit:.0f}, "
            f"the largest number of float16: choose another text model"
        )
    return features.astype(np.float16)


def of_images(config: Config, images: Path, split: str) -> OfTextFeatures:
    return OfTextFeatures(image_captions.read(images, split), config, split)


def examples(config: Config, splits: Mapping[str, ToldSplit], seed: int) -> list[Example]:
    """Captions that were trained on, and others."""
    return examples_of_captions(splits, seed)


def of_examples(config: Config, examples: Sequence[Example], labels: Tensor) -> Tensor:
    """(B,) examples, and (B,) labels beside them -> (B, 1 + S * C)."""
    return encoded(config, [one.caption for one in examples], labels)


def text_of(example: Example) -> str:
    """What stands below a sample that was told this."""
    return example.caption


def card(config: Config) -> str:
    """What was told, and how to tell it."""
    return (
        f"It was told the captions of single images, of at most {config.max_tokens} tokens, beside the label: "
        '`system.sample(captions=["..."], labels=[0])`. Captions are read by a text model, which is not part '
        f"of this folder: `{config.folder}`, of sha256 {config.sha256}, must be there, and the package transformers."
    )


def null(told: Tensor) -> Tensor:
    """(B, 1 + S * C) -> the same number of null conditions."""
    return torch.zeros_like(told)


def partly_dropped(told: Tensor, rate: float) -> Tensor:
    """(B, 1 + S * C) -> a share `rate` of them without their caption, and another one without their label.

    Brooks et al., section 3.2.1: so that each may be told alone.
    """
    return either_dropped(told, null(told), rate)


class Network(BesideLabel):
    """(B, 1 + S * C) conditions, or (B,) labels up to and including the null label -> (B, N)."""

    def __init__(self, config: Config, spec: TokenSpec, replaced: nn.Embedding):
        context = Context(config.feature_dim) if config.cross_attention else None
        super().__init__(spec, replaced, context, config.feature_dim)
        self.sizes = (config.max_tokens, config.feature_dim)

    def silent(self, number: int) -> Tensor:
        return torch.zeros(number, self.sizes[0] * self.sizes[1])

    def elements(self, beside: Tensor) -> tuple[Tensor, Tensor]:
        features = beside.unflatten(1, self.sizes)
        return features, (features != 0).any(dim=2)

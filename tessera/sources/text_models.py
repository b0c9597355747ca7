"""A folder with a text model as the package transformers writes it: what a pretrained network makes of captions.

    python -m tessera.sources.text_models data/weights/clip     # the lines for params.yaml

Nothing is downloaded, no pickle is opened, and no code of the folder is run. Of the networks of an image and text model the one
that reads is taken, of an encoder and decoder the encoder; the features are those of its last layer, one for each token.

Source: Wolf et al., "Transformers: State-of-the-art natural language processing", 2020, arXiv:1910.03771; frozen features of
text for what draws: Saharia et al. (Imagen), 2022, arXiv:2205.11487, section 2.1.

Shape letters: B captions, S max_tokens, C feature_dim.
"""

import argparse
import hashlib
import os
import sys
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tessera.artifacts import folder as artifact
from tessera.artifacts.folder import ArtifactError
from tessera.components import MissingPackage
from tessera.sources.links import require_no_way_out

CONFIG, WEIGHTS = "config.json", "*.safetensors"
READ = (WEIGHTS, "*.json", "*.txt", "*.model")  # the weights, the settings, and the vocabularies of tokenizers
READERS = {  # by model_type: the network that reads, where the whole model is more than that
    "clip": "CLIPTextModel",
    "siglip": "SiglipTextModel",
    "siglip2": "Siglip2TextModel",
    "t5": "T5EncoderModel",
    "mt5": "MT5EncoderModel",
    "umt5": "UMT5EncoderModel",
}
VOCABULARIES = ("tokenizer.json", "vocab.json", "vocab.txt", "*.model")
AT_ONCE = 64  # captions
OFFLINE = {"local_files_only": True, "trust_remote_code": False}
NOT_OPENED = (OSError, ValueError, KeyError, ImportError)  # what transformers raises


def require(folder: Path, sha256: str, feature_dim: int, max_tokens: int) -> None:
    """Raises ValueError, in a sentence, unless the folder is a text model of these features, which takes so many tokens, with
    this fingerprint."""
    config = _config(folder)
    found, limit = dim_of(config), places_of(config)
    if found != feature_dim:
        raise ValueError(
            f"the text model in {folder} has features of {found}, expected feature_dim {feature_dim}: write feature_dim: "
            f"{found}"
        )
    if limit is not None and max_tokens > limit:
        raise ValueError(
            f"max_tokens is {max_tokens}, but the text model in {folder} takes {limit}: expected at most as many, write "
            f"max_tokens: {limit}"
        )
    require_fingerprint(folder, sha256)


def require_fingerprint(folder: Path, sha256: str) -> None:
    """Raises ValueError, in a sentence, unless the folder is what it was when sha256 was taken of it."""
    digest = fingerprint(folder)
    if digest != sha256:
        raise ValueError(
            f"{folder} has fingerprint {digest}, expected sha256 {sha256}: get the folder again, or write what "
            f"python -m tessera.sources.text_models {folder} prints if you trust this one"
        )


def fingerprint(folder: Path) -> str:
    """The sha256 of the names and hashes of all files that are read. Raises ValueError for a folder without weights, or without
    a tokenizer: transformers would make one without words, silently."""
    if not folder.is_dir():
        raise ValueError(
            f"{folder} is no folder: expected one with {CONFIG} and safetensors, as transformers writes it"
        )
    try:
        require_no_way_out(folder)
    except ArtifactError as error:
        raise ValueError(str(error)) from None
    if not list(folder.glob(WEIGHTS)):
        pickles = sorted(each.name for each in folder.glob("*.bin"))
        has = f"has {pickles[0]}, a pickle, which is never opened, but no" if pickles else "has no"
        raise ValueError(f"{folder} {has} safetensors: expected them beside {CONFIG}; save_pretrained writes them")
    if not any(list(folder.glob(name)) for name in VOCABULARIES):
        raise ValueError(
            f"{folder} has no tokenizer: expected one of {', '.join(VOCABULARIES)}, as save_pretrained of its tokenizer writes "
            f"them"
        )
    names = sorted({path.name for pattern in READ for path in folder.glob(pattern)})
    lines = "".join(f"{name} {artifact.sha256(folder / name)}\n" for name in names)
    return hashlib.sha256(lines.encode()).hexdigest()


class TextModel:
    """A frozen network and the tokenizer of its texts."""

    def __init__(self, folder: Path, device: torch.device):
        """Raises ValueError, in a sentence, for a folder that is no text model, MissingPackage without transformers."""
        transformers = _transformers()
        config = _config(folder)
        reader = getattr(transformers, READERS.get(config.model_type, "AutoModel"))
        self.tokenizer = tokenizer_of(folder)
        try:
            network = reader.from_pretrained(folder, use_safetensors=True, dtype=torch.float32, **OFFLINE)
        except NOT_OPENED as error:
            raise _unopened(folder, error) from None
        self.folder, self.device = folder, device
        self.network = network.to(device).eval().requires_grad_(False)
        self.feature_dim = dim_of(config)

    def tokens_of(self, caption: str) -> int:
        """How many tokens it is, with those that begin and end it."""
        return len(self.tokenizer(caption)["input_ids"])

    @torch.no_grad()
    def features(self, captions: Sequence[str], max_tokens: int) -> Tensor:
        """(B,) captions -> (B, S, C) float32, 0 behind the last token. Raises ValueError for a caption of more tokens."""
        for caption in captions:
            if (found := self.tokens_of(caption)) > max_tokens:
                raise ValueError(
                    f"the caption {caption!r:.80} has {found:,} tokens, expected at most max_tokens {max_tokens}: say it in "
                    f"fewer words, or raise max_tokens and train again"
                )
        settings = {"padding": "max_length", "max_length": max_tokens, "return_tensors": "pt"}
        pieces = []
        for start in range(0, len(captions), AT_ONCE):
            given = self.tokenizer(list(captions[start : start + AT_ONCE]), **settings).to(self.device)
            found = self.network(input_ids=given["input_ids"], attention_mask=given["attention_mask"]).last_hidden_state
            pieces.append((found.float() * given["attention_mask"].unsqueeze(2)).cpu())
        return torch.cat(pieces)


@lru_cache(maxsize=2)
def opened(folder: Path, sha256: str, feature_dim: int, max_tokens: int) -> TextModel:
    """Verified, on the GPU if there is one. Raises ValueError as `require` does."""
    require(folder, sha256, feature_dim, max_tokens)
    return TextModel(folder, torch.device("cuda" if torch.cuda.is_available() else "cpu"))


class Preprocessing(NamedTuple):
    """What an image and text model expects of images."""

    side: int  # pixels
    mean: tuple[float, float, float]  # of pixels in [0, 1]
    std: tuple[float, float, float]


def preprocessing(folder: Path) -> Preprocessing:
    """By preprocessor_config.json, or processor_config.json of newer versions. Raises ValueError without either."""
    paths = [path for path in (folder / "preprocessor_config.json", folder / "processor_config.json") if path.is_file()]
    config = _config(folder)
    if not paths or not hasattr(config, "vision_config"):
        raise ValueError(
            f"{folder} is of no image and text model ({config.model_type}) or has no preprocessor_config.json: expected CLIP, "
            f"SigLIP or another one, with what save_pretrained of its processor writes"
        )
    found = artifact.read_json(paths[0])
    found = found.get("image_processor", found)
    return Preprocessing(config.vision_config.image_size, tuple(found["image_mean"]), tuple(found["image_std"]))


def untrained(folder: Path) -> torch.nn.Module:
    """The whole model of an image and text model, without meaningful weights. Raises ValueError for another."""
    model = _transformers().AutoModel.from_config(_config(folder), dtype=torch.float32)
    if not hasattr(model, "get_image_features"):
        raise ValueError(
            f"{folder} is of no image and text model, but of {type(model).__name__}: expected CLIP or SigLIP"
        )
    return model


def whole(folder: Path) -> torch.nn.Module:
    """The whole model with its weights."""
    try:
        return _transformers().AutoModel.from_pretrained(folder, use_safetensors=True, dtype=torch.float32, **OFFLINE)
    except NOT_OPENED as error:
        raise _unopened(folder, error) from None


def tokenizer_of(folder: Path) -> Any:
    """It pads at the end. Raises ValueError for a folder without one."""
    try:
        found = _transformers().AutoTokenizer.from_pretrained(folder, **OFFLINE)
    except NOT_OPENED as error:
        raise _unopened(folder, error) from None
    if found.pad_token is None:
        found.pad_token = found.eos_token
    found.padding_side = "right"
    return found


def _unopened(folder: Path, error: Exception) -> ValueError:
    first = str(error).strip().partition("\n")[0]
    return ValueError(
        f"{folder} cannot be opened as a text model ({first:.200}): expected what save_pretrained of a model and of its "
        f"tokenizer write"
    )


def dim_of(config: Any) -> int:
    """C, by what config.json says."""
    return config.get_text_config().hidden_size


def places_of(config: Any) -> int | None:
    """How many tokens it takes; None: any number."""
    text = config.get_text_config()
    places = getattr(text, "max_position_embeddings", None)
    if not places or places < 0:
        return None
    counts_from_padding = "roberta" in config.model_type or config.model_type in ("camembert", "mpnet")
    return places - 1 - text.pad_token_id if counts_from_padding else places


def _config(folder: Path) -> Any:
    transformers = _transformers()
    if not (folder / CONFIG).is_file():
        raise ValueError(
            f"{folder.absolute()} has no {CONFIG}: expected a folder of a text model, as save_pretrained writes it"
        )
    try:
        return transformers.AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        first = str(error).strip().partition("\n")[0].partition(". ")[0]
        raise ValueError(f"{folder / CONFIG} is of no model that transformers knows ({first:.120})") from None


def _transformers() -> Any:
    os.environ["HF_HUB_OFFLINE"] = "1"  # read when it is imported: it asks nobody for anything
    try:
        import transformers  # here, because it takes seconds
        from transformers.utils import logging
    except ImportError:
        raise MissingPackage(
            "captions are read by a text model, and the package transformers is not installed: pip install transformers"
        ) from None
    logging.set_verbosity_error()  # what is wrong is said here, in a sentence
    logging.disable_progress_bar()
    return transformers


def lines(folder: Path) -> str:
    """What to write into params.yaml for a folder. Raises ValueError, in a sentence."""
    digest = fingerprint(folder)
    model = TextModel(folder, torch.device("cpu"))
    limits = (model.tokenizer.model_max_length, places_of(model.network.config), 64)
    entry = {
        "kind": "text_model",
        "folder": str(folder),
        "sha256": digest,
        "feature_dim": model.feature_dim,
        "max_tokens": min(limit for limit in limits if limit is not None),
    }
    return f"condition: {{{', '.join(f'{key}: {value}' for key, value in entry.items())}}}\n"


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tessera.sources.text_models", description="Print the lines of params.yaml for a folder."
    )
    parser.add_argument(
        "folder", type=Path, help=f"with {CONFIG}, safetensors and a tokenizer, as transformers writes them"
    )
    try:
        print(f"for a prior of params.yaml:\n{lines(parser.parse_args(arguments).folder)}", end="")
    except (ValueError, OSError) as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

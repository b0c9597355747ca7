"""Trained parts between stages: weights.safetensors and config.json, rebuilt by name, never unpickled.

config.json also has a fingerprint of the code that defines the model (tessera/code). A stage that only receives the folder
does not know whose code it is; through the artifact a change of that code still reaches it.
"""

import reprlib
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import nn

from tessera.artifacts import folder as artifact
from tessera.artifacts.described import OfImages, OfTokens, parsed
from tessera.artifacts.folder import ArtifactError
from tessera.components import Params, load
from tessera.nn.weightless import WithinLimits

CHOICE = "choice.json"  # in a prior's folder, where a criterion chose the weights
CONFIG, WEIGHTS = "config.json", "weights.safetensors"
MOST_TENSORS = 20_000  # of a network: one of 1,000 blocks has fewer
SPARE_VALUES, SPARE_TENSORS = 2**24, 1000  # that a constructor may make beside its weights: masks, tables, orders
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "BOOL": torch.bool,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
}


def save(folder: Path, part: str, config: Params, spec: Params, model: nn.Module, code: str) -> None:
    """Write a part ("tokenizers", "priors", "features") into an artifact folder that `artifact.create` yields.

    code: the fingerprint of the part's code, as a stage's job tells it.
    """
    state = {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
    bad = [name for name, tensor in state.items() if tensor.is_floating_point() and not tensor.isfinite().all()]
    if bad:
        raise ValueError(f"refusing to save {folder}: not finite: {', '.join(bad)}")
    safetensors.torch.save_file(state, folder / "weights.safetensors")
    described = {
        "part": part,
        "config": config.model_dump(mode="json"),
        "spec": spec.model_dump(mode="json"),
        "code": code,
    }
    artifact.write_json(folder / "config.json", described)


class Described(Params):
    """config.json"""

    part: str
    config: dict[str, Any]  # the Config of the part's kind
    spec: OfImages
    code: str


class DescribedPrior(Described):
    spec: OfTokens


DESCRIBED = {"tokenizers": Described, "features": Described, "priors": DescribedPrior}


def described(folder: Path, part: str) -> tuple[Any, Any]:
    """The Config and the spec of a part, unverified. Raises ArtifactError for what no such part could have written."""
    path = Path(folder) / CONFIG
    value = artifact.read_json(path)
    if not isinstance(value, dict) or value.get("part") != part:
        found = value.get("part") if isinstance(value, dict) else value
        raise ArtifactError(
            f"{folder} holds {reprlib.repr(found)}, expected {part!r}: another kind of artifact lies there"
        )
    whole = parsed(path, DESCRIBED[part], value)
    try:
        config = load(part, str(whole.config.get("kind"))).Config
    except ValueError as error:
        raise ArtifactError(f"{path}: config.kind: {error}. {artifact.remedy(Path(folder))}") from None
    return parsed(path, config, whole.config, "config"), whole.spec


def read_weights(path: Path) -> dict[str, torch.Tensor]:
    """Tensors of a safetensors file. Raises ArtifactError for anything else, a pickle above all: none is ever opened."""
    try:
        return safetensors.torch.load_file(path)
    except (SafetensorError, OSError, KeyError) as error:  # KeyError: a dtype that PyTorch does not have
        raise _no_safetensors(path, error) from None


def _no_safetensors(path: Path, error: Exception) -> ArtifactError:
    with path.open("rb") as file:
        start = file.read(2)
    pickled = start[:1] == b"\x80" or start == b"PK"
    what = "a pickle or a zip (as torch.save writes)" if pickled else "no safetensors file"
    return ArtifactError(
        f"{path} is {what}: {error}. Expected safetensors; convert it where you trust it, with safetensors.torch.save_file"
    )


def choice(folder: Path) -> dict[str, Any]:
    """How a prior's weights were chosen among those of its training, for its samples to tell; {} for the last ones."""
    path = Path(folder) / CHOICE
    return {"choice": artifact.read_json(path)} if path.is_file() else {}


def load_model(folder: Path, part: str) -> tuple[nn.Module, Any, Any]:
    """Verify the artifact; the model in evaluation mode on the CPU, its Config and its spec.

    Nothing of the network is made before its weights file is known to have just these tensors. Raises ArtifactError.
    """
    folder = artifact.check(folder)
    config, spec = described(folder, part)
    _require_same_tensors(folder, part, config, spec)
    weights = read_weights(folder / WEIGHTS)
    bad = [name for name, tensor in weights.items() if tensor.is_floating_point() and not tensor.isfinite().all()]
    if bad:
        raise ArtifactError(f"{folder / WEIGHTS} is not finite in {', '.join(bad[:3])}. {artifact.remedy(folder)}")
    model = load(part, config.kind).Model(config, spec)
    model.load_state_dict(weights, strict=True)
    return model.eval().requires_grad_(False), config, spec


def _require_same_tensors(folder: Path, part: str, config: Any, spec: Any) -> None:
    """Raises ArtifactError unless the weights file has the tensors of the network that the Config describes, and no others.

    The network is built without weights, and no further than so large a file could fill it.
    """
    path = folder / WEIGHTS
    found = _tensors_in(path)
    if len(found) > MOST_TENSORS:
        raise ArtifactError(f"{path} has {len(found):,} tensors, expected at most {MOST_TENSORS:,}")
    limits = WithinLimits(SPARE_VALUES + 2 * path.stat().st_size, SPARE_TENSORS + 4 * len(found))
    try:
        with torch.random.fork_rng(devices=[]), limits:
            network = load(part, config.kind).Model(config, spec)
        wanted = {name: (tuple(each.shape), each.dtype) for name, each in network.state_dict().items()}
    except Exception as error:  # a constructor that was written for what makes sense, and was given something else
        raise ArtifactError(
            f"{folder / CONFIG} describes no network that its weights could fill ({type(error).__name__}: "
            f"{str(error)[:200]}). {artifact.remedy(folder)}"
        ) from None
    wrong = sorted(name for name in wanted.keys() | found.keys() if wanted.get(name) != found.get(name))
    if wrong:
        told = {"found": found.get(wrong[0], "nothing"), "expected": wanted.get(wrong[0], "nothing")}
        raise ArtifactError(
            f"{path} does not fit its {CONFIG}: {wrong[0][:100]} is {told['found']}, expected {told['expected']}; "
            f"{len(wrong) - 1} others differ. {artifact.remedy(folder)}"
        )


def _tensors_in(path: Path) -> dict[str, tuple[tuple[int, ...], torch.dtype | str]]:
    """Shape and dtype of each tensor, from the header alone."""
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
            return {
                name: (tuple(one.get_shape()), DTYPES.get(one.get_dtype(), one.get_dtype()))
                for name, one in slices.items()
            }
    except (SafetensorError, OSError) as error:
        raise _no_safetensors(path, error) from None

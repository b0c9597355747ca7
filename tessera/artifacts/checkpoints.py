"""Trained parts between stages: weights.safetensors and config.json, rebuilt by name, never unpickled.

config.json also has a fingerprint of the code that defines the model (tessera/code). A stage that only receives the folder
does not know whose code it is; through the artifact a change of that code still reaches it.
"""

from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import nn

from tessera.artifacts import folder as artifact
from tessera.artifacts.folder import ArtifactError
from tessera.components import Params, load, parse
from tessera.contracts import ImageSpec, TokenSpec

CHOICE = "choice.json"  # in a prior's folder, where a criterion chose the weights
SPECS: dict[str, type[Params]] = {"tokenizers": ImageSpec, "features": ImageSpec, "priors": TokenSpec}


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


def read(folder: Path, part: str) -> tuple[Any, Any, dict[str, torch.Tensor]]:
    """Verify the artifact; return its Config, its spec and its weights."""
    folder = artifact.check(folder)
    meta = artifact.read_json(folder / "config.json")
    if not isinstance(meta, dict) or meta.get("part") != part:
        found = meta.get("part") if isinstance(meta, dict) else meta
        raise ArtifactError(f"{folder} holds {found!r}, expected {part!r}: another kind of artifact lies there")
    config = parse(load(part, meta["config"]["kind"]).Config, meta["config"], f"{folder}/config.json")
    spec = parse(SPECS[part], meta["spec"], f"{folder}/config.json")
    return config, spec, read_weights(folder / "weights.safetensors")


def read_weights(path: Path) -> dict[str, torch.Tensor]:
    """Tensors of a safetensors file. Raises ArtifactError for anything else, a pickle above all: none is ever opened."""
    try:
        return safetensors.torch.load_file(path)
    except (SafetensorError, OSError) as error:
        with path.open("rb") as file:
            start = file.read(2)
        pickled = start[:1] == b"\x80" or start == b"PK"
        what = "a pickle or a zip (as torch.save writes)" if pickled else "no safetensors file"
        raise ArtifactError(
            f"{path} is {what}: {error}. Expected safetensors; convert it where you trust it, with safetensors.torch.save_file"
        ) from None


def choice(folder: Path) -> dict[str, Any]:
    """How a prior's weights were chosen among those of its training, for its samples to tell; {} for the last ones."""
    path = Path(folder) / CHOICE
    return {"choice": artifact.read_json(path)} if path.is_file() else {}


def load_model(folder: Path, part: str) -> tuple[nn.Module, Any, Any]:
    """The model in evaluation mode on the CPU, its Config and its spec."""
    config, spec, weights = read(folder, part)
    model = load(part, config.kind).Model(config, spec)
    try:
        model.load_state_dict(weights, strict=True)
    except RuntimeError as error:
        raise ArtifactError(f"{folder}/weights.safetensors does not fit its config.json: {error}") from None
    return model.eval().requires_grad_(False), config, spec

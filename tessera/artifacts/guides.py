"""The worse version of a prior, by which it may be guided: guide.safetensors beside its weights, of the same network."""

import shutil
from pathlib import Path

from torch import nn

from tessera.artifacts import folder as artifact
from tessera.artifacts.checkpoints import described, read_weights
from tessera.artifacts.folder import ArtifactError
from tessera.components import load

GUIDE = "guide.safetensors"


def attach(model: nn.Module, folder: Path) -> None:
    """Give a prior that was read from an artifact, which is verified, the guide that lies there, as its part `guide`.

    Raises ArtifactError if there are no weights of the same network.
    """
    path = Path(folder) / GUIDE
    if not path.is_file():
        raise ArtifactError(f"{path} does not exist, though the prior's params have a guide. {artifact.remedy(folder)}")
    weights, wanted = read_weights(path), model.state_dict()
    wrong = sorted(
        name
        for name in wanted.keys() | weights.keys()
        if name not in wanted
        or name not in weights
        or (wanted[name].shape, wanted[name].dtype) != (weights[name].shape, weights[name].dtype)
        or (weights[name].is_floating_point() and not weights[name].isfinite().all())
    )
    if wrong:
        raise ArtifactError(
            f"{path} does not hold finite weights of the prior's own network: {wrong[0][:100]} and {len(wrong) - 1} others "
            f"differ. {artifact.remedy(folder)}"
        )
    config, spec = described(folder, "priors")
    guide = load("priors", config.kind).Model(config, spec)
    guide.load_state_dict(weights, strict=True)
    model.add_module("guide", guide.eval().requires_grad_(False))


def copy(source: Path, place: Path) -> None:
    """From the folder where a training kept it into an artifact that is being made."""
    shutil.copyfile(source / GUIDE, place / GUIDE)

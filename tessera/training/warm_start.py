"""Begins a training with weights that were trained before (the key `init`), in place of random ones.

FOLDER may be an artifact (data/tokenizers/NAME, data/priors/NAME), a checkpoint of a training (step-N in its .state; the
averaged weights), a folder of `python -m tessera.export`, or a registered model as MLflow downloads it; of the latter two the
part that is trained. Its content is pinned by the sha256 of its manifest.

Each tensor is taken that has the name and the shape of one here, a module's statistics only with all of the module: half a
codebook's averages are no codebook. A table of labels of another number of classes begins anew, as classes are known to a
prior by number alone. So does what no folder has: discriminators and optimizers.

Source: Yosinski et al., "How transferable are features in deep neural networks?", 2014, arXiv:1411.1792: layers that are
copied, then trained on, do better than random ones.
Differs from it: copied are all layers that fit, not the first n.
"""

from pathlib import Path
from typing import Any, NamedTuple

import safetensors.torch
from torch import Tensor, nn

from tessera.artifacts import checkpoints
from tessera.artifacts import folder as artifact
from tessera.artifacts.folder import MANIFEST, ArtifactError
from tessera.bases.initialization import Initialization
from tessera.components import Params
from tessera.contracts import Job, Objective

ROLES = {"tokenizers": "tokenizer", "priors": "prior"}  # the sub-folder of each part in an exported folder
AVERAGE = "average.safetensors"  # of a checkpoint (training/state.py)
KEPT, RECORD = "init", "init.json"  # in a training's state; in it, and in the artifact
SHOWN = 6  # names, in a line


class Fitting(NamedTuple):
    """What of a folder's tensors fits a model."""

    taken: dict[str, Tensor]
    anew: dict[str, str]  # the model's other tensors, each with the reason
    unused: list[str]  # the folder's other tensors
    tokenizer: str | None = None  # the fingerprint of the one whose tokens the folder's prior learned, if known


def begin(objective: Objective, config: Params, part: str, job: Job) -> None:
    """Fill objective.model as config.init says; part: "tokenizers" or "priors".

    The weights taken are kept in job.state with the record, so that a training that is killed needs the folder no more.
    Raises ValueError, in a sentence, for a folder that is damaged, not the one that is meant, or of no use.
    """
    kept = job.state / KEPT
    try:
        weights = checkpoints.read_weights(artifact.check(kept) / checkpoints.WEIGHTS)
    except ArtifactError:  # the first time; or damaged since
        found = read(objective.model, config, part)
        weights, others = found.taken, _trained_besides(objective)
        for line in _lines(config.init, found, others, objective.model):
            job.say(line)
        if job.is_main:
            with artifact.create(kept) as place:
                safetensors.torch.save_file(weights, place / checkpoints.WEIGHTS)
                artifact.write_json(place / RECORD, _record(config.init, found, others))
    objective.model.load_state_dict(weights, strict=False)


def write_record(place: Path, job: Job) -> None:
    """Put into an artifact, and show the tracker, what `begin` took and what it did not."""
    path = place / RECORD
    path.write_bytes((job.state / KEPT / RECORD).read_bytes())
    job.attach(path, RECORD)


def read(model: nn.Module, config: Params, part: str) -> Fitting:
    """What fits the model of the folder in config.init, verified. Raises ValueError, in a sentence that names the key."""
    try:
        place = _folder_of(Path(config.init.folder), part)
        _require_the_one_meant(place, config.init)
        file, spec = AVERAGE, None
        if not (place / AVERAGE).is_file():
            file, (of, spec) = checkpoints.WEIGHTS, checkpoints.described(place, part)
            if of.kind != config.kind:
                raise ArtifactError(f"{place} is of kind {of.kind}, expected {config.kind}: name another folder")
        weights = checkpoints.read_weights(place / file)
    except ArtifactError as error:
        sentence = str(error).partition(" Make it again with: dvc")[0]  # it may be anybody's folder
        raise ValueError(f"init.from: {sentence}") from None
    found = fitting(model, weights)
    if not found.taken:
        raise ValueError(
            f"init.from: none of the {len(weights)} tensors in {place / file} has the name and shape of one of this "
            f"{ROLES[part]}, expected weights of the same kind and of similar sizes: name another folder, or leave init out"
        )
    bad = [name for name, tensor in found.taken.items() if not tensor.isfinite().all()]
    if bad:
        raise ValueError(f"init.from: {place / file} is not finite in {_some(bad)}: name another folder")
    return found._replace(tokenizer=getattr(spec, "tokenizer_fingerprint", None))


def fitting(model: nn.Module, weights: dict[str, Tensor]) -> Fitting:
    """Which of the weights fit the model, by name and shape."""
    anew: dict[str, str] = {}
    ours = {name: tensor.shape for name, tensor in model.state_dict().items()}
    for name, shape in ours.items():
        if name not in weights:
            anew[name] = "not in the folder"
        elif weights[name].shape != shape:
            anew[name] = f"{_sides(weights[name].shape)} in the folder, {_sides(shape)} here"
    for path, module in model.named_modules():
        own = [name for name in ours if name.rpartition(".")[0] == path]
        statistics = {f"{path}.{name}".lstrip(".") for name, _ in module.named_buffers(recurse=False)}
        missing = [name for name in own if name in anew]
        if missing and statistics & set(own):
            anew |= {name: f"belongs to {missing[0]}" for name in own if name not in anew}
    taken = {name: weights[name] for name in ours if name not in anew}
    return Fitting(taken, anew, sorted(weights.keys() - ours.keys()))


def _folder_of(folder: Path, part: str) -> Path:
    """The folder with the manifest: this one, or that of the part in it. Raises ArtifactError."""
    if (folder / MANIFEST).is_file():
        return folder
    for place in (folder / ROLES[part], *sorted(folder.glob("artifacts/*"))):  # exported; as MLflow lays it
        if (place / MANIFEST).is_file() and _says_part(place) == part:
            return place
    found = f"holds no {ROLES[part]}" if folder.is_dir() else "is no folder" if folder.exists() else "does not exist"
    raise ArtifactError(
        f"{folder} {found}, expected an artifact (data/{part}/NAME), a checkpoint (step-N in .state), an exported folder or a "
        f"downloaded model: name one"
    )


def _says_part(place: Path) -> Any:
    described = artifact.read_json(place / checkpoints.CONFIG)
    return described.get("part") if isinstance(described, dict) else None


def _require_the_one_meant(place: Path, init: Initialization) -> None:
    """Raises ValueError for another manifest than the one that is pinned, ArtifactError for a file that is not as it says."""
    found = artifact.fingerprint(place)
    if found != init.sha256:
        raise ValueError(
            f"init.sha256: {place / MANIFEST} has sha256 {found}, expected {init.sha256}: bring back the folder that was "
            f"meant, or write sha256: {found} to begin from this one"
        )
    artifact.check(place)


def _trained_besides(objective: Any) -> list[str]:
    """The networks that are trained beside the model: a discriminator."""
    others = {name: child for name, child in objective.named_children() if child is not objective.model}
    return [name for name, child in others.items() if any(True for _ in child.parameters())]


def _record(init: Initialization, found: Fitting, others: list[str]) -> dict[str, Any]:
    return {
        "from": init.folder,
        "sha256": init.sha256,
        "taken": list(found.taken),
        "anew": found.anew | dict.fromkeys(others, "not in any folder"),
        "unused": found.unused,
    }


def _lines(init: Initialization, found: Fitting, others: list[str], model: Any) -> list[str]:
    """What a person is told."""
    number = len(found.taken) + len(found.anew)
    lines = [f"begins from {init.folder}: {len(found.taken)} of {number} tensors"]
    anew = [f"{name} ({why})" for name, why in found.anew.items()] + others
    lines += [f"begin anew: {_some(anew)}"] if anew else []
    lines += [f"not used of it: {_some(found.unused)}"] if found.unused else []
    if found.tokenizer and found.tokenizer != model.spec.tokenizer_fingerprint:
        lines.append(
            f"it learned tokens of another tokenizer ({found.tokenizer[:12]}, here {model.spec.tokenizer_fingerprint[:12]}): "
            f"what was taken helps as far as their tokens mean the same"
        )
    return lines


def _some(names: list[str]) -> str:
    rest = len(names) - SHOWN
    return ", ".join(names[:SHOWN]) + (f" and {rest} more, see {RECORD}" if rest > 0 else "")


def _sides(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape)) or "scalar"

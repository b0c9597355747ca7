"""What lies in an exported folder, which is a repository of models as the Hugging Face Hub has them.

config.json               how to draw, and the hashes of the manifests of both parts
tokenizer/, prior/        artifacts: config.json, weights.safetensors, and manifest.json with the hash of each file
README.md, samples.png    the card and its grid; metrics.json: the figures with their protocols. Nothing reads them
onnx/                     with --onnx alone; nothing here reads it
"""

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field

from tessera.artifacts import described
from tessera.artifacts import folder as artifact
from tessera.artifacts.folder import ArtifactError
from tessera.components import Params
from tessera.contracts import Side
from tessera.sources.decoding import Background, Filter, Resize
from tessera.sources.links import require_no_way_out

FORMAT = 1  # raised when an older version could no longer read what is written
PARTS = ("tokenizer", "prior")
CONFIG, CARD, GRID, METRICS, ONNX = "config.json", "README.md", "samples.png", "metrics.json", "onnx"
Sha256 = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]


class Preprocessing(Params):
    """How a picture of any size becomes an image of the data set (datasets/image_folder.py)."""

    channels: Side
    height: Side
    width: Side
    resize: Resize
    filter: Filter
    background: Background


class Exported(Params):
    """config.json"""

    library_name: Literal["tessera"]
    format: Literal[1]
    name: str
    sampling: dict[str, Any]  # the Sampling of the prior's file, as the system was evaluated
    batch_size: Annotated[int, Field(ge=1)]  # images drawn at once: a part of what decides their bits
    preprocessing: Preprocessing
    manifests: dict[Literal["tokenizer", "prior"], Sha256]


def read(folder: Path) -> Exported:
    """config.json of an exported folder whose files are all in place. Raises ArtifactError; no weights are opened here."""
    if not folder.is_dir():
        raise ArtifactError(f"{folder} is no folder: expected one that `python -m tessera.export SYSTEM FOLDER` wrote")
    require_no_way_out(folder)
    value = artifact.read_json(folder / CONFIG)
    if not isinstance(value, dict) or value.get("library_name") != "tessera":
        raise ArtifactError(
            f"{folder / CONFIG} is of no exported system: expected library_name tessera in it; name another folder"
        )
    found = value.get("format")
    if isinstance(found, int) and found > FORMAT:
        raise ArtifactError(
            f"{folder} was written by a newer version (format {found}), expected at most format {FORMAT}: update tessera"
        )
    exported = described.parsed(folder / CONFIG, Exported, value)
    for part in PARTS:
        manifest = folder / part / artifact.MANIFEST
        actual = artifact.sha256(manifest) if manifest.is_file() else "no file"
        if actual != exported.manifests.get(part):
            raise ArtifactError(
                f"{manifest} is not the one that {folder / CONFIG} was written for: sha256 {actual}, expected "
                f"{exported.manifests.get(part, 'the hash of a manifest, which config.json lacks')}. Export or download "
                f"{folder} again"
            )
    return exported

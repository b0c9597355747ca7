"""The JSON files of artifacts as models: what somebody else made may say anything, also with a manifest that fits."""

from pathlib import Path
from typing import Annotated, Any, TypeVar

from pydantic import AfterValidator

from tessera.artifacts import folder as artifact
from tessera.artifacts.folder import ArtifactError
from tessera.components import InvalidParams, Params, parse
from tessera.contracts import ImageSpec, TokenSpec

MOST_TOLD = 3  # mistakes, in a sentence
P = TypeVar("P", bound=Params)


def _names_its_classes(spec: ImageSpec) -> ImageSpec:
    if len(spec.class_names) != spec.num_classes:
        raise ValueError(f"{len(spec.class_names)} class_names were given for {spec.num_classes} classes")
    return spec


def _fits_together(spec: TokenSpec) -> TokenSpec:
    depth, height, width = spec.latent_shape
    if not len(spec.latent_mean) == len(spec.latent_std) == depth:
        raise ValueError(f"latents of {depth} channels need as many latent_mean and latent_std")
    if len(spec.class_counts) != spec.num_classes or not any(spec.class_counts):
        raise ValueError(f"{spec.num_classes} classes need as many class_counts, and some image")
    if spec.index_grid[0] != height or spec.index_grid[1] % width:
        raise ValueError(f"the index_grid {spec.index_grid} is not that of latents on {height}x{width}")
    return spec


OfImages = Annotated[ImageSpec, AfterValidator(_names_its_classes)]  # a spec that says one thing
OfTokens = Annotated[TokenSpec, AfterValidator(_fits_together)]


def read(path: Path, model: type[P]) -> P:
    """A JSON file of an artifact. Raises ArtifactError, naming it, for anything that the model does not say."""
    return parsed(path, model, artifact.read_json(path))


def parsed(path: Path, model: type[P], value: Any, where: str = "") -> P:
    """A part of what the file says, as the model has it; where: its key. Raises ArtifactError."""
    try:
        return parse(model, value, where)
    except (InvalidParams, RecursionError) as error:
        lines = str(error).splitlines()
        more = f"; and {len(lines) - MOST_TOLD} more" if len(lines) > MOST_TOLD else ""
        raise ArtifactError(
            f"{path} is not as this version writes it: {'; '.join(lines[:MOST_TOLD])}{more}. {artifact.remedy(path.parent)}"
        ) from None

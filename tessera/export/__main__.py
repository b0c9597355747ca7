"""Writes a trained system of this checkout into a folder that stands alone, for tessera.load and the Hugging Face Hub.

    python -m tessera.export vqgan-masked ../digits-masked
    python -m tessera.export vqgan-masked ../digits-masked --onnx

The folder is new. Nothing is sent anywhere; its card says how to.
"""

import argparse
import shutil
import sys
from pathlib import Path
from typing import Any

from tessera import params as all_params
from tessera.artifacts import checkpoints, whole
from tessera.artifacts import folder as artifact
from tessera.artifacts.captions import examples_of
from tessera.contracts import ImageSpec
from tessera.export import card, layout
from tessera.params import Pipeline
from tessera.sources.frame import PREPROCESSING
from tessera.system import System

LONGEST_NAME = 200  # bytes; file systems take 255, of which the folder that is being written needs some


def write(params: Pipeline, name: str, root: Path, out: Path, onnx: bool = False) -> None:
    """Export a system of the checkout at `root`. Raises ValueError if it is not trained, or `out` is taken."""
    if name not in params.systems:
        raise ValueError(f"there is no system '{name}' in params.yaml: expected one of {', '.join(params.systems)}")
    if out.exists():
        raise ValueError(f"{out} exists: expected the name of a new folder")
    _require_apart(out, root)
    data = root / "data"
    parts = {"tokenizer": data / "tokenizers" / params.systems[name].tokenizer, "prior": data / "priors" / name}
    system = System.read(parts["tokenizer"], parts["prior"], name)  # verified, and of one another
    with whole.folder(out) as place:
        for part, source in parts.items():
            shutil.copytree(
                source, place / part, copy_function=shutil.copyfile
            )  # files of its own, not links into a cache
        _, images = checkpoints.described(parts["tokenizer"], "tokenizers")
        manifests = {part: artifact.sha256(source / artifact.MANIFEST) for part, source in parts.items()}
        artifact.write_json(place / layout.CONFIG, _config(params, name, images, manifests))
        if onnx:
            from tessera.export import onnx as networks

            networks.write(system, place / layout.ONNX, examples_of(parts["prior"]))
        metrics = data / "metrics/systems" / f"{name}.json"
        figures = artifact.read_json(metrics) if metrics.is_file() else None
        if figures is not None:
            artifact.write_json(place / layout.METRICS, figures)
        picture = data / "pictures/samples" / f"{name}.png"
        if picture.is_file():
            shutil.copyfile(picture, place / layout.GRID)
        text = card.text(params, name, images, figures, has_grid=picture.is_file(), has_onnx=onnx)
        (place / layout.CARD).write_text(text, encoding="utf-8")


def _require_apart(out: Path, root: Path) -> None:
    """Raises ValueError for a folder in one that stages write, or in an artifact, which would no longer be what it says."""
    above = [out.absolute(), *out.absolute().parents]
    if (root / "data").absolute() in above:
        raise ValueError(f"{out} lies in {root / 'data'}, which stages write: expected a folder outside of it")
    inside = next((place for place in above[1:] if (place / artifact.MANIFEST).is_file()), None)
    if inside is not None:
        raise ValueError(f"{out} lies in {inside}, which is an artifact: expected a folder outside of it")
    blocked = next((place for place in above[1:] if place.exists() and not place.is_dir()), None)
    if blocked is not None:
        raise ValueError(f"{blocked} is a file: expected a folder to put {out.name:.40} into")
    if len(out.name.encode()) > LONGEST_NAME:
        raise ValueError(
            f"{out.name:.40}... has {len(out.name.encode())} bytes: expected a name of at most {LONGEST_NAME}"
        )


def _config(params: Pipeline, name: str, images: ImageSpec, manifests: dict[str, str]) -> dict[str, Any]:
    preprocessing = {key: getattr(params.dataset, key, usual) for key, usual in PREPROCESSING.items()}
    shape = {key: getattr(images, key) for key in ("channels", "height", "width")}
    return {
        "library_name": "tessera",
        "format": layout.FORMAT,
        "name": f"{params.dataset.name}-{name}",
        "sampling": params.sampling(name).model_dump(mode="json"),
        "batch_size": params.sample_images.batch_size,
        "preprocessing": shape | preprocessing,
        "manifests": manifests,
    }


def main(arguments: list[str]) -> int:
    plain = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(prog="python -m tessera.export", description=__doc__, formatter_class=plain)
    parser.add_argument("system", help="a system of params.yaml that is trained")
    parser.add_argument("folder", type=Path, help="a new folder")
    parser.add_argument("--onnx", action="store_true", help="with encoder, decoder and a step of the prior as ONNX")
    given = parser.parse_args(arguments)
    try:
        write(all_params.read(Path("params.yaml")), given.system, Path(), given.folder, given.onnx)
    except (ValueError, OSError) as error:
        print(f"nothing was exported: {error}", file=sys.stderr)
        return 2
    print(f"{given.folder}: open it with tessera.load({str(given.folder)!r}); its card: {given.folder / layout.CARD}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

"""Images of 16 bits, from PNG, TIFF and npy to the samples, the figures, the edits and an exported folder: none is rounded to 256
levels on its way."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from in_process import Stages
from PIL import Image

from tessera.artifacts import images as image_artifact
from tessera.artifacts.samples import Samples
from tessera.components import parse
from tessera.params import Pipeline

pytestmark = pytest.mark.e2e(seconds=40)
ROOT = Path(__file__).parents[2]
NAME, SIDE = "vqgan-flow", 16


def image(number: int) -> np.ndarray:
    """(H, W): a slope within two levels of 8 bits, which differs by the class; all of it would be flat in 8."""
    rows, columns = np.mgrid[:SIDE, :SIDE]
    slope = (rows if number % 2 else columns) * 30
    return (30_000 + slope + np.random.default_rng(number).integers(0, 20, (SIDE, SIDE))).astype(np.uint16)


def files(folder: Path) -> Path:
    folder.mkdir()
    for number in range(60):
        name = folder / f"{('red', 'blue')[number % 2]}_{number}.{('npy', 'tif', 'png')[number // 2 % 3]}"
        if name.suffix == ".npy":
            np.save(name, image(number).astype(">u2" if number % 4 else "<u2"))
        else:
            Image.fromarray(image(number)).save(name)
    return folder


def params_of(source: Path) -> Pipeline:
    raw: dict[str, Any] = yaml.safe_load((ROOT / "presets/emoji.yaml").read_text())
    raw["dataset"] |= {
        "source": str(source),
        "height": SIDE,
        "width": SIDE,
        "test_fraction": 0.3,
        "bands": 1,
        "bits": 16,
    }
    raw["dataset"] |= {"label_pattern": "([a-z]+)_[0-9]+"}
    del raw["dataset"]["metadata"]
    training = {"num_steps": 8, "batch_size": 8}
    raw["features"] = {name: one for name, one in raw["features"].items() if one["kind"] == "classifier"}
    for judge in raw["features"].values():
        judge |= {"channels": 8, "feature_dim": 16, "training": training}
    raw["tokenizers"]["vqgan"] |= {"channels": 16, "num_blocks": 1, "discriminator_start_step": 4, "training": training}
    prior = raw["systems"][NAME]["prior"]
    prior |= {"denoiser": {"kind": "transformer", "width": 32, "depth": 1, "heads": 2}, "training": training}
    prior.pop("condition")
    raw["encode_tokens"] |= {"warps": 1, "batch_size": 16}
    raw["sample_images"] = {"num_images": 20, "batch_size": 8}
    raw["edits"] = {
        "inpaint": {"kind": "inpaint", "candidates": 2},
        "variations": {"kind": "variations", "strength": 0.5},
    }
    raw["edit_images"] = {"num_images": 4, "num_seeds": 1, "batch_size": 4}
    for metric in raw["evaluate"]["metrics"].values():
        metric |= {"neighbors": 2, "density_neighbors": 2} if metric["kind"] == "precision_recall" else {}
    raw["evaluate"]["metrics"]["brightness"] = {"kind": "brightness"}
    return parse(Pipeline, raw)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Pipeline]:
    """A checkout's data folder with the artifacts of every stage, and the params."""
    root = tmp_path_factory.mktemp("16-bits")
    params = params_of(files(root / "source"))
    stages = Stages(params, root)
    stages.tokenize("vqgan")
    stages.run(*(f"{stage}@{NAME}" for stage in ("train_prior", "sample_images", "evaluate", "edit_images")))
    return root, params


def test_samples_hold_values_that_no_image_of_8_bits_has(made: tuple[Path, Pipeline]) -> None:
    root, params = made
    spec, splits = image_artifact.read(root / "data/images")
    assert spec.bits == 16
    stored = {bytes(each) for split in splits.values() for each in split.pixels.all()}
    assert stored == {bytes(image(number)[None]) for number in range(60)}
    pixels = Samples(root / "data/samples" / NAME, spec, 20).pixels.all()
    assert pixels.dtype == np.uint16 and len(np.unique(pixels)) > 256 and (pixels % 257 != 0).mean() > 0.9

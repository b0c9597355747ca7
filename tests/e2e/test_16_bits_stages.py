"""Images of 16 bits, from PNG, TIFF and npy to samples, figures, edits and an exported folder: nothing is rounded to 8."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
import yaml
from in_process import Stages, made_small
from PIL import Image

import tessera
from studio.actions import Studio
from tessera.artifacts import images as image_artifact
from tessera.artifacts.samples import Samples
from tessera.artifacts.shards import spread
from tessera.check import images, problems
from tessera.components import parse
from tessera.evaluation import figures
from tessera.export import __main__ as export
from tessera.params import Pipeline
from tessera.sources.frame import Frame
from tessera.system import System
from tessera.tracking.served_model import Refused, ServedImages

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
    raw["features"] = {name: one for name, one in raw["features"].items() if one["kind"] == "classifier"}
    prior = made_small(raw)
    prior.pop("condition")
    raw["systems"][NAME]["prior"] = prior
    raw["edits"] = {
        "inpaint": {"kind": "inpaint", "candidates": 2},
        "variations": {"kind": "variations", "strength": 0.5},
    }
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


def test_metrics_are_of_all_16_bits(made: tuple[Path, Pipeline]) -> None:
    root, params = made
    spec, splits = image_artifact.read(root / "data/images")
    drawn = Samples(root / "data/samples" / NAME, spec, 20).pixels.all().astype(np.float64)
    found = figures.read(root / f"data/metrics/systems/{NAME}.json").groups["generation"]
    shift = (drawn.mean() - splits["test"].pixels.all().astype(np.float64).mean()) / 257
    assert found["brightness_shift"].value == pytest.approx(shift, abs=1e-9)
    model = System.read(root / "data/tokenizers/vqgan", root / "data/priors" / NAME)
    originals = torch.from_numpy(splits["test"].pixels.all().astype(np.float32)) / 65535
    with torch.no_grad():
        decoded = model.decode_latents(model.encode_latents(2 * originals - 1)).clip(-1, 1) / 2 + 0.5
    errors = (decoded - originals).double().square().mean(dim=(1, 2, 3))
    of_tokenizer = figures.read(root / "data/metrics/tokenizers/vqgan.json").groups["reconstruction"]
    assert of_tokenizer["psnr_db"].value == pytest.approx((-10 * errors.log10()).mean().item(), abs=1e-2)


def test_pictures_show_the_upper_8_bits(made: tuple[Path, Pipeline]) -> None:
    root, _ = made
    _, splits = image_artifact.read(root / "data/images")
    row = spread(len(splits["test"]), 50)[0]
    corner = np.asarray(Image.open(root / "data/pictures/reconstructions/vqgan.png"))[3:51:3, 3:51:3]
    expected = np.rint(splits["test"].pixels.gather(np.array([row]))[0, 0] / 257).astype(np.uint8)
    np.testing.assert_array_equal(corner, np.repeat(expected[..., None], 3, axis=2))
    for name in ("samples", "neighbors", "edits"):
        shown = np.asarray(Image.open(root / f"data/pictures/{name}/{NAME}.png"))
        assert shown.dtype == np.uint8 and shown.max() < 256


def test_edits_are_stored_with_16_bits(made: tuple[Path, Pipeline]) -> None:
    root, params = made
    for edit in params.edits:
        (path,) = (root / f"data/edits/{NAME}").glob(f"{edit}-*.npy")
        edited = np.load(path)
        assert edited.dtype == np.uint16 and (edited % 257 != 0).mean() > 0.9, edit


def test_an_exported_system_draws_and_edits_with_16_bits_and_saves_gray_pictures_of_them(
    made: tuple[Path, Pipeline], tmp_path: Path
) -> None:
    root, params = made
    export.write(params, NAME, root, tmp_path / "exported")
    system = tessera.load(tmp_path / "exported", device="cpu")
    drawn = system.sample(labels=[0, 1, 1], seed=1)
    assert drawn.dtype == torch.uint16 == system.image_dtype and drawn.shape == (3, 1, SIDE, SIDE)
    decoded = system.decode(system.encode(drawn))
    assert decoded.dtype == torch.uint16 and (decoded.numpy() % 257 != 0).mean() > 0.9
    assert system.edit("variations", drawn, seed=1).dtype == torch.uint16
    system.pictures(drawn)[0].save(tmp_path / "one.png")
    np.testing.assert_array_equal(np.asarray(Image.open(tmp_path / "one.png")), drawn[0, 0].numpy())
    with pytest.raises(
        ValueError, match=r"images are torch.uint8 of the shape .*: expected torch.uint16 of \(B, 1, 16, 16\)"
    ):
        system.encode((drawn.int() // 257).to(torch.uint8))
    with pytest.raises(
        ValueError, match="has images of 16 bits, and most pictures of Pillow have 8: expected a uint16 tensor"
    ):
        system.preprocess([Image.new("L", (16, 16))])
    with pytest.raises(
        ValueError, match="precision bf16 has 8 significant bits, and would round images of 16: expected"
    ):
        system.sample(labels=[0], precision="bf16")
    assert "# (B, C, H, W) uint16" in (tmp_path / "exported/README.md").read_text()


def test_what_would_give_8_bits_refuses(made: tuple[Path, Pipeline]) -> None:
    root, params = made
    sentence = (
        r"^(emoji|the data set|this model) has images of 16 bits, and pictures here have 8, expected images of 8: "
    )
    with pytest.raises(ValueError, match=sentence):
        Frame(params.dataset, (20, 20))
    model = ServedImages()
    parts = {"tokenizer": root / "data/tokenizers/vqgan", "prior": root / "data/priors" / NAME}
    context = SimpleNamespace(artifacts=parts, model_config={"sampling": params.sampling(NAME).model_dump(mode="json")})
    model.load_context(context)
    with pytest.raises(Refused, match=sentence):
        model.predict(context, pd.DataFrame([{"labels": [0], "seed": 1.0}]))
    (root / "params.yaml").write_text(yaml.safe_dump(params.model_dump(mode="json")))
    with pytest.raises(ValueError, match=sentence):
        Studio(root)


def test_what_would_round_images_is_refused_before_anything_is_trained(made: tuple[Path, Pipeline]) -> None:
    root, params = made
    spec, splits = image_artifact.read(root / "data/images")
    planned = images.planned(params, spec, {name: split.labels for name, split in splits.items()})
    assert problems.problems(params, planned) == []
    raw = params.model_dump(mode="json")
    raw["systems"][NAME]["sampling"]["precision"] = "bf16"
    raw["tokenizers"]["none"] = {"kind": "none", "quantizer": {"kind": "identity"}}
    raw["encode_tokens"]["latents_dtype"] = "float16"
    found = "\n".join(problems.problems(parse(Pipeline, raw), planned))
    assert f"systems.{NAME}.sampling: precision bf16 has 8 significant bits" in found
    assert "latents_dtype: float16 has 11 significant bits" in found

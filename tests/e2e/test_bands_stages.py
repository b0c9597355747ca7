"""Images of five channels, npy beside TIFF, from the files to the figures, the edits and an exported folder."""

import json
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
from tessera.components import parse
from tessera.evaluation import figures
from tessera.export import __main__ as export
from tessera.params import Pipeline
from tessera.sources.frame import Frame
from tessera.tracking.served_model import Refused, ServedImages

pytestmark = pytest.mark.e2e(seconds=30)
ROOT = Path(__file__).parents[2]
NAME, CHANNELS, SIDE = "vqgan-flow", 5, 16


def image(number: int) -> np.ndarray:
    """(H, W, C): one channel is bright, by the class; the rest is noise of its own."""
    values = np.random.default_rng(number).integers(0, 60, (SIDE, SIDE, CHANNELS))
    values[..., number % 2 + 3] += 150
    return values.astype(np.uint8)


def files(folder: Path) -> Path:
    folder.mkdir()
    rows = []
    for number in range(60):
        name = f"{('red', 'blue')[number % 2]}_{number}.{('npy', 'tif')[number // 2 % 2]}"
        if name.endswith(".npy"):
            np.save(folder / name, image(number))
        else:
            first, *others = map(Image.fromarray, np.moveaxis(image(number), -1, 0))
            first.save(folder / name, save_all=True, append_images=others)
        rows.append({"file_name": name, "text": f"{name.partition('_')[0]} field"})
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder


def params_of(source: Path) -> Pipeline:
    raw: dict[str, Any] = yaml.safe_load((ROOT / "presets/emoji.yaml").read_text())
    raw["dataset"] |= {"source": str(source), "height": SIDE, "width": SIDE, "test_fraction": 0.3, "bands": CHANNELS}
    raw["dataset"] |= {"label_pattern": "([a-z]+)_[0-9]+", "metadata": {"captions": ["text"]}}
    prior = made_small(raw)
    prior["condition"] |= {"max_bytes": 24}
    raw["systems"][NAME]["prior"] = prior
    raw["edits"] = {
        "inpaint": {"kind": "inpaint", "candidates": 2},
        "denoise": {"kind": "enhance", "damage": "noise", "noise_std": 0.4},
        "super-resolution": {"kind": "enhance", "damage": "downsample", "factor": 2},
        "restyle": {"kind": "restyle"},
        "variations": {"kind": "variations", "strength": 0.5},
    }
    return parse(Pipeline, raw)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Pipeline]:
    """A checkout's data folder with the artifacts of every stage, and the params."""
    root = tmp_path_factory.mktemp("bands")
    params = params_of(files(root / "source"))
    stages = Stages(params, root)
    stages.tokenize("vqgan")
    stages.run(*(f"{stage}@{NAME}" for stage in ("train_prior", "sample_images", "evaluate", "edit_images")))
    return root, params


def test_samples_have_all_channels_and_figures_are_of_them(made: tuple[Path, Pipeline]) -> None:
    root, params = made
    spec, _ = image_artifact.read(root / "data/images")
    assert spec.channels == CHANNELS and spec.class_names == ("blue", "red")
    samples = Samples(root / "data/samples" / NAME, spec, 20)
    assert samples.pixels.row_shape == (CHANNELS, SIDE, SIDE)
    found = figures.read(root / f"data/metrics/systems/{NAME}.json").groups["generation"]
    assert {"fd_classifier", "label_agreement", "precision", "brightness_shift", "caption_at_1_seen"} <= set(found)
    of_tokenizer = figures.read(root / "data/metrics/tokenizers/vqgan.json").groups["reconstruction"]
    assert {"psnr_db", "ssim"} <= set(of_tokenizer)
    assert set(figures.read(root / f"data/metrics/edits/{NAME}.json").groups) >= set(params.edits)


def test_pictures_show_the_first_channel_in_gray(made: tuple[Path, Pipeline]) -> None:
    root, _ = made
    _, splits = image_artifact.read(root / "data/images")
    reconstructions = root / "data/pictures/reconstructions/vqgan.png"
    of_system = [root / f"data/pictures/{name}/{NAME}.png" for name in ("samples", "neighbors", "edits")]
    for path in (reconstructions, *of_system):
        shown = np.asarray(Image.open(path).convert("RGB"))
        assert (shown == shown[..., :1]).all()  # the samples with words below, too
    scale = 3  # of 16 pixels to 48
    row = spread(len(splits["test"]), 50)[0]
    corner = np.asarray(Image.open(reconstructions))[scale : 17 * scale : scale, scale : 17 * scale : scale, 0]
    np.testing.assert_array_equal(corner, splits["test"].uint8(np.array([row]))[0, 0].numpy())


def test_an_exported_system_draws_and_edits_all_channels_and_makes_no_pictures_of_them(
    made: tuple[Path, Pipeline], tmp_path: Path
) -> None:
    root, params = made
    export.write(params, NAME, root, tmp_path / "exported")
    system = tessera.load(tmp_path / "exported", device="cpu")
    drawn = system.sample(labels=[0, 1], seed=1)
    assert drawn.dtype == torch.uint8 and drawn.shape == (2, CHANNELS, SIDE, SIDE) == (2, *system.image_shape)
    assert system.edit("variations", drawn, seed=1).shape == drawn.shape
    with pytest.raises(
        ValueError, match=r"has images of 5 channels, expected pictures of 1 \(gray\) or 3 \(RGB\): give a"
    ):
        system.preprocess([Image.new("RGB", (16, 16))])
    with pytest.raises(ValueError, match=r"expected torch.uint8 of \(B, 1 or 3, H, W\).*of more channels, choose some"):
        system.pictures(drawn)
    assert len(system.pictures(drawn[:, :3])) == 2


def test_what_shows_and_takes_pictures_refuses_other_channels(
    made: tuple[Path, Pipeline], monkeypatch: pytest.MonkeyPatch
) -> None:
    root, params = made
    sentence = r"^(emoji|the data set) has images of 5 channels, expected pictures of 1 \(gray\) or 3 \(RGB\): export"
    with pytest.raises(ValueError, match=sentence):
        Frame(params.dataset, (20, 20))
    model = ServedImages()
    parts = {"tokenizer": root / "data/tokenizers/vqgan", "prior": root / "data/priors" / NAME}
    sampling = params.sampling(NAME).model_dump(mode="json")
    context = SimpleNamespace(artifacts=parts, model_config={"sampling": sampling})
    model.load_context(context)
    with pytest.raises(Refused, match=r"^this model has images of 5 channels, expected pictures of 1 \(gray\) or 3"):
        model.predict(context, pd.DataFrame([{"labels": [0], "seed": 1.0}]))
    (root / "params.yaml").write_text(yaml.safe_dump(params.model_dump(mode="json")))
    with pytest.raises(ValueError, match=sentence):
        Studio(root)


def test_a_frame_of_one_band_is_gray_whatever_channels_says(made: tuple[Path, Pipeline]) -> None:
    _, params = made
    frame = Frame(params.dataset.model_copy(update={"bands": 1}), (20, 20))
    assert frame.tensor(Image.new("RGB", (20, 20))).shape == (1, 1, SIDE, SIDE)

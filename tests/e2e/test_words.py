"""presets/emoji.yaml from the files to the figures, on coloured shapes that are told in words, by attributes and by vectors."""

import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from in_process import Stages
from PIL import Image

from stages import compare_systems
from tessera.artifacts.captions import examples_of
from tessera.components import parse
from tessera.evaluation import figures
from tessera.params import Pipeline
from tessera.running.job import Job

pytestmark = pytest.mark.e2e(seconds=30)
ROOT = Path(__file__).parents[2]
COLOURS = {"red": (220, 30, 30), "green": (30, 180, 60), "blue": (40, 60, 220), "黄": (230, 220, 40)}
SHAPES = ("square", "bar", "column")
HELD_OUT = {("red", "bar"), ("blue", "column")}


def shapes(folder: Path) -> Path:
    """96 pictures of 16x16, with the combinations that nobody trains on, and one new word, in the test split."""
    folder.mkdir()
    rows = []
    for number, (colour, shape, place) in enumerate(itertools.product(COLOURS, SHAPES, range(8))):
        pixels = np.full((16, 16, 3), 255, np.uint8)
        height, width = {"square": (6, 6), "bar": (3, 12), "column": (12, 3)}[shape]
        pixels[place % 4 : place % 4 + height, place // 2 : place // 2 + width] = COLOURS[colour]
        Image.fromarray(pixels).save(folder / f"{number:03d}.png")
        is_test = (colour, shape) in HELD_OUT or place == 7
        text = f"ein {shape}" if place == 7 and colour == "green" else f"a {colour} {shape}"
        said = {"file_name": f"{number:03d}.png", "text": text, "shape": shape, "split": "test" if is_test else "train"}
        vector = None if place == 3 else [part / 255 for part in COLOURS[colour]]
        rows.append(said | {"place": None if place == 3 else place, "colour": colour, "vector": vector})
    (folder / "metadata.jsonl").write_text("\n".join(json.dumps(row) for row in rows), encoding="utf-8")
    return folder


def params_of(source: Path) -> Pipeline:
    raw: dict[str, Any] = yaml.safe_load((ROOT / "presets/emoji.yaml").read_text())
    raw["dataset"] |= {"source": str(source), "height": 16, "width": 16}
    columns = {"captions": ["text"], "attributes": ["place", "colour"], "label": "shape", "split": "split"}
    columns["embedding"] = "vector"
    raw["dataset"]["metadata"] = columns
    few = {"num_steps": 30, "batch_size": 8}
    for judge in raw["features"].values():
        judge |= {"channels": 8, "feature_dim": 16, "training": few}
    raw["features"]["image-text"]["training"] = {"num_steps": 150, "batch_size": 32}
    training = {"num_steps": 8, "batch_size": 8}
    raw["tokenizers"]["vqgan"] |= {"channels": 16, "num_blocks": 1, "discriminator_start_step": 4, "training": training}
    prior = raw["systems"]["vqgan-flow"]["prior"]
    prior |= {"denoiser": {"kind": "transformer", "width": 32, "depth": 1, "heads": 2}, "training": training}
    prior["condition"] |= {"max_bytes": 24}
    attributes = {
        "kind": "attributes",
        "numbers": {"place": [0, 7]},
        "categories": {"colour": list(COLOURS)},
    }
    of_attributes = {**raw["systems"]["vqgan-flow"], "prior": {**prior, "condition": attributes}}
    of_vectors = {**of_attributes, "prior": {**prior, "condition": {"kind": "embedding", "embedding_dim": 3}}}
    gray = {"kind": "image", "shows": "gray", "pixels": [8, 8], "patch_size": 4, "width": 16}
    of_pictures = {**of_attributes, "prior": {**prior, "condition": gray}}
    words = raw["systems"]["vqgan-flow"]
    raw["systems"] = {"words": words, "attributes": of_attributes, "vectors": of_vectors, "pictures": of_pictures}
    plain = {
        "kind": "gan",
        "channels": 8,
        "training": training,
        "condition": {"kind": "caption", "max_bytes": 24, "width": 16},
    }
    raw["systems"]["adversarial"] = {**words, "prior": plain, "sampling": {}}
    raw["encode_tokens"] |= {"warps": 0}
    raw["sample_images"] = {"num_images": 20, "batch_size": 8}
    return parse(Pipeline, raw)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Pipeline]:
    """A folder with the artifacts of every stage."""
    root = tmp_path_factory.mktemp("words")
    params = params_of(shapes(root / "source"))
    stages = Stages(params, root)
    stages.tokenize("vqgan")
    stages.run("evaluate_real")
    for name in params.systems:
        stages.run(f"train_prior@{name}", f"sample_images@{name}", f"evaluate@{name}")
    return root, params


def test_samples_are_told_what_images_were_and_shown_with_it(made: tuple[Path, Pipeline]) -> None:
    root, params = made
    told = {name: examples_of(root / "data/samples" / name) for name in params.systems}
    assert [one.group == "seen" for one in told["words"]] == [True, False] * 10
    assert told["adversarial"] == told["words"]  # whatever the prior
    new = {one.caption for one in told["words"] if one.group == "new_words"}
    assert {one.caption for one in told["words"] if one.group == "held_out"} == {"a red bar", "a blue column"}
    assert new == {"ein square", "ein bar", "ein column"}
    assert all(set(one.attributes) == {"place", "colour"} for one in told["attributes"])
    assert {one.attributes["place"] for one in told["attributes"]} >= {None, 7.0}
    vectors = np.stack([one.vector for one in told["vectors"]])
    labels = np.load(next((root / "data/samples/vectors").glob("labels-*.npy")))
    assert labels.tolist() == [one.label for one in told["vectors"]] and vectors.shape == (20, 3)
    kept = {tuple(np.float32(value) / np.float32(255) for value in colour) for colour in COLOURS.values()}
    assert np.isnan(vectors).any() and {tuple(row) for row in vectors if not np.isnan(row).any()} <= kept
    gray = np.stack([one.vector for one in told["pictures"]])
    assert (
        gray.shape == (20, 64) and (np.abs(gray) <= 1).all() and (np.abs(gray - 1) < 1e-6).any(axis=1).all()
    )  # white ground
    height = {name: Image.open(root / f"data/pictures/samples/{name}.png").height for name in params.systems}
    rows = {name: (height[name] - 3) // (3 * 16 + 3) for name in ("vectors", "pictures")}
    assert rows == {"vectors": 3, "pictures": 4}  # one for each class; two of ten, each below what it was told
    assert min(height["words"], height["attributes"]) > 2 * 112  # two rows of images with words below


def test_the_judge_of_words_is_asked_of_samples_and_of_real_images_alike(made: tuple[Path, Pipeline]) -> None:
    root, _ = made
    found = {
        name: figures.read(root / f"data/metrics/systems/{name}.json")
        for name in ("real", "words", "attributes", "adversarial")
    }
    of_words = {key for key in found["words"].groups["generation"] if "caption" in key}
    whats, groups = ("at_1", "at_10", "rank"), ("seen", "held_out", "new_words")
    expected = {f"{prefix}caption_{what}_{of}" for prefix in ("", "shuffled_") for what in whats for of in groups}
    assert of_words == {key for key in found["adversarial"].groups["generation"] if "caption" in key}
    assert of_words == expected == {key for key in found["real"].groups["generation"] if "caption" in key}
    assert not any("caption" in key for key in found["attributes"].groups["generation"])
    real = found["real"].groups["generation"]
    assert real["caption_at_1_seen"].value > real["shuffled_caption_at_1_seen"].value + 0.2


def test_systems_with_and_without_words_stand_in_one_table(made: tuple[Path, Pipeline], tmp_path: Path) -> None:
    root, params = made
    for name in params.tokenizers:
        path = root / "data/metrics/tokenizers" / f"{name}.json"
        path.parent.mkdir(exist_ok=True)
        path.write_text((root / "data/metrics/systems/real.json").read_text())
    pictures, out = root / "data/pictures", tmp_path / "comparison"
    compare_systems.run(params, root / "data/metrics", pictures, out, Job("compare", tmp_path / "s"))
    assert "caption_at_10_seen" in (tmp_path / "comparison/comparison.md").read_text()

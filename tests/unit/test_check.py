"""What cannot work on the images at hand is told before anything is trained, with what to write."""

import copy
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image

from stages import prepare_images
from tessera import params as all_params
from tessera.check import __main__ as command
from tessera.check import estimate, images, problems, readable
from tessera.contracts import ImageSpec
from tessera.sources.records import Record, Source

ROOT = Path(__file__).parents[2]
GOOD = yaml.safe_load((ROOT / "params.yaml").read_text())
DIGITS = ImageSpec(
    name="digits", channels=1, height=8, width=8, num_classes=10, class_names=tuple("0123456789"), licence="none"
)


def written(folder: Path, changes: dict) -> Path:
    """The default params with these values at dotted keys."""
    params = copy.deepcopy(GOOD)
    for key, value in changes.items():
        *above, last = key.split(".")
        inner = params
        for step in above:
            inner = inner[step]
        inner[last] = value
    path = folder / "params.yaml"
    path.write_text(yaml.safe_dump(params, sort_keys=False))
    return path


def found(folder: Path, changes: dict | None = None, num_train: int = 1400, num_test: int = 359, spec=DIGITS) -> list:
    params = all_params.read(written(folder, changes or {}))
    labels = {"train": np.arange(num_train) % spec.num_classes, "test": np.arange(num_test) % spec.num_classes}
    return problems.problems(params, images.planned(params, spec, labels))


def test_the_default_params_fit_their_images(tmp_path):
    assert found(tmp_path) == []


def test_guidance_away_from_what_is_never_learnt_is_remarked(tmp_path):
    def told(changes):
        params = all_params.read(written(tmp_path, changes))
        labels = {"train": np.arange(1400) % 10, "test": np.arange(359) % 10}
        return problems.remarks(params, images.planned(params, DIGITS, labels))

    never = {"systems.vqgan-flow.prior.label_dropout": 0}
    (remark,) = told(never)
    assert "systems.vqgan-flow.sampling: guidance_scale 1.4 leads away from a prior that is told nothing" in remark
    assert told({}) == told(never | {"systems.vqgan-flow.sampling.guidance_scale": 1}) == []


def test_compiling_needs_a_compiler(tmp_path, monkeypatch):
    monkeypatch.setenv("CXX", "/no/such/compiler")
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    (told,) = found(tmp_path, {"systems.vqgan-flow.prior.training.compile": True})
    assert "systems.vqgan-flow.prior: training.compile: true, but this machine has no C++ compiler" in told
    assert found(tmp_path, {"systems.vqgan-flow.prior.training.by_speed": ["compile"]}) == []


TRAINING = {"num_steps": 3, "batch_size": 6, "gradient_accumulation": 4}
LPIPS = {"kind": "lpips", "weights": "no.safetensors", "sha256": "0" * 64}
PERCEPTUAL = {"kind": "features", "network": "other_net", "weights": "no.safetensors", "sha256": "0" * 64}
UNET = {"kind": "unet", "channels": 64, "channel_multipliers": [1, 1, 1, 1], "num_blocks": 1}
MISTAKES = [
    ("evaluate.metrics.precision-recall.neighbors", 359, "no neighbour number 359.*write neighbors: 358"),
    (
        "evaluate.metrics.precision-recall.density_neighbors",
        359,
        "no neighbour number 359.*write density_neighbors: 358",
    ),
    ("evaluate.metrics.lpips", LPIPS, "images of 8 pixels are too small for LPIPS"),
    ("evaluate.metrics.lpips", LPIPS, "no.safetensors does not exist"),
    ("tokenizers.vqgan.perceptual", PERCEPTUAL, "no.safetensors does not exist"),
    (
        "tokenizers.vqgan.perceptual",
        PERCEPTUAL,
        "perceptual: timm .* has no network other_net.*correct perceptual.network",
    ),
    ("tokenizers.vqgan.perceptual", {"kind": "features", "layers": [0, 7]}, "perceptual: layers: .*none of number 7"),
    ("sample_images.num_images", 1401, "sample_images.num_images: 1401 is too many: .*at most 1400"),
    ("reference_stats.max_features", 300, "write at least 359"),
    ("edits.super-resolution.factor", 3, "edits.super-resolution: images of 8x8 are not divisible by factor 3"),
    ("edits.restyle.target", 10, "target is 10, but there are 10 classes: write 0 to 9"),
    ("systems.vqgan-flow.prior.denoiser", UNET, "systems.vqgan-flow.prior: .*not divisible by the denoiser's"),
    ("systems.vqgan-flow.prior.num_views", 17, "num_views 17 is more than the 16 .*write num_views: 16"),
    (
        "tokenizers.vqgan.discriminator_start_step",
        420,
        "discriminator_start_step 420 is not below the 420 steps of training.num_steps",
    ),
    (
        "systems.vqgan-flow.sampling.autoguidance_scale",
        2.0,
        r"scale is 2, but the prior keeps no guide .*: write guide: {snapshot_at: 0.25} in systems.vqgan-flow.prior",
    ),
    (
        "systems.vqgan-flow.prior.training",
        {"num_steps": 3, "precision": "bf16", "by_speed": ["precision"]},
        "training.precision is bf16, and by_speed would choose it: leave it out of one",
    ),
    ("systems.vqgan-flow.prior.training", TRAINING, "batch_size 6 is not divisible by gradient_accumulation 4"),
    ("tokenizers.vqgan.training", TRAINING, "tokenizers.vqgan: training.batch_size 6"),
]


@pytest.mark.parametrize(("key", "value", "sentence"), MISTAKES, ids=[f"{key}-{end}" for key, _, end in MISTAKES])
def test_each_mistake_is_one_sentence_that_names_its_key(tmp_path, key, value, sentence):
    told = [one for one in found(tmp_path, {key: value}) if re.search(sentence, one)]
    assert len(told) == 1
    assert told[0].startswith(key.rpartition(".")[0])


def test_few_images_are_told_by_every_metric_that_they_do_not_suffice_for(tmp_path):
    told = " ".join(found(tmp_path, num_train=10, num_test=1))
    assert "1 image in the test split has no covariance" in told
    assert "evaluate.metrics.kernel: no class has two of the 1 test images" in told
    assert "cannot be halved with equal classes (0 in each half)" in told


def test_networks_of_photographs_are_refused_for_other_channels_before_anything_is_trained(tmp_path):
    spec = DIGITS.model_copy(update={"channels": 5, "height": 32, "width": 32})
    of_lpips = {"perceptual": "lpips", "lpips_weights": str(tmp_path / "params.yaml"), "lpips_sha256": "0" * 64}
    changes = {f"tokenizers.vqgan.{key}": value for key, value in of_lpips.items()}
    changes |= {"evaluate.metrics.lpips": LPIPS, "features.timm": {"kind": "timm"}}
    told = "\n".join(found(tmp_path, changes, spec=spec))
    assert re.search(
        r"^tokenizers.vqgan: images of 5 channels do not fit perceptual: lpips, .*: write perceptual: laplacian$",
        told,
        re.M,
    )
    assert re.search(
        r"^evaluate.metrics.lpips: images of 5 channels do not fit LPIPS, .*: take the entry of kind lpips out$",
        told,
        re.M,
    )
    assert re.search(
        r"^features.timm: images of 5 channels do not fit a network of timm, .*: use features of kind", told, re.M
    )
    assert not re.search("channels", "\n".join(found(tmp_path, changes, spec=spec.model_copy(update={"channels": 3}))))
    assert found(tmp_path, spec=spec) == []


def test_a_classifier_without_labels_is_refused_before_it_is_trained(tmp_path):
    unlabeled = DIGITS.model_copy(update={"num_classes": 1, "class_names": ("unlabeled",)})
    assert any("features.classifier: " in one and "kind timm" in one for one in found(tmp_path, spec=unlabeled))


def test_inception_score_of_more_parts_than_samples_is_refused_where_it_would_be_measured(tmp_path):
    changes = {
        "features.inception": {"kind": "inception", "weights": "no.safetensors", "sha256": "0" * 64},
        "evaluate.metrics.inception-score.num_splits": 2000,
    }
    colored = DIGITS.model_copy(update={"channels": 3})
    assert any("write num_splits: 1000" in one for one in found(tmp_path, changes, spec=colored))
    assert not any("num_splits" in one for one in found(tmp_path, changes))


def photographs(folder: Path, number: int) -> dict:
    random = np.random.default_rng(0)
    folder.mkdir()
    for name in range(number):
        Image.fromarray(random.integers(0, 256, (9, 12, 3), np.uint8)).save(folder / f"{name:03d}.jpg")
    source = {"kind": "image_folder", "source": str(folder), "name": "tiny", "height": 8, "width": 8}
    return {"dataset": source | {"labels": "none"}, "features": {"random": {"kind": "random"}}}


def test_prepare_images_refuses_what_a_later_stage_would_and_leaves_nothing(tmp_path, job):
    params = all_params.read(written(tmp_path, photographs(tmp_path / "raw", 60)))
    with pytest.raises(ValueError, match="sample_images.num_images: 1000 is too many"):
        prepare_images.run(params, tmp_path / "images", job)
    assert not (tmp_path / "images").exists()


def test_the_command_says_each_problem_and_exits_with_2_or_that_all_is_well(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    changes = photographs(tmp_path / "raw", 60)
    assert command.main(["--params", str(written(tmp_path, changes))]) == 2
    told = capsys.readouterr().err.splitlines()
    assert len(told) == 2 and any(one.startswith("sample_images.num_images: ") for one in told), told
    changes |= {"sample_images.num_images": 20, "evaluate.metrics": {"frechet": {"kind": "frechet"}}}
    assert command.main(["--params", str(written(tmp_path, changes))]) == 0
    assert capsys.readouterr().out.startswith("all is well: ")


def with_pictures(folder: Path, metadata: dict, number: int = 30) -> dict:
    """The mask of 3.jpg is masks/3.png, in colors."""
    changes, rows = photographs(folder, number), []
    (folder / "masks").mkdir()
    for name in range(number):
        Image.new("RGB", (12, 9), (name, 0, 0)).save(folder / f"masks/{name:03d}.png")
        paths = {
            "whole": f"masks/{name:03d}.png",
            "below": f"{name:03d}.png",
            "absolute": f"{folder}/masks/{name:03d}.png",
        }
        rows.append({"file_name": f"{name:03d}.jpg", "text": f"a red thing, {name}", **paths})
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    changes |= {"sample_images.num_images": 20, "evaluate.metrics": {"frechet": {"kind": "frechet"}}}
    return changes | {"dataset": changes["dataset"] | {"metadata": metadata}}


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(
    ("column", "reason"),
    [
        (
            "whole",
            r"'001.jpg' has the picture 'masks/001.png', which is in Pillow's mode RGB .* metadata.picture_channels: 3",
        ),
        ("below", r"'000.jpg' has the picture '000.png', which is not there"),
        ("absolute", r"'000.jpg' has the picture '.*/masks/000.png', which is not there"),
        ("text", r"'000.jpg' has the picture 'a red thing, 0', which is not there"),
        (None, r"'000.jpg' Pillow cannot identify it"),
    ],
)
def test_where_no_file_gives_an_image_the_command_tells_their_reasons(tmp_path, capsys, monkeypatch, column, reason):
    monkeypatch.chdir(tmp_path)
    changes = with_pictures(tmp_path / "raw", {"picture": column} if column else {"captions": ["text"]})
    for path in [] if column else (tmp_path / "raw").glob("*.jpg"):
        path.write_bytes(path.read_bytes()[20:])
    assert command.main(["--params", str(written(tmp_path, changes))]) == 2
    (told,) = capsys.readouterr().err.splitlines()
    number = "29 of the first 30 files" if column == "whole" else "none of its files"  # the first mask is black
    assert re.search(rf"raw: {number} give[s]? (an|no) image, expected .*: {reason}", told), told


def test_few_files_are_read_and_what_prepare_images_may_bear_is_not_refused(monkeypatch):
    config = type("Config", (), {"source": "raw", "max_unreadable_fraction": 0.1})
    monkeypatch.setattr(readable, "ENOUGH", 2)
    bad, good = Record("train", 0, "1.png", "a", None, "is cut"), Record("train", 0, "2.png", "a", np.zeros((1, 1, 1)))
    of_rule = bad._replace(ignored=True, reason="is hidden")
    missing = bad._replace(sha256="", reason="is missing")  # by its name alone
    monkeypatch.setattr(readable, "MOST_TRIED", 3)

    def asked(records: list[Record], num_named: int) -> int:
        """How many were read."""
        given = iter(records)
        readable.require_some(Source(DIGITS, "", lambda first: given, lambda labels: None), config, num_named)
        return len(records) - len(list(given))

    assert asked([of_rule, bad, good, good, bad], 10) == 4 and asked([of_rule] * 4, 0) == 4
    assert asked([bad] * 9, 30) == 3 and asked([missing] * 4 + [good] * 3, 36) == 6
    with pytest.raises(
        ValueError, match="raw: 3 of the first 3 files give no image, expected some: '1.png' is cut. Mend"
    ):
        asked([bad] * 9, 29)
    with pytest.raises(
        ValueError, match="raw: 4 of the first 6 files .* at most a fraction of 0.1: '1.png' is missing."
    ):
        asked([missing] * 4 + [good] * 3, 35)
    config.max_unreadable_fraction = 1.0
    with pytest.raises(ValueError, match="raw: none of its files gives an image, expected some: '1.png' is cut. Mend"):
        asked([of_rule, bad], 1000)
    assert asked([bad, good], 2) == 2


def test_a_split_without_images_is_told_before_they_are_prepared(tmp_path):
    changes = photographs(tmp_path / "raw", 60)
    params = all_params.read(written(tmp_path, changes | {"dataset": changes["dataset"] | {"test_fraction": 1e-9}}))
    with pytest.raises(ValueError, match="has 60 images, none of them for the test split"):
        images.of_source(params)


CONDITIONS = {
    "captions": ({"kind": "caption"}, {"captions": ["text"]}, "the images have no captions"),
    "attributes": (
        {"kind": "attributes", "numbers": {"size": [1, 2]}},
        {"attributes": ["size"]},
        "'size' is said of no image, expected attributes among none",
    ),
    "embedding": ({"kind": "embedding", "embedding_dim": 3}, {"embedding": "clip"}, "the images have no vectors"),
    "picture": (
        {"kind": "image", "shows": "file", "pixels": [8, 8]},
        {"picture": "mask"},
        "the images have no pictures in files",
    ),
    "colors": (
        {"kind": "image", "shows": "file", "channels": 3, "pixels": [8, 8]},
        {"picture": "mask", "picture_channels": 3},
        "its pictures have channels 3, but those in files have 1",
    ),
}


@pytest.mark.parametrize("name", CONDITIONS)
def test_what_metadata_are_not_asked_for_no_condition_can_tell_and_that_is_known_by_params_alone(tmp_path, name):
    condition, wanted, sentence = CONDITIONS[name]
    others = {"picture": "mask"} if name == "colors" else {"label": "kind"}
    told = []
    for metadata in (wanted, others):
        dataset = {"kind": "image_folder", "source": "x", "height": 8, "width": 8, "metadata": metadata}
        changes = {"dataset": dataset, "systems.vqgan-flow.prior.condition": condition}
        told.append([one for one in found(tmp_path, changes, spec=DIGITS) if "prior.condition: " in one])
    assert told[0] == [] and len(told[1]) == 1 and f"prior.condition: {sentence}" in told[1][0], told


def test_every_training_asks_again_and_what_it_writes_can_be_read_as_the_umask_says(tmp_path, images_folder):
    """safetensors alone would keep weights from everybody but their owner."""

    def ran(changes: dict) -> subprocess.CompletedProcess:
        written(tmp_path, changes | {"features": {"random": {"kind": "random"}}})
        command = [sys.executable, "-m", "tessera.running", "train_features", "random", "--images", images_folder]
        options = ["--out", "out/features", "--history", "out/curve.csv", "--metrics", "out/metrics.json"]
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "TESSERA_TRACKING": "off"}
        return subprocess.run(
            [*command, *options], cwd=tmp_path, env=environment, umask=0o027, capture_output=True, text=True
        )

    refused = ran({})
    assert refused.returncode == 2 and "at most 48" in refused.stderr and not (tmp_path / "out").exists()
    done = ran({"sample_images.num_images": 40})
    assert done.returncode == 0, done.stderr
    modes = {path.name: oct(path.stat().st_mode & 0o777) for path in (tmp_path / "out/features").iterdir()}
    assert modes == dict.fromkeys(("weights.safetensors", "config.json", "manifest.json"), "0o640")


def test_an_estimate_times_every_training_and_adds_up(tmp_path):
    guided = {"prior.guide": {"snapshot_at": 0.5}, "sampling.autoguidance_scale": 2.0}
    changes = {f"systems.vqgan-flow.{key}": value for key, value in guided.items()}
    params = all_params.read(written(tmp_path, changes))
    labels = {"train": np.arange(100) % 10, "test": np.arange(50) % 10}
    told = estimate.of_run(params, images.planned(params, DIGITS, labels), seconds=0.1)
    entries = ["train_features@classifier", "train_tokenizer@vqvae", "train_tokenizer@vqgan"]
    assert [one.entry for one in told.trainings] == entries + [f"train_prior@{name}" for name in params.systems]
    assert all(one.seconds_per_step > 0 for one in told.trainings)
    assert told.minutes == pytest.approx(sum(one.minutes for one in told.trainings) + told.other_minutes)
    assert told.memory_bytes > 2**20


def test_counts_come_from_an_images_artifact_unless_it_is_damaged(images_folder, tmp_path):
    params = all_params.read(written(tmp_path, {}))
    known = images.of_artifact(params, images_folder)
    assert (len(known.labels["train"]), len(known.labels["test"]), known.spec.height) == (48, 24, 16)
    assert images.of_artifact(params, tmp_path / "nothing") is None

"""Faults that are planted into samples and tokenizers, and what the figures say of each: on the digits, by the stages."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from stages import (
    compare_systems,
    encode_tokens,
    evaluate,
    evaluate_tokenizer,
    prepare_images,
    reference_stats,
    train_features,
    train_tokenizer,
    write_report,
)
from tessera.artifacts import checkpoints, pictures
from tessera.artifacts import folder as artifact
from tessera.artifacts import images as image_artifact
from tessera.artifacts.folder import ArtifactError
from tessera.artifacts.images import to_float, to_uint8
from tessera.artifacts.samples import floor_rows
from tessera.artifacts.shards import ShardWriter
from tessera.components import parse
from tessera.evaluation import comparison, figures, panel, trial
from tessera.evaluation import curves as training_curves
from tessera.evaluation.reference import Reference
from tessera.params import Pipeline
from tessera.running.job import Job

ROOT = Path(__file__).parents[2]
NUM_IMAGES = 600
DRAWN = {"seed": 0, "sampling": {}, "weights": "ema", "prior_fingerprint": "", "tokenizer_fingerprint": ""}
GOOD_STEPS, POOR_STEPS = 250, 50


def pipeline(**metrics) -> Pipeline:
    """The default params, smaller, with these entries of evaluate.metrics changed."""
    values = yaml.safe_load((ROOT / "params.yaml").read_text())
    values["dataset"]["source"] = str(ROOT / "requirements.lock")
    values["features"]["classifier"]["training"] |= {"num_steps": 150}
    small = {"channels": 24, "num_blocks": 1}
    values["tokenizers"] = {
        name: {**values["tokenizers"]["vqvae"], **small, "training": {"num_steps": steps, "batch_size": 32}}
        for name, steps in (("good", GOOD_STEPS), ("poor", POOR_STEPS))
    }
    values["encode_tokens"]["warps"] = 0
    system = values["systems"]["vqvae-autoregressive"]
    values["systems"] = {name: {**system, "tokenizer": "good"} for name in ("one", "two")}
    values["sample_images"]["num_images"] = NUM_IMAGES
    values["evaluate"]["metrics"] |= metrics
    return parse(Pipeline, values)


class Place:
    """A folder with everything that samples are judged by."""

    def __init__(self, folder: Path):
        self.folder, self.params = folder, pipeline()
        self.spec, self.splits = None, None

    def job(self, name: str) -> Job:
        return Job(name, self.folder / "state" / name)

    def prepare(self) -> None:
        prepare_images.run(self.params, out=self.folder / "images", job=self.job("prepare_images"))
        self.spec, self.splits = image_artifact.read(self.folder / "images")
        train_features.run(
            self.params,
            "classifier",
            images=self.folder / "images",
            out=self.folder / "features" / "classifier",
            history=self.folder / "curves" / "features" / "classifier.csv",
            metrics=self.folder / "metrics" / "features" / "classifier.json",
            job=self.job("train_features"),
        )
        reference_stats.run(
            self.params,
            "classifier",
            images=self.folder / "images",
            features=self.folder / "features" / "classifier",
            out=self.folder / "reference" / "classifier",
            job=self.job("reference_stats"),
        )
        for name in self.params.tokenizers:
            self.make_tokenizer(name)
        evaluate.run(
            self.params, "real", metrics=self.metrics("real"), job=self.job("evaluate_real"), **self.judged_by()
        )

    def judged_by(self) -> dict[str, Path]:
        return {name: self.folder / name for name in ("images", "features", "reference")}

    def metrics(self, name: str) -> Path:
        return self.folder / "metrics" / "systems" / f"{name}.json"

    def make_tokenizer(self, name: str) -> None:
        tokenizer, tokens = self.folder / "tokenizers" / name, self.folder / "tokens" / name
        history = self.folder / "curves" / "tokenizers" / f"{name}.csv"
        train_tokenizer.run(self.params, name, self.folder / "images", tokenizer, history, self.job(name))
        encode_tokens.run(self.params, name, self.folder / "images", tokenizer, tokens, self.job(name))
        evaluate_tokenizer.run(
            self.params,
            name,
            **self.judged_by(),
            tokenizer=tokenizer,
            tokens=tokens,
            picture=self.folder / "pictures" / "reconstructions" / f"{name}.png",
            codebook_uses=self.folder / "curves" / "codebooks" / f"{name}.csv",
            metrics=self.folder / "metrics" / "tokenizers" / f"{name}.json",
            job=self.job(name),
        )

    def judge(self, name: str, pixels: np.ndarray, labels: np.ndarray, tokenizer: str = "good") -> figures.Measured:
        """The figures of these images, as if a system had drawn them."""
        samples = self.folder / "samples" / name
        with artifact.create(samples) as place:
            with ShardWriter(place, "images") as images, ShardWriter(place, "labels") as numbers:
                images.append(pixels)
                numbers.append(labels)
            artifact.write_json(place / "meta.json", DRAWN | {"num_images": len(pixels)})
        evaluate.run(
            self.params,
            name,
            **self.judged_by(),
            samples=samples,
            tokenizer_metrics=self.folder / "metrics" / "tokenizers" / f"{tokenizer}.json",
            neighbors=self.folder / "pictures" / "neighbors" / f"{name}.png",
            metrics=self.metrics(name),
            job=self.job(name),
        )
        return figures.read(self.metrics(name))

    def rows(self, seed: int = 5) -> np.ndarray:
        """Training images other than those of the floors, with their class shares."""
        return floor_rows(self.splits["train"].labels, self.spec.num_classes, NUM_IMAGES, seed)

    def train(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return self.splits["train"].uint8(rows).numpy(), self.splits["train"].labels[rows]

    @torch.no_grad()
    def decoded(self, name: str, rows: np.ndarray) -> np.ndarray:
        """What a perfect prior on the tokens of a tokenizer would draw: training images through it."""
        model, _, _ = checkpoints.load_model(self.folder / "tokenizers" / name, "tokenizers")
        return to_uint8(model.decode(model.encode(to_float(self.splits["train"].uint8(rows))).latents)).numpy()


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Place:
    made = Place(tmp_path_factory.mktemp("evaluation"))
    made.prepare()
    return made


@pytest.fixture(scope="module")
def honest(place) -> figures.Measured:
    """Training images through a good tokenizer."""
    rows = place.rows()
    return place.judge("honest", place.decoded("good", rows), place.train(rows)[1])


def value(measured: figures.Measured, name: str) -> float:
    return measured.figure(name).value


def test_every_figure_has_a_protocol_and_a_number_of_images(place, honest):
    found = {**honest.groups["generation"], **honest.groups["reconstruction"], **honest.groups["codebook"]}
    assert {"fd_classifier", "kd_classifier", "precision", "recall", "density", "coverage", "copy_rate"} <= set(found)
    assert {"label_agreement", "gap_fd_classifier", "rfd_classifier", "pfd_classifier", "floor_fd_classifier"} <= set(
        found
    )
    protocol = honest.protocol("fd_classifier")
    assert (protocol.num_images, protocol.num_reference_images, protocol.reference_split) == (NUM_IMAGES, 359, "test")
    assert protocol.network_sha256 == artifact.sha256(place.folder / "features/classifier/weights.safetensors")
    assert protocol.reference_sha256 == artifact.part_sha256(place.folder / "images", "test")
    assert honest.drawn["weights"] == "ema"
    for name in ("fd_classifier", "precision", "recall", "label_agreement", "psnr_db", "floor_fd_classifier"):
        assert honest.figure(name).standard_error > 0, name


def test_reference_statistics_are_the_mean_and_covariance_of_the_features_in_the_layout_others_read(place):
    reference = Reference(place.folder / "reference" / "classifier")
    for split, number in (("train", 1438), ("test", 359)):
        features = reference.features(split)
        assert len(features) == number
        with np.load(place.folder / "reference" / "classifier" / f"{split}.npz") as file:  # as pytorch-fid does
            np.testing.assert_allclose(file["mu"], features.mean(axis=0), rtol=1e-10)
            np.testing.assert_allclose(file["sigma"], np.cov(features.T), rtol=1e-8, atol=1e-12)
            assert file["mu"].dtype == file["sigma"].dtype == np.float64


def test_training_images_given_as_samples_are_called_copies(place, honest, capsys):
    found = place.judge("copies", *place.train(place.rows()))
    assert value(found, "copy_rate") > 0.99
    assert "ALARM: 100% of the samples lie nearer to a training image" in capsys.readouterr().out
    assert (place.folder / "pictures/neighbors/copies.png").stat().st_size > 1000


def test_new_real_images_are_no_copies(place, capsys):
    test = place.splits["test"]
    rows = np.resize(np.arange(len(test)), NUM_IMAGES)  # some of them twice
    found = place.judge("new", test.uint8(rows).numpy(), test.labels[rows])
    assert value(found, "copy_rate") == pytest.approx(0.05, abs=0.02)
    assert "ALARM" not in capsys.readouterr().out


def test_missing_classes_lower_recall_and_coverage_but_not_precision(place, honest):
    labels = place.splits["train"].labels
    rows = np.flatnonzero(labels < 5)[:NUM_IMAGES]
    found = place.judge("half", place.decoded("good", rows), labels[rows])
    assert value(found, "recall") < 0.7 * value(honest, "recall")
    assert value(found, "coverage") < 0.7 * value(honest, "coverage")
    assert value(found, "precision") > 0.9 * value(honest, "precision")
    assert value(found, "fd_classifier") > 5 * value(honest, "fd_classifier")


def test_shuffled_labels_lower_the_agreement_to_chance_and_nothing_else(place, honest):
    rows = place.rows()
    labels = np.random.default_rng(0).permutation(place.train(rows)[1])
    found = place.judge("shuffled", place.decoded("good", rows), labels)
    assert value(honest, "label_agreement") > 0.95
    assert value(found, "label_agreement") == pytest.approx(0.1, abs=0.05)
    assert value(found, "fd_classifier") == pytest.approx(value(honest, "fd_classifier"), rel=1e-6)


def test_one_gray_level_too_bright_is_seen_in_reconstructions_and_in_samples(place, honest):
    rows = place.rows()
    pixels = place.decoded("good", rows)
    brighter = place.judge("brighter", np.minimum(pixels, 254) + 1, place.train(rows)[1])
    shift = value(brighter, "brightness_shift") - value(honest, "brightness_shift")
    assert shift == pytest.approx(1, abs=0.05)  # saturated pixels stay
    paired = honest.figure("reconstruction_brightness_shift")
    assert paired.standard_error < 0.2  # so that one level stands out


def test_fewer_samples_than_asked_for_are_an_error(place):
    pixels, labels = place.train(place.rows()[:-1])
    with pytest.raises(ArtifactError, match="holds 599 images, expected the 600 of sample_images.num_images"):
        place.judge("few", pixels, labels)


def test_settings_of_the_kernel_metric_that_mean_nothing_any_more_are_told_and_decide_nothing(
    place, monkeypatch, capsys
):
    images = place.train(place.rows())
    found = place.judge("now", *images)
    assert "note:" not in capsys.readouterr().out
    monkeypatch.setattr(place, "params", pipeline(kernel={"kind": "kernel", "subset": 400, "num_subsets": 20}))
    assert place.judge("before", *images) == found
    assert "note: subset and num_subsets of the kernel metric no longer mean anything" in capsys.readouterr().out


def test_the_kernel_distance_of_real_images_is_0_within_its_error(place):
    """600 training images and 359 test images of digits, whose classes have fixed shares in both."""
    found = figures.read(place.metrics("real")).figure("kd_classifier")
    assert abs(found.value) < 2 * found.standard_error < 0.02


def test_lpips_of_images_that_its_network_cannot_halve_is_refused_in_a_sentence(place, monkeypatch):
    lpips = {"kind": "lpips", "weights": "vgg.safetensors", "sha256": "0" * 64}
    monkeypatch.setattr(place, "params", pipeline(lpips=lpips))
    with pytest.raises(ValueError, match="images of 8 pixels are too small for LPIPS.*at least 16"):
        place.make_tokenizer("poor")


def test_a_perfect_prior_has_no_gap_whatever_its_tokenizer(place):
    """Other training images than those of the floor, in the same class shares, through the tokenizer."""
    for name in ("good", "poor"):
        rows = place.rows()
        found = place.judge(f"perfect-{name}", place.decoded(name, rows), place.train(rows)[1], tokenizer=name)
        gap = found.figure("gap_fd_classifier")
        assert abs(gap.value) < 2 * gap.standard_error
        parts = comparison.bottleneck([found], [figures.read(place.metrics("real"))], "fd_classifier")
        assert gap.value == pytest.approx(parts.prior)
        assert found.protocol("gap_fd_classifier").settings == {"floor": NUM_IMAGES}


def test_a_poor_tokenizer_with_a_perfect_prior_is_named_the_bottleneck(place):
    rows = place.rows()
    found = place.judge("poor", place.decoded("poor", rows), place.train(rows)[1], tokenizer="poor")
    parts = comparison.bottleneck([found], [figures.read(place.metrics("real"))], "fd_classifier")
    assert parts.stage == "tokenizer"
    assert parts.tokenizer > 10 * abs(parts.prior)


def test_a_poor_prior_on_a_good_tokenizer_is_named_the_bottleneck(place):
    rows = place.rows()
    model, _, _ = checkpoints.load_model(place.folder / "tokenizers" / "good", "tokenizers")
    with torch.no_grad():
        indices = model.encode(to_float(place.splits["train"].uint8(rows))).indices.flatten(1)
        order = torch.rand(indices.shape, generator=torch.Generator().manual_seed(0)).argsort(dim=0)
        mixed = indices.gather(0, order).view(-1, *model.index_grid)  # each place keeps its own frequencies, alone
        pixels = to_uint8(model.decode_indices(mixed)).numpy()
    found = place.judge("mixed", pixels, place.train(rows)[1])
    parts = comparison.bottleneck([found], [figures.read(place.metrics("real"))], "fd_classifier")
    assert parts.stage == "prior"
    assert parts.prior > 10 * abs(parts.tokenizer)


def test_indices_that_are_a_little_wrong_cost_more_than_those_of_the_images(place):
    found = figures.read(place.folder / "metrics" / "tokenizers" / "good.json")
    perturbed, exact = found.figure("pfd_classifier"), found.figure("rfd_classifier")
    assert exact.value > 0
    assert perturbed.value > 1.2 * exact.value  # of the same images
    assert found.protocol("pfd_classifier").settings == {"share": 0.1, "neighbors": 8}


def test_a_probe_stands_beside_the_reconstructions_and_says_what_it_has_no_latents_for(place, tmp_path, monkeypatch):
    probe_alone = {"prior-probe": {"kind": "prior_probe", "probe_steps": 3}}
    params, said = pipeline(**probe_alone), []
    monkeypatch.setattr(Job, "say", lambda self, line: said.append(line))

    def measured(params: Pipeline) -> figures.Measured:
        artifacts = {name: place.folder / name / "poor" for name in ("tokenizers", "tokens")}
        own = {"picture": tmp_path / "p.png", "codebook_uses": tmp_path / "c.csv", "metrics": tmp_path / "m.json"}
        given = {**place.judged_by(), "tokenizer": artifacts["tokenizers"], "tokens": artifacts["tokens"], **own}
        evaluate_tokenizer.run(params, "poor", **given, job=place.job("probe"))
        return figures.read(tmp_path / "m.json")

    found, before = measured(params), figures.read(place.folder / "metrics" / "tokenizers" / "poor.json")
    assert 0 < value(found, "probe_loss") < 1.5 and value(found, "probe_bits_per_image") > 0
    assert found.protocol("probe_loss").settings["probe_steps"] == 3
    del found.groups["reconstruction"]["probe_loss"], found.groups["reconstruction"]["probe_bits_per_image"]
    assert found.groups == before.groups  # no other figure moves
    without = params.encode_tokens.model_copy(update={"store_latents": False})
    found = measured(params.model_copy(update={"encode_tokens": without}))
    assert found.figure("probe_loss") is None and found.figure("probe_bits_per_image")
    assert any("no probe_loss: it is of latents, and encode_tokens.store_latents is false" in line for line in said)


def test_halves_are_disjoint_and_alike_in_their_classes():
    labels = np.random.default_rng(0).integers(0, 5, 203)
    for at_most, expected in ((1000, sum(count // 2 for count in np.bincount(labels))), (40, 40)):
        first, second = panel.halves(labels, at_most, seed=0)
        assert len(first) == len(second) == len(set(first)) == expected
        assert not set(first) & set(second)
        assert np.array_equal(np.bincount(labels[first]), np.bincount(labels[second]))


@pytest.fixture(scope="module")
def two_systems(place) -> Place:
    """A good system and one that draws black images, judged."""
    rows = place.rows(6)
    place.judge("one", place.decoded("good", rows), place.train(rows)[1])
    place.judge("two", np.zeros((NUM_IMAGES, 1, 8, 8), np.uint8), place.train(rows)[1])
    return place


def test_the_report_shows_every_figure_and_picture_in_a_browser(two_systems, browser, tmp_path, monkeypatch):
    place = two_systems
    monkeypatch.setattr(trial, "sentences", lambda real: ["the judge of fd_x does not see garbage"])
    reference = training_curves.thinned(training_curves.read(place.folder / "curves"), place.params)
    reference.to_csv(tmp_path / "digits.csv", index=False)
    out = place.folder / "reports" / "report.html"
    for name in ("one", "two"):
        pictures.save_grid(place.folder / f"pictures/samples/{name}.png", np.zeros((100, 1, 8, 8), np.uint8), 10)
    write_report.run(
        place.params,
        metrics=place.folder / "metrics",
        pictures=place.folder / "pictures",
        curves=place.folder / "curves",
        priors=place.folder / "priors",
        reference_curves=tmp_path,
        out=out,
        job=place.job("write_report"),
    )
    page = browser.new_page()
    asked = []
    page.on("request", lambda request: asked.append(request.url))
    alone = tmp_path / "sent.html"  # nothing lies beside it
    alone.write_bytes(out.read_bytes())
    page.goto(alone.as_uri())
    images = page.eval_on_selector_all("img", "all => all.map(one => [one.alt, one.complete, one.naturalWidth])")
    names = [alt for alt, _, _ in images]
    assert all(complete and width > 50 for _, complete, width in images), images
    assert "Uses of the codes of good" in names
    assert "Samples of one and their nearest training images" in names
    assert {"Curves of train_features@classifier", "Curves of train_tokenizer@good"} <= set(names)
    assert all(url.startswith(("file:", "data:")) for url in asked)
    cells = page.eval_on_selector_all(
        "#table-systems tr[data-name] td[data-figure], #table-floors tr[data-name] td[data-figure]",
        "all => all.map(one => [one.parentElement.dataset.name, one.dataset.figure, one.dataset.value, one.textContent])",
    )
    shown = {(name, figure): (float(exact), text) for name, figure, exact, text in cells}
    for name in ("real", "one", "two"):
        measured = figures.read(place.metrics(name))
        for group in ("generation", "floor", "trial"):
            for key, figure in measured.groups.get(group, {}).items():
                exact, text = shown.pop((name, key))
                assert exact == figure.value
                rounding = max(figures.ROUNDING, 0.051 * (figure.standard_error or 0))  # two digits of the error
                assert float(text.split("±")[0]) == pytest.approx(figure.value, rel=1e-3, abs=rounding)
    assert not shown  # nothing that is not in the files
    page.set_viewport_size({"width": 1280, "height": 800})
    for seen in ("#table-main", "img[alt='Samples of two, small']"):  # on the first screen, whole
        box = page.locator(seen).bounding_box()
        assert box["y"] + box["height"] < 800 and box["x"] + box["width"] < 1280, seen
    assert page.get_by_text("UTC").is_visible()
    assert page.inner_text(".warning") == "the judge of fd_x does not see garbage"
    page.close()


def test_a_reference_curve_knows_whether_the_settings_were_the_same(place, tmp_path):
    runs = training_curves.read(place.folder / "curves")
    training_curves.thinned(runs, place.params).to_csv(tmp_path / "digits.csv", index=False)
    found = training_curves.reference_of(place.params, tmp_path)
    assert {stage: one.has_these_settings for stage, one in found.items()} == dict.fromkeys(runs, True)
    for stage, one in found.items():
        assert len(one.history) <= training_curves.ROWS
        assert one.history.step.iloc[-1] == runs[stage].step.iloc[-1]
    poor = place.params.tokenizers["poor"]
    others = {**place.params.tokenizers, "poor": poor.model_copy(update={"channels": 99})}
    changed = training_curves.reference_of(place.params.model_copy(update={"tokenizers": others}), tmp_path)
    assert [stage for stage, one in changed.items() if not one.has_these_settings] == ["train_tokenizer@poor"]
    assert training_curves.reference_of(place.params, tmp_path / "nowhere") == {}


def test_a_metric_is_one_file_and_an_entry_and_stands_in_the_figures_and_in_the_table(two_systems, tmp_path):
    """The worked example of docs/adding_parts.md, in a copy of the package: nothing else of it is touched."""
    place = two_systems
    text = (ROOT / "docs" / "adding_parts.md").read_text(encoding="utf-8")
    example = re.search(r"`tessera/metrics/nearest_distance\.py`:\n\n```python\n(.*?)```", text, re.DOTALL).group(1)
    for folder in ("tessera", "stages"):
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / "tessera" / "metrics" / "nearest_distance.py").write_text(example, encoding="utf-8")
    values = yaml.safe_load(json.dumps(place.params.model_dump(mode="json")))
    values["evaluate"]["metrics"]["nearest-distance"] = {"kind": "nearest_distance"}
    (tmp_path / "params.yaml").write_text(yaml.safe_dump(values, sort_keys=False))
    shutil.copytree(place.folder / "metrics", tmp_path / "metrics")
    places = [f"--{name}={path}" for name, path in place.judged_by().items()]

    def run(stage: str, *arguments: str) -> str:
        command = [sys.executable, "-m", "tessera.running", stage, *arguments]
        environment = {**os.environ, "PYTHONPATH": str(tmp_path), "TESSERA_TRACKING": "off"}
        ran = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert ran.returncode == 0, ran.stdout + ran.stderr
        return ran.stdout

    run("evaluate", "real", *places, "--metrics=metrics/systems/real.json")
    for name in ("one", "two"):
        beside = [f"--samples={place.folder}/samples/{name}", "--tokenizer-metrics=metrics/tokenizers/good.json"]
        run("evaluate", name, *places, *beside, "--neighbors=n.png", f"--metrics=metrics/systems/{name}.json")
        before, after = figures.read(place.metrics(name)), figures.read(tmp_path / f"metrics/systems/{name}.json")
        own = after.groups["generation"].pop("nearest_distance")
        assert own.standard_error > 0 and after.protocols[own.protocol].num_images == NUM_IMAGES
        assert after == before  # no other figure moves
    printed = run("compare_systems", "--metrics=metrics", "--pictures=pictures", "--out=comparison")
    header = next(line for line in printed.splitlines() if line.startswith("| system "))
    assert [cell.strip() for cell in header.split("|")][-2] == "nearest_distance"
    assert " ± " in next(line for line in printed.splitlines() if line.startswith("| one ")).split("|")[-2]


def test_the_table_names_floors_noise_and_bottlenecks_and_refuses_other_protocols(two_systems):
    place = two_systems

    def compare() -> str:
        job = place.job("compare_systems")
        compare_systems.run(place.params, place.folder / "metrics", Path("pictures"), place.folder / "comparison", job)
        return (place.folder / "comparison" / "comparison.md").read_text()

    text = compare()
    rows = [line for line in text.splitlines() if line.startswith("| ")]
    lines = {
        line.split("|")[1].strip(): line for line in reversed(rows)
    }  # of each name the first: the table of figures
    assert "±" in lines["one"]
    assert " prior " in lines["two"]
    assert "< two" in text  # beyond the noise
    assert "test images rightly" in text
    assert "does not see garbage" not in text  # the judge was tried, and is none of these
    real = figures.read(place.metrics("real"))
    near = real.groups["trial"]["blurred_fd_classifier"].model_copy(update={"value": 0.0})
    tried = {**real.groups["trial"], "blurred_fd_classifier": near}
    real.model_copy(update={"groups": {**real.groups, "trial": tried}}).write(place.metrics("real"))
    assert "- the judge of fd_classifier does not see garbage: blurred (0.0 times) has" in compare()
    real.write(place.metrics("real"))
    stored = figures.read(place.metrics("two"))
    other = stored.protocols["generation/fd_classifier"].model_copy(update={"num_images": 500})
    changed = {**stored.protocols, "generation/fd_classifier": other}
    stored.model_copy(update={"protocols": changed}).write(place.metrics("two"))
    with pytest.raises(comparison.MixedProtocols, match="num_images is 600 in real, 500 in two"):
        compare()

"""The guide that a prior keeps for autoguidance: the snapshot of its training, resumed, read, exported and refused."""

import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
import yaml
from test_warm_start import TRAINING, Trainer, params, stopping
from test_warm_start import weights_of as tensors

import tessera
from tessera import seeding
from tessera.artifacts import checkpoints, guides
from tessera.artifacts import folder as artifact
from tessera.artifacts.folder import ArtifactError
from tessera.check import images, problems
from tessera.components import load, parse, sampling_schema
from tessera.contracts import ImageSpec
from tessera.editing.label_evidence import label_log_probs
from tessera.export import __main__ as export
from tessera.export import onnx
from tessera.params import Pipeline
from tessera.running.job import Stopped
from tessera.system import System
from tessera.training import previews, warm_start

EVEN = TRAINING | {"final_learning_rate_fraction": 1.0}  # the rate of a step does not depend on how many there are
DOCS = Path(__file__).parents[2] / "docs"
SNAPSHOT = {"guide": {"snapshot_at": 0.5}}  # after three of the six steps
FLOW = {"kind": "flow_matching", "denoiser": {"kind": "transformer", "width": 16, "depth": 1, "heads": 2}}


def guided(kind: dict[str, Any] | None = None, sampling: dict[str, Any] | None = None, **others: Any) -> Pipeline:
    given = params(prior={"training": EVEN} | SNAPSHOT | others)
    system = given.systems["small"]
    if kind is not None:
        prior = parse(load("priors", kind["kind"]).Config, kind | {"training": EVEN} | SNAPSHOT | others)
        system = system.model_copy(update={"prior": prior})
    system = system.model_copy(update={"sampling": sampling or {}})
    return given.model_copy(update={"systems": {"small": system}})


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory, images_folder: Path) -> Trainer:
    """A tokenizer, its tokens, and a prior that was trained on them and kept a guide."""
    trainer = Trainer(tmp_path_factory.mktemp("source"), images_folder)
    trainer.train_tokenizer(params())
    trainer.encode(params())
    trainer.train_prior(guided())
    return trainer


@pytest.fixture
def trainer(source: Trainer, tmp_path: Path) -> Trainer:
    """A checkout whose prior is to be trained."""
    shutil.copytree(source.root / "data/tokenizers", tmp_path / "data/tokenizers")
    shutil.copytree(source.root / "data/tokens", tmp_path / "data/tokens")
    return Trainer(tmp_path, source.images)


def test_the_guide_is_what_a_training_that_ends_at_its_step_gives_and_the_weights_are_as_without_it(source, trainer):
    trainer.train_prior(params(prior={"training": EVEN | {"num_steps": 3}}))
    early = tensors(trainer.prior)
    trainer.train_prior(params(prior={"training": EVEN}))
    plain = tensors(trainer.prior)
    guide, weights = tensors(source.prior, guides.GUIDE), tensors(source.prior)
    assert guide.keys() == early.keys() and all(torch.equal(guide[name], early[name]) for name in guide)
    assert all(torch.equal(weights[name], plain[name]) for name in weights)
    assert not any(torch.equal(weights[name], guide[name]) for name in ("head.weight", "position"))
    assert not (trainer.prior / guides.GUIDE).exists()


@pytest.mark.parametrize("at", [2, 3, 4], ids=["before the snapshot", "at it", "after it"])
def test_a_training_that_is_killed_keeps_the_same_guide(source, trainer, at):
    with pytest.raises(Stopped):
        trainer.train_prior(guided(), stopping(trainer, "train_prior@small", after=at))
    trainer.train_prior(guided())
    assert f"resumed step {at}" in trainer.said
    assert artifact.fingerprint(trainer.prior) == artifact.fingerprint(source.prior)
    assert (trainer.root / "prior.csv").read_bytes() == (source.root / "prior.csv").read_bytes()


def test_a_training_whose_snapshot_is_damaged_does_not_go_on_without_it(trainer):
    with pytest.raises(Stopped):
        trainer.train_prior(guided(), stopping(trainer, "train_prior@small", after=4))
    (kept,) = trainer.root.glob(f".state/train_prior@small/*/guide/{guides.GUIDE}")
    kept.write_bytes(kept.read_bytes()[:-1] + b"\1")
    with pytest.raises(ValueError, match="resume at step 4, but its snapshot of step 3 is not whole .*: remove .*anew"):
        trainer.train_prior(guided())


def test_a_validation_goes_on_beside_the_snapshot_and_chosen_weights_that_are_older_are_told(trainer):
    follow = {"every": 2, "num_images": 12, "criterion": "frechet", "validation_share": 0.25}
    given = guided(guide={"snapshot_at": 0.9}, training=EVEN | {"learning_rate": 1e-8})
    given = given.model_copy(update={"follow_training": given.follow_training.model_copy(update=follow)})
    trainer.train_prior(given)
    kept = next(line for line in trainer.said if line.startswith("kept the averaged weights of step 2 of 6"))
    assert "criterion frechet" in kept and "kept the averaged weights of step 5 as the guide" in trainer.said
    assert any("the weights kept are of step 2, the guide's of step 5" in line for line in trainer.said)
    assert {"choice.json", "looks", guides.GUIDE} <= {path.name for path in trainer.prior.iterdir()}


@pytest.mark.parametrize("kind", [None, FLOW], ids=["autoregressive", "flow_matching"])
def test_what_a_system_draws_and_edits_by_its_guide_an_export_does_too(trainer, tmp_path, kind):
    given = guided(kind, {"autoguidance_scale": 3.0})
    trainer.train_prior(given)
    system, settings = System.read(trainer.tokenizer, trainer.prior, "small"), given.sampling("small")
    labels = system.labels.repeat(3)
    plain, strong = (
        system.draw(labels, each, seeding.generator(1, "sample_images", 0))
        for each in (sampling_schema(given.systems["small"].prior.kind)(), settings)
    )
    assert (plain != strong).any()
    export.write(given, "small", trainer.root, tmp_path / "out")
    loaded = tessera.load(tmp_path / "out")
    assert (loaded.sample(labels.tolist(), seed=1).numpy() == strong).all()
    assert (loaded.sample(labels.tolist(), seed=1, autoguidance_scale=1.0).numpy() == plain).all()
    assert "autoguidance_scale=1.5" in (tmp_path / "out/README.md").read_text()
    drawn, mask = loaded.sample(labels.tolist(), seed=2), torch.ones(16, 8, dtype=torch.bool)
    mask[:4] = False
    edited = [loaded.edit("inpaint", drawn, mask=mask, autoguidance_scale=scale) for scale in (1.0, 3.0)]
    assert (edited[0] != edited[1]).any()
    tokens = system.encode(torch.rand(3, 1, 16, 8))
    is_known = torch.ones(3, *system.grid, dtype=torch.bool)
    known = [
        label_log_probs(system, tokens, is_known, each, seeding.generator(0, "x"))
        for each in (settings, settings.model_copy(update={"autoguidance_scale": None}))
    ]
    assert torch.equal(*known)  # what is guided is no likelihood


def test_what_trains_is_shown_without_the_guide_that_it_does_not_have_yet(source):
    model, config, spec = checkpoints.load_model(source.prior, "priors")
    shown = [
        previews.of_prior(guided(sampling=each), "small", spec, source.tokenizer)(model)
        for each in ({"autoguidance_scale": 3.0}, {})
    ]
    assert (shown[0] == shown[1]).all()


def test_a_prior_that_begins_from_a_folder_with_a_guide_takes_its_weights_alone(source):
    init = {"from": str(source.prior), "sha256": artifact.fingerprint(source.prior)}
    given = params(prior={"init": init}).systems["small"].prior
    model, _, _ = checkpoints.load_model(source.prior, "priors")
    found = warm_start.read(model, given, "priors")
    assert not found.unused and all(
        torch.equal(found.taken[name], each) for name, each in tensors(source.prior).items()
    )


def test_onnx_has_a_call_of_the_guide_beside_one_of_the_prior(source):
    system = System.read(source.tokenizer, source.prior)
    made = onnx.networks(system)
    assert list(made) == ["encoder", "decoder", "prior", "guide"]
    with torch.no_grad():
        logits = [network(*given.values()) for network, given, _ in (made["prior"], made["guide"])]
    assert logits[0].shape == logits[1].shape and not torch.equal(*logits)


@pytest.mark.parametrize("page", ["systems.md", "systems.zh.md"])
def test_the_documented_example_suits_the_default_params(page):
    example = yaml.safe_load(
        re.search(r"```yaml\n(systems:\n.*?snapshot_at.*?)```", (DOCS / page).read_text(), re.S)[1]
    )
    values = yaml.safe_load((DOCS.parent / "params.yaml").read_text())
    for name, system in example["systems"].items():
        for part, settings in system.items():
            values["systems"][name][part] |= settings
    labels = {"train": np.arange(1400) % 10, "test": np.arange(359) % 10}
    given = parse(Pipeline, values)
    assert given.sampling("vqgan-flow").autoguidance_scale == 1.5
    spec = ImageSpec(
        name="digits", channels=1, height=8, width=8, num_classes=10, class_names=tuple("0123456789"), licence=""
    )
    assert problems.problems(given, images.planned(given, spec, labels)) == []


@pytest.mark.parametrize("damage", ["missing", "renamed", "shape", "nan"])
def test_a_guide_of_another_network_is_refused_by_name(source, tmp_path, damage):
    weights, folder = tensors(source.prior, guides.GUIDE), tmp_path / "prior"
    if damage == "renamed":
        weights["other"] = weights.pop("position")
    if damage == "shape":
        weights["position"] = weights["position"][:-1].contiguous()
    if damage == "nan":
        weights["position"][0, 0] = torch.nan
    with artifact.create(folder) as place:
        for name in ("config.json", "weights.safetensors"):
            shutil.copy(source.prior / name, place / name)
        if damage != "missing":
            safetensors.torch.save_file(weights, place / guides.GUIDE)
    expected = "does not exist" if damage == "missing" else "does not hold finite weights of the prior's own network"
    with pytest.raises(ArtifactError, match=f"guide.safetensors {expected}"):
        System.read(source.tokenizer, folder)

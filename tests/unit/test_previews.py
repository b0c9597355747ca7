"""Pictures of a part while it trains: when they come, where they lie, and that no weight depends on them."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from test_training import Data, Objective, settings
from torch import nn

from tessera import params as all_params
from tessera import seeding
from tessera.artifacts import checkpoints
from tessera.artifacts import folder as artifact
from tessera.artifacts import images as image_artifact
from tessera.artifacts.shards import spread
from tessera.components import load
from tessera.running import job as job_module
from tessera.running.job import Job
from tessera.system import System
from tessera.training import previews
from tessera.training.loop import fit
from tessera.training.previews import Previews


class Clock:
    """A clock that a picture moves on by `cost` seconds."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, cost: float):
        self.now, self.cost, self.drawn_at = 0.0, cost, []
        monkeypatch.setattr(previews.time, "monotonic", lambda: self.now)

    def draw(self, model: nn.Module) -> np.ndarray:
        assert not model.training
        self.drawn_at.append(self.now)
        self.now += self.cost
        return np.full((10, 1, 4, 4), len(self.drawn_at), np.uint8)


@pytest.fixture
def job(tmp_path, monkeypatch) -> Job:
    monkeypatch.setattr(job_module, "PREVIEWS", tmp_path / "previews")
    return Job("train_prior@toy", tmp_path)


def test_pictures_come_after_some_seconds_and_take_two_percent_of_a_training(job, monkeypatch, tmp_path, capsys):
    clock = Clock(monkeypatch, cost=2.0)
    shown = Previews(clock.draw, job)
    model = nn.Linear(2, 2)
    while clock.now < 1000:
        if shown.is_due():
            shown.show(model)
        clock.now += 1
    assert clock.drawn_at == [previews.FIRST_SECONDS, *range(200, 1000, 100)]  # n pictures in n x 100 s
    assert model.training
    path = tmp_path / "previews" / "train_prior@toy.png"
    assert [file.name for file in path.parent.iterdir()] == [path.name]
    assert len(clock.drawn_at) in np.unique(np.asarray(Image.open(path)))  # the newest
    assert capsys.readouterr().out.count(str(path)) == 1


def test_a_training_gives_the_same_weights_with_pictures_and_without(tmp_path, job, monkeypatch):
    monkeypatch.setattr(previews, "FIRST_SECONDS", 0.0)
    monkeypatch.setattr(previews, "SHARE", float("inf"))
    drawn, trained = [], []

    def draw(model: nn.Module) -> np.ndarray:
        drawn.append(torch.rand(7))  # a model may draw from the global generator
        return np.zeros((10, 1, 4, 4), np.uint8)

    for preview in (None, Previews(draw, job)):
        one = Job("x", tmp_path / str(preview is None))
        one.resumable()
        trained.append(fit(Objective(settings()), Data(), settings(), seed=5, job=one, preview=preview))
    assert len(drawn) == settings().num_steps
    for a, b in zip(*(model.state_dict().values() for model in trained), strict=True):
        assert torch.equal(a, b)


def test_a_tokenizers_picture_has_rows_of_test_images_each_above_what_becomes_of_them(images_folder, image_spec):
    module = load("tokenizers", "none")
    model = module.Model(module.Config(kind="none", quantizer={"kind": "identity"}), image_spec)
    model.trained = nn.Parameter(torch.zeros(1))  # tells where it is
    test = image_artifact.read(images_folder)[1]["test"]
    shown = previews.of_tokenizer(test)(model)
    assert shown.shape == (40, 1, 16, 8)
    for top in (0, 20):
        assert np.array_equal(shown[top : top + 10], shown[top + 10 : top + 20])  # nothing is lost on pixels
    assert np.array_equal(np.concatenate([shown[:10], shown[20:30]]), test.pixels.gather(spread(24, 20)))


def test_a_priors_picture_is_what_the_system_draws_of_a_column_for_each_class(tmp_path, image_spec, token_spec):
    params = all_params.read(Path(__file__).parents[2] / "params.yaml")
    config = params.systems["pixel-diffusion"].prior
    tokenizers, priors = load("tokenizers", "none"), load("priors", config.kind)
    tokenizer_config = params.tokenizers["none"]
    tokenizer = tokenizers.Model(tokenizer_config, image_spec)
    with artifact.create(tmp_path / "none") as place:
        checkpoints.save(place, "tokenizers", tokenizer_config, image_spec, tokenizer, "code")
    shape = tokenizer.latent_shape
    spec = token_spec.model_copy(
        update={"latent_shape": shape, "index_grid": shape[1:], "latent_mean": (0.0,), "latent_std": (1.0,)}
    )
    prior = priors.Model(config, spec).eval()
    shown = previews.of_prior(params, "pixel-diffusion", spec, tmp_path / "none")(prior)
    system = System(tokenizer, prior, spec, priors.LEARNS)
    labels = np.array([0, 1, 2, 0, 1, 2, 0, 1, 2, 0] * 4)  # three classes, ten columns
    generator = seeding.generator(params.seed, "preview")
    assert np.array_equal(shown, system.draw(labels, params.sampling("pixel-diffusion"), generator))

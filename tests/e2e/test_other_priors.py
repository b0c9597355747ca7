"""The priors of params.yaml that the finished clone has not, through every stage of a system, in one process."""

import json
from pathlib import Path

import pytest
from clones import EVERY_EDIT, smoke_params

from stages import edit_images, evaluate, sample_images, train_prior
from tessera.components import parse
from tessera.params import Pipeline
from tessera.running.job import Job

pytestmark = pytest.mark.e2e(seconds=20)


@pytest.mark.parametrize("name", ["pixel-diffusion", "vqgan-masked"])
def test_a_system_is_drawn_judged_and_does_every_edit(name, finished, tmp_path, monkeypatch):
    monkeypatch.chdir(finished.folder)  # whose data are read, and nothing is written there
    values = finished.params()
    values["systems"][name] = smoke_params(name)["systems"][name]
    params, data = parse(Pipeline, values), Path("data")
    tokenizer = values["systems"][name]["tokenizer"]
    trained, samples, metrics = tmp_path / "prior", tmp_path / "samples", tmp_path / "metrics.json"
    of_tokenizer = {"images": data / "images", "tokenizer": data / "tokenizers" / tokenizer}
    seen = {"images": data / "images", "features": data / "features", "reference": data / "reference"}

    def job(stage: str) -> Job:
        return Job(f"{stage}@{name}", tmp_path / "state" / stage)

    train_prior.run(
        params, name, **of_tokenizer, tokens=data / "tokens" / tokenizer, out=trained, history=tmp_path / "curve.csv",
        metrics=tmp_path / "prior.json", job=job("train_prior"),
    )  # fmt: skip
    sample_images.run(
        params, name, tokenizer=of_tokenizer["tokenizer"], prior=trained, out=samples, picture=tmp_path / "samples.png",
        job=job("sample_images"),
    )  # fmt: skip
    evaluate.run(
        params, name, **seen, samples=samples, tokenizer=of_tokenizer["tokenizer"], prior=trained, metrics=metrics,
        tokenizer_metrics=data / f"metrics/tokenizers/{tokenizer}.json", prior_metrics=tmp_path / "prior.json",
        picture=tmp_path / "samples.png", neighbors=tmp_path / "neighbors.png", job=job("evaluate"),
    )  # fmt: skip
    judged = json.loads(metrics.read_text())["generation"]
    assert {"fd_classifier", "fd_random", "label_agreement", "copy_rate"} <= set(judged)
    edit_images.run(
        params, name, **seen, tokenizer=of_tokenizer["tokenizer"], prior=trained, out=tmp_path / "edits",
        picture=tmp_path / "edits.png", metrics=metrics, job=job("edit_images"),
    )  # fmt: skip
    edited = json.loads(metrics.read_text())
    assert edited["drawn"]["refused"] == {} and set(edited) >= EVERY_EDIT
    assert edited["inpaint"]["changed_known_pixels"]["value"] == 0 and edited["inpaint"]["diversity"]["value"] > 0

"""A system whose prior is a GAN in pixel space, through the stages that a prior passes."""

from pathlib import Path

import numpy as np
import pytest
import yaml

from stages import encode_tokens, sample_images, train_prior, train_tokenizer
from tessera.artifacts import folder as artifact
from tessera.params import read
from tessera.running.job import Job

pytestmark = pytest.mark.e2e(seconds=10)
ROOT = Path(__file__).parents[2]


def test_a_gan_passes_the_stages_and_has_no_loss_of_test_images(tmp_path, images_folder):
    raw = yaml.safe_load((ROOT / "params.yaml").read_text())
    raw["tokenizers"] = {"none": {"kind": "none", "quantizer": {"kind": "identity"}}}
    training = {"num_steps": 3, "batch_size": 4}
    prior = {"kind": "gan", "channels": 8, "output_range": "pixels", "penalty_interval": 2, "training": training}
    raw["systems"] = {"gan": {"tokenizer": "none", "prior": prior, "sampling": {"truncation": 2.0}}}
    raw["encode_tokens"] |= {"warps": 1, "batch_size": 20}
    raw["sample_images"] = {"num_images": 9, "batch_size": 5}
    (tmp_path / "params.yaml").write_text(yaml.safe_dump(raw))
    params = read(tmp_path / "params.yaml")
    tokenizer, tokens, trained, out = (tmp_path / name for name in ("tokenizer", "tokens", "prior", "samples"))
    train_tokenizer.run(params, "none", images_folder, tokenizer, tmp_path / "t.csv", Job("tokenizer", tmp_path / "s1"))
    encode_tokens.run(params, "none", images_folder, tokenizer, tokens, Job("tokens", tmp_path / "s2"))
    said = []
    job = Job("prior", tmp_path / "s3")
    job.say = said.append
    paths = (images_folder, tokenizer, tokens, trained, tmp_path / "p.csv", tmp_path / "p.json")
    figures = train_prior.run(params, "gan", *paths, job)
    assert figures == {} and said[-1] == f"wrote {trained}"
    artifact.check(trained)
    columns = (tmp_path / "p.csv").read_text().splitlines()[0].split(",")
    assert {"step", "loss", "discriminator_loss", "r1_penalty", "discriminator_accuracy"} <= set(columns)
    sample_images.run(params, "gan", tokenizer, trained, out, tmp_path / "grid.png", Job("samples", tmp_path / "s4"))
    assert np.load(out / "images-00000.npy").shape == (9, 1, 16, 8)
    assert artifact.read_json(out / "meta.json")["sampling"] == {"truncation": 2.0}

"""Trainings that begin with weights of a folder: what is taken of which folder, what is told, refused, and resumed."""

import copy
import csv
import json
import shutil
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
import torch.nn.functional as F
import yaml

from stages import encode_tokens, train_prior, train_tokenizer
from tessera.artifacts import checkpoints
from tessera.artifacts import folder as artifact
from tessera.artifacts import images as image_artifact
from tessera.artifacts import tokens as token_artifact
from tessera.check import images as known_images
from tessera.check import problems
from tessera.components import InvalidParams, load, parse
from tessera.export import __main__ as export
from tessera.params import Pipeline
from tessera.running.job import Job, Stopped
from tessera.training import warm_start
from tessera.training.reading import rows_of_step

ROOT = Path(__file__).parents[2]
TRAINING = {"num_steps": 6, "batch_size": 8, "learning_rate": 0.01, "warmup_fraction": 0.0}
VQGAN = {
    "kind": "vqgan",
    "quantizer": {"kind": "vector", "codebook_size": 16, "code_dim": 4, "init_step": 1},
    "patch_size": 4,
    "channels": 8,
    "num_blocks": 1,
    "perceptual": "none",
    "discriminator_channels": 8,
    "discriminator_start_step": 3,
    "training": TRAINING,
}
PRIOR = {"kind": "autoregressive", "width": 16, "depth": 1, "heads": 2, "dropout": 0.0, "label_dropout": 0.0}
OTHERS = "it learned tokens of another tokenizer"
CODEBOOK = {f"quantizer.{name}" for name in ("codebook", "code_sums", "code_counts", "batches_seen")}


def params(tokenizer: dict | None = None, prior: dict | None = None) -> Pipeline:
    """A run of one small system, with these keys of its tokenizer and its prior."""
    values = yaml.safe_load((ROOT / "params.yaml").read_text())
    values["tokenizers"] = {"vqgan": copy.deepcopy(VQGAN) | (tokenizer or {})}
    values["encode_tokens"]["warps"] = 0
    system = {"tokenizer": "vqgan", "prior": PRIOR | {"training": TRAINING} | (prior or {}), "sampling": {}}
    return parse(Pipeline, values | {"systems": {"small": system}})


class Trainer:
    """The two trainings of a run, in a folder that is laid as a checkout."""

    def __init__(self, root: Path, images: Path):
        self.root, self.images, self.said = root, images, []

    @property
    def tokenizer(self) -> Path:
        return self.root / "data/tokenizers/vqgan"

    @property
    def prior(self) -> Path:
        return self.root / "data/priors/small"

    @property
    def tokens(self) -> Path:
        return self.root / "data/tokens/vqgan"

    def job(self, name: str) -> Job:
        job = Job(name, self.root / ".state" / name)
        job.say = self.said.append
        return job

    def train_tokenizer(self, given: Pipeline, job: Job | None = None) -> None:
        job = job or self.job("train_tokenizer@vqgan")
        train_tokenizer.run(given, "vqgan", self.images, self.tokenizer, self.root / "tokenizer.csv", job)

    def encode(self, given: Pipeline) -> None:
        encode_tokens.run(given, "vqgan", self.images, self.tokenizer, self.tokens, self.job("encode_tokens@vqgan"))

    def train_prior(self, given: Pipeline, job: Job | None = None) -> None:
        paths = self.images, self.tokenizer, self.tokens, self.prior, self.root / "prior.csv", self.root / "prior.json"
        train_prior.run(given, "small", *paths, job or self.job("train_prior@small"))

    def first_loss(self, history: str) -> float:
        return float(next(csv.DictReader((self.root / history).open()))["loss"])


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory, images_folder: Path) -> Trainer:
    """A tokenizer and a prior that were trained."""
    trainer = Trainer(tmp_path_factory.mktemp("source"), images_folder)
    trainer.train_tokenizer(params())
    trainer.encode(params())
    trainer.train_prior(params())
    return trainer


@pytest.fixture
def trainer(tmp_path: Path, images_folder: Path) -> Trainer:
    return Trainer(tmp_path / "checkout", images_folder)


def init(folder: Path, manifest: Path | None = None) -> dict[str, Any]:
    return {"init": {"from": str(folder), "sha256": artifact.sha256((manifest or folder) / artifact.MANIFEST)}}


def weights_of(folder: Path, file: str = "weights.safetensors") -> dict[str, torch.Tensor]:
    return safetensors.torch.load_file(folder / file)


def record_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "init.json").read_text())


def test_a_tokenizer_of_the_same_shapes_begins_with_the_loss_that_the_source_has(source, trainer):
    """Computed of its codes by hand: before the discriminator begins, it is that of a VQ-VAE."""
    trainer.train_tokenizer(params(init(source.tokenizer)))
    model, config, spec = checkpoints.load_model(source.tokenizer, "tokenizers")
    _, splits = image_artifact.read(source.images)
    rows = rows_of_step(0, 8, len(splits["train"]), seed=0)
    images = torch.from_numpy(splits["train"].pixels.all()[rows.numpy()]) / 127.5 - 1
    latents, indices = model.encode(images)
    codes = model.quantizer.codebook[indices].movedim(3, 1)
    pixels, commitment = F.mse_loss(model.decoder(codes), images), F.mse_loss(latents, codes)
    expected = config.pixel_weight * pixels + config.quantizer.commitment_weight * commitment
    assert trainer.first_loss("tokenizer.csv") == pytest.approx(float(expected), rel=1e-5)
    assert abs(source.first_loss("tokenizer.csv") - float(expected)) > 0.1 * float(expected)
    record = record_of(trainer.tokenizer)
    assert set(record["taken"]) == set(weights_of(source.tokenizer)) and record["unused"] == []
    assert record["anew"] == {"discriminator": "not in any folder"}
    assert trainer.said[1:3] == [
        f"begins from {source.tokenizer}: {len(record['taken'])} of {len(record['taken'])} tensors",
        "begin anew: discriminator",
    ]


def test_a_prior_of_the_same_shapes_begins_with_the_loss_that_the_source_has_and_says_if_its_tokens_were_others(
    source, trainer
):
    trainer.train_tokenizer(params(init(source.tokenizer)))
    trainer.encode(params())
    trainer.train_prior(params(prior=init(source.prior)))
    model, _, _ = checkpoints.load_model(source.prior, "priors")
    _, splits = token_artifact.read(trainer.tokens, "indices", None)
    rows = rows_of_step(0, 8, len(splits["train"]), seed=0)
    batch = splits["train"].batch_of(splits["train"].stored(rows, None))
    indices = batch.tokens.flatten(1)
    log_probs = model(indices, batch.labels).log_softmax(dim=2).gather(2, indices.unsqueeze(2))
    assert trainer.first_loss("prior.csv") == pytest.approx(-float(log_probs.mean()), rel=1e-5)
    assert abs(source.first_loss("prior.csv") + float(log_probs.mean())) > 0.01
    assert record_of(trainer.prior)["anew"] == {}
    (told,) = [line for line in trainer.said if OTHERS in line]
    assert artifact.fingerprint(source.tokenizer)[:12] in told and artifact.fingerprint(trainer.tokenizer)[:12] in told
    trainer.said.clear()
    trainer.train_prior(params(prior=init(trainer.prior)))
    assert not [line for line in trainer.said if OTHERS in line]


def test_the_average_that_is_kept_begins_with_the_weights_that_were_taken(source, trainer):
    training = {"num_steps": 1, "batch_size": 8, "learning_rate": 1e-8}
    still = {"training": training, "discriminator_start_step": 0}
    trainer.train_tokenizer(params(init(source.tokenizer) | still))
    found, expected = weights_of(trainer.tokenizer), weights_of(source.tokenizer)
    for name in expected.keys() - CODEBOOK:
        torch.testing.assert_close(found[name], expected[name], rtol=0, atol=1e-6)
    assert int(found["quantizer.batches_seen"]) == int(expected["quantizer.batches_seen"]) + 1
    counted = found["quantizer.code_counts"] - 0.95 * expected["quantizer.code_counts"]
    assert float(counted.sum()) == pytest.approx(0.05 * 8 * 8, rel=1e-3)  # of 8 images of 4x2 tokens


# ---------------------------------------------------------------------------------------------------------- a part that fits


def fit(given: Pipeline, source: Trainer, spec: Any, part: str) -> warm_start.Fitting:
    config = given.tokenizers["vqgan"] if part == "tokenizers" else given.systems["small"].prior
    return warm_start.read(load(part, config.kind).Model(config, spec), config, part)


def test_another_codebook_is_told_with_its_averages_and_its_count(source, image_spec):
    quantizer = VQGAN["quantizer"] | {"codebook_size": 12}
    found = fit(params(init(source.tokenizer) | {"quantizer": quantizer}), source, image_spec, "tokenizers")
    assert set(found.anew) == CODEBOOK and found.unused == []
    assert found.anew["quantizer.codebook"] == "16x4 in the folder, 12x4 here"
    assert found.anew["quantizer.batches_seen"] == "belongs to quantizer.codebook"
    assert set(found.taken) == set(weights_of(source.tokenizer)) - CODEBOOK


def test_a_codebook_without_the_averages_that_it_would_move_by_begins_anew(source, trainer, image_spec):
    """Else the first step would draw it to random ones."""
    trainer.train_tokenizer(params({"quantizer": VQGAN["quantizer"] | {"update": "gradient"}}))
    found = fit(params(init(trainer.tokenizer)), trainer, image_spec, "tokenizers")
    assert set(found.anew) == CODEBOOK and found.anew["quantizer.code_sums"] == "not in the folder"
    gradient = {"quantizer": VQGAN["quantizer"] | {"update": "gradient"}}
    found = fit(params(init(source.tokenizer) | gradient), source, image_spec, "tokenizers")
    assert found.anew == {} and found.unused == ["quantizer.code_sums"]


def test_a_deeper_network_keeps_what_it_has_and_says_what_it_lacks(source, image_spec):
    found = fit(params(init(source.tokenizer) | {"num_blocks": 2}), source, image_spec, "tokenizers")
    model = load("tokenizers", "vqgan").Model(params({"num_blocks": 2}).tokenizers["vqgan"], image_spec)
    ours, theirs = model.state_dict(), weights_of(source.tokenizer)
    assert set(found.anew) == {name for name in ours if name not in theirs or ours[name].shape != theirs[name].shape}
    assert found.anew and found.taken and found.unused == []


OTHER_TOKENS = {"codebook_size": 9, "latent_shape": (4, 4, 4), "index_grid": (4, 4)}


@pytest.mark.parametrize(
    ("changes", "anew"),
    [
        ({"num_classes": 5, "class_counts": (1,) * 5}, {"label_embedding.weight": "4x16 in the folder, 6x16 here"}),
        (
            OTHER_TOKENS,
            {
                "index_embedding.weight": "16x16 in the folder, 9x16 here",
                "position": "8x16 in the folder, 16x16 here",
                "head.weight": "16x16 in the folder, 9x16 here",
                "head.bias": "16 in the folder, 9 here",
            },
        ),
    ],
    ids=["labels", "tokens"],
)
def test_a_prior_of_other_labels_or_tokens_keeps_all_but_their_tables(source, changes, anew):
    _, spec = checkpoints.described(source.prior, "priors")
    found = fit(params(prior=init(source.prior)), source, spec.model_copy(update=changes), "priors")
    assert found.anew == anew and found.unused == []
    assert set(found.taken) == set(weights_of(source.prior)) - set(anew)


# --------------------------------------------------------------------------------------------------------- kinds of folders


def stopping(trainer: Trainer, name: str, after: int) -> Job:
    """A job that is asked to stop after so many steps."""
    job, asked = trainer.job(name), []

    def is_asked() -> bool:
        asked.append(1)
        if len(asked) == after:
            job.request_stop(signal.SIGTERM)
        return len(asked) >= after

    job.stop_requested = is_asked
    return job


def test_of_a_checkpoint_the_averaged_weights_are_taken(trainer, image_spec):
    with pytest.raises(Stopped):
        trainer.train_tokenizer(params(), stopping(trainer, "train_tokenizer@vqgan", after=4))
    (step,) = (trainer.root / ".state").glob("train_tokenizer@vqgan/*/step-*")
    found = fit(params(init(step)), trainer, image_spec, "tokenizers")
    average = weights_of(step, "average.safetensors")
    assert found.anew == {} and all(torch.equal(found.taken[name], average[name]) for name in average)
    newest = weights_of(step, "objective.safetensors")
    assert not torch.equal(found.taken["decoder.stem.weight"], newest["model.decoder.stem.weight"])
    with pytest.raises(
        ValueError, match="has the name and shape of one of this prior, expected weights of the same kind"
    ):
        fit(params(prior=init(step)), trainer, _token_spec(image_spec), "priors")


def _token_spec(image_spec: Any) -> Any:
    tokenizer = load("tokenizers", "vqgan").Model(params().tokenizers["vqgan"], image_spec)
    labels = {"train": np.arange(6) % 3, "test": np.arange(6) % 3}
    return problems.tokens_of(tokenizer, known_images.planned(params(), image_spec, labels))


def test_of_an_exported_folder_the_part_is_taken_that_is_trained(source, image_spec, tmp_path):
    export.write(params(), "small", source.root, tmp_path / "exported")
    assert_parts_are_found(source, image_spec, tmp_path / "exported", ("tokenizer", "prior"))


@pytest.mark.filterwarnings("ignore:.*type hints")
def test_of_a_registered_model_as_mlflow_lays_it_the_part_is_taken_that_is_trained(source, image_spec, tmp_path):
    import mlflow

    folders = {"tokenizer": str(source.tokenizer), "prior": str(source.prior)}
    served = str(ROOT / "tessera/tracking/served_model.py")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path)
        mlflow.pyfunc.save_model("model", python_model=served, artifacts=folders, pip_requirements=["torch"])
    assert_parts_are_found(source, image_spec, tmp_path / "model", ("artifacts/vqgan", "artifacts/small"))


def assert_parts_are_found(source: Trainer, image_spec: Any, folder: Path, places: tuple[str, str]) -> None:
    tokenizer, prior = places
    found = fit(params(init(folder, folder / tokenizer)), source, image_spec, "tokenizers")
    expected = weights_of(source.tokenizer)
    assert found.anew == {} and all(torch.equal(found.taken[name], expected[name]) for name in expected)
    _, spec = checkpoints.described(source.prior, "priors")
    found = fit(params(prior=init(folder, folder / prior)), source, spec, "priors")
    expected = weights_of(source.prior)
    assert found.anew == {} and all(torch.equal(found.taken[name], expected[name]) for name in expected)


# ----------------------------------------------------------------------------------------------------------------- refusals


def damaged(folder: Path) -> dict:
    path = folder / "weights.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    return init(folder)


def sealed(folder: Path, change: Any) -> dict:
    """The folder with other weights, and a manifest that fits."""
    weights = weights_of(folder)
    change(weights)
    safetensors.torch.save_file(weights, folder / "weights.safetensors")
    names = ("weights.safetensors", "config.json")
    artifact.write_json(folder / artifact.MANIFEST, {name: artifact.sha256(folder / name) for name in names})
    return init(folder)


def emptied(folder: Path) -> dict:
    shutil.rmtree(folder)
    folder.mkdir()
    return {"init": {"from": str(folder), "sha256": "0" * 64}}


def changed(folder: Path) -> dict:
    before = init(folder)
    sealed(folder, lambda weights: weights["decoder.stem.bias"].zero_())
    return before


def gone(folder: Path) -> dict:
    before = init(folder)
    shutil.rmtree(folder)
    return before


def of_another_kind(folder: Path) -> dict:
    described = json.loads((folder / "config.json").read_text())
    known = load("tokenizers", "vqvae").Config.model_fields
    described["config"] = {key: value for key, value in described["config"].items() if key in known} | {"kind": "vqvae"}
    artifact.write_json(folder / "config.json", described)
    return sealed(folder, lambda weights: None)


REFUSED = [
    (gone, "init.from: .*does not exist, expected an artifact .data/tokenizers/NAME., a checkpoint"),
    (emptied, "init.from: .*holds no tokenizer, expected an artifact"),
    (lambda folder: init(folder) | {"init": {"from": str(folder / "config.json"), "sha256": "0" * 64}}, "is no folder"),
    (damaged, "init.from: .*weights.safetensors is damaged: sha256 [0-9a-f]{64}, expected [0-9a-f]{64}"),
    (changed, r"init.sha256: .*manifest.json has sha256 ([0-9a-f]{64}), expected [0-9a-f]{64}: .*write sha256: \1"),
    (of_another_kind, "init.from: .* is of kind vqvae, expected vqgan: name another folder"),
    (
        lambda folder: sealed(folder, lambda weights: weights["decoder.stem.bias"].fill_(torch.nan)),
        "weights.safetensors is not finite in decoder.stem.bias",
    ),
    (
        lambda folder: sealed(
            folder, lambda weights: [weights.update({f"other.{n}": weights.pop(n)}) for n in list(weights)]
        ),
        "none of the [0-9]+ tensors in .* has the name and shape of one of this tokenizer",
    ),
]


@pytest.mark.parametrize(("spoil", "sentence"), REFUSED, ids=[sentence[-30:] for _, sentence in REFUSED])
def test_a_folder_that_is_no_use_is_refused_in_one_sentence_by_the_check_and_by_the_stage(
    source, trainer, image_spec, tmp_path, spoil, sentence
):
    folder = tmp_path / "folder"
    shutil.copytree(source.tokenizer, folder)
    given = params(spoil(folder))
    labels = {"train": np.arange(1000) % 3, "test": np.arange(359) % 3}
    told = problems.problems(given, known_images.planned(given, image_spec, labels))
    (one,) = [one for one in told if one.startswith("tokenizers.vqgan: init.")]
    assert "\n" not in one and "dvc repro" not in one
    with pytest.raises(ValueError, match=sentence) as refused:
        trainer.train_tokenizer(given)
    assert one == f"tokenizers.vqgan: {refused.value}" and not trainer.tokenizer.exists()
    later = problems.problems(given, known_images.planned(given, image_spec, labels), is_begin=False)
    assert not [one for one in later if "init." in one]  # what was made of it stands


def test_the_part_that_is_not_trained_is_refused(source, trainer, image_spec):
    with pytest.raises(ValueError, match="holds 'priors', expected 'tokenizers': another kind of artifact lies there"):
        trainer.train_tokenizer(params(init(source.prior)))
    given = params(prior=init(source.tokenizer))
    planned = known_images.planned(given, image_spec, {"train": np.arange(1000) % 3, "test": np.arange(359) % 3})
    assert any(one.startswith("systems.small.prior: init.from: ") for one in problems.problems(given, planned))
    own = {"init": {"from": "data/tokenizers/vqgan", "sha256": "0" * 64}}
    told = problems.problems(params(own), planned)
    assert any("data/tokenizers/vqgan is what this stage writes anew: copy it elsewhere" in one for one in told)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({"from": "x"}, r"tokenizers\.vqgan\.init: got \{'from': 'x'\}, expected init: \{from: FOLDER, sha256: HASH\}"),
        ({"form": "x", "sha256": "0" * 64}, r"tokenizers\.vqgan\.init: got .*expected init"),
        ("data/tokenizers/other", r"tokenizers\.vqgan\.init: got 'data/tokenizers/other', expected init"),
        ({"from": "x", "sha256": "0" * 63}, r"tokenizers\.vqgan\.init\.sha256: .*pattern"),
    ],
)
def test_init_has_two_keys(value, message):
    with pytest.raises(InvalidParams, match=message):
        params({"init": value})


# ---------------------------------------------------------------------------------------------------------- kill and resume


@pytest.fixture(scope="module")
def whole(
    source: Trainer, tmp_path_factory: pytest.TempPathFactory, images_folder: Path
) -> tuple[Trainer, Pipeline, Path]:
    """A training that began with a folder and was not killed, its params, and the folder."""
    folder = tmp_path_factory.mktemp("folders") / "vqgan"
    shutil.copytree(source.tokenizer, folder)
    trainer, given = Trainer(tmp_path_factory.mktemp("whole"), images_folder), params(init(folder))
    trainer.train_tokenizer(given)
    return trainer, given, folder


@pytest.mark.parametrize("at", [0, 4], ids=["before the first checkpoint", "after it"])
def test_a_training_that_is_killed_needs_the_folder_no_more_and_ends_with_the_same_bits(
    whole, trainer, monkeypatch, at
):
    uninterrupted, given, folder = whole
    if at:
        with pytest.raises(Stopped):
            trainer.train_tokenizer(given, stopping(trainer, "train_tokenizer@vqgan", after=at))
    else:
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(train_tokenizer.loop, "fit", _killed)
            trainer.train_tokenizer(given)
    away = folder.rename(folder.with_name("away"))
    try:
        trainer.train_tokenizer(given)
    finally:
        away.rename(folder)
    assert (f"resumed step {at}" in trainer.said) is bool(at)
    assert artifact.fingerprint(trainer.tokenizer) == artifact.fingerprint(uninterrupted.tokenizer)
    assert (trainer.root / "tokenizer.csv").read_bytes() == (uninterrupted.root / "tokenizer.csv").read_bytes()


def _killed(*arguments: Any, **settings: Any) -> None:
    raise KeyboardInterrupt

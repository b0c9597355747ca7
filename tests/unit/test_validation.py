"""Validations of a prior while it trains: they change nothing, survive a kill, choose the weights, and see overfitting."""

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import safetensors.torch
import torch
import yaml
from sklearn.datasets import load_digits

from stages import encode_tokens, sample_images, train_prior, train_tokenizer
from tessera.artifacts import checkpoints
from tessera.artifacts import folder as artifact
from tessera.artifacts import images as image_artifact
from tessera.artifacts.images import ImageWriter, to_float, write_meta
from tessera.artifacts.tokens import Tokens
from tessera.contracts import ImageSpec
from tessera.evaluation import figures
from tessera.evaluation.judge import Judge
from tessera.evaluation.likelihood import proportional_rows
from tessera.features import random as random_features
from tessera.params import Pipeline, read
from tessera.priors import flow_matching
from tessera.running.job import Job, Stopped
from tessera.training.alarms import copying_alarm, loss_alarm, train_share
from tessera.training.validation import PriorValidation

ROOT = Path(__file__).parents[2]
TRAINING = {"num_steps": 5, "batch_size": 8, "learning_rate": 0.03}
SYSTEMS = {
    "autoregressive": {
        "tokenizer": "vqvae",
        "prior": {"kind": "autoregressive", "width": 16, "depth": 1, "heads": 2, "dropout": 0.2, "training": TRAINING},
    },
    "masked": {
        "tokenizer": "vqvae",
        "prior": {"kind": "masked", "width": 16, "depth": 1, "heads": 2, "training": {**TRAINING, "optimizer": "muon"}},
    },
    "flow": {
        "tokenizer": "none",
        "prior": {
            "kind": "flow_matching",
            "denoiser": {"kind": "transformer", "width": 16, "depth": 1, "heads": 2, "patch_size": 2},
            "training": TRAINING,
        },
    },
    "gan": {
        "tokenizer": "none",
        "prior": {"kind": "gan", "channels": 8, "noise_dim": 8, "normalization": "batch", "training": TRAINING},
    },
}


class Setting:
    """Tokenizers and tokens of one set of images, on which priors are trained."""

    def __init__(self, folder: Path, images: Path, tokenizer: dict[str, Any]):
        self.folder, self.images = folder, images
        self.tokenizers = {"none": {"kind": "none", "quantizer": {"kind": "identity"}}, "vqvae": tokenizer}
        params = self.params(SYSTEMS)
        for name in self.tokenizers:
            out, curve = folder / "tokenizers" / name, folder / f"{name}.csv"
            train_tokenizer.run(params, name, images, out, curve, Job(name, folder / "state" / name))
            tokens = folder / "tokens" / name
            encode_tokens.run(params, name, images, out, tokens, Job(name, folder / "state" / f"tokens-{name}"))

    def params(self, systems: dict[str, Any], **following: Any) -> Pipeline:
        raw = yaml.safe_load((ROOT / "params.yaml").read_text())
        raw["tokenizers"], raw["encode_tokens"] = self.tokenizers, raw["encode_tokens"] | {"warps": 1}
        raw["systems"] = {name: {"sampling": {}, **system} for name, system in systems.items()}
        raw["follow_training"] = {"every": 0, "num_images": 30, "features": {"kind": "random"}, **following}
        path = self.folder / "params.yaml"
        path.write_text(yaml.safe_dump(raw))
        return read(path)

    def train(self, place: Path, name: str, job: Job | None = None, system: Any = None, **following: Any) -> "Trained":
        return Trained(self, place, name, job or Job(name, place / "state"), system or SYSTEMS[name], following)


class Trained:
    """What a training leaves behind."""

    def __init__(self, setting: Setting, place: Path, name: str, job: Job, system: dict[str, Any], following: Any):
        self.place, self.job, self.out, self.said = place, job, place / "prior", []
        job.say = self.said.append
        params, tokenizer = setting.params({name: system}, **following), system["tokenizer"]
        self.figures = train_prior.run(
            params,
            name,
            setting.images,
            setting.folder / "tokenizers" / tokenizer,
            setting.folder / "tokens" / tokenizer,
            self.out,
            place / "curve.csv",
            place / "metrics.json",
            job,
        )
        self.history = pd.read_csv(place / "curve.csv")
        self.weights = safetensors.torch.load_file(self.out / "weights.safetensors")

    @property
    def validations(self) -> pd.DataFrame:
        return self.history[self.history.follow_fd_test.notna()].set_index("step")

    @property
    def alarms(self) -> list[str]:
        return [line for line in self.said if line.startswith("overfitting")]


def equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


@pytest.fixture(scope="module")
def striped(tmp_path_factory, images_folder) -> Setting:
    tokenizer = {
        "kind": "vqvae",
        "quantizer": {"kind": "vector", "codebook_size": 16, "code_dim": 4, "init_step": 1},
        "patch_size": 4,
        "channels": 8,
        "num_blocks": 1,
        "training": {"num_steps": 3, "batch_size": 8},
    }
    return Setting(tmp_path_factory.mktemp("striped"), images_folder, tokenizer)


@pytest.mark.parametrize("name", SYSTEMS)
def test_validations_change_no_bit_of_the_training(striped, tmp_path, name):
    """With dropout, hidden labels, drawn views, batch statistics, two phases: all that chance and state could disturb."""
    without = striped.train(tmp_path / "without", name)
    validated = striped.train(tmp_path / "validated", name, every=2)
    assert equal(without.weights, validated.weights)
    columns = list(without.history.columns)
    pd.testing.assert_frame_equal(without.history, validated.history[columns])
    assert without.figures == validated.figures
    assert not (without.out / "looks").exists() and "kept_step" not in without.job.figures


@pytest.mark.parametrize("name", ["autoregressive", "gan"])
def test_validations_are_rows_of_the_curve_at_every_k_steps_and_at_the_last(striped, tmp_path, name):
    trained = striped.train(tmp_path, name, every=2)
    assert trained.validations.index.tolist() == [2, 4, 5] and trained.history.step.tolist() == [1, 2, 3, 4, 5]
    assert (trained.validations[["follow_fd_test", "follow_fd_train"]] > 0).all(axis=None)
    assert trained.validations.follow_train_share.between(0, 1).all()
    losses = {"test_loss", "train_loss"}
    assert losses & set(trained.history.columns) == (losses if name != "gan" else set())
    assert trained.job.figures["kept_step"] == 5
    pictures = sorted(path.name for path in (trained.out / "looks").iterdir())
    assert pictures == ["step-0000002.png", "step-0000004.png", "step-0000005.png", "training.png"]
    model, config, _ = checkpoints.load_model(
        trained.out, "priors"
    )  # the pictures do not disturb those who read weights
    assert config.kind == name and equal(model.state_dict(), trained.weights)


def test_the_last_validation_has_the_losses_that_the_metrics_file_has(striped, tmp_path):
    """24 test images, fewer than num_images, so that both are of all of them."""
    trained = striped.train(tmp_path, "autoregressive", every=5)
    group = figures.read(tmp_path / "metrics.json").groups["prior"]
    found = {key: figure.value for key, figure in group.items()}
    assert found == trained.figures and {figure.num_images for figure in group.values()} == {24}
    assert group["bits_per_image"].standard_error > 0
    assert found["test_loss"] == pytest.approx(trained.validations.test_loss[5], rel=1e-6)
    assert found["train_loss"] == pytest.approx(trained.validations.train_loss[5], rel=1e-6)
    assert found["bits_per_token"] == pytest.approx(found["test_loss"] / np.log(2), rel=1e-5)
    assert found["bits_per_image"] == pytest.approx(found["bits_per_token"] * 8, rel=1e-9)  # 4 x 2 places


@pytest.mark.parametrize(
    ("name", "keys"),
    [
        ("masked", {"test_loss", "train_loss", "bits_per_token", "bits_per_image"}),
        ("flow", {"test_loss", "train_loss"}),
        ("gan", set()),
    ],
)
def test_the_metrics_file_has_what_a_prior_can_tell(striped, tmp_path, name, keys):
    assert striped.train(tmp_path, name).figures.keys() == keys


def test_every_validation_draws_with_the_same_labels_in_proportion_and_the_same_noise(striped, tmp_path, monkeypatch):
    seen, sample = [], flow_matching.Model.sample

    def watched(self, labels, sampling, generator):
        assert sampling.model_dump() == flow_matching.Sampling().model_dump()
        seen.append((labels.tolist(), generator.initial_seed()))
        return sample(self, labels, sampling, generator)

    monkeypatch.setattr(flow_matching.Model, "sample", watched)
    striped.train(tmp_path, "flow", every=2, num_images=210)  # three batches each
    assert len(seen) == 9 and seen[:3] == seen[3:6] == seen[6:] and len({seed for _, seed in seen}) == 3
    labels = sum((labels for labels, _ in seen[:3]), [])
    assert sorted(labels) == [0] * 70 + [1] * 70 + [2] * 70 and labels != sorted(labels)


@pytest.mark.parametrize("split", ["test", "train"])
def test_a_prior_that_repeats_images_has_no_distance_from_them(striped, tmp_path, monkeypatch, split):
    """Instead of the prior's samples: the very images of one split that samples are compared with, in their classes."""
    spec, splits = image_artifact.read(striped.images)
    images = splits[split]
    rows = proportional_rows(images.labels, 24, seed=0)
    waiting = {label: [row for row in rows if images.labels[row] == label] for label in range(3)}

    def repeat(self, labels, sampling, generator):
        chosen = np.array([waiting[label].pop() for label in labels.tolist()])
        tokens = artifact.read_json(striped.folder / "tokens/none/meta.json")["spec"]
        mean, std = (torch.tensor(tokens[key]).view(1, -1, 1, 1) for key in ("latent_mean", "latent_std"))
        return (to_float(images.uint8(chosen)) - mean) / std

    monkeypatch.setattr("tessera.priors.gan.Model.sample", repeat)
    trained = striped.train(tmp_path, "gan", every=5, num_images=24)
    last, other = trained.validations.loc[5], "train" if split == "test" else "test"
    judge = Judge(random_features.Model(random_features.Config(), spec), random_features.Config())
    features = [
        judge.features(splits[name].pixels, proportional_rows(splits[name].labels, 24, 0)) for name in (split, other)
    ]
    assert last[f"follow_fd_{split}"] == pytest.approx(0, abs=1e-5)
    assert last[f"follow_fd_{other}"] == pytest.approx(frechet_by_the_book(*features), rel=1e-3)
    assert last.follow_train_share == (1.0 if split == "train" else 0.0)
    assert bool(trained.alarms) == (split == "train")
    assert trained.job.figures.get("overfitting_step") == (5 if split == "train" else None)


def frechet_by_the_book(a: np.ndarray, b: np.ndarray) -> float:
    """Heusel et al., equation 6, by a matrix square root."""
    root = torch.linalg.eigvals(torch.from_numpy(np.cov(a.T) @ np.cov(b.T))).real.clamp_min(0).sqrt().sum()
    return float(((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(np.cov(a.T)) + np.trace(np.cov(b.T)) - 2 * root)


class Killed(Exception):
    pass


class Fragile(Job):
    """Saves a checkpoint at the steps of `saves`, and is killed after step `dies`, without any order, or asked to stop."""

    def __init__(self, name: str, state: Path, dies: int, saves: tuple[int, ...] = (), asked: bool = False):
        super().__init__(name, state)
        self.dies, self.saves, self.asked, self.step = dies, saves, asked, 0

    def stop_requested(self) -> bool:
        self.step += 1
        self.checkpoint_seconds = 0.0 if self.step in self.saves else 1e9
        if self.step > self.dies and not self.asked:
            raise Killed
        return self.asked and self.step == self.dies


DEATHS = [
    ("last", {"dies": 3, "asked": True}),
    ("validation_loss", {"dies": 3, "asked": True}),
    ("frechet", {"dies": 4, "asked": True}),  # at a validation
    ("test_loss", {"dies": 4, "saves": (1,)}),  # long after the last checkpoint: two validations are made again
    ("last", {"dies": 2}),  # before the first
]


@pytest.mark.parametrize(("criterion", "death"), DEATHS, ids=str)
def test_a_training_that_was_killed_and_resumed_saw_and_kept_the_same(striped, tmp_path, criterion, death):
    following = {"every": 2, "criterion": criterion}
    whole = striped.train(tmp_path / "whole", "autoregressive", **following)
    dying = Fragile("autoregressive", tmp_path / "state", **death)
    with pytest.raises((Killed, Stopped)):
        striped.train(tmp_path / "parts", "autoregressive", dying, **following)
    resumed = striped.train(
        tmp_path / "parts", "autoregressive", Job("autoregressive", tmp_path / "state"), **following
    )
    at = death["dies"] if death.get("asked") else max(death.get("saves", (0,)))
    assert (f"resumed step {at}" in resumed.said) == (at > 0)
    assert (resumed.out / "manifest.json").read_bytes() == (whole.out / "manifest.json").read_bytes()
    assert (resumed.place / "curve.csv").read_bytes() == (whole.place / "curve.csv").read_bytes()
    assert resumed.job.figures["kept_step"] == whole.job.figures["kept_step"]


def test_the_weights_chosen_by_an_older_checkpoint_are_kept_as_long_as_it_is(striped, tmp_path, monkeypatch):
    """Planted losses, better each time up to the fourth. The newest checkpoint is damaged; the other needs the first."""
    losses, planted = iter([5.0, 4.0, 3.0, 2.0, 4.0, 3.0, 2.0, 2.5]), {"test_loss": 1.0, "train_loss": 1.0}
    monkeypatch.setattr(PriorValidation, "_losses", lambda self, model: planted | {"validation_loss": next(losses)})
    following = {"every": 1, "criterion": "validation_loss"}
    dying = Fragile("autoregressive", tmp_path / "state", dies=3, saves=(1, 3))
    with pytest.raises(Killed):
        striped.train(tmp_path, "autoregressive", dying, **following)
    folders = sorted(path.name for path in (dying.state / "validations").glob("weights-*"))
    assert folders == ["weights-000000001", "weights-000000003", "weights-000000004"]
    (dying.state / "step-000000003/objective.safetensors").write_bytes(b"")
    again = Job("autoregressive", tmp_path / "state")
    resumed = striped.train(tmp_path, "autoregressive", again, **following)
    assert "resumed step 1" in resumed.said and again.figures["kept_step"] == 4
    assert resumed.validations.validation_loss.tolist() == [5.0, 4.0, 3.0, 2.0, 2.5]


def test_validations_that_were_lost_are_not_passed_over(striped, tmp_path):
    dying = Fragile("gan", tmp_path / "state", dies=4, asked=True)
    with pytest.raises(Stopped):
        striped.train(tmp_path, "gan", dying, every=2)
    (dying.state / "validations/step-000000002/result.json").unlink()
    with pytest.raises(
        ValueError, match="resume at step 4, but its validations up to there are not whole .* to train anew"
    ):
        striped.train(tmp_path, "gan", Job("gan", tmp_path / "state"), every=2)


def test_a_criterion_is_of_training_images_that_are_not_trained_on_and_not_of_test_images(
    striped, tmp_path, monkeypatch
):
    """Planted losses: of the test images the third validation is the best, of the validation images the second."""
    losses = iter(zip([5.0, 4.0, 1.0, 4.0, 5.0], [5.0, 1.0, 4.0, 4.0, 5.0], strict=True))

    def planted(self, model):
        of_test, of_validation = next(losses)
        return {"test_loss": of_test, "train_loss": 1.0, "validation_loss": of_validation}

    trained_on, stored = set(), Tokens.stored

    def watched(self, rows, generator=None):
        trained_on.update(self.rows[rows].tolist())
        return stored(self, rows, generator)

    monkeypatch.setattr(PriorValidation, "_losses", planted)
    monkeypatch.setattr(Tokens, "stored", watched)
    monkeypatch.setattr(train_prior, "held_out_figures", lambda *_: figures.Recorder())
    trained = striped.train(tmp_path, "autoregressive", every=1, criterion="validation_loss", validation_share=0.25)
    assert trained.job.figures["kept_step"] == 2
    rows, labels = np.load(trained.out / "validation-rows.npy"), image_artifact.read(striped.images)[1]["train"].labels
    assert np.bincount(labels[rows]).tolist() == [4, 4, 4] and len(set(rows)) == 12  # of 16 images of each class
    assert trained_on == set(range(48)) - set(rows)  # 5 steps of 8: one epoch, and 4 images again
    assert artifact.read_json(trained.out / "choice.json") == {
        "criterion": "validation_loss",
        "kept_step": 2,
        "split": "train",
        "num_images": 12,
        "rows_sha256": artifact.sha256(trained.out / "validation-rows.npy"),
    }
    assert "criterion validation_loss is of 12 of the 48 training images, the same share of each class" in " ".join(
        trained.said
    )


@pytest.mark.parametrize("criterion", ["last", "frechet"])
def test_samples_tell_of_the_criterion_that_chose_their_weights_if_one_did(striped, tmp_path, criterion):
    following = {"every": 2, "criterion": criterion}
    trained = striped.train(tmp_path, "gan", **following)
    params, tokenizer = striped.params({"gan": SYSTEMS["gan"]}, **following), striped.folder / "tokenizers/none"
    out = tmp_path / "samples"
    sample_images.run(params, "gan", tokenizer, trained.out, out, tmp_path / "samples.png", trained.job)
    told = artifact.read_json(out / "meta.json").get("choice")
    assert told == (None if criterion == "last" else artifact.read_json(trained.out / "choice.json"))
    assert (
        ("follow_fd_validation" in trained.history)
        == (trained.out / "validation-rows.npy").exists()
        == (told is not None)
    )


def test_a_share_without_two_validation_images_is_refused_before_the_training(striped, tmp_path):
    with pytest.raises(ValueError, match="validation_share 0.03 of 48 training images is 1, expected at least 2"):
        striped.train(tmp_path, "gan", every=2, criterion="frechet", validation_share=0.03)


@pytest.mark.parametrize(
    ("criterion", "column"), [("validation_loss", "validation_loss"), ("frechet", "follow_fd_validation")]
)
def test_the_weights_of_the_best_validation_are_kept(striped, tmp_path, monkeypatch, criterion, column):
    """A learning rate at which the training swings, so that the last validation is not the best."""
    seen, measure = {}, PriorValidation.measure

    def remember(self, step, model):
        seen[step] = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        return measure(self, step, model)

    monkeypatch.setattr(PriorValidation, "measure", remember)
    wild = {"num_steps": 8, "batch_size": 8, "learning_rate": 0.5, "ema_decay": 0.0, "warmup_fraction": 0.0}
    system = SYSTEMS["autoregressive"] | {"prior": SYSTEMS["autoregressive"]["prior"] | {"training": wild}}
    trained = striped.train(tmp_path, "autoregressive", system=system, every=1, criterion=criterion)
    best = int(trained.validations[column].idxmin())
    assert best != 8 and trained.job.figures["kept_step"] == best
    assert equal(trained.weights, seen[best]) and not equal(trained.weights, seen[8])
    value = trained.validations[column][best]
    assert f"kept the averaged weights of step {best} of 8, criterion {criterion}: {column} {value:.4g}" in trained.said
    choice = artifact.read_json(trained.out / "choice.json")
    assert (choice["criterion"], choice["kept_step"]) == (criterion, best)


def test_a_tokenizer_that_the_tokens_are_not_of_is_refused_before_the_training(striped, tmp_path):
    system = SYSTEMS["autoregressive"] | {"tokenizer": "vqvae"}
    params = striped.params({"x": system}, every=2)
    paths = [tmp_path / name for name in ("prior", "curve.csv", "metrics.json")]
    tokenizers, tokens = striped.folder / "tokenizers", striped.folder / "tokens/vqvae"
    with pytest.raises(ValueError, match="the tokens are of another tokenizer"):
        train_prior.run(params, "x", striped.images, tokenizers / "none", tokens, *paths, Job("x", tmp_path / "state"))


def test_the_share_nearest_to_training_images_and_its_std_are_those_over_all_halves():
    """Brute force: each of the 70 halves of 8 real images might be the one that was trained on."""
    nearest = torch.tensor([0, 0, 0, 5, 5, 6, 1, 7, 7, 7, 7])
    uses = torch.bincount(nearest, minlength=8).double() / 11
    shares = np.array([float(uses[list(half)].sum()) for half in itertools.combinations(range(8), 4)])
    share, std = train_share(nearest, 4)
    assert share == pytest.approx(7 / 11) and shares.mean() == pytest.approx(0.5)
    assert std == pytest.approx(shares.std(), rel=1e-12)


def losses(*pairs: tuple[float, float]) -> dict[int, dict[str, float]]:
    return {10 * number: {"test_loss": a, "train_loss": b} for number, (a, b) in enumerate(pairs, 1)}


def test_the_alarm_on_losses_wants_both_a_rise_and_a_fall():
    assert loss_alarm(losses((3, 3), (2, 2), (1.9, 1.5))) is None  # both fall
    assert loss_alarm(losses((3, 3), (2, 2), (2.03, 1.9))) is None  # within 2 %
    assert loss_alarm(losses((3, 3), (2, 2), (2.5, 2.4))) is None  # both rise: the training goes badly
    sentence = loss_alarm(losses((3, 3), (2, 2), (1.9, 1.8), (2.1, 1.7)))
    assert "since step 30 the loss rose from 1.9 to 2.1 on test images and fell from 1.8 to 1.7" in sentence
    assert loss_alarm({1: {"follow_fd_test": 1.0}}) is None  # a GAN


def test_the_alarm_on_samples_wants_many_and_more_than_chance():
    assert copying_alarm(7, 0.64, 0.01) is None and copying_alarm(7, 0.9, 0.14) is None
    assert "at step 7 90% of the samples" in copying_alarm(7, 0.9, 0.05)


def digits(out: Path, num_train: int, num_test: int) -> Path:
    """Handwritten digits of 8x8 pixels."""
    data = load_digits()
    pixels, order = (data.images * 255 / 16).astype(np.uint8)[:, None], np.random.default_rng(0).permutation(1797)
    names = tuple("0123456789")
    spec = ImageSpec(name="digits", channels=1, height=8, width=8, num_classes=10, class_names=names, licence="CC BY")
    with artifact.create(out) as place:
        for split, rows in (("train", order[:num_train]), ("test", order[-num_test:])):
            with ImageWriter(place, split, spec) as writer:
                writer.append(pixels[rows], data.target[rows])
        index = pd.DataFrame({"split": ["train"] * num_train + ["test"] * num_test, "kept": True})
        write_meta(place, spec, "0" * 64, index)
    return out


@pytest.mark.parametrize("is_planted", [True, False], ids=["planted", "healthy"])
def test_memory_of_few_images_is_alarmed_at_and_a_healthy_training_is_not(tmp_path, is_planted):
    """A large prior on 20 digits repeats them; a small one on 1,400 digits does not."""
    quantizer = {"kind": "vector", "codebook_size": 32, "code_dim": 4}
    training = {"num_steps": 60, "batch_size": 32, "learning_rate": 0.004, "ema_decay": 0.98}
    sizes = {"patch_size": 2, "channels": 16, "num_blocks": 1}
    tokenizer = {"kind": "vqvae", "quantizer": quantizer, "training": training, **sizes}
    setting = Setting(tmp_path, digits(tmp_path / "images", 20 if is_planted else 1400, 300), tokenizer)
    training = {"num_steps": 90, "batch_size": 48, "optimizer": "muon", "learning_rate": 0.002}
    sizes = {"width": 96, "depth": 3} if is_planted else {"width": 32, "depth": 2}
    prior = {"kind": "autoregressive", "heads": 4, "dropout": 0.0, "training": training, **sizes}
    system = {"tokenizer": "vqvae", "prior": prior}
    trained = setting.train(tmp_path / "x", "x", system=system, every=30, num_images=200)
    last = trained.validations.iloc[-1]
    assert len(trained.alarms) == is_planted  # once, however many validations would
    if is_planted:
        assert trained.job.figures["overfitting_step"] == 60
        assert last.follow_train_share > 0.9 and last.follow_fd_train < 0.5 * last.follow_fd_test
        assert copying_alarm(90, last.follow_train_share, train_share(torch.arange(20, 40), 20)[1])
    else:
        assert last.test_loss < trained.validations.test_loss.iloc[0] and "overfitting_step" not in trained.job.figures

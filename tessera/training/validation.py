"""Validation of a prior while it trains: losses of training and test images, samples, and their distance from real images.

A criterion that chooses weights is never of the test images, which the chosen weights are judged by later: it is of validation
images, a share of the training images that is then not trained on.

The loss of a training says little of its samples, and nothing for a GAN. Each validation is of the averaged weights, with the
same images, labels, noise and masks, so that two of them differ by the weights alone. It draws from generators of its own, and
from the global one, which every training step seeds anew: the training is the same with it and without.

In params.yaml it is called follow_training, and its columns in history.csv begin with follow_.
"""

import shutil
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import safetensors.torch
import torch
from torch import nn

from tessera import seeding
from tessera.artifacts import checkpoints, pictures
from tessera.artifacts import folder as artifact
from tessera.artifacts import images as image_artifact
from tessera.artifacts.checkpoints import CHOICE, read_weights
from tessera.artifacts.folder import ArtifactError
from tessera.artifacts.samples import quotas
from tessera.artifacts.tokens import Tokens
from tessera.components import load, sampling_schema
from tessera.contracts import Job, TokenSpec
from tessera.evaluation.judge import Judge
from tessera.evaluation.likelihood import mean_loss, proportional_rows
from tessera.metrics import frechet
from tessera.params import FollowTraining, Pipeline
from tessera.system import System
from tessera.training.alarms import copying_alarm, loss_alarm, train_share

BATCH = 100  # images that are drawn at a time; fixed, because it decides the noise
VALIDATION = "validation"  # beside the splits train and test, where a criterion chooses
COLUMN_OF = {"validation_loss": "validation_loss", "frechet": "follow_fd_validation"}  # what a criterion minimizes


def hold_out(train: Tokens, settings: FollowTraining, seed: int, job: Job) -> dict[str, Tokens]:
    """The training images without the validation images, and these: settings.validation_share, with the same class shares.

    Raises ValueError if there are not two of them, or none are left to train on.
    """
    number = round(settings.validation_share * len(train))
    if not 2 <= number < len(train):
        raise ValueError(
            f"follow_training.validation_share {settings.validation_share} of {len(train)} training images is {number}, "
            f"expected at least 2 and fewer than all: raise or lower it, or use criterion last"
        )
    held_out = proportional_rows(train.labels, number, seed, "validation_rows")
    job.say(
        f"criterion {settings.criterion} is of {number:,} of the {len(train):,} training images, the same share of each class; "
        f"the others are trained on"
    )
    return {"train": train.subset(np.setdiff1d(np.arange(len(train)), held_out)), VALIDATION: train.subset(held_out)}


class Result(NamedTuple):
    step: int
    metrics: dict[str, float]  # columns of history.csv, all finite
    alarm: str | None  # the sentence, at the first validation that gives cause for it


class PriorValidation:
    """The validation of one training, a `loop.Validation`."""

    def __init__(
        self,
        params: Pipeline,
        system: str,
        spec: TokenSpec,
        tokens: dict[str, Tokens],
        images: Path,
        tokenizer: Path,
        job: Job,
    ):
        """tokens: of the splits, with those of VALIDATION if the criterion is not last."""
        self.settings, self.seed, self.job = params.follow_training, params.seed, job
        self.config, self.spec, self.tokens = params.systems[system].prior, spec, tokens
        self.prior = load("priors", self.config.kind)
        self.images, self.tokenizer = images, tokenizer
        self.results: list[Result] = []
        found = artifact.fingerprint(tokenizer)
        if found != spec.tokenizer_fingerprint:
            raise ValueError(
                f"the tokens are of another tokenizer ({spec.tokenizer_fingerprint[:12]}) than {tokenizer} "
                f"({found[:12]}), which would decode them to noise. Run: dvc repro train_prior@{system}"
            )

    def inputs(self) -> dict[str, Any]:
        """What validations depend on besides the training: for the key of its state."""
        return {"follow_training": self.settings, "images": artifact.fingerprint(self.images)}

    def is_due(self, step: int) -> bool:
        return step % self.settings.every == 0 or step == self.config.training.num_steps

    def begin(self, step: int) -> None:
        """Read what samples are compared with, and the results up to `step`, at which the training begins or resumes."""
        image_spec, splits = image_artifact.read(self.images)
        for tokens in self.tokens.values():
            labels = splits[tokens.split].labels
            if len(labels) != len(tokens.values) or not np.array_equal(tokens.labels, labels[tokens.rows]):
                raise ValueError(
                    f"{self.images}/{tokens.split} holds other images than the tokens are of: run dvc repro encode_tokens"
                )
        self.decoder, _, _ = checkpoints.load_model(self.tokenizer, "tokenizers")
        features = load("features", self.settings.features.kind)
        network = features.Model(self.settings.features, image_spec)
        if hasattr(features, "prepare"):
            features.prepare(network, self.settings.features)
        self.judge = Judge(network, self.settings.features)
        # Equally many of both splits: the larger one would be the nearer one.
        self.count = min(self.settings.num_images, len(self.tokens["train"]), len(self.tokens["test"]))
        self.rows, real = {}, {}
        for split, tokens in self.tokens.items():
            number = min(self.count, len(tokens))
            self.rows[split] = proportional_rows(tokens.labels, number, self.seed)
            real[split] = self.judge.features(splits[tokens.split].pixels, tokens.rows[self.rows[split]])
        self.moments = {split: frechet.moments(values) for split, values in real.items()}
        together = np.concatenate([real["test"], real["train"]])  # a tie goes to the test image
        self.real = torch.from_numpy(together).to(self.judge.device)
        number = self.settings.num_images
        self.labels = np.repeat(np.arange(self.spec.num_classes), quotas(number, self.spec.class_counts))
        seeding.numpy_generator(self.seed, "follow_labels").shuffle(self.labels)
        members = [np.flatnonzero(self.labels == label) for label in np.unique(self.labels)[:10]]
        self.shown = np.sort(np.concatenate([group[: 100 if len(members) == 1 else 10] for group in members]))
        self.row = [group[rank] for rank in range(10) for group in members if rank < len(group)][:10]
        self.folder = self.job.state / "validations"
        self._resume(step)

    def measure(self, step: int, model: nn.Module) -> dict[str, float]:
        """Validate the averaged model after `step` steps; the metrics are columns of history.csv."""
        model.eval()
        metrics = self._losses(model)
        distances, share_std = self._distances(model)
        metrics |= distances
        if not np.isfinite(list(metrics.values())).all():
            raise ValueError(f"validation at step {step} is not finite, {metrics}: lower training.learning_rate")
        alarm = None
        if not any(result.alarm for result in self.results):  # said already
            alarm = loss_alarm({result.step: result.metrics for result in self.results} | {step: metrics})
            alarm = alarm or copying_alarm(step, metrics["follow_train_share"], share_std)
        self.results.append(Result(step, metrics, alarm))
        self._write(step, model)
        self.job.attach(self._place("step", step) / "samples.png", f"samples/step-{step:07d}.png")
        self.job.say(f"validation at step {step}: " + "  ".join(f"{key} {value:.4g}" for key, value in metrics.items()))
        if alarm:
            self.job.say(alarm)
        return metrics

    def keep(self, model: nn.Module) -> None:
        """Load the weights chosen by the criterion into the trained model, and report which these are."""
        chosen = self._chosen(self.results[-1].step)
        if self.settings.criterion != "last":
            path = self._place("weights", chosen.step) / "weights.safetensors"
            model.load_state_dict(read_weights(path), strict=True)
        self.job.figures["kept_step"] = chosen.step
        for result in self.results:
            if result.alarm:
                self.job.figures["overfitting_step"] = result.step
        shown = COLUMN_OF.get(self.settings.criterion, "follow_fd_test")
        self.job.say(
            f"kept the averaged weights of step {chosen.step} of {self.results[-1].step}, criterion "
            f"{self.settings.criterion}: {shown} {chosen.metrics[shown]:.4g}"
        )

    def write(self, place: Path) -> None:
        """Put into an artifact what chose its weights, and the pictures of all validations: a grid of each, and one with a row
        of samples for each."""
        if self.settings.criterion != "last":
            self._write_choice(place)
        for result in self.results:
            target = place / "looks" / f"step-{result.step:07d}.png"
            target.parent.mkdir(exist_ok=True)
            shutil.copyfile(self._place("step", result.step) / "samples.png", target)
        rows = [np.load(self._place("step", result.step) / "row.npy", allow_pickle=False) for result in self.results]
        pictures.save_grid(place / "looks" / "training.png", np.concatenate(rows), len(self.row))

    def _write_choice(self, place: Path) -> None:
        rows = self.tokens[VALIDATION].rows
        np.save(place / "validation-rows.npy", rows, allow_pickle=False)
        described = {
            "criterion": self.settings.criterion,
            "kept_step": self._chosen(self.results[-1].step).step,
            "split": "train",
            "num_images": len(rows),
            "rows_sha256": artifact.sha256(place / "validation-rows.npy"),
            **self.settings.model_dump(include={"precision"}),
        }
        artifact.write_json(place / CHOICE, described)

    def _losses(self, model: nn.Module) -> dict[str, float]:
        if "prior" not in self.prior.Objective.phases:
            return {}
        objective = self.prior.Objective(model, self.config)
        rows = {split: torch.from_numpy(rows) for split, rows in self.rows.items()}
        return {
            f"{split}_loss": mean_loss(objective, self.tokens[split], rows[split], self.seed)
            for split in self._shown_splits()
        }

    def _shown_splits(self) -> list[str]:
        return [split for split in ("test", "train", VALIDATION) if split in self.tokens]

    @torch.no_grad()
    def _distances(self, model: nn.Module) -> tuple[dict[str, float], float]:
        """The metrics of new samples, and the standard deviation of follow_train_share by chance."""
        device = next(model.parameters()).device
        system = System(self.decoder.to(device), model, self.spec, self.prior.LEARNS)
        sampling = sampling_schema(self.config.kind)(precision=self.settings.precision)
        drawn, nearest, kept = frechet.MomentsAccumulator(), [], []
        for start in range(0, len(self.labels), BATCH):
            generator = seeding.generator(self.seed, "follow_samples", start, device=device)
            pixels = system.draw(self.labels[start : start + BATCH], sampling, generator)
            features = self.judge.features(pixels)
            drawn.update(features)
            nearest.append(torch.cdist(torch.from_numpy(features).to(self.real), self.real).argmin(dim=1).cpu())
            kept.append(pixels[np.isin(np.arange(start, start + len(pixels)), self.shown)])
        self._pictured = np.concatenate(kept)  # (len(shown), C, H, W)
        moments = drawn.moments()
        share, share_std = train_share(torch.cat(nearest), self.count)
        metrics = {
            f"follow_fd_{split}": frechet.distance(moments, self.moments[split]) for split in self._shown_splits()
        }
        return metrics | {"follow_train_share": share}, share_std

    def _write(self, step: int, model: nn.Module) -> None:
        """Weights first: a result that is there has its weights."""
        if self.settings.criterion != "last" and self._chosen(step).step == step:
            with artifact.create(self._place("weights", step)) as place:
                state = {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
                safetensors.torch.save_file(state, place / "weights.safetensors")
        with artifact.create(self._place("step", step)) as place:
            artifact.write_json(place / "result.json", self.results[-1]._asdict())
            grid = pictures.by_class(self._pictured, self.labels[self.shown])
            pictures.save_grid(place / "samples.png", grid, 10)
            np.save(place / "row.npy", self._pictured[np.searchsorted(self.shown, self.row)], allow_pickle=False)
        # A training may resume from each of its checkpoints, and then needs the weights chosen by that step.
        ends = [step, *(int(path.name.removeprefix("step-")) for path in self.job.state.glob("step-*"))]
        needed = {self._place("weights", self._chosen(end).step) for end in ends if end >= self.results[0].step}
        for folder in set(self.folder.glob("weights-*")) - needed:
            shutil.rmtree(folder)

    def _resume(self, step: int) -> None:
        """Read the results up to `step` and remove those after it, which will be measured again."""
        for folder in [*self.folder.glob("step-*"), *self.folder.glob("weights-*")]:
            if int(folder.name.split("-")[1]) > step:
                shutil.rmtree(folder)
        try:
            for due in filter(self.is_due, range(1, step + 1)):
                path = artifact.check(self._place("step", due)) / "result.json"
                self.results.append(Result(**artifact.read_json(path)))
            if self.results and self.settings.criterion != "last":
                artifact.check(self._place("weights", self._chosen(step).step))
        except ArtifactError as error:
            raise ValueError(
                f"the training would resume at step {step}, but its validations up to there are not whole ({error}): "
                f"remove {self.job.state} to train anew"
            ) from None

    def _chosen(self, step: int) -> Result:
        """The validation whose weights are kept if the training ends at `step`: the first of the best."""
        results = [result for result in self.results if result.step <= step]
        if self.settings.criterion == "last":
            return results[-1]
        return min(results, key=lambda result: result.metrics[COLUMN_OF[self.settings.criterion]])

    def _place(self, what: str, step: int) -> Path:
        return self.folder / f"{what}-{step:09d}"

"""Looks at a prior while it trains: losses of images trained on and held out, samples, their distance from real images.

The loss of a training says little of its samples, and nothing for a GAN. Each look is at the averaged weights, with the same
images, labels, noise and masks, so that two looks differ by the weights alone. A look draws from generators of its own and
from the global one, which every step of a training seeds anew: it leaves no trace in the training.

Source: the alarm on losses: Prechelt, "Early Stopping - But When?", 1998, section 2.2 (the generalization loss); on samples:
Meehan et al., "A Non-Parametric Test to Detect Data-Copying in Generative Models", 2020, arXiv:2004.05675, section 3.
Differs from it: an alarm stops nothing, and that on losses asks that the loss of the training images fell meanwhile. That on
samples asks of each which split its nearest real image is of, with as many images of either, and compares with chance.
"""

import shutil
from collections.abc import Sequence
from math import sqrt
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import safetensors.torch
import torch
from torch import Tensor, nn

from tessera import seeding
from tessera.artifacts import checkpoints, pictures
from tessera.artifacts import folder as artifact
from tessera.artifacts import images as image_artifact
from tessera.artifacts import tokens as token_artifact
from tessera.artifacts.checkpoints import read_weights
from tessera.artifacts.folder import ArtifactError
from tessera.artifacts.images import to_uint8
from tessera.artifacts.samples import quotas
from tessera.artifacts.tokens import Tokens
from tessera.components import load
from tessera.contracts import Job, Objective, TokenBatch, TokenSpec
from tessera.evaluation.judge import Judge
from tessera.metrics import frechet
from tessera.params import Pipeline

BATCH = 100  # images that are drawn at a time; fixed, because it decides the noise
LOSS_BATCH = 500
COLUMN_OF = {"test_loss": "test_loss", "frechet": "follow_fd_test"}  # what a criterion minimizes
# Prechelt stops at 1 % to 5 %. Looks differ by the weights alone, so that there is no chance between them to allow for.
LOSS_RISE = 0.02
# If a share q of the samples are copies of the training images compared with, and the others are as near to either split,
# 0.5 + q / 2 of them are nearest to a training image. Below q = 0.3 the tokenizer's own memory may be the cause.
COPYING_SHARE = 0.65
COPYING_DEVIATIONS = 3.0  # reached by chance in one look of 740


class Look(NamedTuple):
    step: int
    figures: dict[str, float]  # columns of history.csv, all finite
    alarm: str | None  # the sentence, at the first look that gives cause for it


class Follower:
    """Looks at one training, as `training.fit` asks for it; in all but the main process only `is_due` is asked."""

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
        self.settings, self.seed, self.job = params.follow_training, params.seed, job
        self.config, self.spec, self.tokens = params.systems[system].prior, spec, tokens
        self.prior = load("priors", self.config.kind)
        self.images, self.tokenizer = images, tokenizer
        self.looks: list[Look] = []
        found = artifact.fingerprint(tokenizer)
        if found != spec.tokenizer_fingerprint:
            raise ValueError(
                f"the tokens are of another tokenizer ({spec.tokenizer_fingerprint[:12]}) than {tokenizer} "
                f"({found[:12]}), which would decode them to noise. Run: dvc repro train_prior@{system}"
            )

    def inputs(self) -> dict[str, Any]:
        """What looks depend on besides the training: for the key of its state."""
        return {"follow_training": self.settings, "images": artifact.fingerprint(self.images)}

    def is_due(self, step: int) -> bool:
        return step % self.settings.every == 0 or step == self.config.training.num_steps

    def begin(self, step: int) -> None:
        """Read what samples are compared with, and the looks up to `step`, at which the training begins or resumes."""
        image_spec, splits = image_artifact.read(self.images)
        for split, tokens in self.tokens.items():
            if not np.array_equal(tokens.labels, splits[split].labels):
                raise ValueError(
                    f"{self.images}/{split} holds other images than the tokens are of: run dvc repro encode_tokens"
                )
        self.decoder, _, _ = checkpoints.load_model(self.tokenizer, "tokenizers")
        features = load("features", self.settings.features.kind)
        network = features.Model(self.settings.features, image_spec)
        if hasattr(features, "prepare"):
            features.prepare(network, self.settings.features)
        self.judge = Judge(network, self.settings.features)
        # As many of either split, or the nearer one would also be the larger one.
        self.count = min(self.settings.num_images, *map(len, splits.values()))
        self.rows = {split: proportional_rows(images.labels, self.count, self.seed) for split, images in splits.items()}
        real = {split: self.judge.features(splits[split].pixels, rows) for split, rows in self.rows.items()}
        self.moments = {split: frechet.moments(values) for split, values in real.items()}
        self.real = torch.from_numpy(np.concatenate([real["test"], real["train"]]))  # a tie goes to the test image
        number = self.settings.num_images
        self.labels = np.repeat(np.arange(self.spec.num_classes), quotas(number, self.spec.class_counts))
        seeding.numpy_generator(self.seed, "follow_labels").shuffle(self.labels)
        members = [np.flatnonzero(self.labels == label) for label in np.unique(self.labels)[:10]]
        self.shown = np.sort(np.concatenate([group[: 100 if len(members) == 1 else 10] for group in members]))
        self.row = [group[rank] for rank in range(10) for group in members if rank < len(group)][:10]
        self.folder = self.job.state / "looks"
        self._resume(step)

    def look(self, step: int, model: nn.Module) -> dict[str, float]:
        """Look at the averaged model after `step` steps; the figures are columns of history.csv."""
        model.eval()
        figures = self._losses(model) | self._samples(model)
        if not np.isfinite(list(figures.values())).all():
            raise ValueError(f"what a look at step {step} saw is not finite, {figures}: lower training.learning_rate")
        if any(look.alarm for look in self.looks):  # said already
            alarm = None
        else:
            alarm = memory_of_loss([*self.looks, Look(step, figures, None)]) or memory_of_samples(
                step, figures["follow_train_share"], self._chance
            )
        self.looks.append(Look(step, figures, alarm))
        self._write(step, model)
        self.job.attach(self._place("step", step) / "samples.png", f"samples/step-{step:07d}.png")
        self.job.say(f"look at step {step}: " + "  ".join(f"{key} {value:.4g}" for key, value in figures.items()))
        if alarm:
            self.job.say(alarm)
        return figures

    def keep(self, model: nn.Module) -> None:
        """Give the trained model the weights that the criterion chose, and report which these are."""
        look = self._chosen(self.looks[-1].step)
        if self.settings.criterion != "last":
            path = self._place("weights", look.step) / "weights.safetensors"
            model.load_state_dict(read_weights(path), strict=True)
        self.job.figures["kept_step"] = look.step
        for alarmed in self.looks:
            if alarmed.alarm:
                self.job.figures["overfitting_step"] = alarmed.step
        shown = COLUMN_OF.get(self.settings.criterion, "follow_fd_test")
        self.job.say(
            f"kept the averaged weights of step {look.step} of {self.looks[-1].step}, criterion {self.settings.criterion}: "
            f"{shown} {look.figures[shown]:.4g}"
        )

    def write(self, place: Path) -> None:
        """Put the pictures of all looks into an artifact: a grid of each, and one with a row of samples to a look."""
        for look in self.looks:
            target = place / "looks" / f"step-{look.step:07d}.png"
            target.parent.mkdir(exist_ok=True)
            shutil.copyfile(self._place("step", look.step) / "samples.png", target)
        rows = [np.load(self._place("step", look.step) / "row.npy", allow_pickle=False) for look in self.looks]
        pictures.save_grid(place / "looks" / "training.png", np.concatenate(rows), len(self.row))

    def _losses(self, model: nn.Module) -> dict[str, float]:
        if "prior" not in self.prior.Objective.phases:
            return {}
        objective = self.prior.Objective(model, self.config)
        rows = {split: torch.from_numpy(rows) for split, rows in self.rows.items()}
        return {
            f"{split}_loss": mean_loss(objective, self.tokens[split], rows[split], self.seed)
            for split in ("test", "train")
        }

    @torch.no_grad()
    def _samples(self, model: nn.Module) -> dict[str, float]:
        device = next(model.parameters()).device
        self.decoder.to(device)
        drawn, nearest, kept = frechet.MomentsAccumulator(), [], []
        for start in range(0, len(self.labels), BATCH):
            labels = torch.from_numpy(self.labels[start : start + BATCH]).to(device)
            generator = seeding.generator(self.seed, "follow_samples", start)
            tokens = model.sample(labels, self.prior.Sampling(), generator)
            decoded = token_artifact.decode(tokens, self.decoder, self.spec, self.prior.LEARNS)
            pixels = to_uint8(decoded).cpu().numpy()
            features = self.judge.features(pixels)
            drawn.update(features)
            nearest.append(torch.cdist(torch.from_numpy(features), self.real).argmin(dim=1))
            kept.append(pixels[np.isin(np.arange(start, start + len(pixels)), self.shown)])
        self._pictured = np.concatenate(kept)  # (len(shown), C, H, W)
        moments = drawn.moments()
        share, self._chance = train_share(torch.cat(nearest), self.count)
        return {
            "follow_fd_test": frechet.distance(moments, self.moments["test"]),
            "follow_fd_train": frechet.distance(moments, self.moments["train"]),
            "follow_train_share": share,
        }

    def _write(self, step: int, model: nn.Module) -> None:
        """Weights first: a look that is there has its weights."""
        if self.settings.criterion != "last" and self._chosen(step).step == step:
            with artifact.create(self._place("weights", step)) as place:
                state = {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
                safetensors.torch.save_file(state, place / "weights.safetensors")
        with artifact.create(self._place("step", step)) as place:
            artifact.write_json(place / "look.json", self.looks[-1]._asdict())
            grid = pictures.by_class(self._pictured, self.labels[self.shown])
            pictures.save_grid(place / "samples.png", grid, 10)
            np.save(place / "row.npy", self._pictured[np.searchsorted(self.shown, self.row)], allow_pickle=False)
        # A training may resume from each of its checkpoints, and then needs the weights chosen by that step.
        ends = [step, *(int(path.name.removeprefix("step-")) for path in self.job.state.glob("step-*"))]
        needed = {self._place("weights", self._chosen(end).step) for end in ends if end >= self.looks[0].step}
        for folder in set(self.folder.glob("weights-*")) - needed:
            shutil.rmtree(folder)

    def _resume(self, step: int) -> None:
        """Read the looks up to `step` and remove those after it, which will be taken again."""
        for folder in [*self.folder.glob("step-*"), *self.folder.glob("weights-*")]:
            if int(folder.name.split("-")[1]) > step:
                shutil.rmtree(folder)
        try:
            for due in filter(self.is_due, range(1, step + 1)):
                self.looks.append(Look(**artifact.read_json(artifact.check(self._place("step", due)) / "look.json")))
            if self.looks and self.settings.criterion != "last":
                artifact.check(self._place("weights", self._chosen(step).step))
        except ArtifactError as error:
            raise ValueError(
                f"the training would resume at step {step}, but what its looks saw is not whole ({error}): remove "
                f"{self.job.state} to train anew"
            ) from None

    def _chosen(self, step: int) -> Look:
        """The look whose weights are kept if the training ends at `step`: the first of the best."""
        looks = [look for look in self.looks if look.step <= step]
        if self.settings.criterion == "last":
            return looks[-1]
        return min(looks, key=lambda look: look.figures[COLUMN_OF[self.settings.criterion]])

    def _place(self, what: str, step: int) -> Path:
        return self.folder / f"{what}-{step:09d}"


def proportional_rows(labels: np.ndarray, number: int, seed: int) -> np.ndarray:
    """`number` of the rows of a split, drawn without repetition, its classes in their proportions; in ascending order."""
    generator = seeding.numpy_generator(seed, "follow_rows")
    wanted = quotas(number, tuple(np.bincount(labels)))
    rows = [generator.permutation(np.flatnonzero(labels == label))[:count] for label, count in enumerate(wanted)]
    return np.sort(np.concatenate(rows))


@torch.no_grad()
def mean_loss(objective: Objective, dataset: Tokens, rows: Tensor, seed: int) -> float:
    """The training loss, without dropout, of the first views at these rows: nats per token, or squared error."""
    objective.eval()
    torch.manual_seed(seed)
    total = 0.0
    for piece in rows.split(LOSS_BATCH):
        total += float(objective(_batch(objective, dataset, piece), "prior", 0)["loss"]) * len(piece)
    return total / len(rows)


def bits_of_each(model: nn.Module, dataset: Tokens, rows: Tensor, seed: int) -> Tensor:
    """(n,) bits of each image at these rows, in its first view, under a prior that tells them."""
    model.eval()
    generator = seeding.generator(seed, "bits")
    pieces = rows.split(LOSS_BATCH)
    return torch.cat([model.bits(*_batch(model, dataset, piece), generator).double().cpu() for piece in pieces])


def _batch(module: nn.Module, dataset: Tokens, rows: Tensor) -> TokenBatch:
    device = next(module.parameters()).device
    return TokenBatch(*(tensor.to(device) for tensor in dataset.batch(rows)))


def train_share(nearest: Tensor, count: int) -> tuple[float, float]:
    """(M,) which of `count` test images and, numbered after them, `count` training images is nearest to each sample -> the
    share that is nearest to a training image, and its standard deviation by chance.

    By chance: if any half of the real images might as well have been the one trained on, which is so unless samples remember.
    Several samples may share a nearest image; the deviation is that of a sum over half of a finite set.
    """
    uses = torch.bincount(nearest, minlength=2 * count).double()
    variance = (uses - uses.mean()).square().sum() / 4 * (2 * count / (2 * count - 1))
    return float(uses[count:].sum()) / len(nearest), sqrt(float(variance)) / len(nearest)


def memory_of_loss(looks: Sequence[Look]) -> str | None:
    """A sentence if the loss of test images has risen since its least while that of training images fell."""
    now = looks[-1]
    if "test_loss" not in now.figures:
        return None
    best = min(looks, key=lambda look: look.figures["test_loss"])
    has_risen = now.figures["test_loss"] > (1 + LOSS_RISE) * best.figures["test_loss"]
    if not has_risen or now.figures["train_loss"] >= best.figures["train_loss"]:
        return None
    return (
        f"overfitting: since step {best.step} the loss rose from {best.figures['test_loss']:.4g} to "
        f"{now.figures['test_loss']:.4g} on test images and fell from {best.figures['train_loss']:.4g} to "
        f"{now.figures['train_loss']:.4g} on training images. Train fewer steps, raise dropout or the number of views, or set "
        f"follow_training.criterion: test_loss"
    )


def memory_of_samples(step: int, share: float, chance: float) -> str | None:
    """A sentence if more samples are nearest to a training image than chance explains."""
    if share < COPYING_SHARE or share - 0.5 <= COPYING_DEVIATIONS * chance:
        return None
    return (
        f"overfitting: at step {step} {share:.0%} of the samples are nearer to a training image than to any of as many test "
        f"images, where 50 % (+- {chance:.1%}) would be by chance: they repeat what was trained on. Train fewer steps, take a "
        f"smaller prior, or more images or views"
    )

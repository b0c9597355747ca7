"""Try every edit on test images with one system, measure it against doing without a prior, and lay the results out."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tessera import seeding
from tessera.artifacts import folder as artifact
from tessera.artifacts import images as image_artifact
from tessera.artifacts import pictures
from tessera.artifacts.images import to_float, to_uint8
from tessera.artifacts.shards import ShardWriter, spread
from tessera.components import load
from tessera.contracts import Job
from tessera.editing.trial import CannotEdit, System, Trial
from tessera.evaluation import figures
from tessera.evaluation.figures import Recorder
from tessera.evaluation.judge import Judge
from tessera.evaluation.reference import Reference
from tessera.metrics import frechet
from tessera.params import Pipeline
from tessera.system import ImageGenerator

SHOWN = 10  # images in the picture of each edit


def run(
    params: Pipeline,
    name: str,
    images: Path,
    features: Path,
    reference: Path,
    tokenizer: Path,
    prior: Path,
    out: Path,
    picture: Path,
    metrics: Path,
    job: Job,
) -> None:
    spec, splits = image_artifact.read(images)
    settings, sampling = params.edit_images, params.sampling(name)
    system = System.of(ImageGenerator(tokenizer, prior), name)
    rows = spread(len(splits["test"]), settings.num_images)  # files often lie by class
    originals = to_float(splits["test"].uint8(rows))
    labels = torch.from_numpy(splits["test"].labels[rows].astype(np.int64))
    found, shown, refused = Recorder(), [], {}
    measures = Measures(found, params, features, reference, spec.name)
    with artifact.create(out) as place:
        for edit in params.edits:
            try:
                trials = [
                    _try(params, edit, originals, labels, system, sampling, seed, job)
                    for seed in range(settings.num_seeds)
                ]
            except CannotEdit as refusal:
                refused[edit] = str(refusal)
                job.say(f"{edit}: {refusal}")
                continue
            measures.record(edit, originals, trials)
            first = trials[0]
            with ShardWriter(place, edit) as writer:
                writer.append(to_uint8(first.edited).cpu().numpy())
            shown += [to_uint8(each[:SHOWN]).cpu().numpy() for each in (originals, first.given, first.edited)]
            job.say(f"{edit}  " + "  ".join(f"{key} {one.value:.3f}" for key, one in found.groups[edit].items()))
        artifact.write_json(
            place / "meta.json",
            {
                "rows": rows.tolist(),
                "edits": {edit: config.model_dump(mode="json") for edit, config in params.edits.items()},
                "refused": refused,
                "tokenizer_fingerprint": artifact.fingerprint(tokenizer),
                "prior_fingerprint": artifact.fingerprint(prior),
            },
        )
    found.measured({"refused": refused}).write(metrics)
    nothing = np.zeros((SHOWN, *originals.shape[1:]), np.uint8)
    pictures.save_grid(picture, np.concatenate(shown or [nothing]), min(SHOWN, len(rows)))
    job.attach(picture, "edits.png")


def _try(
    params: Pipeline, edit: str, images: Tensor, labels: Tensor, system: System, sampling: Any, seed: int, job: Job
) -> Trial:
    config, size = params.edits[edit], params.edit_images.batch_size
    starts, parts = range(0, len(images), size), []
    for start in job.track(starts, len(starts), edit):
        generator = seeding.generator(params.seed, "edit_images", edit, seed, start)
        given = (each[start : start + size].to(system.device) for each in (images, labels))
        parts.append(load("edits", config.kind).trial(*given, system, config, sampling, generator))
    return Trial.joined(parts)


class Measures:
    """Figures of edited images: means over the seeds, beside those of every baseline."""

    def __init__(self, found: Recorder, params: Pipeline, features: Path, reference: Path, dataset: str):
        self.found, self.dataset, self.num_seeds = found, dataset, params.edit_images.num_seeds
        self.judges = {name: Judge.read(features / name, name) for name in params.features}
        self.references = {name: Reference(reference / name) for name in params.features}

    def record(self, edit: str, originals: Tensor, trials: list[Trial]) -> None:
        first = trials[0]
        self._add(edit, originals, [trial.edited for trial in trials], first)
        for name in first.baselines:
            self._add(f"{edit}/{name}", originals, [trial.baselines[name] for trial in trials], first)
        pixels = figures.without_network(self.dataset, "edited test images", len(originals), num_seeds=self.num_seeds)
        if first.mask is not None:
            is_known = ~first.mask.unsqueeze(1).expand_as(originals)
            changed = sum(int((trial.edited != originals)[is_known].sum()) for trial in trials)
            self.found.add(edit, "changed_known_pixels", changed, pixels)
        if len(trials) > 1:
            between = (trials[0].edited - trials[1].edited).abs() / 2
            self.found.add_mean(edit, "diversity", _mean_where(between, first.mask), pixels)

    def _add(self, group: str, originals: Tensor, edited: list[Tensor], trial: Trial) -> None:
        num_images, seeds = len(originals), {"num_seeds": self.num_seeds}
        what = "edited test images"
        pixels = [to_uint8(each).cpu().numpy() for each in edited]
        knowing = next((name for name, judge in self.judges.items() if judge.has_logits), None)
        if knowing is not None and trial.labels is not None:
            agrees = [self.judges[knowing].agrees(each, trial.labels.numpy()).mean() for each in pixels]
            protocol = self.references[knowing].protocol_of("test", what, num_images, 0, **seeds)
            self.found.add_share(group, "label_agreement", float(np.mean(agrees)), protocol)
        for name, judge in self.judges.items():
            other = self.references[name].moments("test")
            distances = [frechet.distance(frechet.moments(judge.features(each)), other) for each in pixels]
            protocol = self.references[name].protocol("test", what, num_images, **seeds)
            self.found.add(group, judge.frechet_name, float(np.mean(distances)), protocol)
        protocol = figures.without_network(self.dataset, what, num_images, **seeds)
        errors = torch.stack([_mean_where((each - originals).square() / 4, trial.mask) for each in edited]).mean(dim=0)
        self.found.add_mean(group, "edit_psnr_db", (-10 * errors.log10()).clamp_max(100.0), protocol)


def _mean_where(values: Tensor, mask: Tensor | None) -> Tensor:
    """(B,) float64 means of (B, C, H, W) values, of those in the mask if there is one."""
    values = values.double().mean(dim=1)
    if mask is None:
        return values.mean(dim=(1, 2))
    return (values * mask).sum(dim=(1, 2)) / mask.sum(dim=(1, 2)).clamp_min(1)

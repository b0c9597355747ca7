"""Try every edit on test images with one system, measure it against doing without a prior, and lay the results out."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tessera import seeding
from tessera.artifacts import bit_depth, pictures
from tessera.artifacts import folder as artifact
from tessera.artifacts import images as image_artifact
from tessera.artifacts.images import to_float, to_uint8
from tessera.artifacts.shards import ShardWriter, spread
from tessera.components import load, sets
from tessera.contracts import Job
from tessera.editing.trial import Trial
from tessera.evaluation.edited import EditMetrics
from tessera.evaluation.figures import Recorder
from tessera.nn.precision import slowness
from tessera.params import Pipeline
from tessera.system import CannotEdit, System

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
    system = System.read(tokenizer, prior, name).computing_in(sampling.precision)
    if told := slowness(sampling.precision, system.device):
        job.say(told)
    recorded = sampling.model_dump(include={"precision"})
    rows = spread(len(splits["test"]), settings.num_images)  # files often lie by class
    originals = to_float(splits["test"].uint8(rows))
    labels = torch.from_numpy(splits["test"].labels[rows].astype(np.int64))
    found, shown, refused = Recorder(), [], {}
    metrics_of = EditMetrics(found, features, reference, list(params.features), spec.name, settings.num_seeds)
    if sets(spec, "bits"):
        metrics_of.bits = spec.bits
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
            metrics_of.record(edit, originals, trials)
            first = trials[0]
            with ShardWriter(place, edit) as writer:
                writer.append(to_uint8(first.edited).cpu().numpy())
            if sets(spec, "bits"):
                _write_16_bits(place, edit, bit_depth.stored(first.edited, spec))
            shown += [to_uint8(each[:SHOWN]).cpu().numpy() for each in (originals, first.given, first.edited)]
            job.say(f"{edit}  " + "  ".join(f"{key} {one.value:.3f}" for key, one in found.groups[edit].items()))
        artifact.write_json(
            place / "meta.json",
            {
                "rows": rows.tolist(),
                "edits": {edit: config.model_dump(mode="json") for edit, config in params.edits.items()},
                "refused": refused,
                **recorded,
                "tokenizer_fingerprint": artifact.fingerprint(tokenizer),
                "prior_fingerprint": artifact.fingerprint(prior),
            },
        )
    found.measured({"refused": refused, **recorded}).write(metrics)
    nothing = np.zeros((SHOWN, *originals.shape[1:]), np.uint8)
    pictures.save_grid(picture, np.concatenate(shown or [nothing]), min(SHOWN, len(rows)))
    job.attach(picture, "edits.png")


def _write_16_bits(place: Path, edit: str, images: Tensor) -> None:
    """In the place of the shards of 8 bits, which have the same names, and are no more as their rows are smaller."""
    with ShardWriter(place, edit) as writer:
        writer.append(images.cpu().numpy())


def _try(
    params: Pipeline, edit: str, images: Tensor, labels: Tensor, system: System, sampling: Any, seed: int, job: Job
) -> Trial:
    config, size = params.edits[edit], params.edit_images.batch_size
    starts, parts = range(0, len(images), size), []
    for start in job.track(starts, len(starts), edit):
        generator = seeding.generator(params.seed, "edit_images", edit, seed, start, device=system.device)
        given = (each[start : start + size].to(system.device) for each in (images, labels))
        parts.append(load("edits", config.kind).trial(*given, system, config, sampling, generator))
    return Trial.joined(parts)

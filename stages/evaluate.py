"""Judge the samples of one system against the test images; `real` judges training images instead, the floor."""

from pathlib import Path

import numpy as np

from tessera import seeding
from tessera.artifacts import folder as artifact
from tessera.artifacts import images as image_artifact
from tessera.artifacts import pictures
from tessera.artifacts.images import Images
from tessera.artifacts.samples import Samples, floor_rows, quotas
from tessera.artifacts.shards import spread
from tessera.contracts import Job
from tessera.evaluation import figures
from tessera.evaluation.figures import Figure, Measured, Recorder
from tessera.evaluation.panel import Panel
from tessera.metrics import copy_rate
from tessera.params import Pipeline

SUSPICIOUS_COPIES = 3 * copy_rate.HELD_OUT_SHARE
SHOWN_SAMPLES, SHOWN_NEIGHBORS = 10, 5


def run(
    params: Pipeline,
    name: str,
    images: Path,
    features: Path,
    reference: Path,
    metrics: Path,
    job: Job,
    samples: Path | None = None,
    tokenizer: Path | None = None,
    prior: Path | None = None,
    tokenizer_metrics: Path | None = None,
    prior_metrics: Path | None = None,
    picture: Path | None = None,
    neighbors: Path | None = None,
) -> None:
    _, splits = image_artifact.read(images)
    found = Recorder()
    panel = Panel(found, params, features, reference)
    if samples is None:
        _floor(panel, params, splits)
        found.measured().write(metrics)
    else:
        drawn = Samples(samples, params.sample_images.num_images)
        parts = {"tokenizer": tokenizer, "prior": prior}
        _require_made_by(drawn, samples, parts)
        kept = panel.distances(drawn.pixels, drawn.labels)
        panel.inception_score(drawn.pixels, splits["test"].spec.channels)
        panel.agreement(drawn.pixels, drawn.labels, "generation", "label_agreement", "samples")
        panel.brightness(drawn.pixels, splits["test"].pixels)
        _copies(panel, drawn, kept, splits["train"], neighbors, job)
        beside = tuple(figures.read(path) for path in (tokenizer_metrics, prior_metrics) if path is not None)
        _gaps(panel, found.measured(drawn.meta, beside))
        measured = found.measured(drawn.meta, beside)
        measured.write(metrics)
        files = {"metrics.json": metrics, "samples.png": picture, "neighbors.png": neighbors}
        job.publish(
            params, name, measured, files, images, {role: path for role, path in parts.items() if path is not None}
        )
    job.say("  ".join(f"{key} {_shown(one)}" for key, one in found.groups["generation"].items()))


def _copies(panel: Panel, drawn: Samples, features: np.ndarray, train: Images, picture: Path, job: Job) -> None:
    """How many samples lie at a training image, and a picture of samples beside their nearest training images."""
    reference, at_most = panel.references[panel.first], panel.settings.max_neighbor_images
    trained, held_out = reference.features("train"), reference.features("test")
    held_out = held_out[spread(len(held_out), at_most)]
    near = copy_rate.nearest(features, trained, min(SHOWN_NEIGHBORS, len(trained)))
    rate = copy_rate.share_of_copies(near.distances, copy_rate.nearest(held_out, trained).distances)
    protocol = reference.protocol_of("train", "samples", len(features), len(trained), held_out=copy_rate.HELD_OUT_SHARE)
    panel.found.add_share("generation", "copy_rate", rate, protocol)
    if rate > SUSPICIOUS_COPIES:
        job.say(
            f"ALARM: {rate:.0%} of the samples lie nearer to a training image than all but {copy_rate.HELD_OUT_SHARE:.0%} of "
            f"the test images do: the prior has learned images by heart. See {picture}; train it for fewer steps, on more "
            f"views (encode_tokens.warps), or make it smaller"
        )
    order = np.argsort(near.distances[:, 0].numpy(), kind="stable")  # the most copy-like first
    half = SHOWN_SAMPLES // 2
    shown = np.concatenate([order[:half], order[np.linspace(half, len(order) - 1, SHOWN_SAMPLES - half).astype(int)]])
    rows = reference.feature_rows("train")[near.rows.numpy()[shown]]  # (SHOWN_SAMPLES, k) of the training images
    of_samples = spread(len(drawn), at_most)[shown]
    originals = train.pixels.gather(rows.ravel()).reshape(*rows.shape, *drawn.pixels.row_shape)
    beside = np.concatenate([drawn.pixels.gather(of_samples)[:, None], originals], axis=1)
    pictures.save_grid(picture, beside.reshape(-1, *beside.shape[2:]), beside.shape[1])
    job.attach(picture, "neighbors.png")


def _floor(panel: Panel, params: Pipeline, splits: dict[str, Images]) -> None:
    """Training images in the place of samples, and one half of the training images against the other."""
    train, test, number = splits["train"], splits["test"], params.sample_images.num_images
    rows = floor_rows(train.labels, train.spec.num_classes, number, params.seed)
    panel.distances(train.pixels, train.labels[rows], rows)
    panel.brightness(train.pixels, test.pixels, rows)
    first, second = halves(train.labels, number, params.seed)
    panel.between(train.pixels, train.labels, first, second, "training images of one half")
    panel.agreement(test.pixels, test.labels, "floor", "test_accuracy", "test images")


def halves(labels: np.ndarray, at_most: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Rows of two disjoint sets of equal size and equal numbers of each class, at most at_most images each.

    Unequal class shares alone would set two halves apart.
    """
    generator = seeding.numpy_generator(seed, "halves")
    members = [np.flatnonzero(labels == label) for label in np.unique(labels)]
    number = min(at_most, sum(len(some) // 2 for some in members))
    wanted = quotas(number, tuple(len(some) // 2 for some in members))
    shuffled = [generator.permutation(some) for some in members]
    first = [some[:count] for some, count in zip(shuffled, wanted, strict=True)]
    second = [some[count : 2 * count] for some, count in zip(shuffled, wanted, strict=True)]
    return np.sort(np.concatenate(first)), np.sort(np.concatenate(second))


def _gaps(panel: Panel, measured: Measured) -> None:
    """How much worse samples are than reconstructions of the test images, by each judge."""
    for judge in panel.judges.values():
        generated, reconstructed = measured.figure(judge.frechet_name), measured.figure(f"r{judge.frechet_name}")
        if reconstructed is None:
            continue
        errors = (generated.standard_error, reconstructed.standard_error)
        error = None if None in errors else float(np.hypot(*errors))
        settings = {"reconstructions": reconstructed.num_images}
        protocol = measured.protocols[generated.protocol].model_copy(update={"settings": settings})
        gap = generated.value - reconstructed.value
        panel.found.add("generation", f"gap_{judge.frechet_name}", gap, protocol, error)


def _require_made_by(drawn: Samples, samples: Path, parts: dict[str, Path | None]) -> None:
    """Raise unless the samples were drawn from these artifacts: figures of others would be told of them."""
    for role, path in parts.items():
        if path is not None and artifact.fingerprint(path) != drawn.meta[f"{role}_fingerprint"]:
            raise ValueError(
                f"{samples} was drawn from another {role} ({drawn.meta[f'{role}_fingerprint'][:12]}) than {path} "
                f"({artifact.fingerprint(path)[:12]}). Draw the samples again: dvc repro sample_images@{samples.name}"
            )


def _shown(figure: Figure) -> str:
    error = "" if figure.standard_error is None else f" +- {figure.standard_error:.2g}"
    return f"{figure.value:.4g}{error}"

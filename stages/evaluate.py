"""Judge the samples of one system against the test images; `real` judges training images instead, the floor.

    python -m stages.evaluate vqgan-flow --images data/images --features data/features --reference data/reference \
        --samples data/samples/vqgan-flow --tokenizer data/tokenizers/vqgan --prior data/priors/vqgan-flow \
        --tokenizer-metrics data/metrics/tokenizers/vqgan.json \
        --prior-metrics data/metrics/priors/vqgan-flow.json --picture data/pictures/samples/vqgan-flow.png \
        --neighbors data/pictures/neighbors/vqgan-flow.png --metrics data/metrics/systems/vqgan-flow.json
    python -m stages.evaluate real --images data/images --features data/features --reference data/reference \
        --metrics data/metrics/systems/real.json
"""

import hashlib
import json
from pathlib import Path

import numpy as np
import torch

from tessera import figures, pictures, provenance, seeding, stage_process
from tessera.artifacts import folder as artifact
from tessera.artifacts import images as image_artifact
from tessera.artifacts.images import Images
from tessera.artifacts.reference import Reference
from tessera.artifacts.samples import Samples, floor_rows, quotas
from tessera.artifacts.shards import Shards
from tessera.figures import Figure, Measured, Recorder
from tessera.judge import Judge, in_batches, spread
from tessera.metrics import brightness, copy_rate, frechet, inception_score, kernel, precision_recall
from tessera.params import Evaluate, Pipeline
from tessera.tracking import journal

PRECISION_NEIGHBORS, DENSITY_NEIGHBORS = 3, 5  # those of the papers
SUSPICIOUS_COPIES = 3 * copy_rate.HELD_OUT_SHARE
SHOWN_SAMPLES, SHOWN_NEIGHBORS = 10, 5


def run(
    params: Pipeline,
    name: str,
    images: Path,
    features: Path,
    reference: Path,
    metrics: Path,
    job: stage_process.Job,
    samples: Path | None = None,
    tokenizer: Path | None = None,
    prior: Path | None = None,
    tokenizer_metrics: Path | None = None,
    prior_metrics: Path | None = None,
    picture: Path | None = None,
    neighbors: Path | None = None,
) -> None:
    judges = {network: Judge.read(features / network, network) for network in params.features}
    references = {network: Reference(reference / network) for network in params.features}
    _, splits = image_artifact.read(images)
    found = Recorder()
    if samples is None:
        _floor(found, params, judges, references, splits)
        found.measured().write(metrics)
    else:
        drawn = Samples(samples, params.sample_images.num_images)
        parts = {"tokenizer": tokenizer, "prior": prior}
        _require_made_by(drawn, samples, parts)
        kept = _judge(found, params, judges, references, drawn, splits["test"].spec.channels, job)
        main = next(iter(judges))
        _brightness(found, references[main], drawn.pixels, None, splits["test"].pixels)
        _copies(found, params.evaluate, references[main], drawn, kept, splits["train"], neighbors, job)
        beside = tuple(figures.read(path) for path in (tokenizer_metrics, prior_metrics) if path is not None)
        measured = found.measured(drawn.meta, beside)
        _gaps(found, judges, measured)
        measured = found.measured(drawn.meta, beside)
        measured.write(metrics)
        files = {"metrics.json": metrics, "samples.png": picture, "neighbors.png": neighbors}
        publish(params, name, measured, files, images, {role: path for role, path in parts.items() if path is not None})
    job.say("  ".join(f"{key} {_shown(one)}" for key, one in found.groups["generation"].items()))


def _judge(
    found: Recorder,
    params: Pipeline,
    judges: dict[str, Judge],
    references: dict[str, Reference],
    drawn: Samples,
    channels: int,
    job: stage_process.Job,
) -> np.ndarray:
    """Every figure of samples against test images. Returns the features of some samples by the first judge."""
    first = None
    for network, judge in judges.items():
        kept = _distances(found, params, judge, references[network], drawn.pixels, drawn.labels, None, "samples")
        if first is None:
            first = kept
            _neighborhoods(found, params.evaluate, references[network], kept, "samples")
        if channels == 3 and hasattr(judge.model, "class_logits"):  # of photographs; of gray digits it means nothing
            score = inception_score.score(judge.class_logits(drawn.pixels))
            protocol = references[network].protocol_of("test", "samples", len(drawn), 0, num_splits=10)
            found.add("generation", "inception_score", score.inception_score, protocol, score.standard_error)
    judge_of_labels = next(((network, one) for network, one in judges.items() if one.has_logits), None)
    if judge_of_labels is not None:
        network, judge = judge_of_labels
        agrees = judge.agrees(drawn.pixels, drawn.labels)
        protocol = references[network].protocol_of("test", "samples", len(drawn), 0)
        found.add_share("generation", "label_agreement", float(agrees.mean()), protocol)
    return first


def _distances(
    found: Recorder,
    params: Pipeline,
    judge: Judge,
    reference: Reference,
    pixels: Shards,
    labels: np.ndarray,
    rows: np.ndarray | None,
    what: str,
) -> np.ndarray:
    """Fréchet and kernel distance of images to the test images. Returns at most max_neighbor_images rows of features."""
    settings, other = params.evaluate, reference.moments("test")
    summary = judge.summary(pixels, settings.max_neighbor_images, rows)
    features, number = summary.features, len(labels)
    influences = frechet.influence(features, summary.moments, other)
    error = frechet.standard_error(influences, labels[summary.kept], number)
    distance = frechet.distance(summary.moments, other)
    found.add("generation", judge.frechet_name, distance, reference.protocol("test", what, number), error)
    others = reference.features("test")
    smaller = min(len(features), len(others))
    if settings.kernel_subset > smaller:
        raise ValueError(
            f"evaluate.kernel_subset {settings.kernel_subset} is larger than the {smaller} images at hand ({len(features)} "
            f"{what}, {len(others)} test images): lower it, or raise sample_images.num_images"
        )
    generator = seeding.numpy_generator(params.seed, "kernel_subsets")
    kernel_distance = kernel.distance(features, others, generator, settings.kernel_subset, settings.num_kernel_subsets)
    subsets = {"subset": settings.kernel_subset, "num_subsets": settings.num_kernel_subsets}
    protocol = reference.protocol_of("test", what, len(features), len(others), **subsets)
    found.add("generation", judge.kernel_name, kernel_distance.mean, protocol, kernel_distance.standard_error)
    return features


def _neighborhoods(found: Recorder, settings: Evaluate, reference: Reference, features: np.ndarray, what: str) -> None:
    """Precision and recall, density and coverage of at most max_neighbor_images images on either side."""
    others = reference.features("test")
    others = others[spread(len(others), settings.max_neighbor_images)]

    def protocol(number: int) -> figures.Protocol:
        return reference.protocol_of("test", what, len(features), len(others), neighbors=number)

    near = precision_recall.precision_recall(others, features, PRECISION_NEIGHBORS)
    found.add_share("generation", "precision", near.precision, protocol(PRECISION_NEIGHBORS))
    found.add_share("generation", "recall", near.recall, protocol(PRECISION_NEIGHBORS), of=len(others))
    dense = precision_recall.density_coverage(others, features, DENSITY_NEIGHBORS)
    found.add("generation", "density", dense.density, protocol(DENSITY_NEIGHBORS), dense.density_standard_error)
    found.add_share("generation", "coverage", dense.coverage, protocol(DENSITY_NEIGHBORS), of=len(others))


def _brightness(found: Recorder, reference: Reference, pixels: Shards, rows: np.ndarray | None, others: Shards) -> None:
    """How much brighter the rows of pixels are than the test images, in gray levels."""
    levels = [
        torch.cat([brightness.levels(batch) for batch in in_batches(*some)])
        for some in ((pixels, rows), (others, None))
    ]
    shift = brightness.shift(*levels)
    protocol = reference.protocol("test", "samples", len(levels[0]))
    without = {"network": "none", "network_sha256": "", "resize": "none", "dtype": "float64"}
    found.add("generation", "brightness_shift", shift.value, protocol.model_copy(update=without), shift.standard_error)


def _copies(
    found: Recorder,
    settings: Evaluate,
    reference: Reference,
    drawn: Samples,
    features: np.ndarray,
    train: Images,
    picture: Path,
    job: stage_process.Job,
) -> None:
    """How many samples lie at a training image, and a picture of samples beside their nearest training images."""
    trained, held_out = reference.features("train"), reference.features("test")
    held_out = held_out[spread(len(held_out), settings.max_neighbor_images)]
    near = copy_rate.nearest(features, trained, min(SHOWN_NEIGHBORS, len(trained)))
    rate = copy_rate.share_of_copies(near.distances, copy_rate.nearest(held_out, trained).distances)
    protocol = reference.protocol_of("train", "samples", len(features), len(trained), held_out=copy_rate.HELD_OUT_SHARE)
    found.add_share("generation", "copy_rate", rate, protocol)
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
    of_samples = spread(len(drawn), settings.max_neighbor_images)[shown]
    originals = train.pixels.gather(rows.ravel()).reshape(*rows.shape, *drawn.pixels.row_shape)
    beside = np.concatenate([drawn.pixels.gather(of_samples)[:, None], originals], axis=1)
    pictures.save_grid(picture, beside.reshape(-1, *beside.shape[2:]), beside.shape[1])
    job.attach(picture, "neighbors.png")


def _floor(
    found: Recorder,
    params: Pipeline,
    judges: dict[str, Judge],
    references: dict[str, Reference],
    splits: dict[str, Images],
) -> None:
    """Training images in the place of samples, and one half of the training images against the other."""
    train, test = splits["train"], splits["test"]
    rows = floor_rows(train.labels, train.spec.num_classes, params.sample_images.num_images, params.seed)
    first, second = halves(train.labels, params.sample_images.num_images, params.seed)
    for number, (network, judge) in enumerate(judges.items()):
        reference = references[network]
        kept = _distances(found, params, judge, reference, train.pixels, train.labels[rows], rows, "samples")
        if number == 0:
            _neighborhoods(found, params.evaluate, reference, kept, "samples")
            _brightness(found, reference, train.pixels, rows, test.pixels)
        one, other = (
            judge.summary(train.pixels, params.evaluate.max_neighbor_images, rows) for rows in (first, second)
        )
        influences = frechet.influence(one.features, one.moments, other.moments)
        error = frechet.standard_error(influences, train.labels[first][one.kept], len(first))
        distance = frechet.distance(one.moments, other.moments)
        protocol = reference.protocol_of("train", "training images of one half", len(first), len(second))
        name = f"halves_{judge.frechet_name}"
        found.add("floor", name, distance, protocol, error)
        if judge.has_logits:
            agrees = judge.agrees(test.pixels, test.labels)
            protocol = reference.protocol_of("test", "test images", len(test), 0)
            found.add_share("floor", "test_accuracy", float(agrees.mean()), protocol)


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


def _gaps(found: Recorder, judges: dict[str, Judge], measured: Measured) -> None:
    """How much worse samples are than reconstructions of the test images, by each judge."""
    for judge in judges.values():
        generated, reconstructed = measured.figure(judge.frechet_name), measured.figure(f"r{judge.frechet_name}")
        if reconstructed is None:
            continue
        protocol = measured.protocols[generated.protocol]
        errors = (generated.standard_error, reconstructed.standard_error)
        error = None if None in errors else float(np.hypot(*errors))
        gap = generated.value - reconstructed.value
        settings = {"reconstructions": reconstructed.num_images}
        found.add(
            "generation", f"gap_{judge.frechet_name}", gap, protocol.model_copy(update={"settings": settings}), error
        )


def _require_made_by(drawn: Samples, samples: Path, parts: dict[str, Path | None]) -> None:
    """Raise unless the samples were drawn from these artifacts: figures of others would be told of them."""
    for role, path in parts.items():
        if path is not None and artifact.fingerprint(path) != drawn.meta[f"{role}_fingerprint"]:
            raise ValueError(
                f"{samples} was drawn from another {role} ({drawn.meta[f'{role}_fingerprint'][:12]}) than {path} "
                f"({artifact.fingerprint(path)[:12]}). Draw the samples again: dvc repro sample_images@{samples.name}"
            )


def publish(
    params: Pipeline,
    name: str,
    measured: Measured,
    files: dict[str, Path | None],
    images: Path,
    parts: dict[str, Path],
) -> None:
    """The one run per system that people compare in the tracker: both stages' params, all figures, the pictures.

    With both artifacts it is also offered to the registry of models.
    """
    experiment = f"tessera-{params.dataset.name}"
    described = params.describe(f"system@{name}")
    tags = {"tessera.system": name, **_protocol_tags(measured), **provenance.tags(stage_process.ROOT, parts)}
    with journal.open_run(
        name,
        experiment=experiment,
        root=stage_process.ROOT,
        state=None,
        params=described.params,
        tags=described.tags | tags,
        settings=described.settings,
        kind="system",
    ) as run:
        stage_process.track_dataset(run, params.dataset.name, images, "evaluation")
        for group, some in measured.groups.items():
            run.figures({f"{group}/{key}": one.value for key, one in some.items()})
            if group == "generation":  # what differences between systems are weighed by
                errors = {key: one.standard_error for key, one in some.items() if one.standard_error is not None}
                run.figures({f"{group}/{key}_standard_error": error for key, error in errors.items()})
        for file_name, file in files.items():
            if file is not None:
                run.attach(file, file_name)
        run.attach_json(described.settings, "params.json")
        run.attach_json({key: one.model_dump() for key, one in measured.protocols.items()}, "protocol.json")
        prints = {role: artifact.fingerprint(path) for role, path in parts.items()}
        run.made_by(prints)
        if len(parts) == 2:
            sampling = params.sampling(name).model_dump(mode="json")
            digest = hashlib.sha256(json.dumps([prints, sampling], sort_keys=True).encode()).hexdigest()
            run.offer_model(experiment, parts, prints, sampling, digest)


def _protocol_tags(measured: Measured) -> dict[str, str]:
    """What must be equal where figures of samples are compared: the main distance's protocol, and one short hash of all."""
    of_samples = {key: measured.protocol(key).model_dump() for key in measured.groups["generation"]}
    main = next(iter(of_samples.values()))
    digest = hashlib.sha256(json.dumps(of_samples, sort_keys=True).encode()).hexdigest()[:12]
    shown = ("num_images", "reference_split", "num_reference_images", "network", "dtype")
    return {"protocol": digest, **{f"protocol.{key}": str(main[key]) for key in shown}}


def _shown(figure: Figure) -> str:
    error = "" if figure.standard_error is None else f" +- {figure.standard_error:.2g}"
    return f"{figure.value:.4g}{error}"


if __name__ == "__main__":
    stage_process.main(run)

"""Judge the samples of one system against the test images; `real` judges training images instead, the floor.

    python -m stages.evaluate vqgan-flow --samples data/samples/vqgan-flow --features data/features \
        --tokenizer-metrics data/metrics/tokenizers/vqgan.json \
        --picture data/pictures/samples/vqgan-flow.png --metrics data/metrics/systems/vqgan-flow.json
    python -m stages.evaluate real --images data/images --features data/features --metrics data/metrics/systems/real.json
"""

from pathlib import Path
from typing import Any

import numpy as np

from tessera import seeding, stage_process
from tessera.artifacts import folder as artifact
from tessera.artifacts import images as image_artifact
from tessera.artifacts.images import Images
from tessera.artifacts.samples import Samples, quotas
from tessera.judge import Judge
from tessera.metrics import copy_rate, frechet, kernel, precision_recall
from tessera.params import Pipeline
from tessera.tracking import journal


def run(
    params: Pipeline,
    name: str,
    features: Path,
    metrics: Path,
    job: stage_process.Job,
    samples: Path | None = None,
    tokenizer_metrics: Path | None = None,
    picture: Path | None = None,
    images: Path | None = None,
) -> None:
    judge, reference, features_fingerprint = Judge.read(features)
    settings = params.evaluate
    if samples is not None:
        drawn_samples = Samples(samples)
        pixels, rows, drawn = drawn_samples.pixels, np.arange(len(drawn_samples)), drawn_samples.meta
        labelled = (pixels, drawn_samples.labels)
    elif images is not None:
        _, splits = image_artifact.read(images)
        train, test = splits["train"], splits["test"]
        pixels, rows, drawn = train.pixels, floor_rows(train, params), {"source": "train"}
        labelled = (test.pixels, test.labels)  # agreement is the classifier's accuracy on images it was not trained on
    else:
        raise ValueError("nothing to judge: give --samples of a system, or --images for the floor")
    found = judge.features(pixels, rows)
    subset = min(settings.kernel_subset, len(found), len(reference))
    generator = seeding.numpy_generator(params.seed, "kernel_subsets")
    kernel_distance = kernel.distance(found, reference, generator, subset, settings.num_kernel_subsets)
    figures = {
        judge.frechet_name: frechet.distance(frechet.moments(found), frechet.moments(reference)),
        judge.kernel_name: kernel_distance.mean,
        f"{judge.kernel_name}_standard_error": kernel_distance.standard_error,
        **precision_recall.precision_recall(reference, found)._asdict(),
        **precision_recall.density_coverage(reference, found)._asdict(),
        "num_images": len(found),
        "num_reference_images": len(reference),
    }
    if samples is not None:  # the floor is made of training images, each of them a copy of itself
        figures["copy_rate"] = copy_rate.copy_rate(found, Judge.train_features(features), reference)
    if judge.has_logits:
        figures["label_agreement"] = judge.agreement(*labelled)
    protocol = {
        "reference": "test",
        "features": judge.config.kind,
        "features_fingerprint": features_fingerprint,
        "kernel_subset": subset,
        "num_kernel_subsets": settings.num_kernel_subsets,
        "samples": drawn,
    }
    groups = {"generation": figures}
    if tokenizer_metrics is not None:
        groups |= artifact.read_json(tokenizer_metrics)
    artifact.write_json(metrics, {**groups, "protocol": protocol})
    if samples is not None:
        publish(params, name, groups, {"metrics.json": metrics, "samples.png": picture})
    job.say("  ".join(f"{key} {value:.4g}" for key, value in figures.items()))


def publish(params: Pipeline, name: str, groups: dict[str, dict[str, Any]], files: dict[str, Path | None]) -> None:
    """The one run per system that people compare in the tracker: both stages' params, all figures, the picture."""
    with journal.open_run(
        name,
        experiment=f"tessera-{params.dataset.name}",
        root=stage_process.ROOT,
        state=None,
        params=params.describe(f"system@{name}"),
        tags={"tessera.system": name},
        kind="system",
    ) as run:
        for group, figures in groups.items():
            numbers = {f"{group}/{key}": value for key, value in figures.items() if not isinstance(value, str)}
            run.figures(numbers)
        for file_name, file in files.items():
            if file is not None:
                run.attach(file, file_name)


def floor_rows(train: Images, params: Pipeline) -> np.ndarray:
    """As many training images as there are samples, with the classes in the same proportions: the best one can hope for."""
    wanted = quotas(params.sample_images.num_images, np.bincount(train.labels, minlength=train.spec.num_classes))
    generator = seeding.numpy_generator(params.seed, "floor")
    rows = []
    for label, count in enumerate(wanted):
        members = np.flatnonzero(train.labels == label)
        if count > len(members):
            raise ValueError(
                f"class {label} has {len(members)} training images, but a floor at the samples' number needs {count}. "
                f"Lower sample_images.num_images to at most {len(train)}"
            )
        rows.append(generator.permutation(members)[:count])
    return np.sort(np.concatenate(rows))


if __name__ == "__main__":
    stage_process.main(run)

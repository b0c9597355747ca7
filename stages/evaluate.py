"""Judge the samples of one system against the test images; `real` judges training images instead, the floor."""

from pathlib import Path

from tessera.artifacts import folder as artifact
from tessera.artifacts import images as image_artifact
from tessera.artifacts.images import Images
from tessera.artifacts.samples import Samples
from tessera.components import sets
from tessera.contracts import Job
from tessera.evaluation import comparison, figures, told, trial
from tessera.evaluation import neighbors as neighbor_pictures
from tessera.evaluation.figures import Group, Recorder
from tessera.evaluation.panel import Drawn, Floor, Panel, SampleSet, training_images
from tessera.params import Pipeline


def run(  # its paths are the options of its command
    params: Pipeline,
    name: str,
    images: Path,
    features: Path,
    reference: Path,
    metrics: Path,
    job: Job,
    summary: Path | None = None,
    samples: Path | None = None,
    tokenizer: Path | None = None,
    prior: Path | None = None,
    tokenizer_metrics: Path | None = None,
    prior_metrics: Path | None = None,
    picture: Path | None = None,
    neighbors: Path | None = None,
) -> None:
    spec, splits = image_artifact.read(images)
    panel, found = Panel(params, features, reference, splits), Recorder()
    group = found.group("generation")
    if samples is None:
        _real(panel, params, splits, found, group)
        if sets(params.dataset, "metadata"):
            told.measure_real(panel, images, splits, params.sample_images.num_images, group)
        measured = found.measured()
        for sentence in trial.sentences(measured):
            job.say(f"ALARM: {sentence}")
        measured.write(metrics)
    else:
        drawn = Samples(samples, spec, params.sample_images.num_images)
        parts = {"tokenizer": tokenizer, "prior": prior}
        _require_made_by(drawn, samples, parts)
        beside = tuple(figures.read(path) for path in (tokenizer_metrics, prior_metrics) if path is not None)
        seen = SampleSet(panel, Drawn(drawn.pixels, drawn.labels), splits, beside)
        panel.measure("of_samples", seen, group)
        if sets(params.dataset, "metadata"):
            told.measure_samples(panel, images, drawn, samples, group)
        neighbor_pictures.draw(neighbors, seen, drawn, splits["train"])
        job.attach(neighbors, "neighbors.png")
        for sentence in group.alarms:
            job.say(f"ALARM: {sentence}. Samples beside their nearest training images: {neighbors}")
        measured = found.measured(drawn.meta, beside)
        measured.write(metrics)
        files = {"metrics.json": metrics, "samples.png": picture, "neighbors.png": neighbors}
        job.publish(
            params, name, measured, files, images, {role: path for role, path in parts.items() if path is not None}
        )
    if summary:
        kinds = [config.kind for config in params.evaluate.metrics.values()]
        # Below its name: DVC then heads a column with NAME.fd_classifier in the place of the file and the figure
        artifact.write_json(summary, {name: comparison.summary(measured, kinds)})
    for sentence in group.notes:
        job.say(f"note: {sentence}")
    job.say(
        "  ".join(
            f"{key} {figures.text_with_error(one.value, one.standard_error)}"
            for key, one in found.groups["generation"].items()
        )
    )


def _real(panel: Panel, params: Pipeline, splits: dict[str, Images], found: Recorder, group: Group) -> None:
    """Training images in the place of samples, one half of them against the other, and the trial of each judge."""
    number = params.sample_images.num_images
    seen = SampleSet(panel, training_images(splits["train"], number, params.seed), splits)
    panel.measure("of_samples", seen, group)
    panel.measure("of_real_images", Floor(panel, splits, number), found.group("floor"))
    for name, judge in panel.judges.items():
        trial.measure(judge, panel.references[name], splits["train"], params.seed, found.group("trial"))


def _require_made_by(drawn: Samples, samples: Path, parts: dict[str, Path | None]) -> None:
    """Raise unless the samples were drawn from these artifacts: figures of others would be told of them."""
    for role, path in parts.items():
        if path is not None and artifact.fingerprint(path) != drawn.meta[f"{role}_fingerprint"]:
            raise ValueError(
                f"{samples} was drawn from another {role} ({drawn.meta[f'{role}_fingerprint'][:12]}) than {path} "
                f"({artifact.fingerprint(path)[:12]}). Draw the samples again: dvc repro sample_images@{samples.name}"
            )

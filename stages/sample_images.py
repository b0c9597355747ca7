"""Draw tokens from a prior, decode them, and lay the images out in a picture."""

from pathlib import Path

import numpy as np

from tessera import seeding
from tessera.artifacts import checkpoints, pictures
from tessera.artifacts import folder as artifact
from tessera.artifacts.samples import quotas
from tessera.artifacts.shards import ShardWriter
from tessera.components import sets
from tessera.contracts import Job
from tessera.editing import words
from tessera.nn.precision import slowness
from tessera.params import Pipeline
from tessera.system import System


def run(
    params: Pipeline, name: str, tokenizer: Path, prior: Path, out: Path, picture: Path, job: Job
) -> dict[str, float]:
    settings, sampling = params.sample_images, params.sampling(name)
    system = System.read(tokenizer, prior, name).computing_in(sampling.precision)
    if told := slowness(sampling.precision, system.device):
        job.say(told)
    labels = np.repeat(np.arange(system.spec.num_classes), quotas(settings.num_images, system.spec.class_counts))
    seeding.numpy_generator(params.seed, "sample_labels").shuffle(labels)
    if sets(system.prior.config, "condition"):
        examples = words.examples(prior, settings.num_images, params.seed)
        labels = words.labels_of(examples, labels)
    starts = range(0, len(labels), settings.batch_size)

    def draw(start: int) -> np.ndarray:
        generator = seeding.generator(params.seed, "sample_images", start, device=system.device)
        if sets(system.prior.config, "condition"):
            some = slice(start, start + settings.batch_size)
            return words.draw_examples(system, examples[some], labels[some], sampling, generator)
        return system.draw(labels[start : start + settings.batch_size], sampling, generator)

    drawn, images = job.share(starts, draw), []
    if not job.is_main:
        return {"num_images": sum(map(len, drawn))}
    with artifact.create(out) as place:
        with ShardWriter(place, "images") as writer, ShardWriter(place, "labels") as label_writer:
            for start, pixels in zip(starts, job.track(drawn, len(starts)), strict=True):
                writer.append(pixels)
                label_writer.append(labels[start : start + settings.batch_size])
                if sum(map(len, images)) < 2000:  # enough for the picture, whatever num_images is
                    images.append(pixels)
        shown = np.concatenate(images)
        if sets(system.prior.config, "condition"):
            words.write_told(place, examples)
        artifact.write_json(
            place / "meta.json",
            {
                "num_images": len(labels),
                "seed": params.seed,
                "sampling": sampling.model_dump(mode="json"),
                "weights": "ema",
                "prior_fingerprint": artifact.fingerprint(prior),
                "tokenizer_fingerprint": system.spec.tokenizer_fingerprint,
                **checkpoints.choice(prior),
            },
        )
    pictures.save_grid(picture, pictures.by_class(shown, labels[: len(shown)]), 10)
    if sets(system.prior.config, "condition"):
        words.show(picture, shown, examples, system.prior.config.condition)
    job.attach(picture, "samples.png")
    job.say(f"{len(labels):,} images, {sampling}")
    job.show(picture)
    return {"num_images": len(labels)}

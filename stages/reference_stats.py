"""What a feature network makes of the training and the test images: features, mean and covariance, once for all systems."""

from pathlib import Path

from tessera.artifacts import folder as artifact
from tessera.artifacts import images as image_artifact
from tessera.artifacts.shards import ShardWriter
from tessera.contracts import Job
from tessera.evaluation import reference
from tessera.evaluation.judge import Judge
from tessera.params import Pipeline


def run(params: Pipeline, name: str, images: Path, features: Path, out: Path, job: Job) -> None:
    spec, splits = image_artifact.read(images)
    judge = Judge.read(features, name)
    described = {}
    with artifact.create(out) as place:
        for split, dataset in splits.items():
            summary = judge.summary(dataset.pixels, params.reference_stats.max_features)
            with ShardWriter(place, f"features-{split}") as writer:
                writer.append(summary.stored.float().cpu().numpy())
            reference.write_moments(place / f"{split}.npz", summary.moments)
            described[split] = reference.Split(
                num_images=len(dataset),
                num_features=len(summary.kept),
                sha256=artifact.part_sha256(images, split),
            )
        meta = reference.Described(
            dataset=spec.name,
            network=judge.config.kind,
            network_sha256=judge.weights_sha256,
            resize=judge.model.resize,
            splits=described,
        )
        artifact.write_json(place / "meta.json", meta.model_dump())
    counts = ", ".join(f"{one.num_images:,} {split}" for split, one in described.items())
    job.say(f"{counts} images, {judge.model.feature_dim} features each; wrote {out}")

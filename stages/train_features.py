"""Make a network that judges images: train the classifier, or fix another's weights."""

from pathlib import Path

import torch

from tessera.artifacts import checkpoints
from tessera.artifacts import folder as artifact
from tessera.artifacts import images as image_artifact
from tessera.components import load, sets
from tessera.contracts import Job
from tessera.evaluation import figures
from tessera.evaluation.judge import Judge
from tessera.params import Pipeline
from tessera.training import by_speed, loop, told


def run(params: Pipeline, name: str, images: Path, out: Path, history: Path, metrics: Path, job: Job) -> None:
    spec, splits = image_artifact.read(images)
    config = params.features[name]
    module = load("features", config.kind)
    if sets(config, "captions"):
        splits = told.told_images(config.captions, splits, images)
    is_trained = hasattr(module, "Objective")
    if is_trained:
        torch.manual_seed(config.seed)  # its own: runs of several seeds are measured by one judge
    model = module.Model(config, spec)
    job.say(f"{config.kind} features of {len(splits['train']):,} images on {loop.threads()}")
    job.resumable({"features": config, "images": artifact.fingerprint(images)}, parts=(config,))
    if is_trained:
        objective = module.Objective(model, config)
        model = loop.fit(objective, splits["train"], config.training, seed=config.seed, job=job)
        if model is None:
            return
    elif hasattr(module, "prepare"):
        module.prepare(model, config)
    with artifact.create(out) as place:
        checkpoints.save(place, "features", config, spec, model, job.code_of(config))
        if sets(getattr(config, "training", config), "by_speed"):
            by_speed.write_record(place, job)
    job.keep_history(history)
    found, test = figures.Recorder(), splits["test"]
    protocol = figures.without_network(spec.name, "test images", len(test))
    found.add("features", "feature_dim", model.feature_dim, protocol)
    if model.has_logits:
        agrees = Judge(model, config).agrees(test.pixels, test.labels)
        found.add_share("features", "test_accuracy", float(agrees.mean()), protocol)
        job.say(f"test accuracy {agrees.mean():.4f} on {len(test):,} images")
    found.measured().write(metrics)

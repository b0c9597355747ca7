"""Make the network that judges images (train the classifier, or fix another's weights), and the test images' features.

python -m stages.train_features --images data/images --out data/features \
        --history data/curves/features.csv --metrics data/metrics/features.json
"""

from pathlib import Path

import numpy as np
import torch

from tessera import stage_process, training
from tessera.artifacts import checkpoints
from tessera.artifacts import folder as artifact
from tessera.artifacts import images as image_artifact
from tessera.artifacts.shards import ShardWriter
from tessera.components import load
from tessera.judge import Judge
from tessera.params import Pipeline

TRAIN_FEATURES = 100_000  # at most, of the training images: what samples are searched for copies of


def run(params: Pipeline, images: Path, out: Path, history: Path, metrics: Path, job: stage_process.Job) -> None:
    spec, splits = image_artifact.read(images)
    config = params.features
    module = load("features", config.kind)
    torch.manual_seed(params.seed)
    model = module.Model(config, spec)
    job.say(f"{config.kind} features of {len(splits['train']):,} images on {training.threads()}")
    job.resumable(*checkpoints.identity(config, spec), artifact.fingerprint(images), params.seed)
    if hasattr(module, "Objective"):
        objective = module.Objective(model, config)
        model = training.fit(objective, splits["train"], config.training, seed=params.seed, job=job)
        if model is None:
            return
    elif hasattr(module, "prepare"):
        module.prepare(model, config)
    judge, train, test = Judge(model, config), splits["train"], splits["test"]
    with artifact.create(out) as place:
        checkpoints.save(place, "features", config, spec, model)
        with ShardWriter(place, "reference") as writer:
            writer.append(judge.features(test.pixels).astype(np.float32))
        with ShardWriter(place, "train") as writer:  # evenly spread, if there are more
            rows = np.linspace(0, len(train) - 1, min(len(train), TRAIN_FEATURES)).astype(int)
            writer.append(judge.features(train.pixels, rows).astype(np.float32))
    job.keep_history(history)
    figures = {"num_images": len(test), "feature_dim": judge.model.feature_dim}
    if judge.has_logits:
        figures["test_accuracy"] = judge.agreement(test.pixels, test.labels)
        job.say(f"test accuracy {figures['test_accuracy']:.4f} on {len(test):,} images")
    artifact.write_json(metrics, figures)


if __name__ == "__main__":
    stage_process.main(run)

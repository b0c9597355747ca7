"""Priors that are told no label, led away from an early snapshot of themselves: distance from test images by scale.

    python -m benchmarks.autoguidance --params params.yaml --systems vqgan-flow vqvae-autoregressive \
        --images data/images --features data/features/classifier --reference data/reference/classifier --seeds 0 1 2

Each prior is trained as its params say, but for the label; the tokenizer for `--tokenizer-seconds` of process time.
"""

import argparse
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.state import AcceleratorState

from benchmarks.few_steps import tokenized
from benchmarks.matrix import figures
from tessera import params as all_params
from tessera import seeding
from tessera.artifacts import guides
from tessera.artifacts import images as image_artifact
from tessera.artifacts import tokens as token_artifact
from tessera.artifacts.checkpoints import read_weights
from tessera.artifacts.images import to_uint8
from tessera.artifacts.samples import quotas
from tessera.bases.guide import Guide
from tessera.components import load
from tessera.evaluation.judge import Judge
from tessera.evaluation.reference import Reference
from tessera.running.job import Job
from tessera.training import loop
from tessera.training.snapshot import Snapshot


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("params", "images", "features", "reference"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    parser.add_argument("--systems", nargs="+", required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--snapshot-at", type=float, default=0.25)
    parser.add_argument("--scales", type=float, nargs="+", default=[1.0, 1.3, 1.7, 2.2])
    parser.add_argument("--tokenizer-seconds", type=float, default=10)
    given = parser.parse_args()
    torch.set_num_threads(1)
    pipeline = all_params.read(given.params)
    spec, splits = image_artifact.read(given.images)
    judge, statistics = Judge.read(given.features), Reference(given.reference)
    reference, train_features = statistics.features("test"), statistics.features("train")
    shares = tuple(np.bincount(splits["train"].labels, minlength=spec.num_classes).tolist())
    labels = torch.from_numpy(np.repeat(np.arange(spec.num_classes), quotas(pipeline.sample_images.num_images, shares)))
    print("| system | seed | scale | " + judge.frechet_name + " | precision | recall |")
    print("| --- " * 6 + "|")
    for name in given.systems:
        system = pipeline.systems[name]
        part = load("priors", system.prior.kind)
        for seed in given.seeds:
            tokenizer, tokens, data = tokenized(pipeline, system, spec, splits["train"], shares, given, seed)
            model = trained(part, system.prior, tokens, data, given.snapshot_at, seed)
            for scale in given.scales:
                sampling = pipeline.sampling(name).model_copy(
                    update={"guidance_scale": 1.0, "autoguidance_scale": None if scale == 1 else scale}
                )
                drawn = model.sample(labels, sampling, seeding.generator(seed, "sample_images"))
                with torch.no_grad():
                    if part.LEARNS == "indices":
                        images = tokenizer.decode_indices(drawn)
                    else:
                        images = tokenizer.decode(token_artifact.unstandardize(drawn, tokens))
                pixels = to_uint8(images).numpy()
                found = figures(judge, reference, pixels, labels.numpy(), train_features)
                print(
                    f"| {name} | {seed} | {scale:g} | {found[judge.frechet_name]:.3f} | {found['precision']:.3f} "
                    f"| {found['recall']:.3f} |",
                    flush=True,
                )


def trained(part: Any, config: Any, spec: Any, data: Any, snapshot_at: float, seed: int) -> torch.nn.Module:
    """The prior without labels, and with its snapshot as the guide."""
    config = config.model_copy(update={"is_conditional": False, "guide": Guide(snapshot_at=snapshot_at)})
    torch.manual_seed(seed)
    with tempfile.TemporaryDirectory() as folder:
        AcceleratorState._reset_state(reset_partial_state=True)  # parts of both precisions train in this process
        job = Job(f"{config.kind} without labels", Path(folder))
        job.resumable()
        snapshot = Snapshot(config, None, job)
        objective = part.Objective(part.Model(config, spec), config)
        model = loop.fit(objective, data, config.training, seed=seed, job=job, validation=snapshot)
        guide = part.Model(config, spec)
        guide.load_state_dict(read_weights(snapshot.folder / guides.GUIDE))
    model.guide = guide.eval()
    return model


if __name__ == "__main__":
    main()

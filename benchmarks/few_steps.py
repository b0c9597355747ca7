"""A flow map beside the flow of the same network, by calls: distance from test images, and images a second.

    python -m benchmarks.few_steps --params params.yaml --system vqgan-flow --images data/images \
        --features data/features/classifier --reference data/reference/classifier --seconds 40

`--seconds` is the process time, on one thread, in which each prior trains, on the same tokens of one tokenizer. The flow is
the system's own; the map has its denoiser and its training. The flow draws with ten steps of Heun, 19 calls, and with fewer.
"""

import argparse
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.matrix import Views, described, encoded, figures, fitted
from tessera import params as all_params
from tessera import seeding
from tessera.artifacts import images as image_artifact
from tessera.artifacts import tokens as token_artifact
from tessera.artifacts.images import to_uint8
from tessera.artifacts.samples import quotas
from tessera.components import load
from tessera.evaluation.judge import Judge
from tessera.evaluation.reference import Reference
from tessera.priors import flow_map, flow_matching

FLOW_STEPS, MAP_STEPS = (10, 4, 2, 1), (4, 2, 1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("params", "images", "features", "reference"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    parser.add_argument("--system", required=True, help="one whose prior is flow_matching")
    parser.add_argument("--seconds", type=float, default=40)
    parser.add_argument("--map-seconds", type=float, help="if the map trains longer or shorter than the flow")
    parser.add_argument("--tokenizer-seconds", type=float, default=10)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--guidance", type=float, nargs="+", default=[1.0, 1.4])
    given = parser.parse_args()
    torch.set_num_threads(1)
    pipeline = all_params.read(given.params)
    system = pipeline.systems[given.system]
    spec, splits = image_artifact.read(given.images)
    judge, statistics = Judge.read(given.features), Reference(given.reference)
    reference, train_features = statistics.features("test"), statistics.features("train")
    shares = tuple(np.bincount(splits["train"].labels, minlength=spec.num_classes).tolist())
    labels = np.repeat(np.arange(spec.num_classes), quotas(pipeline.sample_images.num_images, shares))
    same = {"denoiser": system.prior.denoiser, "num_views": system.prior.num_views, "training": system.prior.training}
    mapped = flow_map.Config(**same)
    print("| prior | seed | steps | guidance | images/s | agreement | " + judge.frechet_name + " | recall |")
    print("| --- " * 8 + "|")
    for seed in given.seeds:
        tokenizer, tokens, data = tokenized(pipeline, system, spec, splits["train"], shares, given, seed)
        for prior, part, seconds, steps in (
            (system.prior, flow_matching, given.seconds, FLOW_STEPS),
            (mapped, flow_map, given.map_seconds or given.seconds, MAP_STEPS),
        ):
            model, _ = fitted(part, prior, tokens, data, seconds, seed)
            for number in steps:
                for scale in given.guidance:
                    sampling = part.Sampling(num_steps=number, guidance_scale=scale)
                    began = time.process_time()
                    drawn = model.sample(torch.from_numpy(labels), sampling, seeding.generator(seed, "sample_images"))
                    speed = len(labels) / (time.process_time() - began)
                    with torch.no_grad():
                        pixels = to_uint8(tokenizer.decode(token_artifact.unstandardize(drawn, tokens))).numpy()
                    found = figures(judge, reference, pixels, labels, train_features)
                    print(
                        f"| {prior.kind} | {seed} | {number} | {scale:g} | {speed:.0f} | {found['label_agreement']:.3f} "
                        f"| {found[judge.frechet_name]:.3f} | {found['recall']:.3f} |",
                        flush=True,
                    )


def tokenized(pipeline: Any, system: Any, spec: Any, train: Any, shares: Any, given: Any, seed: int) -> Any:
    """A tokenizer, trained if it is to be, what describes its tokens, and these, as the system's prior learns them."""
    config = pipeline.tokenizers[system.tokenizer]
    module = load("tokenizers", config.kind)
    if hasattr(module, "Objective"):
        tokenizer, _ = fitted(module, config, spec, train, given.tokenizer_seconds, seed)
    else:
        tokenizer = module.Model(config, spec).eval()
    indices, latents, _ = encoded(tokenizer, train, pipeline.encode_tokens, seed)
    tokens = described(tokenizer, latents, shares)
    latents = token_artifact.standardize(latents.flatten(0, 1), tokens).view_as(latents)
    seen = indices if load("priors", system.prior.kind).LEARNS == "indices" else latents
    views = seen[:, : system.prior.num_views or seen.shape[1]]
    return tokenizer, tokens, Views(views, torch.from_numpy(train.labels))


if __name__ == "__main__":
    main()

"""Every system of a params file at one equal budget of CPU seconds, by one judge, over several seeds.

    python -m benchmarks.matrix --params presets/mnist.yaml --images data/images --features data/features/classifier \
        --reference data/reference/classifier --seconds 150

The budget holds what an image costs to learn: training of both stages and encoding, in process time of one thread, the
images encoded once for all systems of a tokenizer. Sampling and judging are not counted. Learning rates end with the
training, so the number of steps is fixed before, from the pace of the first ones; the seconds in the table are those used.
What `compile: true` costs is a part of the budget: run it with TORCHINDUCTOR_COMPILE_THREADS=1, so that the compiler is a
child of this process, and TORCHINDUCTOR_FORCE_DISABLE_CACHES=1, so that nothing is left of an earlier run.
"""

import argparse
import json
import os
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from accelerate.state import AcceleratorState

from tessera import params as all_params
from tessera import seeding
from tessera.artifacts import images as image_artifact
from tessera.artifacts import tokens as token_artifact
from tessera.artifacts.images import Images, to_float, to_uint8
from tessera.artifacts.samples import floor_rows, quotas
from tessera.components import load
from tessera.contracts import TokenBatch, TokenSpec
from tessera.evaluation.judge import Judge
from tessera.evaluation.reference import Reference
from tessera.metrics import copy_rate, frechet, precision_recall
from tessera.running.job import Job
from tessera.training import loop, views

WARM_STEPS, PACED_STEPS = 5, 60


class Views:
    """Tokens in memory, (N, V, ...) with a label each."""

    def __init__(self, tokens: torch.Tensor, labels: torch.Tensor):
        self.tokens, self.labels = tokens, labels

    def __len__(self) -> int:
        return len(self.labels)

    def stored(self, rows: torch.Tensor, generator: torch.Generator | None = None) -> TokenBatch:
        view = torch.randint(self.tokens.shape[1], (len(rows),), generator=generator)
        return TokenBatch(self.tokens[rows, view], self.labels[rows])

    def batch_of(self, stored: TokenBatch) -> TokenBatch:
        return stored


def fitted(module: Any, config: Any, spec: Any, data: Any, seconds: float, seed: int) -> tuple[torch.nn.Module, float]:
    """The model of a part trained for about `seconds` of process time, and the seconds that it took."""

    def run(num_steps: int) -> tuple[Any, float]:
        settings = config.training.model_copy(update={"num_steps": num_steps})
        sized = config.model_copy(update={"training": settings})
        if hasattr(config, "discriminator_start_step"):  # at the same share of a shorter or longer training
            begin = config.discriminator_start_step * num_steps // config.training.num_steps
            sized = sized.model_copy(update={"discriminator_start_step": begin})
        torch.manual_seed(seed)
        objective = module.Objective(module.Model(sized, spec), sized)
        with tempfile.TemporaryDirectory() as folder:
            AcceleratorState._reset_state(reset_partial_state=True)  # parts of both precisions train in this process
            job = Job(f"{config.kind} {num_steps}", Path(folder))
            job.checkpoint_seconds = float("inf")
            job.resumable()
            began = used()
            model = loop.fit(objective, data, settings, seed=seed, job=job)
            return model, used() - began

    _, first = run(WARM_STEPS)  # with what happens once, such as imports, and compiling
    _, warm = run(WARM_STEPS)
    _, paced = run(WARM_STEPS + PACED_STEPS)
    assert paced > warm, (paced, warm)
    once = first - warm if config.training.compile else 0.0
    model, trained = run(int((seconds - once) * PACED_STEPS / (paced - warm)))
    return model, trained + once


def used() -> float:
    """CPU seconds of this process and of its children that have ended, such as compilers."""
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


@torch.no_grad()
def encoded(model: Any, train: Images, settings: Any, seed: int) -> tuple[Any, torch.Tensor, float]:
    """Indices (N, V, ...) or None, latents (N, V, ...), and the seconds of it."""
    began = time.process_time()
    indices, latents = [], []
    for start in range(0, len(train), settings.batch_size):
        rows = np.arange(start, min(start + settings.batch_size, len(train)))
        batch = to_float(train.uint8(rows))
        others = views.others(batch, settings, seed, "train", start) if views.count(settings) > 1 else []
        seen = [model.encode(view) for view in (batch, *others)]
        latents.append(torch.stack([one.latents for one in seen], dim=1))
        if seen[0].indices is not None:
            indices.append(torch.stack([one.indices for one in seen], dim=1))
    return torch.cat(indices) if indices else None, torch.cat(latents), time.process_time() - began


def described(tokenizer: Any, latents: torch.Tensor, shares: tuple[int, ...]) -> TokenSpec:
    """What describes tokens: (N, V, D, h, w) latents of all views, and the number of images of each class."""
    return TokenSpec(
        codebook_size=tokenizer.codebook_size,
        latent_shape=tokenizer.latent_shape,
        index_grid=tokenizer.index_grid,
        num_classes=len(shares),
        class_counts=shares,
        latent_mean=tuple(latents.mean(dim=(0, 1, 3, 4)).tolist()),
        latent_std=tuple(latents.std(dim=(0, 1, 3, 4)).tolist()),
        tokenizer_fingerprint="0" * 64,
    )


@torch.no_grad()
def figures(judge: Judge, reference: np.ndarray, pixels: np.ndarray, labels: np.ndarray, train: np.ndarray) -> dict:
    found = judge.features(pixels)
    return {
        "label_agreement": float(judge.agrees(pixels, labels).mean()),
        judge.frechet_name: frechet.distance(frechet.moments(found), frechet.moments(reference)),
        **precision_recall.precision_recall(reference, found)._asdict(),
        "coverage": precision_recall.density_coverage(reference, found).coverage,
        "copy_rate": copy_rate.copy_rate(found, train, reference),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("params", "images", "features", "reference"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    parser.add_argument("--seconds", type=float, default=150)
    parser.add_argument("--tokenizer-share", type=float, default=0.25, help="of the seconds, where one is trained")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--systems", nargs="*", help="all of them, if not given")
    parser.add_argument("--rows", type=Path, default=Path("matrix.jsonl"), help="one line a system and seed; added to")
    given = parser.parse_args()
    torch.set_num_threads(1)
    pipeline = all_params.read(given.params)
    spec, splits = image_artifact.read(given.images)
    train = splits["train"]
    judge, statistics = Judge.read(given.features), Reference(given.reference)
    reference, train_features = statistics.features("test"), statistics.features("train")
    chosen = given.systems or list(pipeline.systems)
    count = pipeline.sample_images.num_images
    shares = tuple(np.bincount(train.labels, minlength=spec.num_classes).tolist())
    labels = np.repeat(np.arange(spec.num_classes), quotas(count, shares))

    def keep(row: dict) -> None:
        with given.rows.open("a") as file:
            file.write(json.dumps(row) + "\n")
        print(json.dumps(row), flush=True)

    for seed in given.seeds:
        floor = floor_rows(train.labels, spec.num_classes, count, seed)
        real = figures(judge, reference, train.uint8(floor).numpy(), train.labels[floor], train_features)
        keep({"system": "real", "seed": seed, "seconds": 0.0} | real | {"copy_rate": None})  # they are the originals
        for name in dict.fromkeys(pipeline.systems[system].tokenizer for system in chosen):
            config = pipeline.tokenizers[name]
            module, used = load("tokenizers", config.kind), 0.0
            if hasattr(module, "Objective"):
                tokenizer, used = fitted(module, config, spec, train, given.tokenizer_share * given.seconds, seed)
            else:
                tokenizer = module.Model(config, spec).eval()
            indices, latents, seconds = encoded(tokenizer, train, pipeline.encode_tokens, seed)
            used += seconds
            tokens = described(tokenizer, latents, shares)
            latents = token_artifact.standardize(latents.flatten(0, 1), tokens).view_as(latents)
            for system in [key for key in chosen if pipeline.systems[key].tokenizer == name]:
                prior, sampling = pipeline.systems[system].prior, pipeline.sampling(system)
                part = load("priors", prior.kind)
                seen = indices if part.LEARNS == "indices" else latents
                data = Views(seen[:, : prior.num_views or seen.shape[1]], torch.from_numpy(train.labels))
                model, seconds = fitted(part, prior, tokens, data, given.seconds - used, seed)
                pixels = []
                for start in range(0, count, pipeline.sample_images.batch_size):
                    wanted = torch.from_numpy(labels[start : start + pipeline.sample_images.batch_size])
                    drawn = model.sample(wanted, sampling, seeding.generator(seed, "sample_images", start))
                    with torch.no_grad():
                        if part.LEARNS == "indices":
                            images = tokenizer.decode_indices(drawn)
                        else:
                            images = tokenizer.decode(token_artifact.unstandardize(drawn, tokens))
                    pixels.append(to_uint8(images).numpy())
                judged = figures(judge, reference, np.concatenate(pixels), labels, train_features)
                keep({"system": system, "seed": seed, "seconds": used + seconds} | judged)
    rows = pd.read_json(given.rows, lines=True)
    print(rows.drop(columns="seed").groupby("system", sort=False).agg(["mean", "std"]).round(3).to_string())


if __name__ == "__main__":
    main()

"""Train one tokenizer: images -> encoder, quantizer, decoder."""

from pathlib import Path

import torch

from tessera.artifacts import checkpoints
from tessera.artifacts import folder as artifact
from tessera.artifacts import images as image_artifact
from tessera.components import load, sets
from tessera.contracts import Job
from tessera.params import Pipeline
from tessera.training import by_speed, loop, previews, warm_start


def run(params: Pipeline, name: str, images: Path, out: Path, history: Path, job: Job) -> None:
    spec, splits = image_artifact.read(images)
    config = params.tokenizers[name]
    module = load("tokenizers", config.kind)
    torch.manual_seed(params.seed)
    model = module.Model(config, spec)
    job.say(_first_line(model, spec, len(splits["train"])))
    settings = config.model_dump(mode="json", exclude={"health"})  # which changes no weight: a stopped one may go on
    inputs = {"tokenizer": settings, "images": artifact.fingerprint(images), "seed": params.seed}
    job.resumable(inputs, parts=(config,))
    if hasattr(module, "Objective"):
        objective = module.Objective(model, config)
        if sets(config, "init"):
            warm_start.begin(objective, config, "tokenizers", job)
        preview = previews.Previews(previews.of_tokenizer(splits["test"]), job)
        model = loop.fit(objective, splits["train"], config.training, seed=params.seed, job=job, preview=preview)
        if model is None:  # only the first process writes
            return
    with artifact.create(out) as place:
        checkpoints.save(place, "tokenizers", config, spec, model, job.code_of(config))
        if sets(getattr(config, "training", config), "by_speed"):
            by_speed.write_record(place, job)
        if sets(config, "init"):
            warm_start.write_record(place, job)
    job.keep_history(history)
    job.say(f"wrote {out}")


def _first_line(model: torch.nn.Module, spec: image_artifact.ImageSpec, num_images: int) -> str:
    codes = f"{model.codebook_size} codes" if model.codebook_size else "no codebook"
    depth, height, width = model.latent_shape
    millions = sum(p.numel() for p in model.parameters()) / 1e6
    return (
        f"{num_images:,} images {spec.channels}x{spec.height}x{spec.width} -> {height}x{width} tokens of {depth} channels, "
        f"{codes}, {millions:.2f} M parameters, {loop.threads()}"
    )

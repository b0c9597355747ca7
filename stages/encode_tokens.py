"""Encode every image into tokens, once, so that no prior ever runs the encoder."""

from pathlib import Path

import numpy as np
import torch

from tessera.artifacts import checkpoints
from tessera.artifacts import folder as artifact
from tessera.artifacts import images as image_artifact
from tessera.artifacts import tokens as token_artifact
from tessera.artifacts.images import to_float
from tessera.artifacts.shards import ShardWriter
from tessera.contracts import Job, TokenSpec
from tessera.params import Pipeline
from tessera.training import views


@torch.no_grad()
def run(params: Pipeline, name: str, images: Path, tokenizer: Path, out: Path, job: Job) -> dict[str, float]:
    spec, splits = image_artifact.read(images)
    model, _, trained_on = checkpoints.load_model(tokenizer, "tokenizers")
    if trained_on != spec:
        raise ValueError(f"{tokenizer} was trained on {trained_on}, but {images} holds {spec}. Run dvc repro")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model.to(device)
    settings = params.encode_tokens
    sums = np.zeros((2, model.latent_shape[0]))  # of the latents and of their squares, per channel
    num_values = num_encoded = 0
    with artifact.create(out) as place:
        for split, dataset in splits.items():
            number = views.count(settings) if split == "train" else 1
            starts = range(0, len(dataset), settings.batch_size)
            with (
                ShardWriter(place / split, "indices") as indices,
                ShardWriter(place / split, "latents") as latents,
                ShardWriter(place / split, "labels") as labels,
            ):
                for start in job.track(starts, len(starts), split):
                    rows = np.arange(start, min(start + settings.batch_size, len(dataset)))
                    batch = to_float(dataset.uint8(rows).to(device))
                    seen = [batch, *views.others(batch, settings, params.seed, split, start)] if number > 1 else [batch]
                    encoded = [model.encode(view) for view in seen]
                    raw = torch.stack([one.latents for one in encoded], dim=1).cpu().numpy()  # (B, V, D, h, w)
                    if encoded[0].indices is not None:
                        values = (
                            torch.stack([one.indices for one in encoded], dim=1).cpu().numpy()
                        )  # (B, V, *index_grid)
                        indices.append(values.astype(token_artifact.index_dtype(model.codebook_size)))
                    if settings.store_latents:
                        latents.append(raw.astype(np.float32))
                    labels.append(dataset.labels[rows])
                    num_encoded += raw.shape[0] * raw.shape[1]
                    if split == "train":
                        wide = raw.astype(np.float64)
                        sums += np.stack([wide.sum(axis=(0, 1, 3, 4)), np.square(wide).sum(axis=(0, 1, 3, 4))])
                        num_values += wide.size // wide.shape[2]
        mean = sums[0] / num_values
        deviation = np.sqrt(np.maximum(sums[1] / num_values - mean**2, 1e-12))
        token_spec = TokenSpec(
            codebook_size=model.codebook_size,
            latent_shape=model.latent_shape,
            index_grid=model.index_grid,
            num_classes=spec.num_classes,
            class_counts=tuple(np.bincount(splits["train"].labels, minlength=spec.num_classes).tolist()),
            latent_mean=tuple(mean.tolist()),
            latent_std=tuple(deviation.tolist()),
            tokenizer_fingerprint=artifact.fingerprint(tokenizer),
        )
        artifact.write_json(place / "meta.json", {"spec": token_spec.model_dump(), "num_views": views.count(settings)})
    job.say(f"{num_encoded:,} views of {sum(map(len, splits.values())):,} images; wrote {out}")
    return {"num_encoded": num_encoded}

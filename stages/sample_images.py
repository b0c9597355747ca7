"""Draw tokens from a prior, decode them, and lay the images out in a picture.

    python -m stages.sample_images vqgan-flow --tokenizer data/tokenizers/vqgan --prior data/priors/vqgan-flow \
        --out data/samples/vqgan-flow --picture data/pictures/samples/vqgan-flow.png
"""

from pathlib import Path

import numpy as np
import torch

from tessera import pictures, progress, seeding, stage_process
from tessera.artifacts import checkpoints
from tessera.artifacts import folder as artifact
from tessera.artifacts import tokens as token_artifact
from tessera.artifacts.images import to_uint8
from tessera.artifacts.samples import quotas
from tessera.artifacts.shards import ShardWriter
from tessera.components import load
from tessera.params import Pipeline


@torch.no_grad()
def run(
    params: Pipeline, name: str, tokenizer: Path, prior: Path, out: Path, picture: Path, job: stage_process.Job
) -> dict[str, float]:
    decoder, _, _ = checkpoints.load_model(tokenizer, "tokenizers")
    model, config, spec = checkpoints.load_model(prior, "priors")
    found = artifact.fingerprint(tokenizer)
    if found != spec.tokenizer_fingerprint:
        raise ValueError(
            f"{prior} was trained on tokens of another tokenizer ({spec.tokenizer_fingerprint[:12]}) than {tokenizer} "
            f"({found[:12]}): decoded so, its samples would be noise. Run: dvc repro train_prior@{name}"
        )
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    decoder.to(device), model.to(device)
    settings, sampling = params.sample_images, params.sampling(name)
    learns = load("priors", config.kind).LEARNS
    labels = np.repeat(np.arange(spec.num_classes), quotas(settings.num_images, spec.class_counts))
    seeding.numpy_generator(params.seed, "sample_labels").shuffle(labels)
    starts = range(0, len(labels), settings.batch_size)
    images = []
    with artifact.create(out) as place:
        with ShardWriter(place, "images") as writer, ShardWriter(place, "labels") as label_writer:
            for start in progress.track(starts, job.name, len(starts)):
                wanted = torch.from_numpy(labels[start : start + settings.batch_size]).to(device)
                tokens = model.sample(wanted, sampling, seeding.generator(params.seed, "sample_images", start))
                if learns == "indices":
                    decoded = decoder.decode_indices(tokens)
                else:
                    decoded = decoder.decode(token_artifact.unstandardize(tokens, spec))
                pixels = to_uint8(decoded).cpu().numpy()
                writer.append(pixels)
                label_writer.append(wanted.cpu().numpy())
                if sum(map(len, images)) < 2000:  # enough for the picture, whatever num_images is
                    images.append(pixels)
        shown = np.concatenate(images)
        artifact.write_json(
            place / "meta.json",
            {
                "num_images": len(labels),
                "seed": params.seed,
                "sampling": sampling.model_dump(mode="json"),
                "weights": "ema",
                "prior_fingerprint": artifact.fingerprint(prior),
                "tokenizer_fingerprint": found,
            },
        )
    pictures.save_grid(picture, pictures.by_class(shown, labels[: len(shown)]), 10)
    job.attach(picture, "samples.png")
    job.say(f"{len(labels):,} images, {sampling}; picture: {picture}")
    return {"num_images": len(labels)}


if __name__ == "__main__":
    stage_process.main(run)

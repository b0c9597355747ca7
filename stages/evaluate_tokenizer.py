"""Judge a tokenizer alone: reconstructions of the test images, and how the training images (in their first view) use
the codebook.

    python -m stages.evaluate_tokenizer vqgan --images data/images --features data/features \
        --tokenizer data/tokenizers/vqgan --tokens data/tokens/vqgan \
        --picture data/pictures/reconstructions/vqgan.png --metrics data/metrics/tokenizers/vqgan.json
"""

from pathlib import Path

import numpy as np
import torch

from tessera import pictures, progress, stage_process
from tessera.artifacts import checkpoints
from tessera.artifacts import folder as artifact
from tessera.artifacts import images as image_artifact
from tessera.artifacts import tokens as token_artifact
from tessera.artifacts.images import to_float, to_uint8
from tessera.judge import Judge
from tessera.metrics import codebook, frechet, reconstruction
from tessera.params import Pipeline

SHOWN = 50  # originals in the picture, each beside its reconstruction


@torch.no_grad()
def run(
    params: Pipeline,
    name: str,
    images: Path,
    features: Path,
    tokenizer: Path,
    tokens: Path,
    picture: Path,
    metrics: Path,
    job: stage_process.Job,
) -> None:
    _, splits = image_artifact.read(images)
    test = splits["test"]
    judge, reference, _ = Judge.read(features)
    model, _, _ = checkpoints.load_model(tokenizer, "tokenizers")
    model.to(judge.device)
    size = params.encode_tokens.batch_size
    starts = range(0, len(test), size)
    shown = np.linspace(0, len(test) - 1, min(SHOWN, len(test))).astype(int)  # evenly spread: files often lie by class
    psnr, ssim, pairs = [], [], []
    moments = frechet.MomentsAccumulator()
    for start in progress.track(starts, job.name, len(starts)):
        rows = np.arange(start, min(start + size, len(test)))
        originals = test.uint8(rows)
        reconstructions = to_uint8(model.decode(model.encode(to_float(originals).to(judge.device)).latents)).cpu()
        share = len(originals) / len(test)
        psnr.append(share * reconstruction.psnr_db(reconstructions / 255, originals / 255))
        ssim.append(share * reconstruction.ssim(reconstructions / 255, originals / 255))
        moments.update(judge.features(reconstructions.numpy()))
        pairs.append(np.stack([originals.numpy(), reconstructions.numpy()], axis=1)[np.isin(rows, shown)])
    figures = {
        "reconstruction": {
            f"r{judge.frechet_name}": frechet.distance(moments.moments(), frechet.moments(reference)),
            "psnr_db": sum(psnr),
            "ssim": sum(ssim),
            "num_images": len(test),
            "reference": "test",
        }
    }
    if model.codebook_size:
        _, learned = token_artifact.read(tokens, "indices")
        train = learned["train"]
        counts = torch.zeros(model.codebook_size, dtype=torch.long)
        for start in range(0, len(train), 10_000):
            rows = torch.arange(start, min(start + 10_000, len(train)))
            counts += codebook.count(train.batch(rows).tokens, model.codebook_size)
        figures["codebook"] = {**codebook.use(counts)._asdict(), "num_images": len(train), "reference": "train"}
    beside = np.concatenate(pairs)  # (SHOWN, 2, C, H, W)
    pictures.save_grid(picture, beside.reshape(-1, *beside.shape[2:]), 10)
    job.attach(picture, "reconstructions.png")
    artifact.write_json(metrics, figures)
    job.say(f"{figures['reconstruction']}")


if __name__ == "__main__":
    stage_process.main(run)

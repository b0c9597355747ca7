"""What each quantizer does to an autoencoder in a short training, beside the same quantizer of vector-quantize-pytorch.

    python -m benchmarks.quantizer_quality --images FILE [FILE ...] [--seeds 0 1 2] [--steps 200] [--kinds vector fsq ...]

FILE is an npz with uint8 images (N, 32, 32, 3) under "x", of which one in eight is held out, or a tar of train/ and test/
with PNG files of twice that side. Without --images: all that TESSERA_TEST_DATA holds of these. Encoder, decoder, their first
weights, batches, optimizer and steps are the same on both sides; one thread.
"""

import argparse
import io
import math
import os
import tarfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
import vector_quantize_pytorch as peers
from PIL import Image
from torch import Tensor, nn

from tessera.bases.autoencoder import Autoencoder, AutoencoderConfig
from tessera.bases.optimization import Training, learning_rate_factor, optimizers_for
from tessera.components import parse
from tessera.contracts import ImageSpec, Quantized
from tessera.metrics.reconstruction import psnr_db
from tessera.training.reading import rows_of_step

DATA = ("cifar10_lossless4000.npz", "eurosat64_5000.tar")
OURS: dict[str, dict[str, Any]] = {
    "vector": {"kind": "vector", "codebook_size": 1024, "code_dim": 8},
    "fsq": {"kind": "fsq", "levels": [8, 5, 5, 5]},
    "lfq": {"kind": "lfq", "code_dim": 10},
    "simvq": {"kind": "simvq", "codebook_size": 1024, "code_dim": 8},
    "residual": {
        "kind": "residual",
        "num_levels": 2,
        "quantizer": {"kind": "vector", "codebook_size": 256, "code_dim": 8},
    },
}
EMA = {"decay": 0.95, "kmeans_init": True, "commitment_weight": 0.25}
PEERS: dict[str, Callable[[], nn.Module]] = {
    # dead: below 3 % of the mean use at 2,048 tokens a batch, as ours by default
    "vector": lambda: peers.VectorQuantize(dim=8, codebook_size=1024, threshold_ema_dead_code=0.06, **EMA),
    "fsq": lambda: peers.FSQ(levels=[8, 5, 5, 5]),
    "lfq": lambda: peers.LFQ(dim=10, entropy_loss_weight=0.1, commitment_loss_weight=0.25),
    "simvq": lambda: peers.SimVQ(dim=8, codebook_size=1024),
    "residual": lambda: peers.ResidualVQ(
        dim=8, codebook_size=256, num_quantizers=2, threshold_ema_dead_code=0.24, **EMA
    ),
}


class Peer(nn.Module):
    """A quantizer of the peer library behind our protocol; indices of several levels are counted as ours."""

    def __init__(self, quantizer: nn.Module, codebook_size: int, levels: int):
        super().__init__()
        self.quantizer, self.codebook_size, self.levels = quantizer, codebook_size, levels

    def forward(self, z: Tensor) -> Quantized:
        batch, width, height, columns = z.shape
        codes, indices, *losses = self.quantizer(z.flatten(2).transpose(1, 2))
        offsets = torch.arange(self.levels) * (self.codebook_size // self.levels)
        indices = indices.reshape(batch, height, columns, self.levels) + offsets
        loss = sum((part.sum() for part in losses), z.new_zeros(()))
        return Quantized(codes.transpose(1, 2).reshape(z.shape), indices.flatten(2), loss)


def read_images(path: Path) -> tuple[Tensor, Tensor]:
    """Training and held-out images, (N, 3, 32, 32) uint8."""
    if path.suffix == ".npz":
        with np.load(path, allow_pickle=False) as file:
            images = torch.from_numpy(file["x"]).permute(0, 3, 1, 2).contiguous()
        held_out = torch.arange(len(images)) % 8 == 7
        return images[~held_out], images[held_out]
    splits: dict[str, list[np.ndarray]] = {"train": [], "test": []}
    with tarfile.open(path) as archive:
        for member in sorted(archive.getmembers(), key=lambda member: member.name):
            split = next((name for name in splits if f"/{name}/" in f"/{member.name}"), None)
            if member.isfile() and split:
                image = Image.open(io.BytesIO(archive.extractfile(member).read())).convert("RGB")
                splits[split].append(np.asarray(image.reduce(2)))
    train, test = (torch.from_numpy(np.stack(some)).permute(0, 3, 1, 2).contiguous() for some in splits.values())
    return train, test[::2]


def settings_for(quantizer: dict[str, Any], steps: int) -> AutoencoderConfig:
    training = {"num_steps": steps, "batch_size": 32, "learning_rate": 0.002}
    return parse(AutoencoderConfig, {"quantizer": quantizer, "channels": 32, "num_blocks": 1, "training": training})


def built(config: AutoencoderConfig, peer: Callable[[], nn.Module] | None, seed: int) -> Autoencoder:
    spec = ImageSpec(
        name="benchmark", channels=3, height=32, width=32, num_classes=1, class_names=("all",), licence="none"
    )
    torch.manual_seed(seed)
    model = Autoencoder(config, spec)  # encoder and decoder are drawn before the quantizer
    if peer is not None:
        model.quantizer = Peer(peer(), model.codebook_size, model.quantizer.indices_per_code)
    return model


def trained(model: Autoencoder, images: Tensor, training: Training, seed: int) -> float:
    """Train in place; returns CPU seconds."""
    (optimizer,) = optimizers_for(model, training)
    model.train()
    start = time.process_time()
    for step in range(training.num_steps):
        torch.manual_seed(1000 * seed + step)
        batch = to_floats(images[rows_of_step(step, training.batch_size, len(images), seed)])
        reconstructions, quantized = model(batch, step)
        loss = (reconstructions - batch).abs().mean() + quantized.loss
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), training.gradient_clip)
        for group in optimizer.param_groups:
            group["lr"] = training.learning_rate * learning_rate_factor(step, training)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return time.process_time() - start


def to_floats(images: Tensor) -> Tensor:
    return images.float() / 127.5 - 1


@torch.no_grad()
def figures(model: Autoencoder, images: Tensor) -> dict[str, float]:
    model.eval()
    found, counts = [], torch.zeros(model.codebook_size)
    for batch in images.split(250):
        reconstructions, quantized = model(to_floats(batch), 0)
        found.append(psnr_db((reconstructions / 2 + 0.5).clamp(0, 1), batch / 255).mean().item())
        counts += torch.bincount(quantized.indices.flatten(), minlength=model.codebook_size)
    shares = counts / counts.sum()
    return {
        "psnr_db": float(np.mean(found)),
        "usage": (counts > 0).float().mean().item(),
        "perplexity": math.exp(torch.special.entr(shares).sum().item()),
    }


def peak_bytes(model: Autoencoder) -> int:
    """The most that one training step of the quantizer alone, forward and backward, holds beyond what lies there before."""
    z = torch.randn(32, model.latent_shape[0], 8, 8, requires_grad=True)
    model.quantizer.train()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        quantized = model.quantizer(z)
        (quantized.codes.sum() + quantized.loss).backward()
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = np.cumsum([event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())])
    return int(held.max())


def run(kind: str, side: str, images: tuple[Tensor, Tensor], steps: int, seed: int) -> dict[str, float]:
    config = settings_for(OURS[kind], steps)
    model = built(config, PEERS[kind] if side == "peer" else None, seed)
    seconds = trained(model, images[0], config.training, seed)
    return {**figures(model, images[1]), "cpu_seconds": seconds, "peak_mib": peak_bytes(model) / 2**20}


def data_files() -> list[Path]:
    folder = os.environ.get("TESSERA_TEST_DATA")
    return [path for name in DATA if folder and (path := Path(folder) / name).is_file()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=Path, nargs="+", default=data_files())
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--kinds", nargs="+", choices=list(OURS), default=list(OURS))
    options = parser.parse_args()
    if not options.images:
        print(
            "skipped: no images. Give --images FILE, or set TESSERA_TEST_DATA to a folder that holds "
            + " or ".join(DATA)
        )
        return
    torch.set_num_threads(1)
    print(f"torch {torch.__version__}, 1 thread, {options.steps} steps of batch 32, patch 4, 8x8 tokens")
    rows = []
    for path in options.images:
        images = read_images(path)
        for kind in options.kinds:
            for seed in options.seeds:
                for side in ("ours", "peer"):
                    row = {"images": path.stem, "quantizer": kind, "side": side, "seed": seed}
                    rows.append({**row, **run(kind, side, images, options.steps, seed)})
                    print(
                        " ".join(
                            f"{value:.4g}" if isinstance(value, float) else str(value) for value in rows[-1].values()
                        )
                    )
    table = pd.DataFrame(rows)
    print("\n" + table.to_string(index=False, float_format="{:.3f}".format))
    groups = table.drop(columns="seed").groupby(["images", "quantizer", "side"], sort=False)
    print("\nmean over seeds\n" + groups.mean().round(3).to_string())
    print("\nrange of psnr_db over seeds\n" + groups.psnr_db.agg(["min", "max"]).round(2).to_string())


if __name__ == "__main__":
    main()

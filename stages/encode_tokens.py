"""Encode every image into tokens, once, so that no prior ever runs the encoder.

While a batch is encoded, the next ones are read and the ones before are written, each in a thread. A kill loses what was made
since the last full shard or the last minute.
"""

import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from tessera.artifacts import checkpoints
from tessera.artifacts import folder as artifact
from tessera.artifacts import images as image_artifact
from tessera.artifacts import tokens as token_artifact
from tessera.artifacts.background import Behind, read_ahead
from tessera.artifacts.growing import Growing
from tessera.artifacts.images import Images, to_float
from tessera.contracts import Job, TokenSpec
from tessera.nn.precision import in_precision, slowness
from tessera.params import EncodeTokens, Pipeline
from tessera.training import views


@torch.no_grad()
def run(params: Pipeline, name: str, images: Path, tokenizer: Path, out: Path, job: Job) -> dict[str, float]:
    spec, splits = image_artifact.read(images)
    model, config, trained_on = checkpoints.load_model(tokenizer, "tokenizers")
    if trained_on != spec:
        raise ValueError(f"{tokenizer} was trained on {trained_on}, but {images} holds {spec}. Run dvc repro")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    settings, num_views = params.encode_tokens, views.count(params.encode_tokens)
    inputs = {
        "images": artifact.fingerprint(images),
        "tokenizer": artifact.fingerprint(tokenizer),
        "encode_tokens": settings,
        "seed": params.seed,
        "device": device.type,  # the bits of latents depend on it
    }
    state = job.resumable(inputs, parts=(config,))
    if told := slowness(settings.precision, device):
        job.say(told)
    num_encoded = len(splits["train"]) * num_views + len(splits["test"])
    encoder = _Encoder(in_precision(model.to(device), settings.precision), device, splits, params, job)
    if not job.is_main:  # the first process writes what all of them encode
        for _ in encoder.batches(job.from_main(0)):
            pass
        return {"num_encoded": num_encoded}
    with artifact.create(out, begun=state / "tokens") as place:
        grown = Growing(place, state / "tokens.json", job.checkpoint_seconds)
        sums = _encode(encoder, grown, job)
        num_values = len(splits["train"]) * num_views * math.prod(model.latent_shape[1:])
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
        encoding = settings.model_dump(include=set(token_artifact.Encoding.model_fields))
        artifact.write_json(place / "meta.json", {"spec": token_spec.model_dump(), "num_views": num_views, **encoding})
    job.say(f"{num_encoded:,} views of {sum(map(len, splits.values())):,} images; wrote {out}")
    return {"num_encoded": num_encoded}


def _encode(encoder: "_Encoder", grown: Growing, job: Job) -> np.ndarray:
    """Add all batches that are not there yet; (2, D) float64: sums of the training latents and of their squares."""
    written = _Written(grown, encoder.params.encode_tokens, encoder.model, grown.restored(job.say))
    done = job.from_main(written.num_batches)
    if done:
        found = sum(grown.num_rows(f"{split}/labels") for split in encoder.splits)
        job.say(f"goes on after {found:,} images, which were encoded before it was interrupted")
    with Behind() as behind:
        for batch in encoder.batches(done):
            behind.call(written.add, batch)
    grown.finish()
    return written.sums


class _Batch(NamedTuple):
    """What is made of the images of one batch, in V views."""

    split: str
    labels: np.ndarray  # (B,)
    latents: Tensor  # (B, V, D, h, w)
    indices: Tensor | None  # (B, V, *index_grid)
    sums: np.ndarray | None  # as `sums_of`, by the process that encoded it; None: not taken yet


class _Encoder:
    """The batches of all splits, encoded; each process of the stage encodes its part of them."""

    def __init__(self, model: Any, device: torch.device, splits: Mapping[str, Images], params: Pipeline, job: Job):
        self.model, self.device, self.splits, self.params, self.job = model, device, splits, params, job

    def batches(self, done: int) -> Iterator[_Batch]:
        """Those after the first `done`, in order, in the first process; in the others nothing."""
        size = self.params.encode_tokens.batch_size
        for split, dataset in self.splits.items():
            all_starts = range(0, len(dataset), size)
            starts, done = all_starts[done:], max(0, done - len(all_starts))

            def read(start: int, dataset: Images = dataset) -> Tensor:
                batch = dataset.uint8(np.arange(start, min(start + size, len(dataset))))
                return batch.pin_memory() if self.device.type == "cuda" else batch

            ahead = read_ahead(read, self.job.part(starts))

            def encode(start: int, split: str = split, dataset: Images = dataset, ahead: Any = ahead) -> _Batch:
                return self._encoded(split, start, next(ahead), dataset.labels[start : start + size])

            yield from self.job.track(self.job.share(starts, encode), len(starts), split)

    def _encoded(self, split: str, start: int, pixels: Tensor, labels: np.ndarray) -> _Batch:
        settings = self.params.encode_tokens
        batch = to_float(pixels.to(self.device, non_blocking=True))
        is_augmented = split == "train" and views.count(settings) > 1
        seen = [batch, *views.others(batch, settings, self.params.seed, split, start)] if is_augmented else [batch]
        encoded = [self.model.encode(view) for view in seen]
        latents = torch.stack([one.latents for one in encoded], dim=1)
        indices = None
        if encoded[0].indices is not None:
            indices = torch.stack([one.indices for one in encoded], dim=1)
        if self.job.is_alone:
            return _Batch(split, labels, latents, indices, None)
        # It goes to another process: the sums are taken where the latents are, as they are where there is one process
        sums = sums_of(latents) if split == "train" else None
        return _Batch(split, labels, latents.cpu(), None if indices is None else indices.cpu(), sums)


class _Written:
    """What is made of encoded batches, by the thread that writes."""

    def __init__(self, grown: Growing, settings: EncodeTokens, model: Any, position: Any):
        """position: as `add` kept it; None: of the beginning."""
        self.grown, self.settings, self.codebook_size = grown, settings, model.codebook_size
        self.num_batches = 0
        self.sums = np.zeros((2, model.latent_shape[0]))
        if position is not None:
            self.num_batches = position["num_batches"]
            self.sums = np.array([[float.fromhex(value) for value in row] for row in position["sums"]])

    @torch.no_grad()
    def add(self, batch: _Batch) -> None:
        split, labels, latents, indices, sums = batch
        if split == "train":
            self.sums += sums_of(latents) if sums is None else sums
        if indices is not None:
            dtype = token_artifact.index_dtype(self.codebook_size)
            self.grown.append(f"{split}/indices", indices.cpu().numpy().astype(dtype))
        if self.settings.store_latents:
            rows = token_artifact.as_stored(latents.cpu().numpy(), self.settings.latents_dtype)
            self.grown.append(f"{split}/latents", rows)
        self.grown.append(f"{split}/labels", labels)
        self.num_batches += 1
        if self.grown.is_due():
            sums = [[value.hex() for value in row] for row in self.sums.tolist()]
            self.grown.keep({"num_batches": self.num_batches, "sums": sums})


def sums_of(latents: Tensor) -> np.ndarray:
    """(B, V, D, h, w) -> (2, D) float64: sums of the latents and of their squares, per channel.

    Taken where the latents are. On the CPU by NumPy, in whose order they always were: another one moves the last digits of the
    standardization, and with them everything that a prior of latents makes.
    """
    if latents.device.type == "cpu":
        wide = latents.numpy().astype(np.float64)
        return np.stack([wide.sum(axis=(0, 1, 3, 4)), np.square(wide).sum(axis=(0, 1, 3, 4))])
    on_device = latents.double()
    return torch.stack([on_device.sum(dim=(0, 1, 3, 4)), on_device.square().sum(dim=(0, 1, 3, 4))]).cpu().numpy()

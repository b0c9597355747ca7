"""Judge a tokenizer alone: reconstructions of the test images, also from indices that are a little wrong; what the best
prior on its tokens could reach; and how the training images (in their first view) use the codebook.
"""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from tessera import seeding
from tessera.artifacts import checkpoints, pictures, weights_file
from tessera.artifacts import folder as artifact
from tessera.artifacts import images as image_artifact
from tessera.artifacts import tokens as token_artifact
from tessera.artifacts.images import Images, to_float, to_uint8
from tessera.artifacts.samples import floor_rows
from tessera.contracts import Job
from tessera.evaluation import figures
from tessera.evaluation.figures import Protocol, Recorder
from tessera.evaluation.judge import Judge, Summary
from tessera.evaluation.reference import Reference
from tessera.metrics import brightness, codebook, frechet, reconstruction
from tessera.nn.image_losses import Lpips
from tessera.params import Evaluate, Pipeline

SMALLEST_LPIPS = 16  # pixels
SHOWN = 50  # originals in the picture, each beside its reconstruction


@torch.no_grad()
def run(
    params: Pipeline,
    name: str,
    images: Path,
    features: Path,
    reference: Path,
    tokenizer: Path,
    tokens: Path,
    picture: Path,
    codebook_uses: Path,
    metrics: Path,
    job: Job,
) -> None:
    spec, splits = image_artifact.read(images)
    test, train = splits["test"], splits["train"]
    settings, size = params.evaluate, params.encode_tokens.batch_size
    judges = {network: Judge.read(features / network, network) for network in params.features}
    references = {network: Reference(reference / network) for network in params.features}
    device = next(iter(judges.values())).device
    model, _, _ = checkpoints.load_model(tokenizer, "tokenizers")
    model.to(device)
    lpips = _lpips(settings, min(spec.height, spec.width), device)
    found = Recorder()

    def reconstruct(originals: Tensor) -> Tensor:
        return to_uint8(model.decode(model.encode(to_float(originals).to(device)).latents)).cpu()

    generator = seeding.generator(params.seed, "perturbed_indices")

    def perturb(originals: Tensor) -> Tensor:
        indices = model.encode(to_float(originals).to(device)).indices
        return to_uint8(model.decode_indices(perturbed(indices, model, settings, generator))).cpu()

    def batches(dataset: Images, rows: np.ndarray, what: str) -> Iterator[np.ndarray]:
        starts = range(0, len(rows), size)
        for start in job.track(starts, len(starts), what):
            yield rows[start : start + size]

    everything = np.arange(len(test))
    shown = np.linspace(0, len(test) - 1, min(SHOWN, len(test))).astype(int)  # evenly spread: files often lie by class
    psnr, ssim, distances, levels, pairs = [], [], [], [], []
    judged = Judged(judges, test.labels, settings.max_neighbor_images)
    for rows in batches(test, everything, "test images"):
        originals = test.uint8(rows)
        decoded = reconstruct(originals)
        judged.update(decoded)
        psnr.append(reconstruction.psnr_db(decoded / 255, originals / 255))
        ssim.append(reconstruction.ssim(decoded / 255, originals / 255))
        if lpips is not None:
            distances.append(lpips.of_each(to_float(decoded).to(device), to_float(originals).to(device)).cpu())
        levels.append(torch.stack([brightness.levels(decoded), brightness.levels(originals)]))
        pairs.append(np.stack([originals.numpy(), decoded.numpy()], axis=1)[np.isin(rows, shown)])
    of_test = "reconstructions of the test images"
    test_sha256 = artifact.part_sha256(images, "test")
    pixels = figures.without_network(spec.name, of_test, len(test), "test", test_sha256, window=reconstruction.WINDOW)
    found.add_mean("reconstruction", "psnr_db", torch.cat(psnr), pixels)
    found.add_mean("reconstruction", "ssim", torch.cat(ssim), pixels)
    shift = brightness.shift(*torch.cat(levels, dim=1), paired=True)
    found.add("reconstruction", "reconstruction_brightness_shift", shift.value, pixels, shift.standard_error)
    if distances:
        by_vgg = pixels.model_copy(update={"network": "lpips-vgg16", "network_sha256": settings.lpips_sha256})
        found.add_mean("reconstruction", "lpips", torch.cat(distances), by_vgg)
    for network, judge in judges.items():
        protocol = references[network].protocol("test", of_test, len(test))
        judged.record(found, network, f"r{judge.frechet_name}", references[network], protocol, paired=True)

    if model.codebook_size:
        judged = Judged(judges, test.labels, settings.max_neighbor_images)
        for rows in batches(test, everything, "from perturbed indices"):
            judged.update(perturb(test.uint8(rows)))
        perturbation = {"share": settings.perturbation_share, "neighbors": settings.perturbation_neighbors}
        for network, judge in judges.items():
            what = f"{of_test} from perturbed indices"
            protocol = references[network].protocol("test", what, len(test), **perturbation)
            judged.record(found, network, f"p{judge.frechet_name}", references[network], protocol, paired=True)
        counts = _count_codes(found, tokens, model.codebook_size, spec.name)
    else:
        counts = torch.zeros(0, dtype=torch.long)
    codebook_uses.parent.mkdir(parents=True, exist_ok=True)
    ranked = pd.DataFrame({"rank": np.arange(len(counts)), "uses": counts.sort(descending=True).values.numpy()})
    ranked.to_csv(codebook_uses, index=False)

    floor = floor_rows(train.labels, spec.num_classes, params.sample_images.num_images, params.seed)
    judged = Judged(judges, train.labels[floor], settings.max_neighbor_images)
    for rows in batches(train, floor, "training images"):
        judged.update(reconstruct(train.uint8(rows)))
    for network, judge in judges.items():
        protocol = references[network].protocol("test", "reconstructions of training images", len(floor))
        judged.record(found, network, f"floor_{judge.frechet_name}", references[network], protocol, paired=False)

    beside = np.concatenate(pairs)  # (SHOWN, 2, C, H, W)
    pictures.save_grid(picture, beside.reshape(-1, *beside.shape[2:]), 10)
    job.attach(picture, "reconstructions.png")
    measured = found.measured()
    measured.write(metrics)
    job.say("  ".join(f"{key} {one.value:.4g}" for group in measured.groups.values() for key, one in group.items()))


class Judged:
    """What the judges see in decoded images; of the images themselves nothing is kept."""

    def __init__(self, judges: dict[str, Judge], labels: np.ndarray, max_features: int):
        self.judges, self.labels = judges, labels
        self.summaries = {network: Summary(len(labels), max_features) for network in judges}

    def update(self, decoded: Tensor) -> None:
        for network, judge in self.judges.items():
            for batch in judge.batches(decoded.numpy()):
                self.summaries[network].update(batch)

    def record(
        self, found: Recorder, network: str, name: str, reference: Reference, protocol: Protocol, paired: bool
    ) -> None:
        """The distance from the test images. paired: they are the originals, and were drawn together with what is made of
        them, so that both influences belong to one image."""
        summary, other = self.summaries[network], reference.moments("test")
        influences = frechet.influence(summary.features, summary.moments, other)
        if paired:
            originals = reference.features_at("test", summary.kept)
            influences = influences + frechet.influence(originals, other, summary.moments)
        error = frechet.standard_error(influences, self.labels[summary.kept], len(self.labels))
        found.add("reconstruction", name, frechet.distance(summary.moments, other), protocol, error)


def perturbed(indices: Tensor, model: torch.nn.Module, settings: Evaluate, generator: torch.Generator) -> Tensor:
    """The indices, a share of them replaced by one of the nearest other codes: the small mistakes that a prior makes.

    Source: Qiu et al. (RobustTok), 2025, arXiv:2503.08354, section 3, whose pFID is taken of such images.
    """
    is_replaced = torch.rand(indices.shape, generator=generator).to(indices.device) < settings.perturbation_share
    near = model.quantizer.neighbors(indices[is_replaced], settings.perturbation_neighbors)
    choice = torch.randint(settings.perturbation_neighbors, (len(near), 1), generator=generator).to(indices.device)
    replaced = indices.clone()
    replaced[is_replaced] = near.gather(1, choice).squeeze(1)
    return replaced


def _count_codes(found: Recorder, tokens: Path, codebook_size: int, dataset: str) -> Tensor:
    """(K,) how often each code occurs among the tokens of the training images; its figures go to `found`."""
    _, learned = token_artifact.read(tokens, "indices")
    train = learned["train"]
    counts = torch.zeros(codebook_size, dtype=torch.long)
    for start in range(0, len(train), 10_000):
        rows = torch.arange(start, min(start + 10_000, len(train)))
        counts += codebook.count(train.batch(rows).tokens, codebook_size)
    protocol = figures.without_network(dataset, "tokens of the training images", len(train))
    for key, value in codebook.use(counts)._asdict().items():
        found.add("codebook", key, value, protocol)
    return counts


def _lpips(settings: Evaluate, shortest_side: int, device: torch.device) -> Lpips | None:
    if not settings.lpips_weights:
        return None
    if shortest_side < SMALLEST_LPIPS:
        raise ValueError(
            f"evaluate.lpips_weights: images of {shortest_side} pixels are too small for LPIPS, whose network halves them four "
            f"times, expected at least {SMALLEST_LPIPS}: leave lpips_weights out"
        )
    keys = ("evaluate.lpips_weights", "evaluate.lpips_sha256")
    remedy = "Without lpips_weights there is no such figure"
    path = Path(settings.lpips_weights)
    weights = weights_file.read(path, settings.lpips_sha256, keys, "the VGG weights of LPIPS", remedy)
    return Lpips(weights).eval().to(device)

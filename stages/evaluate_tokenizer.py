"""Judge a tokenizer alone: reconstructions of the test images, also from indices that are a little wrong; what the best
prior on its tokens could reach, and how easily a small one learns them; and how the training images (in their first view)
use the codebook.
"""

from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from tessera.artifacts import checkpoints, pictures, whole
from tessera.artifacts import folder as artifact
from tessera.artifacts import images as image_artifact
from tessera.artifacts.images import Images
from tessera.artifacts.samples import floor_rows
from tessera.artifacts.shards import spread
from tessera.components import sets
from tessera.contracts import Job
from tessera.evaluation import probe, reconstructions
from tessera.evaluation.figures import Recorder, text
from tessera.evaluation.panel import Panel
from tessera.evaluation.reconstructions import OF_TEST, AllPairs, Codes, Decoded
from tessera.params import Pipeline

SHOWN = 50  # originals in the picture, each beside its reconstruction


@torch.no_grad()
def run(  # its paths are the options of its command
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
    panel = Panel(params, features, reference, splits)
    device = next(iter(panel.judges.values())).device
    model, _, _ = checkpoints.load_model(tokenizer, "tokenizers")
    model.to(device)
    reconstruct = reconstructions.reconstruction(model, device)
    found = Recorder()
    group = found.group("reconstruction")
    batches = partial(_batches, job, params.encode_tokens.batch_size)
    pairs, chosen = AllPairs(panel, spec, device), spread(len(test), SHOWN)
    shown = np.empty((2 * len(chosen), *test.pixels.row_shape), np.uint8)
    if sets(spec, "bits"):
        shown = shown.astype(np.uint16)
    decoded = Decoded(panel, "r", test.labels, are_originals=True)
    for rows, originals in batches(test, np.arange(len(test)), "test images"):
        after = reconstruct(originals)
        decoded.update(after)
        pairs.update(originals, after)
        is_shown, at = np.isin(rows, chosen), np.isin(chosen, rows)
        shown[0::2][at], shown[1::2][at] = originals[is_shown], after[is_shown]
    pairs.record(test, artifact.part_sha256(images, "test"), group)
    decoded.measure(OF_TEST, group)
    counts = torch.zeros(0, dtype=torch.long)
    if model.codebook_size:
        perturb = reconstructions.perturbation(model, device, params.evaluate, params.seed)
        decoded = Decoded(panel, "p", test.labels, are_originals=True)
        for _, originals in batches(test, np.arange(len(test)), "from perturbed indices"):
            decoded.update(perturb(originals))
        share, neighbors = params.evaluate.perturbation_share, params.evaluate.perturbation_neighbors
        decoded.measure(f"{OF_TEST} from perturbed indices", group, share=share, neighbors=neighbors)
        codes = Codes(tokens, model.codebook_size, spec.name)
        panel.measure("of_tokens", codes, found.group("codebook"))
        counts = codes.counts
    if sets(probe.entry(params.evaluate), "probe_steps"):
        probe.measure(params, panel, tokens, model, group, job)
    floor = floor_rows(train.labels, spec.num_classes, params.sample_images.num_images, params.seed)
    decoded = Decoded(panel, "floor_", train.labels[floor])
    for _, originals in batches(train, floor, "training images"):
        decoded.update(reconstruct(originals))
    decoded.measure("reconstructions of training images", group)
    _write_uses(codebook_uses, counts)
    pictures.save_grid(picture, shown, 10)
    job.attach(picture, "reconstructions.png")
    measured = found.measured()
    measured.write(metrics)
    job.say("  ".join(f"{key} {text(one.value)}" for group in measured.groups.values() for key, one in group.items()))


def _batches(
    job: Job, batch_size: int, dataset: Images, rows: np.ndarray, what: str
) -> Iterator[tuple[np.ndarray, Tensor]]:
    """Rows and the images at them, counted aloud."""
    starts = range(0, len(rows), batch_size)
    for start in job.track(starts, len(starts), what):
        some = rows[start : start + batch_size]
        yield some, dataset.uint8(some)


def _write_uses(path: Path, counts: Tensor) -> None:
    """How often each code is used, the most used first."""
    ranked = pd.DataFrame({"rank": np.arange(len(counts)), "uses": counts.sort(descending=True).values.numpy()})
    with whole.file(path) as beside:
        ranked.to_csv(beside, index=False)

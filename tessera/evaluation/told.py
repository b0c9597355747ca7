"""Images beside the captions that they were told, or that people gave them, as a judge that reads captions sees them."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tessera import seeding
from tessera.artifacts import captions as image_captions
from tessera.artifacts.captions import Captions, examples_of, grouping
from tessera.artifacts.images import Images
from tessera.artifacts.samples import Samples
from tessera.artifacts.shards import Shards, spread
from tessera.bases.captions import encoded
from tessera.contracts import Told
from tessera.evaluation.judge import Judge
from tessera.evaluation.panel import Panel

AT_ONCE = 1000  # captions, or images beside all captions


def measure_samples(panel: Panel, images: Path, drawn: Samples, samples: Path, found: Any) -> None:
    """Samples of a prior that was told captions of images; of others there is nothing to ask."""
    examples = examples_of(samples)
    judges = _judges(panel)
    if not judges or not any(example.caption for example in examples):
        return
    told = [example.caption for example in examples]
    groups = np.array([example.group for example in examples])
    captions = {split: image_captions.read(images, split) for split in ("train", "test")}
    for judge in judges:
        panel.measure("of_told", _told(panel, judge, captions, [(drawn.pixels, None)], told, groups), found)


def measure_real(panel: Panel, images: Path, splits: dict[str, Images], number: int, found: Any) -> None:
    """As many images as there are samples, half of them training images, half test images, beside the first caption of each."""
    judges = _judges(panel)
    captions = {split: image_captions.read(images, split) for split in splits}
    if not judges or not any(each.longest for each in captions.values()):
        return
    group_of = grouping(captions["train"])
    looked_at, told = [], []
    for (split, each), half in zip(splits.items(), (number - number // 2, number // 2), strict=True):
        described = np.flatnonzero(captions[split].counts)
        rows = described[np.resize(spread(len(described), half), half)]  # again from the first, where they are too few
        looked_at.append((each.pixels, rows))
        told += [captions[split].of(int(row))[0] for row in rows]
    groups = np.array([group_of(caption) for caption in told])
    for judge in judges:
        panel.measure("of_told", _told(panel, judge, captions, looked_at, told, groups), found)


def _judges(panel: Panel) -> list[Judge]:
    """Those that read captions."""
    return [judge for judge in panel.judges.values() if hasattr(judge.model, "of_captions")]


@torch.no_grad()
def _told(
    panel: Panel,
    judge: Judge,
    captions: dict[str, Captions],
    looked_at: list[tuple[Shards, np.ndarray | None]],
    told: list[str],
    groups: np.ndarray,
) -> Told:
    """looked_at: images and which rows of them, in the order of `told`."""
    every = sorted({caption for split in captions.values() for caption in split.all()} | set(told))
    number = {caption: place for place, caption in enumerate(every)}
    right = np.array([number[caption] for caption in told])
    others = _of_others(right, groups, panel.seed)
    batches = [every[start : start + AT_ONCE] for start in range(0, len(every), AT_ONCE)]
    of_captions = torch.cat(
        [judge.model.of_captions(encoded(some, judge.model.max_bytes).to(judge.device)) for some in batches]
    )
    found = [torch.nn.functional.normalize(batch, dim=1) for one in looked_at for batch in judge.batches(*one)]
    seen = torch.cat(found)
    cosines = tuple(
        (seen * of_captions[torch.from_numpy(wanted)]).sum(dim=1).cpu().numpy() for wanted in (right, others)
    )
    ranks = tuple(_ranks(seen, of_captions, wanted) for wanted in (right, others))
    protocol = panel.references[judge.name].protocol_of("test", "samples", len(told), 0, num_captions=len(every))
    is_first = judge is _judges(panel)[0]
    return Told(judge.config.kind, is_first, cosines, ranks, groups, len(every), protocol)


def _ranks(images: Tensor, captions: Tensor, wanted: np.ndarray) -> np.ndarray:
    """(N, E), (M, E), (N,) numbers of captions -> (N,) how many captions are nearer; half of those that are equally near."""
    found = []
    for some, places in zip(images.split(AT_ONCE), torch.from_numpy(wanted).split(AT_ONCE), strict=True):
        likeness = some @ captions.T
        own = likeness.gather(1, places.to(likeness.device).unsqueeze(1))
        found.append((likeness > own).sum(dim=1) + ((likeness == own).sum(dim=1) - 1) / 2)
    return torch.cat(found).cpu().numpy()


def _of_others(right: np.ndarray, groups: np.ndarray, seed: int) -> np.ndarray:
    """(N,) the captions in another order within each group."""
    found, generator = right.copy(), seeding.numpy_generator(seed, "shuffled captions")
    for group in np.unique(groups):
        members = generator.permutation(np.flatnonzero(groups == group))
        found[members] = right[np.roll(members, 1)]
    return found

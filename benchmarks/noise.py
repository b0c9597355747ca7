"""What a Fréchet distance is worth at n images: its value, its standard error, and the spread that draws really have.

    python -m benchmarks.noise --images data/images --features data/features/classifier --reference data/reference/classifier

Draws are disjoint sets of training images with the data's class shares, each against all test images; once as they are,
and once a little blurred, so that the distance is well above its floor, as it is for samples.
"""

import argparse
from pathlib import Path

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F

from tessera.artifacts import images as image_artifact
from tessera.artifacts.images import to_float
from tessera.artifacts.shards import Shards, in_batches
from tessera.evaluation.judge import Judge
from tessera.evaluation.reference import Reference
from tessera.metrics import frechet


@torch.no_grad()
def features(judge: Judge, pixels: Shards, blurred: bool) -> np.ndarray:
    """(N, D) of all images, mixed with half of their 3x3 mean where blurred."""
    found = []
    for batch in in_batches(pixels):
        images = to_float(torch.from_numpy(batch))
        if blurred:
            images = 0.5 * (images + F.avg_pool2d(images, 3, stride=1, padding=1, count_include_pad=False))
        found.append(judge.model.features(images.to(judge.device)).double().cpu().numpy())
    return np.concatenate(found)


def draws(labels: np.ndarray, size: int) -> list[np.ndarray]:
    """Disjoint sets of `size` rows, the classes spread evenly over them."""
    order = np.random.default_rng(0).permutation(len(labels))
    by_class = order[np.argsort(labels[order], kind="stable")]
    number = len(labels) // size
    return [by_class[start::number][:size] for start in range(number)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("images", "features", "reference"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    parser.add_argument("--sizes", type=int, nargs="+", default=[500, 1000, 2000])
    given = parser.parse_args()
    _, splits = image_artifact.read(given.images)
    train, judge, reference = splits["train"], Judge.read(given.features), Reference(given.reference).moments("test")
    rows = []
    for blurred in (False, True):
        known = features(judge, train.pixels, blurred)
        for size in given.sizes:
            found = []
            for chosen in draws(train.labels, size):
                own = frechet.moments(known[chosen])
                influences = frechet.influence(known[chosen], own, reference)
                error = frechet.standard_error(influences, train.labels[chosen], size)
                found.append((frechet.distance(own, reference), error))
            values, errors = np.array(found).T
            what = "blurred" if blurred else "as they are"
            rows.append((what, size, len(found), values.mean(), errors.mean(), values.std(ddof=1)))
    columns = ["training images", "n", "draws", judge.frechet_name, "standard_error", "spread of draws"]
    print(pd.DataFrame(rows, columns=columns).round(4).to_string(index=False))


if __name__ == "__main__":
    main()

"""Seconds and memory of each part of an evaluation, from features to figures, beside torch-fidelity and torchmetrics.

python -m benchmarks.evaluation [--counts 2000 8000] [--width 2048] [--rounds 3] [--subsets 100 5] [--threads 1]

Both sets have `count` images, and all libraries get the same float32 features, as networks give them. For the moments
they arrive in batches that are made on the fly, which is part of the time; a library that needs them all at once keeps
them. The kernel distance is ours of all images, with its error, and theirs of 100 subsets of 1,000, KID's default, and of 5.
For precision and recall ours are those that an evaluation makes, with density and coverage of k = 5 beside them, which the
other libraries do not give.
The libraries take turns in every round, so that a busy machine slows all alike; only ratios within a run mean
anything. Memory is the peak of the process during one call, less what it held before: the features or moments given.
"""

import argparse
import ctypes
import gc
import math
import statistics
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from tessera.metrics import frechet, kernel, precision_recall

BATCH = 500
SETS = (0, 1)  # reference and samples
KERNEL_SUBSET = 1000


def batches(which: int, count: int, width: int) -> Iterator[Tensor]:
    """(500, width) float32 at a time, at least 0 as pooled features are; the same ones at every call."""
    scales = torch.logspace(-1.5, 0, width)
    for start in range(0, count, BATCH):
        generator = torch.Generator().manual_seed(2 * start + which)
        rows = torch.randn(min(BATCH, count - start), width, generator=generator)
        yield (rows * scales + 0.3 + 0.02 * which).relu_()


class Identity(nn.Module):
    """What torchmetrics takes for the feature network: images are features already."""

    def __init__(self, width: int):
        super().__init__()
        self.num_features = width

    def forward(self, features: Tensor) -> Tensor:
        return features


def our_moments(count: int, width: int) -> list[frechet.Moments]:
    found = []
    for which in SETS:
        accumulator = frechet.MomentsAccumulator()
        for batch in batches(which, count, width):
            accumulator.update(batch)
        found.append(accumulator.moments())
    return found


def torchmetrics_moments(count: int, width: int) -> object:
    from torchmetrics.image.fid import FrechetInceptionDistance

    metric = FrechetInceptionDistance(feature=Identity(width))
    for which in SETS:
        for batch in batches(which, count, width):
            metric.update(batch, real=which == 0)
    return metric


def fidelity_moments(count: int, width: int) -> list[dict]:
    from torch_fidelity.metric_fid import fid_features_to_statistics

    return [fid_features_to_statistics(torch.cat(list(batches(which, count, width)))) for which in SETS]


def fidelity_distance(a: dict, b: dict) -> float:
    from torch_fidelity.metric_fid import fid_statistics_to_metric

    return fid_statistics_to_metric(a, b, False)["frechet_inception_distance"]


def our_kernel(a: Tensor, b: Tensor) -> float:
    return kernel.distance(a, b).value


def torchmetrics_kernel(a: Tensor, b: Tensor, subsets: int) -> float:
    from torchmetrics.image.kid import KernelInceptionDistance

    metric = KernelInceptionDistance(feature=Identity(a.shape[1]), subsets=subsets, subset_size=KERNEL_SUBSET)
    metric.update(a, real=True)
    metric.update(b, real=False)
    return float(metric.compute()[0])


def fidelity_kernel(a: Tensor, b: Tensor, subsets: int) -> float:
    from torch_fidelity.metric_kid import kid_features_to_metric

    return kid_features_to_metric(b, a, kid_subsets=subsets, kid_subset_size=KERNEL_SUBSET, verbose=False)[
        "kernel_inception_distance_mean"
    ]


def our_precision(a: Tensor, b: Tensor) -> float:
    return precision_recall.neighborhoods(a, b).precision


def fidelity_precision(a: Tensor, b: Tensor, save_cpu_ram: bool) -> float:
    from torch_fidelity.metric_prc import prc_features_to_metric

    return prc_features_to_metric(b, a, save_cpu_ram=save_cpu_ram, prc_batch_size=1024, verbose=False)["precision"]


Calls = dict[str, Callable[[], object]]


def parts(count: int, width: int, kernel_subsets: list[int]) -> Iterator[tuple[str, Calls]]:
    """Each part and its call by library; what the calls get is there before."""
    from torchmetrics.image.fid import _compute_fid

    yield (
        "moments",
        {
            "tessera": partial(our_moments, count, width),
            "torchmetrics": partial(torchmetrics_moments, count, width),
            "torch-fidelity": partial(fidelity_moments, count, width),
        },
    )
    a, b = our_moments(count, width)
    theirs = [{"mu": m.mean.numpy(), "sigma": m.covariance.numpy()} for m in (a, b)]
    yield (
        "Frechet distance",
        {
            "tessera": partial(frechet.distance, a, b),
            "torchmetrics": partial(_compute_fid, a.mean, a.covariance, b.mean, b.covariance),
            "torch-fidelity": partial(fidelity_distance, *theirs),
        },
    )
    del a, b, theirs
    a, b = (torch.cat(list(batches(which, count, width))) for which in SETS)
    yield "kernel distance", {"tessera": partial(our_kernel, a, b)}
    for subsets in kernel_subsets:
        yield (
            f"kernel distance, {subsets} subsets",
            {
                "torchmetrics": partial(torchmetrics_kernel, a, b, subsets),
                "torch-fidelity": partial(fidelity_kernel, a, b, subsets),
            },
        )
    yield (
        "precision, recall",
        {
            "tessera": partial(our_precision, a, b),
            "torch-fidelity": partial(fidelity_precision, a, b, False),
            "torch-fidelity, saving memory": partial(fidelity_precision, a, b, True),
        },
    )


def median_seconds(calls: Calls, rounds: int) -> dict[str, float]:
    """CPU seconds by library, after one round to warm up."""
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for number in range(rounds + 1):
        for name, call in calls.items():
            began = time.process_time()
            call()
            if number:
                seconds[name].append(time.process_time() - began)
    return {name: statistics.median(times) for name, times in seconds.items()}


def growth(call: Callable[[], object]) -> tuple[float, float | None]:
    """Peak resident MiB during a call less those before it, on Linux (elsewhere NaN); and its value, if a number.

    The call has run before, so that code and caches of the libraries do not count.
    """
    gc.collect()
    peak_file = Path("/proc/self/clear_refs")
    if not peak_file.exists():
        value, grown = call(), math.nan
    else:
        ctypes.CDLL(None).malloc_trim(0)  # what is free already would hide growth
        peak_file.write_text("5")  # the peak starts from here
        before = resident("VmRSS")
        value = call()
        grown = resident("VmHWM") - before
    is_number = isinstance(value, float) or (isinstance(value, Tensor) and value.ndim == 0)
    return grown, float(value) if is_number else None


def resident(what: str) -> float:
    """MiB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(what)) / 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--counts", type=int, nargs="+", default=[2000, 8000], help="images of each set, ascending")
    parser.add_argument("--width", type=int, default=2048, help="features per image")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument(
        "--subsets", type=int, nargs="+", default=[100, 5], help=f"of {KERNEL_SUBSET} images, for the kernel distance"
    )
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()

    from threadpoolctl import threadpool_limits

    torch.set_num_threads(arguments.threads)
    width = arguments.width
    with threadpool_limits(arguments.threads):
        for count in arguments.counts:
            print(f"{count:,} images a set, width {width}, {arguments.threads} thread(s), {arguments.rounds} rounds")
            for part, calls in parts(count, width, arguments.subsets):
                seconds = median_seconds(calls, arguments.rounds)
                for name, call in calls.items():
                    mebibytes, value = growth(call)
                    ratio = seconds[name] / seconds["tessera"]
                    shown = "" if value is None else f"  value {value:.9f}"
                    print(
                        f"  {part:28s} {name:30s} {seconds[name]:8.2f} CPU s {ratio:6.2f}x {mebibytes:8.0f} MiB{shown}",
                        flush=True,
                    )
        print("moments alone, memory against the number of images:")
        for count in (2000, 8000, 32_000):
            calls = {"tessera": our_moments, "torchmetrics": torchmetrics_moments, "torch-fidelity": fidelity_moments}
            grown = {name: growth(partial(call, count, width))[0] for name, call in calls.items()}
            print(
                f"  {count:>7,}  " + "  ".join(f"{name} {value:6.0f} MiB" for name, value in grown.items()), flush=True
            )


if __name__ == "__main__":
    main()

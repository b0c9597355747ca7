"""CPU seconds of the Fréchet distance at 2048 features, from means and covariances, beside two other libraries.

python -m benchmarks.frechet [--rounds 5] [--threads 1] [--width 2048]

The libraries take turns in every round, so that a busy machine slows all alike; only ratios within a run mean anything.
"""

import argparse
import statistics
import time
from collections.abc import Callable

import torch


def measure(calls: dict[str, Callable[[], float]], rounds: int) -> tuple[dict[str, float], dict[str, float]]:
    """The median CPU seconds of each call over the rounds, after one round to warm up, and what it returned."""
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    values: dict[str, float] = {}
    for number in range(rounds + 1):
        for name, call in calls.items():
            began = time.process_time()
            values[name] = float(call())
            if number:
                seconds[name].append(time.process_time() - began)
    return {name: statistics.median(times) for name, times in seconds.items()}, values


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--width", type=int, default=2048, help="features per image")
    arguments = parser.parse_args()

    from threadpoolctl import threadpool_limits
    from torch_fidelity.metric_fid import fid_statistics_to_metric
    from torchmetrics.image.fid import _compute_fid

    from tessera.metrics import frechet

    torch.set_num_threads(arguments.threads)
    generator = torch.Generator().manual_seed(0)
    width = arguments.width
    scales = torch.logspace(-2, 0.5, width, dtype=torch.float64)
    full = [
        frechet.moments(torch.randn(2 * width, width, generator=generator, dtype=torch.float64) * scales + shift)
        for shift in (0.0, 0.1)
    ]
    few = [
        frechet.moments(torch.randn(width // 4, width, generator=generator, dtype=torch.float64) * scales + shift)
        for shift in (0.0, 0.1)
    ]
    with threadpool_limits(arguments.threads):
        for what, (a, b) in (("more images than features", full), ("a quarter as many images as features", few)):
            theirs = [{"mu": m.mean.numpy(), "sigma": m.covariance.numpy()} for m in (a, b)]
            calls: dict[str, Callable[[], float]] = {
                "tessera": lambda a=a, b=b: frechet.distance(a, b),
                "torchmetrics": lambda a=a, b=b: _compute_fid(a.mean, a.covariance, b.mean, b.covariance),
                "torch-fidelity": lambda theirs=theirs: fid_statistics_to_metric(*theirs, False)[
                    "frechet_inception_distance"
                ],
            }
            seconds, values = measure(calls, arguments.rounds)
            print(f"{what}, width {width}, {arguments.threads} thread(s), median of {arguments.rounds} rounds")
            for name, value in seconds.items():
                print(
                    f"  {name:15s} {value:7.3f} CPU s  {value / seconds['tessera']:5.2f}x  distance {values[name]:.9f}"
                )


if __name__ == "__main__":
    main()

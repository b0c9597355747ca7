"""What a training waits for besides its arithmetic: rows, their order, checkpoints.

    python -m benchmarks.training [--images 600] [--weights 40000000]

A device is stood in for by meta tensors, which nothing is copied to, and a sleep of 40 ms in the place of its step.
"""

import argparse
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from torch import nn

from tessera.artifacts import folder as artifact
from tessera.artifacts import images as image_artifact
from tessera.artifacts.images import ImageWriter, to_float
from tessera.contracts import ImageSpec
from tessera.nn.processes import Processes
from tessera.training.reading import Reader, rows_of_step
from tessera.training.state import State

SIDE, BATCH, STEPS, STEP_SECONDS = 256, 256, 100, 0.040


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=600)
    parser.add_argument("--weights", type=int, default=40_000_000)
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        reading(Path(folder) / "images", asked.images)
        order()
        checkpoint(Path(folder) / "state", asked.weights)


def reading(folder: Path, number: int) -> None:
    spec = ImageSpec(name="x", channels=3, height=SIDE, width=SIDE, num_classes=1, class_names=("all",), licence="none")
    random = np.random.default_rng(0)
    with artifact.create(folder) as place, ImageWriter(place, "train", spec) as writer:
        writer.append(random.integers(0, 256, (number, 3, SIDE, SIDE), np.uint8), np.zeros(number, np.int64))
    images = image_artifact.Images(folder, "train", spec)
    reader = Reader(images, torch.device("meta"), steps=range(STEPS), batch_size=BATCH, micro_batches=1, seed=0)
    for _ in Reader(images, torch.device("meta"), steps=range(3), batch_size=BATCH, micro_batches=1, seed=0):
        pass  # the files are in memory
    began = time.perf_counter()
    for _ in reader:
        time.sleep(STEP_SECONDS)
    each = (time.perf_counter() - began) / STEPS
    print(
        f"reading {BATCH} images of {SIDE}x{SIDE} beside a step of {1000 * STEP_SECONDS:.0f} ms: {1000 * each:.1f} ms a step"
    )
    rows, (batch,) = reader.rows(0)[0], [images.uint8(reader.rows(0)[0].numpy())]
    for name, work in (("gathering", lambda: images.uint8(rows.numpy())), ("to float", lambda: to_float(batch))):
        began = time.perf_counter()
        for _ in range(5):
            work()
        print(f"  {name} alone: {200 * (time.perf_counter() - began):.0f} ms")


def order() -> None:
    for number in (10**6, 10**7):
        rows_of_step(0, BATCH, number, 0)
        began = time.perf_counter()
        for step in range(1, 101):
            rows_of_step(step, BATCH, number, 0)
        print(f"rows of a step among {number:,}: {10 * (time.perf_counter() - began):.3f} ms")


def checkpoint(folder: Path, weights: int) -> None:
    width = 4096
    model = nn.Sequential(*(nn.Linear(width, width, bias=False) for _ in range(max(1, weights // width**2))))
    average = nn.Sequential(*(nn.Linear(width, width, bias=False) for _ in model))
    optimizer = torch.optim.AdamW(model.parameters())
    for weight in model.parameters():
        weight.grad = torch.zeros_like(weight)
    optimizer.step()
    state = State(folder, model, average, {"prior": [optimizer]}, Processes(1))
    size = 4 * sum(weight.nelement() for weight in model.parameters()) * 4 / 1e9  # with its average and two moments
    held = [torch.empty_like(weight) for weight in model.parameters()]
    for number in range(4):
        optimizer.step()  # as a training does: memory that nothing has touched for seconds may be slow to come by
        for _ in range(2):
            began = time.perf_counter()
            for copy, weight in zip(held, model.parameters(), strict=True):
                copy.copy_(weight.detach())
            plain = (time.perf_counter() - began) / (size / 4)
        began = time.perf_counter()
        state.save(number)
        stalled = time.perf_counter() - began
        state.wait()
        whole = time.perf_counter() - began
        print(
            f"checkpoint of {size:.2f} GB: stalls {stalled / size:.2f} s per GB (a copy in memory {plain:.2f}), "
            f"is whole after {whole / size:.2f} s per GB"
        )
    state.close()


if __name__ == "__main__":
    main()

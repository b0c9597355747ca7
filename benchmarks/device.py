"""What this machine's device can do, and what each part of a preset makes of it: one table, a few seconds a row.

    python -m benchmarks.device [--preset presets/cifar10.yaml] [--image 3x32x32] [--classes 10] [--seconds 10]

Trainings are those of the preset on random images and tokens, through the training loop itself: as the preset has them, then in
float32 and bfloat16, and compiled. A row is a process of its own, so that one which needs too much memory costs no other.
"""

import argparse
import contextlib
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tessera import params as all_params
from tessera import seeding
from tessera.artifacts.images import to_float
from tessera.check.problems import tokens_of
from tessera.components import load
from tessera.contracts import ImageBatch, ImageSpec, Planned, TokenBatch
from tessera.nn.precision import in_precision
from tessera.params import Pipeline
from tessera.running.job import Job
from tessera.training import speed
from tessera.training.loop import fit

WARM_UP = 12  # steps, and as many more as take two seconds
VARIANTS = {
    "as set": {},
    "fp32": {"precision": "fp32", "compile": False},
    "bf16": {"precision": "bf16", "compile": False},
    "bf16 compiled": {"precision": "bf16", "compile": True},
}


class Enough(Exception):
    """The time for this row is over."""


class Rows:
    """Random rows in the host's memory, as they are stored; ends the training when it was timed for long enough."""

    def __init__(self, batch: ImageBatch | TokenBatch, seconds: float, device: torch.device):
        self.whole, self.seconds, self.device = batch, seconds, device
        self.steps, self.began, self.taken, self.per_step = 0, 0.0, 0, 0.0
        self.first = time.perf_counter()

    def __len__(self) -> int:
        return len(self.whole.labels)

    def stored(self, rows: torch.Tensor, generator: torch.Generator | None) -> Any:
        return type(self.whole)(*(tensor[rows] for tensor in self.whole))

    def batch_of(self, stored: Any) -> Any:
        self.steps += 1
        if not self.began and self.steps >= WARM_UP and time.perf_counter() - self.first > 2:
            wait(self.device)
            self.began, self.taken = time.perf_counter(), self.steps
        elif self.began and self.steps > self.taken + 2 and time.perf_counter() - self.began > self.seconds:
            wait(self.device)
            self.per_step = (time.perf_counter() - self.began) / (self.steps - self.taken)
            raise Enough
        return stored if isinstance(stored, TokenBatch) else ImageBatch(to_float(stored.images), stored.labels)

    def on(self, device: torch.device) -> "Rows":
        return Rows(type(self.whole)(*(tensor.to(device) for tensor in self.whole)), self.seconds, self.device)


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def rate(work: Any, seconds: float, device: torch.device) -> float:
    """Calls per second, after one."""
    work()
    wait(device)
    began, calls = time.perf_counter(), 0
    while time.perf_counter() - began < seconds:
        work()
        wait(device)
        calls += 1
    return calls / (time.perf_counter() - began)


def limits(device: torch.device, seconds: float) -> dict[str, float]:
    """TFLOP/s of large products, and GB/s of copies in its memory and to it."""
    size = 8192 if device.type == "cuda" else 1024
    found = {}
    for dtype in (torch.float32, torch.bfloat16):
        a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
        found[f"{str(dtype).removeprefix('torch.')} TFLOP/s"] = (
            2e-12 * size**3 * rate(lambda a=a, b=b: a @ b, seconds, device)
        )
    whole = torch.zeros(2**28 if device.type == "cuda" else 2**24, dtype=torch.uint8, device=device)
    target = torch.empty_like(whole)
    found["memory GB/s"] = 2e-9 * len(whole) * rate(lambda: target.copy_(whole), seconds, device)
    if device.type == "cuda":
        pinned = torch.zeros(len(whole), dtype=torch.uint8).pin_memory()
        found["to the device GB/s"] = (
            1e-9 * len(whole) * rate(lambda: target.copy_(pinned, non_blocking=True), seconds, device)
        )
    return found


def trained(
    params: Pipeline, spec: ImageSpec, entry: str, variant: str, seconds: float, device: torch.device
) -> dict[str, Any]:
    """Steps of the training of an entry such as tokenizers/vqgan, timed by `fit`."""
    speed.is_counted = lambda reader: True  # on a CPU too: nobody compares its bits here
    section, name = entry.split("/")
    folder = "priors" if section == "systems" else section
    config, of = (
        (params.systems[name].prior, tokens(params, spec, name))
        if section == "systems"
        else (getattr(params, section)[name], spec)
    )
    training = config.training.model_copy(update=VARIANTS[variant] | {"num_steps": 10**6})
    config = config.model_copy(update={"training": training})
    module = load(folder, config.kind)
    number = max(512, training.batch_size)
    labels = torch.arange(number) % spec.num_classes
    if section != "systems":
        batch = ImageBatch(
            torch.randint(256, (number, spec.channels, spec.height, spec.width), dtype=torch.uint8), labels
        )
    elif module.LEARNS == "indices":
        batch = TokenBatch(torch.randint(of.codebook_size, (number, *of.index_grid)), labels)
    else:
        batch = TokenBatch(torch.randn(number, *of.latent_shape), labels)
    rows = Rows(batch, seconds, device)
    if training.data_on_device:  # the loop asks for it; the same rows are to be timed
        rows = rows.on(device)
        training = training.model_copy(update={"data_on_device": False})
    with tempfile.TemporaryDirectory() as place:
        job = Job(entry, Path(place))
        job.checkpoint_seconds, job.say, job.resumable = 1e9, lambda line: None, lambda *of: None
        with contextlib.suppress(Enough):
            fit(module.Objective(module.Model(config, of), config), rows, training, seed=0, job=job)
        counted = job.state / speed.COUNTED
        flops = json.loads(counted.read_text())["flops"] if counted.is_file() else None
    memory = torch.cuda.max_memory_allocated() / 2**30 if device.type == "cuda" else None
    return {
        "ms": 1000 * rows.per_step,
        "images/s": training.batch_size / rows.per_step,
        "flops": flops,
        "GiB": memory,
        "precision": training.precision,
    }


def tokens(params: Pipeline, spec: ImageSpec, system: str) -> Any:
    config = params.tokenizers[params.systems[system].tokenizer]
    labels = {split: np.arange(1000) % spec.num_classes for split in ("train", "test")}
    tokenizer = load("tokenizers", config.kind).Model(config, spec)
    return tokens_of(tokenizer, Planned(spec, labels, 1000, 1000, ()))


def drawn(params: Pipeline, spec: ImageSpec, system: str, seconds: float, device: torch.device) -> dict[str, Any]:
    """Samples of a system, decoded."""
    config, of = params.systems[system].prior, tokens(params, spec, system)
    sampling = params.sampling(system)
    prior = load("priors", config.kind).Model(config, of).to(device).eval().requires_grad_(False)
    prior = in_precision(prior, sampling.precision)
    number = params.sample_images.batch_size
    labels = torch.arange(number, device=device) % spec.num_classes
    each = rate(
        lambda: prior.sample(labels, sampling, seeding.generator(0, "device", device=device)),
        seconds,
        device,
    )
    return {"ms": 1000 / each, "images/s": number * each}


def one(asked: argparse.Namespace, params: Pipeline, spec: ImageSpec, device: torch.device) -> None:
    what, _, variant = asked.row.partition(":")
    if what == "limits":
        found = limits(device, asked.seconds / 5)
    elif variant == "drawing":
        found = drawn(params, spec, what.split("/")[1], asked.seconds, device)
    else:
        found = trained(params, spec, what, variant, asked.seconds, device)
    print("ROW " + json.dumps(found))


def told(row: str) -> dict[str, Any] | str:
    """What a row's process found, or its last line."""
    command = [sys.executable, "-m", "benchmarks.device", *sys.argv[1:], "--row", row]
    done = subprocess.run(command, capture_output=True, text=True)
    found = [line for line in done.stdout.splitlines() if line.startswith("ROW ")]
    return json.loads(found[0][4:]) if found else (done.stderr.strip().splitlines() or ["it said nothing"])[-1]


def main() -> None:
    is_gpu = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", type=Path, default=Path("presets/cifar10.yaml" if is_gpu else "presets/zoo.yaml"))
    parser.add_argument("--image", default="3x32x32" if is_gpu else "1x8x8", help="channels x height x width")
    parser.add_argument("--classes", type=int, default=10)
    parser.add_argument("--seconds", type=float, default=10.0)
    parser.add_argument("--row", help=argparse.SUPPRESS)
    asked = parser.parse_args()
    params = all_params.read(asked.preset)
    channels, height, width = map(int, asked.image.split("x"))
    names = tuple(map(str, range(asked.classes)))
    spec = ImageSpec(
        name="x",
        channels=channels,
        height=height,
        width=width,
        num_classes=asked.classes,
        class_names=names,
        licence="none",
    )
    device = torch.device("cuda" if is_gpu else "cpu")
    if asked.row:
        one(asked, params, spec, device)
        return
    found = told("limits:")
    print(torch.cuda.get_device_name() if is_gpu else f"cpu x{torch.get_num_threads()}", found, flush=True)
    limit = {"fp32": "float32 TFLOP/s", "bf16": "bfloat16 TFLOP/s"}
    most = {precision: found[name] for precision, name in limit.items()} if isinstance(found, dict) else {}
    entries = [f"features/{name}" for name, config in params.features.items() if hasattr(config, "training")]
    entries += [f"tokenizers/{name}" for name, config in params.tokenizers.items() if config.kind != "none"]
    entries += [f"systems/{name}" for name in params.systems]
    print(f"{'':34} {'':14} {'ms':>9} {'images/s':>10} {'TFLOP/s':>8} {'of limit':>8} {'GiB':>6}")
    for entry in entries:
        flops = None
        for variant in [*VARIANTS, *(["drawing"] if entry.startswith("systems/") else [])]:
            row = told(f"{entry}:{variant}")
            if isinstance(row, str):
                print(f"{entry:34} {variant:14} {row[:100]}", flush=True)
                continue
            flops = row.get("flops") or flops  # what is compiled is not counted; it does the same
            tflops = flops / row["ms"] / 1e9 if flops and variant != "drawing" else None
            cells = [f"{row['ms']:9.2f}", f"{row['images/s']:10,.0f}", f"{tflops:8.2f}" if tflops else " " * 8]
            cells += [
                f"{tflops / most[row['precision']]:8.1%}" if tflops and most else " " * 8,
                f"{row['GiB']:6.2f}" if row.get("GiB") else "",
            ]
            print(f"{entry:34} {variant:14} " + " ".join(cells), flush=True)


if __name__ == "__main__":
    main()

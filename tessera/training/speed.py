"""How fast a training is, and what limits it: images, arithmetic and memory per second, and the share of time without rows.

None of it is in history.csv, which is the same whenever a training is run again: it goes to the tracker, and to the timings.
Operations are counted on a GPU, once, in the first step of all, by PyTorch's formulas: two for a multiplication with addition.
On a CPU they are not: operators that are looked at may choose other kernels, and its trainings are the same to the last bit.
"""

import contextlib
import os
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch.profiler import ProfilerActivity, profile, schedule
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from tessera.artifacts import folder as artifact
from tessera.bases.optimization import Training
from tessera.contracts import Job
from tessera.training.reading import Reader

Item = TypeVar("Item")
PROFILES = Path("data/profiles")
COUNTED = "operations.json"  # in the state of a training
PEAK_TFLOPS = {  # of dense products in bfloat16, by the makers' data sheets; what MFU is a share of
    "B200": 2250,
    "H200": 989,
    "H100 PCIe": 756,
    "H100": 989,
    "A100": 312,
    "L40S": 362,
    "L4": 121,
    "RTX 4090": 165,
}


class Flops(TorchDispatchMode):
    """Counts the operations of products inside. PyTorch's own FlopCounterMode cannot be where autograd.grad is called."""

    def __init__(self) -> None:
        super().__init__()
        self.total = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        if count := flop_registry.get(function._overloadpacket):
            self.total += count(*args, **(kwargs or {}), out_val=result)
        return result


class Speed:
    """Of one process's share, times the number of processes."""

    def __init__(self, settings: Training, reader: Reader, job: Job, processes: int):
        self.settings, self.reader, self.job, self.processes = settings, reader, job, processes
        self.steps = 0
        self.flops = self._known()  # of a step of this process; None: not known
        self._began, self._left_out = time.monotonic(), 0.0

    def over(self, steps: Iterable[Item]) -> Iterator[Item]:
        """Pass the steps through, counting; with TESSERA_PROFILE=1 write a trace of some of them."""
        with _profiled(self.job) as profiler:
            for item in steps:
                counts = self.steps == 0 and is_counted(self.reader) and not self.settings.compile  # then none is seen
                with Flops() if counts else contextlib.nullcontext() as counter:
                    yield item
                if counts and self.job.is_main:
                    self.flops = counter.total
                    artifact.write_json(self.job.state / COUNTED, {"flops": self.flops})
                self.steps += 1
                if profiler:
                    profiler.step()

    def _known(self) -> int | None:
        """What the first step had, before the training was interrupted."""
        path = self.job.state / COUNTED
        return artifact.read_json(path)["flops"] if path.is_file() else None

    def leave_out(self, seconds: float) -> None:
        """Of validations: they are no part of the training's speed."""
        self._left_out += seconds

    def figures(self) -> dict[str, float]:
        """Of the training so far; what is not known on this device is not among them."""
        seconds = time.monotonic() - self._began - self._left_out
        if not self.steps or seconds <= 0:
            return {}
        found = {
            "images_per_second": self.steps * self.settings.batch_size / seconds,
            "waiting_for_data": self.reader.seconds_waited / seconds,
        }
        if self.flops:
            found["tflops_per_second"] = self.steps * self.flops * self.processes / seconds / 1e12
        if self.reader.device.type == "cuda":
            found["peak_memory_bytes"] = float(torch.cuda.max_memory_allocated())
            peak = _peak(torch.cuda.get_device_name())
            if peak and self.flops:
                found["mfu"] = found["tflops_per_second"] / self.processes / peak
        return found

    def log(self, step: int) -> None:
        """To the tracker, beside the row of this step."""
        self.job.log(step, {f"speed/{name}": value for name, value in self.figures().items()})


def is_counted(reader: Reader) -> bool:
    """Whether this is the first step of a training on a GPU: a training that is resumed has the bits of one that is not."""
    return reader.device.type == "cuda" and reader.steps.start == 0


def _peak(device: str) -> float | None:
    """TFLOP/s of a GPU by its name; None for one that is not in the table."""
    return next((value for name, value in PEAK_TFLOPS.items() if name in device), None)


@contextlib.contextmanager
def _profiled(job: Job) -> Iterator[Any]:
    """A profiler of steps 12 to 14, if it is asked for: its trace opens in ui.perfetto.dev or chrome://tracing."""
    if os.environ.get("TESSERA_PROFILE") != "1" or not job.is_main:
        yield None
        return
    path = PROFILES / f"{job.name}.json.gz"

    def write(profiler: profile) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        profiler.export_chrome_trace(str(path))
        job.say(f"a trace of three steps: {path}")
        job.attach(path, "profile.json.gz")

    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if torch.cuda.is_available() else [])]
    with profile(
        activities=activities, schedule=schedule(wait=9, warmup=2, active=3, repeat=1), on_trace_ready=write
    ) as on:
        yield on

"""The devices of this machine and their allocation to stages, without importing torch or Prefect, which takes seconds."""

import contextlib
import os
import shutil
import subprocess
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

from flows import locks
from tessera.artifacts.background import num_cores
from tessera.running import launch
from tessera.running.progress import AT_ONCE

GPUS = "CUDA_VISIBLE_DEVICES"


def devices() -> list[str]:
    """The GPUs that this process may use, by index, in the order of nvidia-smi."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    named = [name.strip() for name in (visible or "").split(",") if name.strip() not in ("", "-1")]
    if (visible is not None and all(map(str.isdecimal, named))) or shutil.which("nvidia-smi") is None:
        return named
    listing = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=30)
    lines = [line for line in listing.stdout.splitlines() if line.startswith("GPU ")] if listing.returncode == 0 else []
    if visible is None:
        return [str(index) for index in range(len(lines))]
    # A GPU that is called by its uuid here and by its index elsewhere must have one lock
    index_of = {line.rpartition("UUID: ")[2].rstrip(")"): str(index) for index, line in enumerate(lines)}
    return [index_of.get(name, name) for name in named]


class Places:
    """Where stages run: a lock for each device of the machine, and how many of them this flow run uses at a time.

    Without a GPU, as many stages as there are systems share the cores, at most one on each: small networks gain next to
    nothing from a second thread (docs/benchmarks.md).
    """

    def __init__(self, systems: int = 1) -> None:
        gpus = devices()
        self.gpus = len(gpus)
        cores = num_cores()
        text = os.environ.get("TESSERA_PARALLEL") or str(len(gpus) or max(1, min(cores, systems)))
        if not text.isdecimal() or int(text) == 0:
            raise ValueError(
                f"TESSERA_PARALLEL is {text!r}: expected how many stages may run at once, e.g. 1; correct it"
            )
        self.number = int(text)
        self.threads = None if gpus or self.number == 1 else max(1, cores // self.number)  # None: torch decides
        self._free = self.number
        self._change = threading.Condition()
        folder = locks.folder()
        self.environments: dict[Path, dict[str, str]] = {}
        for index in range(max(self.number, len(gpus))):
            names = gpus or ["cpu"]
            device, share = names[index % len(names)], index // len(names)  # shared only if more are asked for
            lock = folder / (f"{'gpu-' if gpus else ''}{device}" + (f"-share-{share + 1}" if share else "") + ".lock")
            # The index is that of nvidia-smi, whichever GPU CUDA would call the first
            gpu = {GPUS: device, "CUDA_DEVICE_ORDER": "PCI_BUS_ID"}
            self.environments[lock] = {AT_ONCE: str(self.number), **(gpu if gpus else {})}
            if self.threads and "OMP_NUM_THREADS" not in os.environ:
                self.environments[lock]["OMP_NUM_THREADS"] = str(self.threads)

    def wanted(self, stage: str) -> int:
        """How many places the processes of a stage need. Raises ValueError if there are not so many GPUs."""
        processes = launch.asked(stage.partition("@")[0], self.gpus).processes
        if self.gpus and processes > self.gpus:
            raise ValueError(
                f"{stage} is to run as {processes} processes, but here are {self.gpus} GPUs: lower TESSERA_PROCESSES"
            )
        return min(processes, self.number)

    @contextlib.contextmanager
    def some(
        self,
        number: int,
        owner: str,
        say: Callable[[str], None],
        give_up: Callable[[], None],
        gives_way: Callable[[], bool],
    ) -> Iterator[tuple[list[locks.Lock], dict[str, str]]]:
        """Hold so many places: yields their locks, and what to add to the environment of the stage that runs there.

        Free places are not taken while `gives_way`, which is asked again and again, says that another stage is to have them.
        """
        with self._change:
            while self._free < number or gives_way():
                give_up()  # an endless wait could not be cancelled
                self._change.wait(locks.POLL_SECONDS)
            self._free -= number
        try:
            with locks.some_of(list(self.environments), owner, say, give_up, number) as held:
                environment = dict(self.environments[held[0].path])
                if GPUS in environment:
                    environment[GPUS] = ",".join(self.environments[lock.path][GPUS] for lock in held)
                yield held, environment
        finally:
            with self._change:
                self._free += number
                self._change.notify_all()

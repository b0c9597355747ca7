"""The devices of this machine and their allocation to stages, without importing torch or Prefect, which takes seconds."""

import contextlib
import os
import shutil
import subprocess
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

from flows import locks


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
    """Where stages run: a lock for each device of the machine, and how many of them this flow run uses at a time."""

    def __init__(self) -> None:
        gpus = devices()
        text = os.environ.get("TESSERA_PARALLEL") or str(max(1, len(gpus)))
        if not text.isdecimal() or int(text) == 0:
            raise ValueError(
                f"TESSERA_PARALLEL is {text!r}: expected how many stages may run at once, e.g. 1; correct it"
            )
        self.number = int(text)
        self._turns = threading.Semaphore(self.number)
        folder = locks.folder()
        self.environments: dict[Path, dict[str, str]] = {}
        for index in range(max(self.number, len(gpus))):
            names = gpus or ["cpu"]
            device, share = names[index % len(names)], index // len(names)  # shared only if more are asked for
            lock = folder / (f"{'gpu-' if gpus else ''}{device}" + (f"-share-{share + 1}" if share else "") + ".lock")
            # The index is that of nvidia-smi, whichever GPU CUDA would call the first
            gpu = {"CUDA_VISIBLE_DEVICES": device, "CUDA_DEVICE_ORDER": "PCI_BUS_ID"}
            self.environments[lock] = gpu if gpus else {}

    @contextlib.contextmanager
    def one(
        self, owner: str, say: Callable[[str], None], give_up: Callable[[], None]
    ) -> Iterator[tuple[locks.Lock, dict[str, str]]]:
        """Hold a place: yields its lock, and what to add to the environment of the stage that runs there."""
        while not self._turns.acquire(timeout=locks.POLL_SECONDS):
            give_up()  # an endless wait could not be cancelled
        try:
            with locks.one_of(list(self.environments), owner, say, give_up) as lock:
                yield lock, self.environments[lock.path]
        finally:
            self._turns.release()

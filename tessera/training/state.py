"""The resumable state of a training: what a step needs besides its inputs, written beside and renamed.

A training waits for as long as a copy in memory takes; a thread writes that copy, syncs, hashes and renames it.

What is sharded is gathered into the memory of the first process's host, one tensor after the other, so that any number of
processes goes on from the same files. They are not those of torch.distributed.checkpoint: it keeps its metadata in a pickle,
or, where it writes safetensors, a file of each process, for which machines would have to share a disk.
"""

import itertools
import shutil
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from tessera.artifacts import folder as artifact
from tessera.artifacts.checkpoints import read_weights
from tessera.artifacts.folder import ArtifactError
from tessera.nn.processes import Processes
from tessera.training.sharding import shard_like, whole

FILES = ("objective", "average", "optimizers")
WORST_SHARE = 0.05  # of the time, at most, is a checkpoint being made


class State:
    """Checkpoints of a training: safetensors and JSON, written beside and renamed, the newest two kept."""

    def __init__(
        self,
        folder: Path,
        objective: nn.Module,
        average: nn.Module,
        optimizers: dict[str, list[Optimizer]],
        processes: Processes,
    ):
        self.folder, self.objective, self.average, self.optimizers = folder, objective, average, optimizers
        self.processes = processes
        self._copies: dict[str, dict[str, Tensor]] = {}  # by file; kept, for the next one to be copied into
        self._pool = ThreadPoolExecutor(1, "checkpoints")
        self._writing: Future[None] | None = None
        self._saved = time.monotonic()  # when the last checkpoint was made
        self._seconds = 0.0  # that the last checkpoint took, from its copy to its new name

    def is_due(self, seconds: float) -> bool:
        """Whether so many seconds have passed since the last checkpoint, or more if making one takes long. 0: at every step."""
        return time.monotonic() - self._saved >= (seconds and max(seconds, self._seconds / WORST_SHARE))

    def save(self, step: int, wait: bool = False) -> None:
        """Copy what there is after `step` steps, and have it written, or wait for that. All processes ask, the first writes.

        Raises ArtifactError if that fails, or failed for the one before.
        """
        self.wait()
        began = self._saved = time.monotonic()
        tensors, plain = {}, {}
        for key, optimizer in self._flat():
            for number, values in optimizer.state_dict()["state"].items():
                for name, value in values.items():
                    target = tensors if isinstance(value, Tensor) else plain
                    target[f"{key}/{number}/{name}"] = value
        for file, state in zip(FILES, (self.objective.state_dict(), self.average.state_dict(), tensors), strict=True):
            self._copy(file, state)
        if any(tensor.is_cuda for tensor in tensors.values()):
            torch.cuda.synchronize()
        if not self.processes.is_main:
            return
        self._writing = self._pool.submit(self._write, {"step": step, "optimizers": plain}, began)
        if wait:
            self.wait()

    def wait(self) -> None:
        """Until the newest checkpoint is whole. Raises ArtifactError if it could not be written."""
        writing, self._writing = self._writing, None
        if writing:
            writing.result()

    def close(self) -> None:
        """Until nothing is being written."""
        self._pool.shutdown()

    def _copy(self, file: str, state: dict[str, Tensor]) -> None:
        """Into the memory that the copy before was in: new memory would cost as much again to come by."""
        held = self._copies.setdefault(file, {})
        for name, tensor in state.items():
            gathered = whole(tensor)
            if not self.processes.is_main:
                continue
            if name not in held:
                held[name] = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
            held[name].copy_(gathered, non_blocking=True)

    def _write(self, meta: dict[str, Any], began: float) -> None:
        with artifact.create(self.folder / f"step-{meta['step']:09d}") as place:
            for file, tensors in self._copies.items():
                safetensors.torch.save_file(tensors, place / f"{file}.safetensors")
            artifact.write_json(place / "state.json", meta)
        for old in sorted(self.folder.glob("step-*"))[:-2]:
            shutil.rmtree(old)
        self._seconds = time.monotonic() - began

    def load(self, say: Callable[[str], None]) -> int:
        """Restore the newest checkpoint whose hashes are right and return its step (0: none). It and damaged ones are named.

        The first process reads it for all: another machine may have no state of this training, or an older one.
        """
        meta, files = self._read(say) if self.processes.is_main else ({}, {})
        meta = self.processes.from_main(meta)
        if not meta:
            return 0
        objective, average, tensors = (self.processes.tensors_from_main(files.get(file, {})) for file in FILES)
        for module, saved in ((self.objective, objective), (self.average, average)):
            now = module.state_dict()
            module.load_state_dict({name: shard_like(each, now.get(name, each)) for name, each in saved}, strict=True)
        self._load_optimizers(tensors, meta["optimizers"])
        say(f"resumed step {meta['step']}")
        return int(meta["step"])

    def _load_optimizers(self, tensors: Iterator[tuple[str, Tensor]], plain: dict[str, Any]) -> None:
        """What optimizers remember of a weight, named PHASE/OPTIMIZER/NUMBER/NAME; what has its shape is sharded as it is."""
        optimizers = dict(self._flat())
        weights = {key: [w for group in one.param_groups for w in group["params"]] for key, one in optimizers.items()}
        restored: dict[str, dict[int, dict[str, Any]]] = {key: {} for key in optimizers}
        for path, value in itertools.chain(tensors, plain.items()):
            key, number, name = path.rsplit("/", 2)
            weight, is_tensor = weights[key][int(number)], isinstance(value, Tensor)
            kept = shard_like(value, weight) if is_tensor and value.shape == weight.shape else value
            restored[key].setdefault(int(number), {})[name] = kept
        for key, optimizer in optimizers.items():
            optimizer.load_state_dict({**optimizer.state_dict(), "state": restored[key]})
            _lay_out_as_weights(optimizer)

    def _read(self, say: Callable[[str], None]) -> tuple[dict[str, Any], dict[str, dict[str, Tensor]]]:
        """state.json and the tensors of each file of the newest whole checkpoint; empty if there is none."""
        for folder in sorted(self.folder.glob("step-*"), reverse=True):
            try:
                artifact.check(folder)
            except ArtifactError as error:
                say(f"passing over a damaged checkpoint: {error}")
                continue
            files = {file: read_weights(folder / f"{file}.safetensors") for file in FILES}
            return artifact.read_json(folder / "state.json"), files
        return {}, {}

    def _flat(self) -> list[tuple[str, Optimizer]]:
        return [(f"{phase}/{i}", one) for phase, some in self.optimizers.items() for i, one in enumerate(some)]


def _lay_out_as_weights(optimizer: Optimizer) -> None:
    """Give what an optimizer remembers of a weight the weight's order in memory, such as channels last.

    A file keeps values alone, and fused optimizers pair values by their place in memory: unequal orders would mix them up.
    """
    for weight, memory in optimizer.state.items():
        for name, value in memory.items():
            if isinstance(value, Tensor) and value.shape == weight.shape and value.stride() != weight.stride():
                memory[name] = torch.empty_like(weight, dtype=value.dtype).copy_(value)

"""The resumable state of a training: what a step needs besides its inputs, written beside and renamed."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from tessera.artifacts import folder as artifact
from tessera.artifacts.checkpoints import read_weights
from tessera.artifacts.folder import ArtifactError


class State:
    """Checkpoints of a training: safetensors and JSON, written beside and renamed, the newest two kept."""

    def __init__(self, folder: Path, objective: nn.Module, average: nn.Module, optimizers: dict[str, list[Optimizer]]):
        self.folder, self.objective, self.average, self.optimizers = folder, objective, average, optimizers

    def save(self, step: int) -> None:
        with artifact.create(self.folder / f"step-{step:09d}") as place:
            safetensors.torch.save_file(_cpu(self.objective.state_dict()), place / "objective.safetensors")
            safetensors.torch.save_file(_cpu(self.average.state_dict()), place / "average.safetensors")
            tensors, plain = {}, {}
            for key, optimizer in self._flat():
                for number, values in optimizer.state_dict()["state"].items():
                    for name, value in values.items():
                        target = tensors if isinstance(value, Tensor) else plain
                        target[f"{key}/{number}/{name}"] = value
            safetensors.torch.save_file(_cpu(tensors), place / "optimizers.safetensors")
            artifact.write_json(place / "state.json", {"step": step, "optimizers": plain})
        for old in sorted(self.folder.glob("step-*"))[:-2]:
            shutil.rmtree(old)

    def load(self, say: Callable[[str], None]) -> int:
        """Restore the newest checkpoint whose hashes are right and return its step (0: none). It and damaged ones are named."""
        for folder in sorted(self.folder.glob("step-*"), reverse=True):
            try:
                artifact.check(folder)
            except ArtifactError as error:
                say(f"passing over a damaged checkpoint: {error}")
                continue
            meta = artifact.read_json(folder / "state.json")
            self.objective.load_state_dict(read_weights(folder / "objective.safetensors"), strict=True)
            self.average.load_state_dict(read_weights(folder / "average.safetensors"), strict=True)
            saved = {**read_weights(folder / "optimizers.safetensors"), **meta["optimizers"]}
            for key, optimizer in self._flat():
                restored: dict[int, dict[str, Any]] = {}
                for path, value in saved.items():
                    if path.startswith(f"{key}/"):
                        _, _, number, name = path.split("/")
                        restored.setdefault(int(number), {})[name] = value
                optimizer.load_state_dict({**optimizer.state_dict(), "state": restored})
                _lay_out_as_weights(optimizer)
            say(f"resumed step {meta['step']}")
            return int(meta["step"])
        return 0

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


def _cpu(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}

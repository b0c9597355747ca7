"""The terms of a step, kept on the device, and the first of them that is not finite.

A number that the host reads is waited for, with all that was queued before it; so none is read in an ordinary step. Once a
loss or gradient of any process is not finite no optimizer takes another step, and the terms stay those of that moment until
somebody asks.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from tessera.nn.processes import all_reduce

GRADIENT = "gradient"  # the norm of it, beside the terms of its phase
NOT_APPLIED = "not applied, the last checkpoint stays. Lower training.learning_rate, or use precision: fp32"


class Diverged(ValueError):
    """A loss or gradient is not finite; no optimizer step was taken with it."""


class Terms:
    def __init__(self, phases: tuple[str, ...], device: torch.device, rows_of: Callable[[int], Tensor]):
        """rows_of: the rows of a step, to name some where its loss is not finite."""
        self.phases, self.rows_of = phases, rows_of
        self.found_inf = torch.zeros(
            (), device=device
        )  # 1: something was not finite. As torch's own optimizers call it
        self._step = torch.zeros((), dtype=torch.double, device=device)  # of the terms, the newest or the first bad one
        self._names: dict[str, tuple[str, ...]] = {}  # by phase
        self._values: dict[str, Tensor] = {}
        self._noted: set[str] = set()  # the phases of this step

    def begin(self, step: int) -> None:
        self._noted.clear()
        self._step = torch.where(self.found_inf > 0, self._step, step)

    def note(self, phase: str, terms: dict[str, Tensor], norm: Tensor) -> None:
        """The scalars of a phase of this step, and the norm of its gradient."""
        names = (*terms, GRADIENT)
        values = torch.stack([*(value.detach().reshape(()) for value in terms.values()), norm.reshape(())])
        if self._names.get(phase, names) != names:  # a term that there was not yet: rare enough to ask
            self.require_finite()
        elif phase in self._values:
            values = torch.where(self.found_inf > 0, self._values[phase], values)
        self._noted.add(phase)
        self._names[phase], self._values[phase] = names, values
        found_inf = 1 - values.isfinite().all().float()
        all_reduce(found_inf)  # one process that took the step without the others would have other weights than they
        self.found_inf = torch.maximum(self.found_inf, found_inf.clamp(max=1))

    def take(self, optimizer: Optimizer) -> None:
        """A step of the optimizer, unless something was not finite."""
        if self.found_inf.device.type == "cpu":  # where nothing is queued, and asking is cheaper than masking
            if not self.found_inf.item():
                optimizer.step()
            return
        optimizer.found_inf = self.found_inf  # fused AdamW and Muon leave everything as it is where it is 1
        optimizer.step()

    def read(self) -> dict[str, float]:
        """The terms of the newest step. One number is waited for, the others come with it.

        Raises Diverged if anything has not been finite since the training began or resumed.
        """
        known = torch.stack([self._step, self.found_inf.double()])
        step, found_inf, *numbers = torch.cat([known, *(values.double() for values in self._values.values())]).tolist()
        found: dict[str, float] = {}
        for phase in self._values:
            for name in self._names[phase]:
                number = numbers.pop(0)
                if not math.isfinite(number):
                    raise Diverged(self._sentence(phase, name, number, int(step)))
                if name != GRADIENT and phase in self._noted:
                    found[f"{phase}_loss" if name == "loss" and phase != self.phases[0] else name] = number
        if found_inf:
            raise Diverged(f"a term of another process is not finite at step {int(step) + 1}: {NOT_APPLIED}")
        return found

    def require_finite(self) -> None:
        """Raises Diverged as `read` does."""
        self.read()

    def _sentence(self, phase: str, name: str, number: float, step: int) -> str:
        is_gradient = name == GRADIENT
        what = f"the gradient of phase '{phase}'" if is_gradient else f"{phase} term '{name}'"
        rows = "" if is_gradient else f"; rows {self.rows_of(step).flatten()[:8].tolist()}..."
        return f"{what} is {number} at step {step + 1}: {NOT_APPLIED}{rows}"


def summed(sums: dict[str, Tensor], terms: dict[str, Any], of: int) -> dict[str, Tensor]:
    """Sums with the terms of one more of `of` micro-batches, so that at last they are means."""
    if of == 1:
        return dict(terms)
    return {name: sums.get(name, 0.0) + value.detach().double() / of for name, value in terms.items()}

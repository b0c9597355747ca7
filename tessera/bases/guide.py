"""The key `guide` of priors, a worse version of the prior that its artifact keeps, and the scale by which sampling uses it."""

from typing import Annotated

from pydantic import AfterValidator, Field

from tessera.components import Params

EXAMPLE = "guide: {snapshot_at: 0.25}"  # in sentences


class Guide(Params):
    """An early snapshot: the averaged weights of this training after the share `snapshot_at` of its steps."""

    snapshot_at: Annotated[float, Field(gt=0, lt=1)]

    def step_of(self, num_steps: int) -> int:
        """After which of so many steps: at least one."""
        return max(1, int(self.snapshot_at * num_steps))


def acting(scale: float) -> float | None:
    """The scale, or None for 1, which asks for nothing."""
    return None if scale == 1 else scale


Autoguidance = Annotated[float, Field(ge=0, le=100), AfterValidator(acting)]

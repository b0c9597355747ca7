"""Keeps an early snapshot of a prior's averaged weights while it trains (the key `guide`): what autoguidance leads away from.

Source: Karras et al., "Guiding a Diffusion Model with a Bad Version of Itself", 2024, arXiv:2406.02507.
"""

from pathlib import Path
from typing import Any

import safetensors.torch
from torch import nn

from tessera.artifacts import folder as artifact
from tessera.artifacts import guides
from tessera.artifacts.folder import ArtifactError
from tessera.contracts import Job
from tessera.training.validation import PriorValidation


class Snapshot:
    """The validation of one training, if there is one, and at one step the snapshot: a `loop.Validation`.

    It lies in the training's state before any checkpoint of that step or a later one does; a training that resumes before it
    writes the same bits again.
    """

    def __init__(self, config: Any, validation: PriorValidation | None, job: Job):
        """config: of the prior."""
        self.step = config.guide.step_of(config.training.num_steps)
        self.validation, self.job = validation, job
        self.folder = job.state / "guide"

    def begin(self, step: int) -> None:
        """Raises ValueError if the training resumes after the snapshot, which is not whole."""
        if step >= self.step:
            try:
                artifact.check(self.folder)
            except ArtifactError as error:
                raise ValueError(
                    f"the training would resume at step {step}, but its snapshot of step {self.step} is not whole ({error}): "
                    f"remove {self.job.state} to train anew"
                ) from None
        if self.validation:
            self.validation.begin(step)

    def is_due(self, step: int) -> bool:
        return step == self.step or self._is_validated(step)

    def measure(self, step: int, model: nn.Module) -> dict[str, float]:
        if step == self.step:
            with artifact.create(self.folder) as place:
                state = {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
                safetensors.torch.save_file(state, place / guides.GUIDE)
            self.job.say(f"kept the averaged weights of step {step} as the guide")
        return self.validation.measure(step, model) if self.validation and self._is_validated(step) else {}

    def keep(self, model: nn.Module) -> None:
        """As PriorValidation does; says so if the weights that it chooses are no later ones than the guide's."""
        if not self.validation:
            return
        self.validation.keep(model)
        kept = int(self.job.figures["kept_step"])
        if kept <= self.step:
            self.job.say(
                f"warning: the weights kept are of step {kept}, the guide's of step {self.step}: autoguidance would lead away "
                f"from the better trained ones; lower guide.snapshot_at"
            )

    def write(self, place: Path) -> None:
        """Put the snapshot into an artifact, and what the validation has to say."""
        guides.copy(self.folder, place)
        if self.validation:
            self.validation.write(place)

    def _is_validated(self, step: int) -> bool:
        return bool(self.validation and self.validation.is_due(step))

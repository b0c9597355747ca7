"""Diagnostics of a tokenizer's training: a collapsed codebook, a discriminator that has won or is silent.

Both leave every loss finite, so that nothing else ends a training that has already failed.

Source: dead codes: Williams et al., "Hierarchical Quantized Autoencoders", 2020, arXiv:2002.08111, section 3; a
discriminator that has won gives no useful gradient: Arjovsky and Bottou, "Towards Principled Methods for Training
Generative Adversarial Networks", 2017, arXiv:1701.04862, theorems 2.1 and 2.4.
Differs from it: a code is judged by the steps since it was last used, not by its average use; "won" is the share of patches
on the right side of 0, "silent" a hinge loss that stays at 1 (docs/math.md). The bounds are our own, set by trainings on
digits and MNIST.
"""

from typing import Annotated, Literal, NamedTuple

import torch
import torch.distributed as dist
from pydantic import Field
from torch import Tensor, nn

from tessera.components import Params
from tessera.contracts import Count, HasLevels, StartsLate

WON = 0.99  # accuracy from which on hardly a patch is left for the discriminator to learn from
SILENT_GAP = 0.02  # between the mean logits of images and reconstructions: a hinge loss within 0.01 of 1
MOST_CODES = 2**22  # a larger codebook is not monitored: its ages would take more memory than the network

REMEDIES = {  # by the key of the quantizer that they are about
    "revive_below": "raise quantizer.revive_below",
    "normalize_codes": "set quantizer.normalize_codes",
    "entropy_weight": "raise quantizer.entropy_weight",
    "commitment_weight": "lower quantizer.commitment_weight",
    "codebook_size": "lower quantizer.codebook_size",
    "levels": "take fewer quantizer.levels",
}


class Diagnostics(Params):
    """The key `health` of a tokenizer."""

    min_codebook_usage: Annotated[float, Field(ge=0, lt=1)] = 0.05  # share of the codes used within `window`; 0: off
    window: Count = 100  # steps
    max_dead_discriminator_steps: Annotated[int, Field(ge=0)] = 500  # in a row, won or silent, or half of all; 0: off
    start_step: Annotated[int, Field(ge=0)] = 200  # codes are not diagnosed before
    action: Literal["warn", "stop"] = "warn"


class Failure(NamedTuple):
    """A failure of a training whose losses are finite, such as a collapsed codebook."""

    name: str  # of a figure: the step at which it was first seen
    step: int  # how many were done when it was seen
    sentence: str  # the value found, its bound, and what to change
    is_fatal: bool  # the training ends here


class Diagnosis(NamedTuple):
    """What an objective diagnoses of itself; the same in all processes."""

    metrics: dict[str, float]  # terms to plot, of the newest step
    failures: list[Failure]  # those to report now


class Monitor(nn.Module):
    """Counters of a training, in buffers: a checkpoint holds them, the model that is kept does not.

    `quantizer` is the quantizer's Config; discriminator_steps: how many a discriminator has (0: there is none). In each step
    call `note_codes` and `note_discriminator` for every micro-batch, then `observe` once. `diagnose` alone reads numbers from
    the device, and judges every step that was observed since it was last called.
    """

    def __init__(self, settings: Diagnostics, quantizer: Params, discriminator_steps: int = 0):
        super().__init__()
        self.settings = settings
        self.quantizer = quantizer.quantizer if isinstance(quantizer, HasLevels) else quantizer
        size = quantizer.codebook_size
        self.monitors_codes = size is not None and size <= MOST_CODES
        if self.monitors_codes:
            self.levels = quantizer.num_levels if isinstance(quantizer, HasLevels) else 1
            self.register_buffer("last_used", torch.full((size,), -1, dtype=torch.int32))  # (K,) step; -1: never
        # In a short training half of its steps are enough to say so
        self.most_dead_steps = min(settings.max_dead_discriminator_steps, max(1, discriminator_steps // 2))
        if discriminator_steps:
            self.register_buffer("dead_steps", torch.zeros(2, dtype=torch.long))  # in a row: won, silent
        self._judgements: list[Tensor] = []  # of the micro-batches of this step
        self._steps: list[int] = []  # observed and not diagnosed yet
        self._codes: list[Tensor] = []  # of these steps, (2,): codes used within the window, and when the oldest was
        self._discriminators: list[
            Tensor | None
        ] = []  # of these steps, (4,): gap, accuracy, steps it won, steps it was silent
        self._last_step: dict[str, int] = {}  # of a failure by name; not kept: a resumed training warns again

    @torch.no_grad()
    def note_codes(self, indices: Tensor | None, step: int) -> None:
        """indices: int64 of any shape, those of a micro-batch of this process."""
        if self.monitors_codes:
            self.last_used.index_fill_(0, indices.flatten(), step)

    def note_discriminator(self, gap: Tensor, accuracy: Tensor) -> None:
        """Scalars of a micro-batch: mean logit of images minus that of reconstructions, and the accuracy."""
        self._judgements.append(torch.stack([gap, accuracy]).detach())

    @torch.no_grad()
    def observe(self, step: int) -> None:
        """Count what was noted in this step."""
        self._steps.append(step)
        if self.monitors_codes:
            if dist.is_initialized():  # each process has the codes of its share of the batch
                dist.all_reduce(self.last_used, op=dist.ReduceOp.MAX)
            num_used = (self.last_used > max(step - self.settings.window, -1)).sum()
            self._codes.append(torch.stack([num_used, self.last_used.min()]))
        self._discriminators.append(self._judged() if self._judgements else None)

    def _judged(self) -> Tensor:
        judgement = torch.stack(self._judgements).mean(dim=0)
        self._judgements.clear()
        if dist.is_initialized():
            dist.all_reduce(judgement)
            judgement /= dist.get_world_size()
        gap, accuracy = judgement.unbind()
        self.dead_steps.copy_((self.dead_steps + 1) * torch.stack([accuracy >= WON, gap.abs() < SILENT_GAP]))
        return torch.cat([judgement.double(), self.dead_steps.double()])

    def diagnose(self) -> Diagnosis:
        """Of all steps since it was last asked: the metrics of the newest, and every failure. One is reported once, and again
        only after `window` steps without it."""
        metrics: dict[str, float] = {}
        failures: list[Failure] = []
        codes = torch.stack(self._codes).tolist() if self._codes else [None] * len(self._steps)
        judged = iter(
            torch.stack(seen).tolist() if (seen := [one for one in self._discriminators if one is not None]) else []
        )
        for step, used, discriminator in zip(self._steps, codes, self._discriminators, strict=True):
            found = self._codebook(step, *used, metrics) if used else []
            found += self._discriminator(step, *next(judged)) if discriminator is not None else []
            is_fatal = self.settings.action == "stop"
            failures += [Failure(name, step + 1, text, is_fatal) for name, text in found if self._is_new(name, step)]
            self._last_step |= {name: step for name, _ in found}
        self._steps, self._codes, self._discriminators = [], [], []
        return Diagnosis(metrics, failures)

    def _is_new(self, name: str, step: int) -> bool:
        return name not in self._last_step or step - self._last_step[name] > self.settings.window

    def _codebook(self, step: int, used: int, oldest: int, metrics: dict[str, float]) -> list[tuple[str, str]]:
        """Adds the usage and the age of dead codes to `metrics`; names and sentences of failures."""
        settings, size = self.settings, len(self.last_used)
        metrics |= {"codebook_usage": used / size, "dead_code_age": float(step - oldest)}
        start = settings.start_step
        late = self.quantizer.codes_start_step if isinstance(self.quantizer, StartsLate) else None
        if late is not None:  # before the codes start, index 0 stands for all
            start = max(start, late + settings.window)
        is_collapsed = (
            used / size < settings.min_codebook_usage or used <= self.levels
        )  # one code carries no information
        if step + 1 < start or not settings.min_codebook_usage or not is_collapsed:
            return []
        keys = type(self.quantizer).model_fields
        remedies = [text for key, text in REMEDIES.items() if key in keys]
        remedies += ["take quantizer fsq"] if self.quantizer.kind != "fsq" else []
        return [
            (
                "codebook_collapsed",
                f"codebook_usage is {used / size:.4g} at step {step + 1} (health.min_codebook_usage "
                f"{settings.min_codebook_usage:g}): {used} of {size} codes were used in the last {settings.window} steps; "
                f"{', or '.join(remedies)}",
            )
        ]

    def _discriminator(
        self, step: int, gap: float, accuracy: float, won: float, silent: float
    ) -> list[tuple[str, str]]:
        """Names and sentences of failures."""
        settings = self.settings
        bound = self.most_dead_steps
        rule = f"health.max_dead_discriminator_steps {settings.max_dead_discriminator_steps}, or half of its steps"
        if not bound or max(won, silent) < bound:
            return []
        if won >= bound:
            return [
                (
                    "discriminator_won",
                    f"discriminator_accuracy is {accuracy:.4g} at step {step + 1} and was {WON} or more for {won:.0f} steps "
                    f"({rule}): the discriminator has won and teaches nothing more; "
                    f"lower discriminator_learning_rate_factor, raise lecam_weight or adversarial_weight, or let it begin "
                    f"at a later discriminator_start_step",
                )
            ]
        return [
            (
                "discriminator_silent",
                f"real_logits minus fake_logits is {gap:.2g} at step {step + 1} and was within {SILENT_GAP} of 0 for "
                f"{silent:.0f} steps ({rule}): the discriminator tells nothing; raise "
                f"discriminator_learning_rate_factor, lower lecam_weight or adversarial_weight, or set adversarial_weight: 0 "
                f"where reconstructions are as good as images",
            )
        ]

"""One training loop for every part: count, average, log, save, resume. What a step does is the part's own affair.

Everything random in a step is seeded from (seed, purpose, step), and the data order from (seed, epoch): a resumed run
equals an uninterrupted one bit for bit on the same machine and number of threads. Devices, processes and precision are
Accelerate's: one process on a CPU or GPU, or many with `torchrun` or `accelerate launch`.
"""

import copy
import math
import os
import time
from collections.abc import Callable
from datetime import timedelta
from functools import lru_cache, partial
from typing import Any, Protocol

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs, InitProcessGroupKwargs
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.checkpoint import checkpoint

from tessera import seeding
from tessera.bases.optimization import Training, learning_rate_factor, update_average
from tessera.contracts import Job, Objective
from tessera.training.state import State

HISTORY_ROWS = 200  # at most, per training, besides those of validations
LONGEST_VALIDATION = timedelta(hours=2)  # for which other processes wait


class Diverged(ValueError):
    """A loss or gradient is not finite; no optimizer step was taken with it."""


class TrainingFailed(ValueError):
    """The objective diagnosed a failure that is to end the training (tessera/bases/diagnostics.py)."""


class Data(Protocol):
    def __len__(self) -> int: ...
    def batch(self, rows: Tensor, generator: torch.Generator | None) -> Any: ...  # a NamedTuple of tensors
    def on(self, device: torch.device) -> "Data": ...  # the same data, held there; asked for by data_on_device


class Validation(Protocol):
    """Measures the averaged model every so many steps and changes nothing; only the main process asks more than `is_due`."""

    def begin(self, step: int) -> None: ...  # the training begins, or resumes, after this step
    def is_due(self, step: int) -> bool: ...
    def measure(self, step: int, model: nn.Module) -> dict[str, float]: ...  # columns of history.csv


class Preview(Protocol):
    """Shows the averaged model to whoever waits, when it thinks fit, and changes nothing; asked in the main process only."""

    def show_if_due(self, model: nn.Module) -> None: ...


def rows_of_step(step: int, batch_size: int, num_rows: int, seed: int) -> Tensor:
    """(batch_size,) the rows of a step: consecutive pieces of one seeded permutation per epoch. A function of its
    arguments alone, so there is no sampler state to save."""
    pieces, position, wanted = [], step * batch_size, batch_size
    while wanted:
        epoch, offset = divmod(position, num_rows)
        piece = _order_of_epoch(num_rows, seed, epoch)[offset : offset + wanted]
        pieces.append(piece)
        position += len(piece)
        wanted -= len(piece)
    return torch.cat(pieces)


@lru_cache(maxsize=2)  # at the border of two epochs a step has rows of both; 10**7 rows take half a second to draw
def _order_of_epoch(num_rows: int, seed: int, epoch: int) -> Tensor:
    return torch.randperm(num_rows, generator=seeding.generator(seed, "epoch", epoch))


def fit(
    objective: Objective,
    data: Data,
    settings: Training,
    *,
    seed: int,
    job: Job,
    validation: Validation | None = None,
    preview: Preview | None = None,
) -> nn.Module | None:
    """Train `objective` for settings.num_steps steps and return its averaged model on the CPU.

    Writes history.csv into job.state, resumes from the newest whole checkpoint there. None in all but the main process.
    Raises Diverged at the first loss or gradient that is not finite, before it is applied, and TrainingFailed at a failure
    that the objective calls fatal.
    """
    accelerator = _accelerator(settings, job, is_validated=validation is not None)
    is_main = accelerator.is_main_process
    objective.to(accelerator.device).train()
    average = copy.deepcopy(objective.model).requires_grad_(False)
    optimizers = objective.optimizers()
    base_rates = [group["lr"] for group in _groups(optimizers)]
    state = State(job.state, objective, average, optimizers)
    history = job.history(settings.num_steps, quiet=not is_main)
    start = state.load(job.say)
    history.resume(start)  # also from 0: a training that was killed before its first checkpoint left rows
    if validation and is_main:
        validation.begin(start)
    data = data.on(accelerator.device) if settings.data_on_device else data
    network = _prepared(objective, settings, accelerator)
    row_interval = max(1, math.ceil(settings.num_steps / HISTORY_ROWS))
    began = saved = time.monotonic()
    with job.stopping_between_steps():
        for step in range(start, settings.num_steps):
            rate = learning_rate_factor(step, settings)
            _set_rates(optimizers, [rate * base for base in base_rates])
            terms = _step(network, objective, optimizers, data, settings, accelerator, seed, step)
            update_average(average, objective.model, settings.ema_decay, step)
            done = step + 1
            if hasattr(objective, "diagnose"):
                terms |= _diagnosed(objective, step, job, is_main)
            is_validated = bool(validation and validation.is_due(done))
            if done % row_interval == 0 or done == settings.num_steps or is_validated:
                terms = _mean_over_processes(terms, accelerator)
                terms["learning_rate"] = rate * settings.learning_rate
                if is_validated:
                    metrics, seconds = _validated(validation, done, average, accelerator)
                    terms |= metrics
                    began += seconds  # no part of the training's speed
                history.add(done, terms, settings.batch_size)
            if preview and is_main:
                preview.show_if_due(average)
            stopping = _any(accelerator, job.stop_requested)
            if is_main and (stopping or time.monotonic() - saved >= job.checkpoint_seconds):
                state.save(done)
                saved = time.monotonic()
            if stopping:
                job.stop(f"stopped after step {done}; the same command continues from there")
    _report(job, accelerator, (settings.num_steps - start) * settings.batch_size, time.monotonic() - began)
    return average.cpu().eval() if is_main else None


def _accelerator(settings: Training, job: Job, is_validated: bool) -> Accelerator:
    """Devices, processes and precision. Raises ValueError where a batch cannot be divided among them."""
    if settings.batch_size % settings.gradient_accumulation:
        raise ValueError(
            f"training.batch_size {settings.batch_size} is not divisible by gradient_accumulation "
            f"{settings.gradient_accumulation}; choose a divisor"
        )
    accelerator = Accelerator(
        cpu=not torch.cuda.is_available(),
        mixed_precision="bf16" if settings.precision == "bf16" else "no",
        kwargs_handlers=[
            DistributedDataParallelKwargs(find_unused_parameters=True, broadcast_buffers=False),
            *([InitProcessGroupKwargs(timeout=LONGEST_VALIDATION)] if is_validated else []),
        ],
    )
    if settings.precision == "bf16" and accelerator.device.type == "cpu" and not computes_in_bf16():
        job.say("this processor has no bf16 instructions: precision fp32 is many times faster on it")
    shares = accelerator.num_processes * settings.gradient_accumulation
    if settings.batch_size % shares:
        raise ValueError(
            f"training.batch_size {settings.batch_size} is not divisible by {accelerator.num_processes} processes x "
            f"{settings.gradient_accumulation} accumulation steps; choose a multiple of {shares}"
        )
    return accelerator


def _prepared(objective: Objective, settings: Training, accelerator: Accelerator) -> nn.Module:
    """The objective as it is called in a step: compiled where asked for, and averaging gradients over processes."""
    if settings.gradient_checkpointing:
        recompute_activations(objective)
    if settings.compile:
        compile_networks(objective)
    return accelerator.prepare(objective)


def _validated(
    validation: Validation, step: int, average: nn.Module, accelerator: Accelerator
) -> tuple[dict[str, float], float]:
    """The metrics that the main process measured, none in the others, and the seconds for which all waited."""
    began = time.monotonic()
    metrics = validation.measure(step, average) if accelerator.is_main_process else {}
    accelerator.wait_for_everyone()
    return metrics, time.monotonic() - began


def _report(job: Job, accelerator: Accelerator, num_images: int, seconds: float) -> None:
    """The speed of the main process and the memory it took."""
    if not accelerator.is_main_process:
        return
    if num_images:
        job.figures["images_per_second"] = num_images / seconds
    if accelerator.device.type == "cuda":
        job.figures["peak_memory_bytes"] = float(torch.cuda.max_memory_allocated())


def computes_in_bf16() -> bool:
    """Whether the processor has instructions for products of bfloat16; without them PyTorch emulates each."""
    return any(has for name, has in torch.cpu.get_capabilities().items() if "bf16" in name)


def recompute_activations(objective: nn.Module) -> None:
    """Let every block that says `recomputes` keep its input alone, and run again in the backward pass.

    Source: Chen et al., "Training Deep Nets with Sublinear Memory Cost", 2016, arXiv:1604.06174.
    """
    for module in objective.modules():
        if getattr(module, "recomputes", False):
            module.forward = partial(checkpoint, module.forward, use_reentrant=False)


def compile_networks(objective: nn.Module) -> None:
    """torch.compile every network that says `compiles`; what is around them (codebooks, losses) stays as it is."""
    for module in objective.modules():
        if getattr(module, "compiles", False):
            module.compile()


def _step(
    network: nn.Module,
    objective: Objective,
    optimizers: dict[str, list[Optimizer]],
    data: Data,
    settings: Training,
    accelerator: Accelerator,
    seed: int,
    step: int,
) -> dict[str, float]:
    """One optimizer step of every phase; returns its terms as numbers."""
    rank, processes = accelerator.process_index, accelerator.num_processes
    rows = rows_of_step(step, settings.batch_size, len(data), seed)
    rows = rows.view(settings.gradient_accumulation, processes, -1)[:, rank]  # (accumulation, share)
    torch.manual_seed(seeding.derive(seed, "step", step, rank))  # dropout and the like draw from the global generator
    draws = seeding.generator(seed, "batch", step, rank)
    batches = [_to(data.batch(micro, draws), accelerator.device) for micro in rows]
    terms: dict[str, float] = {}
    for phase in objective.phases:
        skipped = False
        for batch in batches:
            with accelerator.autocast():
                losses = network(batch, phase, step)
            if losses is None:
                skipped = True
                break
            for name, value in losses.items():
                key = f"{phase}_loss" if name == "loss" and phase != objective.phases[0] else name
                number = float(value.detach())
                if not math.isfinite(number):
                    raise Diverged(
                        f"{phase} term '{name}' is {number} at step {step + 1}: not applied, the last checkpoint stays. "
                        f"Lower training.learning_rate, or use precision: fp32; rows {rows.flatten()[:8].tolist()}..."
                    )
                terms[key] = terms.get(key, 0.0) + number / len(batches)
            accelerator.backward(losses["loss"] / len(batches))
        if skipped:
            continue
        parameters = [p for optimizer in optimizers[phase] for g in optimizer.param_groups for p in g["params"]]
        norm = float(nn.utils.clip_grad_norm_(parameters, settings.gradient_clip, foreach=True))
        if not math.isfinite(norm):
            raise Diverged(
                f"the gradient of phase '{phase}' is {norm} at step {step + 1}: not applied, the last checkpoint stays. "
                f"Lower training.learning_rate, or use precision: fp32"
            )
        for optimizer in optimizers[phase]:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
    return terms


def _diagnosed(objective: Objective, step: int, job: Job, is_main: bool) -> dict[str, float]:
    """Warn of the failures that the objective diagnoses, or raise TrainingFailed; returns its metrics."""
    metrics, failures = objective.diagnose(step)
    job.figures["num_warnings"] = job.figures.get("num_warnings", 0.0) + len(failures)
    for failure in failures:
        if failure.is_fatal:
            raise TrainingFailed(failure.sentence)
        job.figures.setdefault(failure.name, float(step + 1))
        if is_main:
            job.say(f"warning: {failure.sentence}")
    return metrics


def _groups(optimizers: dict[str, list[Optimizer]]) -> list[dict[str, Any]]:
    return [group for some in optimizers.values() for optimizer in some for group in optimizer.param_groups]


def _set_rates(optimizers: dict[str, list[Optimizer]], rates: list[float]) -> None:
    """The learning rate of each group of parameters, in the order of `_groups`."""
    for group, rate in zip(_groups(optimizers), rates, strict=True):
        group["lr"] = rate


def _to(batch: Any, device: torch.device) -> Any:
    return type(batch)(*(tensor.to(device, non_blocking=True) for tensor in batch))


def _mean_over_processes(terms: dict[str, float], accelerator: Accelerator) -> dict[str, float]:
    """Each process has the terms of its own share of the batch; a row of the history is about the whole batch."""
    if accelerator.num_processes == 1:
        return terms
    values = torch.tensor(
        list(terms.values()), dtype=torch.float64 if accelerator.device.type == "cpu" else torch.float32
    )
    means = accelerator.reduce(values.to(accelerator.device), reduction="mean").tolist()
    return dict(zip(terms, means, strict=True))


def _any(accelerator: Accelerator, flag: Callable[[], bool]) -> bool:
    """Whether the flag is up in any process: all of them must stop at the same step."""
    here = flag()
    if accelerator.num_processes == 1:
        return here
    return bool(accelerator.reduce(torch.tensor(float(here), device=accelerator.device)).item() > 0)


def threads() -> str:
    """What the bits of a CPU training depend on besides its inputs, for the first line of a stage."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"cpu x{torch.get_num_threads()}"
    world = int(os.environ.get("WORLD_SIZE", "1"))
    return f"{device}, {world} processes" if world > 1 else device

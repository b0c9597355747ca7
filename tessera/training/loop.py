"""One training loop for every part: count, average, log, save, resume. What a step does is the part's own affair.

Everything random in a step is seeded from (seed, purpose, step), and the data order from (seed, epoch): a resumed run
equals an uninterrupted one bit for bit on the same machine and number of threads. Devices, processes and precision are
Accelerate's: one process on a CPU or GPU, or many with `torchrun` or `accelerate launch`.
"""

import contextlib
import copy
import math
import os
import time
import warnings
from datetime import timedelta
from functools import partial
from typing import Any, Protocol

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs, InitProcessGroupKwargs
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.optim import Optimizer
from torch.utils.checkpoint import checkpoint

from tessera import seeding
from tessera.bases.optimization import Training, learning_rate_factor, update_average
from tessera.components import sets
from tessera.contracts import Job, Objective
from tessera.nn.draw import MovesOncePerStep
from tessera.nn.precision import slowness
from tessera.nn.processes import Processes
from tessera.training import by_speed
from tessera.training.reading import Data, Reader
from tessera.training.sharding import gathered, is_sharded, shard, whole
from tessera.training.speed import Speed
from tessera.training.state import State
from tessera.training.terms import Diverged, Terms, summed

__all__ = ["Diverged", "TrainingFailed", "fit"]

HISTORY_ROWS = 200  # at most, per training, besides those of validations
LONGEST_VALIDATION = timedelta(hours=2)  # for which other processes wait


class TrainingFailed(ValueError):
    """The objective diagnosed a failure that is to end the training (tessera/bases/diagnostics.py)."""


class Validation(Protocol):
    """Measures the averaged model every so many steps and changes nothing; only the main process asks more than `is_due`."""

    def begin(self, step: int) -> None: ...  # the training begins, or resumes, after this step
    def is_due(self, step: int) -> bool: ...
    def measure(self, step: int, model: nn.Module) -> dict[str, float]: ...  # columns of history.csv


class Preview(Protocol):
    """Shows the averaged model to whoever waits, when it thinks fit, and changes nothing; asked in the main process only."""

    def is_due(self) -> bool: ...
    def show(self, model: nn.Module) -> None: ...


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
    """Train `objective` for settings.num_steps steps; returns its averaged model on the CPU, None in all but the main process.

    Writes history.csv into job.state, resumes from the newest whole checkpoint there. At a row of the history raises Diverged,
    for a loss or gradient that is not finite, which is never applied, and TrainingFailed, where the objective says so."""
    if sets(settings, "by_speed"):
        settings = by_speed.settled(objective, data, settings, compile_networks, seed, job, LONGEST_VALIDATION)
    accelerator = _accelerator(settings, job, is_validated=validation is not None)
    rank, is_main = accelerator.process_index, accelerator.is_main_process
    processes = Processes(accelerator.num_processes)
    average = _placed(objective, settings, accelerator)
    optimizers = objective.optimizers()
    state = State(job.state, objective, average, optimizers, processes)
    history = job.history(settings.num_steps, quiet=not is_main)
    start = state.load(job.say)
    history.resume(start)  # also from 0: a training that was killed before its first checkpoint left rows
    if validation and is_main:
        validation.begin(start)
    network = _prepared(objective, settings, accelerator)
    reader = _reader(data, settings, range(start, settings.num_steps), seed, accelerator)
    terms = Terms(objective.phases, accelerator.device, reader.rows)
    row_interval = max(1, math.ceil(settings.num_steps / HISTORY_ROWS))
    speed = Speed(settings, reader, job, accelerator.num_processes)
    with job.stopping_between_steps(), contextlib.closing(state), contextlib.closing(speed.over(reader)) as batches:
        for step, micro_batches in zip(reader.steps, batches, strict=True):
            _set_rates(optimizers, rate := learning_rate_factor(step, settings))
            torch.manual_seed(seeding.derive(seed, "step", step, rank))  # dropout and the like draw from this generator
            _step(network, objective, optimizers, micro_batches, settings.gradient_clip, accelerator, terms, step)
            update_average(average, objective.model, settings.ema_decay, step)
            done = step + 1
            is_validated = bool(validation and validation.is_due(done))
            if done % row_interval == 0 or done == settings.num_steps or is_validated:
                row = _mean_over_processes(terms.read() | _diagnosed(objective, job, is_main), accelerator)
                row["learning_rate"] = rate * settings.learning_rate
                if is_validated:
                    state.wait()  # it removes the weights that no checkpoint needs
                    row |= _validated(validation, done, average, accelerator, speed)
                history.add(done, row, settings.batch_size)
                speed.log(done)
            stopping, is_saved, is_shown = _due(processes, job, state, preview)
            if is_shown and (shown := gathered(average, is_main)) is not None:
                preview.show(shown)
            if stopping or is_saved:
                terms.require_finite()
                _diagnosed(objective, job, is_main)  # whoever resumes does not see these steps again
                state.save(done, wait=stopping)
            if stopping:
                job.stop(f"stopped after step {done}; the same command continues from there")
    job.figures |= speed.figures()
    trained = gathered(average, is_main)
    return trained.cpu().eval() if trained is not None else None


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
    if told := slowness(settings.precision, accelerator.device):
        job.say(told)
    shares = accelerator.num_processes * settings.gradient_accumulation
    if settings.batch_size % shares:
        raise ValueError(
            f"training.batch_size {settings.batch_size} is not divisible by {accelerator.num_processes} processes x "
            f"{settings.gradient_accumulation} accumulation steps; choose a multiple of {shares}"
        )
    return accelerator


def _placed(objective: Objective, settings: Training, accelerator: Accelerator) -> nn.Module:
    """Put the objective on the device, whole or a shard of it; returns the average of its model, likewise."""
    average = copy.deepcopy(objective.model).requires_grad_(False)
    if is_sharded(settings, accelerator.num_processes):
        shard(objective, average, accelerator.device)
    objective.to(accelerator.device).train()
    return average.to(accelerator.device).train()


def _prepared(objective: Objective, settings: Training, accelerator: Accelerator) -> nn.Module:
    """The objective as it is called in a step: compiled where asked for, and averaging gradients over processes."""
    for module in objective.modules():
        if isinstance(module, MovesOncePerStep):
            module.micro_batches = settings.gradient_accumulation
    if settings.gradient_checkpointing:
        recompute_activations(objective)
    if settings.compile:
        compile_networks(objective)
    for harmless in ("`broadcast_buffers` is deprecated", "Grad strides do not match bucket view strides"):
        warnings.filterwarnings("ignore", harmless)  # each process would print them; channels last is what is wanted
    return objective if isinstance(objective, FSDPModule) else accelerator.prepare(objective)


def _reader(data: Data, settings: Training, steps: range, seed: int, accelerator: Accelerator) -> Reader:
    return Reader(
        data.on(accelerator.device) if settings.data_on_device else data,
        accelerator.device,
        steps=steps,
        batch_size=settings.batch_size,
        micro_batches=settings.gradient_accumulation,
        seed=seed,
        rank=accelerator.process_index,
        processes=accelerator.num_processes,
    )


def _due(processes: Processes, job: Job, state: State, preview: Preview | None) -> list[bool]:
    """Whether to stop, which any process may ask for; to save and to show, by the clock of the first."""
    return processes.any(
        job.stop_requested,
        lambda: processes.is_main and state.is_due(job.checkpoint_seconds),
        lambda: processes.is_main and preview is not None and preview.is_due(),
    )


def _validated(
    validation: Validation, step: int, average: nn.Module, accelerator: Accelerator, speed: Speed
) -> dict[str, float]:
    """The metrics that the main process measured, none in the others; all wait, which is no part of the training's speed."""
    began = time.monotonic()
    model = gathered(average, accelerator.is_main_process)
    metrics = validation.measure(step, model) if model is not None else {}
    accelerator.wait_for_everyone()
    speed.leave_out(time.monotonic() - began)
    return metrics


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
    batches: list[Any],
    gradient_clip: float,
    accelerator: Accelerator,
    terms: Terms,
    step: int,
) -> None:
    """One optimizer step of every phase, over all micro-batches."""
    terms.begin(step)
    for phase in objective.phases:
        means: dict[str, Tensor] = {}
        for number, batch in enumerate(batches, 1):
            is_last = number == len(batches)
            # gradients meet once, but for those of shards, which nobody keeps whole
            with contextlib.nullcontext() if is_last else accelerator.no_sync(network):
                with accelerator.autocast():
                    losses = network(batch, phase, step)
                if losses is None:
                    break
                means = summed(means, losses, len(batches))
                accelerator.backward(losses["loss"] / len(batches))
        if not means:
            continue
        parameters = [p for optimizer in optimizers[phase] for g in optimizer.param_groups for p in g["params"]]
        norm = whole(nn.utils.clip_grad_norm_(parameters, gradient_clip, foreach=True))
        terms.note(phase, means, norm)
        for optimizer in optimizers[phase]:
            terms.take(optimizer)
            optimizer.zero_grad(set_to_none=True)
    if hasattr(objective, "observe"):
        objective.observe(step)


def _diagnosed(objective: Objective, job: Job, is_main: bool) -> dict[str, float]:
    """Warn of the failures that the objective diagnoses, or raise TrainingFailed; returns its metrics."""
    if not hasattr(objective, "diagnose"):
        return {}
    metrics, failures = objective.diagnose()
    job.figures["num_warnings"] = job.figures.get("num_warnings", 0.0) + len(failures)
    for failure in failures:
        if failure.is_fatal:
            raise TrainingFailed(failure.sentence)
        job.figures.setdefault(failure.name, float(failure.step))
        if is_main:
            job.say(f"warning: {failure.sentence}")
    return metrics


def _set_rates(optimizers: dict[str, list[Optimizer]], factor: float) -> None:
    """The learning rate of each group of parameters: `factor` times the one that it began with."""
    for optimizer in (one for some in optimizers.values() for one in some):
        for group in optimizer.param_groups:
            group["lr"] = factor * group.setdefault("initial_lr", group["lr"])  # as torch's own schedulers call it


def _mean_over_processes(terms: dict[str, float], accelerator: Accelerator) -> dict[str, float]:
    """Each process has the terms of its own share of the batch; a row of the history is about the whole batch."""
    if accelerator.num_processes == 1:
        return terms
    values = torch.tensor(
        list(terms.values()), dtype=torch.float64 if accelerator.device.type == "cpu" else torch.float32
    )
    means = accelerator.reduce(values.to(accelerator.device), reduction="mean").tolist()
    return dict(zip(terms, means, strict=True))


def threads() -> str:
    """What the bits of a CPU training depend on besides its inputs, for the first line of a stage."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"cpu x{torch.get_num_threads()}"
    world = int(os.environ.get("WORLD_SIZE", "1"))
    return f"{device}, {world} processes" if world > 1 else device

"""What a training leaves to its machine, by the key `by_speed: [precision, compile]`: its precision, and whether to compile.

At the start some steps are tried each way, on a copy and on the training's own first rows. The choice lies in the training's
state, so that whoever resumes goes on as it began, and in a file of the artifact. A training that chose is to the last bit the
one whose params name what was chosen.

Precision: bf16 is taken where its steps are shorter by a tenth or more. Processors differ by far more than that: with matrix
units for bf16 (AMX) it halves a step, without instructions for it a step takes many times as long.
Compiling: taken where it saves more in the whole training than it took. It is not tried where little could be saved.
"""

import copy
import shutil
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from os import environ
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list

from tessera.artifacts import folder as artifact
from tessera.bases.optimization import Training
from tessera.contracts import Job, Objective
from tessera.nn.precision import slowness
from tessera.training.reading import Data, Reader

CompileNetworks = Callable[[Any], None]
CHOICES, RECORD = ("precision", "compile"), "by_speed.json"
TRIED = 5  # steps of each, after one that is not counted
WORTH = 0.9  # of the time of a step in fp32: bf16 rounds, and has to pay for that
NO_COMPILER = "this machine has no C++ compiler (g++, or the one that CXX names)"
SHORTEST = 120  # seconds of a training for which compiling is tried: it takes 10 to 40 on a processor core


def settled(
    objective: Objective,
    data: Data,
    settings: Training,
    compile_networks: CompileNetworks,
    seed: int,
    job: Job,
    timeout: Any,
) -> Training:
    """The settings with what was chosen here, now or before this training was interrupted; the precision first.

    All processes take the choice of the first. timeout: how long they wait for each other, here and in the training.
    """
    state = PartialState(cpu=not torch.cuda.is_available(), timeout=timeout)
    kept = job.state / RECORD
    chosen = artifact.read_json(kept) if state.is_main_process and kept.is_file() else {}
    chosen = broadcast_object_list([chosen])[0]
    for choice in [each for each in CHOICES if each in (settings.by_speed or ()) and each not in chosen]:
        settings = settings.model_copy(update=chosen)
        if choice == "precision":
            found, why = _precision(objective, data, settings, seed, state)
        else:
            found, why = _compile(objective, data, settings, seed, state, compile_networks)
        chosen = chosen | {choice: broadcast_object_list([found])[0]}
        job.say(f"{choice} {str(found).lower()}: {why}")
        if state.is_main_process:
            artifact.write_json(kept, chosen)
    return settings.model_copy(update=chosen)


def write_record(place: Path, job: Job) -> None:
    """Put into an artifact, and show the tracker, what was chosen. Not the times: the same training makes the same artifact."""
    (place / RECORD).write_bytes((job.state / RECORD).read_bytes())
    job.attach(place / RECORD, RECORD)


def compiler() -> str | None:
    """The C++ compiler that torch.compile would call for a processor; None without one."""
    return shutil.which(environ.get("CXX", "g++"))


def trial_step(
    objective: Any, optimizers: dict[str, list[Any]], batch: Any, settings: Training, precision: str
) -> None:
    """A late step, when all that starts late has started, less what is for the result alone.

    Not by the loop: Accelerate has one precision per process, and what is tried here has several.
    """
    for phase in objective.phases:
        with torch.autocast(batch[0].device.type, torch.bfloat16, enabled=precision == "bf16"):
            losses = objective(batch, phase, settings.num_steps - 1)
        if losses is None:
            continue
        losses["loss"].backward()
        float(losses["loss"].detach())  # waits for a GPU
        for optimizer in optimizers[phase]:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)


def _precision(objective: Any, data: Data, settings: Training, seed: int, state: PartialState) -> tuple[str, str]:
    """The precision, and the reason in words."""
    if slowness("bf16", state.device):
        return "fp32", "this processor has no instructions for bf16"
    with _trial(objective, data, settings, seed, state) as (tried, batch):
        optimizers = tried.optimizers()
        times: dict[str, list[float]] = {"fp32": [], "bf16": []}
        for _ in range(1 + TRIED):  # by turns, so that what else the machine does weighs on both
            for precision, taken in times.items():
                taken.append(_seconds(tried, optimizers, batch, settings, precision))
    fp32, bf16 = (statistics.median(taken[1:]) for taken in times.values())
    return "bf16" if bf16 <= WORTH * fp32 else "fp32", f"a step takes {_ms(fp32)} in fp32 and {_ms(bf16)} in bf16"


def _compile(
    objective: Any,
    data: Data,
    settings: Training,
    seed: int,
    state: PartialState,
    compile_networks: CompileNetworks,
) -> tuple[bool, str]:
    """Whether to compile, and the reason in words."""
    if state.device.type == "cpu" and compiler() is None:
        return False, NO_COMPILER
    steps = settings.num_steps * settings.gradient_accumulation
    with _trial(objective, data, settings, seed, state) as (tried, batch):
        optimizers = tried.optimizers()
        plain = _median(tried, optimizers, batch, settings)
        if plain * steps < SHORTEST:
            return False, f"the training takes {plain * steps:.0f} s, too few for compiling to pay"
        began = time.perf_counter()
        compile_networks(tried)
        _seconds(tried, optimizers, batch, settings, settings.precision)
        spent = time.perf_counter() - began
        faster = _median(tried, optimizers, batch, settings)
    torch.compiler.reset()  # what was compiled for the copy counts against what may be compiled for the original
    saved = (plain - faster) * steps
    how = f"a step takes {_ms(plain)}, and {_ms(faster)} compiled, which took {spent:.0f} s"
    return saved > spent, f"{how} and saves {saved:.0f}" if saved > 0 else how


@contextmanager
def _trial(objective: Any, data: Data, settings: Training, seed: int, state: PartialState) -> Iterator[tuple[Any, Any]]:
    """A copy of the objective and a micro-batch. Nothing that is drawn here is missed by the training."""
    device = state.device
    reader = Reader(
        data,
        device,
        steps=range(1),
        batch_size=settings.batch_size,
        micro_batches=settings.gradient_accumulation,
        seed=seed,
        rank=state.process_index,
        processes=state.num_processes,
    )
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        yield copy.deepcopy(objective).to(device).train(), next(iter(reader))[0]


def _median(tried: Any, optimizers: Any, batch: Any, settings: Training) -> float:
    """Seconds of a step, after one that is not counted."""
    taken = [_seconds(tried, optimizers, batch, settings, settings.precision) for _ in range(1 + TRIED)]
    return statistics.median(taken[1:])


def _seconds(tried: Any, optimizers: Any, batch: Any, settings: Training, precision: str) -> float:
    began = time.perf_counter()
    trial_step(tried, optimizers, batch, settings, precision)
    return time.perf_counter() - began


def _ms(seconds: float) -> str:
    return f"{1000 * seconds:.3g} ms"

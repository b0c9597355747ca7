"""Which precision a training computes in, where its params leave that to the machine (the key `precision_by: speed`).

At the start some steps are tried, on a copy and on the training's own first rows, in fp32 and in bf16 by turns; bf16 is taken
where its steps are shorter by a tenth or more. Processors differ by far more than that: with matrix units for bf16 (AMX) it
halves a step, without instructions for it a step takes many times as long. The choice lies in the training's state, so that
whoever resumes goes on as it began, and in precision.json of the artifact. A training in the precision that was chosen is to
the last bit the one whose params name it.
"""

import copy
import statistics
import time
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

RECORD = "precision.json"
TRIED = 5  # steps of each, after one that is not counted
WORTH = 0.9  # of the time of a step in fp32: bf16 rounds, and has to pay for that


def settled(objective: Objective, data: Data, settings: Training, *, seed: int, job: Job, timeout: Any) -> Training:
    """The settings with the precision that was chosen here, now or before this training was interrupted.

    All processes take the choice of the first. timeout: how long they wait for each other, here and in the training.
    """
    state = PartialState(cpu=not torch.cuda.is_available(), timeout=timeout)
    kept = job.state / RECORD
    chosen = artifact.read_json(kept)["precision"] if state.is_main_process and kept.is_file() else None
    if broadcast_object_list([chosen is None])[0]:
        chosen, why = _choice(objective, data, settings, seed, state)
        job.say(f"precision {chosen}: {why}")
        if state.is_main_process:
            artifact.write_json(kept, {"precision": chosen})
    return settings.model_copy(update={"precision": broadcast_object_list([chosen])[0]})


def write_record(place: Path, job: Job) -> None:
    """Put into an artifact, and show the tracker, what was chosen. Not the times: the same training makes the same artifact."""
    path = place / RECORD
    path.write_bytes((job.state / RECORD).read_bytes())
    job.attach(path, RECORD)


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


def _choice(objective: Objective, data: Data, settings: Training, seed: int, state: PartialState) -> tuple[str, str]:
    """The precision, and the reason in words."""
    if slowness("bf16", state.device):
        return "fp32", "this processor has no instructions for bf16"
    seconds = _seconds_per_step(objective, data, settings, seed, state)
    precision = "bf16" if seconds["bf16"] <= WORTH * seconds["fp32"] else "fp32"
    said = " and ".join(f"{1000 * taken:.3g} ms in {name}" for name, taken in seconds.items())
    return precision, f"a step takes {said}"


def _seconds_per_step(
    objective: Any, data: Data, settings: Training, seed: int, state: PartialState
) -> dict[str, float]:
    """The median of a micro-batch by precision. Nothing that is drawn here is missed by the training."""
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
        tried = copy.deepcopy(objective).to(device).train()
        optimizers, batch = tried.optimizers(), next(iter(reader))[0]
        times: dict[str, list[float]] = {"fp32": [], "bf16": []}
        for _ in range(1 + TRIED):
            for precision, taken in times.items():
                began = time.perf_counter()
                trial_step(tried, optimizers, batch, settings, precision)
                taken.append(time.perf_counter() - began)
    return {precision: statistics.median(taken[1:]) for precision, taken in times.items()}

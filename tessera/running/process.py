"""The process around a stage: arguments, validated params, one owner at a time, orderly stop, timing, one clear error.

A stage is `run(params, [name,] ..., out, job)`; its Path parameters become command-line options. It knows nothing of
DVC, trackers or signals. Exit codes: 0 done, 2 refused or failed with a sentence, 143 or 130 stopped by a signal (the
same command continues).
"""

import argparse
import fcntl
import gc
import importlib
import inspect
import os
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

from tessera import params as all_params
from tessera.artifacts import folder as artifact
from tessera.artifacts import recorded, whole
from tessera.check import images as known_images
from tessera.check import problems
from tessera.code import entries
from tessera.components import PACKAGE, load, missing_package
from tessera.params import Pipeline
from tessera.running import launch, progress
from tessera.running.job import STOP_SIGNALS, Job, Stopped
from tessera.running.publish import ROOT, track_dataset
from tessera.tracking import journal, processes

STAGES = PACKAGE.parent / "stages"
STATE = Path(".state")
SECTIONS = {  # of params.yaml, that the key of a stage is looked up in; of all others: systems
    "train_features": "features",
    "reference_stats": "features",
    "train_tokenizer": "tokenizers",
    "encode_tokens": "tokenizers",
    "evaluate_tokenizer": "tokenizers",
}


def main(command: list[str]) -> None:
    """Run the stage that the first word names, with what the others give it, and exit."""
    run, name, arguments = _parsed(command)
    is_main, began = launch.rank() == 0, time.monotonic()
    try:
        params = _required(name, arguments)
        wanted = launch.asked(name.partition("@")[0])
        if not wanted.is_one and _can_be_shared(*name.split("@"), params=params):
            sys.exit(launch.launch(name, command, wanted))
        with _sole_owner(name, is_main):
            _execute(run, name, params, arguments, is_main, began)
    except (ValueError, OSError) as error:
        _fail(name, str(missing_package(error) or error), error)
    except (MemoryError, RuntimeError) as error:
        if launch.is_lost(error):
            _fail(name, launch.LOST, error)
        if not _is_for_want_of_memory(error):
            raise
        first = str(error).strip().partition("\n")[0]
        sentence = (
            f"memory was not enough ({first or 'of the host'}): lower its batch_size, or let fewer stages "
            f"run at a time (TESSERA_PARALLEL=1), then run the same command again"
        )
        _fail(name, sentence, error)


def _fail(name: str, sentence: str, error: BaseException) -> NoReturn:
    if os.environ.get("TESSERA_TRACEBACK"):
        raise error
    if not launch.record(sentence):
        print(f"{name} failed: {sentence}", file=sys.stderr, flush=True)
    sys.exit(2)


def _is_for_want_of_memory(error: BaseException) -> bool:
    """torch says it of the host in a RuntimeError without a class of its own, and of GPUs in one of another name."""
    wants = "allocate memory" in str(error) or "out of memory" in str(error).lower()
    return isinstance(error, MemoryError) or wants


def _required(name: str, arguments: dict[str, Any]) -> Pipeline:
    """The params. Raises ValueError for what can be known to be wrong before the stage begins."""
    params = all_params.read(Path("params.yaml"))
    if launch.LAUNCHED in os.environ:  # asked already, once for all processes
        return params
    _require_known(*name.split("@"), params=params)
    # Params may have changed since the images were prepared. To ask takes seconds where networks are large: trainings do it
    if name.startswith("train_") and (planned := known_images.of_artifact(params, arguments["images"])) is not None:
        problems.require(params, planned, is_begin=False)
    _require_as_written(name, params, [path for path in arguments.values() if isinstance(path, Path)])
    return params


def _execute(
    run: Callable, name: str, params: Pipeline, arguments: dict[str, Any], is_main: bool, began: float
) -> None:
    state = STATE / name.replace("@", "-")
    state.mkdir(parents=True, exist_ok=True)
    described = params.describe(name)._asdict()
    with (
        journal.open_run(name, root=ROOT, state=state, experiment=f"tessera-{params.dataset.name}", **described)
        if is_main
        else _Nothing() as tracked
    ):
        if is_main:
            processes.start_uploader(ROOT)
            if "images" in arguments and (arguments["images"] / artifact.MANIFEST).is_file():
                track_dataset(tracked, params.dataset.name, arguments["images"], name.split("@")[0])
        job = Job(name, state, tracked, is_main=is_main)
        for number in STOP_SIGNALS:
            signal.signal(number, _end)
        gc.enable()  # everything is imported
        launch.use_device()
        if not is_main and not _can_be_shared(*name.split("@"), params=params):
            return  # of somebody's own torchrun
        figures = run(params=params, job=job, **arguments) or {}
        if not is_main:
            return
        figures = {**job.figures, **figures, "seconds": time.monotonic() - began}
        tracked.figures(figures)
        if "out" in arguments and (arguments["out"] / artifact.MANIFEST).is_file():
            tracked.tag({"tessera.artifact": artifact.fingerprint(arguments["out"])})  # who asks for it finds this run
    if stage := os.environ.get("DVC_STAGE"):
        progress.TIMINGS.mkdir(parents=True, exist_ok=True)
        timing = {key: round(value, 3) for key, value in figures.items()}
        if torch := sys.modules.get("torch"):
            timing["threads"] = torch.get_num_threads()  # the bits of a training on a CPU depend on it
            if launch.is_rank():
                timing["processes"] = launch.number()
        artifact.write_json(progress.TIMINGS / f"{stage}.json", timing)
    _remove_state(state)
    speed = figures.get("images_per_second")
    progress.say(f"{name}  done in {figures['seconds']:.1f}s" + (f", {speed:,.0f} images/s" if speed else ""))


def _can_be_shared(stage: str, key: str = "", *, params: Pipeline) -> bool:
    """Whether there is work for several processes: a part without an objective has its weights already, and is written down."""
    if not stage.startswith("train_"):
        return True
    section = SECTIONS.get(stage, "systems")
    found = getattr(params, section)[key]
    folder, config = ("priors", found.prior) if section == "systems" else (section, found)
    return hasattr(load(folder, config.kind), "Objective")


def _require_known(stage: str, key: str = "", *, params: Pipeline) -> None:
    """Raises ValueError for a key that the stage's section of the params does not have."""
    section = SECTIONS.get(stage, "systems")
    known = [*getattr(params, section), *(["real"] if stage == "evaluate" else [])]
    if key and key not in known:
        raise ValueError(f"{section} of params.yaml has no {key}: expected one of {', '.join(known)}")


def _require_as_written(name: str, params: Pipeline, paths: list[Path]) -> None:
    """Raises ArtifactError for a figure, picture or curve that is not what another entry of the pipeline wrote."""
    if Path("dvc.yaml").is_file() and Path(recorded.LOCK).is_file():
        graph = {entry.name for entry in entries.read(params, Path("dvc.yaml"))}
        own = name if name in graph else name.replace("@", "_")  # evaluate@real is the entry evaluate_real
        recorded.require_as_written(paths, Path(), but=own, among=graph)


class _Nothing:
    """The tracker of all processes but the first."""

    def __enter__(self) -> None:
        return None

    def __exit__(self, *error: object) -> None:
        return None


def _parsed(command: list[str]) -> tuple[Callable, str, dict[str, Any]]:
    """The stage's function, the name of its job (train_prior@vqgan-flow), and what the command line gives it."""
    known = sorted(path.stem for path in STAGES.glob("*.py") if path.stem != "__init__")
    choice = argparse.ArgumentParser(prog="python -m tessera.running", description="Run one stage as a process.")
    choice.add_argument("stage", choices=known, metavar="STAGE", help=f"one of {', '.join(known)}")
    stage = choice.parse_args(command[:1]).stage
    module = importlib.import_module(f"stages.{stage}")
    parser = argparse.ArgumentParser(
        prog=f"python -m tessera.running {stage}",
        description=module.__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    for parameter in inspect.signature(module.run).parameters.values():
        if parameter.name == "name":
            parser.add_argument("name", help="the key of this tokenizer or system in params.yaml")
        elif parameter.name not in ("params", "job"):
            needed = parameter.default is inspect.Parameter.empty
            option = f"--{parameter.name.replace('_', '-')}"
            parser.add_argument(option, type=Path, required=needed, default=None if needed else parameter.default)
    arguments = vars(parser.parse_args(command[1:]))
    return module.run, f"{stage}@{arguments['name']}" if "name" in arguments else stage, arguments


def _end(number: int, frame: FrameType | None) -> None:
    raise Stopped(128 + number)


@contextmanager
def _sole_owner(name: str, is_main: bool) -> Iterator[None]:
    """One process per stage of this checkout: after kill -9 of dvc, a second `dvc repro` would start a second trainer."""
    if not is_main:
        yield
        return
    folder = STATE / "locks"
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / f"{name}.lock").open("a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            owner = file.read().strip() or "unknown"
            raise ValueError(
                f"it is already running as process {owner} in {Path.cwd()}. Wait for it, or stop it with: kill {owner}"
            ) from None
        with whole.naming(Path(file.name)):
            file.truncate(0)
            os.write(
                file.fileno(), str(os.getpid()).encode()
            )  # not through a buffer, which would fail again at the end
        yield


def _remove_state(state: Path) -> None:
    """The artifact stands: what would resume its making is no longer needed."""
    shutil.rmtree(state, ignore_errors=True)

"""The process around a stage: arguments, validated params, one owner at a time, orderly stop, timing, one clear error.

A stage is `run(params, [name,] ..., out, job)`; its Path parameters become command-line options. It knows nothing of
DVC, trackers or signals. Exit codes: 0 done, 2 refused or failed with a sentence, 143 or 130 stopped by a signal (the
same command continues).
"""

import argparse
import ctypes
import fcntl
import hashlib
import inspect
import json
import os
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

from tessera import params as all_params
from tessera.artifacts import folder as artifact
from tessera.running import progress
from tessera.tracking import journal

ROOT = Path(os.environ.get("DVC_ROOT", "."))  # stages run there; DVC sets it
STATE = Path(".state")
TIMINGS = Path("data/timings")
STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT)


class Stopped(SystemExit):
    """The stage was asked to stop and did so in good order."""


class Job:
    """What a running stage has around it: a name, a private folder for resumable state, someone to report to."""

    def __init__(self, name: str, state: Path, run: journal.Run | None = None):
        self.name, self.run = name, run
        self.state = state  # replaced by `resumable` with a folder of its own for each set of inputs
        self.figures: dict[str, float] = {}  # about this execution (speed, memory): never part of an artifact
        self.checkpoint_seconds = float(os.environ.get("TESSERA_CHECKPOINT_SECONDS", "60"))
        self._signal: int | None = None
        self._state_root = state

    def say(self, line: str) -> None:
        progress.say(f"{self.name}  {line}")

    def log(self, step: int, values: dict[str, float]) -> None:
        if self.run:
            self.run.log(step, values)

    def attach(self, path: Path, name: str | None = None) -> None:
        if self.run:
            self.run.attach(path, name)

    def resumable(self, *inputs: Any) -> Path:
        """The state folder for exactly these inputs (JSON values, fingerprints): other inputs never resume from it."""
        key = hashlib.sha256(json.dumps(inputs, sort_keys=True, default=str).encode()).hexdigest()[:16]
        self.state = self._state_root / key
        self.state.mkdir(parents=True, exist_ok=True)
        return self.state

    def keep_history(self, path: Path) -> None:
        """Copy history.csv of a finished training to where the pipeline wants it, and to the tracker."""
        history = self.state / "history.csv"
        text = history.read_text() if history.exists() else "step,loss\n"  # nothing to train: an empty curve
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        self.attach(path, "history.csv")

    @contextmanager
    def stopping_between_steps(self) -> Iterator[None]:
        """Inside, a signal waits for the loop to ask `stop_requested`; outside, it ends the stage at once."""
        before = {number: signal.signal(number, self.request_stop) for number in STOP_SIGNALS}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def request_stop(self, number: int, frame: FrameType | None = None) -> None:
        if self._signal is not None:  # asked twice: whatever is going on, end
            raise Stopped(128 + number)
        self._signal = number

    def stop_requested(self) -> bool:
        return self._signal is not None

    def stop(self, why: str) -> None:
        self.say(why)
        raise Stopped(128 + (self._signal or signal.SIGTERM))


def main(run: Callable[..., dict[str, float] | None]) -> None:
    """Parse the command line of `run`, give it what it asks for, and exit."""
    name, arguments = _arguments(run)
    is_main = os.environ.get("RANK", "0") == "0"
    _die_with_parent()
    try:
        with _sole_owner(name, is_main):
            _execute(run, name, arguments, is_main)
    except (ValueError, OSError) as error:
        if os.environ.get("TESSERA_TRACEBACK"):
            raise
        print(f"{name} failed: {error}", file=sys.stderr, flush=True)
        sys.exit(2)


def _execute(run: Callable, name: str, arguments: dict[str, Any], is_main: bool) -> None:
    began = time.monotonic()
    params = all_params.read(Path("params.yaml"))
    state = STATE / name.replace("@", "-")
    state.mkdir(parents=True, exist_ok=True)
    described = params.describe(name)._asdict()
    with (
        journal.open_run(name, root=ROOT, state=state, experiment=f"tessera-{params.dataset.name}", **described)
        if is_main
        else _Nothing() as tracked
    ):
        if is_main:
            journal.start_uploader(ROOT)
            if "images" in arguments and (arguments["images"] / artifact.MANIFEST).is_file():
                track_dataset(tracked, params.dataset.name, arguments["images"], name.split("@")[0])
        job = Job(name, state, tracked)
        for number in STOP_SIGNALS:
            signal.signal(number, _end)
        figures = run(params=params, job=job, **arguments) or {}
        if not is_main:
            return
        figures = {**job.figures, **figures, "seconds": time.monotonic() - began}
        tracked.figures(figures)
        if "out" in arguments and (arguments["out"] / artifact.MANIFEST).is_file():
            tracked.tag({"tessera.artifact": artifact.fingerprint(arguments["out"])})  # who asks for it finds this run
    if os.environ.get("DVC_STAGE"):
        TIMINGS.mkdir(parents=True, exist_ok=True)
        artifact.write_json(TIMINGS / f"{name}.json", {key: round(value, 3) for key, value in figures.items()})
    _remove_state(state)
    speed = figures.get("images_per_second")
    progress.say(f"{name}  done in {figures['seconds']:.1f}s" + (f", {speed:,.0f} images/s" if speed else ""))


def track_dataset(run: journal.Run, name: str, images: Path, context: str) -> None:
    """Tell the tracker which images artifact goes into a run."""
    run.dataset(name, artifact.fingerprint(images), images.as_posix(), context)


class _Nothing:
    """The tracker of all processes but the first."""

    def __enter__(self) -> None:
        return None

    def __exit__(self, *error: object) -> None:
        return None


def _arguments(run: Callable) -> tuple[str, dict[str, Any]]:
    module = inspect.getmodule(run)
    parser = argparse.ArgumentParser(description=module.__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for parameter in inspect.signature(run).parameters.values():
        if parameter.name == "name":
            parser.add_argument("name", help="the key of this tokenizer or system in params.yaml")
        elif parameter.name not in ("params", "job"):
            needed = parameter.default is inspect.Parameter.empty
            option = f"--{parameter.name.replace('_', '-')}"
            parser.add_argument(option, type=Path, required=needed, default=None if needed else parameter.default)
    arguments = vars(parser.parse_args())
    stage = Path(module.__file__).stem
    return f"{stage}@{arguments['name']}" if "name" in arguments else stage, arguments


def _end(number: int, frame: FrameType | None) -> None:
    raise Stopped(128 + number)


def _die_with_parent() -> None:
    """Ask the kernel for SIGTERM when the parent (dvc) dies: kill -9 of dvc must not leave a trainer running."""
    if sys.platform == "linux":
        pr_set_pdeathsig = 1
        ctypes.CDLL(None, use_errno=True).prctl(pr_set_pdeathsig, signal.SIGTERM)


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
        file.truncate(0)
        file.write(str(os.getpid()))
        file.flush()
        yield


def _remove_state(state: Path) -> None:
    """The artifact stands: what would resume its making is no longer needed."""
    shutil.rmtree(state, ignore_errors=True)

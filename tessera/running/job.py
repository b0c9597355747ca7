"""What a running stage has around it: a name, a private folder for resumable state, someone to report to.

Stages know it by its protocol alone (tessera/contracts.py), so that none of this is part of what decides their results.
"""

import os
import signal
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any, TypeVar

import numpy as np

from tessera.artifacts import pictures, whole
from tessera.check import images, problems
from tessera.code import entries
from tessera.components import PACKAGE, Params
from tessera.contracts import ImageSpec
from tessera.params import Pipeline
from tessera.running import launch, leftover, origin, progress
from tessera.running.publish import publish
from tessera.tracking import journal

Item = TypeVar("Item")
PREVIEWS = Path("data/previews")
STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT)


class Stopped(SystemExit):
    """The stage was asked to stop and did so in good order."""


class Job:
    """What a running stage has around it: a name, a private folder for resumable state, someone to report to."""

    def __init__(self, name: str, state: Path, run: journal.Run | None = None, is_main: bool = True):
        """is_main: whether this process is the first of those that share the stage, which speaks and writes for all."""
        self.name, self.run, self.is_main = name, run, is_main
        self.state = state  # replaced by `resumable` with a folder of its own for each set of inputs
        self.figures: dict[str, float] = {}  # about this execution (speed, memory): never part of an artifact
        self.checkpoint_seconds = float(os.environ.get("TESSERA_CHECKPOINT_SECONDS", "60"))
        self._signal: int | None = None
        self._state_root = state
        self._has_preview = False

    def say(self, line: str) -> None:
        if self.is_main:
            progress.say(f"{self.name}  {line}")

    def require_fit(
        self,
        params: Pipeline,
        spec: ImageSpec,
        labels: Mapping[str, np.ndarray],
        said: Any = None,
    ) -> None:
        """Raise ValueError, a sentence per problem, if a later stage could not work on such images."""
        planned = images.planned(params, spec, labels, said)
        problems.require(params, planned)
        for remark in problems.remarks(params, planned):
            self.say(remark)

    def track(self, items: Iterable[Item], total: int, what: str = "") -> Iterator[Item]:
        """Pass the items through, with a line every few seconds that says how many of `total` are done."""
        return progress.track(items, f"{self.name}  {what}" if what else self.name, total)

    part, share, from_main = staticmethod(launch.part), staticmethod(launch.share), staticmethod(launch.from_main)

    @property
    def is_alone(self) -> bool:
        """Whether no other process shares the stage."""
        return not launch.is_rank()

    def log(self, step: int, values: dict[str, float]) -> None:
        if self.run:
            self.run.log(step, values)

    def attach(self, path: Path, name: str | None = None) -> None:
        if self.run:
            self.run.attach(path, name)

    def origin(self) -> dict[str, str]:
        """When, where and by what a page was made, for who reads it elsewhere."""
        return origin.described()

    def show(self, picture: Path) -> None:
        """Say where a finished picture lies, and in the first run what the rest will take."""
        self.say("  ".join(filter(None, [f"look at {picture}", progress.time_left(self.name)])))

    def preview(self, images: np.ndarray, columns: int) -> None:
        """Put (N, C, H, W) uint8 images where whoever waits finds the newest of this job; the first time, say where."""
        path = PREVIEWS / f"{self.name}.png"
        if not self._has_preview:
            self.say(f"what it makes so far: {path}")
            self._has_preview = True
        pictures.save_grid(path, images, columns)

    publish = staticmethod(publish)  # gives the tracker the one run per system that people compare

    def resumable(self, inputs: dict[str, Any] | None = None, parts: tuple[Params, ...] = ()) -> Path:
        """The state folder for exactly these inputs (params, JSON values, fingerprints of artifacts, by what they are) and
        the code of the stage and of the parts: others never resume from it. Says what lies there and fits nothing."""
        named = {key: entries.plain(value) for key, value in (inputs or {}).items()}
        self.state = leftover.folder_for(self._state_root, named, self._code(parts), self.say, is_made=self.is_main)
        return self.state

    def code_of(self, config: Params) -> str:
        """The fingerprint of a part's code."""
        return entries.fingerprint(config)

    def _code(self, parts: tuple[Params, ...]) -> dict[str, str]:
        stage = self.name.partition("@")[0]
        is_stage = (PACKAGE.parent / "stages" / f"{stage}.py").is_file()
        return entries.code_of(parts, stage if is_stage else None)

    def history(self, num_steps: int, quiet: bool) -> progress.History:
        """history.csv of a training, with a line on the console now and then; quiet: another process keeps it."""
        return progress.History(self.state / "history.csv", self.name, num_steps, self.log, quiet)

    def keep_history(self, path: Path) -> None:
        """Copy history.csv of a finished training to where the pipeline wants it, and to the tracker."""
        history = self.state / "history.csv"
        text = history.read_text() if history.exists() else "step,loss\n"  # nothing to train: an empty curve
        with whole.file(path) as beside:
            beside.write_text(text)
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

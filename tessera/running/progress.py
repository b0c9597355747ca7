"""What a run says while it works: one aligned line on the console per report, and history.csv, the truth of the run."""

import csv
import json
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TypeVar

from tessera.artifacts import whole

Item = TypeVar("Item")
TIMINGS, CODE = Path("data/timings"), Path("data/code")
EXPECTED = Path("docs/results/timings.json")
LAST = "write_report"  # nothing follows it
AT_ONCE = "TESSERA_STAGES_AT_ONCE"  # the flow tells its stages so
OVERHEAD_SECONDS = 4.0  # of a stage: its process, and what DVC does around it
CONSOLE_SECONDS = 5.0
CONSOLE_TERMS = 3  # the others are in history.csv


def say(line: str) -> None:
    print(line, flush=True)


def track(items: Iterable[Item], what: str, total: int) -> Iterator[Item]:
    """Pass the items through, with a line every few seconds: WHAT  3/10  eta 4s."""
    start = last = time.monotonic()
    for number, item in enumerate(items, 1):
        yield item
        now = time.monotonic()
        if now - last > CONSOLE_SECONDS:
            last = now
            say(f"{what}  {number}/{total}  eta {(now - start) / number * (total - number):.0f}s")


class History:
    """Rows of a training: appended to history.csv, printed now and then, passed on to the tracker.

    A resumed training cuts the rows after its checkpoint and continues; so the file has no clock and no gap.
    """

    def __init__(
        self, path: Path, name: str, num_steps: int, sink: Callable[[int, dict[str, float]], None], quiet: bool
    ):
        self.path, self.name, self.num_steps, self.sink, self.quiet = path, name, num_steps, sink, quiet
        self._columns: list[str] = []
        self._started = self._said = time.monotonic()
        self._first_step: int | None = None

    def resume(self, step: int) -> None:
        """Keep the rows up to and including `step`."""
        if self.path.exists() and not self.quiet:
            self._rewrite([row for row in self._rows() if int(row["step"]) <= step])

    def _rows(self) -> list[dict[str, str]]:
        with self.path.open(newline="") as file:
            reader = csv.DictReader(file)
            rows = list(reader)
            self._columns = list(reader.fieldnames or [])
        return rows

    def _rewrite(self, rows: list[dict[str, str]]) -> None:
        with whole.file(self.path) as beside, beside.open("w", newline="") as file:
            writer = csv.DictWriter(file, self._columns, restval="", lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)

    def add(self, step: int, values: dict[str, float], num_images: int) -> None:
        """A row: `step` of num_steps are done; `num_images` were seen per step."""
        if self.quiet:
            return
        row = {"step": str(step), **{key: f"{value:.7g}" for key, value in values.items()}}
        if set(row) <= set(self._columns):
            with whole.naming(self.path), self.path.open("a", newline="") as file:
                csv.DictWriter(file, self._columns, restval="", lineterminator="\n").writerow(row)
        else:  # the first row, or one with new terms: a discriminator that starts later
            rows = self._rows() if self.path.exists() else []
            self._columns += [key for key in row if key not in self._columns]
            self._rewrite([*rows, row])
        self.sink(step, values)
        now = time.monotonic()
        if self._first_step is None:
            self._first_step, self._started = step, now
            speed = ""
        else:
            per_step = (now - self._started) / max(1, step - self._first_step)
            speed = f"  {num_images / max(per_step, 1e-9):,.0f} images/s  eta {per_step * (self.num_steps - step):.0f}s"
        if now - self._said > CONSOLE_SECONDS or step == self.num_steps:
            self._said = now
            width = len(str(self.num_steps))
            shown = [key for key in values if key != "learning_rate"][:CONSOLE_TERMS]
            terms = "  ".join(f"{key} {values[key]:.4g}" for key in shown)
            say(f"{self.name}  step {step:>{width}}/{self.num_steps}  {terms}{speed}")


def time_left(of: str, root: Path = Path()) -> str:
    """What is to be done after the stage `of` in a first run: "about 4 min for the 30 stages to come"; "" in later ones.

    A stage without a timing has not run. How long it takes is known from the project's own run, for stages of the same
    name, and is scaled by how this machine compared so far.
    """
    known = root / EXPECTED
    expected: dict[str, float] = json.loads(known.read_text()) if known.exists() else {}
    taken = seconds(root / TIMINGS)
    to_come = {path.name for path in (root / CODE).glob("*")} - set(taken) - {of}
    if not to_come or LAST in taken:
        return ""
    both = [name for name in taken if name in expected]
    if not both or not to_come <= set(expected):
        return f"{len(to_come)} stages to come"
    scale = sum(taken[name] for name in both) / sum(expected[name] for name in both)
    left = sum(scale * expected[name] + OVERHEAD_SECONDS for name in to_come) / int(os.environ.get(AT_ONCE, "1"))
    return f"about {left / 60:.0f} min for the {len(to_come)} stages to come"


def timings(folder: Path = TIMINGS) -> dict[str, dict[str, float]]:
    """What each stage that has run left there, by its name in dvc.yaml: seconds, images per second, ..."""
    return {path.stem: json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))}


def seconds(folder: Path = TIMINGS) -> dict[str, float]:
    """Of each stage, when it last ran."""
    return {stage: figures["seconds"] for stage, figures in timings(folder).items()}


def print_timings(folder: Path) -> None:
    """One line per stage of a folder of timings, as the stages left them, and their sum."""
    found = timings(folder)
    for name, figures in sorted(found.items(), key=lambda row: -row[1]["seconds"]):
        speed = figures.get("images_per_second")
        say(f"{figures['seconds']:8.1f}s  {name}" + (f"  {speed:,.0f} images/s" if speed else ""))
    say(f"{sum(seconds(folder).values()):8.1f}s  of work in all, in whichever order and however many at a time")


if __name__ == "__main__":
    print_timings(Path(sys.argv[1]))

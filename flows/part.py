"""A part of a run that spreads over workers: some stages, done on this machine for a process elsewhere (flows/spread.py).

They run in a worktree of their own at the commit of that run, with its params. What they read comes from DVC's remote or this
machine's cache, what they make goes to the remote, and their entries of dvc.lock are shown in Prefect. A training sends its
newest checkpoint to the remote now and then: if this machine is lost, another one goes on from there.
"""

import contextlib
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

# First: it sets what Prefect reads when it is imported
from flows.reproduce import Run, carry_out

# isort: split

from prefect import flow, get_run_logger
from prefect.states import Failed, State
from prefect.task_runners import ThreadPoolTaskRunner

from flows import experiments, locks, remote
from flows.board import key_of
from flows.plan import STATE, Outcome, Plan, read_part, require_sane, tell
from flows.pool import patiently, show

STATE_SECONDS = 300.0  # between two checkpoints that are sent
ANSWER_SECONDS = 600.0  # for which a server that does not answer is asked again


# parameters: they are what a coordinator tells
@flow(name="part", task_runner=ThreadPoolTaskRunner(max_workers=1000))
def part(
    stages: list[str],
    commit: str,
    params: str,
    entries: dict[str, Any],
    files: dict[str, str],
    force: bool = False,
    parent_run: str = "",
    experiment: str = "",
    replay: bool = False,
) -> State[Any]:
    """Some stages of a run that spreads over workers. That run starts it; nobody else needs to.

    Args:
        stages: in an order in which they can run.
        commit: the commit of the code.
        params: the text of params.yaml.
        entries: of dvc.lock, of these stages and those that they read from.
        files: the text of small files that git keeps, by path.
        force: run the stages even if nothing changed.
        parent_run: the MLflow run, below which those of the stages appear.
        experiment: the DVC experiment that the run is, if it is one.
        replay: send to MLflow what it lacks before the part ends.
    """
    place = experiments.part(Path.cwd(), commit, params, stages[0])
    require_sane(place.checkout, params)
    with locks.some_of([place.lock], place.name, tell):
        experiments.prepare(place)
        remote.write(place.folder, entries, files, is_all=True)
        plan = read_part(place.folder, stages, force, place)
        plan.environment |= {"TESSERA_PARENT_RUN": parent_run} if parent_run else {}
        plan.environment |= {"DVC_EXP_NAME": experiment} if experiment else {}
        return carry_out(_Part(plan, replay), [], None)


class _Part(Run):
    """What the tasks of a part do: as those of any run, between what comes from the remote and what goes there."""

    def __init__(self, plan: Plan, replay: bool) -> None:
        super().__init__(plan)
        self.replay = replay
        self.checkout = plan.experiment.checkout if plan.experiment else plan.root
        self._ran: set[str] = set()

    def reproduce(self, stage: str) -> State[Any]:
        try:
            return self._reproduce(stage)
        except remote.Trouble as error:
            self.plan.outcomes[stage] = Outcome("failed", code=1)
            self._show(stage, Outcome("failed", code=1), str(error))
            return Failed(message=str(error))

    def _reproduce(self, stage: str) -> State[Any]:
        plan = self.plan
        remote.pull(plan.root, remote.inputs(plan, stage, without=self._ran), f"what {stage} reads")
        key = f"{plan.experiment.name if plan.experiment else ''}/{stage}"
        state = plan.root / STATE / stage.replace("@", "-")
        if stage.startswith("train_") and (step := remote.fetch_state(plan.root, state, key)):
            get_run_logger().info(f"{stage} goes on from {step}, which another machine sent")
        warn = get_run_logger().warning
        with _sending(plan.root, state, key, warn) if stage.startswith("train_") else contextlib.nullcontext():
            done = super().reproduce(stage)  # a training that has ended well has no state any more
        outcome = plan.outcomes.get(stage)
        if outcome is None:  # ended by a signal: the same task tries once more
            return done
        if outcome.code:
            self._show(stage, outcome, " | ".join(self.last_lines.get(stage, [])) or done.message or "")
            return done
        if outcome.what == "ran":
            self._ran.add(stage)
            remote.push(plan.root, stage)
        if self.replay and stage.startswith("evaluate"):
            replay = [sys.executable, "-m", "tessera.tracking", "replay", "--root", str(self.checkout)]
            plan.processes.run(replay, tell, plan.root, {})
        self._show(stage, outcome, "")
        remote.remove_state(plan.root, key)
        return done

    def keep(self, experiment: experiments.Experiment, targets: list[str]) -> dict[str, Any]:
        """All of it is in the remote."""
        experiments.drop(experiment)
        return {}

    def _show(self, stage: str, outcome: Outcome, message: str) -> None:
        """The coordinator waits for this: an answer of the server is worth waiting for."""
        root = self.plan.root
        shown = {
            "code": outcome.code,
            "what": outcome.what,
            "seconds": round(outcome.seconds, 1),
            "where": os.uname().nodename,
            "message": message,
            "entry": remote.entries(root, [], [stage]).get(stage, {}),
            "files": {} if outcome.code else remote.small_files(self.plan, [stage]),
        }
        ends = time.monotonic() + ANSWER_SECONDS

        def check() -> None:
            if time.monotonic() > ends:
                raise remote.Trouble(
                    f"Prefect's server did not answer for {ANSWER_SECONDS:.0f} s: {stage} is done and sent"
                )

        key, description = key_of(stage, "result"), f"what became of {stage}"
        patiently(lambda: show(self.id, key, shown, description), tell, check)


@contextlib.contextmanager
def _sending(root: Path, state: Path, key: str, warn: Callable[[str], None]) -> Iterator[None]:
    """While it lasts, the newest checkpoint of a training goes to the remote every so often. What fails is told once."""
    ended = threading.Event()
    seconds = float(os.environ.get("TESSERA_STATE_SECONDS") or STATE_SECONDS)

    def send() -> None:
        sent, is_told, is_last = "", False, False
        while not is_last:
            is_last = ended.wait(seconds)  # once more at the end: a training that is stopped has just saved its state
            try:
                step = remote.newest(state)
                if step is not None and step.name != sent:
                    sent = remote.send_state(root, state, key) or sent
            except FileNotFoundError:  # replaced by a newer one meanwhile
                continue
            except Exception as error:  # the store's and the network's: the training goes on
                if not is_told:
                    warn(f"the training state is not sent ({error}): another machine would begin anew")
                is_told = True

    thread = threading.Thread(target=send, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


if __name__ == "__main__":
    sys.exit("flows.part is a part of a run that spreads: python -m flows.reproduce --spread")

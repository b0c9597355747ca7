"""Runs the pipeline through Prefect: DVC's own graph, one task per stage, each of them `dvc repro --single-item STAGE`.

    python -m flows.reproduce [TARGET ...] [--force] [--preset NAME] [-S KEY=VALUE ...] [--champion "METRIC < NUMBER"]
        [--spread]

DVC decides what is stale; Prefect decides when and where it runs, and shows it. Without PREFECT_API_URL no server is
needed: Prefect starts one for the run, on the loopback interface, with its files in .prefect.
"""

import argparse
import contextlib
import os
import signal
import sys
import time
from collections import deque
from pathlib import Path
from types import FrameType
from typing import Any

# Prefect reads its settings when it is imported; what the environment says already takes precedence
for _name, _value in {
    "PREFECT_HOME": str(Path.cwd() / ".prefect"),
    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
    "DO_NOT_TRACK": "1",
    "PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS": "120",  # its first start also creates a database
    "PREFECT_SERVER_LOGGING_LEVEL": "CRITICAL",  # its own server is stopped while it still writes, and would say so
    "PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL": "ERROR",  # the stages' lines are printed as they are, once
}.items():
    os.environ.setdefault(_name, _value)

from prefect import flow, get_run_logger, task  # noqa: E402
from prefect.cache_policies import NO_CACHE  # noqa: E402
from prefect.context import FlowRunContext, TaskRunContext  # noqa: E402
from prefect.futures import wait  # noqa: E402
from prefect.states import Completed, Failed, State  # noqa: E402
from prefect.task_runners import ThreadPoolTaskRunner  # noqa: E402

from flows import champion as champions  # noqa: E402
from flows import ending, experiments  # noqa: E402
from flows.board import Board  # noqa: E402
from flows.places import Places  # noqa: E402
from flows.plan import Plan, opened, tell  # noqa: E402
from flows.spread import Workers, require  # noqa: E402
from flows.stack.prefect_server import start_temporary_ones  # noqa: E402
from tessera.running.launch import SHARED  # noqa: E402

INTERRUPTED = "Interrupted"
RETRY_SECONDS = 3.0  # a process that was told to end by the death of its parent may still be saving


_plan: Plan | None = (
    None  # opened by `main` before Prefect starts, so that a wrong target is refused within two seconds
)


def _resumes(task: Any, run: Any, state: State[Any]) -> bool:
    return state.name == INTERRUPTED


# A thread for every stage, most of them waiting: as many work at a time as there are places
@flow(name="reproduce", task_runner=ThreadPoolTaskRunner(max_workers=1000))
def reproduce(
    preset: str | None = None,
    overrides: dict[str, Any] | list[str] | None = None,
    targets: list[str] | None = None,
    force: bool = False,
    champion: str | None = None,
    spread: bool = False,
) -> State[Any]:
    """Bring the targets up to date, or everything. The flow fails if a stage fails; stages that can run, still do.

    Args:
        preset: the name of a file in presets/; without one, params.yaml as it is.
        overrides: {"systems.vqgan-flow.prior.training.num_steps": 900}, or as `dvc exp run -S` takes them. With a preset
            or overrides the run is a DVC experiment, in a folder of its own: the checkout stays as it is.
        targets: stages such as train_prior@vqgan-flow; without any, all of them.
        force: run the stages even if nothing changed.
        champion: "generation/fd_classifier < 0.5" gives MLflow's alias champion to the best registered system by this
            metric once all stages have succeeded, if it is below (or with >, above) the number.
        spread: leave the stages to all workers of a pool, on several machines, and wait for them here.
    """
    if champion:
        champions.arguments(champion)  # an invalid one is refused before the work
    with contextlib.nullcontext(_plan) if _plan else opened(targets or [], force, preset, overrides) as plan:
        run = Run(plan)
        if spread:
            workers = Workers(plan, run.id, bool(champion), run.work_pool)
            plan.elsewhere = workers.carry_out
        try:
            return carry_out(run, targets or [], champion)
        except BaseException:
            if spread:
                workers.cancel()
            raise


class Run:
    """What the tasks of one flow run do; Prefect's decorators are in `carry_out`."""

    def __init__(self, plan: Plan) -> None:
        context = FlowRunContext.get()
        run = context.flow_run if context else None
        self.plan, self.places = plan, Places(plan.systems)
        self.id = run.id if run else None
        self.work_pool = run.work_pool_name if run else None
        self.in_worker = ending.is_engine()
        self.board = Board(self.id)
        self.last_lines: dict[str, deque[str]] = {}  # by stage

    def reproduce(self, stage: str) -> State[Any]:
        logger, plan, board = get_run_logger(), self.plan, self.board
        context = TaskRunContext.get()
        task_run_id = context.task_run.id if context else None

        said = self.last_lines[stage] = deque(maxlen=2)

        def say(line: str) -> None:
            said.append(line)
            if not self.in_worker:  # which prints what is logged
                named = stage in line or self.places.number == 1
                tell(line if named else f"{stage}  {line}")
            logger.info(line)
            board.line(stage, line, task_run_id)

        began = time.time()
        outcome = plan.reproduce(stage, say, self.places)
        if outcome.code and stage not in plan.outcomes:
            say(f"{stage} was ended by a signal, possibly out of memory; it continues from its checkpoint")
            return Failed(name=INTERRUPTED, message="ended by a signal")
        if outcome.code:
            where = f" on {outcome.where}" if outcome.where else ""
            return Failed(message=f"dvc repro ended with exit code {outcome.code}{where}")
        if outcome.what == "ran" and not outcome.where:
            board.done(stage, task_run_id)
            board.link(stage, plan.experiment.checkout if plan.experiment else plan.root, began, task_run_id)
        if outcome.what == "ran" or not any(stage in above for above in plan.upstream.values()):  # the table: always
            board.outputs(stage, plan.outputs[stage], task_run_id)
        return Completed(name="Cached", message="nothing changed") if outcome.what == "cached" else Completed()

    def choose_champion(self, condition: str) -> State[Any]:
        logger, plan = get_run_logger(), self.plan

        def say(line: str) -> None:
            if not self.in_worker:
                tell(line)
            logger.info(line)

        tracker = experiments.environment(plan.experiment) if plan.experiment else {}
        plan.champion_code = plan.processes.run(champions.command(condition), say, plan.root, tracker)
        return Failed(message=champions.REFUSED[plan.champion_code]) if plan.champion_code else Completed()

    def keep(self, experiment: experiments.Experiment, targets: list[str]) -> dict[str, Any]:
        """Save the experiment. Returns its name and the metrics of its systems, which a sweep compares."""
        plan = self.plan
        systems = [path for outs in plan.outputs.values() for path in outs if path.parent.name == "systems"]
        kept = {"experiment": experiment.name, "metrics": {path.stem: path.read_text() for path in systems}}
        experiments.keep(experiment, targets, plan.unversioned)
        self.board.metrics(kept)
        tell(f"kept as experiment {experiment.name}: see dvc exp show, dvc exp apply {experiment.name}")
        return kept


def carry_out(run: Run, targets: list[str], champion: str | None) -> State[Any]:
    """Run the tasks of a plan, and what follows once all stages have succeeded."""
    plan = run.plan
    if run.id and str(run.id) == os.environ.get("PREFECT__FLOW_RUN_ID"):  # it has this process for itself
        ending.watch(plan, plan.code)
    plan.afterwards = bool(plan.experiment or champion)

    @task(
        name="stage",
        task_run_name="{stage}",
        cache_policy=NO_CACHE,
        retries=1,
        retry_delay_seconds=RETRY_SECONDS,
        retry_condition_fn=_resumes,
    )
    def reproduce_stage(stage: str) -> State[Any]:
        return run.reproduce(stage)

    @task(name="champion", cache_policy=NO_CACHE)
    def choose_champion(condition: str) -> State[Any]:
        return run.choose_champion(condition)

    kept = None
    try:
        with ending.stoppable(plan):
            futures: dict[str, Any] = {}
            for stage, upstream in plan.upstream.items():
                named = reproduce_stage.with_options(name=stage)  # the page shows it while the stage waits for others
                futures[stage] = named.submit(stage, wait_for=[futures[name] for name in sorted(upstream)])
            wait(list(futures.values()))
            if champion and plan.code() == 0:
                choose_champion(champion, return_state=True)
            if plan.experiment and plan.code() == 0:
                kept = run.keep(plan.experiment, list(plan.upstream) if targets else [])
    finally:
        plan.afterwards = False
        plan.report()
        run.board.close()
    failed = [stage for stage, outcome in plan.outcomes.items() if outcome.code]
    failed += ["champion"] if plan.champion_code else []
    return Failed(message=f"failed: {', '.join(failed)}") if failed else Completed(data=kept)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m flows.reproduce", description=__doc__.splitlines()[0])
    parser.add_argument("targets", nargs="*", help="stages such as train_prior@vqgan-flow; without any, all of them")
    parser.add_argument("--force", action="store_true", help="run the stages even if nothing changed")
    parser.add_argument("--preset", help="a file of presets/, without .yaml; default: params.yaml as it is")
    parser.add_argument("--champion", help='choose the champion, e.g. by "generation/fd_classifier < 0.5"')
    parser.add_argument(
        "-S", "--set", action="append", metavar="KEY=VALUE", help="other params, as `dvc exp run -S` takes them"
    )
    parser.add_argument("--spread", action="store_true", help="leave the stages to the workers of PREFECT_API_URL")
    arguments = parser.parse_args()
    from dvc.exceptions import DvcException

    try:
        for stage in SHARED:
            Places().wanted(stage)
        if arguments.champion:
            champions.arguments(arguments.champion)
        with contextlib.ExitStack() as stack:
            opening = opened(arguments.targets, arguments.force, arguments.preset, arguments.set)
            plan = stack.enter_context(opening)
            if arguments.spread:
                require(plan.root, None)
            if not os.environ.get("PREFECT_API_URL") and not arguments.champion and plan.is_done():
                plan.report()  # to start a server for that would take ten seconds, and nobody could see it there
                return 0
            return _run(plan, arguments)
    except (DvcException, ValueError) as error:
        print(f"cannot reproduce {' '.join(arguments.targets) or 'the pipeline'}: {error}", file=sys.stderr)
        return 2


def _run(plan: Plan, arguments: argparse.Namespace) -> int:
    """Run the flow in this process: it ends on signals, and even if Prefect does not return."""
    global _plan
    _plan = plan
    stopped = 0

    def stop(number: int, frame: FrameType | None) -> None:
        nonlocal stopped
        stopped = 128 + number
        raise SystemExit(stopped)

    def code() -> int:
        return stopped or plan.code() or plan.champion_code

    signal.signal(signal.SIGTERM, stop)
    signal.signal(signal.SIGINT, stop)
    ending.watch(plan, code)
    start_temporary_ones()
    if not os.environ.get("PREFECT_API_URL"):
        print("Prefect starts its server for this run, which takes some seconds.", flush=True)
    try:
        given = (
            arguments.preset,
            arguments.set,
            arguments.targets,
            arguments.force,
            arguments.champion,
            arguments.spread,
        )
        state = reproduce(*given, return_state=True)
        if not plan.settled():  # Prefect did not start them, e.g. because its server failed
            print(
                f"Prefect ended the run before all stages had run ({state.name}: {state.message}); run it again",
                file=sys.stderr,
            )
    except SystemExit:
        pass  # by `stop`
    except Exception as error:  # Prefect's own failure is reported, but the stages decide whether the run succeeded
        print(
            f"Prefect failed ({type(error).__name__}: {error}); the list of stages shows what was done", file=sys.stderr
        )
    plan.report()
    return code()


if __name__ == "__main__":
    sys.exit(main())

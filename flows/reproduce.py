"""Runs the pipeline through Prefect: DVC's own graph, one task per stage, each of them `dvc repro --single-item STAGE`.

    python -m flows.reproduce [TARGET ...] [--force] [--preset NAME] [-S KEY=VALUE ...] [--champion "FIGURE < NUMBER"]

DVC decides what is stale, Prefect when and where it runs and what people see. Without PREFECT_API_URL no server is
needed: Prefect starts one for the run, on the loopback interface, with its files in .prefect.
"""

import argparse
import contextlib
import hashlib
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple

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
from flows import experiments, locks  # noqa: E402
from flows.board import Board  # noqa: E402
from flows.places import devices  # noqa: E402
from flows.processes import StageProcesses, Stopped, dvc, search_path  # noqa: E402
from tessera.tracking import journal  # noqa: E402

STATE = Path(".state")
INTERRUPTED = "Interrupted"
RETRY_SECONDS = 3.0  # a process that was told to end by the death of its parent may still be saving
GRACE_SECONDS = 25.0  # longer than the last artifacts take
HINTS = (  # dvc gives them after each stage
    "To track the changes with git",
    "Updating lock file",
    "git add ",
    "To enable auto staging",
    "dvc config core.autostage",
    "Use `dvc push`",
)
SERVER_SECONDS = 5.0


def tell(line: str) -> None:
    """Print a line; where nobody reads any more, because the worker was killed, the run goes on."""
    with contextlib.suppress(OSError):
        print(line, flush=True)


class Outcome(NamedTuple):
    what: str  # ran, cached, failed or not run
    seconds: float = 0.0
    code: int = 0
    changed: bool = False  # whether its outputs may differ from those at the start
    interrupted: bool = False  # by a signal that is not the flow's own, such as the one for want of memory


@dataclass
class Plan:
    """What to reproduce, and what became of it: the truth of a flow run, whatever happens to Prefect."""

    root: Path
    upstream: dict[str, set[str]]  # each stage's direct upstream stages, in an order in which they can run
    outputs: dict[str, list[Path]]
    unversioned: list[str]  # outputs that DVC's cache does not keep: metrics, which git does
    stale: set[str]
    force: bool
    experiment: experiments.Experiment | None = None  # whose worktree `root` is
    recipes: dict[str, str] = field(default_factory=dict)  # of an experiment's stages: equal ones compute the same
    afterwards: bool = False  # whether there is something to do when all stages have come out well
    champion_code: int = 0  # the exit code of the step that chooses the champion
    outcomes: dict[str, Outcome] = field(default_factory=dict)
    interrupted: set[str] = field(default_factory=set)  # stages that are run once more
    processes: StageProcesses = field(default_factory=StageProcesses)
    over: threading.Event = field(default_factory=threading.Event)  # reported: nothing more will run

    def reproduce(self, stage: str, say: Callable[[str], None], places: "Places") -> Outcome:
        """Run one stage, whose upstream stages have all come out well; a clean one costs no process.

        A stage that a signal has ended is not yet an outcome the first time: call again, and it resumes.
        """
        clean = stage not in self.stale and not any(self.outcomes[name].changed for name in self.upstream[stage])
        outcome = Outcome("cached") if clean and not self.force else self._run(stage, say, places)
        if outcome.interrupted and stage not in self.interrupted:
            self.interrupted.add(stage)
        else:
            self.outcomes[stage] = outcome
        return outcome

    def _run(self, stage: str, say: Callable[[str], None], places: "Places") -> Outcome:
        ran = skipped = False
        status = 0

        def listen(line: str) -> None:
            nonlocal ran, skipped, status
            ran = ran or line.startswith("Running stage ")
            skipped = skipped or line.endswith("didn't change, skipping")
            if ended := re.search(r"exited with (-?\d+)$", line):
                status = int(ended[1])
            if line.strip() and not line.strip().startswith(HINTS):
                say(line)

        # First the stage, then a device: who waits for another run of the same stage keeps nobody from a device
        owner = f"{stage} in {self.root}"
        single = [self.root / STATE / "locks" / f"flow-{stage}.lock"]
        if self.experiment:  # another one may be computing the same, and this one takes it from the cache
            single.append(experiments.shared_lock(self.experiment, self.recipes[stage]))
        with contextlib.ExitStack() as held:
            mine = [held.enter_context(locks.one_of([path], owner, say, self._check_going_on)) for path in single]
            device, environment = held.enter_context(places.one(owner, say, self._check_going_on))
            if self.experiment:  # its stages would start an uploader for a folder that goes away
                journal.start_uploader(self.experiment.checkout)
                environment = environment | experiments.environment(self.experiment)
            began = time.monotonic()
            command = dvc("--wait-for-lock", "repro", "--single-item", stage, *(["--force"] if self.force else []))
            environment = {"DVC_NO_ANALYTICS": "true", "PATH": search_path(), **environment}
            keep = [lock.descriptor for lock in (*mine, device)]
            code = self.processes.run(command, listen, self.root, environment, keep)
            seconds = time.monotonic() - began
        if code:
            interrupted = (code < 0 or status < 0 or status > 128) and not self.processes.stopping.is_set()
            return Outcome("failed", seconds, code if code > 0 else 128 - code, changed=True, interrupted=interrupted)
        return Outcome("ran" if ran else "cached", seconds, changed=ran or not skipped)

    def _check_going_on(self) -> None:
        if self.processes.stopping.is_set():
            raise Stopped("the flow is ending")

    def settled(self) -> bool:
        """Whether every stage has come to its end, or never can because one before it failed."""
        lost: set[str] = set()
        for stage, upstream in self.upstream.items():
            outcome = self.outcomes.get(stage)
            if upstream & lost or (outcome and outcome.code):
                lost.add(stage)
            elif not outcome:
                return False
        return True

    def finished(self) -> bool:
        """Whether Prefect alone is still at work."""
        settled = self.settled() and (not self.afterwards or self.code() != 0)
        return settled or self.processes.stopping.is_set() or self.over.is_set()

    def code(self) -> int:
        """DVC's exit code of the first stage that failed; 1 if Prefect did not run them all."""
        codes = [self.outcomes[stage].code for stage in self.upstream if stage in self.outcomes]
        return next((code for code in codes if code), 0 if len(codes) == len(self.upstream) else 1)

    def report(self) -> None:
        """Print a line per stage, once."""
        if self.over.is_set():
            return
        self.over.set()
        width = max(len(stage) for stage in self.upstream)
        for stage in self.upstream:
            outcome = self.outcomes.get(stage, Outcome("not run"))
            tell(f"{stage:<{width}}  {outcome.what:<7}  {outcome.seconds:8.1f} s")


def read_plan(root: Path, targets: list[str], force: bool, experiment: experiments.Experiment | None = None) -> Plan:
    """DVC's graph above the targets (all stages if there are none), and which of them are stale now."""
    import networkx
    from dvc.lock import LockError
    from dvc.repo import Repo

    # DVC takes the names of stages relative to the working directory, of which a process has one
    with _reading, contextlib.chdir(root), Repo(_wait_for_lock=True) as repo:
        graph = repo.index.graph  # its edges lead from a stage to what it depends on
        wanted = {stage for target in targets for stage in repo.stage.collect(target)} if targets else set(graph)
        wanted = wanted.union(*(networkx.descendants(graph, stage) for stage in wanted))
        order = [stage for stage in networkx.dfs_postorder_nodes(graph) if stage in wanted]
        upstream = {stage.addressing: {above.addressing for above in graph.successors(stage)} for stage in order}
        if not upstream:
            raise ValueError(f"{repo.root_dir} has no stages: expected some in dvc.yaml, see https://dvc.org/doc")
        outputs = {stage.addressing: [Path(out.fs_path) for out in stage.outs] for stage in order}
        unversioned = [os.path.relpath(out.fs_path) for stage in order for out in stage.outs if not out.use_cache]
        try:
            stale = set() if force else set(repo.status()) & set(upstream)
        except LockError:  # another run is writing: ask dvc for each stage, when its turn comes
            stale = set(upstream)
        recipes = _recipes(order, graph) if experiment else {}
        return Plan(Path(repo.root_dir), upstream, outputs, unversioned, stale, force, experiment, recipes)


def _recipes(order: list[Any], graph: Any) -> dict[str, str]:
    """A digest of what each stage computes: its command, its params, and what the stages before it compute."""
    from dvc.dependency.param import ParamsDependency

    recipes: dict[str, str] = {}
    for stage in order:
        params = [dep.read_params() for dep in stage.deps if isinstance(dep, ParamsDependency)]
        above = sorted(recipes[before.addressing] for before in graph.successors(stage))
        text = json.dumps([stage.cmd, params, above], sort_keys=True, default=str)
        recipes[stage.addressing] = hashlib.sha256(text.encode()).hexdigest()
    return recipes


_reading = threading.Lock()


@contextlib.contextmanager
def opened(targets: list[str], force: bool, preset: str | None, overrides: experiments.Overrides) -> Iterator[Plan]:
    """The plan of a run: in the checkout, or with a preset or overrides in a worktree of its own, for its user alone."""
    checkout = Path.cwd()
    experiment = experiments.define(checkout, preset, overrides)
    if experiment is None:
        yield read_plan(checkout, targets, force)
        return
    with locks.one_of([experiment.lock], experiment.name, tell):
        experiments.prepare(experiment)
        tell(f"{experiment.name} runs in {experiment.folder}")
        yield read_plan(experiment.folder, targets, force, experiment)


class Places:
    """Where stages run: a lock for each device of the machine, and how many of them this flow run uses at a time."""

    def __init__(self) -> None:
        gpus = devices()
        text = os.environ.get("TESSERA_PARALLEL") or str(max(1, len(gpus)))
        if not text.isdecimal() or int(text) == 0:
            raise ValueError(
                f"TESSERA_PARALLEL is {text!r}: expected how many stages may run at once, e.g. 1; correct it"
            )
        self.number = int(text)
        self._turns = threading.Semaphore(self.number)
        folder = locks.folder()
        self.environments: dict[Path, dict[str, str]] = {}
        for index in range(max(self.number, len(gpus))):
            names = gpus or ["cpu"]
            device, share = names[index % len(names)], index // len(names)  # shared only if more are asked for
            lock = folder / (f"{'gpu-' if gpus else ''}{device}" + (f"-share-{share + 1}" if share else "") + ".lock")
            # The index is that of nvidia-smi, whichever GPU CUDA would call the first
            gpu = {"CUDA_VISIBLE_DEVICES": device, "CUDA_DEVICE_ORDER": "PCI_BUS_ID"}
            self.environments[lock] = gpu if gpus else {}

    @contextlib.contextmanager
    def one(
        self, owner: str, say: Callable[[str], None], give_up: Callable[[], None]
    ) -> Iterator[tuple[locks.Lock, dict[str, str]]]:
        """Hold a place; what to add to the environment of the stage that has it."""
        while not self._turns.acquire(timeout=locks.POLL_SECONDS):
            give_up()  # a wait without end could not be cancelled
        try:
            with locks.one_of(list(self.environments), owner, say, give_up) as lock:
                yield lock, self.environments[lock.path]
        finally:
            self._turns.release()


_plan: Plan | None = None  # opened by `main` before Prefect starts, so that a wrong target is told in two seconds


def _resumes(task: Any, run: Any, state: State[Any]) -> bool:
    return state.name == INTERRUPTED


# Every stage has a thread, nearly all of them waiting; how many work is the number of places
@flow(name="reproduce", task_runner=ThreadPoolTaskRunner(max_workers=1000))
def reproduce(
    preset: str | None = None,
    overrides: dict[str, Any] | list[str] | None = None,
    targets: list[str] | None = None,
    force: bool = False,
    champion: str | None = None,
) -> State[Any]:
    """Bring the targets up to date, or everything. The flow fails if a stage fails; stages that can run, still do.

    Args:
        preset: the name of a file in presets/; without one, params.yaml as it is.
        overrides: {"systems.vqgan-flow.prior.training.num_steps": 900}, or as `dvc exp run -S` takes them. With a preset
            or overrides the run is a DVC experiment, in a folder of its own: the checkout stays as it is.
        targets: stages such as train_prior@vqgan-flow; without any, all of them.
        force: run the stages even if nothing changed.
        champion: "generation/fd_classifier < 0.5" gives MLflow's alias champion to the best registered system by this
            figure when all stages have come out well, if it is below (or with >, above) the number.
    """
    if champion:
        champions.arguments(champion)  # a wrong one is told before the work
    with contextlib.nullcontext(_plan) if _plan else opened(targets or [], force, preset, overrides) as plan:
        return _carry_out(plan, targets or [], champion)


def _carry_out(plan: Plan, targets: list[str], champion: str | None) -> State[Any]:
    if _ending.is_set():
        raise Stopped("the flow is ending")
    places = Places()
    prefixed = places.number > 1
    run = FlowRunContext.get()
    run_id = run.flow_run.id if run and run.flow_run else None
    in_worker = is_engine()
    if run and str(run_id) == os.environ.get("PREFECT__FLOW_RUN_ID"):  # it has this process for itself
        threading.Thread(target=_watch, args=(plan.finished, plan, plan.code), daemon=True).start()
    board = Board(run_id)
    plan.afterwards = bool(plan.experiment or champion)
    _running.append(plan)

    @task(
        name="stage",
        task_run_name="{stage}",
        cache_policy=NO_CACHE,
        retries=1,
        retry_delay_seconds=RETRY_SECONDS,
        retry_condition_fn=_resumes,
    )
    def reproduce_stage(stage: str) -> State[Any]:
        logger = get_run_logger()
        context = TaskRunContext.get()
        task_run_id = context.task_run.id if context else None

        def say(line: str) -> None:
            if not in_worker:  # which prints what is logged
                tell(f"{stage}: {line}" if prefixed else line)
            logger.info(line)
            board.line(stage, line, task_run_id)

        began = time.time()
        outcome = plan.reproduce(stage, say, places)
        if outcome.code and stage not in plan.outcomes:
            say(
                f"{stage} was ended by a signal, which is what want of memory does too; it continues from its checkpoint"
            )
            return Failed(name=INTERRUPTED, message="ended by a signal")
        if outcome.code:
            return Failed(message=f"dvc repro ended with exit code {outcome.code}")
        if outcome.what == "ran":
            board.done(stage, task_run_id)
            board.link(stage, plan.experiment.checkout if plan.experiment else plan.root, began, task_run_id)
        if outcome.what == "ran" or not any(stage in above for above in plan.upstream.values()):  # the table: always
            board.outputs(stage, plan.outputs[stage], task_run_id)
        return Completed(name="Cached", message="nothing changed") if outcome.what == "cached" else Completed()

    @task(name="champion", cache_policy=NO_CACHE)
    def choose_champion(condition: str) -> State[Any]:
        logger = get_run_logger()

        def say(line: str) -> None:
            if not in_worker:
                tell(line)
            logger.info(line)

        tracker = experiments.environment(plan.experiment) if plan.experiment else {}
        plan.champion_code = plan.processes.run(champions.command(condition), say, plan.root, tracker)
        return Failed(message=champions.REFUSED[plan.champion_code]) if plan.champion_code else Completed()

    kept = None
    try:
        futures: dict[str, Any] = {}
        for stage, upstream in plan.upstream.items():
            named = reproduce_stage.with_options(name=stage)  # the page shows it while the stage waits for others
            futures[stage] = named.submit(stage, wait_for=[futures[name] for name in sorted(upstream)])
        wait(list(futures.values()))
        if champion and plan.code() == 0:
            choose_champion(champion, return_state=True)
        if plan.experiment and plan.code() == 0:
            systems = [plan.root / path for path in plan.unversioned if Path(path).parent.name == "systems"]
            kept = {"experiment": plan.experiment.name, "figures": {path.stem: path.read_text() for path in systems}}
            experiments.keep(plan.experiment, list(plan.upstream) if targets else [], plan.unversioned)
            board.figures(kept)
            tell(f"kept as experiment {plan.experiment.name}: see dvc exp show, dvc exp apply {plan.experiment.name}")
    except BaseException:  # a cancellation, a signal: the tasks' threads do not hear of it, their processes must
        plan.processes.stop()
        raise
    finally:
        _running.remove(plan)
        plan.afterwards = False
        plan.report()
        board.close()
    failed = [stage for stage, outcome in plan.outcomes.items() if outcome.code]
    failed += ["champion"] if plan.champion_code else []
    return Failed(message=f"failed: {', '.join(failed)}") if failed else Completed(data=kept)


_running: list[Plan] = []
_ending = threading.Event()


def stop_all() -> None:
    """End the stages of every run of this process, and begin no other."""
    _ending.set()
    for plan in list(_running):
        plan.processes.stop()


def leave_later(code: int) -> None:
    """End the process a grace period from now, for what may keep Prefect from doing so (see `_watch`)."""

    def leave() -> None:
        time.sleep(GRACE_SECONDS)
        os._exit(code)

    threading.Thread(target=leave, daemon=True).start()


def is_engine() -> bool:
    """Whether a worker started this process for one flow run."""
    return getattr(getattr(sys.modules["__main__"], "__spec__", None), "name", "") == "prefect.engine"


def _watch(is_finished: Callable[[], bool], plan: Plan, code: Callable[[], int]) -> None:
    """End the process when its stages are done and Prefect is not, a grace period later.

    With a dead server Prefect goes on sending events for minutes, long after the last stage.
    """
    while not is_finished():
        time.sleep(0.5)
    time.sleep(GRACE_SECONDS)
    tell("Prefect does not come to its end (is its server gone?), so this process ends without it.")
    plan.processes.stop()
    plan.report()
    _stop_server()
    os._exit(code())


def _stop_server() -> None:
    """os._exit runs no exit handlers, so Prefect's own server would live on."""
    module = sys.modules.get("prefect.server.api.server")
    for server in list(module.SubprocessASGIServer._instances.values()) if module else []:
        if server.server_process is not None:
            server.server_process.terminate()
            try:
                server.server_process.wait(SERVER_SECONDS)
            except subprocess.TimeoutExpired:
                server.server_process.kill()


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m flows.reproduce", description=__doc__.splitlines()[0])
    parser.add_argument("targets", nargs="*", help="stages such as train_prior@vqgan-flow; without any, all of them")
    parser.add_argument("--force", action="store_true", help="run the stages even if nothing changed")
    parser.add_argument("--preset", help="a file of presets/, without .yaml; default: params.yaml as it is")
    parser.add_argument("--champion", help='choose the champion, e.g. by "generation/fd_classifier < 0.5"')
    parser.add_argument(
        "-S", "--set", action="append", metavar="KEY=VALUE", help="other params, as `dvc exp run -S` takes them"
    )
    arguments = parser.parse_args()
    from dvc.exceptions import DvcException

    try:
        Places()
        if arguments.champion:
            champions.arguments(arguments.champion)
        with contextlib.ExitStack() as stack:
            opening = opened(arguments.targets, arguments.force, arguments.preset, arguments.set)
            return _run(stack.enter_context(opening), arguments)
    except (DvcException, ValueError) as error:
        print(f"cannot reproduce {' '.join(arguments.targets) or 'the pipeline'}: {error}", file=sys.stderr)
        return 2


def _run(plan: Plan, arguments: argparse.Namespace) -> int:
    """The flow run of a plan in this process, with signals, and with an end even where Prefect finds none."""
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
    threading.Thread(target=_watch, args=(plan.finished, plan, code), daemon=True).start()
    if not os.environ.get("PREFECT_API_URL"):
        print("Prefect starts its server for this run, which takes some seconds.", flush=True)
    try:
        given = arguments.preset, arguments.set, arguments.targets, arguments.force, arguments.champion
        reproduce(*given, return_state=True)
    except SystemExit:
        pass  # by `stop`
    except Exception as error:  # Prefect's own trouble is told, but the stages say whether the run was good
        print(
            f"Prefect failed ({type(error).__name__}: {error}); the list of stages tells what was done", file=sys.stderr
        )
    plan.report()
    return code()


if __name__ == "__main__":
    sys.exit(main())

"""Runs the pipeline through Prefect: DVC's own graph, one task per stage, each of them `dvc repro --single-item STAGE`.

    python -m flows.reproduce [TARGET ...] [--force]

DVC decides what is stale, Prefect when and where it runs and what people see. Without PREFECT_API_URL no server is
needed: Prefect starts one for the run, on the loopback interface, with its files in .prefect.
"""

import argparse
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
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
from prefect.futures import wait  # noqa: E402
from prefect.states import Completed, Failed, State  # noqa: E402
from prefect.task_runners import ThreadPoolTaskRunner  # noqa: E402

from flows.devices import devices  # noqa: E402
from flows.stage_process import StageProcesses, Stopped  # noqa: E402

GRACE_SECONDS = 10.0
SERVER_SECONDS = 5.0


class Outcome(NamedTuple):
    what: str  # ran, cached, failed or not run
    seconds: float = 0.0
    code: int = 0
    changed: bool = False  # whether its outputs may differ from those at the start


@dataclass
class Plan:
    """What to reproduce, and what became of it: the truth of a flow run, whatever happens to Prefect."""

    root: Path
    upstream: dict[str, set[str]]  # each stage's direct upstream stages, in an order in which they can run
    stale: set[str]
    force: bool
    outcomes: dict[str, Outcome] = field(default_factory=dict)
    processes: StageProcesses = field(default_factory=StageProcesses)
    over: threading.Event = field(default_factory=threading.Event)  # reported: nothing more will run

    def reproduce(self, stage: str, say: Callable[[str], None], slots: "queue.Queue[dict[str, str]]") -> Outcome:
        """Run one stage, whose upstream stages have all come out well; a clean one costs no process."""
        clean = stage not in self.stale and not any(self.outcomes[name].changed for name in self.upstream[stage])
        if clean and not self.force:
            self.outcomes[stage] = Outcome("cached")
        else:
            self.outcomes[stage] = self._run(stage, say, slots)
        return self.outcomes[stage]

    def _run(self, stage: str, say: Callable[[str], None], slots: "queue.Queue[dict[str, str]]") -> Outcome:
        ran = skipped = False

        def listen(line: str) -> None:
            nonlocal ran, skipped
            ran = ran or line.startswith("Running stage ")
            skipped = skipped or line.endswith("didn't change, skipping")
            say(line)

        device = self._take(slots)
        began = time.monotonic()
        try:
            command = [sys.executable, "-m", "dvc", "--wait-for-lock", "repro", "--single-item", stage]
            command += ["--force"] if self.force else []
            code = self.processes.run(command, listen, self.root, {"DVC_NO_ANALYTICS": "true", **device})
        finally:
            slots.put(device)
        seconds = time.monotonic() - began
        if code:
            return Outcome("failed", seconds, code if code > 0 else 128 - code, changed=True)
        return Outcome("ran" if ran else "cached", seconds, changed=ran or not skipped)

    def _take(self, slots: "queue.Queue[dict[str, str]]") -> dict[str, str]:
        while not self.processes.stopping.is_set():
            try:
                return slots.get(timeout=0.2)
            except queue.Empty:
                continue  # a wait without end could not be cancelled
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
            print(f"{stage:<{width}}  {outcome.what:<7}  {outcome.seconds:8.1f} s", flush=True)


def read_plan(targets: list[str], force: bool) -> Plan:
    """DVC's graph above the targets (all stages if there are none), and which of them are stale now."""
    import networkx
    from dvc.repo import Repo

    with Repo(_wait_for_lock=True) as repo:
        graph = repo.index.graph  # its edges lead from a stage to what it depends on
        wanted = {stage for target in targets for stage in repo.stage.collect(target)} if targets else set(graph)
        wanted = wanted.union(*(networkx.descendants(graph, stage) for stage in wanted))
        order = [stage for stage in networkx.dfs_postorder_nodes(graph) if stage in wanted]
        upstream = {stage.addressing: {above.addressing for above in graph.successors(stage)} for stage in order}
        if not upstream:
            raise ValueError(f"{repo.root_dir} has no stages: expected some in dvc.yaml, see https://dvc.org/doc")
        return Plan(Path(repo.root_dir), upstream, set() if force else set(repo.status()) & set(upstream), force)


def slots() -> "queue.Queue[dict[str, str]]":
    """One entry per stage that may run at a time: what to add to its environment."""
    gpus = devices()
    text = os.environ.get("TESSERA_PARALLEL") or str(max(1, len(gpus)))
    if not text.isdecimal() or int(text) == 0:
        raise ValueError(f"TESSERA_PARALLEL is {text!r}: expected how many stages may run at once, e.g. 1; correct it")
    places: queue.Queue[dict[str, str]] = queue.Queue()
    for index in range(int(text)):
        # A stage that is alone may use every GPU; stages side by side get one each
        places.put({"CUDA_VISIBLE_DEVICES": gpus[index % len(gpus)]} if gpus and int(text) > 1 else {})
    return places


_plan: Plan | None = None  # read by `main` before Prefect starts, so that a wrong target is told in two seconds


# Every stage has a thread, nearly all of them waiting; how many work is the number of slots
@flow(name="reproduce", task_runner=ThreadPoolTaskRunner(max_workers=1000))
def reproduce(targets: list[str] | None = None, force: bool = False) -> State[Any]:
    """Bring the targets up to date, or everything. The flow fails if a stage fails; stages that can run, still do."""
    plan = _plan or read_plan(targets or [], force)
    places = slots()
    prefixed = places.qsize() > 1

    @task(name="stage", task_run_name="{stage}", cache_policy=NO_CACHE)
    def reproduce_stage(stage: str) -> State[Any]:
        logger = get_run_logger()

        def say(line: str) -> None:
            print(f"{stage}: {line}" if prefixed else line, flush=True)
            logger.info(line)

        outcome = plan.reproduce(stage, say, places)
        if outcome.code:
            return Failed(message=f"dvc repro ended with exit code {outcome.code}")
        return Completed(name="Cached", message="nothing changed") if outcome.what == "cached" else Completed()

    try:
        futures: dict[str, Any] = {}
        for stage, upstream in plan.upstream.items():
            futures[stage] = reproduce_stage.submit(stage, wait_for=[futures[name] for name in sorted(upstream)])
        wait(list(futures.values()))
    except BaseException:  # a cancellation, a signal: the tasks' threads do not hear of it, their processes must
        plan.processes.stop()
        raise
    finally:
        plan.report()
    failed = [stage for stage, outcome in plan.outcomes.items() if outcome.code]
    return Failed(message=f"failed: {', '.join(failed)}") if failed else Completed()


def _watch(plan: Plan, code: Callable[[], int]) -> None:
    """End the process when its stages are done and Prefect is not, a grace period later.

    With a dead server Prefect goes on sending events for minutes, long after the last stage.
    """
    while not (plan.settled() or plan.processes.stopping.is_set() or plan.over.is_set()):
        time.sleep(0.5)
    time.sleep(GRACE_SECONDS)
    print("Prefect does not come to its end (is its server gone?), so this process ends without it.", file=sys.stderr)
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
    global _plan
    parser = argparse.ArgumentParser(prog="python -m flows.reproduce", description=__doc__.splitlines()[0])
    parser.add_argument("targets", nargs="*", help="stages such as train_prior@vqgan-flow; without any, all of them")
    parser.add_argument("--force", action="store_true", help="run the stages even if nothing changed")
    arguments = parser.parse_args()
    from dvc.exceptions import DvcException

    try:
        slots()
        plan = _plan = read_plan(arguments.targets, arguments.force)
    except (DvcException, ValueError) as error:
        print(f"cannot reproduce {' '.join(arguments.targets) or 'the pipeline'}: {error}", file=sys.stderr)
        return 2
    stopped = 0

    def stop(number: int, frame: FrameType | None) -> None:
        nonlocal stopped
        stopped = 128 + number
        raise SystemExit(stopped)

    def code() -> int:
        return stopped or plan.code()

    signal.signal(signal.SIGTERM, stop)
    signal.signal(signal.SIGINT, stop)
    threading.Thread(target=_watch, args=(plan, code), daemon=True).start()
    if not os.environ.get("PREFECT_API_URL"):
        print("Prefect starts its server for this run, which takes some seconds.", flush=True)
    try:
        reproduce(arguments.targets, arguments.force, return_state=True)
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

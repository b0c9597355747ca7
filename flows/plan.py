"""What a run is to reproduce, read from DVC's graph, and what becomes of it, without Prefect."""

import contextlib
import hashlib
import json
import os
import re
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import psutil

from flows import experiments, locks
from flows.places import Places
from flows.processes import StageProcesses, Stopped, dvc, search_path
from tessera import params
from tessera.sources.hashing import require_hashable
from tessera.tracking.processes import start_uploader

_reading = threading.Lock()
STATE = Path(".state")
BUSY_SECONDS = 1.0  # between attempts, while another dvc uses the files of a stage
STAGE_COMMAND = "python -m tessera.running"  # in dvc.yaml, of our stages
HAND_OVER_SECONDS = 2.0  # between the end of a stage and the request of the next one, which Prefect starts
SMALL_BYTES = 1_000_000  # a file up to this size is compared, which is sooner done than asking dvc: that takes 2 s
HINTS = (  # dvc gives them for each stage; its command stands in dvc.yaml
    "> ",
    "Generating lock file",
    "To track the changes with git",
    "Updating lock file",
    "git add ",
    "To enable auto staging",
    "dvc config core.autostage",
    "Use `dvc push`",
)


def tell(line: str) -> None:
    """Print a line. The run continues even if nobody reads it any more, e.g. because the worker was killed."""
    with contextlib.suppress(OSError):
        print(line, flush=True)


class Outcome(NamedTuple):
    what: str  # ran, cached, failed or not run
    seconds: float = 0.0
    code: int = 0
    changed: bool = False  # whether its outputs may differ from those at the start
    interrupted: bool = False  # by a signal that the flow did not send, e.g. the out-of-memory killer's
    where: str = ""  # the worker that ran it, if that was another process than the flow's


@dataclass
class Plan:
    """What to reproduce and the outcome of each stage: the state of a flow run, whatever happens to Prefect."""

    root: Path
    upstream: dict[str, set[str]]  # each stage's direct upstream stages, in an order in which they can run
    outputs: dict[str, list[Path]]
    unversioned: list[str]  # outputs that DVC's cache does not keep: metrics, which git does
    reads: dict[str, dict[str, list[Path]]]  # by stage and upstream stage: the paths in its outputs that it depends on
    digests: dict[Path, str]  # of the small files among them, before anything ran
    stale: set[str]
    force: bool
    systems: int = 1  # of the pipeline, targets or not: what decides how many stages share a processor, and so the bits
    experiment: experiments.Experiment | None = None  # whose worktree `root` is
    recipes: dict[str, str] = field(default_factory=dict)  # of an experiment's stages: equal ones compute the same
    afterwards: bool = False  # whether a step follows once all stages have succeeded
    elsewhere: "Callable[[str, Callable[[str], None]], Outcome] | None" = None  # runs a stage on a worker; None: here
    options: tuple[str, ...] = ()  # of `dvc repro`, for every stage
    environment: dict[str, str] = field(default_factory=dict)  # of every stage
    champion_code: int = 0  # the exit code of the step that chooses the champion
    outcomes: dict[str, Outcome] = field(default_factory=dict)
    interrupted: set[str] = field(default_factory=set)  # stages that are run once more
    processes: StageProcesses = field(default_factory=StageProcesses)
    over: threading.Event = field(default_factory=threading.Event)  # reported: nothing more will run
    _begun: set[str] = field(default_factory=set)  # asked for, by Prefect
    _waiting: set[str] = field(default_factory=set)  # for a place
    _ended: float = 0.0  # when a stage last did, by time.monotonic

    def reproduce(self, stage: str, say: Callable[[str], None], places: Places) -> Outcome:
        """Run one stage, whose upstream stages have all succeeded; a clean one starts no process.

        The first time that a signal ends a stage, no outcome is recorded: call again, and it resumes.
        """
        self._begun.add(stage)
        if self._is_clean(stage):
            outcome = Outcome("cached")
        else:
            outcome = self.elsewhere(stage, say) if self.elsewhere else self._run(stage, say, places)
        self._ended = time.monotonic()
        if outcome.interrupted and stage not in self.interrupted:
            self.interrupted.add(stage)
        else:
            self.outcomes[stage] = outcome
        return outcome

    def _is_clean(self, stage: str) -> bool:
        """Whether dvc would skip the stage: it was not stale, and upstream runs left what it reads as it was."""
        if self.force or stage in self.stale:
            return False
        changed = [above for above in self.upstream[stage] if self.outcomes[above].changed]
        return all(self._is_same(path) for above in changed for path in self.reads[stage][above])

    def is_done(self) -> bool:
        """Whether there is nothing to do: every stage is as it was, and nothing follows. Then all of them are cached."""
        if self.force or self.stale or self.experiment:
            return False
        self.outcomes = dict.fromkeys(self.upstream, Outcome("cached"))
        return True

    def _is_same(self, path: Path) -> bool:
        """Whether a small file has the content that it had at first; False for a folder or a large file: ask dvc."""
        return path in self.digests and _digest(path) == self.digests[path]

    def _run(self, stage: str, say: Callable[[str], None], places: Places) -> Outcome:
        # The lock of the stage first: waiting for another run of the same stage must not occupy a device
        owner = f"{stage} in {self.root}"
        single = [self.root / STATE / "locks" / f"flow-{stage}.lock"]
        if self.experiment:  # another one may be computing the same, and this one takes it from the cache
            single.append(experiments.shared_lock(self.experiment, self.recipes[stage]))
        with contextlib.ExitStack() as held:
            mine = [held.enter_context(locks.some_of([path], owner, say, self.check_going_on)) for path in single]
            wanted = places.wanted(stage)
            self._waiting.add(stage)
            try:
                place = places.some(wanted, owner, say, self.check_going_on, lambda: self._gives_way(stage))
                devices, environment = held.enter_context(place)
            finally:
                self._waiting.discard(stage)
            if self.experiment:  # its stages would start an uploader for a folder that is removed afterwards
                start_uploader(self.experiment.checkout)
                environment = environment | experiments.environment(self.experiment)
            began = time.monotonic()
            forced = ["--force"] if self.force else []
            command = dvc("--wait-for-lock", "repro", "--single-item", stage, *forced, *self.options)
            environment = {"DVC_NO_ANALYTICS": "true", "PATH": search_path(), **environment, **self.environment}
            keep = [lock.descriptor for lock in chain(*mine, devices)]
            was_told = False
            while True:
                heard = _Heard(say)
                code = self.processes.run(command, heard.line, self.root, environment, keep)
                if not (code and heard.is_blocked()):
                    break
                if not was_told:
                    say(
                        f"{stage} waits for another dvc in this checkout, which uses its files: process {heard.blocking[0]}"
                    )
                was_told = True
                self.check_going_on()
                time.sleep(BUSY_SECONDS)
            heard.tell_rest()
            seconds = time.monotonic() - began
        if code:
            ended = code < 0 or heard.status < 0 or heard.status > 128
            interrupted = ended and not self.processes.stopping.is_set()
            return Outcome("failed", seconds, code if code > 0 else 128 - code, changed=True, interrupted=interrupted)
        return Outcome("ran" if heard.ran else "cached", seconds, changed=heard.ran or not heard.skipped)

    def _gives_way(self, stage: str) -> bool:
        """Whether a stage before this one waits for a place, or is about to: the first system is to be finished first."""
        before = list(self.upstream)[: list(self.upstream).index(stage)]
        if self._waiting.intersection(before):
            return True
        succeeded = {name for name, outcome in list(self.outcomes.items()) if not outcome.code}
        coming = any(name not in self._begun and self.upstream[name] <= succeeded for name in before)
        return coming and time.monotonic() < self._ended + HAND_OVER_SECONDS

    def check_going_on(self) -> None:
        """Raises Stopped once the flow is ending."""
        if self.processes.stopping.is_set():
            raise Stopped("the flow is ending")

    def settled(self) -> bool:
        """Whether every stage has ended, or cannot run because one upstream of it failed."""
        lost: set[str] = set()
        for stage, upstream in self.upstream.items():
            outcome = self.outcomes.get(stage)
            if upstream & lost or (outcome and outcome.code):
                lost.add(stage)
            elif not outcome:
                return False
        return True

    def finished(self) -> bool:
        """Whether nothing but Prefect is still at work."""
        settled = self.settled() and (not self.afterwards or self.code() != 0)
        return settled or self.processes.stopping.is_set() or self.over.is_set()

    def code(self) -> int:
        """DVC's exit code of the first stage that failed; 1 if Prefect did not run them all."""
        codes = [self.outcomes[stage].code for stage in self.upstream if stage in self.outcomes]
        return next((code for code in codes if code), 0 if len(codes) == len(self.upstream) else 1)

    def report(self) -> None:
        """Print a line per stage that ran or was to, once."""
        if self.over.is_set():
            return
        self.over.set()
        width = max(len(stage) for stage in self.upstream)
        found = {stage: self.outcomes.get(stage, Outcome("not run")) for stage in self.upstream}
        for stage, outcome in found.items():
            if outcome.what != "cached":
                where = f"  on {outcome.where}" if outcome.where else ""
                tell(f"{stage:<{width}}  {outcome.what:<7}  {outcome.seconds:8.1f} s{where}")
        if cached := sum(outcome.what == "cached" for outcome in found.values()):
            tell(f"nothing changed in {cached} of the {len(found)} stages")


class _Heard:
    """What a dvc says of its stage, and whether another dvc was in its way."""

    def __init__(self, say: Callable[[str], None]) -> None:
        self.say = say
        self.ran = self.skipped = False
        self.status = 0  # of the stage
        self.blocking: list[int] = []  # processes that read or write what this one would
        self._kept_back: list[str] = []  # lines about them

    def line(self, line: str) -> None:
        self.ran = self.ran or line.startswith("Running stage ")
        self.skipped = self.skipped or line.endswith("didn't change, skipping")
        if ended := re.search(r"exited with (-?\d+)$", line):
            self.status = int(ended[1])
        if self._kept_back or "is busy, it is being blocked by" in line:
            self._kept_back.append(line)
            self.blocking += [int(number) for number in re.findall(r"\(PID (\d+)\)", line)]
        elif line.strip() and not line.strip().startswith(HINTS):
            self.say(line)

    def is_blocked(self) -> bool:
        """Whether to try again: one of them lives. DVC's list may name dead ones, and says what to do then."""
        return any(psutil.pid_exists(process) for process in self.blocking)

    def tell_rest(self) -> None:
        for line in self._kept_back:
            self.say(line)


@contextlib.contextmanager
def repository(root: Path) -> Iterator[Any]:
    """DVC's repository, in this process. One at a time: DVC resolves names relative to the working directory, which all
    threads share."""
    from dvc.repo import Repo

    with _reading, contextlib.chdir(root), Repo(_wait_for_lock=True) as repo:
        yield repo


def read_plan(root: Path, targets: list[str], force: bool, experiment: experiments.Experiment | None = None) -> Plan:
    """DVC's graph above the targets (all stages if there are none), and which of them are stale now."""
    import networkx
    from dvc.lock import LockError

    with repository(root) as repo:
        graph = repo.index.graph  # its edges lead from a stage to what it depends on
        wanted = {stage for target in targets for stage in repo.stage.collect(target)} if targets else set(graph)
        wanted = wanted.union(*(networkx.descendants(graph, stage) for stage in wanted))
        order = [stage for stage in networkx.dfs_postorder_nodes(graph) if stage in wanted]
        reads = {
            stage.addressing: {above.addressing: _shared(stage, above) for above in graph.successors(stage)}
            for stage in order
        }
        if not reads:
            raise ValueError(f"{repo.root_dir} has no stages: expected some in dvc.yaml, see https://dvc.org/doc")
        outputs = {stage.addressing: [Path(out.fs_path) for out in stage.outs] for stage in order}
        unversioned = [os.path.relpath(out.fs_path) for stage in order for out in stage.outs if not out.use_cache]
        digests = _digests(reads)  # before the status: a file that changes in between counts as changed
        try:
            stale = set() if force else set(repo.status()) & set(reads)
        except LockError:  # another run is writing: ask dvc for each stage, when its turn comes
            stale = set(reads)
        return Plan(
            root=Path(repo.root_dir),
            upstream={stage: set(above) for stage, above in reads.items()},
            outputs=outputs,
            unversioned=unversioned,
            reads=reads,
            digests=digests,
            stale=stale,
            force=force,
            systems=sum(name.startswith("train_prior@") for name in (each.addressing for each in graph)),
            experiment=experiment,
            recipes=_recipes(order, graph) if experiment else {},
        )


def read_part(root: Path, stages: list[str], force: bool, experiment: experiments.Experiment) -> Plan:
    """The plan of these stages alone, in a worktree that has what others made as entries of dvc.lock and as no files.

    Whether something changed, dvc is asked for each of them when its inputs are there.
    """
    whole = read_plan(root, stages, True, experiment)  # forced: it asks for no status
    return replace(
        whole,
        upstream={stage: above & set(stages) for stage, above in whole.upstream.items() if stage in stages},
        stale=set(stages),
        force=force,
        options=("--allow-missing",),  # what did not change is left where it is
    )


def _shared(stage: Any, above: Any) -> list[Path]:
    """The dependencies of a stage that hold, are or lie in an output of another stage."""
    from dvc.dependency import DatasetDependency

    dependencies = [Path(dep.fs_path) for dep in stage.deps if not isinstance(dep, DatasetDependency)]
    outputs = [Path(out.fs_path) for out in above.outs]
    return [
        path for path in dependencies if any(path.is_relative_to(out) or out.is_relative_to(path) for out in outputs)
    ]


def _digests(reads: dict[str, dict[str, list[Path]]]) -> dict[Path, str]:
    paths = {path for of_stage in reads.values() for some in of_stage.values() for path in some}
    return {path: digest for path in paths if (digest := _digest(path))}


def _digest(path: Path) -> str | None:
    """A hash of a small file's content; None for a folder, a large file or none at all."""
    try:
        if path.is_file() and path.stat().st_size <= SMALL_BYTES:
            return hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError:  # gone or unreadable: dvc will say so
        return None
    return None


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


def require_sane(checkout: Path, text: str) -> None:
    """Raises ValueError, before a shell or DVC sees any of it, for names in params that are none, and for a source that DVC
    cannot hash. A pipeline without our stages has params of its own."""
    graph = checkout / "dvc.yaml"
    if not graph.is_file() or STAGE_COMMAND not in graph.read_text(encoding="utf-8"):
        return
    outline = params.outline(text, Path(experiments.PARAMS))
    require_hashable(checkout / outline.dataset.source)


@contextlib.contextmanager
def opened(targets: list[str], force: bool, preset: str | None, overrides: experiments.Overrides) -> Iterator[Plan]:
    """The plan of a run: in the checkout or, with a preset or overrides, in a worktree that no other run may use meanwhile."""
    checkout = Path.cwd()
    experiment = experiments.define(checkout, preset, overrides)
    path = checkout / experiments.PARAMS
    require_sane(
        checkout, experiment.params if experiment else path.read_text(encoding="utf-8") if path.is_file() else ""
    )
    if experiment is None:
        yield read_plan(checkout, targets, force)
        return
    with locks.some_of([experiment.lock], experiment.name, tell):
        experiments.prepare(experiment)
        tell(f"{experiment.name} runs in {experiment.folder}")
        yield read_plan(experiment.folder, targets, force, experiment)

"""A run whose stages the workers of a pool do, on as many machines as it has: this process keeps the plan and dvc.lock.

Stages are handed over in chains: train_prior@x, then what only waits for it and has the same key. A chain is a flow run of
`part` (flows/part.py). It gets the commit, the params and the entries of dvc.lock that it needs as text, and everything
large from DVC's remote, to which it sends what it makes. Each entry that comes back goes into dvc.lock here, and its
outputs into their places: afterwards this checkout is what it would be after a run of its own.
"""

import hashlib
import itertools
import json
import os
import subprocess
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from uuid import UUID

from httpx import TransportError
from prefect.client.schemas.objects import FlowRun

from flows import experiments, pool, remote
from flows.board import key_of
from flows.plan import Outcome, Plan

PART = "part/part"  # the deployment of a chain
LONELY_SECONDS = 20.0  # after which a chain that nobody takes is told
MOST_ATTEMPTS = 5  # for a chain whose machine or process is lost
RESULTS = ("dvc.lock", "data/")  # what a run writes: it travels as entries of dvc.lock


@dataclass
class Chain:
    """Some stages that one flow run does, one after the other."""

    stages: list[str]
    run_id: UUID
    since: float = field(default_factory=time.monotonic)
    told: str = ""  # the worker whose name was told, or that there is none


class Workers:
    """Where the stages of a plan run."""

    def __init__(self, plan: Plan, run_id: UUID | None, champion: bool, work_pool: str | None) -> None:
        self.plan, self.run_id, self.champion = plan, run_id, champion
        self.pool = require(plan.root, work_pool)
        self.commit = committed(plan.root)
        self.params = (plan.root / experiments.PARAMS).read_text(encoding="utf-8")
        self._chains: dict[str, Chain] = {}  # by stage
        self._attempts: dict[str, int] = {}  # by stage
        self._lock = threading.Lock()
        self._is_asked = False
        self._began = time.time()

    def carry_out(self, stage: str, say: Callable[[str], None]) -> Outcome:
        """What became of a stage that a worker did."""
        try:
            return self._carry_out(stage, say)
        except remote.Trouble as error:
            say(str(error))
            return Outcome("failed", code=1)

    def _carry_out(self, stage: str, say: Callable[[str], None]) -> Outcome:
        began = time.monotonic()
        while True:
            with self._lock:
                chain = self._chains.get(stage) or self._hand_over(stage, say)
            done = self._wait(chain, stage, say)
            if done is not None:
                break
            with self._lock:  # lost: a new chain begins with this stage
                for name in chain.stages:
                    if self._chains.get(name) is chain:
                        del self._chains[name]
        code, what = int(done["code"]), str(done["what"])
        seconds, where = float(done["seconds"]) or time.monotonic() - began, str(done["where"])
        if code:
            say(f"{stage} failed on {where}: {done['message']}")
            return Outcome("failed", seconds, code, changed=True, where=where)
        before = remote.entries(self.plan.root, [], [stage]).get(stage, {})
        remote.write(self.plan.root, {stage: done["entry"]}, done["files"])
        remote.pull(self.plan.root, [stage], f"what {stage} made on {where}")
        changed = before.get("outs") != done["entry"]["outs"]
        return Outcome(what, seconds, changed=changed, where=where)

    def _hand_over(self, stage: str, say: Callable[[str], None]) -> Chain:
        if not self._is_asked:
            remote.require_answer(self.plan.root)
            pool.watch_for_lost(PART.partition("/")[0])
            self._is_asked = True
        self._attempts[stage] = self._attempts.get(stage, 0) + 1
        if self._attempts[stage] > MOST_ATTEMPTS:
            raise remote.Trouble(
                f"{stage} was lost {MOST_ATTEMPTS} times, with its process or machine: it is not tried again"
            )
        plan, stages = self.plan, self._chain(stage)
        above = sorted({name for each in stages for name in plan.upstream[each]} - set(stages))
        parameters = {
            "stages": stages,
            "commit": self.commit,
            "params": self.params,
            "entries": remote.entries(plan.root, above, stages),
            "files": remote.small_files(plan, [*above, *stages]),
            "force": plan.force,
            "parent_run": os.environ.get("TESSERA_PARENT_RUN", ""),
            "experiment": plan.experiment.name if plan.experiment else "",
            "replay": self.champion,
        }
        # The same chain of the same inputs is one run, whoever asks for it: also that of a coordinator that was killed
        text = json.dumps([parameters, str(self.run_id) if plan.force else ""], sort_keys=True)
        key = hashlib.sha256(text.encode()).hexdigest()
        run = pool.patiently(lambda: self._run_of(parameters, stages, key), say, plan.check_going_on)
        chain = Chain(stages, run.id)
        self._chains |= dict.fromkeys(stages, chain)
        if len(stages) > 1:
            say(f"{stage} and then {', '.join(stages[1:])} are handed to a worker of pool {self.pool}")
        return chain

    def _run_of(self, parameters: dict[str, Any], stages: list[str], key: str) -> FlowRun:
        """The run with this key that is under way or has succeeded; a new one if those before did not."""
        for number in itertools.count():
            run = pool.hand_over(PART, parameters, ", ".join(stages), f"{key}-{number}")
            if run.state is None or not run.state.is_final():
                return run
            last = pool.shown(run.id, key_of(stages[-1], "result"))
            if last and not last["code"]:
                return run
        raise AssertionError

    def _chain(self, stage: str) -> list[str]:
        """The stage, and those after it with its key that wait for nothing else."""
        key = stage.partition("@")[2]
        done = {name for name, outcome in self.plan.outcomes.items() if not outcome.code}
        chain = [stage]
        for later, above in self.plan.upstream.items():
            is_near = later.partition("@")[2] == key and bool(above & set(chain))
            if is_near and later not in chain and above <= done | set(chain) and later not in self.plan.outcomes:
                chain.append(later)
        return chain

    def _wait(self, chain: Chain, stage: str, say: Callable[[str], None]) -> dict[str, Any] | None:
        """What the worker shows of the stage when it has done it; None if that is to be tried again."""
        while True:
            run, done = pool.patiently(lambda: self._look(chain, stage), say, self.plan.check_going_on)
            worker, state = pool.worker_of(run), run.state
            if done is not None:
                return {**done, "where": worker or done["where"]}
            if state and state.is_crashed():
                say(f"{worker or 'its worker'} lost {stage} ({state.message}): it goes to another one")
                return None
            if state and state.is_cancelled() and run.created and run.created.timestamp() < self._began:
                say(f"the run that had {stage} done before was cancelled: it is handed over again")
                return None
            if state and state.is_final():
                why = "ended before it" if state.is_completed() else f"is {state.name}: {state.message}"
                return {"code": 1, "what": "failed", "seconds": 0, "where": worker, "message": f"its flow run {why}"}
            self._tell_where(chain, worker, say)
            time.sleep(pool.POLL_SECONDS)

    def _look(self, chain: Chain, stage: str) -> tuple[FlowRun, dict[str, Any] | None]:
        run = pool.seen(chain.run_id)  # before its results: what it showed last is seen below
        if pool.is_forgotten(run, self.pool):
            pool.give_up(run)
            run = pool.seen(chain.run_id)
        return run, pool.shown(chain.run_id, key_of(stage, "result"))

    def _tell_where(self, chain: Chain, worker: str, say: Callable[[str], None]) -> None:
        if worker and chain.told != worker:
            chain.told = worker
            say(f"{', '.join(chain.stages)} on worker {worker}")
        elif not worker and not chain.told and time.monotonic() > chain.since + LONELY_SECONDS:
            online = pool.workers_online(self.pool)
            chain.told = "nobody"
            say(
                f"{chain.stages[0]} waits for a slot of "
                + (f"the workers {', '.join(online)}" if online else f"pool {self.pool}, which has no worker online")
            )

    def cancel(self) -> None:
        if self.run_id:
            pool.cancel_below(self.run_id)


def require(root: Path, work_pool: str | None) -> str:
    """The pool that does the stages. Raises ValueError for what would keep a run of `work_pool` from spreading over it."""
    if not os.environ.get("PREFECT_API_URL"):
        raise ValueError(
            "there is no PREFECT_API_URL, and a run spreads over the workers of a server of Prefect: expected its address, "
            "e.g. http://127.0.0.1:4200/api; with make stack: . .stack/env"
        )
    try:
        own = pool.pool_of(PART)
    except TransportError as error:
        raise ValueError(
            f"Prefect's server at {os.environ['PREFECT_API_URL']} does not answer ({type(error).__name__}): start it, or "
            "correct PREFECT_API_URL"
        ) from None
    if own is None:
        raise ValueError(
            f"Prefect has no deployment {PART}, by which workers take stages: prefect --no-prompt deploy --all"
        )
    if own == work_pool:
        raise ValueError(
            f"this run is in the pool {own}, whose workers are to do its stages: they could wait for ever for the slot "
            "that it holds. Run the deployment reproduce/spread, in the pool control"
        )
    committed(root)
    remote.require(root)
    return own


def committed(root: Path) -> str:
    """The commit of a checkout. Raises ValueError for changes that workers could not fetch; params travel as text."""

    def git(*arguments: str) -> str:
        done = subprocess.run(["git", *arguments], cwd=root, capture_output=True, text=True)
        if done.returncode:
            raise ValueError(f"git {arguments[0]} failed in {root}: {done.stderr.strip()}. Workers get the code by git")
        return done.stdout

    changed = [line[3:] for line in git("status", "--porcelain", "--untracked-files=all").splitlines()]
    changed = [name for name in changed if name != experiments.PARAMS and not name.startswith(RESULTS)]
    if changed:
        raise ValueError(
            f"{', '.join(changed[:5])}{' and others' if len(changed) > 5 else ''} of {root} are not committed as they are: "
            "workers get the code by git; commit, and push to where their checkouts fetch from"
        )
    return git("rev-parse", "HEAD").strip()

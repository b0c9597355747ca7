"""Flow runs that are left to the workers of a pool: handed over, waited for, cancelled, and found again when lost."""

import json
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any, TypeVar
from uuid import UUID

from httpx import HTTPStatusError, TransportError
from prefect.automations import Automation, EventTrigger, Posture, ResourceSpecification
from prefect.client.orchestration import get_client
from prefect.client.schemas import filters
from prefect.client.schemas.actions import ArtifactCreate
from prefect.client.schemas.objects import FlowRun
from prefect.deployments import run_deployment
from prefect.events.actions import ChangeFlowRunState
from prefect.exceptions import ObjectNotFound
from prefect.states import Cancelling, Crashed

Answer = TypeVar("Answer")
POLL_SECONDS = 2.0
LOST_SECONDS = 90  # without a heartbeat, after which a run counts as crashed: three of those that prefect.yaml asks for
BEAT = "prefect.flow-run.heartbeat"
ENDS = ("Completed", "Failed", "Cancelled", "Crashed")


def is_unanswered(error: Any) -> bool:
    """Whether the server was away or busy: what was asked of it goes on meanwhile, and is found again."""
    return isinstance(error, TransportError) or (isinstance(error, HTTPStatusError) and error.response.is_server_error)


def patiently(ask: Callable[[], Answer], say: Callable[[str], None], check: Callable[[], None]) -> Answer:
    """What the server answers, once it does. `check` is called before each attempt, and may raise to end the wait."""
    is_told = False
    while True:
        check()
        try:
            return ask()
        except Exception as error:
            if not is_unanswered(error):
                raise
            if not is_told:
                say(f"Prefect's server does not answer ({type(error).__name__}): what workers do goes on meanwhile")
            is_told = True
            time.sleep(POLL_SECONDS)


def pool_of(deployment: str) -> str | None:
    """The pool whose workers take the runs of a deployment; None if there is no such deployment."""
    with get_client(sync_client=True) as client:
        try:
            return client.read_deployment_by_name(deployment).work_pool_name
        except ObjectNotFound:
            return None


def workers_online(pool: str) -> list[str]:
    with get_client(sync_client=True) as client:
        return [worker.name for worker in client.read_workers_for_work_pool(pool) if worker.status == "ONLINE"]


def hand_over(deployment: str, parameters: dict[str, Any], name: str, key: str) -> FlowRun:
    """A run of the deployment, below the flow run that calls this. With one key it is one, however often it is asked for."""
    return run_deployment(deployment, parameters=parameters, flow_run_name=name, timeout=0, idempotency_key=key)


def seen(run_id: UUID) -> FlowRun:
    with get_client(sync_client=True) as client:
        return client.read_flow_run(run_id)


def is_forgotten(run: FlowRun, pool: str) -> bool:
    """Whether a worker took the run and was gone before it began: then it has no heartbeat that could be missed."""
    state, worker = run.state, worker_of(run)
    if state is None or not state.is_pending() or not worker:
        return False
    is_old = time.time() > state.timestamp.timestamp() + LOST_SECONDS
    return is_old and worker not in workers_online(pool)


def give_up(run: FlowRun) -> None:
    with get_client(sync_client=True) as client:
        client.set_flow_run_state(run.id, Crashed(message="its worker was gone before it began"), force=True)


def worker_of(run: FlowRun) -> str:
    return str((run.labels or {}).get("prefect.worker.name", ""))


def show(run_id: UUID | None, key: str, value: Any, description: str) -> None:
    """For `shown`, on another machine."""
    with get_client(sync_client=True) as client:
        made = ArtifactCreate(key=key, type="json", data=json.dumps(value), description=description, flow_run_id=run_id)
        client.create_artifact(made)


def shown(run_id: UUID, key: str) -> Any:
    """What a run has shown below this key, an artifact of JSON; None if it has not."""
    wanted = filters.ArtifactFilter(
        flow_run_id=filters.ArtifactFilterFlowRunId(any_=[run_id]), key=filters.ArtifactFilterKey(any_=[key])
    )
    with get_client(sync_client=True) as client:
        found = client.read_artifacts(artifact_filter=wanted)
    return json.loads(found[0].data) if found else None


def cancel_below(parent_id: UUID) -> None:
    """Withdraw the runs below one that wait; those that run are cancelled by their workers."""
    parent = filters.FlowRunFilterParentFlowRunId(any_=[parent_id])
    with get_client(sync_client=True) as client:
        for run in client.read_flow_runs(flow_run_filter=filters.FlowRunFilter(parent_flow_run_id=parent)):
            if run.state is None or not run.state.is_final():
                client.set_flow_run_state(run.id, Cancelling())


def watch_for_lost(flow: str) -> None:
    """Have Prefect's server call a run of this flow crashed when its heartbeats stop, as those of a machine that is gone do.

    It would keep it as running for ever, with a slot of the pool. This is an automation of Prefect's, made once.
    """
    name = f"a run of {flow} without a heartbeat has crashed"
    with get_client(sync_client=True) as client:
        if client.read_automations_by_name(name):
            return
    ends = {f"prefect.flow-run.{end}" for end in ENDS}
    trigger = EventTrigger(
        posture=Posture.Proactive,
        after={BEAT},
        expect={BEAT, *ends},
        match=ResourceSpecification({"prefect.resource.id": ["prefect.flow-run.*"]}),
        match_related=ResourceSpecification({"prefect.resource.role": ["flow"], "prefect.resource.name": [flow]}),
        for_each={"prefect.resource.id"},
        threshold=1,
        within=timedelta(seconds=LOST_SECONDS),
    )
    crashed = ChangeFlowRunState(
        state="CRASHED", message=f"no heartbeat for {LOST_SECONDS} s: its machine or process is gone"
    )
    Automation(name=name, trigger=trigger, actions=[crashed], enabled=True).create()

"""What the stack asks of its servers: whether they answer, work pools, deployments, workers, runs that lost their process."""

import contextlib
import hashlib
import json
import os
import platform
import subprocess
import sys
import time
import urllib.error
import urllib.request
from base64 import b64encode
from collections.abc import Collection
from datetime import datetime
from typing import Any

import yaml

from flows.stack.members import POOLS, Settings, Trouble, environment, folder_of, slots
from flows.stack.processes import processes_of
from tessera.tracking.journal import redact, replace_json

ANSWER_SECONDS = 5.0
LOG_LINES = 15


def ask(url: str, login: str = "", body: Any = None, method: str | None = None) -> tuple[int, Any]:
    """Status and JSON of an answer; status 0 if there is none. login is USER:PASSWORD."""
    request = urllib.request.Request(url, json.dumps(body).encode() if body is not None else None, method=method)
    request.add_header("Content-Type", "application/json")
    if login:
        request.add_header("Authorization", f"Basic {b64encode(login.encode()).decode()}")
    for pause in (0.5, 1.0, 2.0, None):
        try:
            with urllib.request.urlopen(request, timeout=ANSWER_SECONDS) as answer:
                text = answer.read()
                return answer.status, json.loads(text) if text[:1] in (b"{", b"[") else None
        except urllib.error.HTTPError as error:
            if error.code != 503 or pause is None:
                return error.code, None
            time.sleep(pause)  # Prefect's server says so while another of its services writes to SQLite
        except (OSError, ValueError):
            return 0, None
    raise AssertionError


def answers(settings: Settings, member: str) -> bool:
    path = "/api/health" if member == "prefect" else "/health"
    return ask(settings.url(member) + path)[0] == 200


def make_pools(settings: Settings) -> None:
    """Create the work pools; one that exists keeps its limit, which people may have changed."""
    for member, pool in POOLS.items():
        body = {"name": pool, "type": "process", "concurrency_limit": slots(member), "base_job_template": {}}
        status, _ = ask(f"{settings.url('prefect')}/api/work_pools/", settings.auth_string, body)
        if status not in (201, 409):
            raise Trouble(f"Prefect's server did not create the work pool {pool}: it answered {status or 'nothing'}")


def deploy(settings: Settings) -> None:
    """Deploy what prefect.yaml lists, if the server lacks some of it, or if it or its code changed since."""
    root, file, record = settings.root, settings.root / "prefect.yaml", folder_of(settings.root) / "deployed"
    if not file.is_file():
        print(f"no prefect.yaml in {root}: nothing is deployed", flush=True)
        return
    try:
        text = file.read_text(encoding="utf-8")
        listed = {entry["name"]: entry for entry in yaml.safe_load(text)["deployments"]}
        code = sorted({entry["entrypoint"].partition(":")[0] for entry in listed.values()})
    except (yaml.YAMLError, KeyError, TypeError, AttributeError):
        raise Trouble(
            "prefect.yaml cannot be read: expected a list `deployments`, each with a name and an entrypoint; correct it"
        ) from None
    hashes = {name: hashlib.sha256((root / name).read_bytes()).hexdigest() for name in code}
    wanted = {"root": str(root), "prefect.yaml": hashlib.sha256(text.encode()).hexdigest(), "code": hashes}
    wanted["switches"] = {name: f"{entry.get('schedules')} {entry.get('paused')}" for name, entry in listed.items()}
    known: dict[str, Any] = {}
    with contextlib.suppress(FileNotFoundError, ValueError):
        known = json.loads(record.read_text(encoding="utf-8"))
    names = ", ".join(listed)
    before = _deployed(settings)
    if known == wanted and set(listed) <= set(before):
        print(f"deployed as in prefect.yaml: {names}", flush=True)
        return
    try:
        done = subprocess.run(
            [sys.executable, "-m", "prefect", "--no-prompt", "deploy", "--all"],
            cwd=root,
            env=environment(settings, "worker", os.environ) | {"COLUMNS": "120"},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=settings.seconds,
        )
    except subprocess.TimeoutExpired:
        raise Trouble(
            f"prefect.yaml is not deployed: prefect deploy --all took over {settings.seconds:.0f} s (TESSERA_STACK_SECONDS)"
        ) from None
    if done.returncode:
        end = "".join(f"\n  {redact(line)}" for line in done.stdout.splitlines()[-LOG_LINES:])
        raise Trouble(
            f"prefect.yaml is not deployed: prefect deploy --all ended with {done.returncode}, and with:{end}"
        )
    switches = wanted["switches"] | known.get("switches", {})  # without a record they were deployed by hand
    _keep_switches(settings, before, [name for name in listed if switches[name] == wanted["switches"][name]])
    replace_json(record, wanted)
    record.chmod(0o600)
    print(f"deployed {names}: to be run on Prefect's page, or by prefect deployment run", flush=True)


def _deployed(settings: Settings) -> dict[str, Any]:
    """The deployments of Prefect's server by name."""
    status, found = ask(f"{settings.url('prefect')}/api/deployments/filter", settings.auth_string, {})
    if status != 200:
        raise Trouble(f"Prefect's server does not tell its deployments: it answered {status or 'nothing'}")
    return {made["name"]: made for made in found}


def _keep_switches(settings: Settings, before: dict[str, Any], unchanged: Collection[str]) -> None:
    """Schedules and pauses are as people left them: a deployment sets those of prefect.yaml, changed there or not."""
    after = _deployed(settings)
    for name in set(unchanged) & set(before):
        kept = ("schedule", "active", "parameters", "slug")
        was, now = (
            [{key: each[key] for key in kept} for each in found[name]["schedules"]] for found in (before, after)
        )
        url, codes = f"{settings.url('prefect')}/api/deployments/{after[name]['id']}", set()
        if was != now:
            new = [f"{url}/schedules/{each['id']}" for each in after[name]["schedules"]]
            codes |= {ask(each, settings.auth_string, method="DELETE")[0] for each in new}
            codes |= {ask(f"{url}/schedules", settings.auth_string, was)[0]} if was else set()
        if before[name]["paused"] != after[name]["paused"]:
            codes |= {ask(url, settings.auth_string, {"paused": before[name]["paused"]}, "PATCH")[0]}
        if not codes <= {201, 204}:
            raise Trouble(f"the schedules of deployment {name} may not be as they were: see Prefect's page")


def check_login(settings: Settings) -> None:
    """Whether the password is the one that MLflow knows: it takes it from the environment on its first start only."""
    login = f"{settings.admin}:{settings.admin_password}"
    status, _ = ask(f"{settings.url('mlflow')}/api/2.0/mlflow/experiments/search?max_results=1", login)
    if status != 200:
        raise Trouble(
            f"MLflow answers {status or 'nothing'} to user {settings.admin} with MLFLOW_AUTH_ADMIN_PASSWORD: expected "
            "the password of its first start, or the one that it was changed to since; set that one"
        )


def worker_is_online(settings: Settings, member: str, since: float) -> bool:
    url = f"{settings.url('prefect')}/api/work_pools/{POOLS[member]}/workers/filter"
    status, found = ask(url, settings.auth_string, {})
    beats = [worker["last_heartbeat_time"] for worker in found or [] if worker["name"] == platform.node()]
    return status == 200 and any(datetime.fromisoformat(beat).timestamp() >= since for beat in beats if beat)


def end_lost_runs(settings: Settings, member: str) -> int:
    """Tell Prefect which runs of this machine's worker of a pool have no process any more; returns how many.

    It would keep them as running for ever, each with a slot of the pool: with one GPU nothing would ever start again.
    """
    url, login = f"{settings.url('prefect')}/api/flow_runs", settings.auth_string
    states = {"state": {"type": {"any_": ["RUNNING", "PENDING", "CANCELLING"]}}}
    _, found = ask(f"{url}/filter", login, {"work_pools": {"name": {"any_": [POOLS[member]]}}, "flow_runs": states})
    alive = {str(pid) for pid in processes_of(settings.root, member)}
    count = 0
    for run in found or []:
        pid = run["infrastructure_pid"]
        if run["labels"].get("prefect.worker.name") == platform.node() and pid not in alive:
            cancelled = run["state"]["type"] == "CANCELLING"
            state = {
                "type": "CANCELLED" if cancelled else "CRASHED",
                "message": f"process {pid} of the run is gone; run it again, trainings go on from their last checkpoint",
            }
            count += ask(f"{url}/{run['id']}/set_state", login, {"state": state, "force": True})[0] in (200, 201)
    return count

"""The servers behind the pipeline on one machine: Prefect's with what prefect.yaml deploys, MLflow's, and two workers.

    python -m flows.stack up | down | status        (make stack, make stack-down, make stack-status)

They outlive the shell that starts them. Each has a session of its own, and a mark in its environment that everything
below it inherits, so that stopping finds every process, also those whose parent was killed or that left the session.
Passwords come from the environment and stay there: no file and no command line has them.
"""

import argparse
import contextlib
import fcntl
import hashlib
import ipaddress
import json
import os
import platform
import secrets
import shlex
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from base64 import b64encode
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field, replace
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import SplitResult, parse_qs, quote, unquote, urlsplit

import yaml

from flows.devices import devices
from tessera.tracking.journal import is_alive, process_start, redact, replace_json

# Sweeps only wait for their cells: in the pool of the cells, they would take the slots that those wait for
POOLS = {"worker": "gpu", "control": "control"}
MEMBERS = {
    "prefect": "Prefect's server",
    "mlflow": "MLflow's server",
    **{member: f"the worker of pool {pool}" for member, pool in POOLS.items()},
}
SWEEPS = 10  # at a time: each is a process of 200 MB that waits
MARK = "TESSERA_STACK"
GRACE_SECONDS = 20.0  # a training saves its state within it
KILL_SECONDS = 5.0
POLL_SECONDS = 0.2
ANSWER_SECONDS = 5.0
LOG_BYTES = 10_000_000
LOG_LINES = 15
WEAK = ("password", "changeme", "change-me", "default", "123456", "admin")
SECRETS = ("DATABASE_URL", "PGPASSWORD", "PREFECT_SERVER_API_AUTH_STRING", "MLFLOW_AUTH_ADMIN_PASSWORD")


class Trouble(RuntimeError):
    """The stack could not be brought up or down; the message tells people why."""


@dataclass(frozen=True)
class Settings:
    """What the environment says about the stack; see .env.example."""

    root: Path
    host: str
    ports: dict[str, int]
    home: str  # Prefect's
    artifacts: str  # where MLflow keeps files for its clients; "": they write below mlruns themselves
    seconds: float  # how long a member may take to come up
    database: SplitResult | None = field(repr=False)
    auth_string: str = field(repr=False)  # Prefect's USER:PASSWORD, or ""
    admin: str
    admin_password: str = field(repr=False)  # MLflow's, or ""

    def url(self, member: str) -> str:
        return f"http://{self.host}:{self.ports[member]}"

    def public(self) -> dict[str, Any]:
        """What must stay the same while a member runs, without secrets."""
        database = redact(self.database.geturl()) if self.database else "SQLite"
        return {
            "host": self.host,
            "ports": self.ports,
            "database": database,
            "artifacts": self.artifacts,
            "authentication": bool(self.auth_string),
        }


def read_settings(root: Path, environ: Mapping[str, str]) -> Settings:
    host = environ.get("TESSERA_HOST") or "127.0.0.1"
    ports = {
        "prefect": _port(environ, "TESSERA_PREFECT_PORT", 4200),
        "mlflow": _port(environ, "TESSERA_MLFLOW_PORT", 5000),
    }
    if ports["prefect"] == ports["mlflow"]:
        raise ValueError(f"both servers have port {ports['mlflow']}: set TESSERA_PREFECT_PORT or TESSERA_MLFLOW_PORT")
    if ":" in host or "/" in host or host == "0.0.0.0":
        raise ValueError(
            f"TESSERA_HOST is {host!r}: expected one IPv4 address of this machine, or its name, by which others reach it"
        )
    seconds = environ.get("TESSERA_STACK_SECONDS") or "120"
    if not seconds.isdecimal() or int(seconds) == 0:
        raise ValueError(f"TESSERA_STACK_SECONDS is {seconds!r}: expected whole seconds, e.g. 120; correct it")
    auth_string = environ.get("PREFECT_SERVER_API_AUTH_STRING", "")
    admin_password = environ.get("MLFLOW_AUTH_ADMIN_PASSWORD", "")
    if not _is_loopback(host) and not (auth_string and admin_password):
        raise ValueError(
            f"TESSERA_HOST is {host!r}, which other machines can reach: expected PREFECT_SERVER_API_AUTH_STRING "
            "(USER:PASSWORD) and MLFLOW_AUTH_ADMIN_PASSWORD to be set; set both, or leave TESSERA_HOST out"
        )
    if bool(auth_string) != bool(admin_password):
        raise ValueError(
            "of PREFECT_SERVER_API_AUTH_STRING and MLFLOW_AUTH_ADMIN_PASSWORD one is set and one is not: "
            "expected both or neither, so that no server is open by mistake"
        )
    if auth_string:
        user, _, password = auth_string.partition(":")
        if not user:
            raise ValueError("PREFECT_SERVER_API_AUTH_STRING has no user: expected USER:PASSWORD")
        _refuse_weak("PREFECT_SERVER_API_AUTH_STRING", password)
        _refuse_weak("MLFLOW_AUTH_ADMIN_PASSWORD", admin_password)
    return Settings(
        root=root,
        host=host,
        ports=ports,
        home=environ.get("PREFECT_HOME") or str(root / ".prefect"),
        artifacts=environ.get("TESSERA_ARTIFACTS") or ("" if _is_loopback(host) else str(root / "mlruns")),
        seconds=float(seconds),
        database=_database(environ.get("DATABASE_URL", "")),
        auth_string=auth_string,
        admin=environ.get("MLFLOW_AUTH_ADMIN_USERNAME") or "admin",
        admin_password=admin_password,
    )


def _port(environ: Mapping[str, str], name: str, default: int) -> int:
    text = environ.get(name) or str(default)
    if not text.isdecimal() or not 0 < int(text) < 65536:
        raise ValueError(f"{name} is {text!r}: expected the number of a port, e.g. {default}; correct it")
    return int(text)


def _is_loopback(host: str) -> bool:
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False  # a name: nobody knows what it will resolve to


def _refuse_weak(name: str, password: str) -> None:
    if len(password) < 12 or len(set(password)) < 6 or any(word in password.lower() for word in WEAK):
        raise ValueError(
            f"the password in {name} can be guessed: expected at least 12 characters and none of {', '.join(WEAK)}; "
            'make one with: python -c "import secrets; print(secrets.token_urlsafe())"'
        )


def _database(url: str) -> SplitResult | None:
    if not url:
        return None
    expected = "expected postgresql://USER:PASSWORD@HOST:PORT/NAME, special characters of the password as %XX"
    try:
        parts = urlsplit(url)
        complete = parts.hostname and parts.username and len(parts.path) > 1 and parts.port != 0
    except ValueError:
        complete = False
    if not complete or parts.scheme not in ("postgresql", "postgres") or set(parse_qs(parts.query)) - {"sslmode"}:
        raise ValueError(f"DATABASE_URL cannot be used: {expected}, and at most ?sslmode=... behind it")
    return parts


# What is started ------------------------------------------------------------------------------------------------------


def command(settings: Settings, member: str) -> list[str]:
    if member in POOLS:
        line = [sys.executable, "-m", "prefect", "worker", "start", "--pool", POOLS[member], "--type", "process"]
        return line + ["--name", platform.node(), "--limit", str(slots(member))]
    address = ["--host", settings.host, "--port", str(settings.ports[member])]
    if member == "prefect":
        return [sys.executable, "-m", "prefect", "server", "start", *address]
    line = [sys.executable, "-m", "mlflow", "server", *address]
    line += ["--workers", "1" if _is_loopback(settings.host) else "4", "--uvicorn-opts", "--no-access-log"]
    if settings.artifacts:
        line += ["--artifacts-destination", settings.artifacts]
    else:  # the same files with and without the server
        line += ["--default-artifact-root", str(settings.root / "mlruns")]
    return line + (["--app-name", "basic-auth"] if settings.admin_password else [])


def slots(member: str) -> int:
    """How many runs a worker takes at a time."""
    return max(1, len(devices())) if member == "worker" else SWEEPS


def environment(settings: Settings, member: str, environ: Mapping[str, str]) -> dict[str, str]:
    """The environment of a member: each has the secrets that it needs, and no setting that would send it elsewhere."""
    dropped = ("PREFECT_API_", "PREFECT_PROFILE", "PREFECT_SERVER_DATABASE_", "MLFLOW_TRACKING_", "MLFLOW_RUN_ID")
    kept = {key: value for key, value in environ.items() if not key.startswith(dropped) and key not in SECRETS}
    kept |= {
        MARK: f"{member}:{settings.root}",
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), environ.get("PATH", os.defpath)]),
        "PYTHONUNBUFFERED": "1",
        "PREFECT_HOME": settings.home,
        "PREFECT_API_URL": f"{settings.url('prefect')}/api",
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "DO_NOT_TRACK": "1",
    }
    if member == "prefect":
        origins = {settings.url("prefect"), f"http://localhost:{settings.ports['prefect']}"}
        kept.setdefault("PREFECT_SERVER_CORS_ALLOWED_ORIGINS", ",".join(sorted(origins)))  # any page could else call it
        kept.setdefault(
            "PREFECT_SERVER_UI_V2_ENABLED", "false"
        )  # that page has the browser ask Amplitude at each visit
        kept.setdefault("PREFECT_SERVER_UI_SHOW_PROMOTIONAL_CONTENT", "false")
        kept |= {"PREFECT_SERVER_API_AUTH_STRING": settings.auth_string} if settings.auth_string else {}
        kept |= _access(settings, "PREFECT_SERVER_DATABASE_CONNECTION_URL", "asyncpg")
    elif member == "mlflow":
        kept |= {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}  # nothing here uses jobs
        if not _is_loopback(settings.host):  # of others it takes only private addresses, and only reading
            local = f"localhost:{settings.ports['mlflow']},127.0.0.1:{settings.ports['mlflow']}"
            kept.setdefault("MLFLOW_SERVER_ALLOWED_HOSTS", f"{settings.host}:{settings.ports['mlflow']},{local}")
            kept.setdefault("MLFLOW_SERVER_CORS_ALLOWED_ORIGINS", settings.url("mlflow"))
        kept |= _access(settings, "MLFLOW_BACKEND_STORE_URI", "psycopg2")
        if settings.admin_password:
            kept |= {
                "MLFLOW_AUTH_CONFIG_PATH": str(folder_of(settings.root) / "basic_auth.ini"),
                "MLFLOW_AUTH_ADMIN_USERNAME": settings.admin,
                "MLFLOW_AUTH_ADMIN_PASSWORD": settings.admin_password,
                "MLFLOW_FLASK_SERVER_SECRET_KEY": secrets.token_hex(32),
            }
    else:
        kept |= {"MLFLOW_TRACKING_URI": settings.url("mlflow")}
        kept |= {f"PREFECT_{part}_HOST": "127.0.0.1" for part in ("WORKER_WEBSERVER", "RUNNER_SERVER")}
        if settings.auth_string:
            kept |= {
                "PREFECT_API_AUTH_STRING": settings.auth_string,
                "MLFLOW_TRACKING_USERNAME": settings.admin,
                "MLFLOW_TRACKING_PASSWORD": settings.admin_password,
            }
    return kept


def _access(settings: Settings, name: str, driver: str) -> dict[str, str]:
    """Where a server's database is. The drivers take the password from PGPASSWORD, so that no address has it."""
    if settings.database is None:
        return {} if driver == "asyncpg" else {name: f"sqlite:///{settings.root / 'mlflow.db'}"}
    password = {"PGPASSWORD": unquote(settings.database.password)} if settings.database.password else {}
    return {name: _uri(settings, driver), **password}


def _uri(settings: Settings, driver: str) -> str:
    assert settings.database is not None
    database = settings.database
    mode = parse_qs(database.query).get("sslmode", [])
    query = f"?{'ssl' if driver == 'asyncpg' else 'sslmode'}={mode[0]}" if mode else ""
    place = f"{database.hostname}:{database.port or 5432}"
    user = quote(unquote(database.username or ""), safe="")
    return f"postgresql+{driver}://{user}@{place}/{database_names(database)[driver]}{query}"


def database_names(database: SplitResult) -> dict[str, str]:
    """Two databases beside the one that DATABASE_URL names: both servers have a table alembic_version."""
    name = unquote(database.path[1:])
    return {"asyncpg": f"{name}_prefect", "psycopg2": f"{name}_mlflow"}


def make_databases(settings: Settings) -> None:
    """Create the two databases where they are missing, and learn early if the database refuses."""
    import psycopg2
    from psycopg2 import sql

    database = settings.database
    assert database is not None
    names = list(database_names(database).values())
    shown = redact(database.geturl())
    options = {key: values[0] for key, values in parse_qs(database.query).items()}
    try:
        connection = psycopg2.connect(
            host=database.hostname,
            port=database.port or 5432,
            user=unquote(database.username or ""),
            password=unquote(database.password or ""),
            dbname=unquote(database.path[1:]),
            connect_timeout=int(ANSWER_SECONDS),
            **options,
        )
        connection.autocommit = True  # a database is not created in a transaction
        with contextlib.closing(connection), connection.cursor() as cursor:
            for name in names:
                cursor.execute("SELECT 1 FROM pg_database WHERE datname = %s", (name,))
                if cursor.fetchone() is None:
                    cursor.execute(sql.SQL("CREATE DATABASE {}").format(sql.Identifier(name)))
    except psycopg2.errors.InsufficientPrivilege:
        raise Trouble(
            f"the user of DATABASE_URL ({shown}) may not create databases: expected {' and '.join(names)} to be there "
            "and to be theirs; have them created by an administrator"
        ) from None
    except psycopg2.Error as error:
        reason = " ".join(str(error).split())
        raise Trouble(
            f"the database of DATABASE_URL ({shown}) refuses: {redact(reason)}; start or correct it"
        ) from None


# Processes ------------------------------------------------------------------------------------------------------------


def folder_of(root: Path) -> Path:
    return root / ".stack"


def read_record(root: Path, member: str) -> dict[str, Any] | None:
    """What is known of a member since it was started, alive or not."""
    try:
        record = json.loads((folder_of(root) / f"{member}.json").read_text(encoding="utf-8"))
        return record if {"pid", "started", "settings"} <= set(record) else None
    except (FileNotFoundError, ValueError, TypeError):
        return None


def runs(root: Path, member: str) -> bool:
    record = read_record(root, member)
    return record is not None and is_alive(record["pid"], record["started"])


def processes_of(root: Path, member: str) -> list[int]:
    """Every process of a member: those with its mark, and those of its session as long as its leader lives."""
    record = read_record(root, member)
    session = record["pid"] if record and is_alive(record["pid"], record["started"]) else None
    mark = f"{MARK}={member}:{root}".encode()
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            is_marked = mark in (entry / "environ").read_bytes().split(b"\0")
            fields = (entry / "stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
        except OSError:
            continue  # it ended meanwhile, or belongs to somebody else
        pid = int(entry.name)
        if (is_marked or int(fields[3]) == session) and fields[0] not in "ZX" and pid != os.getpid():
            found.append(pid)
    return found


def start(settings: Settings, member: str) -> tuple[subprocess.Popen[bytes], int]:
    """Start a member. Returns it, and where in its log it begins to write."""
    folder = folder_of(settings.root)
    log = folder / f"{member}.log"
    if log.exists() and log.stat().st_size > LOG_BYTES:
        log.replace(log.with_suffix(".log.1"))
    with open(log, "ab", opener=_private) as output:  # noqa: PTH123  Path.open takes no opener
        offset = output.seek(0, os.SEEK_END)
        process = subprocess.Popen(
            command(settings, member),
            cwd=settings.root,
            env=environment(settings, member, os.environ),
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            umask=-1 if member in POOLS else 0o077,  # the servers' databases are private, data are as the user likes
        )
    record = {"pid": process.pid, "started": process_start(process.pid), "settings": settings.public()}
    replace_json(folder / f"{member}.json", record)
    (folder / f"{member}.json").chmod(0o600)
    return process, offset


def _private(path: str, flags: int) -> int:
    return os.open(path, flags, 0o600)


def stop(root: Path, member: str, spared: Collection[int] = ()) -> int:
    """SIGTERM to every process of a member, SIGKILL after the grace period. Returns how many there were."""
    told: set[int] = set()
    began = time.monotonic()
    while left := [pid for pid in processes_of(root, member) if pid not in spared]:
        spent = time.monotonic() - began
        if spent > GRACE_SECONDS + KILL_SECONDS:
            raise Trouble(f"{MEMBERS[member]} does not end, not even by SIGKILL: process {left[0]} may wait for a disk")
        for pid in left:
            if spent > GRACE_SECONDS or pid not in told:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL if spent > GRACE_SECONDS else signal.SIGTERM)
                told.add(pid)
        time.sleep(POLL_SECONDS)
    (folder_of(root) / f"{member}.json").unlink(missing_ok=True)
    return len(told)


def memory_mb(pids: list[int]) -> int:
    pages = 0
    for pid in pids:
        with contextlib.suppress(OSError):
            pages += int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") // 1_000_000


# Answers --------------------------------------------------------------------------------------------------------------


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


# The three commands ---------------------------------------------------------------------------------------------------


def up(settings: Settings) -> None:
    """Start what does not run. If that fails, everything that this call started is stopped again."""
    root = settings.root
    for member in MEMBERS:
        if runs(root, member):
            _refuse_other_settings(settings, member)
    missing = [member for member in MEMBERS if not runs(root, member)]
    for member in MEMBERS:
        if member not in missing:
            print(f"{member:<8} runs already", flush=True)
    if not missing:
        deploy(settings)
        show(settings)
        return
    for member in missing:
        if member not in POOLS:  # the runs of a killed worker are work: they go on, and the servers know them
            stop(root, member)
            _refuse_used_port(settings, member)
    if settings.database is not None:
        make_databases(settings)
    started: dict[str, tuple[subprocess.Popen[bytes], int]] = {}
    work = {member: processes_of(root, member) for member in POOLS}  # of a worker that was killed, if it is missing
    try:
        _write_files(settings)
        for member in missing:
            if member not in POOLS:
                started[member] = start(settings, member)
        if "prefect" in started:
            _wait(settings, "prefect", *started["prefect"], lambda: answers(settings, "prefect"))
        make_pools(settings)
        since = time.time()
        workers = [member for member in missing if member in POOLS]
        for member in workers:
            _say_lost(end_lost_runs(settings, member))
            started[member] = start(settings, member)
        deploy(settings)
        if "mlflow" in started:
            _wait(settings, "mlflow", *started["mlflow"], lambda: answers(settings, "mlflow"))
        if settings.admin_password:
            check_login(settings)
        for member in workers:
            _wait(settings, member, *started[member], partial(worker_is_online, settings, member, since))
    except BaseException:
        for member in reversed(missing):
            stop(root, member, work.get(member, ()))
        raise
    show(settings)


def _refuse_other_settings(settings: Settings, member: str) -> None:
    record = read_record(settings.root, member)
    assert record is not None
    other = [key for key, value in settings.public().items() if record["settings"].get(key) != value]
    if other:
        raise Trouble(
            f"{MEMBERS[member]} runs with another {' and '.join(other)} than the environment says now "
            f"({record['settings'].get(other[0])}, not {settings.public()[other[0]]}): stop it first, with make stack-down"
        )


def _refuse_used_port(settings: Settings, member: str) -> None:
    port = settings.ports[member]
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((settings.host, port))
        except OSError as error:
            raise Trouble(
                f"{MEMBERS[member]} cannot listen on {settings.host}:{port} ({error.strerror}): expected a free port; "
                f"stop what uses it, or set TESSERA_{member.upper()}_PORT to another"
            ) from None


def _wait(
    settings: Settings, member: str, process: subprocess.Popen[bytes], offset: int, condition: Callable[[], bool]
) -> None:
    deadline = time.monotonic() + settings.seconds
    while True:
        if process.poll() is not None:
            reason = f"{MEMBERS[member]} ended with exit code {process.returncode} before it was up"
        elif condition():
            return
        elif time.monotonic() > deadline:
            reason = f"{MEMBERS[member]} is not up after {settings.seconds:.0f} s (TESSERA_STACK_SECONDS)"
        else:
            time.sleep(POLL_SECONDS)
            continue
        log = folder_of(settings.root) / f"{member}.log"
        with log.open("rb") as file:
            file.seek(offset)
            lines = file.read().decode(errors="replace").splitlines()[-LOG_LINES:]
        end = "".join(f"\n  {redact(line)}" for line in lines)
        raise Trouble(f"{reason}; {log.relative_to(settings.root)} ends with:{end or ' nothing'}")


def _write_files(settings: Settings) -> None:
    """What people and servers read beside the environment: addresses, and names of variables instead of secrets."""
    folder = folder_of(settings.root)
    exports = {
        "PREFECT_API_URL": f"{settings.url('prefect')}/api",
        "PREFECT_HOME": settings.home,
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
        "MLFLOW_TRACKING_URI": settings.url("mlflow"),
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "DO_NOT_TRACK": "1",
    }
    lines = [f"export {name}={shlex.quote(value)}" for name, value in exports.items()]
    if settings.auth_string:
        lines += [
            'export PREFECT_API_AUTH_STRING="${PREFECT_SERVER_API_AUTH_STRING:?set it as it was for make stack}"',
            f"export MLFLOW_TRACKING_USERNAME={shlex.quote(settings.admin)}",
            'export MLFLOW_TRACKING_PASSWORD="${MLFLOW_AUTH_ADMIN_PASSWORD:?set it as it was for make stack}"',
        ]
        place = f"sqlite:///{settings.root / 'mlflow.db'}" if settings.database is None else _uri(settings, "psycopg2")
        users = {"default_permission": "READ", "database_uri": place, "admin_username": settings.admin}
        text = "".join(f"{key} = {value.replace('%', '%%')}\n" for key, value in users.items())
        _write(folder / "basic_auth.ini", f"[mlflow]\n{text}")
    _write(folder / "env", "# Points a shell at the stack of this checkout:  . .stack/env\n" + "\n".join(lines) + "\n")


def _write(path: Path, text: str) -> None:
    with open(path, "w", encoding="utf-8", opener=_private) as file:  # noqa: PTH123
        file.write(text)


def show(settings: Settings) -> None:
    print(
        f"Prefect  {settings.url('prefect')}  (API: {settings.url('prefect')}/api)\n"
        f"MLflow   {settings.url('mlflow')}\n"
        f"workers  take runs from the work pools {' and '.join(POOLS.values())}\n"
        "Point a shell at them with:  . .stack/env\n"
        "Stop them with:  make stack-down",
        flush=True,
    )


def down(root: Path, environ: Mapping[str, str]) -> None:
    """Stop the worker with its runs, then the servers, which are told of the end of these runs."""
    for member in reversed(MEMBERS):
        count = stop(root, member)
        print(f"{member:<8} {'stopped' if count else 'did not run'}", flush=True)
        if member in POOLS and runs(root, "prefect"):
            with contextlib.suppress(ValueError):  # without the right password the next start tells it
                _say_lost(end_lost_runs(_as_recorded(read_settings(root, environ), "prefect"), member))
    (folder_of(root) / "env").unlink(missing_ok=True)
    (folder_of(root) / "basic_auth.ini").unlink(missing_ok=True)


def _say_lost(count: int) -> None:
    if count:
        print(f"{count} runs ended without a word, and are marked as crashed; run them again", flush=True)


def _as_recorded(settings: Settings, member: str) -> Settings:
    """The settings with the address at which a member was started, whatever the environment says by now."""
    record = read_record(settings.root, member)
    assert record is not None
    return replace(settings, host=record["settings"]["host"], ports=record["settings"]["ports"])


def status(settings: Settings) -> bool:
    """Print a line per member. Whether all of them run and answer."""
    good = True
    for member in MEMBERS:
        record = read_record(settings.root, member)
        pids = processes_of(settings.root, member)
        if record is None:
            good, text = False, "does not run"
        elif not is_alive(record["pid"], record["started"]):
            left = f", and left {len(pids)} processes behind" if pids else ""
            text = f"died: process {record['pid']} is gone{left}; see .stack/{member}.log, start it with make stack"
            good = False
        else:
            text = f"runs, process {record['pid']}, {memory_mb(pids)} MB in {len(pids)} processes"
            if member not in POOLS:
                at = _as_recorded(settings, member)
                text += f", {at.url(member)}"
                if not answers(at, member):
                    good, text = False, f"{text}, but does not answer; restart it with make stack-down, make stack"
        print(f"{member:<8} {text}", flush=True)
    return good


@contextlib.contextmanager
def _alone(root: Path) -> Iterator[None]:
    """One command at a time in a checkout."""
    folder = folder_of(root)
    folder.mkdir(mode=0o700, exist_ok=True)
    folder.chmod(0o700)
    with open(folder / "lock", "a", opener=_private) as file:  # noqa: PTH123
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _end(number: int, frame: Any) -> None:
    raise SystemExit(128 + number)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m flows.stack", description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=["up", "down", "status"])
    what = parser.parse_args().what
    # Of a shell's background job the members would inherit that SIGINT is ignored, and Prefect ends itself by one
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, _end)
    root = Path.cwd().resolve()
    try:
        if what == "down":
            with _alone(root):
                down(root, os.environ)
            return 0
        settings = read_settings(root, os.environ)
        if what == "status":
            return 0 if status(settings) else 1
        with _alone(root):
            up(settings)
    except (Trouble, ValueError) as error:
        print(f"the stack is not {'down' if what == 'down' else 'up'}: {error}", file=sys.stderr)
        return 2
    except OSError as error:  # a full disk, a folder that belongs to somebody else
        print(f"the stack is not up: {error.filename or root}: {error.strerror}; correct that first", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""The servers behind the pipeline on one machine: Prefect's with what prefect.yaml deploys, MLflow's, and two workers.

    python -m flows.stack up | down | status        (make stack, make stack-down, make stack-status)

They outlive the shell that starts them. What they are: stack_members.py; their processes: stack_processes.py; what is asked of
the servers: stack_servers.py.
"""

import argparse
import contextlib
import fcntl
import os
import shlex
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from flows.stack.members import (
    MEMBERS,
    POOLS,
    Settings,
    Trouble,
    database_uri,
    folder_of,
    make_databases,
    read_settings,
)
from flows.stack.processes import POLL_SECONDS, memory_mb, private, processes_of, read_record, runs, start, stop
from flows.stack.servers import (
    LOG_LINES,
    answers,
    check_login,
    deploy,
    end_lost_runs,
    make_pools,
    worker_is_online,
)
from tessera.tracking.journal import redact
from tessera.tracking.processes import is_alive


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
        place = (
            f"sqlite:///{settings.root / 'mlflow.db'}"
            if settings.database is None
            else database_uri(settings, "psycopg2")
        )
        users = {"default_permission": "READ", "database_uri": place, "admin_username": settings.admin}
        text = "".join(f"{key} = {value.replace('%', '%%')}\n" for key, value in users.items())
        _write(folder / "basic_auth.ini", f"[mlflow]\n{text}")
    _write(folder / "env", "# Points a shell at the stack of this checkout:  . .stack/env\n" + "\n".join(lines) + "\n")


def _write(path: Path, text: str) -> None:
    with open(path, "w", encoding="utf-8", opener=private) as file:  # noqa: PTH123
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
    with open(folder / "lock", "a", opener=private) as file:  # noqa: PTH123
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

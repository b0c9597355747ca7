"""The stack on real servers: what it starts, who can reach it, what it writes, what survives a kill, what a stop leaves."""

import base64
import contextlib
import importlib.metadata
import json
import os
import re
import signal
import socket
import sqlite3
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import yaml
from foreign_host import check_names
from ports import free_ports
from postgres import postgres_server
from waiting import wait_for

from flows.stack import members, servers
from tessera.tracking.processes import process_start

pytestmark = pytest.mark.e2e(seconds=140)
REPOSITORY = Path(__file__).parents[2]
MEMBERS = ("prefect", "mlflow", "worker", "control")
MAKE_VARIABLES = ("MAKEFLAGS", "MAKELEVEL", "MFLAGS")  # a make in a make names the folders that it enters

# A run whose work is in another session, as the stages of the pipeline are
SLEEPER = """
import subprocess, sys
from pathlib import Path
from prefect import flow
@flow
def sleeper():
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], start_new_session=True)
    Path(FOLDER, "child.new").write_text(str(child.pid))
    Path(FOLDER, "child.new").rename(Path(FOLDER, "child.pid"))
    child.wait()
"""


class Checkout:
    """A folder in which a stack may run, on free ports."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.ports = dict(zip(("prefect", "mlflow"), free_ports(2), strict=True))
        foreign = ("PREFECT_", "TESSERA_", "MLFLOW_", "PG", "DATABASE_URL")
        self.environment = {key: value for key, value in os.environ.items() if not key.startswith(foreign)} | {
            "PYTHONPATH": str(REPOSITORY),
            "HOME": str(folder / "home"),
            "CUDA_VISIBLE_DEVICES": "",
            "TESSERA_PREFECT_PORT": str(self.ports["prefect"]),
            "TESSERA_MLFLOW_PORT": str(self.ports["mlflow"]),
            "PREFECT_WORKER_QUERY_SECONDS": "1",
        }

    def __call__(self, what: str, **environment: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "flows.stack", what],
            cwd=self.folder,
            env=self.environment | environment,
            capture_output=True,
            text=True,
            timeout=150,
        )

    def pid(self, member: str) -> int:
        return json.loads((self.folder / ".stack" / f"{member}.json").read_text())["pid"]

    def processes(self, member: str = "") -> list[psutil.Process]:
        """Those with the mark of this checkout, whoever their parents are."""
        found = []
        for process in psutil.process_iter():
            try:
                mark = process.environ().get("TESSERA_STACK", "")
                if mark.startswith(member) and mark.endswith(f":{self.folder}"):
                    found.append(process)
            except (psutil.NoSuchProcess, psutil.AccessDenied):
                continue
        return found

    def url(self, member: str, path: str) -> str:
        return f"http://127.0.0.1:{self.ports[member]}{path}"


@pytest.fixture
def checkout(tmp_path: Path) -> Iterator[Checkout]:
    (tmp_path / "home").mkdir()
    made = Checkout(tmp_path)
    yield made
    for process in made.processes():
        process.kill()


@pytest.fixture(scope="module")
def postgres() -> Iterator[tuple[Path, int]]:
    """A database server of Debian's, whose superuser is tessera; its folder and port."""
    with postgres_server(PASSWORD) as server:
        yield server


PASSWORD = "pg-canary/@ %x1"  # what an address, an ini file and a configuration could stumble over
PREFECT_LOGIN = "someone:prefect-canary-2"
MLFLOW_PASSWORD = "mlflow-canary-3"
SECURE = {
    "PREFECT_SERVER_API_AUTH_STRING": PREFECT_LOGIN,
    "MLFLOW_AUTH_ADMIN_USERNAME": "some-admin",
    "MLFLOW_AUTH_ADMIN_PASSWORD": MLFLOW_PASSWORD,
}


def has_ended(process: int) -> bool:
    """Also if nobody has asked how: a container may have no init that does."""
    try:
        return psutil.Process(process).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def code_of(url: str, login: str = "", body: bytes | None = None) -> int:
    request = urllib.request.Request(url, body, {"Content-Type": "application/json"})
    if login:
        request.add_header("Authorization", "Basic " + base64.b64encode(login.encode()).decode())
    try:
        return urllib.request.urlopen(request, timeout=10).status
    except urllib.error.HTTPError as error:
        return error.code


def check_listeners(checkout: Checkout) -> None:
    """Each server listens on its port and on no other, workers on what they need for themselves, all of it on 127.0.0.1."""
    found = [
        (process.environ()["TESSERA_STACK"].partition(":")[0], connection.laddr.ip, connection.laddr.port)
        for process in checkout.processes()
        for connection in process.net_connections(kind="inet")
        if connection.status == psutil.CONN_LISTEN
    ]
    assert {address for _, address, _ in found} == {"127.0.0.1"}
    assert {(member, port) for member, _, port in found if member in checkout.ports} == set(checkout.ports.items())


def check_private(checkout: Checkout) -> None:
    files = [path for name in (".stack", ".prefect") for path in (checkout.folder / name).rglob("*")]
    files += checkout.folder.glob("mlflow.db*")
    assert {"env", "worker.json", "prefect.log"} <= {path.name for path in files}
    assert [path for path in files if path.is_file() and path.stat().st_mode & 0o077] == []


# Without servers ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"TESSERA_HOST": "10.0.0.1"}, "which other machines can reach: expected PREFECT_SERVER_API_AUTH_STRING"),
        ({"TESSERA_HOST": "some-host"}, "which other machines can reach"),
        ({"TESSERA_HOST": "0.0.0.0", **SECURE}, "expected one IPv4 address"),
        ({"TESSERA_HOST": "10.0.0.1", **SECURE, "MLFLOW_AUTH_ADMIN_PASSWORD": ""}, "which other machines can reach"),
        ({"MLFLOW_AUTH_ADMIN_PASSWORD": MLFLOW_PASSWORD}, "one is set and one is not"),
        ({**SECURE, "MLFLOW_AUTH_ADMIN_PASSWORD": "password1234"}, "MLFLOW_AUTH_ADMIN_PASSWORD can be guessed"),
        ({**SECURE, "PREFECT_SERVER_API_AUTH_STRING": "admin:pass"}, "AUTH_STRING can be guessed"),
        ({**SECURE, "PREFECT_SERVER_API_AUTH_STRING": "someone"}, "AUTH_STRING can be guessed"),
        ({**SECURE, "PREFECT_SERVER_API_AUTH_STRING": ":prefect-canary-2"}, "has no user"),
        ({"TESSERA_MLFLOW_PORT": "70000"}, "TESSERA_MLFLOW_PORT is '70000'"),
        ({"TESSERA_MLFLOW_PORT": "4200"}, "both servers have port 4200"),
        ({"TESSERA_STACK_SECONDS": "soon"}, "TESSERA_STACK_SECONDS is 'soon'"),
        ({"DATABASE_URL": "mysql://me:canary@host/name"}, "expected postgresql://USER:PASSWORD@HOST:PORT/NAME"),
        ({"DATABASE_URL": "postgresql://me:canary@host"}, "expected postgresql://"),
        ({"DATABASE_URL": "postgresql://me:canary@host:port/name"}, "expected postgresql://"),
    ],
)
def test_settings_that_cannot_work_or_open_a_door_are_refused_without_telling_secrets(
    environment: dict[str, str], message: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=re.escape(message)) as refused:
        members.read_settings(tmp_path, environment)
    assert "canary" not in str(refused.value)


def test_other_machines_may_reach_servers_that_ask_for_passwords(tmp_path: Path) -> None:
    settings = members.read_settings(tmp_path, {"TESSERA_HOST": "10.0.0.1", **SECURE})
    assert "canary" not in repr(settings)
    assert "--app-name basic-auth" in " ".join(members.command(settings, "mlflow"))
    environments = {
        member: members.environment(settings, member, {**SECURE, "DATABASE_URL": "x"}) for member in MEMBERS
    }
    assert environments["prefect"]["PREFECT_SERVER_API_AUTH_STRING"] == PREFECT_LOGIN
    for member, secrets in {"prefect": [PREFECT_LOGIN], "mlflow": [MLFLOW_PASSWORD]}.items():  # each its own only
        assert [value for value in environments[member].values() if "canary" in value] == secrets
    assert not {"DATABASE_URL", "PGPASSWORD"} & set(environments["worker"])


def test_the_drivers_get_the_same_database_server_and_no_password_in_the_address(tmp_path: Path) -> None:
    url = "postgresql://us%40er:p%2Fw@db.example:6543/my-name?sslmode=require"
    settings = members.read_settings(tmp_path, {"DATABASE_URL": url})
    prefect, mlflow = (members.environment(settings, member, {}) for member in ("prefect", "mlflow"))
    address = prefect["PREFECT_SERVER_DATABASE_CONNECTION_URL"]
    assert address == "postgresql+asyncpg://us%40er@db.example:6543/my-name_prefect?ssl=require"
    address = mlflow["MLFLOW_BACKEND_STORE_URI"]
    assert address == "postgresql+psycopg2://us%40er@db.example:6543/my-name_mlflow?sslmode=require"
    assert prefect["PGPASSWORD"] == mlflow["PGPASSWORD"] == "p/w"


def test_a_record_with_the_number_of_another_process_ends_nothing(checkout: Checkout) -> None:
    other = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"], start_new_session=True)
    try:
        (checkout.folder / ".stack").mkdir()
        record = {"pid": other.pid, "started": process_start(other.pid) - 1, "settings": {}}
        (checkout.folder / ".stack" / "prefect.json").write_text(json.dumps(record))
        assert f"prefect  died: process {other.pid} is gone" in checkout("status").stdout
        done = checkout("down")
        assert (done.returncode, done.stdout.splitlines()[-1]) == (0, "prefect  did not run")
        assert other.poll() is None
        assert not (checkout.folder / ".stack" / "prefect.json").exists()
    finally:
        other.kill()
        other.wait()


def test_what_fails_is_told_in_a_sentence_and_leaves_nothing_running(checkout: Checkout) -> None:
    def fails(message: str, **environment: str) -> str:
        done = checkout("up", **environment)
        assert done.returncode == 2, done
        assert message in done.stderr
        assert "Traceback (most recent call last):\n  File" not in done.stderr.partition("ends with")[0]
        assert checkout.processes() == []
        assert [path.name for path in (checkout.folder / ".stack").glob("*.json")] == []
        return done.stderr

    with socket.socket() as taken:
        taken.bind(("127.0.0.1", checkout.ports["mlflow"]))
        taken.listen()
        fails(f"MLflow's server cannot listen on 127.0.0.1:{checkout.ports['mlflow']} (Address already in use)")
    (nobody,) = free_ports(1)
    url = f"postgresql://me:canary@127.0.0.1:{nobody}/name"
    error = fails(f"the database of DATABASE_URL (postgresql://127.0.0.1:{nobody}/name) refuses", DATABASE_URL=url)
    assert "canary" not in error
    fails("Prefect's server is not up after 1 s (TESSERA_STACK_SECONDS); .stack/prefect.log", TESSERA_STACK_SECONDS="1")
    (checkout.folder / ".stack" / "env").unlink()
    (checkout.folder / ".stack" / "env").symlink_to("/dev/full")  # every write says that no space is left
    fails("No space left on device; correct that first")
    (checkout.folder / ".stack" / "env").unlink()
    error = fails("Prefect's server ended with exit code 1", PREFECT_SERVER_LOGGING_LEVEL="NOISE")
    assert "NOISE" in error.partition("ends with:\n")[2]


@pytest.mark.parametrize(("target", "variable"), [("ui", "UI_PORT"), ("serve", "SERVE_PORT")])
def test_a_target_of_make_whose_port_is_taken_says_so_in_a_sentence(target: str, variable: str) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        command = ["make", "--assume-old=.venv/.ready", target, f"{variable}={port}"]  # of what is installed already
        path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        outside_of_make = {name: value for name, value in os.environ.items() if name not in MAKE_VARIABLES}
        done = subprocess.run(
            command, cwd=REPOSITORY, env={**outside_of_make, "PATH": path}, capture_output=True, text=True, timeout=60
        )
    assert (done.returncode, done.stdout) == (2, "")
    sentence, ends = done.stderr.splitlines()
    assert sentence.startswith(f"make {target} cannot listen on 127.0.0.1:{port}: expected a free port (")
    assert sentence.endswith(f"stop what uses it, or choose another: make {target} {variable}={port + 10}")
    assert ends.startswith("make: ***")


def test_further_names_of_the_servers_are_known_to_both_and_to_the_record(tmp_path: Path) -> None:
    settings = members.read_settings(tmp_path, {"TESSERA_ALLOWED_HOSTS": "gpu7"})
    told = members.environment(settings, "mlflow", {"TESSERA_ALLOWED_HOSTS": "gpu7"})
    assert {"gpu7", "gpu7:*", "localhost:*"} <= set(told["MLFLOW_SERVER_ALLOWED_HOSTS"].split(","))
    assert "https://gpu7" in told["MLFLOW_SERVER_CORS_ALLOWED_ORIGINS"].split(",")
    assert (
        members.environment(settings, "prefect", {"TESSERA_ALLOWED_HOSTS": "gpu7"})["TESSERA_ALLOWED_HOSTS"] == "gpu7"
    )
    assert settings.public() != members.read_settings(tmp_path, {}).public()  # so that make stack refuses to go on
    assert (
        members.environment(settings, "mlflow", {"MLFLOW_SERVER_ALLOWED_HOSTS": "x"})["MLFLOW_SERVER_ALLOWED_HOSTS"]
        == "x"
    )


# With servers ---------------------------------------------------------------------------------------------------------


def begin_run(checkout: Checkout) -> int:
    """Have the worker run a flow; the process of its work."""
    (checkout.folder / "sleeper.py").write_text(f"FOLDER = {str(checkout.folder)!r}\n{SLEEPER}")
    api = checkout.url("prefect", "/api")
    _, flow = servers.ask(f"{api}/flows/", body={"name": "sleeper"})
    deployment = {"name": "sleeper", "flow_id": flow["id"], "entrypoint": "sleeper.py:sleeper"}
    _, made = servers.ask(
        f"{api}/deployments/", body={**deployment, "path": str(checkout.folder), "work_pool_name": "gpu"}
    )
    run = f"{api}/deployments/{made['id']}/create_flow_run"
    wait_for("a run is made", lambda: servers.ask(run, body={"state": {"type": "SCHEDULED"}})[0] == 201, 60)
    wait_for("the worker runs a flow", (checkout.folder / "child.pid").exists, 60)
    return int((checkout.folder / "child.pid").read_text())


def test_the_stack_comes_up_mends_what_was_killed_and_goes_down_without_a_trace(checkout: Checkout) -> None:
    began = time.monotonic()
    done = checkout("up")
    assert done.returncode == 0, done.stderr
    seconds = {"up": time.monotonic() - began}
    assert checkout.url("prefect", "/api") in done.stdout
    assert f"no prefect.yaml in {checkout.folder}: nothing is deployed" in done.stdout
    assert (
        servers.ask(checkout.url("prefect", "/ui-settings"))[1]["default_ui"] == "v1"
    )  # v2 asks a server of Amplitude
    check_listeners(checkout)
    check_names(checkout.ports["prefect"], "/api/flows/filter", "{}")
    check_names(checkout.ports["mlflow"], "/api/2.0/mlflow/experiments/search?max_results=1")
    check_private(checkout)
    pools = [servers.ask(checkout.url("prefect", f"/api/work_pools/{name}"))[1] for name in ("gpu", "control")]
    assert [(pool["type"], pool["concurrency_limit"]) for pool in pools] == [("process", 1), ("process", 10)]
    assert code_of(checkout.url("mlflow", "/api/2.0/mlflow/experiments/search?max_results=1")) == 200
    sessions = {member: os.getsid(checkout.pid(member)) for member in MEMBERS}
    assert sessions == {member: checkout.pid(member) for member in MEMBERS}  # no terminal can end them

    pids = {member: checkout.pid(member) for member in MEMBERS}
    done = checkout("up")
    assert (done.returncode, done.stdout.count("runs already")) == (0, 4)
    assert pids == {member: checkout.pid(member) for member in MEMBERS}
    done = checkout("up", TESSERA_PREFECT_PORT=str(free_ports(1)[0]))
    assert done.returncode == 2
    assert "Prefect's server runs with another ports than" in done.stderr

    child = begin_run(checkout)
    done = checkout("status")
    assert done.returncode == 0, done.stdout
    print(done.stdout)
    for count, member in enumerate(("worker", "control", "mlflow", "prefect"), start=1):
        os.kill(pids[member], signal.SIGKILL)
        wait_for(f"{member} is gone", lambda member=member: not psutil.pid_exists(pids[member]), 10)
        done = checkout("status")
        assert (done.returncode, done.stdout.count("died:")) == (1, count)
        assert f"{member:<8} died: process {pids[member]} is gone" in done.stdout
    assert psutil.pid_exists(child)

    began = time.monotonic()
    done = checkout("up")
    assert done.returncode == 0, done.stderr
    seconds["mended"] = time.monotonic() - began
    assert checkout("status").returncode == 0
    assert not set(pids.values()) & {checkout.pid(member) for member in MEMBERS}
    check_listeners(checkout)  # the killed MLflow's other process does not hold the port any more
    assert psutil.pid_exists(child)  # the work of a killed worker is not lost
    _, (run,) = servers.ask(checkout.url("prefect", "/api/flow_runs/filter"), body={})
    assert run["state"]["type"] == "RUNNING"
    os.kill(int(run["infrastructure_pid"]), signal.SIGKILL)  # neither it nor its worker can tell of its end

    began = time.monotonic()
    done = checkout("down")
    seconds["down"] = time.monotonic() - began
    assert done.returncode == 0, done.stderr
    assert checkout.processes() == []
    assert has_ended(child)
    assert sorted(path.name for path in (checkout.folder / ".stack").iterdir()) == [
        "control.log",
        "lock",
        "mlflow.log",
        "prefect.log",
        "worker.log",
    ]
    with sqlite3.connect(checkout.folder / ".prefect" / "prefect.db") as database:
        assert database.execute("SELECT state_type FROM flow_run").fetchall() == [
            ("CRASHED",)
        ]  # its slot is free again
    print({name: round(value, 1) for name, value in seconds.items()})


def command_of_make(target: str, *variables: str) -> str:
    """The last line that a target runs."""
    command = ["make", "--dry-run", "--assume-old=.venv/.ready", target, *variables]
    outside_of_make = {name: value for name, value in os.environ.items() if name not in MAKE_VARIABLES}
    done = subprocess.run(command, cwd=REPOSITORY, env=outside_of_make, capture_output=True, text=True, check=True)
    return done.stdout.splitlines()[-1]


def test_make_ui_answers_to_its_own_names_alone(checkout: Checkout) -> None:
    port = checkout.ports["mlflow"]
    command = command_of_make("ui", f"UI_PORT={port}").replace(str(REPOSITORY), str(checkout.folder))
    quiet = {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", "TESSERA_STACK": f"ui:{checkout.folder}"}
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    with (checkout.folder / "ui.log").open("w") as log:
        subprocess.Popen(
            ["sh", "-c", command],
            cwd=checkout.folder,
            env={**checkout.environment, **quiet, "PATH": path},
            stdout=log,
            stderr=log,
        )
    wait_for("make ui answers", lambda: servers.ask(checkout.url("mlflow", "/health"))[0] == 200, 60)
    check_names(port, "/")


TEMPORARY = """
from prefect.server.api.server import SubprocessASGIServer
from flows.stack.prefect_server import start_temporary_ones
start_temporary_ones()
with SubprocessASGIServer() as server:
    print(server.port, flush=True)
    input()
"""


def test_the_server_that_a_flow_starts_for_itself_answers_to_its_own_names_alone(checkout: Checkout) -> None:
    environment = {**checkout.environment, "PREFECT_HOME": str(checkout.folder / ".prefect"), "DO_NOT_TRACK": "1"}
    environment["PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS"] = "120"  # as flows/reproduce.py sets it
    for path in ("flows/reproduce.py", "flows/sweep.py"):  # which are too long to run here
        assert "    start_temporary_ones()\n" in (REPOSITORY / path).read_text()
    process = subprocess.Popen(
        [sys.executable, "-c", TEMPORARY],
        cwd=checkout.folder,
        env=environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        check_names(int(process.stdout.readline()), "/api/flows/filter", "{}")
    finally:
        process.communicate("\n", timeout=30)


DEPLOYMENTS = """
deployments:
  - {name: by-hand, entrypoint: "flow.py:work", work_pool: {name: gpu}}
  - name: nightly
    entrypoint: flow.py:work
    work_pool: {name: gpu}
    schedules: [{cron: "0 2 * * *", timezone: UTC, active: false}]
"""


def test_what_prefect_yaml_lists_is_deployed_and_schedules_stay_as_people_set_them(checkout: Checkout) -> None:
    api = checkout.url("prefect", "/api")

    def deployed() -> dict[str, dict]:
        _, found = servers.ask(f"{api}/deployments/filter", body={})
        return {made["name"]: made for made in found}

    def schedules() -> list[tuple[str, bool]]:
        return sorted((each["schedule"]["cron"], each["active"]) for each in deployed()["nightly"]["schedules"])

    def up(said: str) -> None:
        done = checkout("up")
        assert (done.returncode, done.stderr) == (0, "")
        assert said in done.stdout

    (checkout.folder / "prefect.yaml").write_text(DEPLOYMENTS)
    flow = checkout.folder / "flow.py"
    flow.write_text("from prefect import flow\n@flow\ndef work(speed: int = 1): pass\n")
    up("deployed by-hand, nightly: ")
    first = deployed()
    assert {made["work_pool_name"] for made in first.values()} == {"gpu"}
    assert str(checkout.folder) in json.dumps(first["by-hand"]["pull_steps"])
    assert schedules() == [("0 2 * * *", False)]

    up("deployed as in prefect.yaml: by-hand, nightly")
    assert deployed()["nightly"]["schedules"] == first["nightly"]["schedules"]  # with their ids: not deployed again

    nightly = f"{api}/deployments/{first['nightly']['id']}"
    schedule = f"{nightly}/schedules/{first['nightly']['schedules'][0]['id']}"
    assert servers.ask(schedule, body={"active": True}, method="PATCH")[0] == 204
    added = {"schedule": {"cron": "0 5 * * *", "timezone": "UTC"}, "active": True}
    assert servers.ask(f"{nightly}/schedules", body=[added])[0] == 201
    assert servers.ask(nightly, body={"paused": True}, method="PATCH")[0] == 204
    assert servers.ask(f"{api}/deployments/{first['by-hand']['id']}", method="DELETE")[0] == 204
    up("deployed by-hand, nightly: ")  # because one is missing
    assert set(deployed()) == {"by-hand", "nightly"}
    assert deployed()["nightly"]["paused"]
    assert schedules() == [("0 2 * * *", True), ("0 5 * * *", True)]
    flow.write_text(flow.read_text().replace("speed", "tempo"))
    up("deployed by-hand, nightly: ")
    assert set(deployed()["nightly"]["parameter_openapi_schema"]["properties"]) == {"tempo"}
    assert schedules() == [("0 2 * * *", True), ("0 5 * * *", True)]
    (checkout.folder / "prefect.yaml").write_text(DEPLOYMENTS.replace("0 2", "0 3"))
    up("deployed by-hand, nightly: ")
    assert schedules() == [("0 3 * * *", False)]  # what prefect.yaml says anew

    flow.write_text("raise RuntimeError('this cannot be imported')\n")
    done = checkout("up")
    assert done.returncode == 2
    assert "prefect.yaml is not deployed: prefect deploy --all ended with 1, and with:" in done.stderr
    assert done.stderr.endswith("Could not find object 'work' in 'flow.py'\n")
    assert {checkout.pid(member) for member in MEMBERS} <= {process.pid for process in checkout.processes()}
    (checkout.folder / "prefect.yaml").write_text("deployments: [{name: by-hand}]")
    done = checkout("up")
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "prefect.yaml cannot be read: expected a list `deployments`, each with a name and an entry" in done.stderr
    assert checkout("down").returncode == 0


def test_on_postgres_with_passwords_nobody_gets_in_without_and_no_file_has_one(
    checkout: Checkout, postgres: tuple[Path, int]
) -> None:
    folder, port = postgres
    url = f"postgresql://tessera:{urllib.request.quote(PASSWORD, safe='')}@127.0.0.1:{port}/postgres"
    wrong = checkout("up", DATABASE_URL=url.replace("pg-canary", "pg-wrong"), **SECURE)
    assert wrong.returncode == 2
    assert "password authentication failed" in wrong.stderr
    began = time.monotonic()
    done = checkout("up", DATABASE_URL=url, **SECURE)
    assert done.returncode == 0, done.stderr
    print("seconds on PostgreSQL:", round(time.monotonic() - began, 1))
    check_listeners(checkout)
    check_private(checkout)
    assert not (checkout.folder / "mlflow.db").exists()
    assert not (checkout.folder / ".prefect" / "prefect.db").exists()

    for member, path, login in (
        ("prefect", "/api/flows/filter", PREFECT_LOGIN),
        ("mlflow", "/api/2.0/mlflow/experiments/search", f"some-admin:{MLFLOW_PASSWORD}"),
    ):
        body = b'{"limit": 1}' if member == "prefect" else b'{"max_results": 1}'
        codes = [code_of(checkout.url(member, path), given, body) for given in ("", "someone:guess", login)]
        assert codes == [401, 401, 200], member
    other = checkout("up", DATABASE_URL=url, TESSERA_MLFLOW_PORT=str(free_ports(1)[0]), **SECURE)
    assert other.returncode == 2

    # The shell of a user with the passwords in the environment gets there, and the file has none
    show = '. .stack/env; echo "$PREFECT_API_URL $PREFECT_API_AUTH_STRING $MLFLOW_TRACKING_PASSWORD"'
    shell = subprocess.run(
        ["sh", "-c", show], cwd=checkout.folder, env=checkout.environment | SECURE, capture_output=True, text=True
    )
    assert shell.stdout.split() == [checkout.url("prefect", "/api"), PREFECT_LOGIN, MLFLOW_PASSWORD]

    commands = [" ".join(process.cmdline()) for process in checkout.processes()]
    assert len(commands) >= 4
    worker = " ".join(checkout.processes("worker")[0].environ().values())
    assert "pg-canary" not in worker and "mlflow-canary" in worker  # it has what it needs
    basic = [base64.b64encode(login.encode()) for login in (PREFECT_LOGIN, f"some-admin:{MLFLOW_PASSWORD}")]
    assert [line for line in commands if any(secret.decode() in line for secret in (b"canary", *basic))] == []

    def leaks() -> list[Path]:
        contents = {}
        for path in (path for top in (checkout.folder, folder) for path in top.rglob("*")):
            with contextlib.suppress(FileNotFoundError):  # a database makes and drops files
                if path.is_file():
                    contents[path] = path.read_bytes()
        users = [path for path, content in contents.items() if b"some-admin" in content]
        assert any(folder in path.parents for path in users)  # what is stored can be found
        return [path for path, content in contents.items() if any(secret in content for secret in (b"canary", *basic))]

    assert (checkout.folder / ".stack" / "basic_auth.ini").exists()
    assert leaks() == []
    done = checkout("down", DATABASE_URL=url, **SECURE)
    assert done.returncode == 0, done.stderr
    assert checkout.processes() == []
    assert leaks() == []


# In containers --------------------------------------------------------------------------------------------------------


def test_the_containers_are_private_pinned_and_wait_for_each_other() -> None:
    """There is no container engine where tests run: this reads what compose would do."""
    compose = yaml.safe_load((REPOSITORY / "deploy" / "compose.yaml").read_text())
    services = compose["services"]
    assert {"postgres", "store", "mlflow", "prefect", "worker", "control"} == set(services)
    lock = (REPOSITORY / "requirements.lock").read_text()
    locked = {name: re.search(rf"^{name}==(\S+)", lock, re.MULTILINE)[1] for name in ("mlflow", "prefect")}
    assert locked == {name: importlib.metadata.version(name) for name in locked}
    assert services["mlflow"]["image"] == f"ghcr.io/mlflow/mlflow:v{locked['mlflow']}-full"
    assert services["prefect"]["image"] == f"prefecthq/prefect:{locked['prefect']}-python3.11"
    dockerfile = (REPOSITORY / "deploy" / "Dockerfile").read_text()
    assert "--require-hashes -r /tmp/requirements.lock" in dockerfile

    secret = re.compile(r"PASSWORD|SECRET|AUTH_STRING|ACCESS_KEY")
    for name, service in services.items():
        assert "build" in service or re.fullmatch(r"\S+:v?\d+\.\d+\S*", service["image"]), name
        assert all(port.startswith("127.0.0.1:") for port in service.get("ports", [])), name
        assert service["healthcheck"]["test"], name
        for needed, how in service.get("depends_on", {}).items():
            assert how == {"condition": "service_healthy"} and services[needed]["healthcheck"]
        for key, value in service["environment"].items():
            if secret.search(key):
                assert re.fullmatch(r"\$\{[A-Z_]+:\?[^}]+\}", value), f"{name}: {key} is not taken from the environment"
            assert not re.search(r"://[^/@\s]*:[^/@\s]*@", str(value)), f"{name}: {key} holds a password"
        for volume in service.get("volumes", []):
            source = volume.partition(":")[0]
            assert source in compose["volumes"] or source == "..", f"{name}: {source} is no named volume"
    assert "ports" not in services["postgres"] and "ports" not in services["store"]
    (device,) = services["worker"]["deploy"]["resources"]["reservations"]["devices"]
    assert device["capabilities"] == ["gpu"]
    pools = {name: re.search(r"--pool (\w+)", services[name]["command"])[1] for name in members.POOLS}
    assert pools == members.POOLS
    assert services["control"]["deploy"] == {}  # it needs no GPU
    databases = compose["configs"]["databases"]["content"]
    for service, name in (("prefect", "tessera_prefect"), ("mlflow", "tessera_mlflow")):
        assert f"CREATE DATABASE {name};" in databases
        assert any(str(value).endswith(f"/{name}") for value in services[service]["environment"].values())

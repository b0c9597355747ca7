"""What the stack consists of, by what the environment says: addresses, commands, environments, databases.

Passwords come from the environment and stay there: no file and no command line has them.
"""

import contextlib
import ipaddress
import os
import platform
import secrets
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import SplitResult, parse_qs, quote, unquote, urlsplit

from flows.places import devices
from serving.hosts import for_mlflow, further_hosts
from tessera.tracking.journal import redact

# Sweeps only wait for their cells, and runs that spread for their parts: in the pool of those, they would take their slots
POOLS = {"worker": "gpu", "control": "control"}
MEMBERS = {
    "prefect": "Prefect's server",
    "mlflow": "MLflow's server",
    **{member: f"the worker of pool {pool}" for member, pool in POOLS.items()},
}
SWEEPS = 10  # at a time: each is a process of 200 MB that waits
MARK = "TESSERA_STACK"
CONNECT_SECONDS = 5.0
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
    further_hosts: list[str]  # names that the servers answer to beside their own
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
            "further hosts": self.further_hosts,
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
        further_hosts=further_hosts(environ),
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


def folder_of(root: Path) -> Path:
    return root / ".stack"


def command(settings: Settings, member: str) -> list[str]:
    if member in POOLS:
        line = [sys.executable, "-m", "prefect", "worker", "start", "--pool", POOLS[member], "--type", "process"]
        return line + ["--name", platform.node(), "--limit", str(slots(member))]
    address = ["--host", settings.host, "--port", str(settings.ports[member])]
    if member == "prefect":
        return [sys.executable, "-m", "flows.stack.prefect_server", *address]
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
        kept.setdefault(
            "PREFECT_SERVER_UI_V2_ENABLED", "false"
        )  # that page has the browser ask Amplitude at each visit
        kept.setdefault("PREFECT_SERVER_UI_SHOW_PROMOTIONAL_CONTENT", "false")
        kept |= {"PREFECT_SERVER_API_AUTH_STRING": settings.auth_string} if settings.auth_string else {}
        kept |= _access(settings, "PREFECT_SERVER_DATABASE_CONNECTION_URL", "asyncpg")
    elif member == "mlflow":
        kept |= {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}  # nothing here uses jobs
        kept |= for_mlflow(kept, "" if _is_loopback(settings.host) else settings.host)
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
    return {name: database_uri(settings, driver), **password}


def database_uri(settings: Settings, driver: str) -> str:
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
            connect_timeout=int(CONNECT_SECONDS),
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

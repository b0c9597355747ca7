"""The names that our listeners answer to. A page elsewhere whose name resolves to 127.0.0.1 (DNS rebinding) has another.

    python -m serving.hosts mlflow server ...

runs a command of MLflow, whose server answers to the same names.
"""

import os
import re
import signal
import subprocess
import sys
from collections.abc import Mapping
from types import FrameType

from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware

VARIABLE = "TESSERA_ALLOWED_HOSTS"  # further names, as a proxy in front passes them on
LOOPBACK = ("localhost", "127.0.0.1", "[::1]")
NAME = re.compile(r"(\*\.)?[A-Za-z0-9]([A-Za-z0-9.-]*[A-Za-z0-9])?|\[[0-9A-Fa-f:.]+\]")


def further_hosts(environ: Mapping[str, str]) -> list[str]:
    """Those of the environment. Raises ValueError for what is no name of a host."""
    names = [name.strip() for name in environ.get(VARIABLE, "").split(",") if name.strip()]
    for name in names:
        if not NAME.fullmatch(name):
            raise ValueError(
                f"{VARIABLE} has {name!r}: expected names of hosts without port, such as gpu7,gpu7.example or "
                "*.example; correct it"
            )
    return names


def trusted_hosts(own: str = "") -> Middleware:
    """Answers 400 to requests by other names than loopback's, the listener's own, and those of the environment."""
    names = [*LOOPBACK, *([own] if own else []), *further_hosts(os.environ)]
    return Middleware(TrustedHostMiddleware, allowed_hosts=names, www_redirect=False)


def for_mlflow(environ: Mapping[str, str], own: str = "") -> dict[str, str]:
    """The same for MLflow's server, as its environment; it compares names with their ports, and wants origins too."""
    further = [*([own] if own else []), *further_hosts(environ)]
    # [[]: MLflow matches by fnmatch, where [ begins a set of characters
    names = [text for name in (*LOOPBACK, *further) for text in (name, f"{name.replace('[', '[[]')}:*")]
    made = {"MLFLOW_SERVER_ALLOWED_HOSTS": ",".join(names)}
    if further:
        origins = [
            f"{scheme}://{name}{port}" for name in further for scheme in ("http", "https") for port in ("", ":*")
        ]
        made["MLFLOW_SERVER_CORS_ALLOWED_ORIGINS"] = ",".join(origins)
    return {key: environ.get(key) or value for key, value in made.items()}


def _run(command: list[str], environment: Mapping[str, str]) -> int:
    """Until it ends, or Ctrl-C ends it without the tracebacks that each of its processes would print of a SIGINT."""
    server = subprocess.Popen(command, env=environment, start_new_session=True)

    def stop(number: int, frame: FrameType | None) -> None:
        if server.poll() is None:
            os.killpg(server.pid, signal.SIGTERM)

    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, stop)
    return max(0, server.wait())  # negative: a signal, ours


if __name__ == "__main__":
    try:
        settings = for_mlflow(os.environ)
    except ValueError as error:
        sys.exit(str(error))
    sys.exit(_run(sys.argv[1:], {**os.environ, **settings}))

"""Prefect's server as `prefect server start` runs it, but it answers to its own names alone, and to no page from elsewhere.

python -m flows.stack.prefect_server --host 127.0.0.1 --port 4200
"""

import argparse
import os
import subprocess
import sys
from typing import Any

from serving.hosts import trusted_hosts


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m flows.stack.prefect_server", description=__doc__.splitlines()[0])
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=4200)
    given = parser.parse_args(arguments)
    # Read when Prefect is imported; its default is every page
    origins = sorted({f"http://{host}:{given.port}" for host in (given.host, "localhost")})
    os.environ.setdefault("PREFECT_SERVER_CORS_ALLOWED_ORIGINS", ",".join(origins))
    import uvicorn
    from prefect import settings
    from prefect.server.api.server import create_app

    app, hosts = create_app(final=True), trusted_hosts(given.host)
    app.add_middleware(hosts.cls, *hosts.args, **hosts.kwargs)
    uvicorn.run(
        app,
        host=given.host,
        port=given.port,
        timeout_keep_alive=settings.PREFECT_SERVER_API_KEEPALIVE_TIMEOUT.value(),
        log_level=settings.PREFECT_SERVER_LOGGING_LEVEL.value().lower(),
    )
    return 0


def start_temporary_ones() -> None:
    """Have Prefect start this server where it starts one for a flow, without PREFECT_API_URL; it has no setting for that."""
    if os.environ.get("PREFECT_API_URL"):
        return
    from prefect.server.api.server import SubprocessASGIServer
    from prefect.settings import get_current_settings

    def start(self: Any) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-m", "flows.stack.prefect_server", "--port", str(self.port)]
        mode = {"PREFECT_UI_ENABLED": "0", "PREFECT__SERVER_EPHEMERAL": "1"}  # Prefect's own
        known = get_current_settings().to_environment_variables(exclude_unset=True)
        return subprocess.Popen(command, env={**os.environ, **mode, **known})

    SubprocessASGIServer._run_uvicorn_command = start


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

"""How a process that runs flows comes to its end: by a signal, and where Prefect finds none."""

import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable

from flows.plan import Plan, tell

GRACE_SECONDS = 25.0  # longer than the last artifacts take
SERVER_SECONDS = 5.0

running: list[Plan] = []
ending = threading.Event()


def stop_all() -> None:
    """End the stages of every run of this process, and begin no other."""
    ending.set()
    for plan in list(running):
        plan.processes.stop()


def leave_later(code: int) -> None:
    """End the process a grace period from now, for what may keep Prefect from doing so (see `watch`)."""

    def leave() -> None:
        time.sleep(GRACE_SECONDS)
        os._exit(code)

    threading.Thread(target=leave, daemon=True).start()


def is_engine() -> bool:
    """Whether a worker started this process for one flow run."""
    return getattr(getattr(sys.modules["__main__"], "__spec__", None), "name", "") == "prefect.engine"


def watch(is_finished: Callable[[], bool], plan: Plan, code: Callable[[], int]) -> None:
    """End the process when its stages are done and Prefect is not, a grace period later.

    With a dead server Prefect goes on sending events for minutes, long after the last stage.
    """
    while not is_finished():
        time.sleep(0.5)
    time.sleep(GRACE_SECONDS)
    tell("Prefect does not come to its end (is its server gone?), so this process ends without it.")
    plan.processes.stop()
    plan.report()
    _stop_server()
    os._exit(code())


def _stop_server() -> None:
    """os._exit runs no exit handlers, so Prefect's own server would live on."""
    module = sys.modules.get("prefect.server.api.server")
    for server in list(module.SubprocessASGIServer._instances.values()) if module else []:
        if server.server_process is not None:
            server.server_process.terminate()
            try:
                server.server_process.wait(SERVER_SECONDS)
            except subprocess.TimeoutExpired:
                server.server_process.kill()

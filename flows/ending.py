"""How a process that runs flows ends: after a signal, and when Prefect does not return."""

import contextlib
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator

from flows.plan import Plan, tell
from flows.processes import Stopped

GRACE_SECONDS = 25.0  # longer than the last artifacts take
SERVER_SECONDS = 5.0

_running: list[Plan] = []
_ending = threading.Event()


@contextlib.contextmanager
def stoppable(plan: Plan) -> Iterator[None]:
    """While it lasts, `stop_all` and any exception end the plan's stages. Raises Stopped if the process is ending."""
    _running.append(plan)
    try:
        if _ending.is_set():
            raise Stopped("the flow is ending")
        yield
    except BaseException:  # a cancellation, a signal: the tasks' threads do not hear of it, their processes must
        plan.processes.stop()
        raise
    finally:
        _running.remove(plan)


def stop_all() -> None:
    """End the stages of every run of this process, and begin no other."""
    _ending.set()
    for plan in list(_running):
        plan.processes.stop()


def leave_later(code: int) -> None:
    """End the process a grace period from now, in case Prefect does not (see `watch`)."""

    def leave() -> None:
        time.sleep(GRACE_SECONDS)
        os._exit(code)

    threading.Thread(target=leave, daemon=True).start()


def is_engine() -> bool:
    """Whether a worker started this process for one flow run."""
    return getattr(getattr(sys.modules["__main__"], "__spec__", None), "name", "") == "prefect.engine"


def watch(plan: Plan, code: Callable[[], int]) -> None:
    """End the process, with the exit code `code()`, a grace period after its stages are done, if Prefect is not.

    With a dead server Prefect goes on sending events for minutes, long after the last stage.
    """

    def wait() -> None:
        while not plan.finished():
            time.sleep(0.5)
        time.sleep(GRACE_SECONDS)
        tell("Prefect has not ended (is its server down?), so this process ends without it.")
        plan.processes.stop()
        plan.report()
        _stop_server()
        os._exit(code())

    threading.Thread(target=wait, daemon=True).start()


def _stop_server() -> None:
    """os._exit runs no exit handlers, so Prefect's own server would survive."""
    module = sys.modules.get("prefect.server.api.server")
    for server in list(module.SubprocessASGIServer._instances.values()) if module else []:
        if server.server_process is not None:
            server.server_process.terminate()
            try:
                server.server_process.wait(SERVER_SECONDS)
            except subprocess.TimeoutExpired:
                server.server_process.kill()

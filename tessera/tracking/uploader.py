"""The process that mirrors the journals of a checkout into MLflow: live while stages run, later what an outage held back."""

import hashlib
import os
import sys
import time
from pathlib import Path
from typing import Any

from tessera.tracking.journal import JOURNAL, redact
from tessera.tracking.mirror import Mirror, Refused, note, tracking_uri
from tessera.tracking.processes import folder_of, uploader_lock

POLL_SECONDS = 2.0
LONGEST_PAUSE_SECONDS = 30.0


def all_mirrors(root: Path, known: dict[str, Mirror]) -> list[Mirror]:
    """All journals of the checkout, in the order in which they can be sent; `known` keeps them from round to round."""
    server = hashlib.sha256(tracking_uri(root).encode()).hexdigest()[:12]
    for journal in folder_of(root).glob(f"*/{JOURNAL}"):
        if journal.parent.name not in known:
            known[journal.parent.name] = Mirror(journal.parent, server)
    present = {name: mirror for name, mirror in known.items() if mirror.journal.exists()}
    known.clear()
    known.update(sorted(present.items(), key=lambda item: item[1].order))
    return list(known.values())


def connect(root: Path) -> Any:
    """A client that fails within seconds. MLflow is imported here and nowhere else."""
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "2")
    os.environ.setdefault("MLFLOW_LOGGING_LEVEL", "ERROR")
    os.environ["MLFLOW_DISABLE_TELEMETRY"] = "true"
    os.environ["DO_NOT_TRACK"] = "1"
    os.environ["MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR"] = "false"
    os.environ["MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT"] = "true"  # two lines a run
    os.environ.pop("MLFLOW_RUN_ID", None)  # it would beat the parent run and rename it
    from mlflow import MlflowClient

    return MlflowClient(tracking_uri=tracking_uri(root))


def _push_all(root: Path, mirrors: list[Mirror], client: Any) -> tuple[Any, str]:
    """Push every journal that needs it. Returns the client, made when first needed, and a sentence if something failed."""
    trouble = ""
    for mirror in mirrors:
        if not mirror.pending():
            continue
        try:
            client = client or connect(root)
            mirror.push(client, root)
        except Refused as error:
            trouble = str(error)
        except Exception as error:  # MLflow raises its own, requests', SQLAlchemy's and the operating system's errors
            mirror.forget()
            trouble = (
                f"{redact(tracking_uri(root))} did not take run {mirror.uid} ({type(error).__name__}: {shorten(error)})"
            )
            if (
                getattr(error, "error_code", "") != "INVALID_PARAMETER_VALUE"
            ):  # the server is in trouble: do not try the others
                return client, trouble
    return client, trouble


def shorten(error: Exception) -> str:
    text = " ".join(redact(str(error)).split())
    return text if len(text) < 300 else f"{text[:200]} ... {text[-97:]}"


def upload(root: Path, idle_seconds: float) -> None:
    """Mirror the journals until no stage has been running for a while; return at once if another process does it."""
    known: dict[str, Mirror] = {}
    client, last_trouble, pause = None, "", POLL_SECONDS
    busy_until = time.monotonic() + idle_seconds
    while True:
        with uploader_lock(root) as free:
            if not free:
                return
            while time.monotonic() < busy_until:
                mirrors = all_mirrors(root, known)
                for mirror in mirrors:
                    mirror.watch_load()
                pending = any(mirror.pending() for mirror in mirrors)
                client, trouble = _push_all(root, mirrors, client)
                if trouble != last_trouble:
                    note(folder_of(root), trouble or "the journals are being sent again")
                last_trouble = trouble
                if (pending and not trouble) or any(mirror.alive() for mirror in mirrors):
                    busy_until = time.monotonic() + idle_seconds
                pause = min(2 * pause, LONGEST_PAUSE_SECONDS) if trouble else POLL_SECONDS
                time.sleep(max(0.0, min(pause, busy_until - time.monotonic())))
        # A stage that began just now saw the lock taken and started nobody: look once more after giving it back
        if not any(mirror.alive() for mirror in all_mirrors(root, known)):
            return
        busy_until = time.monotonic() + idle_seconds


def replay(root: Path, timeout: float, everything: bool = False) -> int:
    """Send what MLflow lacks, and report how much. Returns the exit code: 0 if nothing is left."""
    if not folder_of(root).is_dir():
        print(f"{folder_of(root)} does not exist: nothing was tracked here, so there is nothing to send.")
        return 0
    deadline = time.monotonic() + timeout
    server = redact(tracking_uri(root))
    total: tuple[int, int] | None = None
    pauses = [2.0, 4.0]  # a server that was just started or woken up may refuse once
    over, trouble = False, ""
    while True:
        with uploader_lock(root) as free:
            if free and everything:
                for record in folder_of(root).glob("*/sent-*.json"):
                    record.unlink()
                everything = False
            waiting = [mirror for mirror in all_mirrors(root, {}) if mirror.pending()]
            left = len(waiting), sum(mirror.unsent() for mirror in waiting)
            total = total or left
            if not waiting and not everything:
                print(f"{total[0]} runs, {total[1]} metrics sent to {server}; 0 left")
                return 0
            if not over:
                trouble = _push_all(root, waiting, None)[1] if free else ""
        if trouble and pauses and not over:
            time.sleep(pauses.pop(0))
        elif trouble or over:
            print(
                f"{trouble or f'the uploader of {root} was not done after {timeout:g} s'}; {left[0]} runs, {left[1]} "
                f"metrics stay in {folder_of(root)}, nothing is lost: once MLflow answers, run "
                "python -m tessera.tracking replay",
                file=sys.stderr,
            )
            return 1
        if not free:
            time.sleep(0.5)
        over = time.monotonic() > deadline  # look once more before reporting: all may be sent by now

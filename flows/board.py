"""What a flow run shows in Prefect beside states and logs: progress, pictures, tables, links to MLflow.

A stage never waits for it: one thread sends, at most every few seconds, and a server that is slow, dead or refuses
costs a missing artifact. The files of the pipeline are the truth.
"""

import base64
import io
import json
import os
import re
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from uuid import UUID

from prefect.client.orchestration import get_client
from prefect.client.schemas.actions import ArtifactCreate, ArtifactUpdate

from tessera.tracking import journal

INTERVAL_SECONDS = 3.0
LINK_SECONDS = 15.0  # the uploader to MLflow takes some to start, and looks every two
PICTURE_BYTES = 300_000  # pictures travel inside the artifact, since a browser cannot read the worker's disk
PICTURE_PIXELS = 900
STEP = re.compile(r"\s(?:step\s+)?(\d+)/(\d+)\s")


def key_of(*parts: str) -> str:
    """An artifact's key: lower-case letters, digits and dashes are all that Prefect takes."""
    return re.sub(r"[^a-z0-9]+", "-", "-".join(parts).lower()).strip("-")


def progress_of(line: str) -> float | None:
    """Percent, if a stage's line says how far it is: 'train_prior@x  step  35/700  loss 2.1'."""
    found = STEP.search(f"{line} ")
    if not found or int(found[2]) == 0:
        return None
    return round(min(100.0, 100 * int(found[1]) / int(found[2])), 1)


class Board:
    """The artifacts of one flow run."""

    def __init__(self, flow_run_id: UUID | None):
        self.flow_run_id, self._began = flow_run_id, time.time()
        self._latest: dict[str, tuple[float, str, UUID | None]] = {}  # progress by key: percent, line, task run
        self._made: dict[str, UUID] = {}
        self._shown: dict[str, float] = {}
        self._waiting: list[Callable[[Any], bool]] = []  # each sends something and says whether it is done
        self._lock, self._closing = threading.Lock(), threading.Event()
        self._is_down = False
        self._thread = threading.Thread(target=self._send_all, daemon=True)
        self._thread.start()

    def line(self, stage: str, line: str, task_run_id: UUID | None) -> None:
        """A line that a stage said: the progress in it is shown."""
        percent = progress_of(line)
        if percent is not None:
            with self._lock:
                self._latest[key_of(stage, "progress")] = percent, line, task_run_id

    def done(self, stage: str, task_run_id: UUID | None) -> None:
        """The stage ended well: its bar is full, whichever step it spoke of last."""
        with self._lock:
            if (key := key_of(stage, "progress")) in self._latest:
                self._latest[key] = 100.0, f"{stage} is done", task_run_id

    def outputs(self, stage: str, paths: list[Path], task_run_id: UUID | None) -> None:
        """Show a stage's pictures, and the Markdown files in its folders."""
        for path in paths:
            if path.suffix == ".png" and path.is_file():
                self._post(key_of(stage, path.parent.name), "markdown", lambda p=path: picture(p), task_run_id)
            for page in sorted(path.glob("*.md")) if path.is_dir() else ():
                self._post(key_of(page.stem), "markdown", lambda p=page: p.read_text(), task_run_id)

    def markdown(self, key: str, text: str) -> None:
        self._post(key_of(key), "markdown", lambda: text, None)

    def link(self, stage: str, checkout: Path, since: float, task_run_id: UUID | None) -> None:
        """A link to the MLflow run of a stage that began after `since`, as soon as the uploader has made it."""
        server = os.environ.get("MLFLOW_TRACKING_URI", "")
        if not server.startswith(("http://", "https://")) or os.environ.get("TESSERA_TRACKING") == "off":
            return

        def send(client: Any) -> bool:
            run = mlflow_run(checkout, stage, since)
            if run:
                address = f"{journal.redact(server).rstrip('/')}/#/runs/{run}"
                self._create(
                    client, key_of(stage, "mlflow"), "markdown", f"[{stage} in MLflow]({address})", task_run_id
                )
            return run is not None or (self._closing.is_set() and _is_in_trouble(checkout, self._began))

        with self._lock:
            self._waiting.append(send)

    def close(self) -> None:
        """Send what is left, within seconds."""
        self._closing.set()
        self._thread.join(1.0 if self._is_down else LINK_SECONDS + INTERVAL_SECONDS)

    def _post(
        self, key: str, kind: str, content: Callable[[], str], task_run_id: UUID | None, description: str = ""
    ) -> None:
        def send(client: Any) -> bool:
            self._create(client, key, kind, content(), task_run_id, description)
            return True

        with self._lock:
            self._waiting.append(send)

    def _create(
        self, client: Any, key: str, kind: str, data: Any, task_run_id: UUID | None, description: str = ""
    ) -> UUID:
        run = {"flow_run_id": self.flow_run_id, **({"task_run_id": task_run_id} if task_run_id else {})}
        made = client.create_artifact(ArtifactCreate(key=key, type=kind, data=data, description=description, **run))
        return made.id

    def _send_all(self) -> None:
        ends = None
        while True:
            is_closing = self._closing.wait(0.2 if ends else INTERVAL_SECONDS)
            if is_closing and ends is None:
                ends = time.monotonic() + LINK_SECONDS
            try:
                with get_client(sync_client=True) as client:
                    self._round(client)
                self._is_down = False
            except Exception:  # httpx', Prefect's and the operating system's errors: none of them is the stages' affair
                self._is_down = True
            if ends and (not self._waiting or self._is_down or time.monotonic() > ends):
                return

    def _round(self, client: Any) -> None:
        with self._lock:
            latest, waiting = dict(self._latest), list(self._waiting)
        for key, (percent, line, task_run_id) in latest.items():
            if self._shown.get(key) == percent:
                continue
            if key not in self._made:
                self._made[key] = self._create(client, key, "progress", percent, task_run_id, line)
            else:
                client.update_artifact(self._made[key], ArtifactUpdate(data=percent, description=line))
            self._shown[key] = percent
        for send in waiting:
            if send(client):
                with self._lock:
                    self._waiting.remove(send)


def picture(path: Path) -> str:
    """Markdown that holds the picture itself, made smaller if need be."""
    data = path.read_bytes()
    if len(data) > PICTURE_BYTES:
        from PIL import Image

        with Image.open(path) as image:
            image.thumbnail((PICTURE_PIXELS, PICTURE_PIXELS))
            buffer = io.BytesIO()
            image.save(buffer, "PNG", optimize=True)
        data = buffer.getvalue()
    return f"![{path.stem}](data:image/png;base64,{base64.b64encode(data).decode()})"


def mlflow_run(checkout: Path, stage: str, since: float) -> str | None:
    """MLflow's id of the newest run of a stage that was written to after `since`, seconds of the epoch."""
    for path in sorted(journal.folder_of(checkout).glob(f"*/{journal.JOURNAL}"), key=_changed, reverse=True):
        if _changed(path) < since:
            return None
        opening = next((event for _, event in journal.events_of(path) if event["event"] == "open"), {})
        if opening.get("stage") == stage:
            for record in sorted(path.parent.glob("sent-*.json"), key=_changed, reverse=True):
                return json.loads(record.read_text())["run_id"] or None
    return None


def _is_in_trouble(checkout: Path, since: float) -> bool:
    """Whether MLflow took nothing when the uploader tried last: then the links of an ending flow are given up."""
    log = journal.folder_of(checkout) / "uploader.log"
    if _changed(log) < since:  # what it says is about an earlier time, or there is none
        return False
    return " did not take run " in log.read_text(encoding="utf-8").rpartition("\n")[0].rpartition("\n")[2]


def _changed(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except OSError:
        return 0.0

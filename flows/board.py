"""What a flow run shows in Prefect beside states and logs: progress, pictures, tables, links to MLflow.

A stage never waits for it: one thread sends, at most every few seconds, and a server that is slow, dead or refuses
costs a missing artifact. The files of the pipeline are the truth.
"""

import base64
import contextlib
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

from tessera.tracking import journal, view
from tessera.tracking.processes import folder_of

INTERVAL_SECONDS = 3.0
LINK_SECONDS = 15.0  # the uploader to MLflow takes some to start, and looks every two
PICTURE_BYTES = 300_000  # pictures travel inside the artifact, since a browser cannot read the worker's disk
PICTURE_PIXELS = 900
METRICS = "metrics-of-systems"
CELL_PIXELS = 240  # of a picture in a table
CELL = re.compile(r"(?<=\| )[\w./@-]+\.png(?= +\|)")  # a table of paths, which a browser cannot follow
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
        self._links: dict[str, str] = {}  # to MLflow, by stage
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
        """Show a stage's pictures, and, above all that stages show, the Markdown files in its folders."""
        for path in paths:
            with contextlib.suppress(OSError, ValueError):  # what cannot be read is missing here, and no more
                if path.suffix == ".png" and path.is_file():
                    title = f"{path.parent.name} of {path.stem}"
                    self._post(key_of(stage, path.parent.name), picture(path), task_run_id, title)
                for file in sorted(path.glob("*.md")) if path.is_dir() else ():
                    title, _, text = page(file).partition("\n")
                    self._post(key_of(file.stem), text, None, title.strip("# "))

    def markdown(self, key: str, text: str) -> None:
        self._post(key_of(key), text, None)

    def metrics(self, kept: dict[str, Any]) -> None:
        """What a run has kept, for the sweep that it is a cell of, which may wait for it on another machine."""
        self._post(
            METRICS, json.dumps(kept), None, "metrics of systems, for the sweep that this run is a cell of", "json"
        )

    def link(self, stage: str, checkout: Path, since: float, task_run_id: UUID | None) -> None:
        """A link to the MLflow run of a stage that began after `since`, as soon as the uploader has made it."""
        server = journal.redact(os.environ.get("MLFLOW_TRACKING_URI", "")).rstrip("/")
        if not server.startswith(("http://", "https://")) or os.environ.get("TESSERA_TRACKING") == "off":
            return

        def send(client: Any) -> bool:
            path = mlflow_run(checkout, stage, since)
            if path:
                tab = "/model-metrics" if stage.startswith("train_") and path.startswith("experiments/") else ""
                self._links[stage] = f"{server}/#/{path}{tab}{view.AS_TRAINING}"
                has_view = any(name.startswith("evaluate") for name in self._links)  # it comes with the first system
                runs = f"{server}/#/{path.rpartition('/')[0]}{view.QUERY if has_view else view.AS_TRAINING}"
                lines = [f"- [{name}]({address})" for name, address in self._links.items()]
                text = (
                    f"[All runs]({runs}): choose systems there, then Compare. Curves, timings and files of stages:\n\n"
                )
                self._put(client, "mlflow", "markdown", text + "\n".join(lines), None, "runs in MLflow")
            return path is not None or (self._closing.is_set() and _is_in_trouble(checkout, self._began))

        with self._lock:
            self._waiting.append(send)

    def close(self) -> None:
        """Send what is left, within seconds."""
        self._closing.set()
        self._thread.join(1.0 if self._is_down else LINK_SECONDS + INTERVAL_SECONDS)

    def _post(
        self, key: str, text: str, task_run_id: UUID | None, description: str = "", kind: str = "markdown"
    ) -> None:
        def send(client: Any) -> bool:
            self._create(client, key, kind, text, task_run_id, description)
            return True

        with self._lock:
            self._waiting.append(send)

    def _create(self, client: Any, key: str, kind: str, data: Any, task_run_id: UUID | None, description: str) -> None:
        run = {"flow_run_id": self.flow_run_id, **({"task_run_id": task_run_id} if task_run_id else {})}
        made = client.create_artifact(ArtifactCreate(key=key, type=kind, data=data, description=description, **run))
        self._made[key] = made.id

    def _put(self, client: Any, key: str, kind: str, data: Any, task_run_id: UUID | None, description: str) -> None:
        """Create it, or change what there is: each of these has a key of its own."""
        if key in self._made:
            client.update_artifact(self._made[key], ArtifactUpdate(data=data, description=description))
        else:
            self._create(client, key, kind, data, task_run_id, description)

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
            self._put(client, key, "progress", percent, task_run_id, line)
            self._shown[key] = percent
        for send in waiting:
            if send(client):
                with self._lock:
                    self._waiting.remove(send)


def picture(path: Path, pixels: int | None = None) -> str:
    """Markdown that holds the picture itself, made smaller if need be: to `pixels` a side, or to what may travel."""
    data = path.read_bytes()
    if pixels or len(data) > PICTURE_BYTES:
        from PIL import Image

        with Image.open(path) as image:
            image.thumbnail((pixels or PICTURE_PIXELS, pixels or PICTURE_PIXELS))
            buffer = io.BytesIO()
            image.save(buffer, "PNG", optimize=True)
        data = buffer.getvalue()
    return f"![{path.stem}](data:image/png;base64,{base64.b64encode(data).decode()})"


def page(path: Path) -> str:
    """A Markdown file, with the pictures that its tables name by their paths in the checkout."""

    def shown(cell: re.Match[str]) -> str:
        found = next((above / cell[0] for above in path.parents if (above / cell[0]).is_file()), None)
        return picture(found, CELL_PIXELS) if found else cell[0]

    return CELL.sub(shown, path.read_text(encoding="utf-8"))


def mlflow_run(checkout: Path, stage: str, since: float) -> str | None:
    """Where MLflow's page has the newest run of a stage that was written to after `since`, seconds of the epoch."""
    for path in sorted(folder_of(checkout).glob(f"*/{journal.JOURNAL}"), key=_changed, reverse=True):
        if _changed(path) < since:
            return None
        opening = next((event for _, event in journal.events_of(path) if event["event"] == "open"), {})
        if opening.get("stage", "").replace("@", "_") == stage.replace("@", "_"):  # evaluate_real runs as evaluate@real
            for record in sorted(path.parent.glob("sent-*.json"), key=_changed, reverse=True):
                sent = json.loads(record.read_text())
                experiment = f"experiments/{sent['experiment_id']}/" if sent.get("experiment_id") else ""
                return f"{experiment}runs/{sent['run_id']}" if sent["run_id"] else None
    return None


def _is_in_trouble(checkout: Path, since: float) -> bool:
    """Whether MLflow took nothing when the uploader tried last: then the links of an ending flow are given up."""
    log = folder_of(checkout) / "uploader.log"
    if _changed(log) < since:  # what it says is about an earlier time, or there is none
        return False
    return " did not take run " in log.read_text(encoding="utf-8").rpartition("\n")[0].rpartition("\n")[2]


def _changed(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except OSError:
        return 0.0

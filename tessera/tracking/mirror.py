"""Sends a journal to its run in MLflow. What a server has is recorded beside the journal, so sending again makes no duplicate.

MLflow is imported in this folder and nowhere else.
"""

import contextlib
import json
import os
import re
import time
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path, PurePosixPath
from typing import Any

from tessera.artifacts.folder import ArtifactError
from tessera.tracking import load, view
from tessera.tracking.journal import JOURNAL, append_load, events_of, redact, replace_json
from tessera.tracking.processes import is_alive

DOUBT_SECONDS = 3.0
SECONDS = "tessera.seconds"  # the tag of a run about work that took so long before its journal was opened
CHUNK_BYTES = 256_000
LOG_BYTES = 1_000_000
VERSION_TAGS = ("tessera.system", "mlflow.source.git.commit", "git.uncommitted", "dvc.experiment", "protocol")
VERSION_METRICS = re.compile(r"generation/(fid|fd_[a-z0-9]+|label_agreement|precision|recall|copy_rate)")


class Refused(RuntimeError):
    """MLflow answered, but does not accept this journal until somebody acts; the message says how."""


@dataclass
class _Sent:
    """How much of a journal a server has; stored beside the journal."""

    offset: int = 0
    run_id: str = ""
    experiment_id: str = ""  # of the run
    status: str = ""
    pid: int = 0
    started: int = 0
    time: int = 0  # of the last event, in milliseconds

    def follow(self, event: dict[str, Any]) -> None:
        self.time = event.get("time", self.time)
        if event["event"] == "open":
            self.status, self.pid, self.started = "RUNNING", event["pid"], event["started"]
        elif event["event"] == "close":
            self.status = event["status"]

    def runs(self) -> bool:
        return self.status == "RUNNING" and is_alive(self.pid, self.started)


@dataclass
class _Chunk:
    """Some lines of a journal, grouped as MLflow takes them."""

    offset: int
    metrics: list[tuple[str, float, int, int]] = field(default_factory=list)
    params: dict[str, str] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)
    files: list[str] = field(default_factory=list)
    datasets: list[dict[str, Any]] = field(default_factory=list)
    models: list[dict[str, Any]] = field(default_factory=list)
    made_by: dict[str, str] = field(default_factory=dict)
    opened: bool = False


class Mirror:
    """One journal and its run in MLflow. Every request may be repeated: a server stores equal values once."""

    def __init__(self, folder: Path, server: str) -> None:
        self.journal = folder / JOURNAL
        self.uid = folder.name
        opening = next((event for _, event in events_of(self.journal)), {})
        self.began = opening.get("time", 0)  # in milliseconds, which several runs may share
        # Parents are sent first, and systems last: a system looks for the runs that made its artifacts
        self.order = opening.get("kind") == "system", self.began, bool(opening.get("parent"))
        self.record = folder / f"sent-{server}.json"
        self.sent = _Sent(**json.loads(self.record.read_text(encoding="utf-8"))) if self.record.exists() else _Sent()
        self._ahead = replace(self.sent)  # what the journal says beyond what was sent
        self._known = False  # whether the run's existence and params were looked up by this process
        self._doubt = False  # whether a request to create the run went unanswered, and may be carried out later
        self._params: dict[str, str] = {}
        self._load: load.Watch | None = None

    def alive(self) -> bool:
        """Whether a process may still write to the journal, be it sent or not."""
        self._ahead.offset = max(self._ahead.offset, self.sent.offset)
        for offset, event in events_of(self.journal, self._ahead.offset):
            self._ahead.follow(event)
            self._ahead.offset = offset
        return self._ahead.runs()

    def watch_load(self) -> None:
        """Add the load of the run's process to its journal, now and then, at no cost to that process."""
        if not self.alive():
            self._load = None
            return
        if self._load is None:
            self._load = load.Watch(self._ahead.pid)
        if values := self._load.due():
            append_load(self.journal, (time.time_ns() // 1_000_000 - self.began) // 1000, values)

    def pending(self) -> bool:
        """Whether MLflow lacks something."""
        if self.journal.stat().st_size > self.sent.offset and any(events_of(self.journal, self.sent.offset)):
            return True
        return self.sent.status == "RUNNING" and not self.sent.runs()

    def unsent(self) -> int:
        """How many values of metrics MLflow lacks."""
        events = events_of(self.journal, self.sent.offset)
        return sum(len(event["values"]) for _, event in events if event["event"] == "log")

    def push(self, client: Any, root: Path) -> None:
        """Send everything that is new. Raises whatever MLflow raises; what was sent before that counts as sent."""
        if not self._known and not self._meet(client, root):
            return
        while chunk := self._read():
            self._send(client, chunk, root)
            self.sent.offset = chunk.offset
            self._save()
        if self.sent.status == "RUNNING" and not self.sent.runs():
            client.set_terminated(self.sent.run_id, "KILLED", self.sent.time)
            self.sent.status = "KILLED"
            self._save()

    def forget(self) -> None:
        """After a failure, look again whether the run exists."""
        self._known = False

    def _save(self) -> None:
        replace_json(self.record, asdict(self.sent))

    def _read(self) -> _Chunk | None:
        """The next lines of the journal, at most about CHUNK_BYTES of them."""
        chunk = None
        for offset, event in events_of(self.journal, self.sent.offset):
            chunk = chunk or _Chunk(offset)
            chunk.offset = offset
            self.sent.follow(event)
            match event["event"]:
                case "open":
                    chunk.opened = True
                    chunk.params |= event["params"]
                    chunk.tags |= event["tags"]
                case "log":
                    chunk.metrics += [
                        (_name(key), value, event["time"], event["step"]) for key, value in event["values"].items()
                    ]
                case "param":
                    chunk.params |= event["values"]
                case "tag":
                    chunk.tags |= event["values"]
                case "attach":
                    chunk.files.append(event["name"])
                case "dataset":
                    chunk.datasets.append(event)
                case "made_by":
                    chunk.made_by |= event["fingerprints"]
                case "model":
                    chunk.models.append(event)
            if offset - self.sent.offset > CHUNK_BYTES:
                break
        return chunk

    def _send(self, client: Any, chunk: _Chunk, root: Path) -> None:
        from mlflow.entities import Metric, Param, RunTag

        run_id = self.sent.run_id
        metrics = [Metric(*values) for values in chunk.metrics]
        new = {_name(key): value[:6000] for key, value in chunk.params.items()}  # the longest that MLflow takes
        for key in [key for key in new if key in self._params]:
            if new.pop(key) != self._params[key]:
                note(self.journal.parents[1], f"run {run_id}: param {key} changed, but MLflow keeps its first value")
        params = [Param(key, value) for key, value in new.items()]
        tags = [RunTag(_name(key), value[:8000]) for key, value in chunk.tags.items()]
        for start in range(0, len(metrics), 1000):
            client.log_batch(run_id, metrics=metrics[start : start + 1000])
        for start in range(0, max(len(params), len(tags)), 100):
            client.log_batch(run_id, params=params[start : start + 100], tags=tags[start : start + 100])
        self._params |= new
        for name in dict.fromkeys(chunk.files):
            folder = str(PurePosixPath(name).parent)
            client.log_artifact(run_id, str(self.journal.parent / "files" / name), None if folder == "." else folder)
        if chunk.datasets:
            client.log_inputs(run_id, [_dataset_input(event) for event in chunk.datasets])
        if chunk.made_by:
            self._adopt(client, chunk.made_by)
        for offer in chunk.models:
            self._register(client, root, offer)
        if self.sent.status == "RUNNING" and chunk.opened:
            client.update_run(run_id, status="RUNNING")  # a killed run that goes on
        elif self.sent.status != "RUNNING":
            client.set_terminated(run_id, self.sent.status, self.sent.time)
            if twins := self._search(client, client.get_run(run_id).info.experiment_id):
                self._drop_twins(client, twins)

    def _adopt(self, client: Any, fingerprints: dict[str, str]) -> None:
        """List the runs that made a system's artifacts in its description; the training of its prior becomes its child."""
        own = client.get_run(self.sent.run_id)
        view.share(client, own)
        experiment, lines = own.info.experiment_id, []
        for role, fingerprint in fingerprints.items():
            for run in client.search_runs([experiment], f"tags.`tessera.artifact` = '{fingerprint}'"):
                lines.append(f"- {role}: [{run.info.run_name}](#/experiments/{experiment}/runs/{run.info.run_id})")
                if role == "prior" and run.data.tags.get("tessera.in_group"):
                    client.set_tag(run.info.run_id, "mlflow.parentRunId", self.sent.run_id)
                    client.delete_tag(run.info.run_id, "tessera.in_group")
        if lines:
            client.set_tag(self.sent.run_id, "mlflow.note.content", "\n".join(["Made by", *dict.fromkeys(lines)]))

    def _register(self, client: Any, root: Path, offer: dict[str, Any]) -> None:
        from tessera.tracking import registry

        run = client.get_run(self.sent.run_id)
        tags = {key: run.data.tags[key] for key in VERSION_TAGS if key in run.data.tags}
        metrics = {key: f"{value:.4g}" for key, value in run.data.metrics.items() if VERSION_METRICS.fullmatch(key)}
        try:
            done = registry.register(client, self.sent.run_id, self.journal.parent, root, offer, tags | metrics)
        except ArtifactError as error:  # sending it again would not help
            done = f"the model of run {self.sent.run_id} is not registered: {error}"
        note(self.journal.parents[1], done)

    def _meet(self, client: Any, root: Path) -> bool:
        """Find or create the journal's run; False if there is none to write to any more."""
        from mlflow.exceptions import MlflowException

        run = None
        if self.sent.run_id:
            try:
                run = client.get_run(self.sent.run_id)
            except MlflowException as error:
                if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                    raise
                self.sent = _Sent()  # another database than the one that was written to: start over
        if run is None:
            opening = next((event for _, event in events_of(self.journal) if event["event"] == "open"), None)
            if opening is None:
                self._give_up(f"{self.journal} has no opening line, so its run cannot be named; it is left out")
                return False
            run = self._find(client, root, opening)
        if run.info.lifecycle_stage == "deleted":
            self._give_up(f"run {run.info.run_id} was deleted in MLflow; the rest of its journal is left out")
            return False
        self.sent.run_id, self.sent.experiment_id = run.info.run_id, run.info.experiment_id
        self._params, self._known, self._doubt = dict(run.data.params), True, False
        return True

    def _give_up(self, reason: str) -> None:
        note(self.journal.parents[1], reason)
        self.sent.offset, self.sent.status = self.journal.stat().st_size, "DROPPED"
        self._save()

    def _find(self, client: Any, root: Path, opening: dict[str, Any]) -> Any:
        """The run with the journal's uid, created if there is none, never twice."""
        experiment = _experiment(client, root, opening["experiment"])
        found = self._search(client, experiment)
        if not found and self._doubt:
            time.sleep(DOUBT_SECONDS)  # a server that was frozen may be creating it at this moment
            found = self._search(client, experiment)
        if found:
            return self._drop_twins(client, found)
        tags = {
            "tessera.run_uid": self.uid,
            "tessera.kind": opening["kind"],
            "tessera.stage": opening["stage"],
            "mlflow.source.name": opening["stage"],
        }
        if opening["kind"] == "system":
            pass  # the rows that people compare are nobody's children, because MLflow folds those away
        elif opening["parent"]:
            tags["mlflow.parentRunId"] = _run_id(client, experiment, opening["parent"])
        elif opening["kind"] == "stage" and (group := _group(client, experiment)):
            tags |= {"mlflow.parentRunId": group, "tessera.in_group": "true"}
        self._doubt = True
        began = opening["time"] - int(1000 * float(opening["tags"].get(SECONDS, 0)))
        return client.create_run(experiment, began, tags, run_name=_run_name(opening))

    def _search(self, client: Any, experiment: str) -> list[Any]:
        """Runs with this uid; those that the user deleted come last."""
        from mlflow.entities import ViewType

        found = client.search_runs([experiment], f"tags.`tessera.run_uid` = '{self.uid}'", ViewType.ALL)
        return sorted(found, key=lambda run: (run.info.lifecycle_stage == "deleted", run.info.run_id))

    def _drop_twins(self, client: Any, found: list[Any]) -> Any:
        """A frozen server that wakes up may carry out a repeated request twice; keep the run that was written to."""
        kept = next((run for run in found if run.info.run_id == self.sent.run_id), found[0])
        for run in found:
            if run is not kept and run.info.lifecycle_stage != "deleted":
                client.delete_run(run.info.run_id)
        return kept


def _name(key: str) -> str:
    """A key as MLflow allows it: few kinds of characters, and a clean relative path."""
    parts = re.sub(r"[^\w\-./: ]", "_", key)[:250].split("/")
    return "/".join(part for part in parts if part.strip(".")) or "unnamed"


def _run_name(opening: dict[str, Any]) -> str:
    """The stage or system; with the name of its DVC experiment, without which the rows of a sweep would look alike."""
    experiment = opening["tags"].get("dvc.experiment")
    return f"{opening['stage']} ({experiment})" if experiment else opening["stage"]


def _run_id(client: Any, experiment: str, parent: str) -> str:
    """MLflow's id of a parent run, which may be named by its uid or by that id itself."""
    if not re.fullmatch(r"[0-9a-f]{32}", parent):
        raise Refused(f"TESSERA_PARENT_RUN was {parent!r}: expected the uid or the MLflow id of a run, 32 hex digits")
    found = client.search_runs([experiment], f"tags.`tessera.run_uid` = '{parent}'")
    return found[0].info.run_id if found else parent


def _group(client: Any, experiment: str) -> str | None:
    """The run `stages`, the parent below which MLflow folds the stages' runs; None if somebody deleted it."""
    from mlflow.entities import ViewType

    found = client.search_runs([experiment], "tags.`tessera.kind` = 'group'", ViewType.ALL)
    if not found:
        run = client.create_run(experiment, tags={"tessera.kind": "group"}, run_name="stages")
        client.set_terminated(run.info.run_id)
        return run.info.run_id
    left = sorted(run.info.run_id for run in found if run.info.lifecycle_stage != "deleted")
    return left[0] if left else None


def _dataset_input(event: dict[str, Any]) -> Any:
    """An images artifact as MLflow's data set entity."""
    from mlflow.entities import Dataset, DatasetInput, InputTag

    source = json.dumps({"uri": event["path"]})
    digest = event["digest"][:32]  # MLflow takes at most 36 characters
    dataset = Dataset(event["name"], digest, "local", source, schema=None, profile=None)
    return DatasetInput(dataset, [InputTag("mlflow.data.context", event["context"])])


def _experiment(client: Any, root: Path, name: str) -> str:
    experiment = client.get_experiment_by_name(name)
    if experiment is None:
        # Without a server, nothing else chooses an absolute place for files
        place = None if _is_server(tracking_uri(root)) else (root.resolve() / "mlruns" / name).as_uri()
        return client.create_experiment(name, artifact_location=place)
    if experiment.lifecycle_stage == "deleted":
        raise Refused(
            f"experiment {name} was deleted in MLflow: bring it back with "
            f"mlflow experiments restore --experiment-id {experiment.experiment_id}, then: python -m tessera.tracking replay"
        )
    return experiment.experiment_id


def tracking_uri(root: Path) -> str:
    """MLFLOW_TRACKING_URI, or a database in the checkout; relative SQLite paths are relative to the checkout."""
    uri = os.environ.get("MLFLOW_TRACKING_URI") or "sqlite:///mlflow.db"
    scheme, _, path = uri.partition("sqlite:///")
    return f"sqlite:///{root.resolve() / path}" if not scheme and path else uri


def _is_server(uri: str) -> bool:
    return uri.startswith(("http://", "https://", "databricks"))


def note(folder: Path, text: str) -> None:
    """Add a line to the uploader's log, which is all that can be seen of a detached process."""
    log = folder / "uploader.log"
    with contextlib.suppress(OSError):  # a full disk leaves nowhere to say so
        mode = "w" if log.exists() and log.stat().st_size > LOG_BYTES else "a"
        with log.open(mode, encoding="utf-8") as file:
            file.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} [{os.getpid()}] {redact(text)}\n")

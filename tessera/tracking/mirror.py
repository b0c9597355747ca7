"""Mirrors the journals of a checkout into MLflow: live while stages run, later what an outage held back.

MLflow is imported in this folder and nowhere else. What a server has is remembered beside each journal, so that sending
again makes no duplicate.
"""

import argparse
import contextlib
import hashlib
import json
import os
import re
import sys
import time
import traceback
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path, PurePosixPath
from typing import Any

from tessera.artifacts.folder import ArtifactError
from tessera.tracking import load
from tessera.tracking.journal import (
    JOURNAL,
    append_load,
    events_of,
    folder_of,
    is_alive,
    redact,
    replace_json,
    start_uploader,
    uploader_lock,
)

POLL_SECONDS = 2.0
LONGEST_PAUSE_SECONDS = 30.0
DOUBT_SECONDS = 3.0
CHUNK_BYTES = 256_000
LOG_BYTES = 1_000_000
CHAMPION = "champion"
VERSION_TAGS = ("tessera.system", "mlflow.source.git.commit", "git.uncommitted", "dvc.experiment", "protocol")
VERSION_FIGURES = re.compile(r"generation/(fid|fd_[a-z0-9]+|label_agreement|precision|recall|copy_rate)")


class Refused(RuntimeError):
    """MLflow answered, and will not take this journal until somebody acts; one sentence says how."""


@dataclass
class _Sent:
    """How much of a journal a server has, kept beside the journal."""

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
    """Some lines of a journal, sorted by what MLflow takes together."""

    offset: int
    metrics: list[tuple[str, float, int, int]] = field(default_factory=list)
    params: dict[str, str] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)
    files: list[str] = field(default_factory=list)
    datasets: list[dict[str, Any]] = field(default_factory=list)
    models: list[dict[str, Any]] = field(default_factory=list)
    made_by: dict[str, str] = field(default_factory=dict)
    opened: bool = False


class _Mirror:
    """One journal and its run in MLflow. Everything here may be repeated: a server that has a value keeps one of it."""

    def __init__(self, folder: Path, server: str) -> None:
        self.journal = folder / JOURNAL
        self.uid = folder.name
        opening = next((event for _, event in events_of(self.journal)), {})
        self.order = opening.get("time", 0), bool(opening.get("parent"))  # parents first, even in one millisecond
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
        """Note in the journal how much of the machine its process takes, now and then; it costs that process nothing."""
        if not self.alive():
            self._load = None
            return
        if self._load is None:
            self._load = load.Watch(self._ahead.pid)
        if values := self._load.due():
            append_load(self.journal, (time.time_ns() // 1_000_000 - self.order[0]) // 1000, values)

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
        """Send everything that is new. Raises whatever MLflow raises; what was sent until then stays sent."""
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
                _note(self.journal.parents[1], f"run {run_id}: param {key} changed, but MLflow keeps its first value")
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
        """Name the runs that made a system's artifacts in its description; what made its prior, it alone has below it."""
        experiment = client.get_run(self.sent.run_id).info.experiment_id
        lines = []
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
        figures = {key: f"{value:.4g}" for key, value in run.data.metrics.items() if VERSION_FIGURES.fullmatch(key)}
        try:
            done = registry.register(client, self.sent.run_id, self.journal.parent, root, offer, tags | figures)
        except ArtifactError as error:  # sending it again would not help
            done = f"the model of run {self.sent.run_id} is not registered: {error}"
        _note(self.journal.parents[1], done)

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
        _note(self.journal.parents[1], reason)
        self.sent.offset, self.sent.status = self.journal.stat().st_size, "DROPPED"
        self._save()

    def _find(self, client: Any, root: Path, opening: dict[str, Any]) -> Any:
        """The run with the journal's uid, created if need be, never twice."""
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
        return client.create_run(experiment, opening["time"], tags, run_name=_run_name(opening))

    def _search(self, client: Any, experiment: str) -> list[Any]:
        """Runs with this uid, those that the user deleted last."""
        from mlflow.entities import ViewType

        found = client.search_runs([experiment], f"tags.`tessera.run_uid` = '{self.uid}'", ViewType.ALL)
        return sorted(found, key=lambda run: (run.info.lifecycle_stage == "deleted", run.info.run_id))

    def _drop_twins(self, client: Any, found: list[Any]) -> Any:
        """MLflow creates a run again when a frozen server answers a repeated request; keep the one that was written to."""
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
    """The stage or system; of a DVC experiment with its name, or a sweep would be rows that nobody can tell apart."""
    experiment = opening["tags"].get("dvc.experiment")
    return f"{opening['stage']} ({experiment})" if experiment else opening["stage"]


def _run_id(client: Any, experiment: str, parent: str) -> str:
    """MLflow's id of a parent run, which may be named by its uid or by that id itself."""
    if not re.fullmatch(r"[0-9a-f]{32}", parent):
        raise Refused(f"TESSERA_PARENT_RUN was {parent!r}: expected the uid or the MLflow id of a run, 32 hex digits")
    found = client.search_runs([experiment], f"tags.`tessera.run_uid` = '{parent}'")
    return found[0].info.run_id if found else parent


def _group(client: Any, experiment: str) -> str | None:
    """The run `stages`, below which the stages' runs are folded away; None if somebody deleted it."""
    from mlflow.entities import ViewType

    found = client.search_runs([experiment], "tags.`tessera.kind` = 'group'", ViewType.ALL)
    if not found:
        run = client.create_run(experiment, tags={"tessera.kind": "group"}, run_name="stages")
        client.set_terminated(run.info.run_id)
        return run.info.run_id
    left = sorted(run.info.run_id for run in found if run.info.lifecycle_stage != "deleted")
    return left[0] if left else None


def _dataset_input(event: dict[str, Any]) -> Any:
    """An images artifact as MLflow's own data set entity, which needs no import of what made it."""
    from mlflow.entities import Dataset, DatasetInput, InputTag

    source = json.dumps({"uri": event["path"]})
    digest = event["digest"][:32]  # MLflow takes at most 36 characters
    dataset = Dataset(event["name"], digest, "local", source, schema=None, profile=None)
    return DatasetInput(dataset, [InputTag("mlflow.data.context", event["context"])])


def _experiment(client: Any, root: Path, name: str) -> str:
    experiment = client.get_experiment_by_name(name)
    if experiment is None:
        # Without a server there is no one else to choose an absolute place for files
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


def _mirrors(root: Path, known: dict[str, _Mirror]) -> list[_Mirror]:
    """All journals of the checkout, oldest first (parents before children); `known` keeps them from round to round."""
    server = hashlib.sha256(tracking_uri(root).encode()).hexdigest()[:12]
    for journal in folder_of(root).glob(f"*/{JOURNAL}"):
        if journal.parent.name not in known:
            known[journal.parent.name] = _Mirror(journal.parent, server)
    present = {name: mirror for name, mirror in known.items() if mirror.journal.exists()}
    known.clear()
    known.update(sorted(present.items(), key=lambda item: item[1].order))
    return list(known.values())


def _connect(root: Path) -> Any:
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


def _push_all(root: Path, mirrors: list[_Mirror], client: Any) -> tuple[Any, str]:
    """Push every journal that needs it. Returns the client, made when first needed, and a sentence if something failed."""
    trouble = ""
    for mirror in mirrors:
        if not mirror.pending():
            continue
        try:
            client = client or _connect(root)
            mirror.push(client, root)
        except Refused as error:
            trouble = str(error)
        except Exception as error:  # MLflow raises its own, requests', SQLAlchemy's and the operating system's errors
            mirror.forget()
            trouble = f"{redact(tracking_uri(root))} did not take run {mirror.uid} ({type(error).__name__}: {_shorten(error)})"
            if getattr(error, "error_code", "") != "INVALID_PARAMETER_VALUE":  # a server in trouble: spare the others
                return client, trouble
    return client, trouble


def _shorten(error: Exception) -> str:
    text = " ".join(redact(str(error)).split())
    return text if len(text) < 300 else f"{text[:200]} ... {text[-97:]}"


def upload(root: Path, idle_seconds: float) -> None:
    """Mirror the journals until no stage has been running for a while; return at once if another process does it."""
    known: dict[str, _Mirror] = {}
    client, last_trouble, pause = None, "", POLL_SECONDS
    busy_until = time.monotonic() + idle_seconds
    while True:
        with uploader_lock(root) as free:
            if not free:
                return
            while time.monotonic() < busy_until:
                mirrors = _mirrors(root, known)
                for mirror in mirrors:
                    mirror.watch_load()
                pending = any(mirror.pending() for mirror in mirrors)
                client, trouble = _push_all(root, mirrors, client)
                if trouble != last_trouble:
                    _note(folder_of(root), trouble or "the journals are being sent again")
                last_trouble = trouble
                if (pending and not trouble) or any(mirror.alive() for mirror in mirrors):
                    busy_until = time.monotonic() + idle_seconds
                pause = min(2 * pause, LONGEST_PAUSE_SECONDS) if trouble else POLL_SECONDS
                time.sleep(max(0.0, min(pause, busy_until - time.monotonic())))
        # A stage that began just now saw the lock taken and started nobody: look once more after giving it back
        if not any(mirror.alive() for mirror in _mirrors(root, known)):
            return
        busy_until = time.monotonic() + idle_seconds


def replay(root: Path, timeout: float, everything: bool = False) -> int:
    """Send what MLflow lacks and say how much that was. Returns the exit code: 0 if nothing is left."""
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
            waiting = [mirror for mirror in _mirrors(root, {}) if mirror.pending()]
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
                f"metrics stay in {folder_of(root)}, nothing is lost: when MLflow answers again, run "
                "python -m tessera.tracking replay",
                file=sys.stderr,
            )
            return 1
        if not free:
            time.sleep(0.5)
        over = time.monotonic() > deadline  # looked at once more before it is told: all may be sent by now


def _note(folder: Path, text: str) -> None:
    """Add a line to the uploader's log, which is all that can be seen of a detached process."""
    log = folder / "uploader.log"
    with contextlib.suppress(OSError):  # a full disk leaves nowhere to say so
        mode = "w" if log.exists() and log.stat().st_size > LOG_BYTES else "a"
        with log.open(mode, encoding="utf-8") as file:
            file.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} [{os.getpid()}] {redact(text)}\n")


def champion(arguments: argparse.Namespace) -> int:
    """Send what MLflow lacks, then let the registry decide. Codes: 0 decided, 1 MLflow does not answer, 2 refused."""
    if replay(arguments.root, 120.0):
        return 1
    from tessera.params import InvalidParams, read
    from tessera.tracking import registry

    try:
        dataset = arguments.dataset or read(arguments.root / "params.yaml").dataset.name
    except InvalidParams as error:
        print(f"{error}; name the data set by --dataset", file=sys.stderr)
        return 2
    name = f"tessera-{dataset}"
    try:
        client = _connect(arguments.root)
        return registry.crown(client, name, arguments.metric, arguments.lower, arguments.threshold, arguments.dismiss)
    except Exception as error:  # MLflow raises its own, requests', SQLAlchemy's and the operating system's errors
        print(f"{redact(tracking_uri(arguments.root))} did not answer about {name}: {_shorten(error)}", file=sys.stderr)
        return 1


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tessera.tracking", description="Mirror the journals into MLflow.")
    commands = parser.add_subparsers(dest="command", required=True)
    again = commands.add_parser("replay", help="send what MLflow lacks, e.g. after its server was down")
    again.add_argument("--root", type=Path, default=Path())
    again.add_argument("--timeout", type=float, default=120.0, help="seconds to wait for a running uploader")
    again.add_argument("--all", action="store_true", help="send everything again, e.g. after the database was lost")
    live = commands.add_parser("upload", help="mirror the journals live (stages start this by themselves)")
    live.add_argument("--root", type=Path, required=True)
    live.add_argument("--idle-seconds", type=float, default=20.0, help="exit this long after the last stage ended")
    best = commands.add_parser(CHAMPION, help="give the alias champion to the best version of a registered model")
    best.add_argument("--metric", required=True, help="a figure of systems, such as generation/fd_classifier")
    better = best.add_mutually_exclusive_group(required=True)
    better.add_argument("--lower", action="store_true", help="lower is better")
    better.add_argument("--higher", action="store_true", help="higher is better")
    best.add_argument("--threshold", type=float, required=True, help="what a champion has to beat in any case")
    best.add_argument("--dataset", help="the model is called tessera-DATASET; default: that of params.yaml")
    best.add_argument("--dismiss", action="store_true", help="take the alias from a champion of another protocol")
    best.add_argument("--root", type=Path, default=Path())
    arguments = parser.parse_args()
    if arguments.command == CHAMPION:
        return champion(arguments)
    if arguments.command == "replay":
        code = replay(arguments.root, arguments.timeout, arguments.all)
        if folder_of(arguments.root).is_dir() and any(mirror.alive() for mirror in _mirrors(arguments.root, {})):
            start_uploader(arguments.root)  # a stage that began meanwhile found the lock taken
        return code
    os.nice(10)
    try:
        upload(arguments.root, arguments.idle_seconds)
    except Exception:
        _note(folder_of(arguments.root), traceback.format_exc())
        raise
    return 0

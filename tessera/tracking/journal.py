"""The journal of a stage: what it tracks, appended to a file in microseconds, whatever becomes of MLflow.

MLflow takes seconds to import and a dead server blocks its client for minutes, so no stage waits for either. The journal is
authoritative; another process (uploader.py), one per checkout, sends it on, live or later.
"""

import contextlib
import json
import os
import re
import shutil
import sys
import time
import uuid
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from types import TracebackType
from typing import Any, Literal, Self
from urllib.parse import unquote

from tessera.tracking.processes import enabled, folder_of, process_start

Status = Literal["FINISHED", "FAILED", "KILLED"]
JOURNAL = "journal.jsonl"
# User name and password of an address, up to the last @ of a word; of a password with spaces, up to the first @ of the line
CREDENTIALS = re.compile(r"(?<=://)[^/\s]*@|(?<=://)(?!\S*?:\d+(?:[\s/?#]|$))[^/@\s]+:[^@\n]*@")
PARAMETERS = re.compile(r"(?i)([?&;][^=&\s]*(?:token|passw|pwd|secret|key|sig|auth|cred)[^=&\s]*=)[^&#\s\"']*")
ADDRESS = re.compile(r"[a-z][a-z0-9+.-]*://")
SECRET_VARIABLES = re.compile(r"PASSW|SECRET|TOKEN(?!IZ)|_KEY$")
SHORTEST_SECRET = 6  # characters: what is shorter would be found in other words


def open_run(
    stage: str,
    *,
    experiment: str,
    root: Path,
    state: Path | None,
    params: dict[str, Any],
    tags: dict[str, str],
    settings: dict[str, Any] | None = None,
    kind: str = "stage",
) -> "Run":
    """Open the journal of one execution of a stage, or resume the one that `state` (its resume folder) names.

    It is resumed only with the same settings (all that params were chosen from; default: the params), and only if that
    execution did not finish. Kind "system" is for the one row per system that people compare. Never fails for lack of disk
    space or of a server. Raises ValueError if TESSERA_TRACKING is neither on nor off.
    """
    run = Run(stage)
    if not enabled():
        return run
    root = root.resolve()  # a stage may change its working directory
    flat = _flat(params)
    all_settings = _flat(params if settings is None else settings)
    uid = _unfinished(root, state, all_settings) or uuid.uuid4().hex
    run._start(folder_of(root) / uid)
    if state is not None:
        run._guard(lambda: replace_json(state / "run.json", {"run_uid": uid}))
    run._append(
        "open",
        uid=uid,
        stage=stage,
        kind=kind,
        experiment=experiment,
        parent=os.environ.get("TESSERA_PARENT_RUN", ""),
        pid=os.getpid(),
        started=process_start(os.getpid()),
        params=flat,
        settings=all_settings,
        tags={key: redact(str(value)) for key, value in tags.items()},
    )
    return run


class Run:
    """One journal. Its methods take microseconds, and on a full disk they warn once and raise nothing."""

    def __init__(self, stage: str) -> None:
        self.stage = stage
        self.folder: Path | None = None  # none: tracking is off
        self._descriptor: int | None = None
        self._torn = False
        self._warned = False
        self._logged: dict[tuple[str, int], float] = {}  # by the interrupted processes of this run

    @property
    def uid(self) -> str | None:
        """The id that survives kills and resumes, or None while tracking is off."""
        return self.folder.name if self.folder else None

    def log(self, step: int, values: dict[str, float]) -> None:
        """Add a point to each curve. A resumed run that arrives at the same values again leaves them out."""
        new = {key: float(value) for key, value in values.items()}
        if self._logged:
            new = {key: value for key, value in new.items() if self._logged.get((key, step)) != value}
        if new:
            self._append("log", step=int(step), values=new)

    def figures(self, values: dict[str, float]) -> None:
        """Record final numbers, such as a Frechet distance."""
        self.log(0, values)

    def tag(self, values: dict[str, str]) -> None:
        self._append("tag", values={key: redact(str(value)) for key, value in values.items()})

    def param(self, values: dict[str, Any]) -> None:
        self._append("param", values=_flat(values))

    def dataset(self, name: str, digest: str, path: str, context: str) -> None:
        """Name the images that the run reads: the fingerprint of their artifact, and its path in the checkout."""
        self._append("dataset", name=name, digest=digest, path=path, context=context)

    def made_by(self, fingerprints: dict[str, str]) -> None:
        """Name this run's inputs, by role: the fingerprints of artifacts, by which the runs that made them are found."""
        self._append("made_by", fingerprints=fingerprints)

    def offer_model(
        self, name: str, parts: dict[str, Path], prints: dict[str, str], sampling: dict[str, Any], digest: str
    ) -> None:
        """Offer artifact folders, by role, to the registry. Their files are linked, so that nothing later changes them.

        `prints`: the folders' fingerprints; `digest`: one hash of all that makes two models the same.
        """
        place = f"models/{digest[:16]}"
        if self.folder is None or not _registry_enabled():
            return
        if self._guard(lambda: [_link_folder(path, self.folder / place / role) for role, path in parts.items()]):
            paths = {role: path.as_posix() for role, path in parts.items()}
            self._append("model", name=name, digest=digest, place=place, parts=paths, prints=prints, sampling=sampling)

    def attach_json(self, value: Any, name: str) -> None:
        """Write a value as a JSON file beside the journal."""
        if self.folder is not None and self._guard(lambda: replace_json(self.folder / "files" / name, value, 1)):
            self._append("attach", name=name)

    def attach(self, path: Path, name: str | None = None) -> None:
        """Copy a small file (a grid, a table) beside the journal; `name` may hold folders."""
        relative = PurePosixPath(name or path.name)
        if relative.is_absolute() or ".." in relative.parts:
            raise ValueError(f"an attached file cannot be named {name!r}: expected a relative path without '..'")
        if self.folder is not None and self._guard(lambda: _copy(path, self.folder / "files" / relative)):
            self._append("attach", name=str(relative))

    def close(self, status: Status) -> None:
        """End the run; closing it again changes nothing."""
        self._append("close", status=status)
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None or (isinstance(error, SystemExit) and error.code in (None, 0)):
            self.close("FINISHED")
        elif isinstance(error, KeyboardInterrupt) or (isinstance(error, SystemExit) and error.code in (130, 143)):
            self.close("KILLED")
        else:
            self.close("FAILED")

    def _start(self, folder: Path) -> None:
        self.folder = folder
        self._guard(self._open_journal)

    def _open_journal(self) -> None:
        assert self.folder is not None
        self.folder.mkdir(parents=True, exist_ok=True)
        journal = self.folder / JOURNAL
        if journal.exists():
            for _, event in events_of(journal):
                if event["event"] == "log":
                    self._logged |= {(key, event["step"]): value for key, value in event["values"].items()}
            self._torn = journal.stat().st_size > 0  # the killed process may have left half a line
        self._descriptor = os.open(journal, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)

    def _append(self, event: str, **content: Any) -> None:
        """Write one whole line by one system call, so that a kill loses nothing and a reader sees lines only."""
        if self._descriptor is None:
            return
        line = json.dumps({"event": event, "time": time.time_ns() // 1_000_000, **content}) + "\n"
        self._guard(lambda: self._write((("\n" if self._torn else "") + line).encode()))

    def _write(self, data: bytes) -> None:
        assert self._descriptor is not None
        self._torn = True
        written = os.write(self._descriptor, data)
        if written < len(data):
            raise OSError(28, "No space left on device")
        self._torn = False

    def _guard(self, act: Any) -> bool:
        """Try one act of input or output; if it fails, say so the first time, and let the stage continue."""
        try:
            act()
        except OSError as error:
            if not self._warned:
                print(
                    f"{self.stage} lost a part of its tracking ({error.filename or self.folder}: "
                    f"{error.strerror or error}); the stage continues and its results are not affected: free some disk space",
                    file=sys.stderr,
                )
            self._warned = True
            return False
        return True


def _registry_enabled() -> bool:
    return enabled("TESSERA_REGISTRY")


def _unfinished(root: Path, state: Path | None, settings: dict[str, str]) -> str | None:
    """The run that `state` names, unless it came to its end or had other settings: then this is another run."""
    if state is None or not (state / "run.json").is_file():
        return None
    try:
        uid = json.loads((state / "run.json").read_text(encoding="utf-8"))["run_uid"]
        ends = [event for _, event in events_of(folder_of(root) / uid / JOURNAL) if event["event"] in ("open", "close")]
        others = any(event["event"] == "open" and event.get("settings") != settings for event in ends)
    except FileNotFoundError:  # the journal was thrown away, the run in MLflow was not
        return uid
    except (OSError, ValueError, KeyError, TypeError) as error:
        print(f"{state / 'run.json'} cannot be read ({error}), so this is tracked as a new run.", file=sys.stderr)
        return None
    return None if others or (ends and ends[-1].get("status") == "FINISHED") else uid


def events_of(journal: Path, offset: int = 0) -> Iterator[tuple[int, dict[str, Any]]]:
    """The journal's lines from a byte offset on, each with the offset after it."""
    with journal.open("rb") as file:
        file.seek(offset)
        for line in file:
            if not line.endswith(b"\n"):
                return  # still being written, or the last act of a killed process
            offset += len(line)
            try:
                event = json.loads(line)
            except ValueError:
                event = None  # half a line that a killed process left, closed by its successor
            yield offset, event if isinstance(event, dict) and "event" in event else {"event": "nothing"}


def append_load(journal: Path, seconds: int, values: dict[str, float]) -> None:
    """Add what another process measured of the stage: one line by one system call, as the stage itself writes."""
    event = {"event": "log", "time": time.time_ns() // 1_000_000, "step": seconds, "values": values}
    with contextlib.suppress(OSError):
        descriptor = os.open(journal, os.O_WRONLY | os.O_APPEND)
        try:
            os.write(descriptor, f"\n{json.dumps(event)}\n".encode())  # the stage may have left half a line
        finally:
            os.close(descriptor)


def _flat(params: dict[str, Any], above: str = "") -> dict[str, str]:
    """Nested params as MLflow wants them: {"prior": {"width": 8}} becomes {"prior.width": "8"}."""
    flat: dict[str, str] = {}
    for key, value in params.items():
        if isinstance(value, dict):
            flat |= _flat(value, f"{above}{key}.")
        else:
            flat[f"{above}{key}"] = redact(str(value))
    return flat


def redact(text: str) -> str:
    """The text without what may not be read: user names and passwords of addresses, tokens in their queries, and the values
    of this process's own secrets, wherever and however they stand in it."""
    for secret in _own_secrets():
        text = text.replace(f"{secret}@", "").replace(secret, "***")
    return PARAMETERS.sub(r"\1***", CREDENTIALS.sub("", text))


def _own_secrets() -> list[str]:
    """What environment variables say in confidence, the longest first; a pattern cannot know where a password ends."""
    found = set()
    for name, value in os.environ.items():
        if SECRET_VARIABLES.search(name):
            found.add(value)
        if ADDRESS.match(value) and "@" in value:
            login = value.partition("://")[2].rpartition("@")[0]
            found |= {login, login.partition(":")[2]}
    found |= {unquote(secret) for secret in found}
    return sorted((secret for secret in found if len(secret) >= SHORTEST_SECRET), key=len, reverse=True)


def replace_json(path: Path, value: Any, indent: int | None = None) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(json.dumps(value, indent=indent) + "\n", encoding="utf-8")
    temporary.replace(path)


def _copy(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".{target.name}.{os.getpid()}")
    shutil.copyfile(source, temporary)
    temporary.replace(target)  # the uploader may be reading the previous one


def _link_folder(source: Path, target: Path) -> None:
    """The same files under another name, which costs no time and no space; copies where a link cannot be."""
    shutil.rmtree(target, ignore_errors=True)
    for file in sorted(path for path in source.rglob("*") if path.is_file()):
        place = target / file.relative_to(source)
        place.parent.mkdir(parents=True, exist_ok=True)
        try:
            os.link(file.resolve(), place)
        except OSError:
            shutil.copyfile(file, place)

"""Processes of the stack: started in a session of their own, and found again whoever their parents are.

Each member has a mark in its environment that everything below it inherits, so that stopping finds every process, also those
whose parent was killed or that left the session.
"""

import contextlib
import json
import os
import signal
import subprocess
import time
from collections.abc import Collection
from pathlib import Path
from typing import Any

from flows.stack.members import MARK, MEMBERS, POOLS, Settings, Trouble, command, environment, folder_of
from tessera.tracking.journal import replace_json
from tessera.tracking.processes import is_alive, process_start

GRACE_SECONDS = 20.0  # a training saves its state within it
KILL_SECONDS = 5.0
POLL_SECONDS = 0.2
LOG_BYTES = 10_000_000


def read_record(root: Path, member: str) -> dict[str, Any] | None:
    """What is known of a member since it was started, alive or not."""
    try:
        record = json.loads((folder_of(root) / f"{member}.json").read_text(encoding="utf-8"))
        return record if {"pid", "started", "settings"} <= set(record) else None
    except (FileNotFoundError, ValueError, TypeError):
        return None


def runs(root: Path, member: str) -> bool:
    record = read_record(root, member)
    return record is not None and is_alive(record["pid"], record["started"])


def processes_of(root: Path, member: str) -> list[int]:
    """Every process of a member: those with its mark, and those of its session as long as its leader lives."""
    record = read_record(root, member)
    session = record["pid"] if record and is_alive(record["pid"], record["started"]) else None
    mark = f"{MARK}={member}:{root}".encode()
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            is_marked = mark in (entry / "environ").read_bytes().split(b"\0")
            fields = (entry / "stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
        except OSError:
            continue  # it ended meanwhile, or belongs to somebody else
        pid = int(entry.name)
        if (is_marked or int(fields[3]) == session) and fields[0] not in "ZX" and pid != os.getpid():
            found.append(pid)
    return found


def start(settings: Settings, member: str) -> tuple[subprocess.Popen[bytes], int]:
    """Start a member. Returns it, and where in its log it begins to write."""
    folder = folder_of(settings.root)
    log = folder / f"{member}.log"
    if log.exists() and log.stat().st_size > LOG_BYTES:
        log.replace(log.with_suffix(".log.1"))
    with open(log, "ab", opener=private) as output:  # noqa: PTH123  Path.open takes no opener
        offset = output.seek(0, os.SEEK_END)
        process = subprocess.Popen(
            command(settings, member),
            cwd=settings.root,
            env=environment(settings, member, os.environ),
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            umask=-1 if member in POOLS else 0o077,  # the servers' databases are private, data are as the user likes
        )
    record = {"pid": process.pid, "started": process_start(process.pid), "settings": settings.public()}
    replace_json(folder / f"{member}.json", record)
    (folder / f"{member}.json").chmod(0o600)
    return process, offset


def private(path: str, flags: int) -> int:
    return os.open(path, flags, 0o600)


def stop(root: Path, member: str, spared: Collection[int] = ()) -> int:
    """SIGTERM to every process of a member, SIGKILL after the grace period. Returns how many there were."""
    told: set[int] = set()
    began = time.monotonic()
    while left := [pid for pid in processes_of(root, member) if pid not in spared]:
        spent = time.monotonic() - began
        if spent > GRACE_SECONDS + KILL_SECONDS:
            raise Trouble(f"{MEMBERS[member]} does not end, not even by SIGKILL: process {left[0]} may wait for a disk")
        for pid in left:
            if spent > GRACE_SECONDS or pid not in told:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL if spent > GRACE_SECONDS else signal.SIGTERM)
                told.add(pid)
        time.sleep(POLL_SECONDS)
    (folder_of(root) / f"{member}.json").unlink(missing_ok=True)
    return len(told)


def memory_mb(pids: list[int]) -> int:
    pages = 0
    for pid in pids:
        with contextlib.suppress(OSError):
            pages += int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") // 1_000_000

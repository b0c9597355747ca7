"""Images that are read and decoded by as many processes as there are cores; their order is that of the files.

Threads share one lock for all that Pillow does not do in C, and for what becomes of its pixels. Nothing here imports torch, so
that a process starts in a third of a second.
"""

import gc
import hashlib
import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import NamedTuple

import numpy as np

from tessera.artifacts.background import num_cores
from tessera.sources.decoding import pillow_warnings
from tessera.sources.listing import Entry
from tessera.sources.records import Unreadable

Read, Decoder = Callable[[Entry], bytes], Callable[[bytes], np.ndarray]


class Task(NamedTuple):
    """A file that is to be decoded."""

    entry: Entry
    data: bytes | None = None  # of it, if it was read before
    refusal: str = ""  # why it could not be


class Fate(NamedTuple):
    """What became of a file."""

    sha256: str  # of its bytes; "" if they could not be read
    image: np.ndarray | None  # (C, H, W) uint8
    reason: str = ""  # why there is no image


def task(entry: Entry, read: Read, read_now: bool) -> Task:
    """read_now: where the reader cannot be used by several at once."""
    if not read_now:
        return Task(entry)
    try:
        return Task(entry, read(entry))
    except Unreadable as error:
        return Task(entry, refusal=str(error))


def fate(task: Task, read: Read | None, decoder: Decoder) -> Fate:
    """Read, hash and decode a file. read: None, where that was done before."""
    if task.refusal:
        return Fate("", None, task.refusal)
    try:
        data = read(task.entry) if read is not None and task.data is None else task.data
    except Unreadable as error:
        return Fate("", None, str(error))
    sha256 = hashlib.sha256(data).hexdigest()
    try:
        return Fate(sha256, decoder(data))
    except Unreadable as error:
        return Fate(sha256, None, str(error))


def fates(chunks: Iterable[list[Task]], read: Read | None, decoder: Decoder) -> Iterator[list[Fate]]:
    """Of each chunk's files, in order. At most two chunks per process are under way. Raises MemoryError when a process dies."""
    workers = num_cores()
    waiting: deque[tuple[list[Task], Future[list[Fate]]]] = deque()
    # spawn: a fork of a process that has threads, as torch's, may wait for a lock that nobody holds
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(workers, context, initializer=_begin, initargs=(read, decoder))
    try:
        for chunk in chunks:
            waiting.append((chunk, pool.submit(_fates, chunk)))
            if len(waiting) > 2 * workers:
                yield _found(*waiting.popleft())
        while waiting:
            yield _found(*waiting.popleft())
    finally:
        pool.shutdown(cancel_futures=True)


def _found(chunk: list[Task], future: Future[list[Fate]]) -> list[Fate]:
    try:
        return future.result()
    except BrokenProcessPool:
        names = f"{chunk[0].entry.name!r} to {chunk[-1].entry.name!r}" if chunk else "no file"
        raise MemoryError(f"a process that decodes images was killed, perhaps at one of {names}") from None


_given: list = []  # in a process of the pool: the reader, the decoder, and what holds Pillow's warnings


def _begin(read: Read | None, decoder: Decoder) -> None:
    _given[:] = [read, decoder, pillow_warnings()]
    _given[2].__enter__()  # for as long as the process lives
    gc.enable()  # the runner's __main__, which a spawned process imports, turns it off
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the stage hears it too, and ends the pool
    threading.Thread(target=_die_with_parent, daemon=True).start()


def _die_with_parent() -> None:
    """A process of a pool waits for its next task forever when its parent is killed."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _fates(chunk: list[Task]) -> list[Fate]:
    read, decoder, _ = _given
    return [fate(task, read, decoder) for task in chunk]

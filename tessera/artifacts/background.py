"""Reading ahead and writing behind, each in a thread of its own, so that a device does not wait for a disk."""

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Any, TypeVar

Item, Read = TypeVar("Item"), TypeVar("Read")
DEPTH = 2  # items that lie ready, or wait to be written


def num_cores() -> int:
    """That this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def read_ahead(read: Callable[[Item], Read], items: Iterable[Item], depth: int = DEPTH) -> Iterator[Read]:
    """What `read` makes of each item, in their order. An error of it is raised where its item is taken."""
    waiting: deque[Future[Read]] = deque()
    with ThreadPoolExecutor(1) as pool:
        for item in items:
            waiting.append(pool.submit(read, item))
            if len(waiting) > depth:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


class Behind:
    """Calls that are made in their order, later. An error of one is raised by the next `call`, or at the end."""

    def __init__(self, depth: int = DEPTH):
        """depth: of calls that may wait; another one waits with its caller."""
        self.depth = depth
        self._pool = ThreadPoolExecutor(1)
        self._waiting: deque[Future[Any]] = deque()

    def call(self, function: Callable[..., Any], *arguments: Any) -> None:
        while len(self._waiting) >= self.depth:
            self._waiting.popleft().result()
        self._waiting.append(self._pool.submit(function, *arguments))

    def __enter__(self) -> "Behind":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            while kind is None and self._waiting:
                self._waiting.popleft().result()
        finally:
            self._pool.shutdown(cancel_futures=True)

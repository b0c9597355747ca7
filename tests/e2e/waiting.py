"""Waiting for what processes bring about."""

import time
from collections.abc import Callable


def wait_for(what: str, condition: Callable[[], bool], seconds: float) -> float:
    """Wait until it is true; how long that took."""
    began = time.monotonic()
    while not condition():
        assert time.monotonic() < began + seconds, f"{what}: not within {seconds:g} s"
        time.sleep(0.1)
    return time.monotonic() - began

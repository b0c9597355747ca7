"""CPU, memory and GPU use of a process, read from the kernel and the GPU driver by another process.

The names begin with "system/", below which MLflow shows them on a page of their own.
"""

import contextlib
import os
import shutil
import subprocess
import time

import psutil

EVERY_SECONDS = 10.0


class Watch:
    """The load of one process and of those that it started."""

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self._before = time.monotonic(), _spent(_family(pid))  # when, and the CPU seconds until then

    def due(self) -> dict[str, float]:
        """The load since the last call, once in EVERY_SECONDS; {} in between, and after the process has ended."""
        began, spent_then = self._before
        now = time.monotonic()
        if now < began + EVERY_SECONDS:
            return {}
        family = _family(self.pid)
        spent = _spent(family)
        self._before = now, spent
        if not family:
            return {}
        memory = 0
        for one in family:
            with contextlib.suppress(psutil.Error):
                memory += one.memory_info().rss
        return {
            "system/memory_usage_megabytes": memory / 1e6,
            "system/cpu_usage_percentage": max(0.0, 100 * (spent - spent_then) / (now - began)),  # of one core
            **_gpus(),
        }


def _family(pid: int) -> list[psutil.Process]:
    """A process and those that it started; none if it is gone."""
    try:
        main = psutil.Process(pid)
        return [main, *(one for one in main.children(recursive=True) if one.pid != os.getpid())]  # but not the uploader
    except psutil.Error:
        return []


def _spent(family: list[psutil.Process]) -> float:
    seconds = 0.0
    for one in family:
        with contextlib.suppress(psutil.Error):
            seconds += sum(one.cpu_times()[:2])
    return seconds


def _gpus() -> dict[str, float]:
    """Use and memory of each GPU of the machine, by nvidia-smi; none without it."""
    if shutil.which("nvidia-smi") is None:
        return {}
    query = ["nvidia-smi", "--query-gpu=index,utilization.gpu,memory.used", "--format=csv,noheader,nounits"]
    try:
        lines = subprocess.run(query, capture_output=True, text=True, timeout=5).stdout.splitlines()
        rows = [[float(cell) for cell in line.split(",")] for line in lines]
    except (OSError, subprocess.TimeoutExpired, ValueError):
        return {}
    found = {f"system/gpu_{index:.0f}_utilization_percentage": use for index, use, _ in rows}
    return found | {f"system/gpu_{index:.0f}_memory_usage_megabytes": used for index, _, used in rows}

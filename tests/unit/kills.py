"""Work that is killed again and again until it ends by itself, for programs that tests run."""

import os
import random
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

KILLS = 12


def until_done(work: Callable[[], None], log: Path, most: int, seed: int) -> None:
    """Do the work in a child that is killed after it has written 0 to `most` more bytes to the log; end as it ends at last.

    By what it did, and not by a clock, so that it gets on however busy the machine is. Prints the number of kills.
    """
    chance, kills = random.Random(seed), 0
    log.touch()
    while True:
        child = os.fork()
        if child == 0:
            try:
                work()
                os._exit(0)
            except BaseException as error:
                print(repr(error), file=sys.stderr, flush=True)
                os._exit(1)
        if kills < KILLS:
            grown = log.stat().st_size + chance.randint(0, most)
            while log.stat().st_size < grown and not os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT):
                time.sleep(0.001)
            time.sleep(chance.uniform(0, 0.01))
            os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        if not os.WIFSIGNALED(status):
            print("kills", kills)
            sys.exit(os.WEXITSTATUS(status))
        kills += 1

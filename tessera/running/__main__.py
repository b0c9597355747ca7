"""Run a stage of stages/ as a process: python -m tessera.running STAGE [NAME] --OPTION PATH ..."""

import atexit
import gc
import os
import signal
import sys

from tessera.running import parent

status = 0  # of this process, when it ends


def _end() -> None:
    """End here. The interpreter would take torch's million objects down one by one, for one to two seconds (docs/log.md)."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


parent.die_with_it()  # before anything heavy is imported: dvc may be killed meanwhile
gc.disable()  # until all is imported: what it would look for there is not garbage, and takes half a second
# Read once, when torch loads its OpenMP. By default its threads spin while they wait for each other: with anything else
# running on the machine a step of a small network then takes several times as long (docs/log.md). It changes no bit.
os.environ.setdefault("GOMP_SPINCOUNT", "1000")

if __name__ == "__main__":
    atexit.register(_end)  # the first of all exit handlers, so that it runs after the others
    from tessera.running import process

    try:
        process.main(sys.argv[1:])
    except SystemExit as ended:
        status = ended.code if isinstance(ended.code, int) else int(ended.code is not None)
        raise
    except BaseException as error:
        status = 130 if isinstance(error, KeyboardInterrupt) else 1
        raise
    finally:  # whoever is asked to end now is ending; a second exception would only be printed
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, signal.SIG_IGN)

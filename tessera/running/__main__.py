"""Run a stage of stages/ as a process: python -m tessera.running STAGE [NAME] --OPTION PATH ..."""

import atexit
import gc
import os
import sys

from tessera.running import parent

parent.die_with_it()  # before anything heavy is imported: dvc may be killed meanwhile
# A process may be short, and torch is a million objects which stay: collecting garbage among them takes half a second
# while they are imported and one to two at the end (docs/log.md)
gc.disable()
atexit.register(gc.freeze)
# Read once, when torch loads its OpenMP. By default its threads spin while they wait for each other: with anything else
# running on the machine a step of a small network then takes several times as long (docs/log.md). It changes no bit.
os.environ.setdefault("GOMP_SPINCOUNT", "1000")

from tessera.running import process  # noqa: E402

if __name__ == "__main__":
    process.main(sys.argv[1:])

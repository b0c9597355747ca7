"""The nodes of the pipeline, one file each, run as `python -m stages.NAME`."""

import os

# Read once, when torch loads its OpenMP. By default its threads spin while they wait for each other: with anything else
# running on the machine a step of a small network then takes several times as long (docs/log.md). It changes no bit.
os.environ.setdefault("GOMP_SPINCOUNT", "1000")

"""Opening an artifact: CPU and wall seconds of the first time, of the second, and of one with TESSERA_VERIFY=1.

python -m benchmarks.opening [--mebibytes 1024]
"""

import argparse
import os
import tempfile
import time
from pathlib import Path

import numpy as np

from tessera.artifacts import folder, verified


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mebibytes", type=int, default=1024)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=Path()) as place:
        (Path(place) / ".state").mkdir()
        with folder.create(Path(place) / "data/artifact") as out:
            for number in range(8):
                rows = np.random.default_rng(number).integers(0, 256, given.mebibytes * 2**17, np.uint8)
                np.save(out / f"a-{number}.npy", rows)
        time.sleep(1 + verified.SETTLED_SECONDS)
        for name, forced in (("first", "0"), ("second", "0"), ("forced", "1")):
            os.environ[verified.FORCE] = forced
            began, cpu = time.monotonic(), time.process_time()
            folder.check(Path(place) / "data/artifact")
            print(f"{name:7s} {time.process_time() - cpu:7.4f} CPU s, {time.monotonic() - began:7.4f} s")


if __name__ == "__main__":
    main()

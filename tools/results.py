"""The evidence of the default run, kept in docs/results: python -m tools.results (after `make repro`; or `make results`).

What a run writes (dvc.lock, data/metrics) belongs to whoever ran it, and is not shipped. Here stands what this project's own
run gave: its tables, metrics, lock, the hashes of all weights and samples, and the machine. README's table is cut out of it.
"""

import json
import os
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

import torch

from tessera.artifacts import folder as artifact
from tessera.running import origin, progress

OUT = Path("docs/results")
READMES = (Path("README.md"), Path("README.zh.md"))
TABLE = re.compile(r"(?<=<!-- table -->\n\n).*?(?=\n\n<!-- /table -->)", re.DOTALL)
HASHED = ("weights.safetensors", "images-*.npy", "labels-*.npy", "indices-*.npy", "latents-*.npy")


def main() -> None:
    stale = json.loads(run(sys.executable, "-m", "dvc", "status", "--json"))
    if stale:
        raise SystemExit(f"{', '.join(stale)} are not up to date: expected a whole run; make repro first")
    shutil.rmtree(OUT, ignore_errors=True)
    OUT.mkdir(parents=True)
    # copyfile: DVC's outputs are read-only, which what git tracks should not be
    shutil.copytree("data/metrics", OUT / "metrics", copy_function=shutil.copyfile)
    for file in ("comparison.md", "comparison.csv", "differences.csv"):
        shutil.copyfile(f"data/comparison/{file}", OUT / file)
    shutil.copyfile("dvc.lock", OUT / "dvc.lock")
    artifact.write_json(OUT / "sha256.json", hashes(Path("data")))
    artifact.write_json(OUT / "machine.json", machine())
    artifact.write_json(OUT / progress.EXPECTED.name, progress.seconds())  # for the time left that a first run tells
    shutil.copyfile("data/pictures/samples/vqgan-autoregressive.png", "docs/digits.png")
    table = first_table((OUT / "comparison.md").read_text(encoding="utf-8"))
    for readme in READMES:
        text, count = TABLE.subn(lambda _: table, readme.read_text(encoding="utf-8"))
        assert count == 1, f"{readme} has no place for the table"
        readme.write_text(text, encoding="utf-8")


def first_table(markdown: str) -> str:
    """The table of generation, the first in comparison.md."""
    return re.search(r"^\|.*?(?=\n\n)", markdown, re.DOTALL | re.MULTILINE)[0]


def hashes(data: Path) -> dict[str, str]:
    """The sha256 of all weights, samples and tokens, by path."""
    files = sorted(path for pattern in HASHED for path in data.rglob(pattern))
    return {path.as_posix(): artifact.sha256(path) for path in files}


def machine() -> dict[str, str | int]:
    """What bits depend on besides the inputs."""
    return {
        "commit": run("git", "rev-parse", "HEAD").strip(),
        "cpu": origin.cpu(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "threads": _one(figures["threads"] for figures in progress.timings().values() if "threads" in figures),
        "cores": os.cpu_count() or 0,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "date": run("git", "log", "-1", "--format=%cs").strip(),
    }


def _one(values: Iterable[float]) -> int:
    """What is equal in all of them."""
    found = {int(value) for value in values}
    assert len(found) == 1, f"stages ran with {sorted(found)} threads: expected one number; make repro in a clean clone"
    return found.pop()


def run(*command: str) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


if __name__ == "__main__":
    main()

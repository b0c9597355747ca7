"""DVC's outputs take their space once, as links into its cache, and no stage writes through one."""

import hashlib
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
STAGE = """
import sys
from pathlib import Path
from tessera.artifacts import folder, whole

seed = Path("seed.txt").read_text()
with folder.create(Path("out")) as place:
    (place / "a").mkdir()
    for number in range(3):
        (place / f"a/{number}.npy").write_bytes(f"{seed}{number}".encode() * 300_000)
with whole.file(Path("metrics.json")) as beside:
    beside.write_text(seed * 100_000)
"""
DVC_YAML = """
stages:
  make:
    cmd: {python} stage.py
    deps: [seed.txt]
    outs: [out, metrics.json]
"""


def run(folder: Path, *command: str) -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "DVC_NO_ANALYTICS": "1"}
    result = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stdout + result.stderr


def bytes_on_disk(*folders: Path) -> int:
    """Of all files below them, those with several names once."""
    found = {(s.st_dev, s.st_ino): s.st_size for f in folders for p in f.rglob("*") if p.is_file() for s in [p.stat()]}
    return sum(found.values())


@pytest.mark.e2e(seconds=20)
def test_outputs_take_their_space_once_and_what_is_cached_stays_what_it_was(tmp_path):
    run(tmp_path, "git", "init", "--quiet")
    run(tmp_path, sys.executable, "-m", "dvc", "init", "--quiet")
    (tmp_path / ".dvc/config").write_text((ROOT / ".dvc/config").read_text())
    (tmp_path / "stage.py").write_text(STAGE)
    (tmp_path / "dvc.yaml").write_text(DVC_YAML.format(python=sys.executable))
    (tmp_path / "seed.txt").write_text("first")
    run(tmp_path, sys.executable, "-m", "dvc", "repro", "--quiet")
    outputs, cache = tmp_path / "out", tmp_path / ".dvc/cache/files"
    written = [path for path in (*outputs.rglob("*"), tmp_path / "metrics.json") if path.is_file()]
    payload = sum(path.stat().st_size for path in written)
    assert payload > 5e6 and all(path.stat().st_nlink == 2 for path in written)
    assert all(path.stat().st_mode & 0o222 == 0 for path in written)
    assert bytes_on_disk(cache, outputs) <= 1.05 * payload
    (tmp_path / "seed.txt").write_text("other")
    run(tmp_path, sys.executable, "stage.py")  # by hand, over the links
    assert all(path.stat().st_nlink == 1 for path in outputs.rglob("*.npy"))
    cached = [path for path in cache.rglob("*") if path.is_file()]
    assert len(cached) >= 6
    for path in cached:
        assert hashlib.md5(path.read_bytes()).hexdigest() == path.parent.name + path.name.removesuffix(".dir")

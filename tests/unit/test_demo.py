"""make demo: weights of the repository draw what their figures say, into one file, with the core's packages alone."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
from PIL import Image

import tessera

ROOT = Path(__file__).parents[2]
MOST_BYTES = 10 * 2**20


def test_the_demo_draws_its_grid_and_says_what_to_do_next(tmp_path: Path) -> None:
    (tmp_path / "demo").symlink_to(ROOT / "demo")
    command = [sys.executable, "-m", "tools.demo"]
    done = subprocess.run(command, cwd=tmp_path, env={"PYTHONPATH": str(ROOT)}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "make repro" in done.stdout and "make start" in done.stdout
    pixels = np.asarray(Image.open(tmp_path / "demo.png"))
    assert pixels.std() > 30 and {path.name for path in tmp_path.iterdir()} == {"demo", "demo.png"}


def test_the_weights_are_small_and_their_figures_lie_beside_them() -> None:
    folder = ROOT / "demo/mnist"
    assert sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) < MOST_BYTES
    figures = json.loads((folder / "metrics.json").read_text())
    assert figures["generation"]["label_agreement"]["value"] > 0.9
    assert tessera.load(folder, device="cpu").image_shape == (1, 28, 28)

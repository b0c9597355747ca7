"""A whole run at several numbers of images: seconds and the largest memory of each stage, and the disk that it leaves used.

    python -m benchmarks.scale [--images 10000 100000 1000000] [--out scale.png] [--work FOLDER]

The images are 32x32 PNG files in one tar, each another one, in ten classes. A copy of this checkout, with params of tiny
networks that take as many steps whatever the number of images is, runs `dvc repro` from them to the figures of one system and
of `real`. What is left is what grows with the images. `dvc` is what DVC does between stages: hashing, linking, its lock.

CPU seconds are of a stage's process and of those that it starts. Memory is looked at twenty times a second, over the same
processes: `own` is what they have allocated, `resident` counts the pages of mapped files too, which the system may take back
at any time. The table lies beside the plot as a CSV, and rows of other numbers of images that stand in it are kept.
"""

import argparse
import io
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import psutil
import yaml
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image

from tessera.evaluation.curves import STYLE

ROOT = Path(__file__).parents[1]
SIDE, CLASSES, BATCH = 32, 10, 1000
SYSTEM = "vqvae-autoregressive"
TARGETS = (f"evaluate@{SYSTEM}", "evaluate_real")
POLL_SECONDS = 0.05
BETWEEN = "dvc"  # the row of what is no stage
STEPS = {"num_steps": 100, "batch_size": 32}
COLUMNS = ("images", "stage", "seconds", "cpu_seconds", "own_mib", "resident_mib")
ON_DISK = ("source", "data", ".dvc/cache", ".state", "site")  # in this order: what lies in two of them counts once
MIB = 2**20
LEAST_SHOWN = 0.1  # of seconds and MiB


def waves(numbers: np.ndarray) -> np.ndarray:
    """(n, SIDE, SIDE, 3) uint8: bars in the direction of a class; width, phase, colors and noise are each image's own."""
    random = np.random.default_rng(int(numbers[0]))
    angles = (numbers % CLASSES) * np.pi / CLASSES
    rows, columns = np.mgrid[0:SIDE, 0:SIDE].astype(np.float32)
    along = np.cos(angles)[:, None, None] * rows + np.sin(angles)[:, None, None] * columns
    widths, phases = random.uniform(4, 10, (len(numbers), 1, 1)), random.uniform(0, 6.3, (len(numbers), 1, 1))
    bars = np.sin(along * 6.3 / widths + phases)[..., None]
    colors = random.uniform(-90, 90, (len(numbers), 1, 1, 3))
    noise = random.integers(-6, 7, (len(numbers), SIDE, SIDE, 3), np.int8)
    return np.clip(127.5 + bars * colors + noise, 0, 255).astype(np.uint8)


def make(path: Path, number: int) -> None:
    """A tar of so many PNG files, in a folder for each class."""
    with tarfile.open(path, "w") as archive:
        for start in range(0, number, BATCH):
            numbers = np.arange(start, min(start + BATCH, number))
            for each, pixels in zip(numbers, waves(numbers), strict=True):
                out = io.BytesIO()
                Image.fromarray(pixels).save(out, "PNG", compress_level=1)
                member = tarfile.TarInfo(f"class-{each % CLASSES}/{each:08d}.png")
                member.size = out.tell()
                out.seek(0)
                archive.addfile(member, out)
            archive.members.clear()  # tarfile keeps them all, a kilobyte each


def params(source: str) -> dict[str, Any]:
    """The committed params, of one system of tiny networks."""
    found = yaml.safe_load((ROOT / "params.yaml").read_text(encoding="utf-8"))
    found["dataset"] = {
        "kind": "image_folder",
        "name": "scale",
        "source": source,
        "height": SIDE,
        "width": SIDE,
        "channels": 3,
    }
    found["features"] = {"classifier": {"kind": "classifier", "channels": 8, "feature_dim": 32, "training": STEPS}}
    found["tokenizers"] = {
        "vqvae": {
            "kind": "vqvae",
            "quantizer": {"kind": "vector", "codebook_size": 64, "code_dim": 8},
            "patch_size": 4,
            "channels": 8,
            "num_blocks": 1,
            "training": STEPS,
        }
    }
    found["encode_tokens"] |= {"warps": 0, "store_latents": False}
    prior = {"kind": "autoregressive", "width": 32, "depth": 1, "heads": 2, "training": STEPS}
    found["systems"] = {SYSTEM: {"tokenizer": "vqvae", "prior": prior, "sampling": {}}}
    return found


def checkout(folder: Path, source: str) -> None:
    """The tracked files of this checkout as they are, with these params, as a repository of git's and DVC's own."""
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, check=True, capture_output=True, text=True).stdout
    for name in filter(None, listed.split("\0")):
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / name, folder / name)
    (folder / "params.yaml").write_text(yaml.safe_dump(params(source), sort_keys=False), encoding="utf-8")
    identity = ["-c", "user.name=benchmark", "-c", "user.email=benchmark@localhost"]
    for command in (["init", "--quiet"], ["add", "."], [*identity, "commit", "--quiet", "-m", "scale"]):
        subprocess.run(["git", *command], cwd=folder, check=True)


class Usage(NamedTuple):
    """Of some processes at one moment."""

    cpu_seconds: float
    own: int  # bytes
    resident: int

    @staticmethod
    def of(process: psutil.Process, with_children: bool) -> "Usage":
        """Raises psutil.Error if it has ended."""
        cpu, own, resident = 0.0, 0, 0
        for each in [process, *(process.children(recursive=True) if with_children else [])]:
            try:
                with each.oneshot():
                    times, memory = each.cpu_times(), each.memory_info()
            except psutil.Error:
                if each is process:
                    raise
                continue
            cpu += times.user + times.system
            cpu += times.children_user + times.children_system if with_children else 0.0
            own += memory.rss - memory.shared
            resident += memory.rss
        return Usage(cpu, own, resident)

    def most(self, other: "Usage") -> "Usage":
        return Usage(*map(max, self, other))


class Watch:
    """What the stages of one `dvc repro` take."""

    def __init__(self, number: int):
        self.number = number
        self.rows: list[tuple[Any, ...]] = []
        self._of_dvc = Usage(0.0, 0, 0)
        self._began: dict[int, tuple[str, float]] = {}  # a stage's process -> its name, when it began
        self._usage: dict[int, Usage] = {}

    def run(self, command: list[str], folder: Path, environment: dict[str, str]) -> int:
        """The exit code."""
        began = time.monotonic()
        with (
            (folder / "scale.log").open("w") as log,
            subprocess.Popen(command, cwd=folder, env=environment, stdout=log, stderr=subprocess.STDOUT) as dvc,
        ):
            process = psutil.Process(dvc.pid)
            while dvc.poll() is None:
                self._look(process)
                time.sleep(POLL_SECONDS)
        self._end(set())
        self._add(BETWEEN, time.monotonic() - began - sum(row[2] for row in self.rows), self._of_dvc)
        return dvc.returncode

    def _look(self, dvc: psutil.Process) -> None:
        try:
            self._of_dvc = self._of_dvc.most(Usage.of(dvc, with_children=False))
            stages = [(child, name) for child in dvc.children() if (name := stage_of(child))]
            self._end({child.pid for child, _ in stages})
            for child, name in stages:
                self._began.setdefault(child.pid, (name, time.monotonic()))
                known = self._usage.get(child.pid, Usage(0.0, 0, 0))
                self._usage[child.pid] = known.most(Usage.of(child, with_children=True))
        except psutil.Error:  # it ended meanwhile
            return

    def _end(self, alive: set[int]) -> None:
        for pid in self._began.keys() - alive:
            name, began = self._began.pop(pid)
            self._add(name, time.monotonic() - began, self._usage.pop(pid, Usage(0.0, 0, 0)))

    def _add(self, stage: str, seconds: float, used: Usage) -> None:
        row = (self.number, stage, seconds, used.cpu_seconds, used.own / MIB, used.resident / MIB)
        self.rows.append(row)
        print(
            f"{row[0]:>9,} {stage:<36}{row[2]:9.1f} s {row[3]:9.1f} CPU s {row[4]:8.0f} {row[5]:8.0f} MiB", flush=True
        )


def stage_of(process: psutil.Process) -> str:
    """train_prior@NAME of a process that runs it, "" of another one."""
    found = re.search(r" -m tessera\.(?:running|code) (\w+)(?: ([\w-]+))?", " ".join(process.cmdline()))
    if found is None:
        return ""
    stage, key = found.groups()
    stage = "fingerprint_code" if stage == "write" else stage
    return f"{stage}@{key}" if key and not key.startswith("--") else stage


def used(folder: Path) -> dict[str, int]:
    """Bytes on disk of each part of a run, hard links counted where they are met first."""
    known: set[tuple[int, int]] = set()
    found = dict.fromkeys(ON_DISK, 0)
    for part in ON_DISK:
        for path in (folder / part).rglob("*"):
            status = path.lstat()
            if (status.st_dev, status.st_ino) not in known:
                known.add((status.st_dev, status.st_ino))
                found[part] += status.st_blocks * 512
    return found


def measured(number: int, work: Path | None) -> tuple[pd.DataFrame, int]:
    """A row for each stage and part of the disk, and the exit code of `dvc repro`."""
    with tempfile.TemporaryDirectory(dir=work, prefix="scale-") as place:
        folder = Path(place)
        checkout(folder, "source/images.tar")
        (folder / "source").mkdir()
        began = time.process_time()
        make(folder / "source" / "images.tar", number)
        print(f"{number:>9,} images made in {time.process_time() - began:.1f} CPU s", flush=True)
        environment = os.environ | {
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
            "TESSERA_TRACKING": "off",
            "DVC_SITE_CACHE_DIR": str(folder / "site"),
        }
        watch = Watch(number)
        status = watch.run(["dvc", "repro", *TARGETS], folder, environment)
        if status:
            print((folder / "scale.log").read_text()[-3000:], file=sys.stderr)
        rows = pd.DataFrame(watch.rows, columns=list(COLUMNS))
        on_disk = used(folder)
        print(f"{number:>9,} on disk: " + ", ".join(f"{part} {size / MIB:,.0f} MiB" for part, size in on_disk.items()))
        parts = [{"images": number, "stage": part, "disk_mib": size / MIB} for part, size in on_disk.items()]
        return pd.concat([rows, pd.DataFrame(parts)], ignore_index=True), status


def draw(table: pd.DataFrame, path: Path) -> None:
    """Seconds and memory of each stage, and the disk, each over the number of images."""
    panels = {
        "cpu_seconds": "CPU seconds",
        "own_mib": "own memory, MiB",
        "resident_mib": "resident, MiB",
        "disk_mib": "disk, MiB",
    }
    with rc_context(STYLE):
        figure = Figure(figsize=(12, 4.2), layout="constrained")
        all_axes = figure.subplots(1, len(panels))
        for axes, (column, label) in zip(all_axes, panels.items(), strict=True):
            _lines(axes, table[table[column] >= LEAST_SHOWN], column)
            axes.set_ylabel(label)
        handles, names = all_axes[0].get_legend_handles_labels()
        figure.legend(handles, names, loc="outside lower center", ncols=4, frameon=False)
        metadata = {"Date": None, "Creator": None} if path.suffix == ".svg" else None
        figure.savefig(path, metadata=metadata, dpi=120)


def _lines(axes: Axes, table: pd.DataFrame, column: str) -> None:
    for place, (stage, rows) in enumerate(table.groupby("stage", sort=False)):
        rows = rows.sort_values("images")
        style = "-" if place < 10 else "--"
        axes.plot(rows["images"], rows[column], style, marker="o", markersize=3, linewidth=1, label=stage)
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel("images")
    if column == "disk_mib":
        axes.legend(frameon=False)
    if column == "cpu_seconds":  # what is linear is parallel to this
        images = np.array([table["images"].min(), table["images"].max()])
        axes.plot(images, images / images[-1] * table[column].max(), ":", color="0.6", label="linear")
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, nargs="+", default=[10_000, 100_000, 1_000_000])
    parser.add_argument("--out", type=Path, default=Path("scale.png"), help=".png or .svg")
    parser.add_argument("--work", type=Path, help="a folder with room: seven gigabytes for a million images")
    given = parser.parse_args()
    beside = given.out.with_suffix(".csv")
    beside.parent.mkdir(parents=True, exist_ok=True)
    if given.work is not None:
        given.work.mkdir(parents=True, exist_ok=True)
    for number in given.images:
        rows, status = measured(number, given.work)
        known = pd.read_csv(beside) if beside.is_file() else rows.head(0)
        table = pd.concat([known[known["images"] != number], rows], ignore_index=True)
        table.round(2).to_csv(beside, index=False)
        draw(table, given.out)
        if status:
            return status
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""What prepare_images costs for each image: CPU milliseconds in this process and in those that decode, and the largest memory.

    python -m benchmarks.preparing [--files 10000 30000] [--side 400] [--size 64] [--format JPEG]

This process lists, writes and keeps the index; it can feed as many others as its milliseconds go into theirs. Every number of
files is prepared in a process of its own, from a folder that is made for it. Memory is this process's alone.
"""

import argparse
import io
import multiprocessing
import resource
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
from PIL import Image

CLASSES, DIFFERENT = 100, 64


def make(folder: Path, number: int, side: int, form: str) -> None:
    """So many files of images of side x side, of which DIFFERENT differ."""
    random, files = np.random.default_rng(0), []
    for _ in range(DIFFERENT):
        coarse = random.integers(0, 256, (side // 8 + 1, side // 8 + 1, 3), np.uint8)
        out = io.BytesIO()
        Image.fromarray(coarse).resize((side, side), Image.Resampling.BICUBIC).save(out, form)
        files.append(out.getvalue())
    for count in range(number):
        place = folder / f"class-{count % CLASSES:03d}"
        if count < CLASSES:
            place.mkdir(parents=True)
        (place / f"an-image-with-a-name-{count:08d}.{form.lower()}").write_bytes(files[count % DIFFERENT])


def prepare(source: Path, out: Path, size: int, results: multiprocessing.Queue) -> None:
    from stages import prepare_images
    from tessera.datasets import image_folder
    from tessera.running.job import Job

    config = image_folder.Config(kind="image_folder", source=str(source), height=size, width=size)
    job = Job("prepare_images", out.parent / "state")
    job.require_fit = lambda *given: None
    before, began = resource.getrusage(resource.RUSAGE_SELF), time.monotonic()
    prepare_images.run(SimpleNamespace(dataset=config), out, job)
    seconds, own = time.monotonic() - began, resource.getrusage(resource.RUSAGE_SELF)
    others = resource.getrusage(resource.RUSAGE_CHILDREN)
    of_own = own.ru_utime + own.ru_stime - before.ru_utime - before.ru_stime
    results.put((of_own, others.ru_utime + others.ru_stime, seconds, before.ru_maxrss / 1024, own.ru_maxrss / 1024))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--files", type=int, nargs="+", default=[10_000, 30_000])
    parser.add_argument("--side", type=int, default=400, help="pixels of the files")
    parser.add_argument("--size", type=int, default=64, help="pixels of the images that are made")
    parser.add_argument("--format", default="JPEG", dest="form")
    given = parser.parse_args()
    context = multiprocessing.get_context("spawn")
    for number in given.files:
        with tempfile.TemporaryDirectory() as place:
            make(Path(place) / "source", number, given.side, given.form)
            results = context.Queue()
            process = context.Process(
                target=prepare, args=(Path(place) / "source", Path(place) / "images", given.size, results)
            )
            process.start()
            own, others, seconds, before, after = results.get()
            process.join()
        print(
            f"{number:,} files: {1000 * own / number:.3f} ms of this process and {1000 * others / number:.3f} ms of those that "
            f"decode for each, {number / seconds:,.0f} images/s; {after:.0f} MiB at most, {before:.0f} before it began",
            flush=True,
        )


if __name__ == "__main__":
    main()

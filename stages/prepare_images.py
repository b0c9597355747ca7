"""Data set -> images: uint8 shards and labels per split, and index.parquet with the fate of every source file.

Columns of index.parquet: id (order in the source), split, shard (number of the .npy file), row (in the split, as
`Images` counts), label, source, sha256, kept, reason. Files without an image have shard and row -1.
"""

import hashlib
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from tessera.artifacts import folder as artifact
from tessera.artifacts.images import SPLITS, ImageWriter, write_meta
from tessera.components import load
from tessera.contracts import ImageSpec
from tessera.sources.records import Record

BATCH = 256
SECONDS_BETWEEN_LINES = 5.0
COLUMNS = ("id", "split", "shard", "row", "label", "source", "sha256", "kept", "reason")


def run(params: Any, out: Path, job: Any) -> dict[str, float] | None:
    """Write the images artifact of params.dataset. Raises ValueError, before `out` changes, if the data are no use, or if a
    later stage could not work on so many images with these params."""
    config = params.dataset
    dataset = load("datasets", config.kind)
    spec = dataset.spec(config)
    index = _Index()
    said = time.monotonic()
    with artifact.create(out) as folder:
        with ExitStack() as stack:
            writers = {split: stack.enter_context(_Writer(folder, split, spec)) for split in SPLITS}
            for record in dataset.records(config):
                shard, row = (-1, -1) if record.image is None else writers[record.split].append(record)
                index.append(record, shard, row)
                if time.monotonic() - said > SECONDS_BETWEEN_LINES:
                    said = time.monotonic()
                    job.say(f"{len(index.rows):,} files, {index.num_unreadable:,} unreadable")
            counts = {split: writer.num_images for split, writer in writers.items()}
        index.require_readable(config.source, getattr(config, "max_unreadable_fraction", 0.0))
        _require_both_splits(config.source, counts)
        job.require_fit(params, spec, index.labels())
        write_meta(folder, spec, index.sha256.hexdigest(), index.table())
    classes = f"{spec.num_classes} classes" if spec.num_classes > 1 else "no classes"
    job.say(
        f"{counts['train']:,} train + {counts['test']:,} test images {spec.channels}x{spec.height}x{spec.width}, "
        f"{classes}; {index.num_unreadable:,} unreadable"
        f"{f', {index.num_ignored:,} ignored' if index.num_ignored else ''}"
    )
    return {"images": sum(counts.values())}


def _require_both_splits(source: str, counts: dict[str, int]) -> None:
    for split, count in counts.items():
        if count == 0:
            raise ValueError(
                f"{source} gives {sum(counts.values())} images, none of them for the {split} split, expected some in "
                f"either: add images, or change test_fraction or split_seed"
            )


class _Writer:
    """Appends single images of one split, in batches."""

    def __init__(self, folder: Path, split: str, spec: ImageSpec):
        self.writer = ImageWriter(folder, split, spec)
        self.rows_per_shard = max(1, self.writer.images.shard_bytes // (spec.channels * spec.height * spec.width))
        self.held: list[Record] = []
        self.num_images = 0

    def append(self, record: Record) -> tuple[int, int]:
        """The shard and the row that the image takes in its split."""
        row = self.num_images
        self.num_images += 1
        self.held.append(record)
        if len(self.held) == BATCH:
            self._flush()
        return row // self.rows_per_shard, row

    def _flush(self) -> None:
        if self.held:
            images = np.stack([record.image for record in self.held])
            self.writer.append(images, np.array([record.label for record in self.held]))
            self.held = []

    def __enter__(self) -> "_Writer":
        return self

    def __exit__(self, *error: Any) -> None:
        if error[0] is None:
            self._flush()
        self.writer.__exit__(*error)


class _Index:
    """What became of each file."""

    def __init__(self) -> None:
        self.rows: list[tuple] = []
        self.num_unreadable = self.num_ignored = 0
        self.sha256 = hashlib.sha256()  # of the sha256s of all files in their order
        self._examples: dict[str, str] = {}  # reason -> the first file with it

    def append(self, record: Record, shard: int, row: int) -> None:
        kept = record.image is not None
        place = (len(self.rows), record.split, shard, row, record.label)
        self.rows.append((*place, record.source, record.sha256, kept, record.reason))
        self.sha256.update(record.sha256.encode())
        if record.ignored:
            self.num_ignored += 1
        elif not kept:
            self.num_unreadable += 1
            self._examples.setdefault(record.reason, record.source)

    def require_readable(self, source: str, max_unreadable_fraction: float) -> None:
        num_counted = len(self.rows) - self.num_ignored
        if self.num_unreadable > max_unreadable_fraction * num_counted:
            examples = list(self._examples.items())[:5]  # one file per reason says more than five with the same
            raise ValueError(
                f"{source}: {self.num_unreadable:,} of {num_counted:,} files give no image, expected at most a fraction "
                f"of {max_unreadable_fraction}: {'; '.join(f'{name!r} {reason}' for reason, name in examples)}. "
                f"Mend or remove such files, or raise max_unreadable_fraction"
            )

    def labels(self) -> dict[str, np.ndarray]:
        """(N,) of the images of each split."""
        kept = {split: [row[4] for row in self.rows if row[7] and row[1] == split] for split in SPLITS}
        return {split: np.array(labels, np.int64) for split, labels in kept.items()}

    def table(self) -> pd.DataFrame:
        return pd.DataFrame(self.rows, columns=list(COLUMNS))

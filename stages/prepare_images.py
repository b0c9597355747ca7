"""Data set -> images: uint8 (or uint16) shards and labels per split, and index.parquet with the fate of every source file.

Columns of index.parquet: id (order in the source), split, shard (number of the .npy file), row (in the split, as
`Images` counts), label, source, sha256, kept, reason; and captions, a list, and attributes, a JSON object, where the data set
reads metadata. Files without an image have shard and row -1. Vectors and pictures, where it reads such, lie in shards beside
the images.

Memory does not grow with the number of files, and a data set that can be gone on with loses the last shard alone to a kill.
"""

import hashlib
import time
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from tessera.artifacts import captions, shards, shown, vectors, whole
from tessera.artifacts import folder as artifact
from tessera.artifacts.growing import Growing
from tessera.artifacts.images import SPLITS, ImageWriter, write_counts
from tessera.artifacts.shards import labels_of
from tessera.components import load, sets
from tessera.sources.records import Record, Source

BATCH = 256
HELD_ROWS = 8192  # of the index, before they go to disk
TABLE_ROWS = 32_768  # of the index in one piece: a larger one is written part by part
SECONDS_BETWEEN_LINES = 5.0
MOST_EXAMPLES = 5
COLUMNS = ("id", "split", "shard", "row", "label", "source", "sha256", "kept", "reason")


def run(params: Any, out: Path, job: Any) -> dict[str, float] | None:
    """Write the images artifact of params.dataset. Raises ValueError, before `out` changes, if the data are no use, or if a
    later stage could not work on so many images with these params."""
    config = params.dataset
    with _opened(config) as source:
        state = None
        if source.fingerprint:
            state = job.resumable({"dataset": config, "source": source.fingerprint}, parts=(config,))
        with artifact.create(out, begun=None if state is None else state / "images") as folder:
            made = _Made(folder, state, source, job)
            index = made.write()
            counts = {split: writer.num_images for split, writer in made.writers.items()}
            if sets(getattr(config, "metadata", None), "picture"):
                _require_pictures(config, source, index)
            source.require_whole(index.labels)
            index.require_readable(config.source, getattr(config, "max_unreadable_fraction", 0.0))
            _require_both_splits(config.source, counts)
            spec = source.spec
            job.require_fit(params, spec, {split: labels_of(folder / split, spec.num_classes) for split in SPLITS})
            index.write(folder / "index.parquet")
            if sets(config, "metadata"):
                labels = {split: labels_of(folder / split, spec.num_classes) for split in SPLITS}
                job.require_fit(params, spec, labels, captions.said_of(folder))
            write_counts(folder, spec, index.sha256.hexdigest(), counts)
    classes = f"{spec.num_classes} classes" if spec.num_classes > 1 else "no classes"
    job.say(
        f"{counts['train']:,} train + {counts['test']:,} test images {spec.channels}x{spec.height}x{spec.width}, "
        f"{classes}; {index.num_unreadable:,} unreadable"
        f"{f', {index.num_ignored:,} ignored' if index.num_ignored else ''}"
    )
    return {"images": sum(counts.values())}


def _opened(config: Any) -> AbstractContextManager[Source]:
    """A data set that cannot be gone on with is one whose files are few, or arrays."""
    dataset = load("datasets", config.kind)
    if hasattr(dataset, "opened"):
        return dataset.opened(config)
    return nullcontext(Source(dataset.spec(config), "", lambda first: dataset.records(config), lambda labels: None))


def _require_pictures(config: Any, source: Source, index: "_Index") -> None:
    """Raises ValueError with the reasons of files, which tell of pictures, where all that would else be told is that classes
    lack images."""
    index.require_readable(config.source, config.max_unreadable_fraction)
    try:
        source.require_whole(index.labels)
    except ValueError as error:
        found = error if index.labels else f"{config.source}: none of its files gives an image, expected some"
        reasons = "; ".join(f"{name!r} {reason}" for reason, name in index._examples.items())
        raise ValueError(f"{found}{reasons and f': {reasons}'}") from None


def _require_both_splits(source: str, counts: dict[str, int]) -> None:
    for split, count in counts.items():
        if count == 0:
            raise ValueError(
                f"{source} gives {sum(counts.values())} images, none of them for the {split} split, expected some in "
                f"either: add images, or change test_fraction or split_seed"
            )


class _Made:
    """The shards and the index of a data set, from the file on with which a run before this one was killed."""

    def __init__(self, folder: Path, state: Path | None, source: Source, job: Any):
        """state: a folder that survives a kill; None: nothing is to."""
        self.state, self.source, self.job = state, source, job
        record = folder / "never.json" if state is None else state / "images.json"
        self.grown = Growing(folder, record, float("inf") if state is None else job.checkpoint_seconds)
        self.index = _Index(state)
        if self.grown.restored(job.say, self.index.restore) is None:
            self.index = _Index(state)
        self.writers = {split: _Writer(folder, split, source, self.grown) for split in SPLITS}

    def write(self) -> "_Index":
        index, said = self.index, time.monotonic()
        if index.num_rows:
            self.job.say(f"goes on after {index.num_rows:,} files, which were prepared before it was interrupted")
        for record in self.source.records(index.num_rows):
            shard, row = (-1, -1) if record.image is None else self.writers[record.split].append(record)
            index.append(record, shard, row)
            if self.state is not None and (len(index.held) >= HELD_ROWS or self.grown.is_due()):
                for writer in self.writers.values():
                    writer.flush()
                self.grown.keep(index.keep())
            if time.monotonic() - said > SECONDS_BETWEEN_LINES:
                said = time.monotonic()
                self.job.say(f"{index.num_rows:,} files, {index.num_unreadable:,} unreadable")
        for writer in self.writers.values():
            writer.flush()
        self.grown.finish()
        return index


class _Writer:
    """Appends single images of one split, in batches."""

    def __init__(self, folder: Path, split: str, source: Source, grown: Growing):
        spec = source.spec
        self.writer = ImageWriter(folder, split, spec, grown)
        self.rows_per_shard = max(1, shards.SHARD_BYTES // (spec.channels * spec.height * spec.width))
        if sets(spec, "bits"):
            self.rows_per_shard = max(1, shards.SHARD_BYTES // (2 * spec.channels * spec.height * spec.width))
        self.held: list[Record] = []
        self.num_images = grown.num_rows(f"{split}/labels")

    def append(self, record: Record) -> tuple[int, int]:
        """The shard and the row that the image takes in its split."""
        row = self.num_images
        self.num_images += 1
        self.held.append(record)
        if len(self.held) == BATCH:
            self.flush()
        return row // self.rows_per_shard, row

    def flush(self) -> None:
        if self.held:
            images = np.stack([record.image for record in self.held])
            self.writer.append(images, np.array([record.label for record in self.held]))
            if sets(self.held[0].metadata, "embedding"):
                vectors.append(self.writer, self.held)
            if sets(self.held[0].metadata, "picture"):
                shown.append(self.writer, self.held)
            self.held = []


class _Index:
    """What became of each file. Its rows lie in parts in the state's folder, but for the last ones."""

    def __init__(self, state: Path | None):
        self.state = state
        self.held: list[tuple] = []
        self.parts: list[str] = []  # their hashes
        self.num_rows = self.num_unreadable = self.num_ignored = 0
        self.sha256 = hashlib.sha256()  # of the sha256s of all files in their order
        self.labels: set[int] = set()  # of images
        self._examples: dict[str, str] = {}  # reason -> the first file with it, of the first few reasons

    def append(self, record: Record, shard: int, row: int) -> None:
        kept = record.image is not None
        place = (self.num_rows, record.split, shard, row, record.label)
        self.held.append((*place, record.source, record.sha256, kept, record.reason))
        if sets(record, "metadata"):
            self.metadata = True
            self.held[-1] += captions.cells(record.metadata.captions, record.metadata.attributes)
        self.num_rows += 1
        self.sha256.update(record.sha256.encode())
        if kept:
            self.labels.add(record.label)
        elif record.ignored:
            self.num_ignored += 1
        else:
            self.num_unreadable += 1
            if len(self._examples) < MOST_EXAMPLES:  # one file per reason says more than five with the same
                self._examples.setdefault(record.reason, record.source)

    def keep(self) -> dict[str, Any]:
        """Write the rows that are held as another part; what `restore` needs to know."""
        path = self._part(len(self.parts))
        with whole.file(path) as beside:
            self._table(self.held).to_parquet(beside, index=False)
            if sets(self, "metadata"):
                captions.type_as_text(beside)
        self.parts.append(artifact.sha256(path))
        self.held = []
        return {
            "parts": self.parts,
            "labels": sorted(self.labels),
            "examples": list(self._examples.items()),
            "counts": [self.num_rows, self.num_unreadable, self.num_ignored],
        }

    def restore(self, position: dict[str, Any]) -> None:
        """Raises ValueError, naming the part, unless all of them are as they were kept."""
        for number, digest in enumerate(position["parts"]):
            if artifact.sha256(self._part(number)) != digest:
                raise ValueError(f"{self._part(number)} is not what was kept")
            for sha256 in pd.read_parquet(self._part(number), columns=["sha256"]).sha256:
                self.sha256.update(sha256.encode())
        self.parts, self.labels = position["parts"], set(position["labels"])
        self._examples = dict(position["examples"])
        self.num_rows, self.num_unreadable, self.num_ignored = position["counts"]

    def _part(self, number: int) -> Path:
        assert self.state is not None
        return self.state / f"index-{number:05d}.parquet"

    def _table(self, rows: list[tuple]) -> pd.DataFrame:
        if sets(self, "metadata"):
            return pd.DataFrame(rows, columns=[*COLUMNS, *captions.COLUMNS])
        return pd.DataFrame(rows, columns=list(COLUMNS))

    def require_readable(self, source: str, max_unreadable_fraction: float) -> None:
        num_counted = self.num_rows - self.num_ignored
        if self.num_unreadable > max_unreadable_fraction * num_counted:
            raise ValueError(
                f"{source}: {self.num_unreadable:,} of {num_counted:,} files give no image, expected at most a fraction "
                f"of {max_unreadable_fraction}: "
                f"{'; '.join(f'{name!r} {reason}' for reason, name in self._examples.items())}. "
                f"Mend or remove such files, or raise max_unreadable_fraction"
            )

    def write(self, path: Path) -> None:
        """All rows as one table; where they are many, with no more of them in memory than a part has."""
        if self.num_rows <= TABLE_ROWS or not self.parts:
            parts = [pd.read_parquet(self._part(number)) for number in range(len(self.parts))]
            rest = [self._table(self.held)] if self.held or not parts else []
            pd.concat([*parts, *rest]).to_parquet(path, index=False)
            if sets(self, "metadata"):
                captions.type_as_text(path)
            return
        import pyarrow.parquet as pq  # here: few data sets are so large

        if self.held:
            self.keep()
        with pq.ParquetWriter(path, pq.read_schema(self._part(0))) as writer:
            for number in range(len(self.parts)):
                writer.write_table(pq.read_table(self._part(number)))

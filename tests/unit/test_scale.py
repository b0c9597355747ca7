"""Many images: what memory is given back while they are read, and what the benchmark of whole runs makes and counts."""

import hashlib
import os
import re
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks import scale
from tessera.artifacts import shards
from tessera.artifacts.shards import Shards, ShardWriter, in_batches
from tessera.evaluation.judge import Summary


def mapped_kib(folder: Path) -> int:
    """Of this process's memory, what are pages of files in the folder."""
    maps = re.split(r"(?m)^(?=[0-9a-f]+-[0-9a-f]+ )", Path("/proc/self/smaps").read_text())
    return sum(int(re.search(r"^Rss: +(\d+)", one, re.MULTILINE)[1]) for one in maps if str(folder) in one)


@pytest.mark.skipif(not Path("/proc/self/smaps").is_file(), reason="only Linux tells which pages are mapped")
def test_rows_that_were_read_do_not_stay_mapped(tmp_path, monkeypatch):
    rows = np.random.default_rng(0).integers(0, 256, (16_000, 1024), np.uint8)
    with ShardWriter(tmp_path, "x", shard_bytes=4 * 2**20) as writer:
        writer.append(rows)
    monkeypatch.setattr(shards, "AROUND", 0)
    monkeypatch.setattr(shards, "MAPPED_BYTES", 2**20)
    opened = Shards(tmp_path, "x", np.uint8)
    found = np.concatenate(list(in_batches(opened)))
    assert np.array_equal(found, rows) and np.array_equal(opened.all(), rows)
    assert mapped_kib(tmp_path) < 2048
    order = np.random.default_rng(1).permutation(len(rows))
    assert np.array_equal(opened.gather(order), rows[order])


def test_a_summary_keeps_evenly_spread_features_as_they_came():
    features = torch.randn(1003, 4, generator=torch.Generator().manual_seed(0))
    found = Summary(1003, 100)
    for batch in features.split(97):
        found.update(batch)
    assert torch.equal(found.stored, features[torch.from_numpy(found.kept)])
    assert torch.equal(found.features, found.stored.double()) and found.stored.dtype == torch.float32


def test_every_image_of_the_benchmark_is_another_one(tmp_path):
    scale.make(tmp_path / "images.tar", scale.BATCH + 100)
    with tarfile.open(tmp_path / "images.tar") as archive:
        digests = {hashlib.sha256(archive.extractfile(member).read()).digest() for member in archive.getmembers()}
    assert len(digests) == scale.BATCH + 100


def test_a_hard_link_takes_its_space_once(tmp_path):
    for part in ("data", ".dvc/cache"):
        (tmp_path / part).mkdir(parents=True)
    (tmp_path / "data" / "file").write_bytes(b"x" * 2**20)
    os.link(tmp_path / "data" / "file", tmp_path / ".dvc/cache" / "link")
    (tmp_path / ".dvc/cache" / "other").write_bytes(b"x" * 2**20)
    found = scale.used(tmp_path)
    assert found["data"] == found[".dvc/cache"] == 2**20

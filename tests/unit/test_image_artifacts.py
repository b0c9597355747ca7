"""From a data set to the images artifact and back: prepare_images, its index, and what it refuses."""

import hashlib
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from stages import prepare_images
from tessera.artifacts import folder as artifact
from tessera.artifacts import images as image_artifact
from tessera.artifacts import shards
from tessera.artifacts.folder import ArtifactError
from tessera.artifacts.shards import Shards, ShardWriter
from tessera.datasets import digits, image_folder
from tessera.running.job import Job
from tessera.sources import archives, processes
from tessera.sources.listing import Entry, Listing

ROOT = Path(__file__).parents[2]


def prepare(config, out):
    """The lines that the stage says, and what it returns."""
    lines, job = [], Job("prepare_images", out.parent.with_name(f"{out.parent.name}-state"))
    job.say, job.require_fit = lines.append, lambda *given: None
    return lines, prepare_images.run(SimpleNamespace(dataset=config), out, job)


def digits_config(**knobs):
    return digits.Config(kind="digits", source="requirements.lock", **knobs)


def folder_config(source, **knobs):
    return image_folder.Config(kind="image_folder", source=str(source), height=6, width=4, **knobs)


def write_images(folder, number=20, classes=("a", "b")):
    """Lossless images of the size of folder_config, so that pixels survive; {name: (H, W, 3)}."""
    generator = np.random.default_rng(0)
    pixels = {}
    for name in classes:
        (folder / name).mkdir(parents=True)
        for count in range(number):
            array = generator.integers(0, 256, (6, 4, 3), np.uint8)
            Image.fromarray(array).save(folder / name / f"{count}.png")
            pixels[f"{name}/{count}.png"] = array
    return pixels


def files_of(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_float_and_back_is_the_identity_on_all_values():
    values = torch.arange(256, dtype=torch.uint8)
    assert torch.equal(image_artifact.to_uint8(image_artifact.to_float(values)), values)
    assert image_artifact.to_float(values).aminmax() == (-1.0, 1.0)


def test_the_digits_become_an_artifact_that_says_what_it_is(tmp_path):
    lines, figures = prepare(digits_config(upsample=2), tmp_path / "images")
    assert lines == ["1,438 train + 359 test images 1x16x16, 10 classes; 0 unreadable"] and figures == {"images": 1797}
    spec, splits = image_artifact.read(tmp_path / "images")
    assert spec == digits.spec(digits_config(upsample=2))
    assert {split: len(images) for split, images in splits.items()} == {"train": 1438, "test": 359}
    meta = artifact.read_json(tmp_path / "images" / "meta.json")
    assert meta["counts"] == {"train": 1438, "test": 359}


def test_the_index_leads_from_every_file_to_its_pixels_and_back(tmp_path):
    pixels = write_images(tmp_path / "source", number=300)
    out = tmp_path / "images"
    lines, _ = prepare(folder_config(tmp_path / "source"), out)
    index = pd.read_parquet(out / "index.parquet")
    _, splits = image_artifact.read(out)
    assert tuple(index.columns) == ("id", "split", "shard", "row", "label", "source", "sha256", "kept", "reason")
    assert set(index.source) == set(pixels) and index.kept.all() and (index.reason == "").all()
    assert index.id.tolist() == list(range(600))
    for entry in index.itertuples():
        found = splits[entry.split].uint8(np.array([entry.row]))[0].numpy()
        np.testing.assert_array_equal(found.transpose(1, 2, 0), pixels[entry.source])
        assert splits[entry.split].labels[entry.row] == entry.label == "ab".index(entry.source[0])
        assert entry.sha256 == hashlib.sha256((tmp_path / "source" / entry.source).read_bytes()).hexdigest()
    for split, group in index.groupby("split"):
        assert group.row.tolist() == list(range(len(splits[split])))
    together = hashlib.sha256("".join(index.sha256).encode()).hexdigest()
    assert artifact.read_json(out / "meta.json")["source_sha256"] == together


def test_the_shard_of_the_index_is_the_file_that_holds_the_image(tmp_path, monkeypatch):
    monkeypatch.setattr(shards, "SHARD_BYTES", 7 * 72)  # 7 images each
    pixels = write_images(tmp_path / "source")
    prepare(folder_config(tmp_path / "source"), tmp_path / "images")
    index = pd.read_parquet(tmp_path / "images" / "index.parquet")
    assert index.shard.max() == (index.split == "train").sum() // 7 >= 4
    for entry in index.itertuples():
        shard = np.load(tmp_path / "images" / entry.split / f"images-{entry.shard:05d}.npy")
        np.testing.assert_array_equal(shard[entry.row % 7].transpose(1, 2, 0), pixels[entry.source])


def test_the_same_source_gives_the_same_bytes(tmp_path):
    write_images(tmp_path / "source")
    for out in ("one", "two"):
        prepare(folder_config(tmp_path / "source", max_unreadable_fraction=0.5), tmp_path / out)
    assert files_of(tmp_path / "one") == files_of(tmp_path / "two")
    (tmp_path / "source" / "a" / "0.png").write_bytes(b"changed")
    prepare(folder_config(tmp_path / "source", max_unreadable_fraction=0.5), tmp_path / "two")
    assert files_of(tmp_path / "one") != files_of(tmp_path / "two")


def test_unreadable_and_ignored_files_are_in_the_index_and_in_the_report(tmp_path):
    write_images(tmp_path / "source", number=30)
    (tmp_path / "source" / "a" / "cut.png").write_bytes(b"\x89PNG")
    (tmp_path / "source" / "a" / ".DS_Store").touch()
    lines, figures = prepare(folder_config(tmp_path / "source", max_unreadable_fraction=0.02), tmp_path / "images")
    assert "; 1 unreadable, 1 ignored" in lines[0] and figures == {"images": 60}
    index = pd.read_parquet(tmp_path / "images" / "index.parquet").set_index("source")
    assert len(index) == 62
    lost = index.loc[["a/cut.png", "a/.DS_Store"]]
    assert not lost.kept.any() and (lost.row == -1).all() and (lost.shard == -1).all()
    assert lost.reason.str.len().min() > 0
    assert sum(len(images) for images in image_artifact.read(tmp_path / "images")[1].values()) == 60


def test_too_many_unreadable_files_fail_by_name_and_leave_the_old_artifact(tmp_path):
    write_images(tmp_path / "source", number=10)
    prepare(folder_config(tmp_path / "source"), tmp_path / "images")
    before = files_of(tmp_path / "images")
    (tmp_path / "source" / "b" / "text.png").write_text("no image")
    (tmp_path / "source" / "b" / "empty.png").touch()
    with pytest.raises(ValueError, match="2 of 22 files give no image, expected at most a fraction of 0.09") as caught:
        prepare(folder_config(tmp_path / "source", max_unreadable_fraction=0.09), tmp_path / "images")
    assert "'b/text.png' Pillow cannot identify it" in str(caught.value)
    assert "'b/empty.png' is empty" in str(caught.value)
    assert files_of(tmp_path / "images") == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["images", "source"]  # no partial folder
    prepare(folder_config(tmp_path / "source", max_unreadable_fraction=0.1), tmp_path / "images")


def test_the_message_names_at_most_five_files_one_per_reason(tmp_path):
    write_images(tmp_path / "source", number=1)
    for number in range(9):
        out = io.BytesIO()
        Image.new("1", (2000 + number, 100)).save(out, "PNG")
        (tmp_path / "source" / "a" / f"large{number}.png").write_bytes(out.getvalue())
        (tmp_path / "source" / "a" / f"aempty{number}.png").touch()
    with pytest.raises(ValueError) as caught:
        prepare(folder_config(tmp_path / "source", max_pixels=1000), tmp_path / "images")
    assert str(caught.value).count("empty") == 2 and str(caught.value).count("'a/") == 5  # a name and "is empty"


def test_a_source_that_leaves_a_split_empty_is_refused(tmp_path):
    write_images(tmp_path / "source", number=2)
    with pytest.raises(ValueError, match="none of them for the test split.*test_fraction or split_seed"):
        prepare(folder_config(tmp_path / "source", test_fraction=1e-9), tmp_path / "images")
    assert not (tmp_path / "images").exists()


def test_a_missing_or_empty_source_is_refused(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="holds no files"):
        prepare(folder_config(tmp_path / "empty"), tmp_path / "images")
    with pytest.raises(ValueError, match="nowhere does not exist"):
        prepare(folder_config(tmp_path / "nowhere"), tmp_path / "images")
    assert [path.name for path in tmp_path.iterdir()] == ["empty"]


def test_damage_to_an_images_artifact_is_found_on_reading(tmp_path):
    prepare(digits_config(), tmp_path / "images")
    path = tmp_path / "images" / "train" / "images-00000.npy"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(ArtifactError, match="images-00000.npy is damaged"):
        image_artifact.read(tmp_path / "images")


def test_images_of_another_shape_than_the_spec_are_refused_on_reading(tmp_path):
    prepare(digits_config(), tmp_path / "images")
    spec = digits.spec(digits_config(upsample=2))
    with pytest.raises(
        ArtifactError, match=r"holds uint8 of shape \(1438, 1, 8, 8\), expected rows of uint8 \(1, 16, 16\)"
    ):
        image_artifact.Images(tmp_path / "images", "train", spec)


def test_labels_outside_the_classes_are_refused_on_writing(tmp_path):
    writer = image_artifact.ImageWriter(tmp_path, "train", digits.spec(digits_config()))
    for label in (-1, 10):
        with pytest.raises(ValueError, match="outside 0 to 9"):
            writer.append(np.zeros((1, 1, 8, 8), np.uint8), np.array([label]))


def test_rows_come_in_the_order_they_are_asked_for_across_shards(tmp_path):
    rows = np.random.default_rng(0).integers(0, 256, (23, 3, 2), np.uint8)
    with ShardWriter(tmp_path, "x", shard_bytes=5 * 6) as writer:
        for start in range(0, 23, 4):
            writer.append(rows[start : start + 4])
    shards = Shards(tmp_path, "x", np.uint8)
    assert len(shards) == 23 and len(shards.arrays) == 5
    asked = np.array([22, 0, 4, 5, 4, 19])
    np.testing.assert_array_equal(shards.gather(asked), rows[asked])
    np.testing.assert_array_equal(shards.all(), rows)


def test_meta_and_index_hold_no_clock_and_no_path_of_the_machine(tmp_path):
    write_images(tmp_path / "source")
    prepare(folder_config(tmp_path / "source"), tmp_path / "images")
    texts = json.dumps(artifact.read_json(tmp_path / "images" / "meta.json"))
    texts += pd.read_parquet(tmp_path / "images" / "index.parquet").to_csv()
    assert str(tmp_path) not in texts


# Interruptions and many files

KILLED = """
import os, sys, time
from pathlib import Path
sys.path.append("tests/unit")
import kills
from types import SimpleNamespace
from stages import prepare_images
from tessera.artifacts import shards
from tessera.datasets import image_folder
from tessera.running.job import Job

folder, log = Path(sys.argv[1]), os.open(sys.argv[1] + "/log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
shards.SHARD_BYTES, prepare_images.BATCH, prepare_images.HELD_ROWS = 7 * 72, 4, 10
append = prepare_images._Index.append

def slowly(self, *given):
    time.sleep(0.002)
    os.write(log, b"x")
    append(self, *given)

prepare_images._Index.append = slowly

def prepare():
    job = Job("prepare_images", folder / "state")
    job.require_fit = lambda *given: None
    config = image_folder.Config(
        kind="image_folder", source=str(folder / "source"), height=6, width=4, max_unreadable_fraction=0.5
    )
    prepare_images.run(SimpleNamespace(dataset=config), folder / "images", job)

kills.until_done(prepare, folder / "log", most=30, seed=1)
"""


def test_a_preparation_that_is_killed_at_any_moment_goes_on_and_makes_the_same_bytes(tmp_path, monkeypatch):
    write_images(tmp_path / "source", number=60)
    (tmp_path / "source/a/cut.png").write_bytes(b"cut")
    result = subprocess.run(
        [sys.executable, "-c", KILLED, str(tmp_path)], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert result.returncode == 0, result.stderr
    kills, looked_at = int(result.stdout.split()[-1]), len((tmp_path / "log").read_bytes())
    monkeypatch.setattr(shards, "SHARD_BYTES", 7 * 72)
    prepare(folder_config(tmp_path / "source", max_unreadable_fraction=0.5), tmp_path / "whole")
    assert files_of(tmp_path / "images") == files_of(tmp_path / "whole")
    assert kills >= 5 and 121 < looked_at <= 121 + 11 * kills  # ten rows of the index, and the one that filled it


def test_what_was_kept_of_a_source_that_has_changed_or_was_damaged_is_not_gone_on_with(tmp_path, monkeypatch):
    monkeypatch.setattr(prepare_images, "HELD_ROWS", 10)
    write_images(tmp_path / "source")

    def failing(self, source, most):
        raise RuntimeError("killed")

    def interrupted():
        with monkeypatch.context() as patched, pytest.raises(RuntimeError, match="killed"):
            patched.setattr(prepare_images._Index, "require_readable", failing)
            prepare(folder_config(tmp_path / "source"), tmp_path / "images")
        return max((tmp_path.with_name(f"{tmp_path.name}-state")).iterdir(), key=lambda path: path.stat().st_mtime_ns)

    interrupted()
    lines, _ = prepare(folder_config(tmp_path / "source"), tmp_path / "images")
    assert lines[0] == "goes on after 40 files, which were prepared before it was interrupted"
    made = files_of(tmp_path / "images")
    part = interrupted() / "index-00001.parquet"
    part.write_bytes(part.read_bytes()[::-1])
    lines, _ = prepare(folder_config(tmp_path / "source"), tmp_path / "images")
    assert f"is made anew: {part} is not what was kept" in lines[0] and files_of(tmp_path / "images") == made
    interrupted()
    Image.fromarray(np.zeros((6, 4, 3), np.uint8)).save(tmp_path / "source/a/0.png")
    lines, _ = prepare(folder_config(tmp_path / "source"), tmp_path / "images")
    assert len(lines) == 1 and files_of(tmp_path / "images") != made


@pytest.mark.parametrize("packed", [None, "tar", "gztar", "zip"])
def test_processes_make_of_any_source_what_threads_make(tmp_path, packed, monkeypatch):
    write_images(tmp_path / "source", number=40)
    (tmp_path / "source/b/cut.png").write_bytes(b"cut")
    (tmp_path / "source/b/.hidden").touch()
    source = tmp_path / "source"
    if packed:
        source = shutil.make_archive(str(tmp_path / "packed"), packed, source)
    monkeypatch.setattr(processes, "num_cores", lambda: 2)
    monkeypatch.setattr(image_folder, "num_cores", lambda: 2)
    for out, least in (("threads", 10**6), ("processes", 0)):
        monkeypatch.setattr(image_folder, "PROCESSES_FROM", least)
        prepare(folder_config(source, max_unreadable_fraction=0.5), tmp_path / out)
    assert files_of(tmp_path / "threads") == files_of(tmp_path / "processes")


def killed(data):
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_process_that_dies_over_an_image_is_told_with_the_files_it_may_have_been():
    tasks = [[processes.Task(Entry("a.png"), b"a"), processes.Task(Entry("b.png"), b"b")]]
    with pytest.raises(MemoryError, match=r"decodes images was killed, perhaps at one of 'a.png' to 'b.png'"):
        list(processes.fates(tasks, None, killed))


def test_processes_end_when_their_parent_is_killed(tmp_path):
    program = (
        "import os, signal, sys, time; from tessera.sources import processes; from tessera.sources.listing import Entry\n"
        "def tasks():\n"
        "    for _ in range(99): yield [processes.Task(Entry('a'), b'a')]\n"
        "def forever():\n"
        "    for found in processes.fates(tasks(), None, len):\n"
        "        import multiprocessing\n"
        "        print(*[child.pid for child in multiprocessing.active_children()], flush=True)\n"
        "        os.kill(os.getpid(), signal.SIGKILL)\n"
        "forever()\n"
    )
    result = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=60)
    children = [int(pid) for pid in result.stdout.split()]
    assert children and result.returncode == -signal.SIGKILL, result.stderr
    until = time.monotonic() + 10
    while any(Path(f"/proc/{pid}").exists() for pid in children) and time.monotonic() < until:
        time.sleep(0.05)
    assert not any(Path(f"/proc/{pid}").exists() for pid in children)


@pytest.mark.parametrize("held", [7, 16])
def test_an_index_of_many_rows_is_the_same_table_in_row_groups(tmp_path, held, monkeypatch):
    write_images(tmp_path / "source", number=50)
    prepare(folder_config(tmp_path / "source"), tmp_path / "whole")
    monkeypatch.setattr(prepare_images, "HELD_ROWS", held)
    monkeypatch.setattr(prepare_images, "TABLE_ROWS", 20)
    prepare(folder_config(tmp_path / "source"), tmp_path / "images")
    read = [pd.read_parquet(tmp_path / out / "index.parquet") for out in ("whole", "images")]
    pd.testing.assert_frame_equal(*read)
    assert pq.ParquetFile(tmp_path / "images/index.parquet").num_row_groups == -(-100 // held)
    whole, other = files_of(tmp_path / "whole"), files_of(tmp_path / "images")
    assert {name for name in whole if whole[name] != other[name]} == {"index.parquet", "manifest.json"}


def test_a_source_is_listed_once(tmp_path, monkeypatch):
    write_images(tmp_path / "source")
    walks = []
    walk = archives._walk
    monkeypatch.setattr(archives, "_walk", lambda root: walks.append(root) or walk(root))
    prepare(folder_config(tmp_path / "source"), tmp_path / "images")
    assert len(walks) == 1


def test_a_listing_is_in_order_of_name_wherever_one_begins():
    names = ["b", "a/b", "a-b", "a.b", "a/a/c", "\u00fc", "\U0001f600", "\uffff", "B", "a"]
    entries = [Entry(name, number, 2**70 + number) for number, name in enumerate(names)]
    listing = Listing(entries)
    assert [entry.name for entry in listing] == sorted(names) and len(listing) == 10
    assert [entry.place for entry in listing.since(8)] == [names.index(name) for name in sorted(names)[8:]]
    assert [entry.name for entry in Listing(entries, is_sorted=False)] == names
    assert listing.fingerprint == Listing(reversed(entries)).fingerprint
    changed = [*entries[:-1], entries[-1]._replace(version="later")]
    others = [Listing(entries[:-1]), Listing(changed), Listing(entries, version="of the archive")]
    assert len({one.fingerprint for one in (listing, *others)}) == 4

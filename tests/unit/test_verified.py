"""An artifact is hashed once: then nothing but what changed, and whatever changes is seen."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tessera.artifacts import folder as artifact
from tessera.artifacts import verified
from tessera.artifacts.folder import ArtifactError

ROOT = Path(__file__).parents[2]


@pytest.fixture
def hashed(monkeypatch) -> list[str]:
    """The names of the files that are hashed from now on."""
    names, sha256 = [], artifact.sha256
    monkeypatch.setattr(artifact, "sha256", lambda path: names.append(path.name) or sha256(path))
    return names


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """An artifact of three files in a checkout, opened once."""
    monkeypatch.delenv(verified.FORCE, raising=False)
    monkeypatch.setattr(verified, "SETTLED_SECONDS", 0.0)
    (tmp_path / ".state").mkdir()
    with artifact.create(tmp_path / "data/out") as place:
        (place / "train").mkdir()
        for name in ("train/a", "train/b", "c"):
            (place / name).write_text(f"the file {name}" * 100)
    tick()
    return artifact.check(tmp_path / "data/out")


def tick() -> None:
    """Until the file system's clock has moved on."""
    time.sleep(0.02)


def flip(path: Path) -> None:
    """A bit, as a disk would do it: size and time of change are those of before."""
    before = path.stat()
    with path.open("r+b") as file:
        first = file.read(1)[0]
        file.seek(0)
        file.write(bytes([first ^ 4]))
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def test_the_second_time_nothing_is_hashed_and_what_changed_is(folder, hashed):
    artifact.check(folder)
    assert hashed == []
    (folder / "train/b").write_bytes((folder / "train/b").read_bytes())  # the same again
    artifact.check(folder)
    assert hashed == ["b"]
    tick()
    artifact.check(folder)
    artifact.check(folder)
    assert hashed in (["b"], ["b", "b"])  # the first time it may have been written a moment before


@pytest.mark.parametrize("name", ["train/a", "train/b", "c"])
@pytest.mark.parametrize("through", ["itself", "hard link", "symbolic link"])
def test_a_flipped_bit_is_named_though_the_time_of_change_is_set_back(folder, tmp_path, name, through):
    written = folder / name
    if through != "itself":
        written = tmp_path / "cached"
        if through == "hard link":
            os.link(folder / name, written)
        else:
            (folder / name).rename(written)
            (folder / name).symlink_to(written)
        artifact.check(folder)
        tick()
        artifact.check(folder)
    flip(written)
    for _ in range(2):
        with pytest.raises(ArtifactError, match=f"{name} is damaged"):
            artifact.check(folder)


def test_another_file_or_manifest_in_the_place_of_one_is_hashed(folder, hashed, tmp_path):
    content, before = (folder / "c").read_bytes(), (folder / "c").stat()
    (tmp_path / "new").write_bytes(content[:-1] + b"!")
    os.utime(tmp_path / "new", ns=(before.st_atime_ns, before.st_mtime_ns))
    (tmp_path / "new").replace(folder / "c")
    with pytest.raises(ArtifactError, match="c is damaged"):
        artifact.check(folder)
    manifest = artifact.read_json(folder / artifact.MANIFEST)
    artifact.write_json(folder / artifact.MANIFEST, manifest | {"train/a": "0" * 64})
    hashed.clear()
    with pytest.raises(ArtifactError, match="(train/a|c) is damaged"):
        artifact.check(folder)
    assert sorted(hashed) == ["a", "c"]


def test_a_missing_file_and_one_that_is_too_many_are_found(folder):
    (folder / "train/a").unlink()
    with pytest.raises(ArtifactError, match="train/a is damaged: sha256 no file"):
        artifact.check(folder)
    (folder / "d").touch()
    with pytest.raises(ArtifactError, match="d is not among the files"):
        artifact.check(folder)


def test_everything_is_hashed_on_request_and_where_there_is_no_stamp_to_trust(folder, hashed, tmp_path, monkeypatch):
    monkeypatch.setenv(verified.FORCE, "1")
    artifact.check(folder)
    assert sorted(hashed) == ["a", "b", "c"]
    monkeypatch.delenv(verified.FORCE)
    (stamp,) = (tmp_path / ".state" / verified.STAMPS).iterdir()
    for text in ("", "[]", '{"files": []}', '{"files": {"c": 7}}', "[" * 99_999):
        stamp.write_text(text)
        hashed.clear()
        artifact.check(folder)
        assert sorted(hashed) == ["a", "b", "c"]
    moved = folder.rename(tmp_path / "elsewhere")
    hashed.clear()
    artifact.check(moved)
    assert sorted(hashed) == ["a", "b", "c"]
    (tmp_path / ".state").rename(tmp_path / "state")
    for _ in range(2):
        hashed.clear()
        artifact.check(moved)
        assert sorted(hashed) == ["a", "b", "c"]


def test_files_of_a_moment_ago_are_not_vouched_for(folder, hashed, monkeypatch):
    monkeypatch.setattr(verified, "SETTLED_SECONDS", 60.0)
    (folder / "c").write_bytes((folder / "c").read_bytes())
    for _ in range(3):
        artifact.check(folder)
    assert hashed == ["c"] * 3


def test_a_file_that_changes_while_it_is_hashed_is_hashed_again(folder, monkeypatch):
    sha256 = artifact.sha256

    def changed_meanwhile(path):
        found = sha256(path)
        tick()
        flip(path)
        return found

    monkeypatch.setenv(verified.FORCE, "1")
    with monkeypatch.context() as patched:
        patched.setattr(artifact, "sha256", changed_meanwhile)
        artifact.check(folder)
    monkeypatch.delenv(verified.FORCE)
    with pytest.raises(ArtifactError, match="is damaged"):
        artifact.check(folder)


def test_what_cannot_be_written_stops_nobody_and_many_may_write_at_once(folder, tmp_path):
    (stamp,) = (tmp_path / ".state" / verified.STAMPS).iterdir()
    whole = json.loads(stamp.read_text())
    program = "import sys; from tessera.artifacts import folder; [folder.check(sys.argv[1]) for _ in range(40)]"
    environment = {**os.environ, verified.FORCE: "1"}  # each time it is hashed and written
    processes = [subprocess.Popen([sys.executable, "-c", program, folder], cwd=ROOT, env=environment) for _ in range(3)]
    assert [process.wait(60) for process in processes] == [0, 0, 0]
    assert list(stamp.parent.iterdir()) == [stamp]
    assert json.loads(stamp.read_text())["files"].keys() <= whole["files"].keys()
    stamp.unlink()
    stamp.parent.rmdir()
    stamp.parent.touch()  # in the way
    artifact.check(folder)

"""A folder that appears whole or not at all, with the sha256 of each of its files, checked before anyone reads it.

Neither DVC's cache, nor safetensors, nor .npy notice a flipped bit in their payload; the manifest does.
"""

import hashlib
import json
import stat
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tessera.artifacts import whole
from tessera.artifacts.verified import Stamp, version
from tessera.artifacts.whole import ArtifactError, sync

MANIFEST = "manifest.json"
MOST_BYTES = 16 * 2**20  # of a JSON file: 100,000 names of classes take 2, the hashes of 100,000 files 10


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_json(path: Path, value: Any) -> None:
    with whole.file(path) as beside:
        beside.write_text(json.dumps(value, indent=1, sort_keys=True, allow_nan=False) + "\n", encoding="utf-8")


@contextmanager
def create(out: Path, begun: Path | None = None) -> Iterator[Path]:
    """Yield an empty folder beside `out`; when the block ends well, seal it with a manifest and rename it to `out`.

    begun: yield this folder in its place, with what is in it, and leave it when the block fails: what makes the artifact can go
    on there (artifacts/growing.py).
    """
    out = Path(out)
    temporary = begun or out.parent / f".{out.name}.partial"
    with whole.naming(out, temporary, keep=begun is not None):
        if begun is None:
            whole.remove(temporary)
        temporary.mkdir(parents=True, exist_ok=True)
        yield temporary
        files = [path for path in sorted(temporary.rglob("*")) if path.is_file() and path != temporary / MANIFEST]
        write_json(temporary / MANIFEST, {path.relative_to(temporary).as_posix(): sha256(path) for path in files})
        ordinary = stat.S_IMODE((temporary / MANIFEST).stat().st_mode)  # by the umask
        for path in files:
            path.chmod(ordinary)  # safetensors writes through a temporary file, which none but its owner may read
        for path in (*files, temporary / MANIFEST, temporary):
            sync(path)
        whole.remove(out)
        whole.move(temporary, out)


def check(folder: Path) -> Path:
    """Verify every file of an artifact against its manifest and return the folder. Raises ArtifactError naming the file.

    A file that was found good before and has not changed since is not hashed again (artifacts/verified.py).
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ArtifactError(f"{folder} does not exist. {remedy(folder)}")
    manifest = read_json(folder / MANIFEST)
    if not isinstance(manifest, dict) or not manifest:
        raise ArtifactError(
            f"{folder / MANIFEST} names no files, so {folder} is not a whole artifact. {remedy(folder)}"
        )
    unknown = sorted(
        {path.relative_to(folder).as_posix() for path in folder.rglob("*") if not path.is_dir()} - {*manifest, MANIFEST}
    )
    if unknown:
        raise ArtifactError(
            f"{folder / unknown[0]} is not among the files that {folder / MANIFEST} names, and {folder} is to hold no other: "
            f"move it away. {remedy(folder)}"
        )
    stamp = Stamp(folder)
    names = [name for name, digest in manifest.items() if not stamp.vouches(name, digest)]
    before = {name: version(folder / name) for name in names}
    with ThreadPoolExecutor(max_workers=4) as pool:  # hashlib releases the lock, disks like company
        found = list(pool.map(lambda name: sha256(folder / name) if (folder / name).is_file() else "no file", names))
    for name, actual in zip(names, found, strict=True):
        if actual != manifest[name]:
            raise ArtifactError(
                f"{folder / name} is damaged: sha256 {actual}, expected {manifest[name]}. {remedy(folder)}"
            )
    stamp.remember(manifest, before)
    return folder


def fingerprint(folder: Path) -> str:
    """One hash for all files of an artifact: equal folders have equal fingerprints."""
    return sha256(Path(folder) / MANIFEST)


def file_sha256(folder: Path, name: str) -> str:
    """The hash of one file of an artifact, as its manifest has it."""
    return read_json(Path(folder) / MANIFEST)[name]


def part_sha256(folder: Path, part: str) -> str:
    """One hash for the files below a sub-folder of an artifact, from the hashes in its manifest."""
    manifest = read_json(Path(folder) / MANIFEST)
    below = {name: digest for name, digest in manifest.items() if name.startswith(f"{part}/")}
    return hashlib.sha256(json.dumps(below, sort_keys=True).encode()).hexdigest()


def read_json(path: Path) -> Any:
    """What a JSON file says, unchecked. Raises ArtifactError, naming it, if it is too large, nested without end, or no JSON, as
    NaN and Infinity are none."""
    try:
        if path.stat().st_size > MOST_BYTES:
            raise ValueError(f"it has {path.stat().st_size:,} bytes, expected at most {MOST_BYTES:,}")
        return json.loads(path.read_text(encoding="utf-8"), parse_constant=_refuse)
    except (OSError, ValueError, RecursionError) as error:
        raise ArtifactError(f"{path} cannot be read ({error}). {remedy(path.parent)}") from None


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is no number")


def remedy(folder: Path) -> str:
    return f"Make it again with: dvc repro --force --single-item STAGE, where STAGE is the one whose output is {folder}"

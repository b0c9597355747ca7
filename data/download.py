"""Gets a public data set from its own host, checks it against the published checksum, and puts it in a folder.

python data/download.py mnist|fashion-mnist|cifar10 [folder]

Nothing else in this project downloads anything. A file is there whole and checked, or not at all; running the command
again gets only what is missing.
"""

import argparse
import hashlib
import os
import sys
import urllib.request
from http.client import HTTPException
from pathlib import Path
from typing import NamedTuple


class File(NamedTuple):
    address: str
    md5: str  # as its authors publish it: it finds accidents, and a forger would need a second preimage of it


MNIST = "https://ossci-datasets.s3.amazonaws.com/mnist/"
FASHION = "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/"
SETS = {
    "mnist": (
        File(MNIST + "train-images-idx3-ubyte.gz", "f68b3c2dcbeaaa9fbdd348bbdeb94873"),
        File(MNIST + "train-labels-idx1-ubyte.gz", "d53e105ee54ea40749a09fcbcd1e9432"),
        File(MNIST + "t10k-images-idx3-ubyte.gz", "9fb629c4189551a2d022fa330f9573f3"),
        File(MNIST + "t10k-labels-idx1-ubyte.gz", "ec29112dd5afa0611ce80d1b7f02629c"),
    ),
    "fashion-mnist": (
        File(FASHION + "train-images-idx3-ubyte.gz", "8d4fb7e6c68d591d4c3dfef9ec88bf0d"),
        File(FASHION + "train-labels-idx1-ubyte.gz", "25c81989df183df01b3e8a0aad5dffbe"),
        File(FASHION + "t10k-images-idx3-ubyte.gz", "bef4ecab320f06d8554ea6380940ec79"),
        File(FASHION + "t10k-labels-idx1-ubyte.gz", "bb300cfdad3c16e7a12a480ee83cd310"),
    ),
    "cifar10": (File("https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz", "c58f30108f718f92721af3b95e74349a"),),
}
TIMEOUT_SECONDS = 60
MAX_BYTES = 2**30  # the largest has 170 MB


def md5(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()


def fetch(file: File, folder: Path) -> Path:
    """The checked file in the folder, which is made. Raises ValueError, leaving nothing behind."""
    target = folder / file.address.rpartition("/")[2]
    if target.is_file() and md5(target) == file.md5:
        print(f"{target} is there already", flush=True)
        return target
    folder.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f".{target.name}.partial")
    try:
        _download(file.address, partial)
        found = md5(partial)
        if found != file.md5:
            raise ValueError(
                f"{file.address} gave {partial.stat().st_size:,} bytes with md5 {found}, expected {file.md5}: "
                f"run the same command again; if that does not help, the host serves another file"
            )
        partial.replace(target)
    except (OSError, HTTPException) as error:
        raise ValueError(
            f"{file.address} could not be had ({error}), expected a file with md5 {file.md5}: "
            f"run the same command again, or get the file elsewhere and put it at {target}"
        ) from None
    finally:
        partial.unlink(missing_ok=True)
    print(f"{target}  {target.stat().st_size:,} bytes", flush=True)
    return target


def _download(address: str, path: Path) -> None:
    with urllib.request.urlopen(address, timeout=TIMEOUT_SECONDS) as response, path.open("wb") as out:
        num_bytes = 0
        while block := response.read(2**20):
            num_bytes += len(block)
            if num_bytes > MAX_BYTES:
                raise OSError(f"it is longer than {MAX_BYTES:,} bytes")
            out.write(block)
        out.flush()
        os.fsync(out.fileno())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=sorted(SETS))
    parser.add_argument("folder", nargs="?", type=Path, help="default: data/raw/NAME")
    arguments = parser.parse_args()
    folder = arguments.folder or Path(__file__).parent / "raw" / arguments.name
    try:
        for file in SETS[arguments.name]:
            fetch(file, folder)
    except (ValueError, OSError) as error:
        print(f"download failed: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()

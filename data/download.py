"""Gets a data set, the weights of a feature network, or a tokenizer from its own host, checks it, and puts it in a folder.

python data/download.py mnist|fashion-mnist|cifar10|emoji [folder]
python data/download.py inception|dinov2-small|dinov2-base|dinov2-large [folder]
python data/download.py sd-vae-ft-mse|taesd|kandinsky-2-movq|dc-ae-f32c32-in [folder]

Weights of feature networks are published as pickles. They are read once, by PyTorch's unpickler that knows tensors only, and
kept as safetensors, which is all that features read; the line for params.yaml is printed. Tokenizers are safetensors already;
`make tokenizer NAME=taesd` prints their lines too. Emoji are published as sprite sheets: they are cut into the tar of 64x64
pictures with their names in words that presets/emoji.yaml reads.

Nothing else in this project downloads anything. A file is there whole and checked, or not at all; running the command
again gets only what is missing.
"""

import argparse
import hashlib
import io
import json
import os
import sys
import tarfile
import urllib.request
from collections.abc import Iterator
from http.client import HTTPException
from pathlib import Path
from typing import Any, NamedTuple


class File(NamedTuple):
    address: str
    md5: str = ""  # as its authors publish it: it finds accidents, and a forger would need a second preimage of it
    sha256: str = ""  # where there is no md5; neither: nobody tells one, and whatever comes is taken

    @property
    def checksum(self) -> tuple[str, str]:
        return ("md5", self.md5) if self.md5 else ("sha256", self.sha256)


class Weights(NamedTuple):
    file: File
    name: str  # of what it becomes, without .safetensors
    features: str  # what stands before `weights` in params.yaml


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
DINOV2 = "https://dl.fbaipublicfiles.com/dinov2/"
# torch-fidelity's name of the first file has the beginning of its sha256. The authors of DINOv2 publish none: these are
# what other projects name that use the same files.
WEIGHTS = {
    "inception": Weights(
        File(
            "https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/weights-inception-2015-12-05-6726825d.pth",
            sha256="6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2",
        ),
        "inception-v3-fid",
        "kind: inception",
    ),
    "dinov2-small": Weights(
        File(
            DINOV2 + "dinov2_vits14/dinov2_vits14_pretrain.pth",
            sha256="b938bf1bc15cd2ec0feacfe3a1bb553fe8ea9ca46a7e1d8d00217f29aef60cd9",
        ),
        "dinov2-small",
        "kind: dinov2, variant: small",
    ),
    "dinov2-base": Weights(
        File(
            DINOV2 + "dinov2_vitb14/dinov2_vitb14_pretrain.pth",
            sha256="0b8b82f85de91b424aded121c7e1dcc2b7bc6d0adeea651bf73a13307fad8c73",
        ),
        "dinov2-base",
        "kind: dinov2, variant: base",
    ),
    "dinov2-large": Weights(
        File(
            DINOV2 + "dinov2_vitl14/dinov2_vitl14_pretrain.pth",
            sha256="d5383ea8f4877b2472eb973e0fd72d557c7da5d3611bd527ceeb1d7162cbf428",
        ),
        "dinov2-large",
        "kind: dinov2, variant: large",
    ),
}


class Tokenizer(NamedTuple):
    """A folder as the package diffusers writes it. Its config.json is read strictly, and needs no hash."""

    place: str  # a folder on the hub, at a commit
    licence: str = ""  # as its authors state it; "": not known here
    sha256: str = ""  # of the weights, as several independent projects name it

    @property
    def files(self) -> tuple[File, File]:
        weights = File(f"{self.place}/diffusion_pytorch_model.safetensors", sha256=self.sha256)
        return File(f"{self.place}/config.json"), weights


HUB = "https://huggingface.co/"
TOKENIZERS = {
    "sd-vae-ft-mse": Tokenizer(  # AutoencoderKL, 8x8 pixels to 4 channels
        HUB + "stabilityai/sd-vae-ft-mse/resolve/31f26fdeee1355a5c34592e401dd41e45d25a493",
        "MIT",
        "a1d993488569e928462932c8c38a0760b874d166399b14414135bd9c42df5815",
    ),
    "taesd": Tokenizer(  # AutoencoderTiny of the same latents, 10 MB
        HUB + "madebyollin/taesd/resolve/614f76814bbe30edbe2e627ace1c2234c81a2c0e",
        "MIT",
        "db169d69145ec4ff064e49d99c95fa05d3eb04ee453de35824a6d0f325513549",
    ),
    "kandinsky-2-movq": Tokenizer(  # VQModel, 8x8 pixels to one of 16,384 codes
        HUB + "kandinsky-community/kandinsky-2-2-decoder/resolve/9ae140d347fed8ce6e8bb3005dcc1f48543bb8e3/movq",
        "Apache-2.0",
        "43a5860fea195a7116f2471396c5cc9535fade9b63c4857d8a192ffd924b7002",
    ),
    "dc-ae-f32c32-in": Tokenizer(  # AutoencoderDC, 32x32 pixels to 32 channels
        HUB + "mit-han-lab/dc-ae-f32c32-in-1.0-diffusers/resolve/main",
    ),
}


class Sheets(NamedTuple):
    """Sheets of pictures in squares, each with a border of one pixel, and a JSON list of what lies where on them."""

    table: File
    sheets: dict[str, File]  # by style, in the order in which the pictures of an emoji stand in the tar
    side: int  # of a picture without its border


EMOJI_DATA = "https://raw.githubusercontent.com/iamcal/emoji-data/v16.0.0/"
# The project of this address publishes no hashes: these are of the same files in the packages that it releases of this version.
EMOJI = Sheets(
    File(EMOJI_DATA + "emoji.json", sha256="1d602e65be88772bf8cc368ce16b855d719eeddbafe128d471b80203f494d29f"),
    {
        "google": File(
            EMOJI_DATA + "sheet_google_64.png",
            sha256="795a0c598d162c9a4aae23f2188c607b8c9bc1912cb7d84382459f8de91a3ae1",
        ),
        "twitter": File(
            EMOJI_DATA + "sheet_twitter_64.png",
            sha256="daa7711b29897de6bd811a4cfeae911d8d8baa7f7e25c97d9b64354ae425ff5c",
        ),
    },
    side=64,
)
EMOJI_LICENCES = """\
google/: images of Noto Emoji, Copyright Google LLC, Apache-2.0 (https://github.com/googlefonts/noto-emoji)
twitter/: graphics of Twemoji, Copyright Twitter, Inc and other contributors, CC-BY 4.0
  (https://github.com/jdecked/twemoji, https://creativecommons.org/licenses/by/4.0/): name them beside whatever you show
metadata.jsonl: from emoji-data, Copyright 2013 Cal Henderson, MIT (https://github.com/iamcal/emoji-data)
Changed: cut from the sprite sheets of emoji-data 16.0.0, and told in words.
"""
SKIN_TONES = {"1F3FB": "light", "1F3FC": "medium-light", "1F3FD": "medium", "1F3FE": "medium-dark", "1F3FF": "dark"}
TIMEOUT_SECONDS = 60
MAX_BYTES = 2**31  # the largest has 1.2 GB


def checksum(path: Path, kind: str) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.new(kind, usedforsecurity=False)).hexdigest()


def fetch(file: File, folder: Path) -> Path:
    """The checked file in the folder, which is made. Raises ValueError, leaving nothing behind."""
    target = folder / file.address.rpartition("/")[2]
    kind, digest = file.checksum
    if target.is_file() and digest in ("", checksum(target, kind)):
        print(f"{target} is there already", flush=True)
        return target
    folder.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f".{target.name}.partial")
    try:
        _download(file.address, partial)
        found = checksum(partial, kind)
        if digest and found != digest:
            raise ValueError(
                f"{file.address} gave {partial.stat().st_size:,} bytes with {kind} {found}, expected {digest}: "
                f"run the same command again; if that does not help, the host serves another file"
            )
        partial.replace(target)
    except (OSError, HTTPException) as error:
        raise ValueError(
            f"{file.address} could not be had ({error}), expected a file{f' with {kind} {digest}' if digest else ''}: "
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
        expected = response.headers.get("Content-Length")
        if expected and num_bytes != int(expected):
            raise OSError(f"it ended after {num_bytes:,} of {int(expected):,} bytes")
        out.flush()
        os.fsync(out.fileno())


def convert(original: Path, target: Path) -> None:
    """Write the tensors of a checked pickle as safetensors, whole or not at all. Raises ValueError for anything else."""
    import torch  # here because it takes seconds, and data sets do without
    from safetensors.torch import save_file

    try:
        weights = torch.load(original, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged pickle may raise anything
        raise ValueError(f"{original} is no file of tensors that torch.save wrote ({error})") from None
    if not isinstance(weights, dict) or not all(isinstance(value, torch.Tensor) for value in weights.values()):
        raise ValueError(
            f"{original} holds something else than tensors by name, which are what weights are expected to be"
        )
    partial = target.with_name(f".{target.name}.partial")
    try:
        save_file({name: tensor.contiguous() for name, tensor in weights.items()}, partial)
        partial.replace(target)
    finally:
        partial.unlink(missing_ok=True)


def get_weights(weights: Weights, folder: Path) -> None:
    """The safetensors file in the folder, and the line that names it. The published file may lie there already."""
    target = folder / f"{weights.name}.safetensors"
    if target.is_file():
        print(f"{target} is there already", flush=True)
    else:
        convert(fetch(weights.file, folder), target)
        print(f"{target}  {target.stat().st_size:,} bytes; the file it was made from is no longer needed", flush=True)
    digest = checksum(target, "sha256")
    print(f"for params.yaml:\nfeatures: {{{weights.features}, weights: {target}, sha256: {digest}}}")


def get_tokenizer(tokenizer: Tokenizer, folder: Path) -> None:
    """Its two files in the folder, and what params.yaml takes from the second one."""
    _, weights = [fetch(file, folder) for file in tokenizer.files]
    known = tokenizer.licence or "not known here, read it on their page before you use the weights"
    print(f"license, as its authors state it: {known}")
    if not tokenizer.sha256:
        print(
            f"nobody told the sha256 of {weights}: it is {checksum(weights, 'sha256')}; params.yaml keeps it, so that a later "
            f"download is compared with this one"
        )
    print(f"for params.yaml: python -m tessera.sources.diffusers {folder}")


def variants(emoji: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """The emoji and its variants in skin tones: name in words, and what emoji.json says of it."""
    name = emoji["name"].lower()
    yield name, emoji
    for tones, variant in emoji.get("skin_variations", {}).items():
        yield f"{name}, {' and '.join(f'{SKIN_TONES[tone]} skin tone' for tone in tones.split('-'))}", variant


def cut(found: Sheets, table: Path, sheets: dict[str, Path], target: Path) -> int:
    """Write the tar of pictures and their metadata.jsonl, whole or not at all; return the number of pictures.

    Pictures of which the sheet of a style only has those of another one (`has_img_STYLE` is false) are not that style's.
    """
    from PIL import Image  # here because other data sets do without

    rows, members = [], []
    opened = {style: Image.open(path).convert("RGBA") for style, path in sheets.items()}
    for emoji in json.loads(table.read_text(encoding="utf-8")):
        for text, variant in variants(emoji):
            for style, sheet in opened.items():
                if not variant[f"has_img_{style}"]:
                    continue
                left, top = (variant[f"sheet_{axis}"] * (found.side + 2) + 1 for axis in "xy")
                picture = io.BytesIO()
                sheet.crop((left, top, left + found.side, top + found.side)).save(picture, "png")
                row = {"file_name": f"{style}/{variant['image']}", "text": text, "style": style}
                row |= {key: emoji[key] for key in ("category", "subcategory")} | {"unified": variant["unified"]}
                rows.append(json.dumps(row) + "\n")
                members.append((row["file_name"], picture.getvalue()))
    partial = target.with_name(f".{target.name}.partial")
    try:
        with tarfile.open(partial, "w", format=tarfile.USTAR_FORMAT) as tar:
            for name, content in [("metadata.jsonl", "".join(rows).encode()), *members]:
                member = tarfile.TarInfo(name)  # of no time and nobody: the same pictures are the same bytes
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
        partial.replace(target)
    finally:
        partial.unlink(missing_ok=True)
    return len(members)


def get_emoji(found: Sheets, folder: Path) -> None:
    """The tar in the folder, and beside it under which licences; the sheets lie in `emoji-data/` there."""
    target, licences = folder / f"emoji{found.side}.tar", folder / f"emoji{found.side}.licences.txt"
    if target.is_file():
        print(f"{target} is there already", flush=True)
    else:
        table, *sheets = [fetch(file, folder / "emoji-data") for file in (found.table, *found.sheets.values())]
        number = cut(found, table, dict(zip(found.sheets, sheets, strict=True)), target)
        print(f"{target}  {number:,} pictures; the sheets that they were cut from are no longer needed", flush=True)
    licences.write_text(EMOJI_LICENCES, encoding="utf-8")
    print(f"{EMOJI_LICENCES}(also in {licences})\nfor params.yaml: cp presets/emoji.yaml params.yaml")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=sorted([*SETS, *WEIGHTS, *TOKENIZERS, "emoji"]))
    parser.add_argument(
        "folder",
        nargs="?",
        type=Path,
        help="default: data/raw/NAME, data/raw for emoji, data/weights, or data/weights/NAME for a tokenizer",
    )
    arguments = parser.parse_args()
    place = Path(os.path.relpath(Path(__file__).parent))  # as params.yaml names files, from the project's folder
    try:
        if arguments.name in WEIGHTS:
            get_weights(WEIGHTS[arguments.name], arguments.folder or place / "weights")
        if arguments.name in TOKENIZERS:
            get_tokenizer(TOKENIZERS[arguments.name], arguments.folder or place / "weights" / arguments.name)
        if arguments.name == "emoji":
            get_emoji(EMOJI, arguments.folder or place / "raw")
        for file in SETS.get(arguments.name, ()):
            fetch(file, arguments.folder or place / "raw" / arguments.name)
    except (ValueError, OSError) as error:
        print(f"download failed: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()

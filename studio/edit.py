"""Edits image files with a trained system of this checkout: what the shell and the studio's page call.

    python -m studio.edit --system vqgan-masked --inpaint --mask mask.png in.png out.png
    python -m studio.edit --system vae-flow --enhance --set damage=downsample --set factor=2 in.png out.png
    python -m studio.edit --system vqgan-flow --restyle --set target=3 --set strength=0.7 in.png out.png
    python -m studio.edit --system vqgan-flow --interpolate --other b.png --share 0.5 a.png out.png
    python -m studio.edit --system vqgan-flow --sample --label 3 --count 8 --seed 1 out.png
    python -m studio.edit --system vqgan-flow --sample --caption "the digit 7" --count 8 out.png

The image gets the data set's own preprocessing; the result has the size of the input (of a downsampled one: `factor` times
that). Where a mask is white, pixels are drawn anew, and all others come back as they were. `--sample` edits nothing: it draws
images of a label, or of one label after another, and lays them out in rows of ten.
"""

import argparse
import json
import shlex
import sys
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import yaml
from PIL import Image

from tessera import params as all_params
from tessera import plain_yaml, seeding
from tessera.artifacts import pictures
from tessera.artifacts.images import to_uint8
from tessera.bases.conditional import steering_from
from tessera.components import kinds, load, parse
from tessera.editing import words
from tessera.editing.beside import HALFWAY, Beside, require_used
from tessera.editing.left_out import require_told
from tessera.nn.precision import slowness
from tessera.params import Pipeline
from tessera.sources.decoding import decode, pillow_warnings
from tessera.sources.frame import PREPROCESSING, Frame, size_text
from tessera.sources.pictures import decoded
from tessera.sources.records import Unreadable
from tessera.system import System

MAX_BYTES, MAX_PIXELS = 64 * 2**20, 32 * 2**20  # of a file, of its image
ROW = 10  # images side by side


class Request(NamedTuple):
    """One edit of one file, checked: what the same command would do again."""

    system: str
    kind: str
    config: Any  # the edit's Config
    sampling: Any
    usual_sampling: Any  # as params.yaml has it
    label: int | None = None  # of the image; None: nobody knows
    seed: int = 0
    share: float = HALFWAY  # interpolate: of the way to the other image

    def command(self, mask: str = "", other: str = "", source: str = "in.png", target: str = "out.png") -> str:
        """The line for the shell that does it again: what differs from the defaults of params.yaml and of the edit."""
        parts = ["python -m studio.edit", f"--system {self.system}", f"--{self.kind}"]
        parts += [f"--mask {shlex.quote(mask)}"] if mask else []
        parts += [f"--other {shlex.quote(other)}"] if other else []
        parts += [f"--share {self.share}"] if self.kind == "interpolate" and self.share != HALFWAY else []
        parts += [f"--label {self.label}"] if self.label is not None else []
        parts += _options("--set", self.config, parse(type(self.config), _usual(self.kind, self.label), self.kind))
        parts += _options("--sampling", self.sampling, self.usual_sampling)
        return " ".join([*parts, *_seeded(self.seed), shlex.quote(source), shlex.quote(target)])


class Draw(NamedTuple):
    """Images to draw, checked."""

    system: str
    sampling: Any
    usual_sampling: Any  # as params.yaml has it
    label: int | None = None  # None: one label after another
    count: int = 1
    seed: int = 0
    caption: str | None = None  # in the place of a label, or beside it
    negative: str | None = None  # a caption that guidance leads away from
    attributes: dict[str, Any] = {}  # in the place of a caption
    picture: Any = None  # (C, H, W) uint8, in their place: what is shown of it is painted over

    def command(self, target: str = "out.png", picture: str = "in.png") -> str:
        """The line for the shell that does it again. picture: the file of the one that is told."""
        parts = [f"python -m studio.edit --system {self.system} --sample"]
        parts += [f"--label {self.label}"] if self.label is not None else []
        parts += [f"--caption {shlex.quote(self.caption)}"] if self.caption is not None else []
        parts += [f"--attribute {shlex.quote(f'{key}={value}')}" for key, value in self.attributes.items()]
        parts += [f"--negative {shlex.quote(self.negative)}"] if self.negative is not None else []
        parts += [f"--picture {shlex.quote(picture)}"] if self.picture is not None else []
        parts += [f"--count {self.count}"] if self.count != 1 else []
        parts += _options("--sampling", self.sampling, self.usual_sampling)
        return " ".join([*parts, *_seeded(self.seed), shlex.quote(target)])


def _options(option: str, settings: Any, usual: Any) -> list[str]:
    """What differs, as YAML on a line of a shell, which would break a list at its spaces."""
    both = ((key, getattr(settings, key), getattr(usual, key)) for key in type(settings).model_fields)
    changed = {key: value for key, value, known in both if value != known}
    return [f"{option} {shlex.quote(f'{key}={json.dumps(value)}')}" for key, value in changed.items()]


def _seeded(seed: int) -> list[str]:
    return [f"--seed {seed}"] if seed else []


def _usual(kind: str, label: int | None) -> dict[str, Any]:
    """The settings of an edit where nobody gives others: a label that is given is told to the prior."""
    tells = label is not None and "told_label" in load("edits", kind).Config.model_fields
    return {"kind": kind, "told_label": "own"} if tells else {"kind": kind}


def request(
    params: Pipeline,
    system: str,
    kind: str,
    settings: dict[str, Any] | None = None,
    sampling: dict[str, Any] | None = None,
    **other: Any,
) -> Request:
    """Settings are the defaults of the edit's Config but for those given; a label is told to the prior. Raises ValueError."""
    drawn = _sampling(params, system, sampling)
    config = parse(load("edits", kind).Config, _usual(kind, other.get("label")) | (settings or {}), kind)
    made = Request(system, kind, config, *drawn, **other)
    if made.label is not None and not 0 <= made.label < (params.dataset.num_classes or made.label + 1):
        raise ValueError(f"label is {made.label}: expected 0 to {params.dataset.num_classes - 1}")
    if made.label is None and getattr(config, "told_label", "") == "own":
        raise ValueError(
            "told_label is own, but no label is given: expected one, e.g. --label 3, or another told_label"
        )
    if not 0 <= made.share <= 1:
        raise ValueError(f"share is {made.share}: expected 0, the image itself, to 1, the other one")
    return made


def to_draw(params: Pipeline, system: str, sampling: dict[str, Any] | None = None, **other: Any) -> Draw:
    """As `request`, of images that start from nothing."""
    made = Draw(system, *_sampling(params, system, sampling), **other)
    if made.count < 1:
        raise ValueError(f"count is {made.count}: expected at least 1 image")
    condition = getattr(params.systems[system].prior, "condition", None)
    if made.caption is not None and made.label is not None and getattr(condition, "replaces_label", False):
        raise ValueError(
            "a label and a caption are given: expected one of them, as this prior reads a label as a caption"
        )
    given = {"a caption": made.caption, "attributes": made.attributes or None, "a picture": made.picture}
    both = [name for name, one in given.items() if one is not None]
    if len(both) > 1:
        raise ValueError(f"{both[0]} and {both[1]} are given: expected those that the prior was told")
    if made.negative is not None and made.caption is None:
        told = "labels" if condition is None else load("conditions", condition.kind).NAME
        unread = f", but {system} was trained on {told}, not on captions: leave it out"
        why = " without a caption: expected both" if told == "captions" else unread
        raise ValueError(f"a negative caption is given{why}")
    return made


def _sampling(params: Pipeline, system: str, changed: dict[str, Any] | None) -> tuple[Any, Any]:
    """With the changes, and as params.yaml has it."""
    if system not in params.systems:
        raise ValueError(f"there is no system '{system}' in params.yaml: expected one of {', '.join(params.systems)}")
    own = params.sampling(system)
    return parse(type(own), own.model_dump(mode="json") | (changed or {}), f"systems.{system}.sampling"), own


def open_system(params: Pipeline, name: str, root: Path = Path()) -> System:
    """A system of a checkout, from the artifacts where dvc.yaml puts them. Raises ValueError if they are not there."""
    tokenizer = root / "data/tokenizers" / params.systems[name].tokenizer
    return System.read(tokenizer, root / "data/priors" / name, name)


def _as_asked(system: System, sampling: Any) -> System:
    """The system in the precision of the sampling."""
    if told := slowness(sampling.precision, system.device):
        print(told, file=sys.stderr)
    return system.computing_in(sampling.precision)


def read_picture(data: bytes, what: str) -> Image.Image:
    """The image of a file in mode L or RGB. Raises ValueError with the reason for what is none, or too large a one."""
    if len(data) > MAX_BYTES:
        raise ValueError(f"{what} has {len(data):,} bytes, more than {MAX_BYTES:,}: make it smaller")
    try:
        with pillow_warnings():
            pixels = decode(data, channels=3, height=None, width=None, max_pixels=MAX_PIXELS, **PREPROCESSING)
    except Unreadable as reason:
        raise ValueError(f"{what} cannot be read ({reason}): expected a picture such as a PNG or JPEG file") from None
    return Image.fromarray(pixels.transpose(1, 2, 0))


@torch.no_grad()
def draw(system: System, asked: Draw) -> tuple[torch.Tensor, np.ndarray]:
    """Tokens, (B, *index_grid) indices or (B, D, h, w) standardized latents, and (B, C, H, W) uint8 images of them."""
    num_classes = system.spec.num_classes
    if asked.label is not None and not 0 <= asked.label < num_classes:
        raise ValueError(f"label is {asked.label}: expected 0 to {num_classes - 1}")
    told, away = _told(system, asked), words.away_from(system, asked.negative, asked.sampling)
    generator = seeding.generator(asked.seed, "edit_file", device=system.device)
    system = _as_asked(system, asked.sampling)
    with steering_from(system.prior, away):
        tokens = system.prior.sample(told, asked.sampling, generator)
    return tokens.cpu(), to_uint8(system.decode(tokens)).cpu().numpy()


def _told(system: System, asked: Draw) -> torch.Tensor:
    """What the prior is told of each image: labels, or a caption."""
    given = [one for one in (asked.caption, asked.attributes or None, asked.picture) if one is not None]
    if given:
        beside = None if asked.label is None else np.array([asked.label])
        return words.told(system, given, beside).expand(asked.count, -1)
    require_told(system)
    every = torch.from_numpy(system.labels[np.arange(asked.count) % len(system.labels)])
    labels = every if asked.label is None else torch.full((asked.count,), asked.label)
    system.require_trained_on(labels.numpy())
    return labels.to(system.device)


def edit(
    system: System,
    asked: Request,
    params: Pipeline,
    picture: Image.Image,
    mask: Image.Image | None = None,
    other: Image.Image | None = None,
) -> Image.Image:
    """The edited picture. mask: white where pixels are to be drawn anew. Raises ValueError for what does not fit together."""
    if asked.kind == "inpaint" and mask is None:
        raise ValueError("inpaint needs a mask: an image of the size of the input, white where it is to be drawn anew")
    if asked.kind == "interpolate" and other is None:
        raise ValueError("interpolate needs another image to go to")
    if asked.kind == "restyle" and other is not None and asked.config.target is not None:
        raise ValueError(
            "restyle goes to a class or to the look of another image: expected a target or another image, not both"
        )
    if mask is not None and mask.size != picture.size:
        raise ValueError(
            f"the mask is {size_text(mask.size)}, the image {size_text(picture.size)}: expected the same size"
        )
    frame = Frame(params.dataset, picture.size)
    images = frame.tensor(picture).to(system.device)
    label = system.spec.num_classes if asked.label is None else asked.label
    if not 0 <= label <= system.spec.num_classes:
        raise ValueError(f"label is {label}: expected 0 to {system.spec.num_classes - 1}")
    system.require_trained_on([label])
    labels = torch.full((1,), label, device=system.device)
    generator = seeding.generator(asked.seed, "edit_file", device=system.device)
    module, system = load("edits", asked.kind), _as_asked(system, asked.sampling)
    beside = Beside(
        size=(images.shape[2], images.shape[3]),
        mask=frame.mask(mask).to(system.device) if asked.kind == "inpaint" else None,
        others=None if other is None else Frame(params.dataset, other.size).tensor(other).to(system.device),
        share=asked.share,
    )
    factor = 1
    if asked.kind == "enhance" and asked.config.damage == "downsample":
        factor = asked.config.factor
        module.damaged(images, asked.config)  # refuses a factor that does not divide the models' size
        images = Frame(params.dataset, picture.size, factor).tensor(picture).to(system.device)
    given = (system, asked.config, asked.sampling, generator)
    edited = module.edit(images, labels, *given, *beside.arguments(asked.kind))
    if asked.kind == "enhance":
        picture = picture.resize((picture.width * factor, picture.height * factor), Image.Resampling.BICUBIC)
        frame = Frame(params.dataset, picture.size)
    return frame.put_back(picture, edited, mask if asked.kind == "inpaint" else None)


def _parser() -> argparse.ArgumentParser:
    plain = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(prog="python -m studio.edit", description=__doc__, formatter_class=plain)
    parser.add_argument("--system", required=True, help="a system of params.yaml that is trained")
    kind = parser.add_mutually_exclusive_group(required=True)
    kind.add_argument(
        "--sample", dest="kind", action="store_const", const="sample", help="draw images, without an input"
    )
    for name in kinds("edits"):
        kind.add_argument(f"--{name}", dest="kind", action="store_const", const=name)
    parser.add_argument("--mask", type=Path, help="inpaint: an image, white where pixels are to be drawn anew")
    parser.add_argument(
        "--other", type=Path, help="interpolate: the image to go to; restyle: the one whose look is wanted"
    )
    parser.add_argument("--share", type=float, default=HALFWAY, help="interpolate: of the way to the other image")
    parser.add_argument(
        "--label", type=int, help="of the image, if it is known; sample: to draw, else one after another"
    )
    parser.add_argument("--caption", help="sample: what to draw, in words, of a prior that learned captions")
    parser.add_argument(
        "--attribute",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="sample: what to draw, of a prior of attributes",
    )
    parser.add_argument(
        "--picture", type=Path, help="sample: an image, of which is shown what the prior was told of images"
    )
    parser.add_argument("--negative", help="sample: a caption that guidance leads away from")
    parser.add_argument("--count", type=int, default=1, help="sample: number of images")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="a setting of the edit")
    parser.add_argument(
        "--sampling", action="append", default=[], metavar="KEY=VALUE", help="a setting of the sampling"
    )
    parser.add_argument("input", type=Path, nargs="?", help="an image; none with --sample")
    parser.add_argument("output", type=Path)
    return parser


def main(arguments: list[str]) -> int:
    given = _parser().parse_args(arguments)
    try:
        if (given.input is None) != (given.kind == "sample"):
            raise ValueError("an edit needs an input and an output, --sample an output alone")
        _require_used(given)
        params = all_params.read(Path("params.yaml"))
        options = {"label": given.label, "seed": given.seed, "share": given.share}
        if given.output.suffix.lower() not in (".png", ".bmp", ".tif", ".tiff"):
            raise ValueError(f"{given.output} would lose pixels or is no image: expected a name that ends in .png")
        if given.kind == "sample":
            wanted = {"label": given.label, "count": given.count, "seed": given.seed}
            wanted |= {"caption": given.caption, "negative": given.negative}
            wanted["attributes"] = _pairs(given.attribute)
            if given.picture is not None:
                wanted["picture"] = to_tell(params, given.system, given.picture.read_bytes(), str(given.picture))
            drawing = to_draw(params, given.system, _pairs(given.sampling), **wanted)
            _, images = draw(open_system(params, given.system), drawing)
            pictures.save_grid(given.output, images, min(ROW, len(images)))
            return 0
        asked = request(params, given.system, given.kind, _pairs(given.set), _pairs(given.sampling), **options)
        files = [path and read_picture(path.read_bytes(), str(path)) for path in (given.input, given.mask, given.other)]
        result = edit(open_system(params, given.system), asked, params, *files)
        result.save(given.output)
    except (ValueError, OSError) as error:
        print(f"nothing was edited: {error}", file=sys.stderr)
        return 2
    return 0


def to_tell(params: Pipeline, name: str, data: bytes, what: str) -> torch.Tensor:
    """(C, H, W) uint8 of a file: an image of the data set, or, of a prior that was told pictures from files, such a one."""
    system, dataset = params.systems.get(name), params.dataset
    channels = None if system is None else words.file_channels(system.prior)
    if channels is None:
        picture = read_picture(data, what)
        return to_uint8(Frame(dataset, picture.size).tensor(picture))[0]
    how = {key: getattr(dataset, key) for key in ("height", "width", "resize", "background")}
    try:
        with pillow_warnings():
            return torch.tensor(decoded(data, MAX_PIXELS, channels=channels, **how))
    except Unreadable as reason:
        raise ValueError(f"{what} {reason}") from None


def _require_used(given: argparse.Namespace) -> None:
    """Raises ValueError for an option that this kind of edit has no use for, and for files that are not there."""
    is_sample = given.kind == "sample"
    of_samples = {
        "caption": given.caption is not None,
        "attribute": bool(given.attribute),
        "negative": given.negative is not None,
        "picture": given.picture is not None,
        "count": given.count != 1,
    }
    of_edits = {"set": bool(given.set), "mask": given.mask is not None, "other": given.other is not None}
    useless = [name for name, is_given in (of_edits if is_sample else of_samples).items() if is_given]
    if is_sample and given.share != HALFWAY:
        useless.append("share")
    if useless:
        raise ValueError(f"--{given.kind} has no use for --{useless[0]}: leave it out")
    if not is_sample:
        share = given.share != HALFWAY
        require_used(given.kind, mask=given.mask is not None, other=given.other is not None, share=share)
    for path in (given.input, given.mask, given.other, given.picture):
        if path is not None and not path.is_file():
            raise ValueError(f"{path} is no file: expected a picture")
    if not given.output.absolute().parent.is_dir():
        raise ValueError(f"{given.output.parent} is no folder: make it, or write elsewhere")


def _pairs(texts: list[str]) -> dict[str, Any]:
    wrong = [text for text in texts if "=" not in text]
    if wrong:
        raise ValueError(f"{wrong[0]} is no setting: expected KEY=VALUE")
    found = {}
    for key, _, value in (text.partition("=") for text in texts):
        try:
            found[key] = yaml.load(value, plain_yaml.Loader)  # noqa: S506  a SafeLoader
        except (yaml.YAMLError, ValueError, RecursionError):
            raise ValueError(
                f"{key}={value} is no value: expected text, a number, true, false, null or a whole list"
            ) from None
    plain_yaml.require_plain(found)
    return found


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

"""What the studio's buttons do: draw, edit, take in pictures, and say which command does the same.

Models are used by one request at a time, and each request has a generator of its own, so results never mix. Pictures that
come in lie below .state/studio as PNG files named by their content: commands refer to them, and so run as they stand.
"""

import contextlib
import hashlib
import io
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from studio import edit
from tessera import params as all_params
from tessera import seeding
from tessera.artifacts import checkpoints, pictures
from tessera.artifacts import folder as artifact
from tessera.artifacts import images as image_artifact
from tessera.artifacts.captions import Example
from tessera.artifacts.images import to_uint8
from tessera.artifacts.shards import spread
from tessera.artifacts.shown import ShownPictures
from tessera.components import kinds, load, sets
from tessera.editing.words import file_channels
from tessera.nn.weightless import WithoutWeights
from tessera.sources.bands import require_picture
from tessera.sources.decoding import opened
from tessera.sources.frame import WITHOUT_PICTURES, WITHOUT_ROUNDING, Frame
from tessera.sources.records import Unreadable
from tessera.system import CannotEdit, System

KEPT = Path(".state/studio")
MAX_IMAGES = 32  # of one request
MAX_LAYERS = 4  # of a painting; the page paints one
MAX_SEED = 2**32 - 1
THUMBNAILS, THUMBNAIL = 24, 96  # how many, and the longer side of each in pixels, about
CANVAS = 560  # pixels of the longer side that a mask is painted on, about
PAINT = "#ff2d78"
KNOBS = {
    "guidance": ("guidance_scale",), "temperature": ("temperature",), "steps": ("num_steps", "decoding_steps"),
    "autoguidance": ("autoguidance_scale",),
}  # fmt: skip


class Drawn(NamedTuple):
    images: np.ndarray  # (B, C, H, W) uint8
    indices: np.ndarray | None  # (B, *index_grid); None: the prior draws latents
    codebook_size: int | None
    command: str


class Edited(NamedTuple):
    picture: Image.Image
    command: str


class Taken(NamedTuple):
    """A kept test image."""

    name: str
    label: int
    picture: Image.Image


class Knob(NamedTuple):
    """A setting of the sampling that the page shows."""

    key: str
    value: float


class Words(NamedTuple):
    """What is to be drawn, and what guidance leads away from; empty: nothing."""

    caption: str = ""
    negative: str = ""


class Studio:
    """The trained systems of a checkout. Every mistake of a user is a ValueError of one sentence."""

    def __init__(self, root: Path = Path()):
        self.root = root
        self.params = all_params.read(root / "params.yaml")
        trained = [name for name in self.params.systems if self._is_trained(name)]
        if not trained or not (root / "data/images/meta.json").is_file():
            raise ValueError(f"no system of {root / 'params.yaml'} is trained yet: run make repro first")
        self.edits = {name: self._edits_of(name) for name in trained}
        self.names = sorted(trained, key=lambda name: -len(self.edits[name]))  # the most able first
        spec, splits = image_artifact.read(root / "data/images")
        require_picture(spec.channels, spec.name, WITHOUT_PICTURES)
        if sets(spec, "bits"):
            raise ValueError(f"{spec.name} {WITHOUT_ROUNDING}")
        self.classes, self._test = spec.class_names, splits["test"]
        self.rows = spread(len(self._test), THUMBNAILS).tolist()  # of the test images that are shown
        self._models, self._files = threading.Lock(), threading.Lock()
        self._systems: dict[str, tuple[list[str], System]] = {}

    def about(self, name: str) -> str:
        """What a system is, in a line."""
        system = self.params.systems[name]
        tokenizer, prior = self.params.tokenizers[system.tokenizer], load("priors", system.prior.kind)
        codes = f"{tokenizer.codebook_size} codes" if tokenizer.codebook_size else "no codebook"
        can = ", ".join(self.edits[name])
        learns = f"learns {prior.LEARNS}" + (f" and was told {told}" if (told := self._told(name)) else "")
        return f"tokenizer {system.tokenizer} ({codes}); prior {system.prior.kind}, which {learns}; edits: {can}"

    def refusal(self, name: str, kind: str) -> str:
        """Why a system cannot do an edit, in a sentence that names those that can; empty if it can."""
        self._check(name)
        if kind in self.edits[name]:
            return ""
        able = [other for other in self.names if kind in self.edits[other]]
        prior = self.params.systems[name].prior.kind
        mend = f"choose {' or '.join(able)}" if able else "no trained system here has one that can"
        return f"{name} cannot do this edit ({kind}), because its prior {prior} has no way to do so: {mend}"

    def knobs(self, name: str) -> dict[str, Knob]:
        """Those of guidance, temperature and steps that the system's sampling has, and of autoguidance where its prior keeps a
        guide, as params.yaml sets them."""
        sampling = self.params.sampling(name).model_dump()
        if sets(self.params.systems[name].prior, "guide"):
            sampling = {"autoguidance_scale": 1.0} | sampling
        return {knob: Knob(key, sampling[key]) for knob, keys in KNOBS.items() for key in keys if key in sampling}

    def reads_captions(self, name: str) -> bool:
        """Whether the system's prior was told captions."""
        return self._told(name) == "captions"

    def is_told_pictures(self, name: str) -> bool:
        """Whether the system's prior was told pictures."""
        return self._told(name) == "pictures"

    def _told(self, name: str) -> str:
        """What the system's prior was told beside labels, or in their place; empty: nothing."""
        condition = getattr(self.params.systems[name].prior, "condition", None)
        return "" if condition is None else load("conditions", condition.kind).NAME

    # parameters: those of one request of the page
    def draw(
        self,
        name: str,
        label: int | None,
        count: Any,
        seed: Any,
        words: Words | None = None,
        picture: str = "",
        **knobs: float | None,
    ) -> Drawn:
        """Knobs that are None stay as params.yaml sets them. words: of a system that reads captions; picture: the name of a
        kept one, of a system that was told pictures."""
        self._check(name)
        words = words or Words()
        known = self.knobs(name)
        given = {knob: value for knob, value in knobs.items() if value is not None}
        refused = [knob for knob in given if knob not in known]
        if refused:
            has = " and ".join(known) or "none of the settings here"
            raise ValueError(f"{name} has no {refused[0]}: its prior samples with {has}")
        sampling = {known[knob].key: int(value) if knob == "steps" else value for knob, value in given.items()}
        options = {"count": _whole(count, "the number of images", 1, MAX_IMAGES), "seed": _seed(seed), "label": label}
        if words.caption or words.negative:
            if not self.reads_captions(name):
                raise ValueError(f"{name} was trained on labels, not on captions: leave the words out")
            options |= {"caption": words.caption or None, "negative": words.negative or None}
        if picture:
            options["picture"] = edit.to_tell(self.params, name, self._kept(picture).read_bytes(), "the picture")
        asked = edit.to_draw(self.params, name, sampling, **options)
        with self._models:
            system = self._open(name)
            tokens, images = edit.draw(system, asked)
        indices = tokens.numpy() if system.learns == "indices" else None
        return Drawn(images, indices, system.spec.codebook_size, asked.command(picture=str(KEPT / picture)))

    # parameters: those of one request of the page
    def edit(
        self,
        name: str,
        kind: str,
        source: str,
        seed: Any,
        settings: dict[str, Any] | None = None,
        label: int | None = None,
        mask: Image.Image | None = None,
        other: str = "",
        share: float = 0.5,
    ) -> Edited:
        """source, other: names of kept pictures. With a label, the prior is told it."""
        if refusal := self.refusal(name, kind):
            raise CannotEdit(refusal)
        options = {"label": label, "seed": _seed(seed), "share": share}
        asked = edit.request(self.params, name, kind, settings, **options)
        picture, other_picture = self.picture(source), self.picture(other) if other else None
        masked = "" if mask is None else self._keep(mask)
        with self._models:
            edited = edit.edit(self._open(name), asked, self.params, picture, mask, other_picture)
        files = {"source": source, "mask": masked, "other": other}
        return Edited(edited, asked.command(**{key: str(KEPT / file) if file else "" for key, file in files.items()}))

    def take(self, data: bytes, what: str) -> str:
        """Check an upload, which nothing has decoded before, and keep it; its name."""
        with self._files:  # Pillow's warnings are set for all threads
            picture = edit.read_picture(data, what)
        return self._keep(picture)

    def take_test_image(self, number: Any) -> Taken:
        """Keep a test image by its row."""
        row = _whole(number, "the number of a test image", 0, len(self._test) - 1)
        picture = self._test_picture(row)
        return Taken(self._keep(picture), int(self._test.labels[row]), picture)

    def thumbnails(self) -> list[Image.Image]:
        """Test images evenly spread over their split, those of `rows`, each of its pixels a square."""
        return [for_painting(self._test_picture(row), THUMBNAIL) for row in self.rows]

    def take_to_tell(self, name: str, data: bytes, what: str) -> str:
        """Check an upload that this system is to be told, and keep what is read of it, in the images' size; its name."""
        self._check(name)
        with self._files:
            found = edit.to_tell(self.params, name, data, what)
        return self._keep(pictures.picture(found.numpy()))

    def take_test_picture(self, name: str, number: Any) -> str:
        """Keep the picture of a test image, by its row, that this system is to be told; its name."""
        row = _whole(number, "the number of a test image", 0, len(self._test) - 1)
        return self._keep(self._test_pictures(name, [row])[0])

    def pictures_to_tell(self, name: str) -> list[Image.Image]:
        """As `thumbnails`, of what this system can be told."""
        return [for_painting(one, THUMBNAIL) for one in self._test_pictures(name, self.rows)]

    def told(self, name: str, picture: str) -> Image.Image:
        """What the system is told of a kept picture, such as its edges."""
        condition = self.params.systems[name].prior.condition
        part = load("conditions", condition.kind)
        given = edit.to_tell(self.params, name, self._kept(picture).read_bytes(), "the picture")
        example = Example("", 0, "seen", vector=part.encoded(condition, [given])[0, 1:].numpy())
        return for_painting(pictures.picture(part.pictures_of(condition, [example])[0].numpy()))

    def _test_pictures(self, name: str, rows: list[int]) -> list[Image.Image]:
        """Those in the files of test images, or the test images of which a picture is made."""
        self._check(name)
        is_file = file_channels(self.params.systems[name].prior) is not None
        source = ShownPictures(self.root / "data/images", "test") if is_file else self._test
        return [pictures.picture(one) for one in source.uint8(np.array(rows)).numpy()]

    def damage(self, source: str, settings: dict[str, Any], seed: Any) -> str:
        """The picture as the models see it, damaged as `enhance` takes it to be; the damaged one's name."""
        asked = edit.request(self.params, self.names[0], "enhance", settings, seed=_seed(seed))
        picture = self.picture(source)
        images = Frame(self.params.dataset, picture.size).tensor(picture)
        generator = seeding.generator(asked.seed, "studio_damage")
        return self._keep(
            pictures.picture(to_uint8(load("edits", "enhance").measure(images, asked.config, generator))[0].numpy())
        )

    def picture(self, name: str) -> Image.Image:
        """A kept picture, read as the shell would."""
        path = self._kept(name)
        with self._files:
            return edit.read_picture(path.read_bytes(), "the picture")

    def _kept(self, name: str) -> Path:
        if not name:
            raise ValueError("there is no picture yet: upload one, or take a test image")
        path = self.root / KEPT / name
        if not path.is_file():
            raise ValueError(
                f"the picture is no longer in {KEPT}, as after make clean: upload it again, or take a test image"
            )
        return path

    def _keep(self, picture: Image.Image) -> str:
        file = io.BytesIO()
        picture.save(file, "png")
        name = f"{hashlib.sha256(file.getvalue()).hexdigest()[:16]}.png"
        path = self.root / KEPT / name
        with self._files:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(file.getvalue())
        return name

    def _test_picture(self, row: int) -> Image.Image:
        return pictures.picture(self._test.uint8(np.array([row]))[0].numpy())

    def _edits_of(self, name: str) -> list[str]:
        """The edits that a system can do, asked of its prior without weights."""
        config, spec = checkpoints.described(self._artifacts(name)[1], "priors")
        with WithoutWeights():
            prior = load("priors", config.kind).Model(config, spec)
        needs = {kind: getattr(load("edits", kind), "NEEDS", None) for kind in kinds("edits")}
        return [kind for kind, abilities in needs.items() if abilities is None or isinstance(prior, abilities)]

    def _is_trained(self, name: str) -> bool:
        return all((folder / artifact.MANIFEST).is_file() for folder in self._artifacts(name))

    def _artifacts(self, name: str) -> tuple[Path, Path]:
        data = self.root / "data"
        return data / "tokenizers" / self.params.systems[name].tokenizer, data / "priors" / name

    def _check(self, name: str) -> None:
        if name not in self.names:
            raise ValueError(f"there is no trained system '{name}': expected one of {', '.join(self.names)}")

    def _open(self, name: str) -> System:
        """Read once, and again where it was trained anew."""
        prints = [artifact.fingerprint(folder) for folder in self._artifacts(name)]
        if name not in self._systems or self._systems[name][0] != prints:
            self._systems[name] = prints, edit.open_system(self.params, name, self.root)
        return self._systems[name][1]


def for_painting(picture: Image.Image, side: int = CANVAS) -> Image.Image:
    """As large as a mask is painted on: small pictures enlarged by a whole number, large ones reduced."""
    scale = side / max(picture.size)
    if scale >= 2:
        return picture.resize((picture.width * int(scale), picture.height * int(scale)), Image.Resampling.NEAREST)
    return picture if scale >= 0.5 else picture.reduce(round(1 / scale))


def painted_below(size: tuple[int, int]) -> Image.Image:
    """An RGBA layer for a canvas of this size, on which most of the lower half is painted."""
    width, height = size
    layer = Image.new("RGBA", size)
    layer.paste(PAINT, (width // 8, height // 2, width - width // 8, height - height // 8))
    return layer


def painted_layers(files: Sequence[bytes | Path]) -> list[Image.Image]:
    """RGBA images of one size, together no larger than an upload may be. Raises ValueError before any is decoded."""
    if len(files) > MAX_LAYERS:
        raise ValueError(f"{len(files)} layers are painted: expected at most {MAX_LAYERS}; paint on fewer")
    try:
        with contextlib.ExitStack() as stack:
            data = [file if isinstance(file, bytes) else file.read_bytes() for file in files]
            layers = [stack.enter_context(opened(each, edit.MAX_PIXELS)) for each in data]
            sizes = {layer.size for layer in layers}
            if len(sizes) > 1:
                raise Unreadable(f"have {len(sizes)} sizes")
            if sum(layer.width * layer.height for layer in layers) > edit.MAX_PIXELS:
                raise Unreadable(f"have together more than {edit.MAX_PIXELS:,} pixels")
            return [layer.convert("RGBA") for layer in layers]
    except Unreadable as reason:
        raise ValueError(f"the painted layers cannot be read ({reason}): paint on the page, over its picture") from None


def mask_of(layers: list[Image.Image], size: tuple[int, int]) -> Image.Image:
    """Painted RGBA layers -> white where any of a pixel is painted, at the picture's size. Raises ValueError if none is."""
    painted = np.zeros((1, 1), bool)
    for layer in layers:
        painted = painted | (np.asarray(layer.convert("RGBA"))[..., 3] > 127)
    if not painted.any():
        raise ValueError("nothing is painted: paint over what is to be drawn anew")
    shares = Image.fromarray(painted.astype(np.float32)).resize(size, Image.Resampling.BOX)  # as bytes they round to 0
    return Image.fromarray(np.where(np.asarray(shares) > 0, 255, 0).astype(np.uint8))


def _seed(value: Any) -> int:
    return _whole(value, "the seed", 0, MAX_SEED)


def _whole(value: Any, what: str, low: int, high: int) -> int:
    if not isinstance(value, int | float) or value != int(value) or not low <= value <= high:
        raise ValueError(
            f"{what} is {'empty' if value is None else value}: expected a whole number from {low} to {high}"
        )
    return int(value)

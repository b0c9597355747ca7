"""What to train on a folder of images that nobody has tried yet: one VQGAN and one flow, as large as the images allow.

The recipe is that of presets/eurosat.yaml, the best known here for photographs in minutes on a CPU (docs/benchmarks.md);
what depends on the number and the size of the images is chosen here, and the steps by how long they take.
"""

import json
import re
from typing import Any, NamedTuple

import numpy as np
import yaml
from jinja2 import Environment, StrictUndefined

from tessera.check.estimate import Estimate
from tessera.components import PACKAGE, parse
from tessera.contracts import ImageSpec
from tessera.datasets import image_folder
from tessera.evaluation.judge import judge_for
from tessera.params import Pipeline
from tessera.start.survey import Survey

TEMPLATE = PACKAGE / "start" / "template.yaml"
FEWEST = 8  # images: of fewer not even a metric could be measured
RESOLUTIONS = (32, 64, 128)
ELONGATED = 2.0  # a side is so many times the other: the center alone would say little
TOKENIZER_SHARE = 0.4  # of the time that is left for the two trainings
MOST_EPOCHS = {"tokenizer": 150, "prior": 300}  # few images are learnt by heart sooner than the time is over
REASONS = {
    "classifier": "a classifier of the classes, trained first",
    "timm": "EfficientNet-lite0, which learned ImageNet and is installed, as there are no classes to learn",
    "contrastive": "a network that learns to tell these images apart, as there are no classes to learn",
}
FEWEST_STEPS, MOST_STEPS = 500, 20_000


class Choices(NamedTuple):
    """The settings of the template, and why they are so, in words."""

    values: dict[str, Any]
    reasons: list[str]

    def text(self) -> str:
        """The params file."""
        environment = Environment(
            undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True
        )
        filled = environment.from_string(TEMPLATE.read_text(encoding="utf-8")).render(self.values)
        return re.sub(
            r"^( *[\w-]+:.*?) +# (.*)$", lambda line: f"{line[1]:<29} # {line[2]}", filled, flags=re.MULTILINE
        )

    def params(self) -> Pipeline:
        return parse(Pipeline, yaml.safe_load(self.text()))


def choose(found: Survey, source: str, resolution: int | None, is_gpu: bool) -> Choices:
    """source: as the params name it. Raises ValueError where there are too few images, or none for a split."""
    if found.num_images < FEWEST:
        raise ValueError(f"{found.source} has {found.num_images} images, expected at least {FEWEST}: add some")
    values: dict[str, Any] = {"source": json.dumps(source, ensure_ascii=False), "root": _quoted(found.root)}
    reasons = []
    pixels = _pixels(found, resolution, is_gpu)
    for each in (pixels, _dataset(found), _judge(found, pixels.values)):
        values |= each.values
        reasons += each.reasons
    split = _split(found, source, values)
    values |= split.values | _sizes(values, split.values, is_gpu)
    reasons += split.reasons
    reasons.append(
        f"metrics for {values['num_test']} test images: {values['neighbors']} neighbours, {values['num_samples']} samples"
    )
    return Choices(values, reasons)


def in_time(choices: Choices, estimate: Estimate, minutes: float) -> Choices:
    """As many steps of the two trainings as fit into so many minutes beside everything else."""
    seconds = {one.entry.split("@")[0]: one.seconds_per_step for one in estimate.trainings}
    judge = sum(one.minutes for one in estimate.trainings if one.entry.startswith("train_features"))
    left = max(0.0, 60 * (minutes - estimate.other_minutes - judge))
    values, steps = choices.values, {}
    for part, share in (("tokenizer", TOKENIZER_SHARE), ("prior", 1 - TOKENIZER_SHARE)):
        views = (1 + values["warps"]) * (2 if values["horizontal_flip"] == "true" else 1) if part == "prior" else 1
        learnt = MOST_EPOCHS[part] * views**0.5 * values["num_train"] / values[f"{part}_batch"]
        most = min(MOST_STEPS, max(2 * FEWEST_STEPS, learnt))
        number = min(most, max(FEWEST_STEPS, share * left / seconds[f"train_{part}"]))
        steps[f"{part}_steps"] = int(round(number, -1 if number < 1000 else -2))
    return choices._replace(values=values | steps)


def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False) if text else ""


def _pixels(found: Survey, resolution: int | None, is_gpu: bool) -> Choices:
    """How large the images become, in which colours, and by how large patches."""
    sides = found.sides()
    shorter, longer = np.median(sides.min(axis=1)), np.median(sides.max(axis=1))
    chosen = resolution
    if chosen is None:
        chosen = max([side for side in RESOLUTIONS[: 3 if is_gpu else 2] if side <= shorter], default=RESOLUTIONS[0])
    if chosen < 16 or chosen % 16:
        raise ValueError(
            f"--resolution {chosen}: expected a multiple of 16, such as {max(16, round(chosen / 16) * 16)}"
        )
    patch = max(2, chosen // 16)
    resize = "pad" if longer > ELONGATED * shorter else "crop"
    kept = (sides.min(axis=1) / sides.max(axis=1)).mean()
    shape = f"{chosen}x{chosen} of images of about {np.median(sides[:, 0]):.0f}x{np.median(sides[:, 1]):.0f}"
    how = "padded with borders, as the images are long" if resize == "pad" else f"the center, {kept:.0%} of each image"
    reasons = [
        f"{shape}: {how}; {'' if resolution else 'more detail takes longer: --resolution. '}Tokens: {chosen // patch}x"
        f"{chosen // patch}, one for {patch}x{patch} pixels",
        "gray: no image has colour" if found.is_gray else "colour",
    ]
    values = {
        "resolution": chosen,
        "patch_size": patch,
        "grid": chosen // patch,
        "denoiser_patch": 2 if chosen // patch >= 16 else 1,
        "factor": 4 if chosen >= 32 else 2,
        "resize": resize,
        "channels": 1 if found.is_gray else 3,
        "horizontal_flip": "false" if found.is_gray else "true",
    }
    return Choices(values, reasons)


def _dataset(found: Survey) -> Choices:
    counts, num_seen = found.class_counts, max(1, len(found.seen))
    lost = (len(found.unreadable) + found.num_outside) / num_seen
    name = re.sub(r"[^a-z0-9]+", "-", found.source.name.split(".")[0].lower()).strip("-") or "images"
    values = {
        "name": json.dumps(name),
        "labels": "folders" if counts else "none",
        "splits": found.splits,
        "val_images": "train" if len(found.splits) > 2 else "",
        "max_unreadable_fraction": min(1.0, np.ceil(150 * lost + 1) / 100) if lost > 0.005 else None,
        "num_unreadable": len(found.unreadable) + found.num_outside,
        "source_words": f"{found.num_images:,} images in {found.source.name}".replace("\n", " "),
    }
    shown = ", ".join(f"{folder} ({count})" for folder, count in list(counts.items())[:6])
    more = f" and {len(counts) - 6} more" if len(counts) > 6 else ""
    reasons = [
        f"{len(counts)} classes, one for each folder: {shown}{more}; if they are none: --labels none"
        if counts
        else "no classes: the images are in no folders that look like some"
    ]
    if found.splits:
        used = f"; {', '.join(found.splits[2:])}/ is trained on too" if len(found.splits) > 2 else ""
        reasons.append(f"{found.splits[0]}/ is trained on, {found.splits[1]}/ is the test split{used}")
    return Choices(values, reasons)


def _judge(found: Survey, pixels: dict[str, Any]) -> Choices:
    """The network that judges images."""
    names, side = tuple(found.class_counts) or ("unlabeled",), pixels["resolution"]
    spec = ImageSpec(
        name="images",
        channels=pixels["channels"],
        height=side,
        width=side,
        num_classes=len(names),
        class_names=names,
        licence="",
    )
    judge = judge_for(spec, found.num_images)
    shown = {key: json.dumps(value).replace('"', "") if key != "kind" else value for key, value in judge.items()}
    return Choices({"judge_name": judge["kind"], "judge": shown}, [f"judge: {REASONS[judge['kind']]}"])


def _split(found: Survey, source: str, values: dict[str, Any]) -> Choices:
    """Images of each split, by the data set's own rule; where it draws them, a seed by which no split is too small."""
    number = found.num_images
    fraction = 0.25 if number < 60 else 0.2 if number < 300 else 0.1
    config = image_folder.Config(
        kind="image_folder",
        source=source,
        root=found.root,
        height=values["resolution"],
        width=values["resolution"],
        labels=values["labels"],
        val_images=values["val_images"] or None,
        test_fraction=fraction,
    )
    is_image = len(found.images) / len(found.seen)
    for seed in range(100):
        counts = image_folder.census(config.model_copy(update={"split_seed": seed}))
        train, test = (round(len(counts[split]) * is_image) for split in ("train", "test"))
        classes = np.bincount(counts["train"], minlength=max(1, len(found.class_counts)))
        if found.splits or (test >= max(2, 0.8 * fraction * number) and classes.min() >= 2):
            break
    if test < 2 or train < FEWEST // 2:
        raise ValueError(
            f"{found.source} gives {train} train and {test} test images, expected at least 4 and 2: add some"
        )
    split = {"test_fraction": fraction, "split_seed": seed, "num_train": train, "num_test": test}
    return Choices(split, [f"{train:,} images to train on, {test:,} to compare with"])


def _sizes(values: dict[str, Any], split: dict[str, Any], is_gpu: bool) -> dict[str, Any]:
    """Numbers that must not exceed those of the images, and the sizes of batches and networks."""
    train, test = split["num_train"], split["num_test"]
    num_samples = min(2000 if is_gpu else 500, train)
    smaller = min(num_samples, test)
    return {
        "codebook_size": 512 if train >= 200 else 128,
        "tokenizer_batch": min(64 if is_gpu else 32, train),
        "prior_batch": min(128 if is_gpu else 48, train),
        "warps": 1 if train >= 2000 else 3,
        "width": 256 if is_gpu else 128,
        "guidance_scale": 1.5 if values["labels"] == "folders" else 1.0,
        "num_samples": num_samples,
        "num_edited": min(32, test),
        "num_seeds": 1,
        "neighbors": min(3, smaller - 1),
        "density_neighbors": min(5, test - 1),
        "tokenizer_steps": FEWEST_STEPS,
        "prior_steps": FEWEST_STEPS,
        "on_gpu": ", precision: bf16, data_on_device: true" if is_gpu else "",
        "device": "a GPU" if is_gpu else "this CPU",
    }

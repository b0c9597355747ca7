"""What is told a system whose prior was trained on it (tessera/conditions): captions, attributes, vectors, pictures."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tessera import seeding
from tessera.artifacts import bit_depth, pictures
from tessera.artifacts.captions import Example, examples_of, write_examples_file
from tessera.artifacts.images import to_uint8
from tessera.bases.conditional import steering_from
from tessera.components import kinds, load, sets
from tessera.editing.left_out import require_told
from tessera.system import CannotDraw, System

SHOWN, COLUMNS = 20, 10  # samples of either half in a picture, and in a row


class NoCaption(ValueError):
    """What was given is nothing that this system can read; the sentence says why."""


# Of an image: a caption; or attributes by name, those that are missing left out; or a vector, (E,) numbers, or None for none;
# or a picture, (C, H, W) uint8; or whatever else a condition is told
Said = str | Mapping[str, Any] | Sequence[float] | np.ndarray | Tensor | None


def names() -> list[str]:
    """Of all that conditions are told."""
    return sorted({load("conditions", kind).NAME for kind in kinds("conditions")})


def is_named(name: str, one: Any) -> bool:
    """Whether this is said of an image by this name."""
    parts = [load("conditions", kind) for kind in kinds("conditions")]
    return any(name == part.NAME and part.is_one(one) for part in parts)


def told(system: System, said: Sequence[Said], labels: np.ndarray | None = None, is_alone: bool = False) -> Tensor:
    """(B,) captions, attributes, vectors or pictures, all of one kind, as the system's prior takes them in the place of labels,
    on its device; labels: (B,) told beside them; is_alone: none are, also where training told them of every image.

    Raises CannotDraw for a prior that was not told such, was told captions in the place of labels, or wants what is left out
    (editing/left_out.py); NoCaption for what is no caption, no attribute, no vector or no picture, is too long, or has a value
    beyond what there is.
    """
    config = system.prior.config
    condition = config.condition if sets(config, "condition") else None
    part = None if condition is None else load("conditions", condition.kind)
    known, (given, asked) = "labels" if part is None else part.NAME, _name_and_kind(said[0])
    if part is None or given != known:
        raise CannotDraw(
            f"{system.name} was trained on {known}, not on {given}: expected {known}, or a system whose prior has "
            f"condition: {{kind: {asked}}}"
        )
    if any(isinstance(one, str) and not one for one in said):
        raise NoCaption("a caption is empty: expected words, or labels alone")
    if not getattr(condition, "replaces_label", False):
        if (
            labels is None
            and system.spec.num_classes > 1
            and not is_alone
            and not getattr(config, "label_dropout", 0.0)
        ):
            raise CannotDraw(
                f"{system.name} was told the label of every image in training, beside its {known}: expected labels, too"
            )
        labels = _beside(system, labels, len(said))
    elif labels is not None:
        raise CannotDraw(
            f"{system.name} reads a label as a caption of its class: expected a label or a caption, not both"
        )
    try:
        rows = part.encoded(condition, said, None if labels is None else torch.from_numpy(labels))
    except ValueError as error:
        raise NoCaption(str(error)) from None
    if not is_alone:
        require_told(system, rows)
    return rows.to(system.device)


def _name_and_kind(one: Any) -> tuple[str, str]:
    """What is said of one image, and the first condition that is told such; whatever is nothing else is taken for a caption."""
    parts = {kind: load("conditions", kind) for kind in kinds("conditions")}
    return next(((part.NAME, kind) for kind, part in parts.items() if part.is_one(one)), ("captions", "caption"))


def _beside(system: System, labels: np.ndarray | None, number: int) -> np.ndarray | None:
    """The labels that are told beside what is said; the one label that there is, if there is but one."""
    if labels is None:
        return np.zeros(number, np.int64) if system.spec.num_classes == 1 else None
    system.require_trained_on(labels)
    return labels


@torch.no_grad()
def draw(
    system: System,
    said: Sequence[Said],
    sampling: Any,
    generator: torch.Generator,
    labels: np.ndarray | None = None,
    negative: Said | None = None,
) -> np.ndarray:
    """(B,) of what is said, and (B,) labels beside it -> (B, C, H, W) uint8, as `System.draw` draws those of labels.

    negative: what guidance leads away from. Raises as `told` does.
    """
    return _drawn(system, told(system, said, labels), sampling, generator, away_from(system, negative, sampling))


def away_from(system: System, negative: Said | None, sampling: Any) -> Tensor | None:
    """(1, ...) what guidance leads away from; None for none. Raises CannotDraw where there is no guidance, or as `told`."""
    if negative is None:
        return None
    if getattr(sampling, "guidance_scale", 1.0) == 1.0:
        mend = "raise it" if hasattr(sampling, "guidance_scale") else "leave the negative out, or name another system"
        found = "its guidance_scale is 1" if hasattr(sampling, "guidance_scale") else "its prior has no guidance"
        raise CannotDraw(f"{system.name} cannot be led away from anything, as {found}: {mend}")
    return told(system, [negative], is_alone=True)


def _drawn(
    system: System, given: Tensor, sampling: Any, generator: torch.Generator, away: Tensor | None = None
) -> np.ndarray:
    system = system.computing_in(sampling.precision)
    with steering_from(system.prior, away):
        tokens = system.prior.sample(given, sampling, generator)
    if sets(system.tokenizer, "bits"):
        return bit_depth.stored(system.decode(tokens), system.tokenizer).cpu().numpy()
    return to_uint8(system.decode(tokens)).cpu().numpy()


def examples(prior: Path, number: int, seed: int) -> list[Example]:
    """What so many samples are to be told: captions of training images and of test images in turn, each as often as others.

    None where the prior was told captions of classes, which labels stand for.
    """
    found = examples_of(prior)
    order = seeding.numpy_generator(seed, "sample_captions")
    halves = [[one for one in found if (one.group == "seen") == is_seen] for is_seen in (True, False)]
    halves = [[half[place] for place in order.permutation(len(half))] for half in halves if half]
    return [halves[i % len(halves)][i // len(halves) % len(halves[i % len(halves)])] for i in range(number) if halves]


def labels_of(examples: list[Example], labels: np.ndarray) -> np.ndarray:
    """(B,) of the examples; those given, where there are none."""
    return np.array([one.label for one in examples], np.int64) if examples else labels


def draw_examples(
    system: System, examples: list[Example], labels: np.ndarray, sampling: Any, generator: torch.Generator
) -> np.ndarray:
    """(B, C, H, W) uint8 of the examples, or of the labels where there are none."""
    if not examples:
        return system.draw(labels, sampling, generator)
    condition = system.prior.config.condition
    given = load("conditions", condition.kind).of_examples(condition, examples, torch.from_numpy(labels))
    return _drawn(system, given.to(system.device), sampling, generator)


def file_channels(prior: Any) -> int | None:
    """Of the pictures from files that a prior of this config is told; None: it is told none."""
    return getattr(prior.condition, "file_channels", None) if sets(prior, "condition") else None


def write_told(place: Path, examples: list[Example]) -> None:
    """Beside samples, what each of them was told."""
    if examples:
        write_examples_file(place, examples)


def show(path: Path, images: np.ndarray, examples: list[Example], condition: Any) -> None:
    """The first samples beside what they were told, where people can see or read that: pictures stand above what was drawn of
    them, text below; what training images were told comes first."""
    part, told = load("conditions", condition.kind), examples[: len(images)]
    if told and hasattr(part, "pictures_of"):
        drawn = images[: 2 * SHOWN]
        _show_pairs(path, drawn, part.pictures_of(condition, told[: len(drawn)]))
    elif told and hasattr(part, "text_of"):
        chosen = [
            [row for row, one in enumerate(told) if (one.group == "seen") == is_seen][:SHOWN]
            for is_seen in (True, False)
        ]
        rows = [row for half in chosen for row in half]
        pictures.save_captioned(path, images[rows], [part.text_of(told[row]) for row in rows], COLUMNS)


def _show_pairs(path: Path, drawn: np.ndarray, told: Tensor) -> None:
    """Rows of pictures, (C, H, W) each, in the size of the images, and below each row what was drawn of them."""
    above = torch.nn.functional.interpolate(told.float(), size=drawn.shape[2:], mode="nearest").byte().numpy()
    if sets(bit_depth.of(drawn), "bits"):
        drawn = bit_depth.shown(drawn)
    if drawn.shape[1] == 1:
        drawn = drawn.repeat(above.shape[1], axis=1)
    if above.shape[1] != drawn.shape[1]:
        above = above[:, :1].repeat(drawn.shape[1], axis=1)
    starts = range(0, len(drawn), COLUMNS)
    rows = [_row(each[start : start + COLUMNS]) for start in starts for each in (above, drawn)]
    pictures.save_grid(path, np.concatenate(rows), COLUMNS)


def _row(images: np.ndarray) -> np.ndarray:
    """(N, C, H, W) -> (COLUMNS, C, H, W), the rest of the row white."""
    return np.concatenate([images, np.full((COLUMNS - len(images), *images.shape[1:]), 255, np.uint8)])

"""Captions, attributes and vectors for a system whose prior was trained on them (tessera/conditions)."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tessera import seeding
from tessera.artifacts import pictures
from tessera.artifacts.captions import Example, examples_of, write_examples_file
from tessera.artifacts.images import to_uint8
from tessera.bases.captions import encoded
from tessera.bases.conditional import steering_from
from tessera.components import load, sets
from tessera.system import CannotDraw, System

SHOWN, COLUMNS = 20, 10  # samples of either half in a picture, and in a row


class NoCaption(ValueError):
    """What was given is no caption, no attribute or no vector that this system can read; the sentence says why."""


# Of an image: a caption; or attributes by name, those that are missing left out; or a vector, (E,) numbers, or None for none
Said = str | Mapping[str, Any] | Sequence[float] | np.ndarray | Tensor | None
NAMES = {  # of what is told, by the kind of the condition
    "caption": "captions",
    "text_model": "captions",
    "attributes": "attributes",
    "embedding": "embeddings",
    "image": "pictures",
}


def told(system: System, said: Sequence[Said], labels: np.ndarray | None = None) -> Tensor:
    """(B,) captions, attributes or vectors, all of one kind, as the system's prior takes them in the place of labels, on its
    device; labels: (B,) told beside them.

    Raises CannotDraw for a prior that was not told such, or was told captions in the place of labels; NoCaption for what is no
    caption, no attribute or no vector, is too long, or has a value beyond what there is.
    """
    config = system.prior.config
    condition = config.condition if sets(config, "condition") else None
    given, kind = name_of(said[0]), None if condition is None else condition.kind
    known = "labels" if kind is None else NAMES[kind]
    if given != known:
        asked = next(each for each, name in NAMES.items() if name == given)
        raise CannotDraw(
            f"{system.name} was trained on {known}, not on {given}: expected {known}, or a system whose prior has "
            f"condition: {{kind: {asked}}}"
        )
    if given == "captions" and "" in said:
        raise NoCaption("a caption is empty: expected words, or labels alone")
    try:
        if kind != "caption":
            rows = load("conditions", kind).encoded(condition, said, _labels(system, labels, len(said)))
        elif condition.of_classes is None:
            rows = encoded(said, condition.max_bytes, _labels(system, labels, len(said)))
        elif labels is None:
            rows = encoded(said, condition.max_bytes)
        else:
            raise CannotDraw(
                f"{system.name} reads a label as a caption of its class: expected a label or a caption, not both"
            )
    except CannotDraw:
        raise
    except ValueError as error:
        raise NoCaption(str(error)) from None
    return rows.to(system.device)


def name_of(said: Any) -> str:
    """What it is that is said of one image, as NAMES has it; whatever is nothing else is taken for a caption."""
    if isinstance(said, Mapping):
        return "attributes"
    if isinstance(said, Tensor) and said.ndim == 3:
        return "pictures"
    return "embeddings" if said is None or isinstance(said, list | tuple | np.ndarray | Tensor) else "captions"


def _labels(system: System, labels: np.ndarray | None, number: int) -> Tensor | None:
    """What is told beside captions of images, attributes or vectors; the one label that there is, if there is but one."""
    if labels is None:
        return torch.zeros(number, dtype=torch.long) if system.spec.num_classes == 1 else None
    system.require_trained_on(labels)
    return torch.from_numpy(labels)


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
    given = told(system, said, labels)
    away = None if negative is None else told(system, [negative])
    return _drawn(system, given, sampling, generator, away)


def _drawn(
    system: System, given: Tensor, sampling: Any, generator: torch.Generator, away: Tensor | None = None
) -> np.ndarray:
    system = system.computing_in(sampling.precision)
    with steering_from(system.prior, away):
        tokens = system.prior.sample(given, sampling, generator)
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
    name = NAMES[system.prior.config.condition.kind]
    if name == "pictures":  # as they were told in training
        beside = torch.from_numpy(np.stack([one.vector for one in examples]))
        given = torch.cat([torch.from_numpy(labels).unsqueeze(1) + 1.0, beside], dim=1).to(system.device)
        return _drawn(system, given, sampling, generator)
    if name == "embeddings":
        said: list[Said] = [None if np.isnan(one.vector).all() else one.vector for one in examples]
    else:
        said = [one.caption if name == "captions" else one.attributes for one in examples]
    return draw(system, said, sampling, generator, labels)


def write_told(place: Path, examples: list[Example]) -> None:
    """Beside samples, what each of them was told."""
    if examples:
        write_examples_file(place, examples)


def show(path: Path, images: np.ndarray, examples: list[Example], condition: Any) -> None:
    """The first samples with what they were told below: of captions that were trained on, then of others. Pictures stand above
    what was drawn of them."""
    if condition.kind == "image":
        _show_pairs(path, images, examples, condition.shape)
        return
    if not examples or examples[0].vector is not None:  # rows of classes are shown; of vectors there is nothing to read
        return
    told = examples[: len(images)]
    chosen = [
        [row for row, one in enumerate(told) if (one.group == "seen") == is_seen][:SHOWN] for is_seen in (True, False)
    ]
    rows = [row for half in chosen for row in half]
    said = [
        told[row].caption or ", ".join(f"{key} {_short(value)}" for key, value in told[row].attributes.items())
        for row in rows
    ]
    pictures.save_captioned(path, images[rows], said, COLUMNS)


def _show_pairs(path: Path, images: np.ndarray, examples: list[Example], shape: tuple[int, int, int]) -> None:
    """Rows of pictures, (C, H, W) each, in the size of the images, and below each row what was drawn of them."""
    drawn = images[: 2 * SHOWN]
    told = torch.from_numpy(np.stack([one.vector for one in examples[: len(drawn)]])).view(-1, *shape)
    resized = torch.nn.functional.interpolate(to_uint8(told).float(), size=drawn.shape[2:], mode="nearest")
    above = resized.expand(-1, drawn.shape[1], -1, -1).byte().numpy()
    starts = range(0, len(drawn), COLUMNS)
    rows = [_row(each[start : start + COLUMNS]) for start in starts for each in (above, drawn)]
    pictures.save_grid(path, np.concatenate(rows), COLUMNS)


def _row(images: np.ndarray) -> np.ndarray:
    """(N, C, H, W) -> (COLUMNS, C, H, W), the rest of the row white."""
    return np.concatenate([images, np.full((COLUMNS - len(images), *images.shape[1:]), 255, np.uint8)])


def _short(value: float | str | None) -> str:
    return "?" if value is None else f"{value:.3g}" if isinstance(value, float) else value

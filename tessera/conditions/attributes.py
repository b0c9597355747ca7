"""Attributes: numbers and categories that metadata say of single images, each of which may be missing.

    condition:
      kind: attributes
      numbers: {thickness: [1.0, 8.0]}          # by column, the least and the largest value
      categories: {style: [google, twitter]}    # by column, its values

They are told beside the label. In training a share `label_dropout` is told nothing, and of the rest each attribute, and the
label, is left out as often, so that any of them may be left out when something is drawn.

Source: Tancik et al., "Fourier Features Let Networks Learn High Frequency Functions in Low Dimensional Domains", 2020,
arXiv:2006.10739, section 5 (numbers as sines of several frequencies); Brooks et al. (InstructPix2Pix), 2023, arXiv:2211.09800,
section 3.2.1 (conditions are left out together and alone).
Differs from them: few fixed frequencies, octaves of the number's range, and the number itself.

What is told is a row of 1 + A float32: the label plus 1, or 0 for none; then, by name, each number, scaled so that its range is
[-1, 1], and the place of each category among its values; NaN where it is missing. The row (0, NaN, ...) is the null condition.

Shape letters: B batch, A attributes, N width of the prior's condition.
"""

import hashlib
import itertools
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import torch.nn.functional as F
from pydantic import AfterValidator, Field, model_validator
from torch import Tensor, nn

from tessera.artifacts.captions import Attributes, Example, attributes_of
from tessera.bases.conditional import rising
from tessera.bases.of_images import MOST_EXAMPLES, ToldSplit
from tessera.components import Params
from tessera.contracts import Planned, TokenSpec

NAME = "attributes"
AT_ONCE = 1000  # images whose attributes are encoded together
OCTAVES = 4
WIDTH = 64  # of the hidden layer that a number passes through
End = Annotated[float, Field(ge=-1e12, le=1e12)]
Range = Annotated[tuple[End, End], AfterValidator(rising)]
Values = Annotated[tuple[str, ...], Field(min_length=2)]
Said = Mapping[str, Any]  # of one image, by column: a number, text, or None


class Config(Params):
    kind: Literal["attributes"] = "attributes"
    numbers: dict[str, Range] = {}
    categories: dict[str, Values] = {}

    @property
    def columns(self) -> list[str]:
        """By name, so that they are in one order whatever the order of a file is."""
        return [*sorted(self.numbers), *sorted(self.categories)]

    @model_validator(mode="after")
    def _tells_something(self) -> "Config":
        if not self.columns or self.numbers.keys() & self.categories.keys():
            raise ValueError("numbers and categories name no column, or one twice: expected each attribute once")
        return self


def problems(config: Config, planned: Planned) -> Iterator[str]:
    """Of the params: attributes that nothing is said of, and values beyond theirs."""
    for column in config.columns if planned.said is not None else ():
        values = planned.said.attributes.get(column)
        if values is None:
            known = ", ".join(map(repr, planned.said.attributes)) or "none"
            yield (
                f"{column!r} is said of no image, expected attributes among {known}: name the columns in "
                f"dataset.metadata.attributes"
            )
        elif column in config.numbers:
            low, high = config.numbers[column]
            words = sorted(word for word in values.words if not _is_number(word))
            if words or values.low < low or values.high > high:
                found = f"has {words[0]!r:.40}" if words else f"reaches from {values.low:g} to {values.high:g}"
                yield f"numbers.{column}: it {found}, expected numbers from {low:g} to {high:g}: widen the range, or mend them"
        elif unknown := sorted(values.words - set(config.categories[column])):
            more = f" and {len(unknown) - 3} more" if len(unknown) > 3 else ""
            yield f"categories.{column}: {', '.join(unknown[:3])}{more} is none of its values: add it to them"


def _is_number(text: str) -> bool:
    try:
        return math.isfinite(float(text))
    except ValueError:
        return False


def encoded(config: Config, said: Sequence[Said], labels: Tensor | None = None) -> Tensor:
    """(B,) what is said of images, and (B,) labels, if any -> (B, 1 + A) float32. Raises ValueError, in a sentence."""
    rows = torch.full((len(said), 1 + len(config.columns)), math.nan)
    rows[:, 0] = 0 if labels is None else labels + 1
    for row, one in zip(rows, said, strict=True):
        unknown = one.keys() - set(config.columns)
        if unknown:
            raise ValueError(
                f"there is no attribute {min(unknown)!r:.60}: expected some of {', '.join(config.columns)}"
            )
        for place, column in enumerate(config.columns, 1):
            if one.get(column) is not None:
                row[place] = _scaled(config, column, one[column])
    return rows


def _scaled(config: Config, column: str, value: Any) -> float:
    if column in config.categories:
        values = config.categories[column]
        if str(value) not in values:
            raise ValueError(f"{column} is {str(value)!r:.60}: expected one of {', '.join(values)}")
        return values.index(str(value))
    low, high = config.numbers[column]
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if not low <= number <= high:
        raise ValueError(f"{column} is {str(value)!r:.60}: expected a number from {low:g} to {high:g}")
    return 2 * (number - low) / (high - low) - 1


def is_one(said: Any) -> bool:
    """Whether this is what is said of an image: by column, those that are missing left out."""
    return isinstance(said, Mapping)


class OfAttributes:
    """The attributes of the images of a split, as they are told."""

    def __init__(self, config: Config, said: Iterable[Attributes]):
        """Raises ValueError, in a sentence, for what is no value of an attribute."""
        told = ({column: one.get(column) for column in config.columns} for one in said)
        self.first = list(itertools.islice(told, MOST_EXAMPLES))
        batches = iter(lambda: list(itertools.islice(told, AT_ONCE)), [])
        self.rows = torch.cat(
            [encoded(config, some) for some in itertools.chain([self.first], batches)]
        )  # (N, 1 + A), without labels

    def __len__(self) -> int:
        return len(self.rows)

    def fingerprint(self) -> str:
        return hashlib.sha256(self.rows.numpy().tobytes()).hexdigest()

    def told(self, rows: Tensor, generator: torch.Generator | None, labels: Tensor) -> Tensor:
        """(B,) rows -> (B, 1 + A) the attributes of each beside its label."""
        found = self.rows[rows]
        found[:, 0] = labels + 1
        return found


def of_images(config: Config, images: Path, split: str) -> OfAttributes:
    return OfAttributes(config, attributes_of(images, split))


def examples(config: Config, splits: Mapping[str, ToldSplit], seed: int) -> list[Example]:
    """The attributes of the first test images."""
    test = splits["test"]
    return [Example("", int(label), "held_out", one) for one, label in zip(test.said.first, test.labels, strict=False)]


def of_examples(config: Config, examples: Sequence[Example], labels: Tensor) -> Tensor:
    """(B,) examples, and (B,) labels beside them -> (B, 1 + A)."""
    return encoded(config, [one.attributes for one in examples], labels)


def text_of(example: Example) -> str:
    """What stands below a sample that was told this."""
    return ", ".join(f"{key} {_short(value)}" for key, value in example.attributes.items())


def _short(value: float | str | None) -> str:
    return "?" if value is None else f"{value:.3g}" if isinstance(value, float) else value


def card(config: Config) -> str:
    """What was told, and how to tell it."""
    numbers = [f"{name} from {low:g} to {high:g}" for name, (low, high) in config.numbers.items()]
    categories = [f"{name} ({', '.join(values[:20])})" for name, values in config.categories.items()]
    return (
        f"It was told attributes beside the label: {', '.join([*numbers, *categories])}: "
        "`system.sample(attributes=[{...}], labels=[0])`."
    )


def null(told: Tensor) -> Tensor:
    """(B, 1 + A) -> the same number of null conditions."""
    found = torch.full_like(told, math.nan)
    found[:, 0] = 0
    return found


def partly_dropped(told: Tensor, rate: float) -> Tensor:
    """(B, 1 + A) -> each attribute, and the label, left out of a share `rate`. Brooks et al., section 3.2.1."""
    return torch.where(torch.rand(told.shape, device=told.device) < rate, null(told), told)


class Network(nn.Module):
    """(B, 1 + A) conditions, or (B,) labels up to and including the null label -> (B, N), a sum over what is told.

    It stands where a table of labels would.
    """

    def __init__(self, config: Config, spec: TokenSpec, replaced: nn.Embedding):
        """replaced: the table of labels, which is kept for these, and whose scale the attributes have."""
        super().__init__()
        self.context = None  # there is no sequence
        self.num_classes, self.num_numbers = spec.num_classes, len(config.numbers)
        self.num_attributes = len(config.columns)
        self.labels, width = replaced, replaced.embedding_dim
        scale = float(replaced.weight.detach().std())
        self.numbers = nn.ModuleList(
            nn.Sequential(nn.Linear(1 + 2 * OCTAVES, WIDTH), nn.SiLU(), nn.Linear(WIDTH, width)) for _ in config.numbers
        )
        self.categories = nn.ModuleList(
            nn.Embedding(len(config.categories[name]), width) for name in sorted(config.categories)
        )
        self.missing = nn.Parameter(torch.zeros(self.num_attributes, width))
        for table in self.categories:
            nn.init.normal_(table.weight, std=scale)
        for network in self.numbers:
            nn.init.normal_(network[2].weight, std=2 * scale / WIDTH**0.5)

    def forward(self, told: Tensor) -> Tensor:
        if told.ndim == 1:
            labels, said = told, told.new_full((len(told), self.num_attributes), math.nan, dtype=torch.float32)
        else:
            labels, said = (told[:, 0].long() - 1) % (self.num_classes + 1), told[:, 1:]
        found = self.labels(labels)
        is_missing = said.isnan()
        said = said.nan_to_num(0.0)
        for place in range(self.num_attributes):
            one = said[:, place]
            if place < self.num_numbers:
                vector = self.numbers[place](waves(one))
            else:
                vector = F.embedding(one.long(), self.categories[place - self.num_numbers].weight)
            found = found + torch.where(is_missing[:, place : place + 1], self.missing[place], vector)
        return found


def waves(numbers: Tensor) -> Tensor:
    """Tancik et al., section 5: (B,) in [-1, 1] -> (B, 1 + 2 * OCTAVES), the number, and sines and cosines of octaves of it."""
    angles = numbers.unsqueeze(1) * (math.pi / 2 * 2.0 ** torch.arange(OCTAVES, device=numbers.device))
    return torch.cat([numbers.unsqueeze(1), angles.sin(), angles.cos()], dim=1)

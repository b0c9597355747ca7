"""Classes from the names of files: cat_001.jpg is a cat by `label_pattern: "([a-z]+)_[0-9]+"`.

The pattern is a regular expression of the whole name, without folders and without the last suffix; its one group is the class.
A file whose name it does not fit is an error and no smaller data set.
"""

import re
from collections.abc import Collection
from pathlib import PurePosixPath
from typing import Annotated, Any

from pydantic import AfterValidator, ValidationInfo

from tessera.sources.listing import Entry, Listing
from tessera.sources.metadata import MOST_CLASSES, MOST_NAMED

MOST_DIGITS = 18  # of a class that is a number


def _pattern(text: str, info: ValidationInfo) -> str:
    try:
        groups = re.compile(text).groups
    except (re.error, RecursionError, OverflowError) as error:
        raise ValueError(
            f'{text!r:.80} is no regular expression ({error}): expected one such as "([a-z]+)_[0-9]+"'
        ) from None
    if groups != 1:
        raise ValueError(
            f"{text!r:.80} has {groups} groups, expected one group in parentheses, whose text is the class: write (?:...) "
            f"around what is not the class"
        )
    metadata = info.data.get("metadata")
    if metadata is not None and metadata.label is not None:
        raise ValueError("metadata.label is set too, expected one of them to say the class: leave out the other")
    return text


LabelPattern = Annotated[str, AfterValidator(_pattern)]


def without_classes(config: Any) -> Any:
    """The same data set, whose folders are no classes."""
    return config.model_copy(update={"labels": "none"})


class NamedLayout:
    """Where images belong: the class by the pattern, all else as the layout below says."""

    def __init__(self, layout: Any, config: Any, entries: Listing):
        """layout: with place(name), and said(name) if there are metadata; config: with source and label_pattern.

        Raises ValueError for names that do not fit, and unless there are two classes or more.
        """
        self.layout, self.config = layout, config
        self._pattern = re.compile(config.label_pattern)
        found, strays, num_strays = set(), [], 0
        for entry in entries:
            if not self._is_image(entry):
                continue
            label = self._label(entry.name)
            if label:
                found.add(label)
                continue
            num_strays += 1
            strays += [entry.name] if len(strays) < MOST_NAMED else []
        if num_strays:
            raise ValueError(
                f"{config.source}: label_pattern {config.label_pattern!r} finds no class in {num_strays:,} names, such as "
                f"{', '.join(map(repr, strays))}, expected it to fit each whole name without folders and suffix: correct "
                f"it, or take these files out"
            )
        self.class_names = sorted(found, key=_naturally)
        if not 2 <= len(found) <= MOST_CLASSES:
            some = f", such as {self.class_names[0]!r}" if found else ""
            raise ValueError(
                f"{config.source}: label_pattern {config.label_pattern!r} finds {len(found):,} classes{some}, expected 2 to "
                f"{MOST_CLASSES:,}: correct its group, or set labels: none in its place"
            )
        self.numbers = {name: number for number, name in enumerate(self.class_names)}

    def _is_image(self, entry: Entry) -> bool:
        """Whether the file is to become one, as far as its place in the source says."""
        return not (entry.refusal or self.layout.place(entry.name).refusal)

    def _label(self, name: str) -> str | None:
        """None or empty: the pattern finds none."""
        fits = self._pattern.fullmatch(PurePosixPath(name).stem)
        return fits and fits[1]

    def place(self, name: str) -> Any:
        place = self.layout.place(name)
        return place if place.refusal else place._replace(label=self.numbers[self._label(name)])

    def said(self, name: str) -> Any:
        return self.layout.said(name)

    def beside(self, entry: Entry) -> Entry:
        return self.layout.beside(entry)

    def require_images(self, labels: Collection[int]) -> None:
        """Raises ValueError, given the labels of all images, if a class has none; of no image at all files tell the reasons."""
        barren = [name for label, name in enumerate(self.class_names) if label not in labels]
        if barren and labels:
            more = f" and {len(barren) - MOST_NAMED} more" if len(barren) > MOST_NAMED else ""
            raise ValueError(
                f"{self.config.source} has no readable image of the class {', '.join(map(repr, barren[:MOST_NAMED]))}{more}, "
                f"which label_pattern finds in names: mend its files, or take them out"
            )


def _naturally(name: str) -> tuple[int, int, str]:
    """Whole numbers by their size, before words by their letters."""
    is_number = name.isascii() and name.isdigit() and len(name) <= MOST_DIGITS
    return (0, int(name), name) if is_number else (1, 0, name)

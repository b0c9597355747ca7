"""A figure and its protocol: what was measured, on which images, by which network, so that unequal ones are never compared.

A metrics file holds groups of figures by name, and under "protocols" what the figures refer to. What a system is (its
sampler, steps, guidance, weights, seed) is no part of a protocol, because systems may differ in it: it stands under "drawn".
"""

import math
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from pydantic import Field

from tessera.artifacts import folder as artifact
from tessera.components import Params, parse

PROTOCOLS, DRAWN = "protocols", "drawn"  # the keys of a metrics file that are no groups of figures
ROUNDING = 1e-9  # figures are of order 1: what is smaller is what the rounding of sums has left of 0
Setting = str | int | float | bool


class Protocol(Params):
    """What must be equal where two figures stand in one column."""

    dataset: str
    images: str  # whose figure it is: samples, reconstructions of the test images, tokens of the training images, ...
    num_images: Annotated[int, Field(ge=1)]
    reference_split: str  # what they are compared with: test, train, or none
    reference_sha256: str  # of the images and labels of that split; "" without one
    num_reference_images: Annotated[int, Field(ge=0)]
    network: str  # the kind of the feature network, or none
    network_sha256: str  # of its weights; "" without one
    resize: str  # what is done to the size of an image before the network
    dtype: str  # of the features, and of the statistics taken of them
    settings: dict[str, Setting]  # of the metric: neighbors, subsets, shares

    def differences(self, other: "Protocol") -> dict[str, tuple[Any, Any]]:
        """The fields in which two protocols differ, settings by their own names, with both values."""
        mine, theirs = (one.model_dump() for one in (self, other))
        mine, theirs = mine | mine.pop("settings"), theirs | theirs.pop("settings")
        return {key: (mine.get(key), theirs.get(key)) for key in {**mine, **theirs} if mine.get(key) != theirs.get(key)}


def without_network(
    dataset: str,
    images: str,
    num_images: int,
    reference_split: str = "none",
    reference_sha256: str = "",
    **settings: Setting,
) -> Protocol:
    """That of a figure of pixels, indices or likelihoods, which no feature network has a part in."""
    return Protocol(
        dataset=dataset,
        images=images,
        num_images=num_images,
        reference_split=reference_split,
        reference_sha256=reference_sha256,
        num_reference_images=0 if reference_split == "none" else num_images,
        network="none",
        network_sha256="",
        resize="none",
        dtype="float64",
        settings=settings,
    )


class Figure(Params):
    value: float
    standard_error: Annotated[float, Field(ge=0)] | None  # over draws of as many images; None: not known
    num_images: Annotated[int, Field(ge=1)]
    protocol: str  # its name among the protocols of the file


class Measured(Params):
    """The figures of one tokenizer, prior or system, as its metrics file holds them."""

    groups: dict[str, dict[str, Figure]]
    protocols: dict[str, Protocol]
    drawn: dict[str, Any] = {}  # how the samples of a system were drawn, from what

    def figure(self, name: str) -> Figure | None:
        """The figure of this name in any group."""
        return next((figures[name] for figures in self.groups.values() if name in figures), None)

    def protocol(self, name: str) -> Protocol:
        """That of a figure which is there."""
        return self.protocols[self.figure(name).protocol]

    def write(self, path: Path) -> None:
        groups = {
            group: {name: figure.model_dump() for name, figure in figures.items()}
            for group, figures in self.groups.items()
        }
        protocols = {name: protocol.model_dump() for name, protocol in self.protocols.items()}
        artifact.write_json(path, groups | {PROTOCOLS: protocols} | ({DRAWN: self.drawn} if self.drawn else {}))


class Recorder:
    """Collects figures with their protocols."""

    def __init__(self) -> None:
        self.groups: dict[str, dict[str, Figure]] = {}
        self.protocols: dict[str, Protocol] = {}

    def add(self, group: str, name: str, value: float, protocol: Protocol, standard_error: float | None = None) -> None:
        """Protocols get the name of the first figure that has them, so that equal ones are written once.

        Raises ValueError for a value that is not finite, and takes an error that is not for one that is not known.
        """
        if not math.isfinite(value):
            raise ValueError(
                f"{group}/{name} is {value}, expected a finite number: look for NaN in the images, the weights or the losses "
                f"it is of"
            )
        if standard_error is not None and not math.isfinite(standard_error):
            standard_error = None
        known = next((key for key, one in self.protocols.items() if one == protocol), None)
        if known is None:
            known = f"{group}/{name}"
            self.protocols[known] = protocol
        self.groups.setdefault(group, {})[name] = Figure(
            value=value, standard_error=standard_error, num_images=protocol.num_images, protocol=known
        )

    def add_mean(self, group: str, name: str, values: Any, protocol: Protocol) -> None:
        """The mean of one value per image, and its standard error."""
        values = np.asarray(values, np.float64)
        error = values.std(ddof=1) / len(values) ** 0.5 if len(values) > 1 else None
        self.add(group, name, float(values.mean()), protocol, None if error is None else float(error))

    def add_share(self, group: str, name: str, share: float, protocol: Protocol, of: int | None = None) -> None:
        """A share of `of` images (unset: of the protocol's) that are counted yes or no."""
        self.add(group, name, share, protocol, share_error(share, of or protocol.num_images))

    def group(self, name: str) -> "Group":
        return Group(self, name)

    def measured(self, drawn: dict[str, Any] | None = None, beside: "tuple[Measured, ...]" = ()) -> Measured:
        """All of it, and the figures of others beside it (of a system: those of its tokenizer and its prior)."""
        groups, protocols = dict(self.groups), dict(self.protocols)
        for other in beside:
            groups |= other.groups
            protocols |= other.protocols
        return Measured(groups=groups, protocols=protocols, drawn=drawn or {})


class Group:
    """One group of a Recorder, as a metric is handed it (contracts.Record): a name in it is measured once."""

    def __init__(self, found: Recorder, name: str):
        self.found, self.name = found, name
        self.alarms: list[str] = []
        self.notes: list[str] = []

    def add(self, name: str, value: float, protocol: Protocol, standard_error: float | None = None) -> None:
        self.found.add(self.name, self._new(name), value, protocol, standard_error)

    def add_mean(self, name: str, values: Any, protocol: Protocol) -> None:
        self.found.add_mean(self.name, self._new(name), values, protocol)

    def add_share(self, name: str, share: float, protocol: Protocol, of: int | None = None) -> None:
        self.found.add_share(self.name, self._new(name), share, protocol, of)

    def alarm(self, sentence: str) -> None:
        self.alarms.append(sentence)

    def note(self, sentence: str) -> None:
        self.notes.append(sentence)

    def _new(self, name: str) -> str:
        if name in self.found.groups.get(self.name, {}):
            raise ValueError(
                f"{self.name}/{name} was measured already: two entries of evaluate.metrics give a figure of this name, "
                f"expected one; take an entry out"
            )
        return name


def text(value: float, form: str = "{:.4g}") -> str:
    """A number as people are shown it. Where rounding is all there is, it is 0."""
    return form.format(0.0 if abs(value) < ROUNDING else value)


def text_with_error(value: float, standard_error: float | None) -> str:
    """A figure as people are shown it, with its error if that is known (not None or NaN) and there is anything to be off."""
    is_known = standard_error is not None and not math.isnan(standard_error)
    if not is_known or max(abs(value), standard_error) < ROUNDING:
        return text(value)
    form = as_exact_as(standard_error)
    return f"{text(value, form)} ± {text(standard_error, form)}"


def as_exact_as(standard_error: float) -> str:
    """The format of a figure and of its error: two digits of the error, as many of the figure."""
    if not math.isfinite(standard_error) or standard_error < ROUNDING:
        return "{:.4g}"
    return f"{{:.{max(0, 1 - math.floor(math.log10(standard_error)))}f}}"


def share_error(share: float, number: int) -> float:
    """The standard error of a share of `number` images, with one yes and one no added (Laplace's rule of succession).

    Without them a share of 0 or 1 would claim to be exact.
    """
    smoothed = (share * number + 1) / (number + 2)
    return math.sqrt(smoothed * (1 - smoothed) / number)


def read(path: Path) -> Measured:
    """A metrics file. Raises InvalidParams or ArtifactError for anything else."""
    content = artifact.read_json(Path(path))
    if not isinstance(content, dict) or PROTOCOLS not in content:
        raise artifact.ArtifactError(
            f"{path} holds no figures with their protocols, expected the keys of groups and '{PROTOCOLS}': "
            f"it may be of an older version; make it again with dvc repro"
        )
    groups = {key: value for key, value in content.items() if key not in (PROTOCOLS, DRAWN)}
    whole = {"groups": groups, "protocols": content[PROTOCOLS], "drawn": content.get(DRAWN, {})}
    found = parse(Measured, whole, str(path))
    for group, figures in found.groups.items():
        for name, figure in figures.items():
            if figure.protocol not in found.protocols:
                raise artifact.ArtifactError(
                    f"{path}: {group}/{name} refers to the protocol '{figure.protocol}', which is not in the file: "
                    f"it was changed by hand; make it again with dvc repro"
                )
    return found

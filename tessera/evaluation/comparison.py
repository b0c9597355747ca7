"""Systems side by side: one protocol per column or none at all, which differences exceed the noise, and whose fault they are.

    python -m tessera.evaluation.comparison                                       # this checkout
    python -m tessera.evaluation.comparison data/metrics ../other-run/data/metrics  # mean and error over both

compares runs (folders of metrics): each system's figures over the runs, which may differ in seed. Figures of unequal
protocols are refused, naming what differs.

A standard error is over draws of samples from one trained system. Training again with another seed moves figures as well:
with several runs of a system their spread is what differences are weighed by.
"""

import argparse
import fnmatch
import math
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd

from tessera.artifacts import recorded
from tessera.components import InvalidParams, kinds, load
from tessera.contracts import Shown
from tessera.evaluation import figures
from tessera.evaluation.figures import Measured, Protocol

DEVIATIONS = 2.0  # standard errors of a difference that noise is not believed to reach
REAL = "real"
MOST_OF_A_SUMMARY = 12
OF_ITS_OWN_TOKENS = (
    "prior"  # losses and bits of one prior's tokens stand in no column with those of another tokenizer's
)


class MixedProtocols(ValueError):
    """Figures that were measured differently were about to stand in one column."""


class Estimate(NamedTuple):
    """A figure of one system, from one run or several."""

    value: float  # the mean over runs
    standard_error: float  # of it; NaN where it is not known
    num_runs: int


Systems = dict[str, list[Measured]]  # by name, one for each run


def require_one_protocol(systems: Systems) -> None:
    """Raises MixedProtocols, one sentence per cause, unless each figure has the same protocol in all systems and runs.

    Figures of priors on their own tokens are left out.
    """
    first: dict[str, tuple[str, Protocol]] = {}
    causes: dict[str, tuple[str, list[str]]] = {}  # by the values that differ: where they do, and the figures
    for name, runs in systems.items():
        for number, measured in enumerate(runs):
            where = name if len(runs) == 1 else f"{name} (run {number + 1})"
            for group, some in measured.groups.items():
                for key, figure in some.items() if group != OF_ITS_OWN_TOKENS else ():
                    protocol = measured.protocols[figure.protocol]
                    other, expected = first.setdefault(f"{group}/{key}", (where, protocol))
                    differences = protocol.differences(expected)
                    if differences:
                        listed = "; ".join(
                            f"{field} is {_short(theirs)} in {other}, {_short(mine)} in {where}"
                            for field, (mine, theirs) in differences.items()
                        )
                        causes.setdefault(repr(differences), (listed, []))[1].append(key)
    if causes:
        raise MixedProtocols(
            ". ".join(f"{_listed(keys)} cannot stand in one column: {listed}" for listed, keys in causes.values())
            + ". Measure all of them alike: the same data set, features and evaluate params, then dvc repro"
        )


def estimate(runs: list[Measured], key: str) -> Estimate | None:
    """The mean of a figure over the runs of a system, and its error: that of one run's draws, or for several runs what
    their spread says, but no less than their draws alone give: the spread of two or three may be small by chance."""
    found = [figure for figure in (run.figure(key) for run in runs) if figure is not None]
    if not found:
        return None
    values = np.array([figure.value for figure in found])
    if len(found) > 1:
        of_draws = np.array([figure.standard_error or 0.0 for figure in found])  # 0: not known, and no bound
        error = max(values.std(ddof=1), np.sqrt((of_draws**2).mean())) / len(values) ** 0.5
        return Estimate(float(values.mean()), float(error), len(values))
    error = found[0].standard_error
    return Estimate(float(values[0]), math.nan if error is None else error, 1)


def exceeds_noise(a: Estimate, b: Estimate) -> bool:
    """Whether two estimates differ by more than DEVIATIONS standard errors of their difference. Unknown errors never do."""
    return abs(a.value - b.value) > DEVIATIONS * math.hypot(a.standard_error, b.standard_error)


def differences(systems: Systems, key: str) -> pd.DataFrame:
    """Every pair of systems by one figure: its difference, the standard error of that, whether it exceeds the noise."""
    known = {name: found for name, runs in systems.items() if (found := estimate(runs, key))}
    names = sorted(known, key=lambda name: known[name].value)
    rows = []
    for number, first in enumerate(names):
        for second in names[number + 1 :]:
            a, b = known[first], known[second]
            error = math.hypot(a.standard_error, b.standard_error)
            rows.append((key, first, second, b.value - a.value, error, exceeds_noise(a, b)))
    return pd.DataFrame(rows, columns=["figure", "lower", "higher", "difference", "standard_error", "exceeds_noise"])


def ranking(systems: Systems, key: str, better: str = "lower") -> str:
    """Systems from the best figure to the worst, "<" (or ">") where a step exceeds the noise and "~" where it does not."""
    known = {name: found for name, runs in systems.items() if (found := estimate(runs, key))}
    names = sorted(known, key=lambda name: known[name].value, reverse=better == "higher")
    errors = [found.standard_error for found in known.values() if math.isfinite(found.standard_error)]
    form = figures.as_exact_as(max(errors, default=math.nan))  # one for all of them
    step = " > " if better == "higher" else " < "
    text = ""
    for number, name in enumerate(names):
        if number:
            text += step if exceeds_noise(known[names[number - 1]], known[name]) else " ~ "
        text += f"{name} {figures.text(known[name].value, form)}"
    return text


class Bottleneck(NamedTuple):
    """A Fréchet distance of samples in three parts that add up: what real images have, and what each stage adds."""

    floor: float  # training images against the test images
    tokenizer: float  # reconstructions of these training images, less the floor: what the best prior could reach
    prior: float  # samples, less those reconstructions
    stage: str  # tokenizer, prior, or none: neither exceeds the noise


def bottleneck(runs: list[Measured], real: list[Measured], distance: str) -> Bottleneck | None:
    """Which stage costs a system most of its Fréchet distance `distance` (fd_classifier, fid, ...); None if not measured.

    The prior's part holds what its mistakes become when they are decoded. Where indices that are slightly wrong already
    cost more (pfd - rfd) than all that the prior adds, the tokenizer forgives nothing, and the prior is not to blame alone:
    "prior, by a fragile tokenizer".
    """
    floor, best, reached = estimate(real, distance), estimate(runs, f"floor_{distance}"), estimate(runs, distance)
    if floor is None or best is None or reached is None:
        return None
    of_tokenizer, of_prior = best.value - floor.value, reached.value - best.value
    stages = {"tokenizer": (of_tokenizer, (best, floor)), "prior": (of_prior, (reached, best))}
    stage, (part, pair) = max(stages.items(), key=lambda item: item[1][0])
    if part <= 0 or not exceeds_noise(*pair):
        stage = "none"
    perturbed, reconstructed = estimate(runs, f"p{distance}"), estimate(runs, f"r{distance}")
    if stage == "prior" and perturbed and reconstructed and perturbed.value - reconstructed.value > of_prior:
        stage = "prior, by a fragile tokenizer"
    return Bottleneck(floor.value, of_tokenizer, of_prior, stage)


def distance_names(systems: Systems) -> list[str]:
    """The Fréchet distances that systems have, the first judge's first."""
    names = [key for runs in systems.values() for run in runs for key in run.groups.get("generation", {})]
    return list(dict.fromkeys(name for name in names if name == "fid" or name.startswith("fd_")))


def columns(systems: Systems, metrics: Iterable[str], groups: Iterable[str]) -> dict[str, Shown]:
    """By figure of these groups, how it is shown, for each that a metric (a kind) shows; in the order of the metrics."""
    names = sorted(
        {key for runs in systems.values() for run in runs for group in groups for key in run.groups.get(group, {})}
    )
    found: dict[str, Shown] = {}
    for shown in (shown for kind in metrics for shown in load("metrics", kind).FIGURES if shown.form is not None):
        for name in fnmatch.filter(names, shown.name):
            found.setdefault(name, shown)
    return found


def summary(measured: Measured, metrics: Iterable[str]) -> dict[str, float]:
    """The first MOST_OF_A_SUMMARY figures of a system that the tables show, those of its samples before those of its parts.

    For tables that others make of plain numbers, as DVC does: without errors and protocols, to four digits.
    """
    shown = (
        columns({"": [measured]}, list(metrics), [group]) for group in ("generation", "reconstruction", "codebook")
    )
    names = [name for some in shown for name in some]
    if measured.figure("bits_per_image"):
        names.insert(0, "bits_per_image")
    return {name: float(f"{measured.figure(name).value:.4g}") for name in names[:MOST_OF_A_SUMMARY]}


def table(systems: Systems, formats: dict[str, str], with_errors: Iterable[str] = ()) -> pd.DataFrame:
    """One row per system, one column per known figure, as text."""
    with_errors = set(with_errors)
    rows = []
    for name, runs in systems.items():
        row = {"system": name}
        for key, form in formats.items():
            found = estimate(runs, key)
            if found is not None:
                error = "" if math.isnan(found.standard_error) else f" ± {figures.text(found.standard_error, form)}"
                row[key] = figures.text(found.value, form) + (error if key in with_errors or found.num_runs > 1 else "")
        rows.append(row)
    found = pd.DataFrame(rows)
    return found[["system", *(key for key in formats if key in found)]].fillna("")


def markdown(frame: pd.DataFrame) -> str:
    widths = [max(len(name), *map(len, frame[name])) for name in frame]
    lines = [list(frame), ["-" * width for width in widths], *frame.to_numpy().tolist()]
    return "\n".join(
        "| " + " | ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=True)) + " |" for line in lines
    )


def read_runs(folders: list[Path]) -> Systems:
    """The systems of several folders `data/metrics`, each system's runs in the order of the folders."""
    systems: Systems = {}
    for folder in folders:
        paths = sorted(Path(folder).glob("systems/*.json"), key=lambda path: (path.stem != REAL, path.stem))
        if not paths:
            raise ValueError(f"{folder} has no systems/*.json, expected a folder like data/metrics of a finished run")
        for path in paths:
            measured = figures.read(path)
            if path.stem != REAL and measured in systems.get(path.stem, []):
                raise ValueError(
                    f"{folder} has the same {path.stem} as a folder before it, figure by figure: a copy, or the run made "
                    f"again, is no second draw; leave it out"
                )
            systems.setdefault(path.stem, []).append(measured)
    return systems


def _listed(keys: list[str]) -> str:
    """fd_classifier, rfd_classifier and 7 more"""
    names = list(dict.fromkeys(keys))
    return ", ".join(names) if len(names) <= 3 else f"{', '.join(names[:2])} and {len(names) - 2} more"


def _short(value: object) -> str:
    text = str(value)
    return text[:12] if len(text) == 64 and set(text) <= set("0123456789abcdef") else repr(value)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="*", type=Path, help="folders of metrics (default: data/metrics)")
    folders = parser.parse_args().runs or [Path("data/metrics")]
    try:
        for folder in folders:
            recorded.require_all_as_written(folder)
        systems = read_runs(folders)
        require_one_protocol(systems)
    except (InvalidParams, ValueError) as error:
        print(f"comparison refused: {error}", file=sys.stderr)
        return 2
    shown = columns(systems, kinds("metrics"), ["generation"])
    print(markdown(table(systems, {key: column.form for key, column in shown.items()}, with_errors=shown)))
    if len(folders) > 1:
        print(f"\nMeans over {len(folders)} runs ± their standard errors.")
    for key, column in shown.items():
        if column.ranks:
            print(f"\n{key}, from the best: {ranking(systems, key, column.better)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())

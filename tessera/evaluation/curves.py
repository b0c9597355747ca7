"""Curves of trainings drawn over the committed curves of the same preset: is this loss normal?

Reference curves lie in presets/curves/NAME.csv, one row per training and step: stage, a digest of its settings, step, and the
columns that the training wrote into its history. They are thinned to ROWS rows a training. From a finished run they are
written by: python -m tessera.evaluation.curves data/curves presets/curves/NAME.csv
"""

import base64
import hashlib
import io
import json
import sys
from pathlib import Path
from typing import NamedTuple

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from tessera import params as all_params
from tessera.artifacts import whole
from tessera.params import Pipeline

ROWS = 50  # of a training, in the committed file
SHOWN = ("loss", "accuracy", "codebook_usage", "codebook_perplexity", "discriminator_accuracy", "test_loss")
STYLE = {"svg.fonttype": "none", "svg.hashsalt": "tessera", "font.family": "sans-serif", "font.size": 8}


def stage_of(path: Path, curves: Path) -> str:
    """data/curves/priors/gan.csv -> train_prior@gan, features/x.csv -> train_features@x, tokenizers/y.csv -> ..."""
    folder = path.relative_to(curves).parts[0]
    return f"train_{folder if folder == 'features' else folder.removesuffix('s')}@{path.stem}"


def read(curves: Path) -> dict[str, pd.DataFrame]:
    """The history of each training of a run, by stage; trainings without steps are left out."""
    folders = ("features", "tokenizers", "priors")
    paths = [path for folder in folders for path in sorted((curves / folder).glob("*.csv"))]
    found = {stage_of(path, curves): pd.read_csv(path) for path in paths}
    return {stage: history for stage, history in found.items() if len(history)}


class Reference(NamedTuple):
    """The committed curve of one training."""

    history: pd.DataFrame
    has_these_settings: bool  # as those of the run it is drawn below


def reference_of(params: Pipeline, folder: Path) -> dict[str, Reference]:
    """The committed curves of a run's data set, by stage; none if there is no file."""
    path = folder / f"{params.dataset.name}.csv"
    if not path.is_file():
        return {}
    rows, known = pd.read_csv(path, dtype={"settings": str}), digests(params)
    return {
        stage: Reference(
            some.drop(columns=["stage", "settings"]).dropna(axis=1, how="all"),
            some["settings"].iloc[0] == known.get(stage),
        )
        for stage, some in rows.groupby("stage")
    }


def digests(params: Pipeline) -> dict[str, str]:
    """A short hash of the settings of each training."""
    parts = {f"train_features@{name}": part for name, part in params.features.items()}
    parts |= {f"train_tokenizer@{name}": part for name, part in params.tokenizers.items()}
    parts |= {f"train_prior@{name}": system.prior for name, system in params.systems.items()}
    return {
        stage: hashlib.sha256(json.dumps(part.model_dump(mode="json"), sort_keys=True).encode()).hexdigest()[:12]
        for stage, part in parts.items()
    }


def thinned(runs: dict[str, pd.DataFrame], params: Pipeline) -> pd.DataFrame:
    """At most ROWS rows of each training, evenly spread and with the last one, all in one table."""
    parts, known = [], digests(params)
    for stage, history in runs.items():
        columns = ["step", *(name for name in SHOWN if name in history)]
        rows = np.unique(np.linspace(0, len(history) - 1, min(ROWS, len(history))).round().astype(int))
        parts.append(history.iloc[rows][columns].assign(stage=stage, settings=known[stage]))
    table = pd.concat(parts, ignore_index=True)
    return table[["stage", "settings", "step", *(name for name in SHOWN if name in table)]]


def svg(history: pd.DataFrame, reference: Reference | None) -> str:
    """A row of small plots, one per column worth seeing, as a data URI; the reference in gray below, dotted if it had other
    settings."""
    columns = [name for name in SHOWN if name in history]
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(2.6 * len(columns), 1.9), layout="constrained")
        for axes, column in zip(np.ravel(figure.subplots(1, len(columns))), columns, strict=True):
            if reference is not None and column in reference.history:
                there = reference.history[["step", column]].dropna()
                style = "-" if reference.has_these_settings else ":"
                axes.plot(there["step"], there[column], style, color="0.72", linewidth=3)
            here = history[["step", column]].dropna()
            axes.plot(here["step"], here[column], color="tab:blue", linewidth=1)
            axes.set_ylabel(column)
            axes.set_xlabel("step")
            for side in ("top", "right"):
                axes.spines[side].set_visible(False)
        return as_uri(figure)


def histogram_svg(uses: pd.DataFrame) -> str:
    """How often each code of a codebook occurs, the most used first; uses has the columns rank and uses."""
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(4.2, 1.7), layout="constrained")
        axes = figure.subplots()
        axes.fill_between(uses["rank"], uses["uses"], step="mid", color="tab:blue")
        axes.set_xlabel("codes, the most used first")
        axes.set_ylabel("uses")
        axes.set_ylim(bottom=0)
        return as_uri(figure)


def as_uri(figure: Figure) -> str:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    return "data:image/svg+xml;base64," + base64.b64encode(buffer.getvalue()).decode()


def main() -> None:
    curves, out = map(Path, sys.argv[1:])
    table = thinned(read(curves), all_params.read(Path("params.yaml")))
    with whole.file(out) as beside:
        table.to_csv(beside, index=False, float_format="%.5g")
    print(f"{len(table):,} rows of {table.stage.nunique()} trainings: {out}")


if __name__ == "__main__":
    main()

"""One page of a run that needs nothing beside it: tables, curves, pictures and protocols, to open in a browser or to send."""

import base64
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pandas as pd
from jinja2 import Environment, StrictUndefined, Template

from tessera.artifacts import whole
from tessera.contracts import Job
from tessera.evaluation import comparison, figures, trial
from tessera.evaluation import curves as training_curves
from tessera.evaluation.comparison import REAL
from tessera.evaluation.figures import Measured
from tessera.params import Pipeline

TEMPLATE = Path("tessera/evaluation/report.html")
FIRST = (
    "label_agreement",
    "fid",
    "fd_",
    "psnr_db",
    "rfid",
    "rfd_",
    "pfid",
    "pfd_",
    "floor_",
    "copy_rate",
)  # then the others


def run(
    params: Pipeline,
    metrics: Path,
    pictures: Path,
    curves: Path,
    priors: Path,
    reference_curves: Path,
    out: Path,
    job: Job,
) -> None:
    page = _template().render(
        dataset=params.dataset.name,
        num_images=params.sample_images.num_images,
        seed=params.seed,
        origin=job.origin(),
        **_measured(params, metrics),
        **_pictured(params, metrics, pictures, curves, priors),
        **_curves(params, curves, reference_curves),
    )
    with whole.file(out) as beside:
        beside.write_text(page, encoding="utf-8")
    job.attach(out, "report.html")
    job.say(f"{len(page) / 2**20:.1f} MiB, open it in a browser: {out}")


def _measured(params: Pipeline, metrics: Path) -> dict[str, Any]:
    """The tables: of systems and of tokenizers, the main columns and all of them, rankings, bottlenecks, protocols."""
    systems = {name: figures.read(metrics / f"systems/{name}.json") for name in (REAL, *params.systems)}
    tokenizers = {name: figures.read(metrics / f"tokenizers/{name}.json") for name in params.tokenizers}
    runs, of_tokenizers = ({name: [one] for name, one in some.items()} for some in (systems, tokenizers))
    distances = comparison.distance_names(runs)
    kinds = [config.kind for config in params.evaluate.metrics.values()]
    of_parts = ("reconstruction", "codebook")
    return {
        "main": _rows(systems, of=(shown := comparison.columns(runs, kinds, ["generation"]))),
        "directions": {
            direction: [key for key, column in shown.items() if column.better == direction]
            for direction in ("lower", "higher")
        },
        "main_of_tokenizers": _rows(tokenizers, of=comparison.columns(of_tokenizers, kinds, of_parts)),
        "warnings": trial.sentences(systems[REAL]),
        "rankings": {key: comparison.ranking(runs, key) for key in distances},
        "systems": _rows(systems, ("generation",)),
        "tokenizers": _rows(tokenizers, of_parts),
        "floors": _rows({REAL: systems[REAL]}, ("floor", "trial")),
        "bottlenecks": {name: comparison.bottleneck(runs[name], runs[REAL], distances[0]) for name in params.systems},
        "main_distance": distances[0],
        "priors": {name: systems[name].groups.get("prior", {}) for name in params.systems},
        "drawn": {name: systems[name].drawn for name in params.systems},
        "system_tokenizers": {name: system.tokenizer for name, system in params.systems.items()},
        "protocols": _protocols(systems | {f"tokenizer {name}": one for name, one in tokenizers.items()}),
    }


def _pictured(params: Pipeline, metrics: Path, pictures: Path, curves: Path, priors: Path) -> dict[str, Any]:
    """The pictures of each tokenizer and of each system, and what its edits are worth."""
    return {
        "tokenizer_pictures": {
            name: {
                "reconstructions": _png(pictures / f"reconstructions/{name}.png"),
                "codebook": _codebook(curves / f"codebooks/{name}.csv"),
            }
            for name in params.tokenizers
        },
        "system_pictures": {
            name: {
                "samples": _png(pictures / f"samples/{name}.png"),
                "neighbors": _png(pictures / f"neighbors/{name}.png"),
                "training": _png(priors / name / "looks" / "training.png"),
            }
            for name in params.systems
        },
        "edits": {
            name: _edits(metrics / f"edits/{name}.json", pictures / f"edits/{name}.png", params.edits)
            for name in params.systems
        },
    }


def _curves(params: Pipeline, curves: Path, reference_curves: Path) -> dict[str, Any]:
    """The curve of each training, and whether the one below it had the same settings."""
    histories = training_curves.read(curves)
    known = training_curves.reference_of(params, reference_curves)
    return {
        "curves": {stage: training_curves.svg(history, known.get(stage)) for stage, history in histories.items()},
        "reference": {
            stage: None if stage not in known else "these" if known[stage].has_these_settings else "other"
            for stage in histories
        },
    }


def _template() -> Template:
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.globals |= {"text": figures.text, "text_with_error": figures.text_with_error}
    return environment.from_string(TEMPLATE.read_text(encoding="utf-8"))


def _protocols(measured: dict[str, Measured]) -> dict[str, dict[str, Any]]:
    return {name: {key: one.model_dump() for key, one in each.protocols.items()} for name, each in measured.items()}


def _rows(measured: dict[str, Measured], groups: tuple[str, ...] = (), of: Iterable[str] = ()) -> dict[str, Any]:
    """A table of all figures of these groups, or of those named: columns, and by name the figure in each (None where there
    is none)."""
    columns = list(of)
    for one in measured.values():
        columns += [key for group in groups for key in one.groups.get(group, {}) if key not in columns]
    if groups:
        columns.sort(
            key=lambda column: next((at for at, start in enumerate(FIRST) if column.startswith(start)), len(FIRST))
        )
    rows = {name: [one.figure(column) for column in columns] for name, one in measured.items()}
    return {"columns": columns, "rows": rows}


def _edits(metrics: Path, picture: Path, edits: Iterable[str]) -> dict[str, Any]:
    """What a system makes of test images: the picture, the figures of each edit above those of its baselines, refusals."""
    measured = figures.read(metrics) if metrics.is_file() else Measured(groups={}, protocols={})
    columns = list(dict.fromkeys(key for some in measured.groups.values() for key in some))
    rows = {name: [some.get(column) for column in columns] for name, some in measured.groups.items()}
    return {
        "picture": _png(picture),
        "names": [name for name in edits if name in measured.groups],  # in the order of the picture's rows
        "figures": {"columns": columns, "rows": rows},
        "refused": measured.drawn.get("refused", {}),
    }


def _png(path: Path) -> str | None:
    if not path.is_file():
        return None
    return "data:image/png;base64," + base64.b64encode(path.read_bytes()).decode()


def _codebook(path: Path) -> str | None:
    uses = pd.read_csv(path) if path.is_file() else pd.DataFrame()
    return training_curves.histogram_svg(uses) if len(uses) else None

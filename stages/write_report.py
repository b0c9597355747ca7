"""One page of a run that needs nothing beside it: tables, curves, pictures and protocols, to open in a browser or to send."""

import base64
from pathlib import Path
from typing import Any

import pandas as pd
from jinja2 import Environment, StrictUndefined, Template

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
    systems = {name: figures.read(metrics / f"systems/{name}.json") for name in (REAL, *params.systems)}
    tokenizers = {name: figures.read(metrics / f"tokenizers/{name}.json") for name in params.tokenizers}
    as_runs = {name: [measured] for name, measured in systems.items()}
    distances = comparison.distance_names(as_runs)
    histories = training_curves.read(curves)
    reference = training_curves.reference_of(params, reference_curves)
    page = _template().render(
        dataset=params.dataset.name,
        num_images=params.sample_images.num_images,
        seed=params.seed,
        warnings=trial.sentences(systems[REAL]),
        rankings={key: comparison.ranking(as_runs, key) for key in distances},
        systems=_rows(systems, ("generation",)),
        tokenizers=_rows(tokenizers, ("reconstruction", "codebook")),
        floors=_rows({REAL: systems[REAL]}, ("floor", "trial")),
        bottlenecks={
            name: comparison.bottleneck(as_runs[name], as_runs[REAL], distances[0]) for name in params.systems
        },
        main_distance=distances[0],
        tokenizer_pictures={
            name: {
                "reconstructions": _png(pictures / f"reconstructions/{name}.png"),
                "codebook": _codebook(curves / f"codebooks/{name}.csv"),
            }
            for name in params.tokenizers
        },
        system_pictures={
            name: {
                "samples": _png(pictures / f"samples/{name}.png"),
                "neighbors": _png(pictures / f"neighbors/{name}.png"),
                "training": _png(priors / name / "looks" / "training.png"),
            }
            for name in params.systems
        },
        priors={name: systems[name].groups.get("prior", {}) for name in params.systems},
        drawn={name: systems[name].drawn for name in params.systems},
        system_tokenizers={name: system.tokenizer for name, system in params.systems.items()},
        curves={stage: training_curves.svg(history, reference.get(stage)) for stage, history in histories.items()},
        reference={
            stage: None if stage not in reference else "these" if reference[stage].has_these_settings else "other"
            for stage in histories
        },
        protocols=_protocols(systems | {f"tokenizer {name}": one for name, one in tokenizers.items()}),
    )
    out.parent.mkdir(parents=True, exist_ok=True)
    partial = out.with_name(f".{out.name}.partial")
    partial.write_text(page, encoding="utf-8")
    partial.replace(out)
    job.attach(out, "report.html")
    job.say(f"{len(page) / 2**20:.1f} MiB, open it in a browser: {out}")


def _template() -> Template:
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    return environment.from_string(TEMPLATE.read_text(encoding="utf-8"))


def _protocols(measured: dict[str, Measured]) -> dict[str, dict[str, Any]]:
    return {name: {key: one.model_dump() for key, one in each.protocols.items()} for name, each in measured.items()}


def _rows(measured: dict[str, Measured], groups: tuple[str, ...]) -> dict[str, Any]:
    """A table of all figures of these groups: columns, and by name the figure in each (None where there is none)."""
    columns: list[str] = []
    for one in measured.values():
        columns += [key for group in groups for key in one.groups.get(group, {}) if key not in columns]
    columns.sort(
        key=lambda column: next((at for at, start in enumerate(FIRST) if column.startswith(start)), len(FIRST))
    )
    rows = {name: [one.figure(column) for column in columns] for name, one in measured.items()}
    return {"columns": columns, "rows": rows}


def _png(path: Path) -> str | None:
    if not path.is_file():
        return None
    return "data:image/png;base64," + base64.b64encode(path.read_bytes()).decode()


def _codebook(path: Path) -> str | None:
    uses = pd.read_csv(path) if path.is_file() else pd.DataFrame()
    return training_curves.histogram_svg(uses) if len(uses) else None

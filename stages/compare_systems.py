"""Put the figures of every system side by side: a table for people (.md) and one for programs (.csv).

python -m stages.compare_systems --metrics data/metrics/systems --pictures data/pictures --out data/comparison
"""

from pathlib import Path
from typing import Any

import pandas as pd

from tessera import progress, stage_process
from tessera.artifacts import folder as artifact
from tessera.params import Pipeline

SHOWN = {  # column: format
    "label_agreement": "{:.3f}",
    "fd_classifier": "{:.3f}",
    "fd_random": "{:.3f}",
    "fid": "{:.2f}",
    "precision": "{:.3f}",
    "recall": "{:.3f}",
    "coverage": "{:.3f}",
    "copy_rate": "{:.3f}",
    "psnr_db": "{:.2f}",
    "codebook_usage": "{:.3f}",
    "codebook_perplexity": "{:.1f}",
    "num_images_generation": "{:,.0f}",
    "num_images_reconstruction": "{:,.0f}",
}


def run(
    params: Pipeline,
    metrics: Path,
    pictures: Path,
    out: Path,
    job: stage_process.Job,
) -> None:
    shown = [
        (name, pictures / f"samples/{name}.png", pictures / f"reconstructions/{system.tokenizer}.png")
        for name, system in params.systems.items()
    ]
    table = pd.DataFrame([_row(name, metrics / f"{name}.json") for name in ("real", *params.systems)])
    readable = _readable(table)
    lines = [
        f"# {params.dataset.name}: every system by one judge",
        "",
        _markdown(readable),
        "",
        "| system | samples | reconstructions |",
        "| --- | --- | --- |",
        *(f"| {name} | {grid} | {pairs} |" for name, grid, pairs in shown),
    ]
    with artifact.create(out) as place:
        table.to_csv(place / "comparison.csv", index=False)
        (place / "comparison.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    progress.say("\n".join(lines[2:]))


def _row(name: str, path: Path) -> dict[str, Any]:
    """The figures of all groups, and how many images each group's were taken on."""
    row: dict[str, Any] = {"system": name}
    for group, figures in artifact.read_json(path).items():
        if group != "protocol":
            row |= {key: value for key, value in figures.items() if not key.startswith(("num_", "reference"))}
            row |= {f"{key}_{group}": value for key, value in figures.items() if key.startswith("num_")}
    return row


def _readable(table: pd.DataFrame) -> pd.DataFrame:
    shown = table[["system"]].copy()
    for column, form in SHOWN.items():
        if column in table:
            shown[column] = table[column].map(lambda value, form=form: "" if pd.isna(value) else form.format(value))
    return shown


def _markdown(table: pd.DataFrame) -> str:
    widths = [max(len(name), *map(len, table[name])) for name in table]
    lines = [list(table), ["-" * width for width in widths], *table.to_numpy().tolist()]
    return "\n".join(
        "| " + " | ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=True)) + " |" for line in lines
    )


if __name__ == "__main__":
    stage_process.main(run)

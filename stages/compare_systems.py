"""Put the figures of every system side by side: tables for people (.md) and for programs (.csv)."""

from pathlib import Path

import pandas as pd

from tessera.artifacts import folder as artifact
from tessera.contracts import Job, Shown
from tessera.evaluation import comparison, figures, trial
from tessera.evaluation.comparison import REAL, Systems
from tessera.params import Pipeline


def run(params: Pipeline, metrics: Path, pictures: Path, out: Path, job: Job) -> None:
    systems = {name: [figures.read(metrics / f"systems/{name}.json")] for name in (REAL, *params.systems)}
    tokenizers = {name: [figures.read(metrics / f"tokenizers/{name}.json")] for name in params.tokenizers}
    comparison.require_one_protocol(systems | tokenizers)
    distances = comparison.distance_names(systems)
    metrics_in_order = [config.kind for config in params.evaluate.metrics.values()]
    shown = comparison.columns(systems, metrics_in_order, ["generation"])
    of_tokenizers = comparison.columns(tokenizers, metrics_in_order, ["reconstruction", "codebook"])
    lines = [
        f"# {params.dataset.name}: every system by one judge",
        "",
        comparison.markdown(_generation(systems, shown, distances)),
        "",
        *(f"- {sentence}" for sentence in _sentences(systems, distances, params)),
        "",
        comparison.markdown(_table(tokenizers, of_tokenizers).rename(columns={"system": "tokenizer"})),
        "",
        "| system | samples | nearest training images | reconstructions |",
        "| --- | --- | --- | --- |",
        *(
            f"| {name} | {pictures}/samples/{name}.png | {pictures}/neighbors/{name}.png | "
            f"{pictures}/reconstructions/{system.tokenizer}.png |"
            for name, system in params.systems.items()
        ),
    ]
    ranked = [key for key, column in shown.items() if column.ranks and key not in distances]
    pairs = [comparison.differences(systems, key) for key in (*distances, *ranked)]
    with artifact.create(out) as place:
        _long(systems).to_csv(place / "comparison.csv", index=False)
        pd.concat(pairs).to_csv(place / "differences.csv", index=False)
        (place / "comparison.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    print("\n".join(lines[2:]), flush=True)


def _table(systems: Systems, shown: dict[str, Shown]) -> pd.DataFrame:
    forms = {key: column.form for key, column in shown.items()}
    return comparison.table(systems, forms, with_errors=[key for key, column in shown.items() if column.has_error])


def _generation(systems: Systems, shown: dict[str, Shown], distances: list[str]) -> pd.DataFrame:
    """One row per system: its figures, and what each stage contributes to its first Fréchet distance."""
    frame = _table(systems, shown)
    parts = [
        None if name == REAL else comparison.bottleneck(systems[name], systems[REAL], distances[0])
        for name in frame["system"]
    ]
    at = frame.columns.get_loc(distances[-1]) + 1
    frame.insert(at, "tokenizer_part", [figures.text(part.tokenizer, "{:+.3f}") if part else "" for part in parts])
    frame.insert(at + 1, "prior_part", [figures.text(part.prior, "{:+.3f}") if part else "" for part in parts])
    frame.insert(at + 2, "bottleneck", [part.stage if part else "" for part in parts])
    return frame


def _sentences(systems: Systems, distances: list[str], params: Pipeline) -> list[str]:
    """What one may conclude, and what not."""
    found = trial.sentences(systems[REAL][0])
    for key in distances:
        ranked = comparison.ranking(systems, key)
        found.append(
            f"{key}, from the best: {ranked}. ~: this step is within the noise, <: beyond it; all pairs: differences.csv"
        )
        halves = comparison.estimate(systems[REAL], f"halves_{key}")
        if halves:
            number = systems[REAL][0].figure(f"halves_{key}").num_images
            found.append(
                f"{key} of one half of the training images against the other, {number:,} each: {halves.value:.3f}"
            )
    for tokenizer in params.tokenizers:
        on_it = {name: systems[name] for name, system in params.systems.items() if system.tokenizer == tokenizer}
        if any(comparison.estimate(runs, "bits_per_image") for runs in on_it.values()):
            ranked = comparison.ranking(on_it, "bits_per_image")
            found.append(f"bits per test image on the tokens of {tokenizer} (masked: an upper bound): {ranked}")
    accuracy = comparison.estimate(systems[REAL], "test_accuracy")
    if accuracy:
        found.append(f"the judging classifier names {accuracy.value:.1%} of the test images rightly")
    found.append(
        f"± and ~ are about other draws of {params.sample_images.num_images:,} samples (standard error, two of a difference); "
        f"another training seed moves figures too: python -m tessera.evaluation.comparison over several runs"
    )
    return found


def _long(systems: Systems) -> pd.DataFrame:
    """One row per system and figure, with its error and number of images."""
    rows = [
        (name, group, key, figure.value, figure.standard_error, figure.num_images)
        for name, runs in systems.items()
        for group, some in runs[0].groups.items()
        for key, figure in some.items()
    ]
    return pd.DataFrame(rows, columns=["system", "group", "figure", "value", "standard_error", "num_images"])

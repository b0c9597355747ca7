"""Runs a grid of params: each cell is a subflow run and a DVC experiment, and a table compares them at the end.

    python -m flows.sweep systems.vqgan-flow.prior.training.num_steps=300,700 seed=0,1 [--preset NAME] [--target STAGE]

What cells have in common is computed once. Without a worker they run here, in parallel where devices allow. A sweep that a
worker runs leaves them to the workers of the pool where `reproduce` is deployed: each free one takes the next cell.
"""

import argparse
import itertools
import re
import sys
import tempfile
import time
from pathlib import Path
from typing import Any
from uuid import UUID

# First: it sets what Prefect reads when it is imported
from flows.reproduce import reproduce

# isort: split

import yaml
from prefect import allow_failure, flow, task
from prefect.cache_policies import NO_CACHE
from prefect.client.schemas.objects import FlowRun
from prefect.context import FlowRunContext
from prefect.futures import wait
from prefect.states import Completed, Failed, State
from prefect.task_runners import ThreadPoolTaskRunner

from flows import experiments, pool
from flows.board import METRICS, Board
from flows.ending import is_engine, leave_later, stop_all
from flows.places import Places
from flows.plan import tell
from flows.stack.prefect_server import start_temporary_ones

Cells = dict[str, list[Any]] | list[dict[str, Any]]
CELL = "reproduce/reproduce"  # the deployment of a cell, where workers share them
POLL_SECONDS = 5.0
COLUMNS = (
    "label_agreement",
    "precision",
    "recall",
    "coverage",
    "nearest_real",
    "copy_rate",
)  # beside the distances, as far as they were measured


def combinations(cells: Cells) -> list[dict[str, Any]]:
    """The overrides of each cell: of a grid {key: [values]} every combination."""
    if isinstance(cells, list):
        found = cells
    else:
        wrong = [key for key, values in cells.items() if not isinstance(values, list) or not values]
        if wrong:
            raise ValueError(
                f"the cells of {', '.join(wrong)} are no list of values: expected e.g. {{seed: [0, 1, 2]}}"
            )
        found = [dict(zip(cells, values, strict=True)) for values in itertools.product(*cells.values())]
    found = [dict(sorted(cell.items())) for cell in found]  # PostgreSQL gives the keys back in an order of its own
    if not any(found):
        raise ValueError("there are no cells: expected {key: [values]}, e.g. {seed: [0, 1, 2]}, or a list of overrides")
    return found


def label_of(cell: dict[str, Any] | list[str]) -> str:
    """A cell in short: seed=1, num_steps=300."""
    return ", ".join(
        setting.partition("=")[0].rpartition(".")[2] + "=" + setting.partition("=")[2]
        for setting in experiments.as_list(cell)
    )


def without_seed(label: str) -> str:
    """What a cell is besides its seed: "" for seed=1."""
    return re.sub(r"(^|, )seed=\d+", "", label).removeprefix(", ")


@flow(name="sweep", task_runner=ThreadPoolTaskRunner(max_workers=1000))
def sweep(
    cells: dict[str, list[Any]] | list[dict[str, Any]], preset: str | None = None, targets: list[str] | None = None
) -> State[Any]:
    """Run an experiment for each cell and compare them. The sweep fails if a cell fails; the others still run.

    Args:
        cells: a grid {key: [values]}, of which every combination is run, or a list of overrides.
        preset: the name of a file in presets/ that the overrides change; without one, params.yaml.
        targets: stages such as evaluate@vqgan-flow; without any, all of them.
    """
    overrides = combinations(cells)
    labels = [label_of(cell) for cell in overrides]
    context = FlowRunContext.get()
    run = context.flow_run if context else None
    is_shared = run is not None and _workers_share_cells(run)
    at_once = len(labels) if is_shared else Places().number
    board = Board(run.id if run else None)

    @task(
        name="cell",
        task_run_name="{label}",
        cache_policy=NO_CACHE,
        retries=5,
        retry_delay_seconds=10,
        retry_condition_fn=_is_unanswered,
    )
    def run_cell(label: str, overrides: dict[str, Any]) -> Any:
        if run and is_shared:
            return _left_to_workers(run.id, label, {"preset": preset, "overrides": overrides, "targets": targets})
        state = reproduce.with_options(flow_run_name=label)(preset, overrides, targets, return_state=True)
        return state.result()

    futures: list[Any] = []
    try:
        for number, (label, cell) in enumerate(zip(labels, overrides, strict=True)):
            before = futures[number - at_once : number - at_once + 1] if number >= at_once else []
            futures.append(run_cell.submit(label, cell, wait_for=[allow_failure(future) for future in before]))
        wait(futures)
    except BaseException:
        stop_all()
        if run and is_shared:
            pool.cancel_below(run.id)
        raise
    kept = {
        label: future.result() for label, future in zip(labels, futures, strict=True) if future.state.is_completed()
    }
    text = compare({label: kept[label] for label in kept})
    tell(text)
    board.markdown("comparison of cells", text)
    board.close()
    failed = [label for label in labels if label not in kept]
    if is_engine():
        leave_later(1 if failed else 0)
    return Failed(message=f"failed: {'; '.join(failed)}") if failed else Completed()


def _is_unanswered(task: Any, run: Any, state: State[Any]) -> bool:
    """Whether the server did not answer while a cell was waited for."""
    return pool.is_unanswered(state.result(raise_on_failure=False))


def _workers_share_cells(run: FlowRun) -> bool:
    """Whether the cells have a pool of their own. In the pool of the sweep they could wait forever for the slot it holds."""
    if not is_engine() or not run.work_pool_name:
        return False
    return pool.pool_of(CELL) not in (None, run.work_pool_name)


def _left_to_workers(sweep_id: UUID, label: str, parameters: dict[str, Any]) -> dict[str, Any]:
    """What a cell has kept, once a worker has run it. A cell of a sweep is one run, however often it is asked for."""
    run = pool.hand_over(CELL, parameters, label, f"{sweep_id}: {label}")
    while run.state is None or not run.state.is_final():
        time.sleep(POLL_SECONDS)
        run = pool.seen(run.id)
    if not run.state.is_completed():
        raise RuntimeError(f"the run of cell {label} is {run.state.name}: its own page says why")
    found = pool.shown(run.id, METRICS)
    if found is None:
        raise RuntimeError(
            f"cell {label} is done and kept, but Prefect has no metrics of it: compare it by dvc exp show"
        )
    return found


def compare(kept: dict[str, dict[str, Any]]) -> str:
    """Markdown: the systems of all cells in one table, and their order by each distance.

    Cells that differ in the seed alone are one row: the mean of its runs and the error of that.
    """
    from tessera.evaluation import comparison, figures

    texts: dict[str, dict[str, str]] = {}  # by system and cell
    for label, cell in kept.items():
        for name, text in cell["metrics"].items():
            texts.setdefault(name, {})[label] = text
    systems: comparison.Systems = {}
    with tempfile.TemporaryDirectory() as folder:
        for name, by_cell in sorted(texts.items(), key=lambda item: (item[0] != comparison.REAL, item[0])):
            is_common = len(set(by_cell.values())) == 1 and len(kept) > 1  # the cells do not differ in it
            for label, text in list(by_cell.items())[: 1 if is_common else None]:
                path = Path(folder) / "metrics.json"
                path.write_text(text, encoding="utf-8")
                rest = "" if is_common else without_seed(label)
                systems.setdefault(f"{name} ({rest})" if rest else name, []).append(figures.read(path))
    listed = "\n".join(f"- {label}: experiment `{cell['experiment']}`" for label, cell in kept.items())
    if not systems:
        return f"No cell has metrics of systems to compare.\n\n{listed}"
    try:
        comparison.require_one_protocol(systems)
    except comparison.MixedProtocols as error:
        return f"Not comparable: {error}\n\n{listed}"
    distances = comparison.distance_names(systems)
    columns = dict.fromkeys([*COLUMNS[:1], *distances, *COLUMNS[1:]], "{:.3f}")
    table = comparison.markdown(comparison.table(systems, columns, with_errors=distances))
    seeds = max(len(runs) for runs in systems.values())
    if seeds > 1:
        table += f"\n\nMeans of {seeds} seeds ± their standard errors."
    rankings = "\n".join(f"- {key}, from the best: {comparison.ranking(systems, key)}" for key in distances)
    return f"{table}\n\n{rankings}\n\n{listed}"


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m flows.sweep", description=__doc__.splitlines()[0])
    parser.add_argument("cells", nargs="+", metavar="KEY=VALUE,VALUE", help="every combination is one cell")
    parser.add_argument("--preset", help="a file of presets/, without .yaml; default: params.yaml as it is")
    parser.add_argument("--target", action="append", help="a stage such as evaluate@vqgan-flow; default: all of them")
    arguments = parser.parse_args()
    from tessera import params  # here: a worker that imports this module needs none of it

    grid = {}
    for text in arguments.cells:
        key, sign, values = text.partition("=")
        if not sign:
            parser.error(f"{text} is no cell: expected KEY=VALUE,VALUE, e.g. seed=0,1,2")
        grid[key] = yaml.safe_load(f"[{values}]")
    try:  # before anything runs
        for cell in combinations(grid):
            experiment = experiments.define(Path.cwd(), arguments.preset, cell)
            params.parsed(experiment.params, Path(experiments.PARAMS))
    except ValueError as error:
        print(f"flows.sweep: {error}", file=sys.stderr)
        return 2
    start_temporary_ones()
    state = sweep(grid, arguments.preset, arguments.target, return_state=True)
    return 0 if state.is_completed() else 1


if __name__ == "__main__":
    sys.exit(main())

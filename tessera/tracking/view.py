"""The view of MLflow's table of runs in which systems stand with their figures, the best first.

MLflow keeps a shared view as a tag of the experiment, and shows it to whoever opens the page by its key. By itself the table
shows names and dates alone.
"""

import json
import re
from pathlib import Path
from typing import Any

from tessera.tracking.processes import folder_of

KEY = "tessera"
TAG = f"mlflow.sharedViewState.{KEY}"
AS_TRAINING = "?workflowType=machine_learning"  # MLflow's page opens on "GenAI" otherwise
QUERY = f"{AS_TRAINING}&viewStateShareKey={KEY}"
SHOWN = ("fid", r"fd_.*", "label_agreement", "precision", "recall", "coverage", "nearest_real", "copy_rate")  # patterns
WIDTH = 150  # pixels of a column: a name such as generation/fd_classifier


def share(client: Any, run: Any) -> None:
    """Set the view of the experiment of a system's run, with the columns of the figures that it has."""
    measured = [name.removeprefix("generation/") for name in run.data.metrics if name.startswith("generation/")]
    names = [name for pattern in SHOWN for name in sorted(measured) if re.fullmatch(pattern, name)]
    names = [name for name in names if not name.endswith("_standard_error")]
    if not names:
        return
    columns = [f"metrics.`generation/{name}`" for name in names] + ["attributes.`Duration`"]
    state = {
        "searchFilter": "",
        "orderByKey": columns[0],
        "orderByAsc": True,  # the first is a distance
        "startTime": "ALL",
        "lifecycleFilter": "Active",
        "datasetsFilter": [],
        "modelVersionFilter": "All Runs",
        "selectedColumns": columns,
        "columnWidths": dict.fromkeys(columns, WIDTH),
        "runsExpanded": {},
        "runsPinned": [],
        "runsHidden": [],
        "runsHiddenMode": "FIRST_10_RUNS",
    }
    client.set_experiment_tag(run.info.experiment_id, TAG, json.dumps(state))


def link(root: Path, server: str) -> str | None:
    """The address of the view on a server, for the experiment that got the newest run of this checkout; None: there is none."""
    records = sorted(folder_of(root).glob("*/sent-*.json"), key=lambda path: path.stat().st_mtime)
    known = [json.loads(path.read_text()).get("experiment_id") for path in records]
    newest = next((experiment for experiment in reversed(known) if experiment), None)
    return f"{server.rstrip('/')}/#/experiments/{newest}/runs{QUERY}" if newest else None

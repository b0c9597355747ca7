"""MLflow's server is killed in the middle of a flow run: the run ends as if nobody tracked it, and nothing is lost."""

import hashlib
import signal
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from mlflow_server import Server, replay_without_uploader, sent
from waiting import wait_for

from tessera.tracking import journal as journal_module
from tessera.tracking.processes import folder_of

pytestmark = pytest.mark.e2e(seconds=90)
SYSTEM = "vqgan-autoregressive"
TARGET, TRAINING = f"evaluate@{SYSTEM}", f"train_prior@{SYSTEM}"
STEPS = 1200  # they last as long as an uploader needs for a look or two
SECONDS_AFTER_THE_LAST_STAGE = 30


@pytest.fixture
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    server = Server(tmp_path_factory.mktemp("server"))
    server.begin()
    yield server
    if server.process.poll() is None:
        server.signal(signal.SIGKILL)


def journals(root: Path) -> dict[Path, list[dict[str, Any]]]:
    """The events of each run, as its stage and its observer wrote them."""
    found = sorted(folder_of(root).glob(f"*/{journal_module.JOURNAL}"))
    return {path.parent: [event for _, event in journal_module.events_of(path) if "time" in event] for path in found}


def results(root: Path) -> dict[str, str]:
    """The hash of every file that the stages made, but for what the clock decides."""
    files = [path.relative_to(root) for path in (root / "data").rglob("*") if path.is_file()]
    made = [path for path in files if path.parts[1] not in ("timings", "previews", "README.md", "download.py")]
    return {str(path): hashlib.sha256((root / path).read_bytes()).hexdigest() for path in made}


def test_a_flow_whose_mlflow_server_is_killed_makes_the_same_bits_ends_in_time_and_loses_nothing(
    server: Server, finished: Any, tmp_path: Path
) -> None:
    """Both train the prior anew, for longer; what it reads is there."""
    tracked, untracked = finished.copy(tmp_path / "one"), finished.copy(tmp_path / "other")
    params = finished.params()
    params["systems"][SYSTEM]["prior"]["training"]["num_steps"] = STEPS
    for clone in (tracked, untracked):
        clone.write_params(params)
    reference = untracked.start("dvc", "repro", TARGET)
    server.wait()
    environment = {"TESSERA_TRACKING": "on", "MLFLOW_TRACKING_URI": server.uri, "CUDA_VISIBLE_DEVICES": ""}
    environment |= {"PREFECT_HOME": str(tmp_path / "prefect"), "TESSERA_DEVICE_LOCKS": str(tmp_path)}
    flow = tracked.start(sys.executable, "-m", "flows.reproduce", TARGET, **environment)

    def training() -> list[dict[str, Any]]:
        """The events of the training of the prior, once some of them were sent."""
        for folder, events in journals(tracked.folder).items():
            if events and events[0]["stage"] == TRAINING and list(folder.glob("sent-*.json")):
                return events
        return []

    wait_for("the training of the prior is in MLflow", lambda: len(training()) > 2, 400)
    assert "close" not in [event["event"] for event in training()]
    server.signal(signal.SIGKILL)

    output, _ = flow.communicate(timeout=300)
    ended = time.time()
    server.begin()
    assert flow.returncode == 0, output[-3000:]
    last = max(event["time"] for events in journals(tracked.folder).values() for event in events) / 1000
    print(f"the flow ended {ended - last:.1f} s after the last stage")
    assert ended - last < SECONDS_AFTER_THE_LAST_STAGE
    told, _ = reference.communicate(timeout=300)
    assert reference.returncode == 0, told[-3000:]
    assert results(tracked.folder) == results(untracked.folder)
    assert f"data/priors/{SYSTEM}/weights.safetensors" in results(tracked.folder)

    server.wait()
    sent(replay_without_uploader(tracked.folder, server.uri))
    check_that_mlflow_has_everything(server, tracked.folder)


def check_that_mlflow_has_everything(server: Server, root: Path) -> None:
    from mlflow import MlflowClient

    client = MlflowClient(server.uri)
    experiments = [client.get_experiment_by_name("tessera-digits").experiment_id]
    written = journals(root)
    assert len(client.search_runs(experiments)) == len(written) + 1  # and the one that stages are folded below
    curves = {}
    for folder, events in written.items():
        (run,) = client.search_runs(experiments, f"tags.`tessera.run_uid` = '{folder.name}'")
        assert (run.info.run_name, run.info.status) == (events[0]["stage"], "FINISHED")
        points = Counter(
            (key, event["step"], value)
            for event in events
            if event["event"] == "log"
            for key, value in event["values"].items()
        )
        histories = {key: client.get_metric_history(run.info.run_id, key) for key in run.data.metrics}
        assert points == Counter((key, one.step, one.value) for key, some in histories.items() for one in some)
        assert max(points.values(), default=1) == 1
        assert run.data.params == events[0]["params"]
        names = {event["name"] for event in events if event["event"] == "attach"}
        stored = {file.path: file.file_size for file in client.list_artifacts(run.info.run_id)}
        assert stored == {name: (folder / "files" / name).stat().st_size for name in names}
        curves[run.info.run_name] = histories
    steps = pd.read_csv(root / f"data/curves/priors/{SYSTEM}.csv").step.tolist()
    assert [point.step for point in curves[TRAINING]["loss"]] == steps  # what DVC shows is what MLflow shows
    assert {"generation/fd_classifier", "prior/bits_per_image"} <= set(curves[SYSTEM])
    (version,) = client.search_model_versions("name = 'tessera-digits'")
    assert client.get_run(version.run_id).info.run_name == SYSTEM

"""Hundreds of systems and trainings in MLflow, sent as the pipeline sends them: how fast, and how soon its pages show them.

    python -m benchmarks.tracking --shots shots             # on a PostgreSQL server of its own
    python -m benchmarks.tracking --shots shots --sqlite
    python -m benchmarks.tracking --shots shots --uri http://127.0.0.1:5000    # a server that runs, and keeps the runs

Journals are written by tessera.tracking.journal and tessera.running.publish, and sent by tessera.tracking.uploader when all are
there, as after an outage; MLflow's server is started as `make stack` does. Then a headless Chromium, which has opened
MLflow once, opens the pages that a person would, and waits until their charts are drawn. The first column is the median
of the rounds. Needs chromium on PATH, and for a server of its own Debian's postgresql.
"""

import argparse
import contextlib
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import quote

import numpy as np
import pandas as pd
import psutil
import yaml

from flows.stack import __main__ as stack
from tessera.artifacts import folder as artifact
from tessera.components import parse
from tessera.evaluation.figures import Recorder, without_network
from tessera.params import Pipeline
from tessera.running import process, publish
from tessera.tracking import journal, uploader

ROOT = Path(__file__).parents[1]
DATASET = "scale"
FIGURES = {
    "generation": "fd_classifier kd_classifier gap_fd_classifier label_agreement precision recall density coverage copy_rate",
    "reconstruction": "rfd_classifier pfd_classifier floor_fd_classifier psnr_db ssim",
    "codebook": "codebook_bits codebook_perplexity codebook_usage dead_codes",
    "prior": "test_loss train_loss",
}
CURVES = ("loss", "accuracy", "gradient_norm", "learning_rate")
WEIGHTS_BYTES = 1_000_000
PATIENCE_SECONDS = 180


# Servers --------------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def postgres() -> Iterator[str]:
    """The address of a database server of Debian's that lives as long as the block."""
    binaries = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"))
    if not binaries:
        raise ValueError(
            "there is no PostgreSQL below /usr/lib/postgresql: install it, or measure with --sqlite or --uri"
        )
    folder = Path(tempfile.mkdtemp(prefix="benchmark-postgres-"))
    prefix = []
    if os.geteuid() == 0:  # which PostgreSQL refuses
        prefix = ["runuser", "-u", "postgres", "--"]
        shutil.chown(folder, "postgres")
    port, data = free_port(), folder / "data"
    control = [*prefix, str(binaries[-1].with_name("pg_ctl")), "-D", str(data)]
    options = f"-p {port} -c listen_addresses=127.0.0.1 -c unix_socket_directories={folder}"
    quiet = {"stdout": subprocess.DEVNULL, "cwd": folder}
    try:
        subprocess.run(
            [*prefix, str(binaries[-1]), "-D", str(data), "-U", "tessera", "-A", "trust"], check=True, **quiet
        )
        subprocess.run([*control, "-w", "-l", str(folder / "log"), "-o", options, "start"], check=True, **quiet)
        yield f"postgresql://tessera@127.0.0.1:{port}/postgres"
    finally:
        subprocess.run([*control, "-m", "immediate", "stop"], check=False, **quiet)
        shutil.rmtree(folder)


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


@contextlib.contextmanager
def server(root: Path, database: str) -> Iterator[tuple[str, int]]:
    """MLflow's server as `make stack` starts it; its address and its process."""
    environ = {"TESSERA_MLFLOW_PORT": str(free_port()), **({"DATABASE_URL": database} if database else {})}
    settings = stack.read_settings(root, environ)
    if database:
        stack.make_databases(settings)
    with (root / "server.log").open("w") as log:
        process = subprocess.Popen(
            stack.command(settings, "mlflow", 1),
            cwd=root,
            env=stack.environment(settings, "mlflow", os.environ),
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
    try:
        while not stack.answers(settings, "mlflow"):
            if process.poll() is not None:
                raise ValueError(f"MLflow's server ended: {(root / 'server.log').read_text()[-2000:]}")
            time.sleep(0.5)
        yield settings.url("mlflow"), process.pid
    finally:
        process.terminate()
        process.wait(60)


# What is sent ---------------------------------------------------------------------------------------------------------


class Cell(NamedTuple):
    """A run of a sweep: one system of params.yaml with other settings."""

    experiment: str
    name: str
    params: Pipeline


def cells(number: int) -> Iterator[Cell]:
    text = (ROOT / "params.yaml").read_text()
    for index in range(number):
        values = yaml.safe_load(text)
        values["dataset"] |= {"source": str(ROOT / "requirements.lock"), "name": DATASET}
        turn, which = divmod(index, len(values["systems"]))
        name = list(values["systems"])[which]
        rate, batch = 0.0005 * (1 + turn % 8), 16 * (1 + turn // 8)
        values["systems"][name]["prior"]["training"] |= {"learning_rate": rate, "batch_size": batch}
        yield Cell(f"params-learning-rate-{rate:g}-batch-size-{batch}", name, parse(Pipeline, values))


def write_training(
    root: Path, params: Pipeline, name: str, prior: Path, points: int, random: np.random.Generator
) -> None:
    """As stage_process and training do."""
    described = params.describe(f"train_prior@{name}")._asdict()
    state = root / ".state" / "train"
    with journal.open_run(
        f"train_prior@{name}", root=root, state=None, experiment=f"tessera-{DATASET}", **described
    ) as run:
        process.track_dataset(run, DATASET, root / "images", "train_prior")
        falling = 5 / np.sqrt(np.arange(1, points + 1)) + random.normal(0, 0.03, points) + random.uniform(0, 1)
        for step, loss in enumerate(falling.tolist(), 1):
            values = (loss, 1 / (1 + abs(loss)), abs(loss) * 0.1, 0.002 * (1 - step / points))
            run.log(step, dict(zip(CURVES, values, strict=True)))
        state.mkdir(parents=True, exist_ok=True)
        (state / "history.csv").write_text("step,loss\n" + "".join(f"{i},{v}\n" for i, v in enumerate(falling)))
        run.attach(state / "history.csv", "history.csv")
        run.figures({"images_per_second": random.uniform(500, 1000), "seconds": random.uniform(20, 40)})
        run.tag({"tessera.artifact": artifact.fingerprint(prior)})


def write_system(root: Path, params: Pipeline, name: str, parts: dict[str, Path], random: np.random.Generator) -> None:
    """As stages.evaluate does."""
    found = Recorder()
    for group, names in FIGURES.items():
        protocol = without_network(DATASET, group, 1000, "test", "0" * 64)
        for key in names.split():
            found.add(group, key, random.uniform(0.1, 1.0), protocol, random.uniform(0.01, 0.05))
    measured = found.measured()
    measured.write(root / "metrics.json")
    files = {
        "metrics.json": root / "metrics.json",
        "samples.png": root / "picture.png",
        "neighbors.png": root / "picture.png",
    }
    publish.publish(params, name, measured, files, root / "images", parts)


def make_artifact(folder: Path, content: bytes) -> Path:
    with artifact.create(folder) as place:
        (place / "weights.safetensors").write_bytes(content)
    return folder


class Phase(NamedTuple):
    what: str
    runs: int
    values: int
    seconds: float
    own_cpu: float
    server_cpu: float


class Sender:
    """Writes journals, then sends them and keeps count."""

    def __init__(self, root: Path, server: int | None) -> None:
        self.root, self.server, self.phases = root, server, []

    @contextlib.contextmanager
    def sending(self, what: str, runs: int) -> Iterator[None]:
        yield
        mirrors = uploader.all_mirrors(self.root, {})
        values = sum(one.unsent() for one in mirrors)
        began, own, server = time.monotonic(), time.process_time(), self._server_cpu()
        with contextlib.redirect_stdout(sys.stderr):
            if uploader.replay(self.root, timeout=3600):
                raise ValueError("MLflow did not take everything: see above")
        spent = time.monotonic() - began, time.process_time() - own, self._server_cpu() - server
        self.phases.append(Phase(what, runs, values, *spent))

    def _server_cpu(self) -> float:
        if self.server is None:
            return float("nan")
        main = psutil.Process(self.server)
        return sum(sum(one.cpu_times()[:2]) for one in [main, *main.children(recursive=True)])

    def table(self) -> str:
        rows = pd.DataFrame(self.phases).set_index("what")
        rows["runs/s"], rows["values/s"] = rows.runs / rows.seconds, rows["values"] / rows.seconds
        return rows.round(1).to_string()


def send(root: Path, server: int | None, number: int, points: int, registered: int) -> str:
    from PIL import Image

    random = np.random.default_rng(0)
    process.ROOT = root
    os.environ["TESSERA_TRACKING"] = "on"
    Image.fromarray(random.integers(0, 256, (256, 640), dtype=np.uint8)).save(root / "picture.png")
    make_artifact(root / "images", b"images")
    tokenizer = make_artifact(root / "tokenizer", random.bytes(WEIGHTS_BYTES))
    priors = [make_artifact(root / "priors" / str(index), random.bytes(WEIGHTS_BYTES)) for index in range(number)]
    planned = list(zip(cells(number), priors, strict=True))
    sender = Sender(root, server)
    client = uploader.connect(root)
    client.search_experiments()  # what the first request of a process costs is no part of it
    with sender.sending("trainings", number):
        for cell, prior in planned:
            write_training(root, cell.params, cell.name, prior, points, random)
    for what, switch, some in (
        ("systems", "off", planned[registered:]),
        ("systems, registered", "on", planned[:registered]),
    ):
        os.environ["TESSERA_REGISTRY"] = switch
        with sender.sending(what, len(some)):
            for cell, prior in some:
                os.environ["DVC_EXP_NAME"] = cell.experiment
                write_system(root, cell.params, cell.name, {"tokenizer": tokenizer, "prior": prior}, random)
    return sender.table()


# What people see ------------------------------------------------------------------------------------------------------


def asked_by_code(root: Path) -> tuple[str, dict[str, list[str]]]:
    """Seconds of requests of the client, and the ids of the runs by kind."""
    client = uploader.connect(root)
    experiment = client.get_experiment_by_name(f"tessera-{DATASET}").experiment_id
    ids, rows = {"experiment": [experiment]}, []
    for kind in ("system", "stage"):
        began = time.monotonic()
        found = client.search_runs([experiment], f"tags.`tessera.kind` = '{kind}'", max_results=1000)
        rows.append((f"search_runs: {len(found)} runs of kind {kind}", time.monotonic() - began))
        ids[kind] = [run.info.run_id for run in found]
    query = "metrics.`generation/fd_classifier` < 0.3 and params.`prior.kind` = 'flow_matching'"
    began = time.monotonic()
    found = client.search_runs([experiment], query, order_by=["metrics.`generation/fd_classifier`"])
    rows.append((f"search_runs by a figure and a param: {len(found)} runs", time.monotonic() - began))
    began = time.monotonic()
    history = client.get_metric_history(ids["stage"][0], CURVES[0])
    rows.append((f"get_metric_history: {len(history)} points", time.monotonic() - began))
    return pd.DataFrame(rows, columns=["request", "seconds"]).round(2).to_string(index=False), ids


class Page(NamedTuple):
    name: str
    path: str
    shows: str  # a selector of what has to be visible


def pages(ids: dict[str, list[str]]) -> list[Page]:
    (experiment,) = ids["experiment"]
    runs = f"/#/experiments/{experiment}/runs"
    systems = quote("tags.`tessera.kind` = 'system'")

    def several(place: str, kind: str, number: int, more: str = "") -> str:
        chosen = quote(json.dumps(ids[kind][:number]))
        return f"/#/{place}?runs={chosen}&experiments={quote(json.dumps([experiment]))}{more}"

    loss = f"&metric={quote(json.dumps('loss'))}&plot_metric_keys={quote(json.dumps(['loss']))}"
    number = len(ids["system"])
    lines = ".js-plotly-plot .scatterlayer .trace, .js-plotly-plot .gl-canvas"
    return [
        Page("table of systems", f"{runs}?searchFilter={systems}", "text=vqgan-flow"),
        Page("charts of systems", f"{runs}?searchFilter={systems}&compareRunsMode=CHART", ".js-plotly-plot .point"),
        Page("compare 10 systems", several("compare-runs", "system", 10), ".js-plotly-plot .parcoords"),
        Page(f"compare {number} systems", several("compare-runs", "system", number), ".js-plotly-plot .parcoords"),
        Page("curves of one training", f"{runs}/{ids['stage'][0]}/model-metrics", lines),
        Page("loss of 10 trainings", several("metric", "stage", 10, loss), lines),
        Page(f"loss of {number} trainings", several("metric", "stage", number, loss), lines),
    ]


def seen_by_people(uri: str, wanted: list[Page], shots: Path | None, rounds: int) -> str:
    from playwright.sync_api import TimeoutError as TooLate
    from playwright.sync_api import sync_playwright

    found = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if found is None:
        raise ValueError("there is no chromium on PATH: install it, for example with apt-get install chromium")
    seconds: dict[str, list[float]] = {}
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=found, args=["--no-sandbox"])
        for _ in range(rounds):
            with browser.new_context(viewport={"width": 1600, "height": 1000}) as context:
                for one in [Page("first visit, experiments", "/#/experiments", f"text=tessera-{DATASET}"), *wanted]:
                    page = context.new_page()
                    page.set_default_timeout(1000 * PATIENCE_SECONDS)
                    began = time.monotonic()
                    try:
                        page.goto(uri + one.path)
                        page.locator(one.shows).first.wait_for()
                        seconds.setdefault(one.name, []).append(time.monotonic() - began)
                    except TooLate:
                        seconds.setdefault(one.name, []).append(float("nan"))
                    if shots:
                        page.wait_for_timeout(1500)  # animations
                        take(page, shots, one.name)
                    page.close()
        browser.close()
    rows = pd.DataFrame(seconds).T
    rows.columns = [f"round {number}" for number in range(1, rounds + 1)]
    rows.insert(0, "seconds", rows.median(axis=1))
    return rows.round(1).to_string()


def take(page: Any, shots: Path, name: str) -> None:
    shots.mkdir(parents=True, exist_ok=True)
    file = name.replace(", ", "-").replace(" ", "-")
    page.screenshot(path=shots / f"{file}.png")
    if name.startswith("compare"):  # below the fold: the table of params and figures
        page.get_by_text("Show diff only").first.scroll_into_view_if_needed()
        page.wait_for_timeout(1000)
        page.screenshot(path=shots / f"{file}-details.png")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    where = parser.add_mutually_exclusive_group()
    where.add_argument(
        "--uri", help="an MLflow server that runs; default: one on PostgreSQL that lives as long as this"
    )
    where.add_argument("--sqlite", action="store_true", help="a server on SQLite in the place of PostgreSQL")
    parser.add_argument("--runs", type=int, default=200, help="systems, and as many trainings")
    parser.add_argument("--points", type=int, default=1000, help="of each of the four curves of a training")
    parser.add_argument("--registered", type=int, default=5, help="systems that become versions of a model too")
    parser.add_argument("--rounds", type=int, default=3, help="how often each page is opened")
    parser.add_argument("--shots", type=Path, help="a folder for pictures of the pages")
    given = parser.parse_args()
    with contextlib.ExitStack() as stack:
        root = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="benchmark-tracking-")))
        if given.uri:
            uri, process = given.uri, None
        else:
            database = "" if given.sqlite else stack.enter_context(postgres())
            uri, process = stack.enter_context(server(root, database))
        os.environ["MLFLOW_TRACKING_URI"] = uri
        print(send(root, process, given.runs, given.points, given.registered), end="\n\n", flush=True)
        table, ids = asked_by_code(root)
        print(table, end="\n\n", flush=True)
        print(seen_by_people(uri, pages(ids), given.shots, given.rounds))


if __name__ == "__main__":
    main()

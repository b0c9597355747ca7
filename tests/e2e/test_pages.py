"""What a person sees who types `make stack`: a run started, watched and cancelled on Prefect's page in a real browser,
then MLflow's page. TESSERA_SHOTS names a folder for screenshots.

The tests of this file share one clone, one stack and one browser, and run in order. The clone is a copy of the finished one
whose systems have changed: the run trains one prior and judges both, and finds the rest done.
"""

import io
import json
import os
import re
import socket
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import unquote_plus, urlsplit

import psutil
import pytest
from clones import AT_THE_END, cell
from PIL import Image
from playwright.sync_api import TimeoutError as PlaywrightTimeout
from prefect_api import Asks
from waiting import wait_for

pytestmark = pytest.mark.e2e(seconds=130)
RUN_SECONDS = 600  # for a whole small pipeline; a busy machine takes several minutes
PAGE_SECONDS = 60
SYSTEMS = ("vqgan-autoregressive", "vqgan-flow")
FOUND_DONE = {
    "prepare_images", "train_tokenizer@vqgan", "encode_tokens@vqgan", "train_prior@vqgan-autoregressive",
    "edit_images@vqgan-autoregressive",
    *(f"{stage}@{name}" for stage in ("train_features", "reference_stats") for name in ("classifier", "random")),
}  # fmt: skip
RUN = {"evaluate_real", "evaluate_tokenizer@vqgan"} | cell("vqgan-flow") | cell(SYSTEMS[0], "sample_images", "evaluate")
ENDS = re.compile("^(Completed|Failed|Crashed|Cancelled)$")


class Pages(Asks):
    """A clone with its stack, and a browser that reaches nothing else."""

    def __init__(self, clone: Any, browser: Any, shots: Path):
        self.clone, self.shots = clone, shots
        sockets = [socket.socket() for _ in range(2)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        self.ports = dict(zip(("prefect", "mlflow"), (each.getsockname()[1] for each in sockets), strict=True))
        for each in sockets:
            each.close()
        foreign = ("PREFECT_", "TESSERA_", "MLFLOW_", "PG", "DATABASE_URL")
        kept = {key: value for key, value in clone.environment.items() if not key.startswith(foreign)}
        (clone.folder.parent / "devices").mkdir()
        clone.environment = kept | {
            "TESSERA_PREFECT_PORT": str(self.ports["prefect"]),
            "TESSERA_MLFLOW_PORT": str(self.ports["mlflow"]),
            "TESSERA_DEVICE_LOCKS": str(clone.folder.parent / "devices"),
            "TESSERA_PARALLEL": "2",
            "PREFECT_WORKER_QUERY_SECONDS": "1",
            "CUDA_VISIBLE_DEVICES": "",
        }
        self.folder, self.environment = clone.folder, {"PREFECT_API_URL": self.url("prefect", "/api")}
        self.remote: list[str] = []
        context = browser.new_context(viewport={"width": 1400, "height": 900})
        context.set_default_timeout(1000 * PAGE_SECONDS)
        context.route(lambda url: not is_local(url), self.refuse)
        self.page = context.new_page()

    def refuse(self, route: Any) -> None:
        self.remote.append(route.request.url)
        route.abort()

    def stack(self, what: str) -> str:
        done = self.clone.run(sys.executable, "-m", "flows.stack", what)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def url(self, member: str, path: str = "") -> str:
        return f"http://127.0.0.1:{self.ports[member]}{path}"

    def resize(self, height: int) -> None:
        self.page.set_viewport_size({"width": 1400, "height": height})

    def shoot(self, name: str, height: int = 900) -> None:
        self.resize(height)
        self.page.wait_for_timeout(1500)  # canvases and charts are drawn a little after their data are there
        self.page.screenshot(path=self.shots / f"{name}.png")
        self.resize(900)

    def open_deployment(self) -> None:
        self.page.goto(self.url("prefect"))
        self.page.get_by_text("Deployments", exact=True).first.click()
        self.page.locator("a[href*='/deployments/deployment/']", has_text=re.compile("^reproduce$")).click()
        self.page.get_by_role("button", name="Run", exact=True).click()

    def quick_run(self) -> None:
        """Start the deployment whose page is open, and open the run; again, as a person would, if the click was lost."""
        before = self.runs()
        for _ in range(3):
            self.page.get_by_text("Quick run", exact=True).click()
            for _ in range(20):
                self.page.wait_for_timeout(1000)
                if new := [run for run in self.runs() if run not in before]:
                    self.page.goto(self.url("prefect", f"/runs/flow-run/{new[0]}"))
                    return
        raise AssertionError("Quick run starts nothing")

    def runs(self) -> list[str]:
        """The numbers of all runs of flows that nobody else started."""
        found = self.ask("POST", "/flow_runs/filter", {"flow_runs": {"parent_task_run_id": {"is_null_": True}}})
        return [run["id"] for run in found or []]

    def submit(self) -> None:
        """Send the form, by the keyboard, as a message may lie over the button; again, as a person would, if it stays."""
        for _ in range(3):
            self.page.get_by_role("button", name="Submit").press("Enter")
            try:
                self.page.wait_for_url(re.compile("tab=Runs"), timeout=20_000)
                return
            except PlaywrightTimeout:
                self.page.screenshot(path=self.shots / "prefect-not-submitted.png")
        raise AssertionError(f"the form stays: {self.shots}/prefect-not-submitted.png")

    def open_run(self, name: str) -> None:
        query, found = {"flow_runs": {"name": {"any_": [name]}}}, []

        def is_there() -> bool:
            found[:] = self.ask("POST", "/flow_runs/filter", query) or []
            return bool(found)

        wait_for(f"the run {name} is there", is_there, 2 * PAGE_SECONDS)
        self.page.goto(self.url("prefect", f"/runs/flow-run/{found[0]['id']}"))

    def wait_for_end(self) -> str:
        """The state in which the run on the page ends."""
        state = self.page.get_by_text(ENDS).first
        state.wait_for(timeout=1000 * RUN_SECONDS)
        return state.inner_text()

    def open_tab(self, name: str) -> None:
        """A tab of the run that has ended. Until its page is complete, it may fall back to the first one."""
        self.page.goto(self.run)
        for _ in range(10):
            self.page.get_by_text(name, exact=True).click()
            self.page.wait_for_timeout(1500)
            if name in unquote_plus(self.page.url):
                return
        raise AssertionError(f"the tab {name} does not stay: {self.page.url}")

    def open_artifact(self, key: str) -> None:
        self.resize(2400)  # what is below the lower edge is not there
        self.open_tab("Artifacts")
        self.page.get_by_text(key, exact=True).click()
        self.page.locator("article").first.wait_for()
        self.resize(900)

    def stages(self) -> list[str]:
        """What of this pipeline runs at the moment."""
        found = []
        for process in psutil.process_iter():
            try:
                if process.cwd().startswith(str(self.clone.folder)):
                    found.append(" ".join(process.cmdline()))
            except (psutil.NoSuchProcess, psutil.AccessDenied, psutil.ZombieProcess):
                continue
        return [command for command in found if " tessera.running " in command or " repro " in command]


def is_local(url: str) -> bool:
    return urlsplit(url).scheme in ("data", "blob", "about") or urlsplit(url).hostname == "127.0.0.1"


@pytest.fixture(scope="module")
def pages(clone: Any, browser: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pages]:
    params = clone.params()
    del params["systems"]["gan"], params["tokenizers"]["none"]
    params["sample_images"]["num_images"] = 100  # ten of each digit fill the picture, and both systems are drawn anew
    params["systems"]["vqgan-flow"]["prior"]["training"]["learning_rate"] = 0.002  # a run of sixty steps to look at
    clone.write_params(params)
    clone.git("add", "--all")
    clone.git("commit", "--quiet", "--message=two systems")
    shots = Path(os.environ.get("TESSERA_SHOTS") or tmp_path_factory.mktemp("shots"))
    shots.mkdir(parents=True, exist_ok=True)
    made = Pages(clone, browser, shots)
    try:
        yield made
    finally:
        made.page.context.close()
        made.stack("down")
        assert made.stages() == []


def test_a_run_started_on_prefects_page_finishes_and_shows_its_stages_logs_table_and_pictures(pages: Pages) -> None:
    page = pages.page
    said = pages.stack("up")
    assert "deployed reproduce" in said
    pages.open_deployment()
    pages.quick_run()
    ended = pages.wait_for_end()
    pages.run = page.url
    assert ended == "Completed", page.locator("body").inner_text()

    page.goto(pages.run)  # anew: a page that was open before keeps the names that tasks had while they waited
    page.locator("canvas").first.wait_for()
    page.wait_for_timeout(3000)  # the graph moves until it fits
    pages.shoot("prefect-run")
    assert share_of_green(page.locator("canvas").first.screenshot()) > 0.01  # bars of stages, in the color of success
    pages.open_tab("Task Runs")
    page.locator("a[href*='/runs/task-run/']", has_text="compare_systems").wait_for()
    tasks = page.locator("a[href*='/runs/task-run/']")
    assert set(tasks.all_inner_texts()) - {"fingerprint_code"} == FOUND_DONE | RUN | set(AT_THE_END)
    pages.shoot("prefect-tasks", 1800)
    tasks.filter(has_text=re.compile("^train_prior@vqgan-flow$")).click()
    page.get_by_text(re.compile(r"^train_prior@vqgan-flow\s+step\s+60/60\s+loss \d")).wait_for()
    pages.shoot("prefect-log")

    pages.open_tab("Artifacts")
    page.get_by_text("comparison", exact=True).wait_for()
    pages.shoot("prefect-artifacts", 1800)
    pages.open_artifact("comparison")
    pages.shoot("prefect-comparison", 1500)
    tables = page.locator("article table")
    first_column = tables.first.locator("tbody tr").locator("td:first-child")
    assert first_column.all_inner_texts() == ["real", *SYSTEMS]
    assert f"{distance(pages, 'vqgan-flow'):.3f}" in tables.first.inner_text()
    assert [0 < width <= 240 for width in widths_of_pictures(page)] == [True] * 3 * len(SYSTEMS)
    pages.open_artifact("sample-images-vqgan-flow-samples")
    pages.shoot("prefect-samples")
    (width,) = widths_of_pictures(page)
    assert width == Image.open(pages.clone.folder / "data/pictures/samples/vqgan-flow.png").width
    assert pages.remote == []


def share_of_green(png: bytes) -> float:
    picture = Image.open(io.BytesIO(png)).convert("RGB")
    pixels = list(picture.getdata())
    return sum(green > red + 60 and green > blue + 40 for red, green, blue in pixels) / len(pixels)


def widths_of_pictures(page: Any) -> list[int]:
    """The widths of the pictures in an artifact as the browser has decoded them; 0: it could not."""
    return page.locator("article img").evaluate_all("pictures => pictures.map(picture => picture.naturalWidth)")


def distance(pages: Pages, system: str) -> float:
    """The Fréchet distance of a system as the pipeline has it in its file."""
    metrics = json.loads((pages.clone.folder / f"data/metrics/systems/{system}.json").read_text())
    return metrics["generation"]["fd_classifier"]["value"]


def test_mlflows_page_compares_the_systems_and_shows_the_curves_of_a_training(pages: Pages) -> None:
    pages.open_artifact("mlflow")
    pages.shoot("prefect-mlflow-links")
    links = pages.page.locator("article a")
    assert set(links.all_inner_texts()) >= RUN  # and what is at the end, which a busy uploader sends later
    runs = links.filter(has_text="All runs").get_attribute("href")
    training = links.filter(has_text="train_prior@vqgan-flow").get_attribute("href")

    page = pages.page
    page.goto(runs)
    page.get_by_role("link", name="stages", exact=True).wait_for()
    assistant = page.get_by_role("button", name="Close", exact=True)
    if assistant.count():  # it opens on a first visit
        assistant.last.click()
    for name in SYSTEMS:
        row = page.get_by_role("row").filter(has=page.get_by_role("link", name=name, exact=True))
        row.get_by_role("checkbox").first.check()
    assert page.get_by_text("generation/fd_classifier", exact=True).first.is_visible()  # the answer, without a click
    pages.shoot("mlflow-runs")
    page.get_by_role("button", name="Compare").click()
    page.get_by_text("Comparing 2 Runs from 1 Experiment").wait_for()
    page.get_by_text("flow_matching", exact=True).wait_for()
    pages.shoot("mlflow-compare", 2600)
    text = page.locator("body").inner_text()
    assert re.search(r"prior\.kind\s+(flow_matching\s+autoregressive|autoregressive\s+flow_matching)", text), text
    assert all(name in text for name in (*SYSTEMS, "generation/fd_classifier", "sampling.guidance_scale"))
    assert "encode_tokens" not in text  # what is the same for the whole run is no param
    shown = [float(number) for number in re.findall(r"\d+\.\d+", text)]
    for name in SYSTEMS:  # the page rounds it
        assert any(abs(number / distance(pages, name) - 1) < 0.001 for number in shown), name

    page.goto(training)
    page.get_by_text("loss", exact=True).first.wait_for()
    curves = page.locator(".js-plotly-plot path.js-line")
    curves.first.wait_for(state="attached")
    pages.shoot("mlflow-curve")
    points = [curve.get_attribute("d").count(",") for curve in curves.all()]
    assert max(points) > 40, points  # of 60 steps
    assert pages.remote == []


def test_cancel_on_the_page_ends_a_training_within_ten_seconds(pages: Pages) -> None:
    page = pages.page
    pages.open_deployment()
    page.get_by_text("Custom run", exact=True).click()
    for index, text in enumerate(["systems.vqgan-flow.prior.training.num_steps=100000", "train_prior@vqgan-flow"]):
        page.get_by_text("list", exact=True).nth(index).click()
        page.get_by_role("button", name="Add item").nth(index).click()
        page.get_by_role("textbox").nth(index + 1).fill(text)  # the first is the name of the run
    pages.shoot("prefect-custom-run", 1500)
    pages.resize(1500)  # the form is longer than a page
    name = page.get_by_role("textbox").first.input_value()
    pages.submit()
    pages.open_run(name)
    training = re.compile(r"^train_prior@vqgan-flow\s+step\s+\d+/100000")
    page.get_by_text(training).first.wait_for(timeout=1000 * RUN_SECONDS)
    assert any("train_prior" in command for command in pages.stages())
    page.get_by_role("button", name="Cancel").click()
    page.get_by_role("button", name="Confirm").click()
    began = time.monotonic()
    while pages.stages():
        assert time.monotonic() < began + 10, pages.stages()
        time.sleep(0.1)
    print(f"cancelled: no process after {time.monotonic() - began:.1f} s")
    assert pages.wait_for_end() == "Cancelled"
    pages.shoot("prefect-cancelled")
    assert pages.remote == []

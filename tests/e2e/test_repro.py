"""The user's path: the whole pipeline once, what reruns after a change and what does not.

The tests of this file read the finished clone, or share a copy of it and run in order; each leaves it up to date.
"""

import json
import re
import shutil
import sys

import pandas as pd
import pytest
from clones import AT_THE_END, ENHANCING, EVERY_EDIT, SYSTEMS, cell, ran
from PIL import Image

pytestmark = pytest.mark.e2e(seconds=60)


def test_the_whole_pipeline_runs_and_ends_with_a_table(finished):
    params = finished.params()
    stages = 4 + 2 * len(params["features"]) + 3 * len(params["tokenizers"]) + 4 * len(params["systems"])
    assert len(ran(finished.output)) == stages == 26
    systems = list(SYSTEMS)
    figures = pd.read_csv(finished.folder / "data/comparison/comparison.csv")
    for name in ("fd_classifier", "fd_random"):
        distances = figures[figures.figure == name]
        assert distances.system.tolist() == ["real", *systems]
        assert (distances.num_images == 40).all() and (distances.standard_error > 0).all()
    assert len(pd.read_csv(finished.folder / "data/comparison/differences.csv")) == 2 * 6 + 3
    markdown = (finished.folder / "data/comparison/comparison.md").read_text()
    for name in systems:
        assert f"| {name}" in markdown.replace("  ", " ") and f"data/pictures/samples/{name}.png" in markdown
        with Image.open(finished.folder / f"data/pictures/samples/{name}.png") as picture:
            assert min(picture.size) > 400
        metrics = json.loads((finished.folder / f"data/metrics/systems/{name}.json").read_text())
        assert metrics["generation"]["fd_classifier"]["num_images"] == 40
        assert metrics["reconstruction"]["psnr_db"]["num_images"] == 359
        assert metrics["drawn"]["seed"] == 0
        assert metrics["protocols"][metrics["generation"]["fd_random"]["protocol"]]["network"] == "random"
    trainings = {f"train_prior@{name}" for name in systems} | {"train_features@classifier", "train_tokenizer@vqgan"}
    timings = {path.stem for path in (finished.folder / "data/timings").glob("*.json")}
    assert timings >= trainings | {"evaluate_real", "compare_systems"}


def test_no_clock_and_no_path_of_the_machine_is_in_an_artifact(finished):
    for path in (finished.folder / "data").rglob("*.json"):
        if "timings" not in path.parts:
            text = path.read_text()
            assert "seconds" not in text and str(finished.folder) not in text, path


def test_every_edit_is_tried_or_refused_and_known_pixels_stay(finished):
    for path in sorted((finished.folder / "data/metrics/edits").glob("*.json")):
        metrics, kind = json.loads(path.read_text()), finished.params()["systems"][path.stem]["prior"]["kind"]
        refused = set(metrics["drawn"]["refused"])
        of_kind = {"gan": EVERY_EDIT - {"interpolate"}, "autoregressive": ENHANCING}
        assert refused == of_kind.get(kind, set()), path.stem
        assert set(metrics) >= EVERY_EDIT - refused
        if "inpaint" not in refused:
            assert metrics["inpaint"]["changed_known_pixels"]["value"] == 0
            assert metrics["inpaint"]["diversity"]["value"] > 0
            assert "label_agreement" in metrics["inpaint/mean_fill"]
        with Image.open(finished.folder / f"data/pictures/edits/{path.stem}.png") as picture:
            assert min(picture.size) > 100


def test_a_second_repro_runs_nothing(clone):
    said = clone.repro()
    assert ran(said) == [] and "up to date" in said


def test_one_changed_parameter_of_a_prior_reruns_that_cell_alone(clone):
    params = clone.params()
    params["systems"]["vqgan-autoregressive"]["prior"]["depth"] = 2
    clone.write_params(params)
    said = clone.repro()
    first, *middle = ran(said)
    assert first == "train_prior@vqgan-autoregressive" and middle[-2:] == AT_THE_END, said
    assert {first, *middle[:-2]} == cell("vqgan-autoregressive") and len(middle) == 5


def guidance(params):
    params["systems"]["vqgan-flow"]["sampling"]["guidance_scale"] = 2.0
    return cell("vqgan-flow", "sample_images", "evaluate", "edit_images")


def new_system(params):
    params["systems"]["pixel-flow"] = {**params["systems"]["vqgan-flow"], "tokenizer": "none"}
    return cell("pixel-flow")


def feature_network(params):
    params["features"]["random"]["seed"] = 1
    judged = {f"evaluate_tokenizer@{name}" for name in params["tokenizers"]} | {"evaluate_real"}
    for name in SYSTEMS:
        judged |= cell(name, "evaluate", "edit_images")
    return {"train_features@random", "reference_stats@random"} | judged


CHANGES = {
    "a-guidance-scale-trains-nothing": guidance,
    "a-new-system-runs-only-its-own-cell": new_system,
    "another-feature-network-trains-nothing-but-itself": feature_network,
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_a_change_reruns_what_depends_on_it(clone, change):
    """All that DVC could run: test_remotes.py runs another guidance scale, test_deployments.py cells of a sweep."""
    before = clone.params()
    params = clone.params()
    expected = change(params)
    clone.write_params(params)
    try:
        assert clone.would_run() == expected | set(AT_THE_END)
    finally:
        clone.write_params(before)


def test_plots_and_metrics_are_there_for_dvc(clone):
    shown = json.loads(clone.run("dvc", "metrics", "show", "--json").stdout)[""]["data"]
    assert set(shown) == {f"data/metrics/summary/{name}.json" for name in ("real", *SYSTEMS)}
    for name, content in shown.items():
        ((system, figures),) = content["data"].items()
        assert name == f"data/metrics/summary/{system}.json"  # DVC's tables head a column with system.figure
        assert "fd_classifier" in figures and len(figures) <= 12, name
        assert all(isinstance(value, float) for value in figures.values())  # no protocols, no errors
    plots = clone.run(sys.executable, "-m", "tools.plots")
    assert plots.returncode == 0, plots.stderr
    page = (clone.folder / "dvc_plots/index.html").read_text()
    assert "data/curves/priors/vqgan-flow.csv" in page and "vqgan-flow.png" in page
    loaded = re.findall(r"<(?:script|link)[^>]*(?:src|href)=", page)
    assert "vegaEmbed=" in page and not loaded  # nothing comes from elsewhere
    shutil.rmtree(clone.folder / "dvc_plots")

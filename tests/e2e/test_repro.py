"""The user's path: the whole pipeline, what reruns and what does not, and what a kill leaves behind.

The tests of this file share one clone and run in order; each leaves the pipeline up to date.
"""

import json
import os
import re
import shutil
import signal
import sys
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import safetensors.numpy
from PIL import Image

pytestmark = pytest.mark.e2e
TRAININGS = {
    "train_features@classifier": "data/features/classifier",
    "train_tokenizer@vqvae": "data/tokenizers/vqvae",
    "train_tokenizer@vqgan": "data/tokenizers/vqgan",
    "train_prior@gan": "data/priors/gan",
    "train_prior@pixel-diffusion": "data/priors/pixel-diffusion",
    "train_prior@vqgan-autoregressive": "data/priors/vqgan-autoregressive",
    "train_prior@vqgan-flow": "data/priors/vqgan-flow",
}

AT_THE_END = ["compare_systems", "write_report"]  # of everything that changes a figure


def ran(output: str) -> list[str]:
    return re.findall(r"Running stage '([^']+)'", output)


@pytest.fixture(scope="module")
def reproduced(clone):
    result = clone.run("dvc", "repro")
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    return clone, result.stdout


def test_the_whole_pipeline_runs_and_ends_with_a_table(reproduced):
    clone, output = reproduced
    params = clone.params()
    stages = 4 + 2 * len(params["features"]) + 3 * len(params["tokenizers"]) + 4 * len(params["systems"])
    assert len(ran(output)) == stages == 41
    systems = list(params["systems"])
    figures = pd.read_csv(clone.folder / "data/comparison/comparison.csv")
    for name in ("fd_classifier", "fd_random"):
        distances = figures[figures.figure == name]
        assert distances.system.tolist() == ["real", *systems]
        assert (distances.num_images == 40).all() and (distances.standard_error > 0).all()
    assert len(pd.read_csv(clone.folder / "data/comparison/differences.csv")) == 2 * 21 + 15
    markdown = (clone.folder / "data/comparison/comparison.md").read_text()
    for name in systems:
        assert f"| {name}" in markdown.replace("  ", " ") and f"data/pictures/samples/{name}.png" in markdown
        with Image.open(clone.folder / f"data/pictures/samples/{name}.png") as picture:
            assert min(picture.size) > 400
        metrics = json.loads((clone.folder / f"data/metrics/systems/{name}.json").read_text())
        assert metrics["generation"]["fd_classifier"]["num_images"] == 40
        assert metrics["reconstruction"]["psnr_db"]["num_images"] == 359
        assert metrics["drawn"]["seed"] == 0
        assert metrics["protocols"][metrics["generation"]["fd_random"]["protocol"]]["network"] == "random"
    timings = {path.stem for path in (clone.folder / "data/timings").glob("*.json")}
    assert timings >= set(TRAININGS) | {"evaluate@real", "compare_systems"}


def test_no_clock_and_no_path_of_the_machine_is_in_an_artifact(reproduced):
    clone, _ = reproduced
    for path in (clone.folder / "data").rglob("*.json"):
        if "timings" not in path.parts:
            text = path.read_text()
            assert "seconds" not in text and str(clone.folder) not in text, path


def test_a_second_repro_runs_nothing(reproduced):
    clone, _ = reproduced
    result = clone.run("dvc", "repro")
    assert result.returncode == 0 and ran(result.stdout) == []
    assert "up to date" in result.stdout


def test_one_changed_parameter_of_a_prior_reruns_that_cell_alone(reproduced):
    clone, _ = reproduced
    params = clone.params()
    params["systems"]["vqgan-autoregressive"]["prior"]["depth"] = 2
    clone.write_params(params)
    result = clone.run("dvc", "repro")
    cell = "vqgan-autoregressive"
    first, *middle = ran(result.stdout)
    assert first == f"train_prior@{cell}" and middle[-2:] == AT_THE_END, result.stdout + result.stderr
    assert sorted(middle[:-2]) == [f"edit_images@{cell}", f"evaluate@{cell}", f"sample_images@{cell}"]


def test_a_changed_guidance_scale_trains_nothing(reproduced):
    clone, _ = reproduced
    params = clone.params()
    params["systems"]["vqgan-flow"]["sampling"]["guidance_scale"] = 2.0
    clone.write_params(params)
    result = clone.run("dvc", "repro")
    *again, last, end = ran(result.stdout)
    assert sorted(again) == ["edit_images@vqgan-flow", "evaluate@vqgan-flow", "sample_images@vqgan-flow"]
    assert [last, end] == AT_THE_END


def test_every_edit_is_tried_or_refused_and_known_pixels_stay(reproduced):
    clone, _ = reproduced
    for path in sorted((clone.folder / "data/metrics/edits").glob("*.json")):
        metrics, kind = json.loads(path.read_text()), clone.params()["systems"][path.stem]["prior"]["kind"]
        refused = set(metrics["drawn"]["refused"])
        enhancing = {"denoise", "super-resolution"}
        everything = {"inpaint", "restyle", "variations"} | enhancing
        assert refused == {"gan": everything, "autoregressive": enhancing}.get(kind, set()), path.stem
        assert set(metrics) >= (everything | {"interpolate"}) - refused
        if "inpaint" not in refused:
            assert metrics["inpaint"]["changed_known_pixels"]["value"] == 0
            assert metrics["inpaint"]["diversity"]["value"] > 0
            assert "label_agreement" in metrics["inpaint/mean_fill"]
        with Image.open(clone.folder / f"data/pictures/edits/{path.stem}.png") as picture:
            assert min(picture.size) > 100


def test_another_feature_network_trains_nothing_but_itself(reproduced):
    clone, _ = reproduced
    params = clone.params()
    params["features"]["random"]["seed"] = 1
    clone.write_params(params)
    stages = ran(clone.run("dvc", "repro").stdout)
    assert {"train_features@random", "reference_stats@random", "evaluate_real", "compare_systems"} <= set(stages)
    again = {stage.partition("@")[0] for stage in stages}
    assert again == {
        "train_features", "reference_stats", "evaluate_tokenizer", "evaluate_real", "evaluate", "edit_images", *AT_THE_END
    }  # fmt: skip
    assert "train_features@classifier" not in stages and "reference_stats@classifier" not in stages


def command_of(clone, stage: str) -> list[str]:
    """The command line that dvc.yaml gives a stage, without the shell's `exec`."""
    lock = (clone.folder / "dvc.lock").read_text()
    found = re.search(rf"^  {re.escape(stage)}:\n    cmd: (.*(?:\n      .*)*)", lock, re.MULTILINE)
    return re.sub(r"\s+", " ", found.group(1)).removeprefix("exec ").split()


def hashes(folder: Path) -> dict[str, str]:
    return json.loads((folder / "manifest.json").read_text())


@pytest.mark.parametrize("stage", TRAININGS)
def test_kill_9_in_the_middle_and_again_gives_the_same_bits(reproduced, stage):
    clone, _ = reproduced
    out = clone.folder / TRAININGS[stage]
    whole = hashes(out)
    shutil.rmtree(out)
    process = clone.start(*command_of(clone, stage), TESSERA_CHECKPOINT_SECONDS="0")
    state = clone.folder / ".state" / stage.replace("@", "-")
    try:
        wait_for(lambda: any(state.glob("*/step-*[3-9]/manifest.json")), process)
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    assert not out.exists()
    assert process.returncode == -signal.SIGKILL, "it ended before it could be killed"
    result = clone.run(*command_of(clone, stage))
    assert result.returncode == 0, result.stdout + result.stderr
    resumed = re.search(r"resumed step (\d+)", result.stdout)
    assert resumed and 3 <= int(resumed.group(1)) < 60, result.stdout
    assert hashes(out) == whole
    assert not state.exists()  # nothing of the interruption is left


def test_a_second_copy_of_a_running_stage_is_refused(reproduced):
    clone, _ = reproduced
    command = command_of(clone, "train_tokenizer@vqvae")
    first = clone.start(*command, TESSERA_CHECKPOINT_SECONDS="0")
    state = clone.folder / ".state/train_tokenizer-vqvae"
    try:
        wait_for(lambda: any(state.glob("*/step-*")), first)
        os.kill(first.pid, signal.SIGSTOP)  # so that it is not done before the second is up
        second = clone.run(*command)
        os.kill(first.pid, signal.SIGCONT)
        assert second.returncode == 2
        assert f"already running as process {first.pid}" in second.stderr and "Traceback" not in second.stderr
        os.kill(first.pid, signal.SIGTERM)
        began = time.monotonic()
        output, _ = first.communicate(timeout=20)
        assert time.monotonic() - began < 5
    finally:
        if first.poll() is None:
            os.killpg(first.pid, signal.SIGKILL)
    assert first.returncode == 143 and "the same command continues from there" in output
    assert clone.run(*command).returncode == 0


def test_kill_9_of_dvc_takes_the_stage_with_it(reproduced):
    clone, _ = reproduced
    stage, out = "train_tokenizer@vqvae", clone.folder / "data/tokenizers/vqvae"
    whole = hashes(out)
    # DVC takes the user's shell, and sh where SHELL is not set (cron, CI): it does not replace itself as bash does
    surroundings = {"SHELL": "/bin/sh", "TESSERA_CHECKPOINT_SECONDS": "0"}
    process = clone.start("dvc", "repro", "--force", "--single-item", stage, **surroundings)
    lock = clone.folder / f".state/locks/{stage}.lock"
    lock.write_text("")
    try:
        wait_for(lambda: lock.read_text().strip(), process)
        pid = int(lock.read_text())
        process.kill()
        process.wait()
        began = time.monotonic()
        while alive(pid) and time.monotonic() - began < 10:
            time.sleep(0.1)
        assert not alive(pid), "the stage outlived dvc"
        assert time.monotonic() - began < 5
    finally:
        if lock.read_text().strip() and alive(int(lock.read_text())):
            os.kill(int(lock.read_text()), signal.SIGKILL)
    assert clone.run("dvc", "repro").returncode == 0
    assert hashes(out) == whole


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


def wait_for(happened, process, seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not happened():
        assert process.poll() is None, f"ended early: {process.stdout.read()}"
        assert time.monotonic() < end, "it never happened"
        time.sleep(0.02)


def test_a_flipped_bit_in_an_input_stops_the_stage_naming_the_file(reproduced):
    clone, _ = reproduced
    weights = clone.folder / "data/tokenizers/vqgan/weights.safetensors"
    whole, mode = weights.read_bytes(), weights.stat().st_mode
    broken = bytearray(whole)
    broken[-5] ^= 1
    weights.chmod(0o644)
    weights.write_bytes(broken)
    try:
        result = clone.run(*command_of(clone, "encode_tokens@vqgan"))
        assert result.returncode == 2
        assert "weights.safetensors is damaged: sha256" in result.stderr and "Traceback" not in result.stderr
    finally:
        weights.write_bytes(whole)
        weights.chmod(mode)


def test_samples_are_not_decoded_by_another_tokenizer(reproduced):
    clone, _ = reproduced
    command = [
        part.replace("data/tokenizers/vqgan", "data/tokenizers/vqvae")
        for part in command_of(clone, "sample_images@vqgan-flow")
    ]
    result = clone.run(*command)
    assert result.returncode == 2 and "trained on tokens of another tokenizer" in result.stderr


def test_plots_and_metrics_are_there_for_dvc(reproduced):
    clone, _ = reproduced
    shown = clone.run("dvc", "metrics", "show", "--json")
    assert "label_agreement" in shown.stdout and "data/metrics/priors/vqgan-masked.json" in shown.stdout
    plots = clone.run("dvc", "plots", "show", "--out", "plots")
    assert plots.returncode == 0, plots.stderr
    page = (clone.folder / "plots/index.html").read_text()
    assert "data/curves/priors/vqgan-flow.csv" in page and "vqgan-flow.png" in page
    shutil.rmtree(clone.folder / "plots")


def test_a_new_system_reruns_only_its_own_cell(reproduced):
    clone, _ = reproduced
    params = clone.params()
    params["systems"]["vqvae-flow"] = {**params["systems"]["vqgan-flow"], "tokenizer": "vqvae"}
    clone.write_params(params)
    result = clone.run("dvc", "repro")
    cell = "vqvae-flow"
    first, *middle = ran(result.stdout)
    assert first == f"train_prior@{cell}" and middle[-2:] == AT_THE_END, result.stdout + result.stderr
    assert sorted(middle[:-2]) == [f"edit_images@{cell}", f"evaluate@{cell}", f"sample_images@{cell}"]


def test_two_processes_train_the_prior_that_one_process_trains(reproduced):
    """torchrun with gloo, the same global batch, no dropout: equal up to the order of additions."""
    clone, _ = reproduced
    params = clone.params()
    name = "vqvae-autoregressive"
    params["encode_tokens"]["warps"] = 0  # each process draws the views of its own share
    params["systems"][name]["prior"] |= {"dropout": 0.0, "label_dropout": 0.0}
    params["systems"][name]["prior"]["training"] |= {"num_steps": 10, "optimizer": "adamw"}
    params["follow_training"] |= {"every": 4, "num_images": 20}  # the first process looks, the other waits
    clone.write_params(params)
    assert clone.run("dvc", "repro", "encode_tokens@vqvae").returncode == 0
    out, history = clone.folder / f"data/priors/{name}", clone.folder / f"data/curves/priors/{name}.csv"
    command = command_of(clone, f"train_prior@{name}")
    many = [Path(sys.executable).with_name("torchrun"), "--standalone", "--nproc-per-node", "2", *command[1:]]
    losses, weights = [], []
    for launched in (command, many):
        result = clone.run(*map(str, launched))
        assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-3000:]
        losses.append(pd.read_csv(history)[["loss", "test_loss", "follow_fd_test"]])
        weights.append(safetensors.numpy.load_file(out / "weights.safetensors"))
    assert "2 processes" in result.stdout
    np.testing.assert_allclose(losses[1].loss, losses[0].loss, atol=1e-5)
    for curves in losses:
        assert curves.index[curves.follow_fd_test.notna()].tolist() == [3, 7, 9]  # steps 4, 8 and 10
    np.testing.assert_allclose(losses[1].test_loss, losses[0].test_loss, atol=1e-4)
    for key, one in weights[0].items():
        assert np.abs(weights[1][key] - one).mean() < 1e-5, key

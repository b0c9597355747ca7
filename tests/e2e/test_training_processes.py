"""Trainings as processes of their own: killed, stopped, started twice, given damaged inputs, and two that train one prior.

The tests share a copy of the finished clone. Death at any step of any part is in test_components.py, in one process.
"""

import contextlib
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pandas as pd
import psutil
import pytest
import safetensors.numpy
from clones import ROOT
from ports import free_ports

pytestmark = pytest.mark.e2e(seconds=130)
TOKENIZER, PRIOR = "train_tokenizer@vqgan", "train_prior@vqgan-flow"


@pytest.mark.parametrize("stage", [TOKENIZER, PRIOR])
def test_kill_9_in_the_middle_and_again_gives_the_same_bits(clone, stage):
    name = {TOKENIZER: "data/tokenizers/vqgan", PRIOR: "data/priors/vqgan-flow"}[stage]
    out, whole = clone.folder / name, clone.hashes(name)
    shutil.rmtree(out)
    process = clone.start(*clone.command_of(stage), TESSERA_CHECKPOINT_SECONDS="0")
    state = clone.folder / ".state" / stage.replace("@", "-")
    try:
        wait_for(lambda: any(state.glob("*/step-*[3-9]/manifest.json")), process)
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    assert not out.exists()
    assert process.returncode == -signal.SIGKILL, "it ended before it could be killed"
    result = clone.run(*clone.command_of(stage))
    assert result.returncode == 0, result.stdout + result.stderr
    resumed = re.search(r"resumed step (\d+)", result.stdout)
    assert resumed and 3 <= int(resumed.group(1)) < 60, result.stdout
    assert clone.hashes(name) == whole
    assert "leaked" not in result.stderr  # it ends at once, and takes nothing down that would complain
    assert not state.exists()  # nothing of the interruption is left


def test_a_key_that_the_params_do_not_have_is_refused_in_a_sentence(clone):
    for key in ("vqgna-flow", "vqgan"):  # the latter is a tokenizer
        command = [key if part == "vqgan-flow" else part for part in clone.command_of(PRIOR)]
        refused = clone.run(*command)
        assert refused.returncode == 2 and "Traceback" not in refused.stderr
        assert f"systems of params.yaml has no {key}: expected one of gan, " in refused.stderr


def test_a_second_copy_of_a_running_stage_is_refused(clone):
    command = clone.command_of(TOKENIZER)
    first = clone.start(*command, TESSERA_CHECKPOINT_SECONDS="0")
    state = clone.folder / ".state/train_tokenizer-vqgan"
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


def test_kill_9_of_dvc_takes_the_stage_with_it(clone):
    stage, out = TOKENIZER, "data/tokenizers/vqgan"
    whole = clone.hashes(out)
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
    clone.repro(stage)
    assert clone.hashes(out) == whole


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


def test_a_flipped_bit_in_an_input_stops_the_stage_naming_the_file(clone):
    weights = clone.folder / "data/tokenizers/vqgan/weights.safetensors"
    whole, mode = weights.read_bytes(), weights.stat().st_mode
    broken = bytearray(whole)
    broken[-5] ^= 1
    weights.chmod(0o644)
    weights.write_bytes(broken)
    try:
        result = clone.run(*clone.command_of("encode_tokens@vqgan"))
        assert result.returncode == 2
        assert "weights.safetensors is damaged: sha256" in result.stderr and "Traceback" not in result.stderr
    finally:
        weights.write_bytes(whole)
        weights.chmod(mode)


def test_samples_are_not_decoded_by_another_tokenizer(clone):
    command = [
        part.replace("data/tokenizers/vqgan", "data/tokenizers/none")
        for part in clone.command_of("sample_images@vqgan-flow")
    ]
    result = clone.run(*command)
    assert result.returncode == 2 and "trained on tokens of another tokenizer" in result.stderr


def test_two_processes_train_the_prior_that_one_process_trains(clone):
    """With gloo, the same global batch, no dropout: equal up to the order of additions. As dvc.yaml has the command."""
    params = clone.params()
    name = "vqgan-autoregressive"
    params["encode_tokens"]["warps"] = 0  # each process draws the views of its own share
    params["systems"][name]["prior"] |= {"dropout": 0.0, "label_dropout": 0.0}
    params["systems"][name]["prior"]["training"] |= {"num_steps": 10, "optimizer": "adamw"}
    params["follow_training"] |= {"every": 4, "num_images": 20}  # the first process looks, the other waits
    clone.write_params(params)
    clone.repro("encode_tokens@vqgan")
    out, history = clone.folder / f"data/priors/{name}", clone.folder / f"data/curves/priors/{name}.csv"
    command = clone.command_of(f"train_prior@{name}")
    losses, weights = [], []
    for number in ("1", "2"):
        result = clone.run(*command, TESSERA_PROCESSES=number)
        assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-3000:]
        losses.append(pd.read_csv(history)[["loss", "test_loss", "follow_fd_test"]])
        weights.append(safetensors.numpy.load_file(out / "weights.safetensors"))
    assert "2 processes" in result.stdout and result.stdout.count("M parameters") == 1  # one of them speaks
    np.testing.assert_allclose(losses[1].loss, losses[0].loss, atol=1e-5)
    for curves in losses:
        assert curves.index[curves.follow_fd_test.notna()].tolist() == [3, 7, 9]  # steps 4, 8 and 10
    np.testing.assert_allclose(losses[1].test_loss, losses[0].test_loss, atol=1e-4)
    for key, one in weights[0].items():
        assert np.abs(weights[1][key] - one).mean() < 1e-5, key


def test_two_processes_train_the_adversarial_prior_that_one_process_trains(clone, tmp_path):
    """Told captions, and noise that is zero, as each process draws that of its own share."""
    clone = clone.copy(tmp_path / "own")
    code = clone.folder / "tessera/priors/gan.py"
    drawn = "noise = torch.randn(len(labels), self.config.noise_dim, device=labels.device)"
    assert code.read_text().count(drawn) == 1
    code.write_text(code.read_text().replace(drawn, drawn.replace("randn", "zeros")))
    params = clone.params()
    prior = params["systems"]["gan"]["prior"]
    prior["training"] |= {"num_steps": 10, "optimizer": "adamw"}
    words = [[f"the digit {number}"] for number in range(10)]
    prior["condition"] = {"kind": "caption", "max_bytes": 12, "width": 16, "depth": 1, "of_classes": words}
    assert prior["num_views"] == 1 and prior["r1_weight"] and prior["r2_weight"]
    clone.write_params(params)
    curves, weights = [], []
    for number in ("1", "2"):
        result = clone.run(*clone.command_of("train_prior@gan"), TESSERA_PROCESSES=number)
        assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-3000:]
        curves.append(pd.read_csv(clone.folder / "data/curves/priors/gan.csv").drop(columns="discriminator_accuracy"))
        weights.append(safetensors.numpy.load_file(clone.folder / "data/priors/gan/weights.safetensors"))
    assert "2 processes" in result.stdout and {"r1_penalty", "r2_penalty", "fake_logits"} <= set(curves[0])
    np.testing.assert_allclose(curves[1], curves[0], rtol=1e-5, atol=1e-5)
    assert any("label_embedding.transformer" in key for key in weights[0])
    for key, one in weights[0].items():
        assert np.abs(weights[1][key] - one).mean() < 1e-5, key


@pytest.mark.parametrize("stage", ["train_tokenizer@none", "train_features@random"])
@pytest.mark.parametrize("by", ["environment", "torchrun"])
def test_what_has_its_weights_already_is_written_once_however_many_processes_there_are(clone, stage, by):
    command = clone.command_of(stage)
    out = command[command.index("--out") + 1]
    whole = clone.hashes(out)
    if by == "torchrun":
        command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", *command[1:]]
    done = clone.run(*command, **({"TESSERA_PROCESSES": "2"} if by == "environment" else {}))
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    assert clone.hashes(out) == whole and done.stdout.count(" done in ") == 1


def test_kill_9_of_a_sharded_training_and_again_gives_the_same_bits_and_whoever_samples_notices_nothing(
    clone, tmp_path
):
    clone = clone.copy(tmp_path / "own")
    name = "vqgan-autoregressive"
    params = clone.params()
    params["systems"][name]["prior"]["training"] |= {"num_steps": 20, "optimizer": "adamw", "sharding": "full"}
    params["follow_training"] |= {"every": 10, "num_images": 20}
    clone.write_params(params)
    command, out = clone.command_of(f"train_prior@{name}"), f"data/priors/{name}"
    made = clone.run(*command, TESSERA_PROCESSES="2")
    assert made.returncode == 0 and "2 processes" in made.stdout, made.stdout[-2000:] + made.stderr[-3000:]
    whole = clone.hashes(out)
    shutil.rmtree(clone.folder / out)
    both = clone.start(*command, TESSERA_PROCESSES="2", TESSERA_CHECKPOINT_SECONDS="0")
    try:
        state = clone.folder / f".state/train_prior-{name}"
        wait_for(lambda: any(state.glob("*/step-*[3-9]/manifest.json")), both)
        ranks = psutil.Process(both.pid).children()
    finally:
        os.killpg(both.pid, signal.SIGKILL)
        both.wait()
    for rank in ranks:
        with contextlib.suppress(psutil.NoSuchProcess):
            rank.kill()
    assert not (clone.folder / out).exists(), "it ended before it could be killed"
    again = clone.run(*command, TESSERA_PROCESSES="2")
    assert again.returncode == 0 and "resumed step" in again.stdout, again.stdout[-2000:] + again.stderr[-3000:]
    assert clone.hashes(out) == whole
    sampled = clone.run(*clone.command_of(f"sample_images@{name}"))
    assert sampled.returncode == 0, sampled.stdout[-2000:] + sampled.stderr[-3000:]


def test_one_of_two_processes_that_is_killed_ends_both_and_any_number_goes_on_from_there(clone, tmp_path):
    clone = clone.copy(tmp_path / "own")  # its tokenizer will be another one
    out, whole = "data/tokenizers/vqgan", clone.hashes("data/tokenizers/vqgan")
    command, state = clone.command_of(TOKENIZER), clone.folder / ".state/train_tokenizer-vqgan"
    shutil.rmtree(clone.folder / out)
    both = clone.start(*command, TESSERA_PROCESSES="2", TESSERA_CHECKPOINT_SECONDS="0")
    try:
        wait_for(lambda: any(state.glob("*/step-*[3-9]/manifest.json")), both)
        ranks = psutil.Process(both.pid).children()
        assert len(ranks) == 2
        ranks[-1].kill()
        output, _ = both.communicate(timeout=60)
    finally:
        if both.poll() is None:
            os.killpg(both.pid, signal.SIGKILL)
    assert both.returncode == 137 and "of 2 was ended by SIGKILL" in output and "Traceback" not in output
    assert not any(rank.is_running() for rank in ranks)
    alone = clone.run(*command)
    assert alone.returncode == 0 and "resumed step" in alone.stdout
    assert clone.hashes(out).keys() == whole.keys()


def test_two_machines_train_one_tokenizer_though_only_the_first_has_its_state(clone, tmp_path):
    """Each with a checkout of its own; the second has no state, and makes nothing but its share of each step."""
    clone, other = (clone.copy(tmp_path / name) for name in ("first", "second"))
    command = clone.command_of(TOKENIZER)
    (port,) = free_ports(1)
    for folder in (clone.folder, other.folder):
        shutil.rmtree(folder / "data/tokenizers/vqgan")
    meeting = {"TESSERA_NODES": "2", "TESSERA_RENDEZVOUS": f"127.0.0.1:{port}", "TESSERA_CHECKPOINT_SECONDS": "0"}
    for turn in range(2):
        one, two = (each.start(*command, **meeting, TESSERA_NODE=str(node)) for node, each in enumerate((clone, other)))
        if not turn:
            wait_for(lambda: any(clone.folder.glob(".state/train_tokenizer-vqgan/*/step-*[3-9]/manifest.json")), one)
            one.terminate()
        outputs = [each.communicate(timeout=200)[0] for each in (one, two)]
        assert [each.returncode for each in (one, two)] == ([143, 143] if not turn else [0, 0]), outputs
    assert "resumed step" in outputs[0] and TOKENIZER not in outputs[1]  # it is the first that speaks
    assert clone.hashes("data/tokenizers/vqgan") and not (other.folder / "data/tokenizers/vqgan").exists()
    assert not any(other.folder.glob(".state/train_tokenizer-vqgan/*/step-*"))


@pytest.mark.parametrize(
    ("stage", "out", "said"),
    [
        ("sample_images@gan", "data/samples/gan", "36 images"),
        ("sample_images@vqgan-autoregressive", "data/samples/vqgan-autoregressive", "36 images"),
        ("sample_images@vqgan-flow", "data/samples/vqgan-flow", "36 images"),
        ("encode_tokens@vqgan", "data/tokens/vqgan", "views of 1,797 images"),
    ],
)
def test_what_two_processes_draw_or_encode_is_what_one_does_byte_for_byte(clone, stage, out, said):
    """A part of the images at a time, so that each process has a share, and one of them the last."""
    params = clone.params()
    params["sample_images"] |= {"num_images": 36, "batch_size": 8}
    params["encode_tokens"]["batch_size"] = 300
    clone.write_params(params)
    made = []
    for number in ("1", "2"):
        result = clone.run(*clone.command_of(stage), TESSERA_PROCESSES=number)
        assert result.returncode == 0 and result.stdout.count(said) == 1, result.stdout + result.stderr
        made.append(clone.hashes(out))
    assert made[0] == made[1]


@pytest.mark.parametrize(
    ("environment", "is_adopted", "code"),
    [
        (
            {"DVC_STAGE": "train"},
            True,
            143,
        ),  # dvc died while Python was starting; somebody of another group is the parent
        ({"DVC_STAGE": "train"}, False, 0),
        ({}, True, 0),  # by hand: nohup, setsid
        ({"DVC_STAGE": "train", "RANK": "1"}, True, 0),  # torchrun's own
    ],
)
def test_a_stage_whose_dvc_was_gone_before_it_looked_ends_at_once(environment, is_adopted, code):
    program = "from tessera.running import parent; parent.die_with_it()"
    inherited = {key: value for key, value in os.environ.items() if key not in ("DVC_STAGE", "RANK")}
    done = subprocess.run(
        [sys.executable, "-c", program], env=inherited | environment, cwd=ROOT, start_new_session=is_adopted, timeout=30
    )
    assert done.returncode == code

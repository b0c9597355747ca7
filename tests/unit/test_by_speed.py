"""`by_speed`: the faster way is found, kept, and trains as where it is named."""

import json
import signal

import pytest
import torch
from accelerate.state import AcceleratorState
from torch import nn

from tessera.bases.optimization import Training, optimizers_for
from tessera.contracts import ImageBatch
from tessera.running.job import Job, Stopped
from tessera.training import by_speed
from tessera.training.loop import fit

BOTH = ("compile", "precision")  # in whatever order they are named
needs_compiler = pytest.mark.skipif(by_speed.compiler() is None, reason="this machine has no C++ compiler")


class Objective(nn.Module):
    """A regression with dropout: a trial that took a draw from the training would change it."""

    phases = ("only",)

    def __init__(self, settings: Training):
        super().__init__()
        torch.manual_seed(0)
        self.model, self.settings = nn.Sequential(nn.Linear(6, 8), nn.Dropout(0.3), nn.Linear(8, 1)), settings
        self.model.compiles = True

    def forward(self, batch, phase, step):
        return {"loss": (self.model(batch.images).squeeze(1) - batch.labels).square().mean()}

    def optimizers(self):
        return {"only": optimizers_for(self.model, self.settings)}


class Data:
    def __init__(self, on_batch=lambda: None):
        self.x, self.y, self.on_batch = (
            torch.randn(20, 6, generator=torch.Generator().manual_seed(3)),
            torch.arange(20.0),
            on_batch,
        )

    def __len__(self):
        return 20

    def stored(self, rows, generator):
        return ImageBatch(self.x[rows], self.y[rows])

    def batch_of(self, stored):
        self.on_batch()
        return stored


def train(job, data=None, **changes):
    AcceleratorState._reset_state(reset_partial_state=True)
    job.resumable({"of": "inputs"})
    settings = Training(num_steps=12, batch_size=8, learning_rate=0.01, ema_decay=0.9, **changes)
    return fit(Objective(settings), data or Data(), settings, seed=5, job=job)


def check_resumed_without_a_trial(whole, folder, monkeypatch, keys, chosen):
    """A training that is stopped ends as the whole one did, tries nothing again, and its artifact says what was chosen."""
    job, batches = Job("parts", folder / "parts"), iter(range(100))  # the first batches are those of the trials

    def stop_at_the_seventh():
        if next(batches) == 7:
            job.request_stop(signal.SIGTERM)

    with pytest.raises(Stopped):
        train(job, Data(stop_at_the_seventh), by_speed=keys)
    monkeypatch.setattr(by_speed, "trial_step", lambda *of: pytest.fail("it was tried again"))
    again = Job("parts", folder / "parts")
    resumed = train(again, by_speed=keys)
    assert all(torch.equal(resumed.state_dict()[name], value) for name, value in whole.state_dict().items())
    by_speed.write_record(folder, again)
    assert json.loads((folder / by_speed.RECORD).read_text()) == chosen


@pytest.fixture(params=["fp32", "bf16"])
def faster(request, monkeypatch):
    """The trial is made; a clock of the test's own decides it."""
    monkeypatch.setattr(by_speed, "slowness", lambda precision, device: "")
    step, now, taken = by_speed.trial_step, [0.0], {"fp32": 0, "bf16": 0}

    def tried(objective, optimizers, batch, settings, precision):
        step(objective, optimizers, batch, settings, precision)
        taken[precision] += 1
        now[0] += 1.0 if precision == request.param else 2.0

    monkeypatch.setattr(by_speed, "trial_step", tried)
    monkeypatch.setattr(by_speed.time, "perf_counter", lambda: now[0])
    return request.param, taken


def test_the_faster_precision_makes_the_training_that_names_it(tmp_path, faster):
    precision, taken = faster
    chosen = train(Job("chosen", tmp_path / "chosen"), by_speed=("precision",))
    assert min(taken.values()) > 1  # both were tried
    named = train(Job("named", tmp_path / "named"), precision=precision)
    other = train(Job("other", tmp_path / "other"), precision={"fp32": "bf16", "bf16": "fp32"}[precision])
    assert all(torch.equal(chosen.state_dict()[name], value) for name, value in named.state_dict().items())
    assert any(not torch.equal(other.state_dict()[name], value) for name, value in named.state_dict().items())


def test_whoever_resumes_computes_as_it_began_and_the_artifact_says_how(tmp_path, faster, monkeypatch):
    precision, taken = faster
    whole = train(Job("whole", tmp_path / "whole"), by_speed=("precision",))
    check_resumed_without_a_trial(whole, tmp_path, monkeypatch, ("precision",), {"precision": precision})


def test_without_instructions_for_bf16_it_is_not_tried(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cpu, "get_capabilities", dict)
    monkeypatch.setattr(by_speed, "trial_step", lambda *of: pytest.fail("it was tried"))
    job, said = Job("x", tmp_path), []
    job.say = said.append
    train(job, by_speed=("precision",))
    assert "precision fp32: this processor has no instructions for bf16" in said


@pytest.fixture
def clock(monkeypatch):
    """Seconds of a step, and of compiling, which a test may change; and the networks that were compiled."""
    costs, now, compiled = {"plain": 1.0, "compiled": 0.5, "compiling": 9.5}, [0.0], []
    step, compile_module = by_speed.trial_step, nn.Module.compile

    def timed(objective, *of):
        step(objective, *of)
        now[0] += costs["compiled" if objective.model in compiled else "plain"]

    def compile_it(module, *of, **how):
        compiled.append(module)
        now[0] += costs["compiling"]
        compile_module(module, *of, **how)

    monkeypatch.setattr(by_speed, "compiler", lambda: "g++")
    monkeypatch.setattr(by_speed, "SHORTEST", 12)
    monkeypatch.setattr(by_speed, "trial_step", timed)
    monkeypatch.setattr(by_speed.time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(nn.Module, "compile", compile_it)
    return costs, compiled


@needs_compiler
def test_where_compiling_pays_it_is_the_training_that_is_compiled_also_resumed(tmp_path, clock, monkeypatch):
    costs, compiled = clock
    costs["compiling"] = 5.0  # 12 steps save 6
    whole = train(Job("whole", tmp_path / "whole"), by_speed=BOTH)
    assert len(compiled) == 2  # the copy that was tried, and the network itself
    named = train(Job("named", tmp_path / "named"), compile=True)
    assert all(torch.equal(whole.state_dict()[name], value) for name, value in named.state_dict().items())
    check_resumed_without_a_trial(whole, tmp_path, monkeypatch, BOTH, {"precision": "fp32", "compile": True})


@needs_compiler
@pytest.mark.parametrize(
    ("costs", "shortest", "has_compiler", "why"),
    [
        ({}, 12, True, "a step takes 1e+03 ms, and 500 ms compiled, which took 10 s and saves 6"),
        ({"compiled": 2.0}, 12, True, "a step takes 1e+03 ms, and 2e+03 ms compiled, which took 12 s"),
        ({}, 13, True, "the training takes 12 s, too few for compiling to pay"),
        ({}, 12, False, "this machine has no C++ compiler"),
    ],
)
def test_where_compiling_does_not_pay_nothing_is_compiled(
    tmp_path, clock, monkeypatch, costs, shortest, has_compiler, why
):
    seconds, _ = clock
    seconds |= costs
    monkeypatch.setattr(by_speed, "SHORTEST", shortest)
    monkeypatch.setattr(by_speed, "compiler", lambda: "g++" if has_compiler else None)
    job, said = Job("x", tmp_path), []
    job.say = said.append
    chosen = train(job, by_speed=("compile",))
    assert any(line.startswith(f"compile false: {why}") for line in said), said
    plain = train(Job("plain", tmp_path / "plain"))
    assert all(torch.equal(chosen.state_dict()[name], value) for name, value in plain.state_dict().items())

"""`precision_by: speed`: the faster precision is found, kept, and makes the training that it makes where it is named."""

import json
import signal

import pytest
import torch
from accelerate.state import AcceleratorState
from torch import nn

from tessera.bases.optimization import Training, optimizers_for
from tessera.contracts import ImageBatch
from tessera.running.job import Job, Stopped
from tessera.training import faster_precision
from tessera.training.loop import fit


class Objective(nn.Module):
    """A regression with dropout: a trial that took a draw from the training would change it."""

    phases = ("only",)

    def __init__(self, settings: Training):
        super().__init__()
        torch.manual_seed(0)
        self.model, self.settings = nn.Sequential(nn.Linear(6, 8), nn.Dropout(0.3), nn.Linear(8, 1)), settings

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


@pytest.fixture(params=["fp32", "bf16"])
def faster(request, monkeypatch):
    """The trial is made; a clock of the test's own decides it."""
    monkeypatch.setattr(faster_precision, "slowness", lambda precision, device: "")
    step, now, taken = faster_precision.trial_step, [0.0], {"fp32": 0, "bf16": 0}

    def tried(objective, optimizers, batch, settings, precision):
        step(objective, optimizers, batch, settings, precision)
        taken[precision] += 1
        now[0] += 1.0 if precision == request.param else 2.0

    monkeypatch.setattr(faster_precision, "trial_step", tried)
    monkeypatch.setattr(faster_precision.time, "perf_counter", lambda: now[0])
    return request.param, taken


def test_the_faster_precision_makes_the_training_that_names_it(tmp_path, faster):
    precision, taken = faster
    chosen = train(Job("chosen", tmp_path / "chosen"), precision_by="speed")
    assert min(taken.values()) > 1  # both were tried
    named = train(Job("named", tmp_path / "named"), precision=precision)
    other = train(Job("other", tmp_path / "other"), precision={"fp32": "bf16", "bf16": "fp32"}[precision])
    assert all(torch.equal(chosen.state_dict()[name], value) for name, value in named.state_dict().items())
    assert any(not torch.equal(other.state_dict()[name], value) for name, value in named.state_dict().items())


def test_whoever_resumes_computes_as_it_began_and_the_artifact_says_how(tmp_path, faster, monkeypatch):
    precision, taken = faster
    whole = train(Job("whole", tmp_path / "whole"), precision_by="speed")
    job = Job("parts", tmp_path / "parts")
    batches = iter(range(100))  # the first is that of the trial

    def stop_at_the_seventh():
        if next(batches) == 7:
            job.request_stop(signal.SIGTERM)

    with pytest.raises(Stopped):
        train(job, Data(stop_at_the_seventh), precision_by="speed")
    monkeypatch.setattr(faster_precision, "trial_step", lambda *of: pytest.fail("it was tried again"))
    again = Job("parts", tmp_path / "parts")
    resumed = train(again, precision_by="speed")
    assert all(torch.equal(resumed.state_dict()[name], value) for name, value in whole.state_dict().items())
    faster_precision.write_record(tmp_path, again)
    assert json.loads((tmp_path / faster_precision.RECORD).read_text()) == {"precision": precision}


def test_without_instructions_for_bf16_it_is_not_tried(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cpu, "get_capabilities", dict)
    monkeypatch.setattr(faster_precision, "trial_step", lambda *of: pytest.fail("it was tried"))
    job, said = Job("x", tmp_path), []
    job.say = said.append
    train(job, precision_by="speed")
    assert "precision fp32: this processor has no instructions for bf16" in said

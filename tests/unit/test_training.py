"""The training loop: its order of rows, its averages, its schedule, its checkpoints, and what stops it."""

import errno
import signal
import threading
import time
from pathlib import Path

import pytest
import safetensors.torch
import torch
from torch import nn

from tessera import seeding
from tessera.artifacts import folder as artifact
from tessera.artifacts.folder import ArtifactError
from tessera.bases.optimization import Training, learning_rate_factor, optimizers_for, update_average
from tessera.contracts import ImageBatch
from tessera.nn import processes
from tessera.nn.muon import Muon, orthogonalized
from tessera.running.job import Job, Stopped
from tessera.running.progress import History
from tessera.training import speed
from tessera.training.loop import Diverged, fit
from tessera.training.reading import rows_of_step
from tessera.training.state import State
from tessera.training.terms import Terms


class Toy(nn.Module):
    """A model with dropout, so that a resumed training must restore the state of chance as well."""

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Dropout(0.3), nn.Linear(8, 1))
        self.register_buffer("seen", torch.zeros(()))

    def hidden_matrices(self):
        return [self.layers[0].weight]


class Objective(nn.Module):
    """Two phases with an optimizer each, as a GAN has."""

    phases = ("first", "second")

    def __init__(self, settings: Training, breaks_at: int | None = None):
        super().__init__()
        torch.manual_seed(0)
        self.model, self.extra = Toy(), nn.Linear(6, 1)
        self.settings, self.breaks_at = settings, breaks_at

    def forward(self, batch, phase, step):
        x = batch.images.flatten(1)
        net = self.model.layers if phase == "first" else self.extra
        if phase == "first" and self.training:
            self.model.seen += 1
        loss = (net(x).squeeze(1) - batch.labels).square().mean()
        if step == self.breaks_at and phase == "second":
            loss = loss * torch.nan
        return {"loss": loss, "size": x.abs().mean()}

    def optimizers(self):
        return {"first": optimizers_for(self.model, self.settings), "second": optimizers_for(self.extra, self.settings)}


class Data:
    def __init__(self, on_step=None):
        generator = torch.Generator().manual_seed(3)
        self.x, self.y = torch.randn(20, 1, 2, 3, generator=generator), torch.randn(20, generator=generator)
        self.on_step, self.calls = on_step, 0

    def __len__(self):
        return 20

    def stored(self, rows, generator):
        return ImageBatch(self.x[rows] + 0.01 * torch.randn(len(rows), 1, 2, 3, generator=generator), self.y[rows])

    def batch_of(self, stored):
        self.calls += 1
        if self.on_step:
            self.on_step(self.calls)
        return stored


def settings(**changes) -> Training:
    return Training(**{"num_steps": 12, "batch_size": 8, "learning_rate": 0.01, "ema_decay": 0.9, **changes})


def run(job, data=None, breaks_at=None, **changes):
    job.resumable({"of": "inputs"})
    return fit(Objective(settings(**changes), breaks_at), data or Data(), settings(**changes), seed=5, job=job)


def test_rows_of_an_epoch_are_each_row_once_whatever_the_batch_size():
    for batch_size in (1, 3, 7, 20, 33):
        rows = torch.cat([rows_of_step(step, batch_size, 20, seed=1) for step in range(40)])
        for epoch in range(len(rows) // 20):
            assert sorted(rows[20 * epoch : 20 * (epoch + 1)].tolist()) == list(range(20))
    assert not torch.equal(rows_of_step(0, 20, 20, seed=1), rows_of_step(1, 20, 20, seed=1))
    assert not torch.equal(rows_of_step(0, 20, 20, seed=1), rows_of_step(0, 20, 20, seed=2))


def test_the_order_of_an_epoch_is_drawn_once_and_is_that_of_its_generator(monkeypatch):
    order = torch.randperm(50, generator=seeding.generator(9, "epoch", 1))
    drawn = []
    monkeypatch.setattr(
        torch, "randperm", lambda *given, draw=torch.randperm, **how: drawn.append(given) or draw(*given, **how)
    )
    rows = torch.cat([rows_of_step(step, 8, 50, seed=9) for step in range(13)])  # 104: two epochs, and some of a third
    assert torch.equal(rows[50:100], order)
    assert drawn == [(50,)] * 3


def test_the_schedule_warms_up_linearly_and_ends_at_its_floor():
    config = settings(num_steps=1000, warmup_fraction=0.1, final_learning_rate_fraction=0.05)
    assert learning_rate_factor(0, config) == pytest.approx(1 / 101)
    assert learning_rate_factor(50, config) == pytest.approx(51 / 101)
    assert learning_rate_factor(100, config) == 1
    assert learning_rate_factor(550, config) == pytest.approx((1 + 0.05) / 2)
    assert learning_rate_factor(999, config) == pytest.approx(0.05, abs=1e-4)


def test_the_weight_average_is_computed_by_hand():
    average, model = nn.Linear(1, 1, bias=False), nn.Linear(1, 1, bias=False)
    nn.init.zeros_(average.weight)
    expected = 0.0
    for step in range(30):
        nn.init.constant_(model.weight, float(step))
        decay = min(0.7, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * step
        update_average(average, model, 0.7, step)
    assert average.weight.item() == pytest.approx(expected, rel=1e-5)


def test_weight_decay_spares_vectors_and_embeddings():
    net = nn.Sequential(nn.Embedding(4, 3), nn.Linear(3, 3), nn.LayerNorm(3))
    groups = optimizers_for(net, settings(weight_decay=0.3))[0].param_groups
    decayed = {id(p) for group in groups if group["weight_decay"] for p in group["params"]}
    assert decayed == {id(net[1].weight)}


@pytest.mark.parametrize("shape", [(7, 4), (4, 7), (5, 5), (1, 6)])
def test_orthogonalising_keeps_the_singular_vectors_and_drives_the_singular_values_to_one(shape):
    matrix = torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    left, values, right = torch.linalg.svd(matrix, full_matrices=False)
    expected = values / values.norm()
    for _ in range(5):
        expected = 3.4445 * expected - 4.775 * expected**3 + 2.0315 * expected**5
    torch.testing.assert_close(orthogonalized(matrix, torch.float64), left @ torch.diag(expected) @ right)
    assert expected[values > 0.2 * values.max()].sub(1).abs().max() < 0.35


@pytest.mark.parametrize("shape", [(8, 3), (3, 8), (6, 5)])
def test_orthogonalising_a_stack_is_orthogonalising_each_in_both_precisions(shape):
    stack = torch.randn(4, *shape, generator=torch.Generator().manual_seed(1))
    stack[1, :, 0] = stack[1, :, 1]  # one of them of lower rank
    for number, matrix in enumerate(stack):
        exact = orthogonalized(matrix.double(), torch.float64).float()
        torch.testing.assert_close(orthogonalized(stack, torch.float32)[number], exact, atol=1e-5, rtol=0)
        torch.testing.assert_close(orthogonalized(stack, torch.bfloat16)[number].float(), exact, atol=0.2, rtol=0)


def test_muon_moves_as_torchs_muon_up_to_the_rounding_of_bfloat16():
    start = torch.randn(12, 6, generator=torch.Generator().manual_seed(2))
    ours, theirs = nn.Parameter(start.clone()), nn.Parameter(start.clone())
    optimizers = (
        Muon([ours], lr=0.1, weight_decay=0.3),
        torch.optim.Muon([theirs], lr=0.1, weight_decay=0.3, momentum=0.95, adjust_lr_fn="match_rms_adamw"),
    )
    for step in range(4):
        gradient = torch.randn(12, 6, generator=torch.Generator().manual_seed(step))
        ours.grad, theirs.grad = gradient.clone(), gradient.clone()
        for optimizer in optimizers:
            optimizer.step()
    moved = (theirs - start).norm()
    assert moved > 0.5 and (ours - theirs).norm() < 0.02 * moved


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_muon_moves_a_kernel_as_the_matrix_of_its_rows(layout):
    start = torch.randn(5, 3, 2, 2, generator=torch.Generator().manual_seed(2))
    kernel, matrix = nn.Parameter(start.clone().to(memory_format=layout)), nn.Parameter(start.flatten(1).clone())
    optimizers = [Muon([parameter], lr=0.1, weight_decay=0.3) for parameter in (kernel, matrix)]
    for step in range(3):
        gradient = torch.randn(5, 3, 2, 2, generator=torch.Generator().manual_seed(step))
        kernel.grad, matrix.grad = gradient.to(memory_format=layout), gradient.flatten(1)
        for optimizer in optimizers:
            optimizer.step()
    assert (kernel - start).norm() > 0.1
    torch.testing.assert_close(kernel.flatten(1), matrix)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_training_stopped_at_any_step_and_resumed_is_bit_identical(tmp_path, optimizer):
    def train(job, data):
        job.resumable({"of": "inputs"})
        return fit(Objective(settings(optimizer=optimizer)), data, settings(optimizer=optimizer), seed=5, job=job)

    whole_job = Job("whole", tmp_path / "whole")
    whole = train(whole_job, Data())
    for stop_at in (1, 5, 11):
        job = Job("parts", tmp_path / f"parts{stop_at}")
        stopping = Data(
            on_step=lambda call, job=job, at=stop_at: job.request_stop(signal.SIGTERM) if call == at else None
        )
        with pytest.raises(Stopped) as stopped:
            train(job, stopping)
        assert stopped.value.code == 143
        said = []
        again = Job("parts", tmp_path / f"parts{stop_at}")
        again.say = said.append
        resumed = train(again, Data())
        assert f"resumed step {stop_at}" in said  # it did not simply start anew
        for name, value in whole.state_dict().items():
            assert torch.equal(value, resumed.state_dict()[name]), name
        assert (again.state / "history.csv").read_bytes() == (whole_job.state / "history.csv").read_bytes()


def test_a_signal_waits_for_the_end_of_a_step_only_inside_the_loop(tmp_path):
    job = Job("x", tmp_path)
    before = signal.getsignal(signal.SIGTERM)
    with job.stopping_between_steps():
        signal.raise_signal(signal.SIGTERM)
        assert job.stop_requested()
        with pytest.raises(Stopped):  # asked twice
            signal.raise_signal(signal.SIGTERM)
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_damaged_newest_checkpoint_is_passed_over_for_the_one_before(tmp_path, capsys):
    job = Job("x", tmp_path)
    job.checkpoint_seconds = 0.0
    stopping = Data(on_step=lambda call: job.request_stop(signal.SIGTERM) if call == 6 else None)
    with pytest.raises(Stopped):
        run(job, stopping)
    newest = sorted(job.state.glob("step-*"))[-1]
    assert newest.name == "step-000000006"
    weights = newest / "objective.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    again = Job("x", tmp_path)
    resumed, whole = run(again), run(Job("y", tmp_path / "y"))
    assert "objective.safetensors is damaged" in capsys.readouterr().out
    assert all(
        torch.equal(a, b) for a, b in zip(resumed.state_dict().values(), whole.state_dict().values(), strict=True)
    )


def test_other_inputs_never_resume_from_a_checkpoint(tmp_path):
    job = Job("x", tmp_path)
    assert job.resumable({"a": {"b": 1}}) != job.resumable({"a": {"b": 2}})
    assert job.resumable({"a": {"b": 1}}) == job.resumable({"a": {"b": 1}})


def test_a_loss_that_is_not_finite_stops_before_the_step_naming_step_and_term(job):
    with pytest.raises(Diverged, match=r"second term 'loss' is nan at step 4"):
        run(job, breaks_at=3)


def test_a_gradient_that_is_not_finite_stops_before_the_step(job):
    class Broken(Objective):
        def forward(self, batch, phase, step):
            terms = super().forward(batch, phase, step)
            if step == 2 and phase == "first":
                zero = (self.model.layers[0].weight.sum() * 0).sqrt()  # value 0, gradient infinite
                terms["loss"] = terms["loss"] + zero
            return terms

    objective = Broken(settings())
    job.resumable()
    before = []
    data = Data(on_step=lambda call: before.append(objective.model.layers[0].weight.detach().clone()))
    with pytest.raises(Diverged, match="gradient of phase 'first' is nan at step 3"):
        fit(objective, data, settings(), seed=5, job=job)
    assert torch.equal(objective.model.layers[0].weight, before[-1])  # that step was not taken


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_step_that_is_masked_on_the_device_changes_nothing_and_any_other_is_as_without_a_mask(optimizer):
    config, states = settings(optimizer=optimizer), []
    for masks in ([None] * 3, [0.0, 0.0, 0.0], [0.0, 1.0, 1.0, 0.0, 1.0, 0.0]):
        torch.manual_seed(0)
        model = Toy()
        optimizers = optimizers_for(model, config)
        for mask in masks:
            gradient = torch.nan if mask else 0.1
            for weight in model.parameters():
                weight.grad = torch.full_like(weight, gradient) * torch.arange(weight.numel()).view_as(weight)
            for one in optimizers:
                one.found_inf = None if mask is None else torch.tensor(mask)
                one.step()
        states.append([*model.parameters(), *(t for o in optimizers for v in o.state.values() for t in v.values())])
    for masked in states[1:]:
        assert all(torch.equal(a, b) for a, b in zip(states[0], masked, strict=True))


def test_what_was_not_finite_is_told_with_its_step_however_late_it_is_asked_for():
    terms = Terms(("a", "b"), torch.device("cpu"), torch.tensor)
    for step in range(6):
        terms.begin(step)
        terms.note("a", {"loss": torch.tensor(1.0)}, torch.tensor(1.0))
        terms.note("b", {"loss": torch.tensor(torch.inf if step in (2, 4) else 2.0)}, torch.tensor(1.0))
    with pytest.raises(Diverged, match=r"b term 'loss' is inf at step 3: not applied.*; rows \[2\]"):
        terms.read()


def test_accumulating_gradients_equals_the_whole_batch(tmp_path):
    class Still(Objective):
        def __init__(self, config):
            super().__init__(config)
            self.model.layers[2].p = 0.0

    class Quiet(Data):
        def stored(self, rows, generator):
            return ImageBatch(self.x[rows], self.y[rows])

    trained = []
    for parts in (1, 4):
        config = settings(gradient_accumulation=parts)
        job = Job("x", tmp_path / str(parts))
        job.resumable()
        trained.append(fit(Still(config), Quiet(), config, seed=5, job=job))
    for a, b in zip(trained[0].parameters(), trained[1].parameters(), strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-5)


def test_a_batch_that_cannot_be_split_is_refused_with_a_sentence(job):
    with pytest.raises(ValueError, match="batch_size 8 is not divisible by gradient_accumulation 3"):
        run(job, gradient_accumulation=3)


def test_only_two_checkpoints_are_kept_and_both_are_whole(tmp_path):
    job = Job("x", tmp_path)
    job.checkpoint_seconds = 0.0
    run(job)
    folders = sorted(job.state.glob("step-*"))
    assert [folder.name for folder in folders] == ["step-000000011", "step-000000012"]
    for folder in folders:
        artifact.check(folder)


def test_a_checkpoint_is_of_its_step_though_the_training_goes_on_while_it_is_written(tmp_path, monkeypatch):
    model, average = nn.Linear(3, 2), nn.Linear(3, 2)
    optimizer, alone = torch.optim.AdamW(model.parameters(), lr=0.1), processes.Processes(1)
    state, write, may_write = (
        State(tmp_path, model, average, {"a": [optimizer]}, alone),
        State._write,
        threading.Event(),
    )
    monkeypatch.setattr(State, "_write", lambda self, *of: may_write.wait(10) and write(self, *of))
    kept = []
    for step in (1, 2):
        for weight in model.parameters():
            weight.grad = torch.ones_like(weight)
        optimizer.step()
        kept.append([weight.detach().clone() for weight in model.parameters()])
        may_write.set()  # lets the one before be written, if it is still waiting
        state.wait()
        may_write.clear()
        state.save(step)
        optimizer.step()
    may_write.set()
    state.wait()
    for step, weights in zip((1, 2), kept, strict=True):
        found = safetensors.torch.load_file(artifact.check(tmp_path / f"step-{step:09d}") / "objective.safetensors")
        assert all(torch.equal(a, b) for a, b in zip(found.values(), [weights[1], weights[0]], strict=True))
    state.close()


def test_a_checkpoint_that_cannot_be_written_ends_the_training_with_its_sentence(job, monkeypatch):
    def full(path):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(safetensors.torch, "save_file", lambda tensors, path: full(path))
    job.checkpoint_seconds = 0.0
    with pytest.raises(ArtifactError, match="step-00000000. could not be written .No space left"):
        run(job)


def test_checkpoints_take_a_twentieth_of_the_time_unless_one_is_asked_for_at_every_step(tmp_path):
    model = nn.Linear(3, 2)
    for taken, last, is_due in ((0.5, 59, False), (0.5, 61, True), (12, 239, False), (12, 241, True)):
        state = State(tmp_path, model, model, {}, processes.Processes(1))
        state._seconds, state._saved = taken, time.monotonic() - last
        assert state.is_due(60.0) is is_due and state.is_due(0.0)


def test_what_a_step_computes_is_counted_once_and_what_it_takes_goes_to_the_tracker_alone(job, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TESSERA_PROFILE", "1")
    monkeypatch.setattr(speed, "is_counted", lambda reader: reader.steps.start == 0)  # as on a GPU
    logged = {}
    job.log = lambda step, values: logged.update({(step, name): value for name, value in values.items()})
    run(job, num_steps=20)
    found = {name.removeprefix("speed/"): value for (step, name), value in logged.items() if step == 20}
    # products of the first phase (6x8 and 8x1, forward, of weights, of the hidden layer) and the second (6x1, of weights)
    flops = 8 * 2 * (6 * 8 * 2 + 8 * 3) + 8 * 2 * 6 * 2
    assert found["tflops_per_second"] * 1e12 / found["images_per_second"] == pytest.approx(flops / 8)
    assert 0 <= found["waiting_for_data"] < 1 and job.figures["images_per_second"] > 0
    assert "speed" not in (job.state / "history.csv").read_text()
    assert list(Path("data/profiles").glob("*.json.gz"))


def test_history_has_a_row_per_interval_and_no_clock(job):
    run(job)
    lines = (job.state / "history.csv").read_text().splitlines()
    assert lines[0] == "step,loss,size,second_loss,learning_rate"
    assert [int(line.split(",")[0]) for line in lines[1:]] == list(range(1, 13))


def test_a_training_killed_before_its_first_checkpoint_leaves_no_rows_to_the_next(tmp_path):
    whole, killed = Job("x", tmp_path / "whole"), Job("x", tmp_path / "killed")
    run(whole)

    class Died(Exception):
        pass

    def die(call):
        if call == 7:
            raise Died

    with pytest.raises(Died):
        run(killed, Data(on_step=die))
    assert len((killed.state / "history.csv").read_text().splitlines()) > 5
    run(killed)
    assert (killed.state / "history.csv").read_bytes() == (whole.state / "history.csv").read_bytes()


def test_only_the_main_process_cuts_the_history(tmp_path):
    path = tmp_path / "history.csv"
    path.write_text("step,loss\n1,0.5\n2,0.4\n")
    for quiet, rows in ((True, 3), (False, 2)):
        History(path, "x", 5, lambda step, values: None, quiet).resume(1)
        assert len(path.read_text().splitlines()) == rows


@pytest.mark.parametrize("asked_elsewhere", [0.0, 1.0])
def test_many_processes_stop_together_when_any_is_asked_to(asked_elsewhere, monkeypatch):
    monkeypatch.setattr(processes.dist, "new_group", lambda backend: backend)
    monkeypatch.setattr(processes.dist, "get_rank", lambda: 0)
    monkeypatch.setattr(processes.dist, "all_reduce", lambda tensor, group: tensor.add_(asked_elsewhere))
    both = processes.Processes(2)
    assert both.any(lambda: False, lambda: True) == [bool(asked_elsewhere), True]


@pytest.mark.parametrize("capabilities", [{"avx2": True, "avx512_bf16": False}, {"avx2": True, "avx512_bf16": True}])
def test_bf16_on_a_processor_without_it_is_called_slow(tmp_path, monkeypatch, capabilities):
    monkeypatch.setattr("torch.cpu.get_capabilities", lambda: capabilities)
    job, said = Job("x", tmp_path), []
    job.say = said.append
    job.resumable({"of": "inputs"})
    fit(
        Objective(settings(precision="bf16", num_steps=1)),
        Data(),
        settings(precision="bf16", num_steps=1),
        seed=0,
        job=job,
    )
    assert any("no bf16 instructions" in line for line in said) == (not capabilities["avx512_bf16"])

"""What a tokenizer's training says of itself: planted faults are named, healthy trainings are not, counters are exact."""

import json
import signal
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from sklearn.datasets import load_digits

from tessera.artifacts import folder as artifact
from tessera.artifacts import images as image_artifact
from tessera.artifacts.images import to_uint8
from tessera.bases.diagnostics import Diagnostics, Monitor
from tessera.components import load, parse
from tessera.contracts import ImageBatch, ImageSpec
from tessera.params import Description
from tessera.quantizers import lfq, residual, vector
from tessera.running import process
from tessera.running.job import Job, Stopped
from tessera.training.loop import TrainingFailed, fit

SPEC = ImageSpec(name="x", channels=1, height=8, width=8, num_classes=1, class_names=("all",), licence="none")


def config(kind="vqvae", health=None, **changes):
    settings = {
        "kind": kind,
        "quantizer": {"kind": "vector", "codebook_size": 64, "code_dim": 4, "init": "uniform"},
        "patch_size": 2,
        "channels": 8,
        "num_blocks": 1,
        "health": {"window": 3, "start_step": 5, **(health or {})},
        "training": {"num_steps": 20, "batch_size": 16, "learning_rate": 0.002},
        **changes,
    }
    return parse(load("tokenizers", kind).Config, settings)


class Digits:
    """The handwritten digits of scikit-learn, in [-1, 1]."""

    def __init__(self, on_batch=None):
        self.images = torch.from_numpy(load_digits().images).float().unsqueeze(1) / 8 - 1
        self.on_batch, self.calls = on_batch, 0

    def __len__(self):
        return len(self.images)

    def uint8(self, rows):
        return to_uint8(self.images[rows])

    def stored(self, rows, generator):
        return ImageBatch(self.images[rows], torch.zeros(len(rows), dtype=torch.long))

    def batch_of(self, stored):
        self.calls += 1
        if self.on_batch:
            self.on_batch(self.calls)
        return stored


def built(settings, seed=0):
    module = load("tokenizers", settings.kind)
    torch.manual_seed(seed)
    return module.Objective(module.Model(settings, SPEC), settings)


def trained(objective, job, data=None):
    """What the training said."""
    said: list[str] = []
    job.say = said.append
    job.resumable()
    fit(objective, data or Digits(), objective.config.training, seed=0, job=job)
    return said


def diagnosed(watch, step):
    """As at a row of the history after every step."""
    watch.observe(step)
    return watch.diagnose()


def far_away(objective, distance=100.0):
    """All codes beyond the latents, on a line: the first is nearest to everything."""
    codebook = objective.model.quantizer.codebook
    codebook.data.copy_(distance + torch.arange(len(codebook)).unsqueeze(1).expand_as(codebook))
    return objective


COLLAPSES = {"kind": "vector", "codebook_size": 64, "code_dim": 4, "update": "gradient", "init": "uniform"}
COLLAPSES |= {"revive_below": 0.0}


def test_ages_and_usage_are_those_counted_from_a_list_of_batches():
    torch.manual_seed(0)
    watch = Monitor(Diagnostics(window=4), lfq.Config(code_dim=5))
    batches = [torch.randint(32, (2, 3, 2)) for _ in range(12)]
    for step, indices in enumerate(batches):
        for half in indices:  # two micro-batches
            watch.note_codes(half, step)
        metrics, _ = diagnosed(watch, step)
        seen = [set(batch.flatten().tolist()) for batch in batches[: step + 1]]
        ages = [next((age for age, codes in enumerate(reversed(seen)) if k in codes), step + 1) for k in range(32)]
        assert metrics["dead_code_age"] == max(ages)
        assert metrics["codebook_usage"] == len(set().union(*seen[-4:])) / 32
    watch.note_codes(torch.arange(32), 12)
    assert diagnosed(watch, 12).metrics == {"codebook_usage": 1.0, "dead_code_age": 0.0}


@pytest.mark.parametrize(
    "quantizer",
    [
        {"kind": "vector", "codebook_size": 64, "code_dim": 4, "init_step": 2},
        {"kind": "simvq", "codebook_size": 64, "code_dim": 4},
        {"kind": "fsq", "levels": [4, 4, 3]},
        {"kind": "lfq", "code_dim": 6},
        {"kind": "residual", "num_levels": 2, "quantizer": {"kind": "vector", "codebook_size": 32, "init_step": 2}},
    ],
    ids=lambda quantizer: quantizer["kind"],
)
def test_a_healthy_codebook_of_any_kind_is_plotted_and_gives_no_warning(quantizer, job):
    objective = built(config(quantizer=quantizer))
    assert trained(objective, job) == []
    assert job.figures["num_warnings"] == 0 and "codebook_collapsed" not in job.figures
    assert len(objective.watch.last_used) == objective.model.codebook_size
    header, *rows = (line.split(",") for line in (job.state / "history.csv").read_text().splitlines())
    last = dict(zip(header, rows[-1], strict=True))
    assert float(last["codebook_usage"]) > 0.05 and 0 <= float(last["dead_code_age"]) <= 20


def test_a_collapsed_codebook_is_warned_of_once_with_its_value_its_bound_and_a_remedy(job):
    said = trained(far_away(built(config(quantizer=COLLAPSES))), job)
    assert len(said) == 1
    assert "codebook_usage is 0.01562 at step 5 (health.min_codebook_usage 0.05): 1 of 64 codes" in said[0]
    assert "quantizer.revive_below" in said[0] and "lower quantizer.codebook_size" in said[0]
    assert job.figures["num_warnings"] == 1 and job.figures["codebook_collapsed"] == 5


def test_one_code_is_a_collapse_however_small_the_codebook():
    watch = Monitor(Diagnostics(window=2, start_step=0), vector.Config(codebook_size=4, init_step=0))
    for step in range(4):
        watch.note_codes(torch.tensor([step // 3 + 1]), step)
        found = [failure.name for failure in diagnosed(watch, step).failures]
        assert found == (["codebook_collapsed"] if step == 1 else []), step


def test_a_residual_quantizer_has_collapsed_when_each_level_has_one_code_left():
    inner = vector.Config(codebook_size=4, init_step=0)
    watch = Monitor(Diagnostics(window=2, start_step=0), residual.Config(quantizer=inner, num_levels=2))
    watch.note_codes(torch.tensor([1, 4]), 5)
    assert "2 of 8 codes" in diagnosed(watch, 5).failures[0].sentence
    watch.note_codes(torch.tensor([2]), 6)
    assert diagnosed(watch, 10).failures  # the window is empty
    for step in range(20, 30):
        watch.note_codes(torch.tensor([1, 2, 4]), step)
        assert diagnosed(watch, step).failures == []


def test_a_remedy_names_no_key_that_the_quantizer_has_not():
    watch = Monitor(Diagnostics(window=1, start_step=0), lfq.Config(code_dim=3))
    watch.note_codes(torch.tensor([0]), 0)
    sentence = diagnosed(watch, 0).failures[0].sentence
    assert "entropy_weight" in sentence and "revive_below" not in sentence and "codebook_size" not in sentence


def test_codes_that_have_not_started_from_data_yet_are_not_judged():
    watch = Monitor(Diagnostics(window=2, start_step=0), vector.Config(codebook_size=4, init_step=6))
    first = None
    for step in range(10):
        watch.note_codes(torch.tensor([0]), step)
        if diagnosed(watch, step).failures:
            first = step
    assert first == 7  # the eighth step: six without a codebook, and a window


def test_a_warning_comes_again_only_after_a_window_without_it():
    """Codes 1 and 2 leave the window in turn, so that usage crosses the bound every other step; then all are used."""
    settings = Diagnostics(window=4, start_step=9, min_codebook_usage=0.7)
    watch = Monitor(settings, vector.Config(codebook_size=4, init_step=0))
    used, ill, said = [], [], []
    for step in range(40):
        codes = {0} | ({1} if step % 5 == 0 else set()) | ({2} if step % 5 == 3 else set())
        used.append({0, 1, 2, 3} if 20 <= step < 25 else codes if step < 30 else {0})
        watch.note_codes(torch.tensor(sorted(used[-1])), step)
        said += [step for _ in diagnosed(watch, step).failures]
        ill += [step] if step >= 8 and len(set().union(*used[-4:])) < 3 else []
    assert ill[:6] == [9, 12, 14, 17, 19, 29] and said == [9, 29]


@pytest.mark.parametrize("bound", [0, 0.02])
def test_a_bound_of_zero_turns_the_gate_off(bound, job):
    said = trained(far_away(built(config(quantizer=COLLAPSES, health={"min_codebook_usage": bound}))), job)
    assert len(said) == (1 if bound else 0)


def silenced(objective):
    """A discriminator whose logits are 0 everywhere."""
    torch.nn.init.zeros_(objective.discriminator.layers[-1].weight)
    torch.nn.init.zeros_(objective.discriminator.layers[-1].bias)
    return objective


WATCHED = {"max_dead_discriminator_steps": 10, "min_codebook_usage": 0, "window": 100}


def test_a_discriminator_that_does_not_learn_is_silent(job):
    settings = config("vqgan", WATCHED, discriminator_channels=8, discriminator_learning_rate_factor=1e-9)
    said = trained(silenced(built(settings)), job)
    assert len(said) == 1 and "within 0.02 of 0 for 10 steps (health.max_dead_discriminator_steps 10, " in said[0]
    assert "raise discriminator_learning_rate_factor" in said[0]
    assert job.figures["discriminator_silent"] == 10 and "discriminator_won" not in job.figures


def test_in_a_training_too_short_for_the_bound_half_of_its_steps_are_enough_to_call_it_dead(job):
    settings = config(
        "vqgan", {"min_codebook_usage": 0}, discriminator_channels=8, discriminator_learning_rate_factor=1e-9
    )
    assert settings.health.max_dead_discriminator_steps > settings.training.num_steps
    said = trained(silenced(built(settings)), job)
    assert len(said) == 1 and f"for {settings.training.num_steps // 2} steps" in said[0]


def test_a_discriminator_that_learns_from_a_frozen_autoencoder_has_won(job):
    settings = config(
        "vqgan",
        WATCHED,
        discriminator_channels=16,
        discriminator_learning_rate_factor=1e6,
        lecam_weight=0.0,
        training={"num_steps": 60, "batch_size": 16, "learning_rate": 1e-8},
    )
    said = trained(built(settings), job)
    assert len(said) == 1 and "was 0.99 or more for 10 steps" in said[0] and "lower discriminator_learning" in said[0]
    assert 10 < job.figures["discriminator_won"] < 60 and "discriminator_silent" not in job.figures


def test_a_discriminator_is_judged_by_its_own_steps_and_one_good_step_clears_it():
    watch = Monitor(
        Diagnostics(max_dead_discriminator_steps=3, start_step=0), load("quantizers", "identity").Config(), 1000
    )
    accuracies = [None, None, 1.0, 1.0, 0.7, 0.995, 0.995, 0.995]
    found = []
    for step, accuracy in enumerate(accuracies):
        if accuracy is not None:
            away = 0.008 * (-1) ** step
            for part in (accuracy - away, accuracy + away):  # two micro-batches: their mean counts
                watch.note_discriminator(torch.tensor(2.0), torch.tensor(part))
        found += [(step, failure.name) for failure in diagnosed(watch, step).failures]
    assert found == [(7, "discriminator_won")]


def test_a_gap_between_the_logits_breaks_the_silence_and_a_right_sign_alone_does_not():
    for gap, accuracy, is_silent in ((0.0, 0.5, True), (0.0, 0.6, True), (0.3, 0.5, False), (-0.3, 0.5, False)):
        watch = Monitor(
            Diagnostics(max_dead_discriminator_steps=2, start_step=0), load("quantizers", "identity").Config(), 1000
        )
        for step in range(2):
            watch.note_discriminator(torch.tensor(gap), torch.tensor(accuracy))
            found = diagnosed(watch, step).failures
        assert bool(found) == is_silent, (gap, accuracy)


def test_steps_that_are_diagnosed_together_give_what_each_gives_alone():
    """Rows of a history are hundreds of steps apart in a long training: nothing of the steps between is lost."""
    torch.manual_seed(0)
    settings = Diagnostics(window=3, start_step=2, min_codebook_usage=0.6, max_dead_discriminator_steps=3)
    each, together = (Monitor(settings, lfq.Config(code_dim=2), 1000) for _ in range(2))
    failures, later, metrics = [], [], []
    for step in range(60):
        codes, accuracy = torch.randint(4, (1 + step % 2,)), torch.rand(()).round()
        for watch in (each, together):
            watch.note_codes(codes, step)
            if step > 20:  # the discriminator starts late
                watch.note_discriminator(torch.tensor(1.0), accuracy)
        found = diagnosed(each, step)
        failures, metrics = failures + found.failures, [*metrics, found.metrics]
        together.observe(step)
        if step % 7 == 6 or step == 59:
            found = together.diagnose()
            later += found.failures
            assert found.metrics == metrics[-1]
    assert {failure.name for failure in failures} == {"codebook_collapsed", "discriminator_won"}
    assert later == failures and together.diagnose() == ({}, [])


@pytest.mark.parametrize("kind", ["vqvae", "vqgan", "vae"])
def test_training_on_digits_is_healthy_under_strict_bounds(kind, job):
    quantizer = {"kind": "vector", "codebook_size": 64, "code_dim": 8, "init_step": 10}
    if kind == "vae":
        quantizer = {"kind": "identity", "code_dim": 4}
    adversarial = {} if kind == "vqvae" else {"adversarial_weight": 0.05, "discriminator_channels": 16}
    settings = config(
        kind,
        {"min_codebook_usage": 0.3, "window": 10, "max_dead_discriminator_steps": 30, "start_step": 20},
        quantizer=quantizer,
        channels=16,
        training={"num_steps": 80, "batch_size": 32, "learning_rate": 0.004},
        **adversarial,
    )
    assert trained(built(settings), job) == []
    assert job.figures["num_warnings"] == 0


def test_a_resumed_training_has_the_counters_of_an_uninterrupted_one(tmp_path):
    settings = config("vqgan", {"max_dead_discriminator_steps": 3}, quantizer=COLLAPSES, discriminator_channels=8)
    whole = built(settings)
    whole_job = Job("whole", tmp_path / "whole")
    trained(whole, whole_job)
    job = Job("parts", tmp_path / "parts")
    with pytest.raises(Stopped):
        trained(built(settings), job, Digits(lambda call: call == 9 and job.request_stop(signal.SIGTERM)))
    resumed, again = built(settings), Job("parts", tmp_path / "parts")
    assert "resumed step 9" in trained(resumed, again)
    for name, value in whole.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name]), name
    assert whole.watch.last_used.max() == 19 and whole.watch.last_used.min() < 9
    assert (again.state / "history.csv").read_bytes() == (whole_job.state / "history.csv").read_bytes()


def test_the_model_that_is_kept_has_no_counters():
    objective = built(config("vqgan", discriminator_channels=8))
    assert {"watch.last_used", "watch.dead_steps"} <= set(objective.state_dict())
    assert not [name for name in objective.model.state_dict() if "last_used" in name or "dead_steps" in name]


def test_stop_ends_the_stage_with_the_sentence_and_looser_bounds_go_on_from_its_checkpoint(
    tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(image_artifact, "read", lambda folder: (SPEC, {"train": Digits(), "test": Digits()}))
    monkeypatch.setattr(artifact, "fingerprint", lambda folder: "0" * 64)
    monkeypatch.setenv("TESSERA_CHECKPOINT_SECONDS", "0")
    monkeypatch.chdir(tmp_path)

    def stage(**health):
        quantizer = {**COLLAPSES, "commitment_weight": 0.0}
        settings = config(quantizer=quantizer, health={"min_codebook_usage": 0.9, "start_step": 8, **health})
        params = SimpleNamespace(
            seed=0, features={}, tokenizers={"one": settings}, systems={}, dataset=SimpleNamespace(name="x")
        )
        params.describe = lambda name: Description({}, {}, {})
        monkeypatch.setattr(process.all_params, "read", lambda path: params)
        process.main(["train_tokenizer", "one", "--images", "i", "--out", "out", "--history", "curve.csv"])

    with pytest.raises(SystemExit) as ended:
        stage(action="stop")
    assert ended.value.code == 2 and not Path("out").exists()
    assert "train_tokenizer@one failed: codebook_usage is" in capsys.readouterr().err
    assert [path.name for path in Path(".state").rglob("step-*")]
    stage(action="warn")
    said = capsys.readouterr().out
    assert "resumed step 7" in said and "warning: codebook_usage is" in said
    meta = json.loads((Path("out") / "config.json").read_text())
    assert meta["config"]["health"]["action"] == "warn"


def test_unhealthy_is_a_mistake_of_the_user_and_not_a_bug(job):
    objective = far_away(built(config(quantizer=COLLAPSES, health={"action": "stop"})))
    with pytest.raises(TrainingFailed, match=r"^codebook_usage is 0\.01562 at step 5"):
        trained(objective, job)
    assert issubclass(TrainingFailed, ValueError)


def _half_of_the_batch(rank: int, store: str, batches: torch.Tensor, out: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    watch = Monitor(Diagnostics(window=2, start_step=0, max_dead_discriminator_steps=2), lfq.Config(code_dim=4), 1000)
    said = []
    for step, indices in enumerate(batches):
        watch.note_codes(indices.chunk(2)[rank], step)
        # each process alone would say another thing: 1.0 and 0.984; their mean is 0.992
        watch.note_discriminator(torch.tensor(1.0 + rank), torch.tensor(1.0 - 0.016 * rank))
        said.append(diagnosed(watch, step))
    Path(f"{out}.{rank}").write_text(json.dumps([said, watch.last_used.tolist(), watch.dead_steps.tolist()]))
    dist.destroy_process_group()


def test_two_processes_say_the_same_of_the_whole_batch(tmp_path):
    batches = torch.randint(16, (5, 6), generator=torch.Generator().manual_seed(0))
    batches[:, 3:] = batches[:, :3].flip(0) // 2  # the halves differ
    torch.multiprocessing.spawn(_half_of_the_batch, (str(tmp_path / "store"), batches, str(tmp_path / "out")), nprocs=2)
    whole = Monitor(Diagnostics(window=2, start_step=0, max_dead_discriminator_steps=2), lfq.Config(code_dim=4), 1000)
    expected = []
    for step, indices in enumerate(batches):
        whole.note_codes(indices, step)
        whole.note_discriminator(torch.tensor(1.5), torch.tensor(0.992))
        expected.append(diagnosed(whole, step))
    assert any(failures for _, failures in expected)
    wanted = json.loads(json.dumps([expected, whole.last_used.tolist(), whole.dead_steps.tolist()]))
    for rank in range(2):
        assert json.loads((tmp_path / f"out.{rank}").read_text()) == wanted

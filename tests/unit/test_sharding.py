"""A prior whose weights are divided among processes is the prior of processes that have all of them, in less memory each.

Two processes train once for all tests of this file: each prior with whole weights and with shards.
"""

import os
import shutil
import signal
import time
from pathlib import Path
from typing import NamedTuple

import pytest
import safetensors.torch
import torch
from torch.distributed.tensor import DTensor

from tessera.bases.optimization import PriorTraining
from tessera.components import InvalidParams, load, parse
from tessera.contracts import TokenBatch
from tessera.running.job import Job, Stopped
from tessera.tokenizers import vqgan
from tessera.training import loop
from tessera.training.state import State
from tessera.training.terms import Diverged

STEPS, MICRO_BATCHES, LEARNING_RATE = 6, 2, 0.01
PATIENCE = 240  # seconds, on a busy machine
# The first draws nothing at random, so that one process does what two do; the second draws in each step, in each process
PRIORS = {
    "autoregressive": {"width": 32, "depth": 2, "heads": 2, "dropout": 0.0, "label_dropout": 0.0},
    "flow_matching": {"denoiser": {"kind": "unet", "channels": 8, "num_blocks": 1}},
}


class Tokens:
    """Of 24 images, and what happens at one of the micro-batches."""

    def __init__(self, kind, spec, at=0, happens=None):
        generator = torch.Generator().manual_seed(3)
        self.values = torch.randn(24, *spec.latent_shape, generator=generator)
        if kind == "autoregressive":
            self.values = torch.randint(spec.codebook_size, (24, *spec.index_grid), generator=generator)
        self.labels = torch.arange(24) % spec.num_classes
        self.calls, self.at, self.happens = 0, at, happens

    def __len__(self):
        return 24

    def stored(self, rows, generator):
        return TokenBatch(self.values[rows], self.labels[rows])

    def batch_of(self, stored):
        self.calls += 1
        if self.calls == self.at:
            self.happens()
        return stored


class Pictures:
    """A preview that is due after every step, where it is asked."""

    def __init__(self):
        self.weights = []

    def is_due(self):
        return True

    def show(self, model):
        self.weights.append([each.clone() for each in model.state_dict().values()])


class Trained(NamedTuple):
    model: torch.nn.Module | None  # of the first process
    state: State
    job: Job
    said: list[str]
    pictures: Pictures

    def tensors(self) -> dict[str, torch.Tensor]:
        return {name: each.contiguous() for name, each in self.model.state_dict().items()}

    def numbers_kept(self) -> int:
        """By this process: of weights, of their average, and of what the optimizer remembers."""
        (optimizer,) = self.state.optimizers["prior"]
        moments = [each for of_weight in optimizer.state.values() for each in of_weight.values()]
        kept = [*self.state.objective.parameters(), *self.state.average.parameters(), *moments]
        return sum((each.to_local() if isinstance(each, DTensor) else each).numel() for each in kept)


def train(place, kind, spec, sharding, stop_at=0, breaks_in=None):
    """stop_at: the step after which this process is asked to stop; breaks_in: a process with a term that is nan at step 3."""
    training = {
        "num_steps": STEPS,
        "batch_size": 8,
        "gradient_accumulation": MICRO_BATCHES,
        "learning_rate": LEARNING_RATE,
    }
    training |= {"gradient_clip": 0.3, "ema_decay": 0.9, "sharding": sharding}
    config = parse(load("priors", kind).Config, {"kind": kind, **PRIORS[kind], "training": training})

    class Objective(load("priors", kind).Objective):
        def forward(self, batch, phase, step):
            is_broken = step == 2 and breaks_in == int(os.environ.get("RANK", "0"))
            return super().forward(batch, phase, step) | {"extra": torch.tensor(torch.nan if is_broken else 0.0)}

    torch.manual_seed(0)
    objective = Objective(load("priors", kind).Model(config, spec), config)
    job, said, states = Job("x", place), [], []
    job.say = said.append
    job.resumable()
    data, pictures = Tokens(kind, spec, stop_at * MICRO_BATCHES, lambda: job.request_stop(signal.SIGTERM)), Pictures()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "State", lambda *of: states.append(State(*of)) or states[0])
        try:
            model = loop.fit(objective, data, config.training, seed=0, job=job, preview=pictures)
        except (Stopped, Diverged) as ended:
            said.append(str(ended))
            model = None
    return Trained(model, states[0], job, said, pictures)


def process(rank, port, place, spec):
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    for kind in PRIORS:
        for sharding in ("none", "full"):
            done = train(place / f"{kind}-{sharding}-{rank}", kind, spec, sharding)
            (place / f"{kind}-{sharding}-{rank}.numbers").write_text(str(done.numbers_kept()))
            if rank == 0:
                safetensors.torch.save_file(done.tensors(), place / f"{kind}-{sharding}.safetensors")
                shutil.copy(done.job.state / "history.csv", place / f"{kind}-{sharding}.csv")
                last = zip(done.pictures.weights[-1], done.model.state_dict().values(), strict=True)
                is_last = all(torch.equal(shown, kept) for shown, kept in last)
                (place / f"{kind}-{sharding}.pictures").write_text(f"{len(done.pictures.weights)} {is_last}")
    parts = place / f"parts-{rank}"
    train(parts, "autoregressive", spec, "full", stop_at=4 if rank == 1 else 0)
    if rank == 0:
        shutil.copytree(parts, place / "parts-alone")
    resumed = train(parts, "autoregressive", spec, "full")
    if rank == 0:
        (place / "resumed.said").write_text("\n".join(resumed.said))
        safetensors.torch.save_file(resumed.tensors(), place / "resumed.safetensors")
        shutil.copy(resumed.job.state / "history.csv", place / "resumed.csv")
    for sharding in ("none", "full"):
        broken = train(place / f"broken-{sharding}-{rank}", "autoregressive", spec, sharding, breaks_in=1)
        (optimizer,) = broken.state.optimizers["prior"]
        taken = {int(of_weight["step"]) for of_weight in optimizer.state.values()}
        (place / f"broken-{sharding}-{rank}.said").write_text(f"{broken.said[-1]} {taken}")


@pytest.fixture(scope="module")
def two(tmp_path_factory, token_spec, free_tcp_port_factory) -> Path:
    """The folder of what two processes wrote."""
    place = tmp_path_factory.mktemp("two")
    both = torch.multiprocessing.spawn(process, (free_tcp_port_factory(), place, token_spec), nprocs=2, join=False)
    end = time.monotonic() + PATIENCE
    while not both.join(timeout=1):
        if time.monotonic() > end:
            for each in both.processes:
                each.kill()
            pytest.fail(f"two processes wait for each other, or need more than {PATIENCE} s")
    return place


def check_near(one: Path, other: Path, at_most: float) -> None:
    """No weight differs by more than this share of the way that AdamW can go: the sums are those of another order."""
    one, other = safetensors.torch.load_file(one), safetensors.torch.load_file(other)
    assert one.keys() == other.keys()
    for name, each in one.items():
        assert (each - other[name]).abs().max() <= at_most * STEPS * LEARNING_RATE, name


@pytest.mark.parametrize(("kind", "at_most"), [("autoregressive", 1e-4), ("flow_matching", 1e-2)])
def test_weights_are_those_of_processes_that_have_all_of_them(two, kind, at_most):
    check_near(two / f"{kind}-full.safetensors", two / f"{kind}-none.safetensors", at_most)


@pytest.mark.parametrize("kind", PRIORS)
def test_each_of_two_processes_keeps_half_of_weights_average_and_moments(two, kind):
    full, none = (
        [int((two / f"{kind}-{way}-{rank}.numbers").read_text()) for rank in (0, 1)] for way in ("full", "none")
    )
    assert none[0] == none[1] and max(full) < 0.51 * none[0] and sum(full) >= none[0]


@pytest.mark.parametrize("kind", PRIORS)
def test_a_picture_is_of_the_whole_average_of_its_step(two, kind):
    assert [(two / f"{kind}-{way}.pictures").read_text() for way in ("none", "full")] == [f"{STEPS} True"] * 2


def test_a_training_that_one_of_two_processes_stops_goes_on_to_the_same_bits(two):
    assert "resumed step 4" in (two / "resumed.said").read_text()
    assert (two / "resumed.safetensors").read_bytes() == (two / "autoregressive-full.safetensors").read_bytes()
    assert (two / "resumed.csv").read_bytes() == (two / "autoregressive-full.csv").read_bytes()


def test_one_process_goes_on_from_the_state_of_two(two, token_spec, tmp_path):
    alone = train(two / "parts-alone", "autoregressive", token_spec, "full")
    assert "resumed step 4" in alone.said
    safetensors.torch.save_file(alone.tensors(), tmp_path / "alone.safetensors")
    check_near(tmp_path / "alone.safetensors", two / "autoregressive-full.safetensors", 1e-4)


@pytest.mark.parametrize("sharding", ["none", "full"])
def test_what_is_not_finite_in_one_process_is_a_step_that_none_takes(two, sharding):
    known, other = ((two / f"broken-{sharding}-{rank}.said").read_text() for rank in (1, 0))
    assert "prior term 'extra' is nan at step 3: not applied" in known and known.endswith("{2}")
    assert "a term of another process is not finite at step 3: not applied" in other and other.endswith("{2}")


def test_what_cannot_be_sharded_is_refused_with_the_params(token_spec):
    training = {"num_steps": 1, "sharding": "full"}
    with pytest.raises(InvalidParams, match=r"optimizer muon needs whole matrices, and sharding full divides them"):
        parse(PriorTraining, training | {"optimizer": "muon"})
    for config, given in ((vqgan.Config, {"kind": "vqgan"}), (load("priors", "gan").Config, {"kind": "gan"})):
        with pytest.raises(InvalidParams, match=r"(^|\n)training\.sharding: unknown key"):
            parse(config, given | {"training": training})


def test_params_that_do_not_ask_for_it_are_described_as_before_there_was_any():
    assert "sharding" not in PriorTraining(num_steps=1).model_dump(mode="json")
    assert PriorTraining(num_steps=1, sharding="full").model_dump(mode="json")["sharding"] == "full"

"""A step is one step however it is divided: among micro-batches, and among processes."""

import os
from pathlib import Path

import pytest
import safetensors.torch
import torch
from sklearn.datasets import load_digits

from tessera.components import load, parse
from tessera.contracts import ImageBatch, ImageSpec
from tessera.nn.draw import Draw
from tessera.running.job import Job
from tessera.training.loop import fit

SPEC = ImageSpec(name="x", channels=1, height=8, width=8, num_classes=1, class_names=("all",), licence="none")
QUANTIZERS = {
    "averages": {"kind": "vector", "codebook_size": 48, "code_dim": 4, "init": "uniform", "revive_below": 0.3},
    "gradient": {"kind": "vector", "codebook_size": 48, "code_dim": 4, "init": "uniform", "update": "gradient"},
    "repeats": {"kind": "vector", "codebook_size": 400, "code_dim": 4, "init": "uniform", "revive_below": 0.5},
    "residual": {
        "kind": "residual",
        "num_levels": 2,
        "quantizer": {"kind": "vector", "codebook_size": 16, "code_dim": 4, "init": "uniform", "revive_below": 0.3},
    },
}
LATENTS = {"transformed": {"equivariance": {"probability": 0.8, "smallest_scale": 0.5}}}
QUANTIZERS["transformed"] = QUANTIZERS["repeats"]  # all parts of a step have latents of one size
STATELESS = {
    "fsq": {"kind": "fsq", "levels": [4, 4, 3]},
    "lfq": {"kind": "lfq", "code_dim": 6},
    "simvq": {"kind": "simvq", "codebook_size": 48, "code_dim": 4},
}
COUNTED = ("code_counts", "codebook", "code_sums", "batches_seen", "average_logits", "last_used", "dead_steps")


class Digits:
    def __init__(self):
        self.images = torch.from_numpy(load_digits().images).float().unsqueeze(1) / 8 - 1

    def __len__(self):
        return len(self.images)

    def stored(self, rows, generator):
        return ImageBatch(self.images[rows], torch.zeros(len(rows), dtype=torch.long))

    def batch_of(self, stored):
        return stored


def trained(place: Path, quantizer: str, num_steps: int = 6, **changes):
    """The state of a VQGAN's objective after some steps, and the rows of its history."""
    training = {"num_steps": num_steps, "batch_size": 16, "learning_rate": 0.002, **changes}
    config = parse(
        load("tokenizers", "vqgan").Config,
        {
            "kind": "vqgan",
            "quantizer": (QUANTIZERS | STATELESS)[quantizer],
            "patch_size": 2,
            "channels": 8,
            "num_blocks": 1,
            "discriminator_channels": 8,
            "discriminator_layers": 1,
            "lecam_weight": 0.0001,
            "adversarial_balance": "fixed" if changes else "adaptive",
            "training": training,
            **({"latents": LATENTS[quantizer]} if quantizer in LATENTS else {}),
        },
    )
    module = load("tokenizers", "vqgan")
    torch.manual_seed(0)
    objective = module.Objective(module.Model(config, SPEC), config)
    job = Job("x", place)
    job.say = lambda line: None
    job.resumable()
    fit(objective, Digits(), config.training, seed=0, job=job)
    rows = (job.state / "history.csv").read_text().splitlines() if (job.state / "history.csv").exists() else []
    return objective.state_dict(), rows


def check_equal(one: tuple, other: tuple) -> None:
    (state, rows), (divided, divided_rows) = one, other
    checked = {name.split(".")[-1] for name in state} & set(COUNTED)
    assert {"average_logits", "last_used", "dead_steps"} <= checked
    for name, value in state.items():
        torch.testing.assert_close(
            divided[name], value, atol=2e-4, rtol=2e-3, msg=lambda text, name=name: f"{name}: {text}"
        )
    names = rows[0].split(",")
    assert divided_rows[0] == rows[0] and len(rows) == len(divided_rows)
    per_batch = {"codebook_perplexity"}  # a mean of those of its parts
    for row, divided_row in zip(rows[1:], divided_rows[1:], strict=True):
        for name, a, b in zip(names, row.split(","), divided_row.split(","), strict=True):
            assert name in per_batch or float(a) == pytest.approx(float(b), rel=2e-3, abs=2e-4), name


@pytest.mark.parametrize("quantizer", QUANTIZERS)
def test_a_step_in_four_micro_batches_is_the_step_in_one(tmp_path, quantizer):
    """Codebook, counters, LeCam's averages and losses: all move once, by the whole batch."""
    whole = trained(tmp_path / "1", quantizer, gradient_accumulation=1)
    check_equal(whole, trained(tmp_path / "4", quantizer, gradient_accumulation=4))


def _process(rank: int, port: int, place: str) -> None:
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    for quantizer in QUANTIZERS | STATELESS:  # with an adaptive weight
        state, _ = trained(Path(place) / str(rank) / quantizer, quantizer)
        if rank == 0:
            safetensors.torch.save_file(state, Path(place) / f"{quantizer}.safetensors")


def test_a_step_on_two_processes_is_the_step_on_one(tmp_path, free_tcp_port):
    torch.multiprocessing.spawn(_process, (free_tcp_port, str(tmp_path / "two")), nprocs=2)
    for quantizer in QUANTIZERS | STATELESS:
        state, rows = trained(tmp_path / "one" / quantizer, quantizer)
        (history,) = (tmp_path / "two/0" / quantizer).rglob("history.csv")
        divided = safetensors.torch.load_file(tmp_path / "two" / f"{quantizer}.safetensors")
        check_equal((state, rows), (divided, history.read_text().splitlines()))


def test_a_draw_from_parts_is_the_draw_from_all_and_repeats_part():
    flat = torch.randn(24, 3, generator=torch.Generator().manual_seed(1))
    for number in (10, 24, 60):
        drawn = []
        for parts in (1, 2, 4):
            torch.manual_seed(7)
            draw = Draw(number, flat[: 24 // parts], micro_batches=parts)
            for part in flat.chunk(parts):
                draw.see(part)
            drawn.append(draw.rows())
        torch.testing.assert_close(drawn[1], drawn[0])
        torch.testing.assert_close(drawn[2], drawn[0])
        assert len(drawn[0].unique(dim=0)) == number
        distance = torch.cdist(drawn[0], flat).min(dim=1).values
        assert distance.max() < 0.02 and (distance.max() > 0) == (number > 24)

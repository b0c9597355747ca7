"""A GAN that is told more than a label: the same of an image in every phase, and a known truth learnt."""

from typing import Any

import pytest
import torch
from test_gan import Rows, spec
from torch import Tensor

from tessera.components import parse
from tessera.conditions import embedding
from tessera.contracts import TokenBatch
from tessera.priors import gan
from tessera.running.job import Job
from tessera.training.loop import fit

SMALL = {"kind": "gan", "channels": 8, "noise_dim": 5, "smallest_side": 2}
CLASSES = {
    "kind": "caption",
    "width": 16,
    "max_bytes": 8,
    "of_classes": [[f"{label} {which}" for which in range(8)] for label in range(3)],
}


def objective(condition: dict[str, Any], shape: tuple[int, int, int] = (3, 4, 2), **changes: Any) -> gan.Objective:
    config = parse(gan.Config, {**SMALL, "training": {"num_steps": 9}, "condition": condition, **changes})
    torch.manual_seed(0)
    return gan.Objective(gan.Model(config, spec(shape)), config)


@pytest.mark.parametrize("condition", [CLASSES, {"kind": "embedding", "embedding_dim": 4}], ids=["classes", "rows"])
def test_both_networks_are_told_the_same_of_an_image_in_both_phases(condition: dict[str, Any]) -> None:
    """Of each micro-batch, in their order; and the fakes are those that were drawn for it, also where a caption is drawn."""
    parts = objective(condition).train()
    heard: list[tuple[str, Tensor, Tensor]] = []
    parts.model.generator.register_forward_hook(lambda _, given, made: heard.append(("generator", given[1], made)))
    parts.discriminator.register_forward_hook(lambda _, given, made: heard.append(("judge", given[1], given[0])))
    draws = torch.Generator().manual_seed(1)
    batches = []
    for number in range(2):
        labels = torch.arange(12) % 3
        rows = torch.cat([labels[:, None] + 1.0, torch.randn(12, 4, generator=draws)], dim=1)
        told = labels if condition is CLASSES else rows
        batches.append(TokenBatch(torch.full((12, 3, 4, 2), float(number)), told))
    for phase in parts.phases:
        for one in batches:
            parts(one, phase, 0)
    of_phases = [heard[:6], heard[6:]]  # generator, judge of fake and of real; judge of real and of fake
    drawn = [[each for each in of_phases[0] if each[0] == "generator"][number] for number in range(2)]
    assert len(heard) == 10
    for number in range(2):
        first, second = of_phases[0][3 * number : 3 * number + 3], of_phases[1][2 * number : 2 * number + 2]
        told = drawn[number][1]
        assert all(torch.equal(each[1], told) for each in (*first, *second))
        assert torch.equal(first[1][2], drawn[number][2]) and torch.equal(second[1][2], drawn[number][2])
        assert torch.equal(first[2][2], batches[number].tokens) and torch.equal(second[0][2], batches[number].tokens)
    if condition is CLASSES:
        texts = [bytes(row[1:].tolist()).rstrip(b"\0").decode() for each in drawn for row in each[1]]
        assert len(set(texts)) > 6 and all(text[0] == str(place % 3) for place, text in enumerate(texts))


def test_a_gan_draws_around_what_it_is_told_also_of_what_nobody_trained_on(job: Job) -> None:
    """Points around their vector, which is told; none of the vectors of a square is among the training."""
    generator = torch.Generator().manual_seed(0)
    vectors = 3 * torch.rand(8000, 2, generator=generator) - 1.5
    vectors = vectors[~((vectors > 0).all(dim=1) & (vectors < 0.5).all(dim=1))][:6000]
    labels = torch.zeros(len(vectors), dtype=torch.long)
    points = vectors + 0.1 * torch.randn(len(vectors), 2, generator=generator)
    condition = embedding.Config(embedding_dim=2, width=64)
    told = embedding.encoded(condition, list(vectors), labels)
    settings = {"channels": 64, "noise_dim": 4, "hidden_dim": 64, "r1_weight": 0.1, "r2_weight": 0.1}
    training = {"num_steps": 400, "batch_size": 128, "learning_rate": 2e-3, "ema_decay": 0.98}
    parts = objective(condition.model_dump(mode="json"), (2, 1, 1), **settings, training=training)
    job.resumable()
    model = fit(parts, Rows(points.view(-1, 2, 1, 1), told), parts.config.training, seed=0, job=job)
    anywhere, held_out = (
        3 * torch.rand(500, 2, generator=generator) - 1.5,
        0.5 * torch.rand(500, 2, generator=generator),
    )
    asked = torch.cat([anywhere, held_out])
    rows = embedding.encoded(condition, list(asked), torch.zeros(1000, dtype=torch.long))
    found = model.sample(rows, gan.Sampling(), torch.Generator().manual_seed(1)).view(-1, 2)
    errors = (found - asked).norm(dim=1)
    assert errors[:500].mean() < 0.35 and errors[500:].mean() < 0.35, errors.view(2, 500).mean(dim=1)
    assert (found[:500] - anywhere.roll(1, dims=0)).norm(dim=1).mean() > 1  # told of another

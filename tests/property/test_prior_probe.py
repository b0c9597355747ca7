"""The probe of a tokenizer's tokens: what it makes of tokens whose best prior is known."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch

from tessera.artifacts import folder as artifact
from tessera.artifacts.shards import ShardWriter
from tessera.contracts import TokenSpec
from tessera.evaluation.figures import Figure, Recorder
from tessera.evaluation.probe import MOST_PLACES, TokenProbe, patch_of
from tessera.metrics import prior_probe

NUM = {"train": 2000, "test": 300}
CODES = 16


def written(place: Path, latents=None, indices=None, grid: tuple[int, int] = (4, 4)) -> TokenProbe:
    """Tokens of functions that give (n, D, h, w) latents, or (n, h, w) indices, of a generator and (n,) labels."""
    random = np.random.default_rng(0)
    labels = {split: random.integers(0, 3, number) for split, number in NUM.items()}
    values = {"latents": latents, "indices": indices}
    made = {learns: {split: some(random, labels[split]) for split in NUM} for learns, some in values.items() if some}
    train = made["latents"]["train"] if latents else np.zeros((2, 3, *grid), np.float32)
    spec = TokenSpec(
        codebook_size=CODES if indices else None,
        latent_shape=train.shape[1:],
        index_grid=train.shape[2:],
        num_classes=3,
        class_counts=tuple(np.bincount(labels["train"])),
        latent_mean=tuple(train.mean(axis=(0, 2, 3)).tolist()),
        latent_std=tuple(np.maximum(train.std(axis=(0, 2, 3)), 1e-6).tolist()),
        tokenizer_fingerprint="f" * 64,
    )
    with artifact.create(place) as folder:
        for split in NUM:
            with ShardWriter(folder / split, "labels") as rows:
                rows.append(labels[split])
            for learns, some in made.items():
                dtype = np.float32 if learns == "latents" else np.uint16
                with ShardWriter(folder / split, learns) as rows:
                    rows.append(some[split][:, None].astype(dtype))
        artifact.write_json(folder / "meta.json", {"spec": spec.model_dump(), "num_views": 1})
    return TokenProbe(place, tuple(made), "toy", torch.device("cpu"))


def measured(probe: TokenProbe, probe_steps: int = 100) -> dict[str, Figure]:
    found = Recorder()
    prior_probe.of_probe(prior_probe.Config(kind="prior_probe", probe_steps=probe_steps), probe, found.group("g"))
    return found.groups["g"]


def white(depth: int):
    return lambda random, labels: 7 + 3 * random.normal(size=(len(labels), depth, 4, 4))


def smooth(random, labels):
    """One value for all places of an image."""
    return np.broadcast_to(random.normal(size=(len(labels), 2, 1, 1)), (len(labels), 2, 4, 4))


def test_the_unit_is_what_the_best_linear_guess_leaves_of_white_noise():
    random = np.random.default_rng(0)
    x_0, x_1 = random.normal(size=(2, 200_000))
    for time in (0.05, 0.5, 0.8):
        x, velocity = (1 - time) * x_0 + time * x_1, x_1 - x_0
        rest = velocity - x * (x @ velocity) / (x @ x)
        assert rest.var() == pytest.approx(prior_probe.unexplained(np.array(time)), rel=0.02)


@pytest.mark.parametrize("depth", [1, 8])
def test_white_noise_is_as_bad_as_latents_can_be_whatever_their_number_mean_and_scale(tmp_path, depth):
    assert measured(written(tmp_path / "tokens", white(depth)))["probe_loss"].value == pytest.approx(1, abs=0.05)


def test_smooth_latents_are_easy_and_those_that_follow_from_the_label_easier_still(tmp_path):
    def told(random, labels):
        return np.stack([labels == 0, labels == 1], axis=1)[:, :, None, None] * np.ones((1, 1, 4, 4))

    losses = [measured(written(tmp_path / some.__name__, some))["probe_loss"] for some in (smooth, told)]
    assert 0.5 > losses[0].value > 1.5 * losses[1].value
    for figure in losses:
        assert figure.num_images == NUM["test"] and 0 < figure.standard_error < 0.05


def test_bits_of_even_indices_are_those_of_guessing_and_of_one_index_for_all_places_those_of_one(tmp_path):
    def even(random, labels):
        return random.integers(0, CODES, (len(labels), 4, 4))

    def one(random, labels):
        return np.broadcast_to(random.integers(0, CODES, (len(labels), 1, 1)), (len(labels), 4, 4))

    bits = [measured(written(tmp_path / some.__name__, indices=some)) for some in (even, one)]
    assert all("probe_loss" not in some for some in bits)
    assert bits[0]["probe_bits_per_image"].value == pytest.approx(16 * math.log2(CODES), rel=0.03)
    assert math.log2(CODES) < bits[1]["probe_bits_per_image"].value < 1.5 * math.log2(CODES)


def test_figures_are_the_same_each_time_and_torchs_generator_is_left_alone(tmp_path):
    probe, found = written(tmp_path / "tokens", smooth), []
    for seed in (1, 2):
        torch.manual_seed(seed)
        before = torch.get_rng_state()
        with torch.no_grad():  # as its stage
            found.append(measured(probe, probe_steps=5))
        assert torch.equal(before, torch.get_rng_state())
    assert found[0] == found[1] and found[0] != measured(probe, probe_steps=6)


def test_large_grids_are_taken_in_patches():
    for grid, patch in (((4, 4), 1), ((16, 16), 1), ((32, 32), 2), ((64, 32), 4), ((28, 28), 2), ((27, 27), 1)):
        assert patch_of(grid) == patch
        assert grid[0] * grid[1] <= MOST_PLACES * patch**2 or grid == (27, 27)

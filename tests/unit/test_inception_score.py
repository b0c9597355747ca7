"""The Inception Score against its closed forms, torch-fidelity's own function, and the definition in plain loops."""

import math

import numpy as np
import pytest
import torch

from tessera.metrics.inception_score import score


def normal(rows: int, classes: int, scale: float = 1.0, seed: int = 0) -> torch.Tensor:
    return scale * torch.randn(rows, classes, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("scale", [1.0, 5.0, 100.0])
@pytest.mark.parametrize("num_splits", [1, 7, 10])
def test_score_equals_that_of_torch_fidelity(scale, num_splits):
    from torch_fidelity.metric_isc import isc_features_to_metric

    logits = normal(503, 1008, scale)  # not divisible by 7 or 10
    theirs = isc_features_to_metric(logits, num_splits, shuffle=False)
    found = score(logits, num_splits)
    assert found.inception_score == pytest.approx(theirs["inception_score_mean"], rel=1e-10)
    if num_splits == 1:
        assert math.isnan(found.standard_error)
    else:  # theirs is the deviation of the splits, divided by their number
        deviation = found.standard_error * (num_splits - 1) ** 0.5
        assert deviation == pytest.approx(theirs["inception_score_std"], rel=1e-8)
    assert score(logits.numpy(), num_splits) == pytest.approx(found, nan_ok=True)


def test_score_is_the_definition_term_by_term():
    logits = normal(6, 4, 2.0, seed=1).double().numpy()
    likelihood = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    marginal = likelihood.mean(axis=0)
    divergences = [sum(p * math.log(p / q) for p, q in zip(row, marginal, strict=True)) for row in likelihood]
    assert score(logits, 1).inception_score == pytest.approx(math.exp(sum(divergences) / 6), rel=1e-12)


def test_equal_predictions_have_the_score_1():
    assert score(normal(1, 1008, 3.0).repeat(50, 1), 5) == pytest.approx((1.0, 0.0), abs=1e-12)


@pytest.mark.parametrize("num_classes", [2, 10, 1008])
def test_certain_predictions_of_all_classes_alike_have_the_number_of_classes_as_their_score(num_classes):
    logits = 1e4 * torch.eye(num_classes).repeat(3, 1)
    assert score(logits, 3) == pytest.approx((num_classes, 0.0), rel=1e-12)


def test_classes_that_never_occur_and_likelihoods_below_the_smallest_number_do_no_harm():
    logits = 1e4 * torch.eye(9)[[0, 1, 2] * 4]  # six of nine classes underflow to 0
    assert score(logits, 1).inception_score == pytest.approx(3, rel=1e-12)


def test_a_constant_that_is_added_to_an_image_s_logits_changes_nothing():
    logits = normal(40, 20)
    shifted = logits.double() + 1e3 * normal(40, 1, seed=1).double()
    assert score(shifted, 4) == pytest.approx(score(logits.double(), 4), rel=1e-9)


def test_logits_that_cannot_be_split_or_are_not_finite_are_refused():
    with pytest.raises(ValueError, match=r"shape \(9, 5\) cannot be split into 10 parts"):
        score(normal(9, 5))
    with pytest.raises(ValueError, match=r"shape \(9,\)"):
        score(normal(9, 1)[:, 0], 2)
    with pytest.raises(ValueError, match="into 0 parts"):
        score(normal(9, 5), 0)
    with pytest.raises(ValueError, match="not finite"):
        score(torch.tensor([[0.0, math.inf], [0.0, 0.0]]), 1)

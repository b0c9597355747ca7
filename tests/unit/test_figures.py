"""Figures with their protocols, and the comparison that refuses to mix them."""

import json
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from tessera.artifacts.folder import ArtifactError
from tessera.components import InvalidParams
from tessera.evaluation import comparison, figures
from tessera.evaluation.figures import Measured, Protocol, Recorder

ROOT = Path(__file__).parents[2]


def protocol(**changes) -> Protocol:
    values = {
        "dataset": "digits",
        "images": "samples",
        "num_images": 1000,
        "reference_split": "test",
        "reference_sha256": "a" * 64,
        "num_reference_images": 359,
        "network": "classifier",
        "network_sha256": "b" * 64,
        "resize": "none",
        "dtype": "float32 features, float64 statistics",
        "settings": {},
    }
    return Protocol(**(values | changes))


def measured(fd: float, error: float | None = 0.01, group: str = "generation", **changes) -> Measured:
    found = Recorder()
    found.add(group, "fd_classifier", fd, protocol(**changes), error)
    return found.measured()


def system(fd: float, floor_fd: float, rfd: float = 0.05, pfd: float | None = None, error: float = 0.01) -> Measured:
    found = Recorder()
    found.add("generation", "fd_classifier", fd, protocol(), error)
    found.add("reconstruction", "floor_fd_classifier", floor_fd, protocol(images="reconstructions"), error)
    found.add("reconstruction", "rfd_classifier", rfd, protocol(images="reconstructions", num_images=359), error)
    if pfd is not None:
        found.add("reconstruction", "pfd_classifier", pfd, protocol(images="perturbed", num_images=359), error)
    return found.measured()


# The file


def test_a_metrics_file_comes_back_as_it_was_written_with_equal_protocols_once(tmp_path):
    found = Recorder()
    found.add("generation", "fd_classifier", 0.2, protocol(), 0.01)
    found.add("generation", "fd_again", 0.3, protocol(), None)
    found.add("generation", "precision", 0.9, protocol(settings={"neighbors": 3}), float("nan"))
    before = found.measured(drawn={"seed": 0})
    before.write(tmp_path / "x.json")
    after = figures.read(tmp_path / "x.json")
    assert after == before
    assert len(after.protocols) == 2
    assert after.figure("precision").standard_error is None
    assert after.figure("fd_classifier").num_images == 1000
    assert after.figure("nothing") is None


def test_a_file_without_protocols_or_with_a_lost_one_is_refused(tmp_path):
    path = tmp_path / "x.json"
    path.write_text('{"generation": {"fd_classifier": 0.2}}')
    with pytest.raises(ArtifactError, match="holds no figures with their protocols"):
        figures.read(path)
    measured(0.2).write(path)
    content = json.loads(path.read_text())
    content["generation"]["fd_classifier"]["protocol"] = "gone"
    path.write_text(json.dumps(content))
    with pytest.raises(ArtifactError, match="refers to the protocol 'gone'"):
        figures.read(path)
    content["generation"]["fd_classifier"] = 0.2
    path.write_text(json.dumps(content))
    with pytest.raises(InvalidParams, match="fd_classifier"):
        figures.read(path)


def test_means_and_shares_carry_their_standard_errors():
    found = Recorder()
    values = np.random.default_rng(0).normal(3, 2, 400)
    found.add_mean("g", "mean", values, protocol())
    found.add_share("g", "share", 0.2, protocol())
    found.add_share("g", "all", 1.0, protocol(), of=50)
    assert found.groups["g"]["mean"].standard_error == pytest.approx(values.std(ddof=1) / 20)
    assert found.groups["g"]["share"].standard_error == pytest.approx(math.sqrt(0.2 * 0.8 / 1000), rel=0.01)
    assert 0 < found.groups["g"]["all"].standard_error < 0.03  # all of 50 is not certainty


def test_what_rounding_leaves_of_0_is_shown_as_0():
    assert figures.text_with_error(7.1e-13, 9.5e-12) == figures.text_with_error(-7.1e-13, None) == "0"
    assert figures.text_with_error(-7.1e-13, 0.02) == "0.000 ± 0.020"
    assert figures.text_with_error(0.2, 0.0268) == "0.200 ± 0.027"
    assert figures.text_with_error(1234.6, 234.0) == "1235 ± 234"
    assert figures.text_with_error(12345.6, math.nan) == "1.235e+04"
    exact = {"pixels": [measured(-7.1e-13, 9.5e-12)]}
    assert comparison.ranking(exact, "fd_classifier") == "pixels 0"
    shown = comparison.table(exact, {"fd_classifier": "{:.3f}"}, ["fd_classifier"])
    assert shown["fd_classifier"].tolist() == ["0.000 ± 0.000"]  # and no -0.000


@pytest.mark.parametrize("wrong", [math.nan, math.inf])
def test_a_figure_that_is_not_finite_is_refused_by_its_name(wrong):
    with pytest.raises(ValueError, match="generation/fd_classifier is (nan|inf), expected a finite number"):
        measured(wrong)


def test_two_metrics_that_give_a_figure_of_one_name_are_refused():
    group = Recorder().group("generation")
    group.add("precision", 0.5, protocol())
    group.add_share("recall", 0.5, protocol())
    for again in (group.add_share, group.add_mean):
        with pytest.raises(ValueError, match="generation/precision was measured already"):
            again("precision", 0.5, protocol())


def test_systems_are_ranked_from_the_best_whichever_way_a_figure_is_good():
    systems = {"a": [measured(0.20)], "b": [measured(0.21)], "c": [measured(0.30)]}
    assert comparison.ranking(systems, "fd_classifier", "higher") == "c 0.300 > b 0.210 ~ a 0.200"


def test_a_column_is_what_a_metric_shows_of_what_was_measured_in_the_order_of_the_metrics():
    found = Recorder()
    for name in ("precision", "fd_random", "fd_classifier", "density", "mine"):
        found.add("generation", name, 0.5, protocol())
    found.add("reconstruction", "rfd_random", 0.5, protocol())
    systems = {"a": [found.measured()], "b": [measured(0.3)]}
    shown = comparison.columns(systems, ["precision_recall", "frechet"], ["generation"])
    assert list(shown) == ["precision", "fd_classifier", "fd_random"]
    assert shown["fd_random"].ranks and not shown["precision"].ranks
    assert list(comparison.columns(systems, ["frechet"], ["reconstruction"])) == ["rfd_random"]


# Refusals


@pytest.mark.parametrize(
    ("field", "value", "named"),
    [
        ("reference_split", "train", "reference_split is 'train' in b, 'test' in a"),
        ("reference_sha256", "c" * 64, "reference_sha256 is cccccccccccc in b, aaaaaaaaaaaa in a"),
        ("resize", "bilinear to 299x299", "resize is 'bilinear to 299x299' in b, 'none' in a"),
        ("num_images", 500, "num_images is 500 in b, 1000 in a"),
        ("network_sha256", "d" * 64, "network_sha256"),
        ("dataset", "mnist", "dataset is 'mnist'"),
        ("settings", {"neighbors": 5}, "neighbors is 5 in b, None in a"),
    ],
)
def test_figures_of_unequal_protocols_are_refused_naming_the_field(field, value, named):
    comparison.require_one_protocol({"a": [measured(0.1)], "b": [measured(0.3)]})
    with pytest.raises(comparison.MixedProtocols) as refused:
        comparison.require_one_protocol({"b": [measured(0.1, **{field: value})], "a": [measured(0.3)]})
    assert named in str(refused.value)
    assert "fd_classifier cannot stand in one column" in str(refused.value)


def test_one_cause_is_one_sentence_however_many_figures_and_systems_it_spoils():
    names = [f"fd_{letter}" for letter in "abcde"]

    def run(network: str) -> figures.Measured:
        each = [measured(0.1, network_sha256=network * 64).groups["generation"]["fd_classifier"] for _ in names]
        whole = measured(0.1, network_sha256=network * 64)
        return whole.model_copy(update={"groups": {"generation": dict(zip(names, each, strict=True))}})

    systems = {name: [run("a"), run("b")] for name in ("one", "two", "three")}
    with pytest.raises(comparison.MixedProtocols) as refused:
        comparison.require_one_protocol(systems)
    assert str(refused.value).count("cannot stand in one column") == 1
    assert str(refused.value).startswith(
        "fd_a, fd_b and 3 more cannot stand in one column: network_sha256 is aaaaaaaaaaaa in"
    )


def test_a_summary_has_a_dozen_plain_figures_at_most_those_of_samples_first():
    found = Recorder()
    for number in range(20):
        found.add("reconstruction", f"rfd_{number:02}", number + 0.123456, protocol(), 0.1)
    for name in ("recall", "gap_fd_classifier", "fd_classifier"):  # the second is in no table
        found.add("generation", name, 0.98765432, protocol(), 0.1)
    summary = comparison.summary(found.measured(), ["frechet", "precision_recall"])
    assert list(summary)[:3] == ["fd_classifier", "recall", "rfd_00"] and len(summary) == 12
    assert summary["recall"] == 0.9877 and summary["rfd_08"] == 8.123


def test_the_same_name_in_another_group_is_another_column():
    comparison.require_one_protocol({"a": [measured(0.1)], "b": [measured(0.3, group="floor", num_images=7)]})


def test_the_comparison_of_runs_refuses_in_a_sentence_and_prints_equal_ones(tmp_path):
    def compare(*folders):
        command = [sys.executable, "-m", "tessera.evaluation.comparison", *map(str, folders)]
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)

    for run, fd, changes in (("one", 0.2, {}), ("two", 0.26, {}), ("other", 0.2, {"num_images": 500})):
        measured(0.1, **changes).write(tmp_path / run / "systems" / "real.json")
        measured(fd, **changes).write(tmp_path / run / "systems" / "vqgan-flow.json")
    fine = compare(tmp_path / "one", tmp_path / "two")
    assert fine.returncode == 0, fine.stderr
    assert "0.230 ± 0.030" in fine.stdout  # the mean of both runs, and the spread's standard error
    assert "real 0.100 < vqgan-flow 0.230" in fine.stdout
    refused = compare(tmp_path / "one", tmp_path / "other")
    assert refused.returncode == 2
    assert "num_images is 1000 in real (run 1), 500 in real (run 2)" in refused.stderr
    assert compare(tmp_path / "nowhere").returncode == 2
    assert "has the same vqgan-flow as a folder before it" in compare(tmp_path / "one", tmp_path / "one").stderr


# Noise


def test_only_differences_beyond_two_standard_errors_exceed_the_noise():
    systems = {"a": [measured(0.20)], "b": [measured(0.21)], "c": [measured(0.30)], "d": [measured(0.31, None)]}
    assert comparison.ranking(systems, "fd_classifier") == "a 0.200 ~ b 0.210 < c 0.300 ~ d 0.310"
    found = comparison.differences(systems, "fd_classifier")
    assert len(found) == 6
    assert set(found.loc[found.exceeds_noise, ["lower", "higher"]].itertuples(index=False, name=None)) == {
        ("a", "c"),
        ("b", "c"),
    }


def test_over_several_runs_their_spread_counts_and_no_less_than_their_draws():
    near = {"a": [measured(0.20), measured(0.30)], "b": [measured(0.26), measured(0.36)]}
    assert comparison.ranking(near, "fd_classifier") == "a 0.250 ~ b 0.310"
    apart = {"a": [measured(0.20), measured(0.21)], "b": [measured(0.30), measured(0.31)]}
    assert comparison.ranking(apart, "fd_classifier") == "a 0.2050 < b 0.3050"
    close_by_chance = {"a": [measured(0.20, 0.1), measured(0.21, 0.1)], "b": [measured(0.30), measured(0.31)]}
    assert comparison.ranking(close_by_chance, "fd_classifier") == "a 0.205 ~ b 0.305"
    assert comparison.estimate(close_by_chance["a"], "fd_classifier").standard_error == pytest.approx(0.1 / 2**0.5)


# Bottlenecks


@pytest.mark.parametrize(
    ("found", "stage"),
    [
        (system(fd=0.52, floor_fd=0.50), "tokenizer"),
        (system(fd=0.60, floor_fd=0.12), "prior"),
        (system(fd=0.60, floor_fd=0.12, pfd=0.2), "prior"),
        (system(fd=0.60, floor_fd=0.12, pfd=0.9), "prior, by a fragile tokenizer"),
        (system(fd=0.115, floor_fd=0.11), "none"),
        (system(fd=0.60, floor_fd=0.12, error=0.5), "none"),
    ],
)
def test_the_bottleneck_is_the_stage_that_adds_most_beyond_the_noise(found, stage):
    parts = comparison.bottleneck([found], [measured(0.10)], "fd_classifier")
    assert parts.stage == stage
    assert parts.floor + parts.tokenizer + parts.prior == pytest.approx(found.figure("fd_classifier").value)


def test_without_the_tokenizers_own_floor_no_bottleneck_is_named():
    assert comparison.bottleneck([measured(0.3)], [measured(0.1)], "fd_classifier") is None

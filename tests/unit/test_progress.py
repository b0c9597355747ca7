"""What a person who waits is told."""

from pathlib import Path

import numpy as np
import pytest
import torch

from tessera.artifacts.folder import write_json
from tessera.running import process
from tessera.running.progress import time_left

STAGES = ("prepare_images", "train_prior@a", "sample_images@a", "train_prior@b", "write_report")


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """Two of five stages have run, in half the seconds that were expected; the third is running."""
    for name in STAGES:
        (tmp_path / "data/code").mkdir(parents=True, exist_ok=True)
        (tmp_path / "data/code" / name).touch()
    expect(
        tmp_path,
        {"prepare_images": 4, "train_prior@a": 100, "sample_images@a": 1, "train_prior@b": 220, "write_report": 20},
    )
    took(tmp_path, "prepare_images", 2)
    took(tmp_path, "train_prior@a", 50)
    return tmp_path


def expect(root: Path, seconds: dict[str, float]) -> None:
    (root / "docs/results").mkdir(parents=True, exist_ok=True)
    write_json(root / "docs/results/timings.json", seconds)


def took(root: Path, stage: str, seconds: float) -> None:
    (root / "data/timings").mkdir(parents=True, exist_ok=True)
    write_json(root / "data/timings" / f"{stage}.json", {"seconds": seconds})


def test_what_is_left_of_a_first_run_is_scaled_by_how_fast_this_machine_was(checkout, monkeypatch):
    assert (
        time_left("sample_images@a", checkout) == "about 2 min for the 2 stages to come"
    )  # 110 + 10 s, and around them
    took(checkout, "train_prior@a", 206)  # twice as long as expected, with the other one: 440 + 40 s
    assert time_left("sample_images@a", checkout) == "about 8 min for the 2 stages to come"
    monkeypatch.setenv("TESSERA_STAGES_AT_ONCE", "2")
    assert time_left("sample_images@a", checkout) == "about 4 min for the 2 stages to come"


def test_stages_that_nobody_timed_are_counted_and_nothing_is_said_once_all_have_run(checkout):
    (checkout / "data/code/train_prior@mine").touch()
    assert time_left("sample_images@a", checkout) == "3 stages to come"
    for name in STAGES:
        took(checkout, name, 1)
    assert time_left("sample_images@a", checkout) == ""


@pytest.mark.parametrize("ask", [lambda: torch.empty(2**50), lambda: np.empty(2**46)])
def test_want_of_memory_is_a_sentence(tmp_path, monkeypatch, capsys, ask):
    end_of(tmp_path, monkeypatch, ask, SystemExit)
    said = capsys.readouterr().err
    assert said.startswith("train_prior@a failed: memory was not enough (") and said.count("\n") == 1
    assert "lower its batch_size" in said


def test_any_other_failure_of_torch_keeps_its_trace(tmp_path, monkeypatch):
    end_of(tmp_path, monkeypatch, lambda: torch.zeros(2) @ torch.zeros(3), RuntimeError)


def end_of(root: Path, monkeypatch: pytest.MonkeyPatch, stage, how: type[BaseException]) -> None:
    monkeypatch.chdir(root)
    monkeypatch.setattr(process, "_parsed", lambda command: (None, "train_prior@a", {}))
    monkeypatch.setattr(process, "_required", lambda *given: None)
    monkeypatch.setattr(process, "_execute", lambda *given: stage())
    with pytest.raises(how):
        process.main([])

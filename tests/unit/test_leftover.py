"""State of a training that was interrupted: resumed by the same inputs and code alone, and named where it fits nothing."""

import pytest

from tessera.artifacts import folder as artifact
from tessera.running.job import Job
from tessera.running.leftover import folder_for

CODE = {"tessera.priors.gan.Model": "1", "tessera.nn.warp.warped": "2"}
INPUTS = {"prior": {"kind": "gan", "channels": 8}, "tokens": "a" * 64}


@pytest.fixture
def said() -> list[str]:
    return []


@pytest.fixture
def root(tmp_path, said):
    with artifact.create(folder_for(tmp_path, INPUTS, CODE, said.append) / "step-000001200") as place:
        (place / "state.json").write_text("{}")
    assert said == []
    return tmp_path


def test_the_same_inputs_and_code_find_their_state_in_silence(root, said):
    assert (folder_for(root, INPUTS, CODE, said.append) / "step-000001200").is_dir()
    assert said == []


def test_state_of_other_code_is_named_with_the_definitions_that_changed(root, said):
    now = folder_for(root, INPUTS, {**CODE, "tessera.priors.gan.Model": "9"}, said.append)
    assert not list(now.glob("step-*"))
    (line,) = said
    assert "up to step 1,200 that is not resumed: code changed: tessera.priors.gan.Model" in line


def test_state_of_other_inputs_is_named_with_the_values_that_changed(root, said):
    folder_for(root, {"prior": {"kind": "gan", "channels": 16}, "tokens": "b" * 64}, CODE, said.append)
    (line,) = said
    assert line.endswith("prior.channels was 8, is 16; tokens was aaaaaaaaaaaa, is bbbbbbbbbbbb")


def test_state_that_does_not_say_what_it_is_of_is_named_all_the_same(root, said):
    (next(root.glob("*/inputs.json"))).write_text("[]")
    folder_for(root, INPUTS, {}, said.append)
    assert said[0].endswith("it does not say what it was made of")


def test_a_folder_without_a_checkpoint_is_nothing_to_speak_of(tmp_path, said):
    folder_for(tmp_path, INPUTS, CODE, said.append)
    folder_for(tmp_path, INPUTS, {}, said.append)
    assert said == []


def test_the_key_of_state_has_the_code_of_the_stage_and_of_its_parts(tmp_path):
    """A comment does not move it: test_fingerprints asks that of the code. Here: a job puts both kinds of code into the key."""
    job, other = Job("train_prior@x", tmp_path / "a"), Job("a test", tmp_path / "b")
    assert job.resumable({"seed": 0}).name != other.resumable({"seed": 0}).name
    assert "stages.train_prior.run" in (job.state / "inputs.json").read_text()

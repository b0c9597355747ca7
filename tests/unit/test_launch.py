"""How many processes a stage is to have, by the environment, and what is said of one that ends."""

import json
from types import SimpleNamespace

import pytest

from tessera.running import launch


@pytest.fixture(autouse=True)
def nothing_asked(monkeypatch):
    for key in ("RANK", "TESSERA_PROCESSES", "TESSERA_NODES", "TESSERA_NODE", "TESSERA_RENDEZVOUS", launch.LAUNCHED):
        monkeypatch.delenv(key, raising=False)


def asked(monkeypatch, stage="train_prior", gpus=4, **environment):
    for key, value in environment.items():
        monkeypatch.setenv(key, value)
    return launch.asked(stage, gpus)


def test_a_stage_is_one_process_unless_it_is_asked_to_be_more(monkeypatch):
    assert asked(monkeypatch).is_one
    assert asked(monkeypatch, TESSERA_PROCESSES="3") == (3, 1, 0, "")
    assert asked(monkeypatch, TESSERA_PROCESSES="auto").processes == 4
    assert asked(monkeypatch, gpus=0).processes == 1
    assert asked(monkeypatch, TESSERA_PROCESSES_TRAIN_PRIOR="2").processes == 2
    assert asked(monkeypatch, "train_tokenizer").processes == 4
    assert asked(monkeypatch, "prepare_images").is_one  # nothing of it can be shared
    assert asked(monkeypatch, RANK="1").is_one  # it is one of several already


def test_nodes_need_a_number_and_a_place_to_meet(monkeypatch):
    with pytest.raises(ValueError, match="TESSERA_NODE is '': expected a number from 0"):
        asked(monkeypatch, TESSERA_NODES="2")
    for node, rendezvous in (("2", "host:29500"), ("1", ""), ("1", "host"), ("1", ":29500")):
        with pytest.raises(ValueError, match="expected a node from 0 to 1 and HOST:PORT"):
            asked(monkeypatch, TESSERA_NODE=node, TESSERA_RENDEZVOUS=rendezvous)
    found = asked(monkeypatch, TESSERA_NODE="1", TESSERA_RENDEZVOUS="host:29500")
    assert found == (1, 2, 1, "host:29500") and not found.is_one


@pytest.mark.parametrize("text", ["0", "-1", "two", "1.5"])
def test_a_number_of_processes_that_is_none_is_refused(monkeypatch, text):
    with pytest.raises(ValueError, match="TESSERA_PROCESSES is .* expected auto, or how many processes share a stage"):
        asked(monkeypatch, TESSERA_PROCESSES=text)


def failure(exitcode, timestamp, sentence=None):
    data = {"message": {"message": sentence, "extraInfo": {}}} if sentence else {"message": "Signal 9 received"}
    return SimpleNamespace(exitcode=exitcode, timestamp=timestamp, error_file_data=data)


def test_the_cause_is_told_and_not_what_it_led_to(capsys):
    lost = failure(2, 10, launch.LOST)
    assert launch._told("x", {0: lost, 1: failure(2, 11, "settings are wrong")}, 2) == 2
    assert capsys.readouterr().err == "x failed: settings are wrong\n"
    assert launch._told("x", {0: lost, 1: failure(-9, 11)}, 2) == 137
    assert "x failed: process 1 of 2 was ended by SIGKILL" in capsys.readouterr().err
    assert launch._told("x", {0: failure(143, 5)}, 2) == 143 and capsys.readouterr().err == ""  # it has said so itself


def test_a_sentence_reaches_the_launcher_as_it_is(monkeypatch, tmp_path):
    assert not launch.record("a sentence")  # nobody launched it
    monkeypatch.setenv(launch.LAUNCHED, "1")
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / "error.json"))
    assert launch.record("a: sentence with \u00e9")
    told = SimpleNamespace(error_file_data=json.loads((tmp_path / "error.json").read_text()))
    assert launch._sentence(told) == "a: sentence with \u00e9"

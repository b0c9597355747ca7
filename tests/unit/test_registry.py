"""What a team sees in MLflow: params by a rule, data sets, nested runs, versions of a model, a champion. On a database file."""

import hashlib
import itertools
import json
import os
import subprocess
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from tessera.artifacts import folder as artifact
from tessera.components import parse
from tessera.evaluation.figures import Recorder, without_network
from tessera.params import Pipeline
from tessera.tracking import journal as journal_module
from tessera.tracking import load, mirror, provenance, registry, uploader
from tessera.tracking.processes import folder_of

ROOT = Path(__file__).parents[2]
EXPERIMENT = "tessera-toy"


@pytest.fixture(scope="module")
def empty_database(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """MLflow takes seconds to create one."""
    folder = tmp_path_factory.mktemp("database")
    mirror_uri = f"sqlite:///{folder}/mlflow.db"
    from mlflow import MlflowClient

    MlflowClient(mirror_uri).search_experiments()
    return folder / "mlflow.db"


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, empty_database: Path) -> Path:
    for name in ("TESSERA_TRACKING", "TESSERA_REGISTRY", "TESSERA_PARENT_RUN", "MLFLOW_TRACKING_URI"):
        monkeypatch.delenv(name, raising=False)
    (tmp_path / "mlflow.db").write_bytes(empty_database.read_bytes())
    for role in ("tokenizer", "prior"):
        make_artifact(tmp_path / role, f"weights of a {role}")
    return tmp_path


def make_artifact(folder: Path, content: str) -> str:
    with artifact.create(folder) as place:
        (place / "weights.safetensors").write_text(content)
        artifact.write_json(place / "config.json", {"part": "toy"})
    return artifact.fingerprint(folder)


def open_run(root: Path, name: str, kind: str = "stage", **arguments: Any) -> journal_module.Run:
    arguments = {"params": {}, "tags": {}, "state": None} | arguments
    return journal_module.open_run(name, experiment=EXPERIMENT, root=root, kind=kind, **arguments)


def evaluate(
    root: Path,
    name: str,
    value: float = 1.0,
    error: float = 0.1,
    number: int = 100,
    sampling: Any = None,
    tags: dict[str, str] | None = None,
) -> None:
    """As stages.evaluate does: one figure with its protocol, and both artifacts offered."""
    parts = {role: root / role for role in ("tokenizer", "prior")}
    prints = {role: artifact.fingerprint(path) for role, path in parts.items()}
    found = Recorder()
    found.add("generation", "fd_toy", value, without_network("toy", "samples", number), error)
    found.measured().write(root / "metrics.json")
    tags = {"tessera.system": name, "protocol": str(number), **(tags or {})}
    with open_run(root, name, "system", tags=tags) as run:
        run.figures({"generation/fd_toy": value})
        run.attach(root / "metrics.json")
        run.made_by(prints)
        digest = hashlib.sha256(json.dumps([prints, sampling]).encode()).hexdigest()
        run.offer_model(EXPERIMENT, parts, prints, {"scale": sampling}, digest)


def client_of(root: Path) -> Any:
    from mlflow import MlflowClient

    return MlflowClient(mirror.tracking_uri(root))


def versions(root: Path) -> list[Any]:
    found = client_of(root).search_model_versions(f"name = '{EXPERIMENT}'")
    return sorted(found, key=lambda version: int(version.version))


def crown(root: Path, threshold: float = 10.0, **arguments: Any) -> int:
    assert uploader.replay(root, 60) == 0
    return registry.crown(client_of(root), EXPERIMENT, "generation/fd_toy", True, threshold, **arguments)


def champion(root: Path) -> str | None:
    version = client_of(root).get_registered_model(EXPERIMENT).aliases.get("champion")
    return version if version is None else str(version)


def log(root: Path) -> str:
    return (folder_of(root) / "uploader.log").read_text()


def pipeline() -> Pipeline:
    return parse(Pipeline, yaml.safe_load((ROOT / "params.yaml").read_text()))


def test_no_param_is_the_same_in_all_systems_and_none_is_a_hash() -> None:
    params = pipeline()
    described = {name: params.describe(f"system@{name}") for name in params.systems}
    for key in set().union(*(one.params for one in described.values())):
        values = [str(one.params.get(key, "")) for one in described.values()]
        assert len(set(values)) > 1, key
        assert all(len(value) < 64 for value in values)
    flow = described["vqgan-flow"]
    assert (flow.params["tokenizer"], flow.params["prior.training.num_steps"]) == ("vqgan", 700)
    assert (flow.tags["seed"], flow.tags["dataset.kind"], flow.tags["tokenizer.quantizer.code_dim"]) == (0, "digits", 8)
    assert set(flow.params) | set(flow.tags) <= set(flow.settings)
    assert "tokenizer.health.window" in flow.settings and "tokenizer.health.window" not in flow.params


def test_the_params_of_the_only_system_are_all_shown() -> None:
    values = yaml.safe_load((ROOT / "params.yaml").read_text())
    values["systems"] = {"vqgan-flow": values["systems"]["vqgan-flow"]}
    described = parse(Pipeline, values).describe("system@vqgan-flow")
    assert described.params["prior.training.num_steps"] == 700
    assert set(described.tags) == {"seed", *(f"dataset.{key}" for key in values["dataset"])}


def test_a_run_says_from_which_commit_and_experiment_and_of_which_artifacts_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DVC_EXP_NAME", "brave-fox")
    monkeypatch.chdir(tmp_path)
    assert provenance.tags(tmp_path, {"prior": Path("data/priors/a")}) == {"dvc.experiment": "brave-fox"}
    git = ["git", "-c", "user.name=test", "-c", "user.email=test@localhost"]
    (tmp_path / "params.yaml").write_text("seed: 0\n")
    lock = {"stages": {"train_prior@a": {"outs": [{"path": "data/priors/a", "md5": "12.dir"}]}, "x": {}}}
    (tmp_path / "dvc.lock").write_text(yaml.safe_dump(lock))
    for arguments in (["init", "-q"], ["add", "--all"], ["commit", "-qm", "start"]):
        subprocess.run([*git, *arguments], cwd=tmp_path, check=True)
    (tmp_path / "params.yaml").write_text("seed: 1\n")
    found = provenance.tags(tmp_path, {"prior": Path("data/priors/a"), "tokenizer": Path("data/tokenizers/b")})
    assert len(found.pop("mlflow.source.git.commit")) == 40
    assert found == {
        "git.uncommitted": "params.yaml",
        "dvc.experiment": "brave-fox",
        "dvc.prior": "train_prior@a 12.dir",
    }


def test_a_system_is_a_version_once_however_often_it_is_evaluated_and_sent(root: Path) -> None:
    evaluate(root, "one", 1.0)
    evaluate(root, "one", 2.0)
    assert uploader.replay(root, 60) == 0
    (version,) = versions(root)
    assert version.tags["tessera.system"] == "one"
    assert version.tags["generation/fd_toy"] == "2"  # the newest evaluation's
    assert uploader.replay(root, 60, everything=True) == 0
    assert [one.version for one in versions(root)] == [version.version]
    evaluate(root, "one", 2.0, sampling={"guidance_scale": 2.0})
    assert uploader.replay(root, 60) == 0
    assert len(versions(root)) == 2


def test_a_version_that_a_frozen_server_makes_late_is_no_second_one(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mlflow import MlflowClient
    from mlflow.exceptions import MlflowException

    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{root}/mlflow.db")  # where the late request looks
    create, late = MlflowClient.create_model_version, []

    def unanswered(self: Any, *arguments: Any, **named: Any) -> Any:
        if late:
            return create(self, *arguments, **named)
        late.append(threading.Timer(3.5, create, (self, *arguments), named))  # replay tries again after 2 seconds
        late[0].start()
        raise MlflowException("read timed out")

    monkeypatch.setattr(MlflowClient, "create_model_version", unanswered)
    evaluate(root, "one")
    assert uploader.replay(root, 60) == 0
    late[0].join()
    (version,) = versions(root)
    assert "version 1 has these artifacts already" in log(root)
    client = client_of(root)
    (model,) = client.search_logged_models([client.get_experiment_by_name(EXPERIMENT).experiment_id])
    assert (version.source, str(model.status)) == (f"models:/{model.model_id}", "READY")
    (output,) = client.get_run(version.run_id).outputs.model_outputs
    assert output.model_id == model.model_id


def test_of_versions_made_twice_the_champion_stays(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{root}/mlflow.db")
    evaluate(root, "one", 1.0)
    assert uploader.replay(root, 60) == 0
    client, (first,) = client_of(root), versions(root)
    for number in ("2", "3"):
        twin = client.create_model_version(EXPERIMENT, first.source, first.run_id, first.tags, model_id=first.model_id)
        assert str(twin.version) == number
    client.set_registered_model_alias(EXPERIMENT, "champion", "2")
    evaluate(root, "one", 0.9)
    assert uploader.replay(root, 60) == 0
    assert [(str(version.version), version.tags["generation/fd_toy"]) for version in versions(root)] == [("2", "0.9")]
    assert champion(root) == "2"


def test_a_model_in_the_registry_is_safetensors_json_and_source_and_no_pickle(root: Path) -> None:
    evaluate(root, "one")
    assert uploader.replay(root, 60) == 0
    files = [path for path in (root / "mlruns" / EXPERIMENT / "models").rglob("*") if path.is_file()]
    assert {path.suffix for path in files} <= {".safetensors", ".json", ".py", ".typed", ".yaml", ".txt", ".html", ""}
    assert [path.name for path in files if path.suffix == ""] == ["MLmodel"]
    assert not [path for path in files if path.read_bytes()[:2] in (b"\x80\x04", b"\x80\x05", b"PK")]
    settings = yaml.safe_load(next(path for path in files if path.name == "MLmodel").read_text())
    assert settings["flavors"]["python_function"]["model_code_path"].endswith("served_model.py")
    assert str(ROOT) not in str(settings)
    assert '"labels"' in settings["signature"]["inputs"]
    assert {"prior/weights.safetensors", "tokenizer/manifest.json"} <= {"/".join(path.parts[-2:]) for path in files}


def test_a_model_is_registered_as_it_was_evaluated_though_its_folder_holds_another_by_then(
    root: Path, monkeypatch: pytest.MonkeyPatch, empty_database: Path
) -> None:
    evaluate(root, "one")
    make_artifact(root / "prior", "trained again")
    assert uploader.replay(root, 60) == 0
    (weights,) = (root / "mlruns").rglob("prior/weights.safetensors")
    assert weights.read_text() == "weights of a prior"
    assert not list(folder_of(root).rglob("*.safetensors"))  # the registry has it
    # Another database is filled as far as the artifacts are still there
    (root / "other.db").write_bytes(empty_database.read_bytes())
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "sqlite:///other.db")
    assert uploader.replay(root, 60) == 0
    assert versions(root) == []
    assert "prior is no longer what was evaluated" in log(root)
    make_artifact(root / "prior", "weights of a prior")
    assert uploader.replay(root, 60, everything=True) == 0
    assert len(versions(root)) == 1


def test_a_damaged_model_is_told_and_holds_nothing_up(root: Path) -> None:
    evaluate(root, "one")
    (linked,) = folder_of(root).glob("*/models/*/prior/weights.safetensors")
    linked.write_text("weights of a prioR")
    assert uploader.replay(root, 60) == 0
    assert versions(root) == []
    assert "weights.safetensors is damaged" in log(root)


def test_the_registry_can_be_switched_off_and_is_off_without_tracking(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TESSERA_REGISTRY", "off")
    evaluate(root, "one")
    assert uploader.replay(root, 60) == 0
    assert versions(root) == []
    monkeypatch.setenv("TESSERA_REGISTRY", "no")
    with pytest.raises(ValueError, match="TESSERA_REGISTRY is 'no': expected on or off"):
        evaluate(root, "one")
    monkeypatch.delenv("TESSERA_REGISTRY")
    monkeypatch.setenv("TESSERA_TRACKING", "off")
    before = sorted(folder_of(root).rglob("*"))
    evaluate(root, "one")
    assert sorted(folder_of(root).rglob("*")) == before


def test_systems_are_rows_and_what_made_them_lies_below_even_if_the_clock_was_set_back(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fingerprint = artifact.fingerprint(root / "prior")
    clock = itertools.count(10**18, -(10**6))
    with monkeypatch.context() as patch:
        patch.setattr(time, "time_ns", lambda: next(clock))
        with open_run(root, "train_prior@one") as training:
            training.dataset("toy", "a" * 64, "data/images", "train_prior")
            training.tag({"tessera.artifact": fingerprint})
        with open_run(root, "encode_tokens@one"):
            pass
        evaluate(root, "one")
    assert uploader.replay(root, 60) == 0
    client = client_of(root)
    experiment = client.get_experiment_by_name(EXPERIMENT).experiment_id
    runs = {run.info.run_name: run for run in client.search_runs([experiment])}
    parents = {name: run.data.tags.get("mlflow.parentRunId") for name, run in runs.items()}
    assert parents == {
        "one": None,
        "stages": None,
        "train_prior@one": runs["one"].info.run_id,
        "encode_tokens@one": runs["stages"].info.run_id,
    }
    assert "[train_prior@one](#/experiments/" in runs["one"].data.tags["mlflow.note.content"]
    (dataset,) = runs["train_prior@one"].inputs.dataset_inputs
    assert (dataset.dataset.name, dataset.dataset.digest) == ("toy", "a" * 32)
    assert json.loads(dataset.dataset.source) == {"uri": "data/images"}
    assert uploader.replay(root, 60, everything=True) == 0
    assert len(client.search_runs([experiment])) == 4
    assert len(client.get_run(runs["train_prior@one"].info.run_id).inputs.dataset_inputs) == 1


def test_rows_of_one_system_in_several_experiments_can_be_told_apart_and_are_versions_of_it(root: Path) -> None:
    for sampling, experiment in enumerate(("brave-fox", "params-width-96")):
        evaluate(root, "one", sampling=sampling, tags={"dvc.experiment": experiment})
    assert uploader.replay(root, 60) == 0
    client = client_of(root)
    found = client.search_runs([client.get_experiment_by_name(EXPERIMENT).experiment_id])
    assert {run.info.run_name for run in found} == {"one (brave-fox)", "one (params-width-96)"}
    assert [version.tags["tessera.system"] for version in versions(root)] == ["one", "one"]
    assert {model.name for model in client.search_logged_models([found[0].info.experiment_id])} == {"one"}


def test_the_champion_is_the_best_by_more_than_noise(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    evaluate(root, "one", 1.0, 0.1, sampling=1)
    assert crown(root, threshold=0.9) == 0 and champion(root) is None
    assert crown(root, threshold=1.15) == 0 and champion(root) is None  # below, but not by more than noise
    assert crown(root, threshold=1.25) == 0 and champion(root) == "1"
    evaluate(root, "two", 0.8, 0.1, sampling=2)  # 0.2 below, 2 standard errors of the difference are 0.28
    assert crown(root) == 0 and champion(root) == "1"
    assert "one (version 1) stays champion" in capsys.readouterr().out
    evaluate(root, "three", 0.7, 0.1, sampling=3)
    assert crown(root) == 0 and champion(root) == "3"
    assert "three (version 3) is champion of tessera-toy with generation/fd_toy 0.7" in capsys.readouterr().out
    assert registry.crown(client_of(root), EXPERIMENT, "generation/absent", True, 1.0) == 2


def test_versions_of_unequal_protocols_are_not_compared(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    evaluate(root, "one", 1.0, 0.1, 100, sampling=1)
    assert crown(root) == 0 and champion(root) == "1"
    evaluate(root, "two", 0.1, 0.01, 200, sampling=2)
    assert crown(root) == 2 and champion(root) == "1"
    told = capsys.readouterr()
    assert "num_images is 200 in two (version 2), 100 in one (version 1)" in told.out
    assert "one (version 1) is champion of tessera-toy, but cannot be compared with two (version 2)" in told.err
    assert crown(root, dismiss=True) == 0 and champion(root) == "2"


def test_what_a_process_takes_of_the_machine_is_seen_from_outside(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(load, "EVERY_SECONDS", 0.2)
    run = open_run(root, "train_prior@one")
    run.log(0, {"loss": 1.0})
    (seen,) = uploader.all_mirrors(root, {})
    seen.watch_load()
    until = time.monotonic() + 0.3
    while time.monotonic() < until:
        np.linalg.norm(np.ones(1000))
    seen.watch_load()
    run.log(1, {"loss": 0.5})
    run.close("FINISHED")
    points = [
        event["values"] for _, event in journal_module.events_of(run.folder / "journal.jsonl") if "values" in event
    ]
    assert [sorted(one) for one in (points[0], points[2])] == [["loss"], ["loss"]]
    assert points[1]["system/memory_usage_megabytes"] > 10
    assert points[1]["system/cpu_usage_percentage"] > 5
    seen.watch_load()
    assert (
        len(list(journal_module.events_of(run.folder / "journal.jsonl"))) == 6
    )  # one an empty line; none after the end
    assert load._family(2**30) == [] and os.getpid() == load._family(os.getpid())[0].pid

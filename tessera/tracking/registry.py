"""Evaluated systems as versions of one registered model per data set, and which of them is the champion.

A model in the registry is the two artifact folders (safetensors and JSON), the file served_model.py and a copy of the
package tessera, so that it can be served where this project is not installed. Nothing in it is a pickle.
"""

import importlib.metadata
import os
import shutil
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tessera.artifacts import folder as artifact
from tessera.artifacts.folder import ArtifactError

PACKAGE = Path(__file__).parents[1]
SERVED_MODEL = Path(__file__).with_name("served_model.py")
NEEDS = ("mlflow", "numpy", "pillow", "pydantic", "pyyaml", "safetensors", "torch")  # to serve it
EXAMPLE = {"labels": [0], "seed": 1}
DIGEST, SYSTEM, RUN = "tessera.digest", "tessera.system", "tessera.run_id"
UPLOAD_SECONDS = 120
DOUBT_SECONDS = 3.0
CHAMPION = "champion"


def register(client: Any, run_id: str, journal: Path, root: Path, offer: dict[str, Any], tags: dict[str, str]) -> str:
    """Make the offered model a version, unless there is one of the same artifacts and settings; then renew its tags.

    `journal`: the run's folder, `offer`: its event "model". Everything here may be repeated. Returns what was done.
    """
    tags = {**tags, DIGEST: offer["digest"], RUN: run_id}
    version = _version(client, offer)
    is_new = version is None or version.tags.get(RUN) == run_id
    if is_new and (journal / offer["place"]).is_dir() and _logged_models(client, run_id, offer["digest"]):
        # An earlier attempt was interrupted: a server that was frozen may be carrying it out at this moment
        time.sleep(DOUBT_SECONDS)
        version = _version(client, offer)
    if version is None:
        folders = {role: _folder(journal, root, offer, role, path) for role, path in offer["parts"].items()}
        with _environment(client.tracking_uri):
            model_id = _log_model(client, run_id, offer, folders)
            _require_registered_model(client, offer["name"])
            source = f"models:/{model_id}"
            client.create_model_version(offer["name"], source, run_id, tags, await_creation_for=60, model_id=model_id)
        version = _version(client, offer)
        done = f"{offer['name']} version {version.version} was registered"
    else:
        done = f"{offer['name']} version {version.version} has these artifacts already"
    for key, value in tags.items():
        if version.tags.get(key) != value:
            client.set_model_version_tag(offer["name"], version.version, key, value)
    shutil.rmtree(journal / offer["place"], ignore_errors=True)  # the registry has it now
    return done


def _version(client: Any, offer: dict[str, Any]) -> Any | None:
    """The version of this digest. A frozen server may have made it twice: keep the champion, or else the first one."""
    found = client.search_model_versions(f"name = '{offer['name']}' and tags.`{DIGEST}` = '{offer['digest']}'")
    if len(found) > 1:
        champion = _champion(client, offer["name"])  # a deleted version would take the alias along
        found = sorted(found, key=lambda version: (str(version.version) != champion, int(version.version)))
        for other in found[1:]:
            client.delete_model_version(other.name, other.version)
    return found[0] if found else None


def _logged_models(client: Any, run_id: str, digest: str) -> list[Any]:
    """Those with these artifacts, including the remains of interrupted attempts."""
    experiment = client.get_run(run_id).info.experiment_id
    return list(client.search_logged_models([experiment], f"tags.`{DIGEST}` = '{digest}'"))


def _folder(journal: Path, root: Path, offer: dict[str, Any], role: str, path: str) -> Path:
    """The verified artifact: linked beside the journal, or at its own path if that still holds the same one."""
    linked = journal / offer["place"] / role
    if linked.is_dir():
        return artifact.check(linked)
    if not (root / path / artifact.MANIFEST).is_file() or artifact.fingerprint(root / path) != offer["prints"][role]:
        raise ArtifactError(
            f"{path} is no longer what was evaluated, so the model is not registered again: "
            f"bring it back with git checkout and dvc checkout, then: python -m tessera.tracking replay --all"
        )
    return artifact.check(root / path)


def _require_registered_model(client: Any, name: str) -> None:
    from mlflow.exceptions import MlflowException

    try:
        client.create_registered_model(name, description=f"Image generators evaluated in experiment {name}.")
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise


def inputs() -> Any:
    """The schema of requests, one for all models: one or two of the first four are given, and the model says which it takes."""
    from mlflow.types import ColSpec, DataType, Schema
    from mlflow.types.schema import AnyType, Array

    return Schema(
        [
            ColSpec(Array(DataType.long), "labels", required=False),
            ColSpec(Array(DataType.string), "captions", required=False),
            ColSpec(Array(AnyType()), "attributes", required=False),  # objects with other keys in each
            ColSpec(Array(AnyType()), "embeddings", required=False),  # lists of numbers, whole ones among them
            ColSpec(DataType.double, "seed", required=False),  # a long one would silently become whole
            ColSpec(DataType.double, "guidance_scale", required=False),
        ]
    )


def _log_model(client: Any, run_id: str, offer: dict[str, Any], folders: dict[str, Path]) -> str:
    """The id of a logged model with these artifacts. Those whose upload was interrupted are replaced."""
    import mlflow
    from mlflow.entities import LoggedModelOutput
    from mlflow.models import Model, ModelSignature
    from mlflow.types import ColSpec, DataType, Schema
    from mlflow.types.schema import Array

    for found in _logged_models(client, run_id, offer["digest"]):
        if str(found.status) == "READY":
            return found.model_id
    run = client.get_run(run_id)
    system = run.data.tags.get(SYSTEM, run.info.run_name)
    tags = {DIGEST: offer["digest"], SYSTEM: system}
    model = client.create_logged_model(run.info.experiment_id, system, run_id, tags, run.data.params)
    outputs = [
        ColSpec(Array(DataType.string), "images"),
        ColSpec(DataType.long, "seed"),
        ColSpec(DataType.double, "guidance_scale", required=False),
    ]
    # MLflow would like to infer the signature that it is given, and has filters of its own: recorded, nothing is shown
    with tempfile.TemporaryDirectory() as temporary, warnings.catch_warnings(record=True):
        place, code = Path(temporary) / "model", Path(temporary) / "tessera"
        shutil.copytree(PACKAGE, code, ignore=shutil.ignore_patterns("__pycache__", "*.pyc"))
        mlflow.pyfunc.save_model(
            place,
            python_model=str(code / SERVED_MODEL.relative_to(PACKAGE)),
            artifacts={role: str(folder) for role, folder in folders.items()},
            code_paths=[str(code)],
            signature=ModelSignature(inputs(), Schema(outputs)),
            input_example=EXAMPLE,
            pip_requirements=[f"{name}=={importlib.metadata.version(name)}" for name in NEEDS],
            model_config={"sampling": offer["sampling"]},
            mlflow_model=Model(model.artifact_location, run_id, model_id=model.model_id, model_uuid=model.model_id),
        )
        client.log_model_artifacts(model.model_id, str(place))
    client.log_outputs(run_id, [LoggedModelOutput(model.model_id, step=0)])  # not of one that is to be replaced
    client.finalize_logged_model(model.model_id, "READY")
    for found in _logged_models(client, run_id, offer["digest"]):
        if str(found.status) != "READY":
            client.delete_logged_model(found.model_id)
    return model.model_id


@contextmanager
def _environment(tracking_uri: str) -> Iterator[None]:
    """For an upload: weights take longer than a line of a journal, and MLflow looks "models:/..." up where this says."""
    timeout = max(UPLOAD_SECONDS, int(os.environ.get("MLFLOW_HTTP_REQUEST_TIMEOUT", 0)))
    wanted = {"MLFLOW_HTTP_REQUEST_TIMEOUT": str(timeout), "MLFLOW_TRACKING_URI": tracking_uri}
    before = {key: os.environ.get(key) for key in wanted}
    os.environ.update(wanted)
    try:
        yield
    finally:
        for key, value in before.items():
            os.environ.pop(key)
            if value is not None:
                os.environ[key] = value


def crown(client: Any, name: str, metric: str, lower: bool, threshold: float, dismiss: bool = False) -> int:
    """Give the alias champion to the best version by one metric of samples, and say why. Returns the exit code.

    A version qualifies if it beats the threshold by more than noise and was measured by the protocol of the newest version;
    it becomes champion if it beats the present one by more than noise. A champion measured by another protocol cannot be
    compared: that is refused, unless `dismiss` takes the alias away first. Codes: 0 there is a champion or no version
    qualifies, 2 refused.
    """
    from tessera.evaluation.comparison import Estimate, estimate, exceeds_noise

    versions = sorted(
        client.search_model_versions(f"name = '{name}'"), key=lambda version: int(version.version), reverse=True
    )
    titles = {str(version.version): f"{version.tags.get(SYSTEM)} (version {version.version})" for version in versions}
    candidates = _candidates(client, versions, titles, metric)
    if not candidates:
        print(f"{name} has no version with the metric {metric}, so there is no champion by it.", file=sys.stderr)
        return 2
    newest, key = next(iter(candidates)), metric.rpartition("/")[2]
    estimates = {number: estimate([measured], key) for number, measured in candidates.items()}
    present = _champion(client, name)
    if present is not None and present not in estimates:
        if not dismiss:
            print(
                f"{titles.get(present, present)} is champion of {name}, but cannot be compared with {titles[newest]}: "
                f"evaluate it again as the others were, or give the option --dismiss to take the alias away from it.",
                file=sys.stderr,
            )
            return 2
        client.delete_registered_model_alias(name, CHAMPION)
        print(f"{titles.get(present, present)} is dismissed")
        present = None

    def better(a: Estimate, b: Estimate) -> bool:
        return (a.value < b.value if lower else a.value > b.value) and exceeds_noise(a, b)

    goal = Estimate(threshold, 0.0, 1)
    good = {number: one for number, one in estimates.items() if better(one, goal)}
    rule = f"{metric} {'below' if lower else 'above'} {threshold:g} by more than noise"
    if not good:
        closest = _first(estimates, lower)
        print(f"no version has {rule}; the best is {titles[closest]} with {_shown(estimates[closest])}")
        return 0
    best = _first(good, lower)
    if present is None:
        reason = f"it is the best of {len(good)} versions with {rule}"
    elif best == present:
        print(f"{titles[present]} stays champion: no version has a better {metric} than {_shown(estimates[present])}")
        return 0
    elif better(good[best], estimates[present]):
        reason = f"it beats {titles[present]} with {_shown(estimates[present])} by more than noise"
    else:
        print(
            f"{titles[present]} stays champion with {metric} {_shown(estimates[present])}: {titles[best]} with "
            f"{_shown(good[best])} is within the noise"
        )
        return 0
    client.set_registered_model_alias(name, CHAMPION, best)
    print(f"{titles[best]} is champion of {name} with {metric} {_shown(good[best])}: {reason}")
    return 0


def _candidates(client: Any, versions: list[Any], titles: dict[str, str], metric: str) -> dict[str, Any]:
    """The metric of each version, newest first, that was measured by the newest one's protocol; prints which are left out."""
    from tessera.evaluation.comparison import MixedProtocols, require_one_protocol

    known = {}
    for version in versions:
        measured = _measured(client, version, metric)
        if isinstance(measured, str):
            print(f"version {version.version} is left out: {measured}")
        else:
            known[str(version.version)] = measured
    newest = next(iter(known), None)
    alike = {}
    for number, measured in known.items():
        try:
            require_one_protocol({titles[newest]: [known[newest]], titles[number]: [measured]})
            alike[number] = measured
        except MixedProtocols as error:
            print(f"version {number} is left out: {error}")
    return alike


def _champion(client: Any, name: str) -> str | None:
    version = client.get_registered_model(name).aliases.get(CHAMPION)
    return None if version is None else str(version)  # a database says it as a number, a server as text


def _first(estimates: dict[str, Any], lower: bool) -> str:
    return min(estimates, key=lambda number: estimates[number].value * (1 if lower else -1))


def _measured(client: Any, version: Any, metric: str) -> Any:
    """The metric GROUP/NAME, with its protocol, from the run that evaluated a version; or why there is none."""
    from mlflow.exceptions import MlflowException

    from tessera.evaluation import figures

    group, _, key = metric.partition("/")
    try:
        with tempfile.TemporaryDirectory() as place:
            path = client.download_artifacts(version.tags.get(RUN, version.run_id), "metrics.json", place)
            measured = figures.read(Path(path))
    except (MlflowException, OSError, ValueError) as error:
        return f"the metrics of its run cannot be read ({str(error).splitlines()[0]})"
    if key not in measured.groups.get(group, {}):
        return f"it has no metric {metric}"
    return measured.model_copy(update={"groups": {group: {key: measured.groups[group][key]}}})


def _shown(one: Any) -> str:
    from tessera.evaluation.figures import text_with_error

    return text_with_error(one.value, one.standard_error)

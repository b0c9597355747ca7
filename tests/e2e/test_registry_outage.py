"""A server that freezes or is killed in the middle of a registration: in the end there is one version, whole and loadable."""

import contextlib
import hashlib
import json
import re
import signal
import socket
import socketserver
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from mlflow_server import Server, environment

from tessera.artifacts import checkpoints
from tessera.artifacts import folder as artifact
from tessera.components import load, parse
from tessera.contracts import ImageSpec, TokenSpec
from tessera.tracking import journal as journal_module
from tessera.tracking import registry, uploader

pytestmark = pytest.mark.e2e(seconds=110)
NAME = "tessera-toy"


class Between(socketserver.ThreadingTCPServer):
    """Relays to a server, and does harm once, when a request comes by that begins as `moment` says."""

    daemon_threads = True

    def __init__(self, server: Server) -> None:
        super().__init__(("127.0.0.1", 0), Relay)
        self.mlflow, self.uri = server, f"http://127.0.0.1:{self.server_address[1]}"
        self.moment, self.harm, self.seconds = b"", "", 0.0
        threading.Thread(target=self.serve_forever, daemon=True).start()

    def harm_now(self, data: bytes) -> str:
        """ "" but once."""
        if not self.harm or not re.match(self.moment, data):
            return ""
        harm, self.harm = self.harm, ""
        return harm


class Relay(socketserver.BaseRequestHandler):
    server: Between

    def handle(self) -> None:
        mlflow, self.is_last = self.server.mlflow, False
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", mlflow.port)) as there:
            threading.Thread(target=self.bring_answers, args=(there,), daemon=True).start()
            while data := self.request.recv(65536):
                harm = self.server.harm_now(data)
                self.is_last |= harm == "killed before it answers"
                if harm == "killed":
                    mlflow.signal(signal.SIGKILL)
                there.sendall(data)
                if harm == "frozen":  # it keeps what is sent, and carries it out when it wakes up
                    mlflow.signal(signal.SIGSTOP)
                    threading.Timer(self.server.seconds, mlflow.signal, (signal.SIGCONT,)).start()

    def bring_answers(self, there: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := there.recv(65536):
                if self.is_last:
                    self.server.mlflow.signal(signal.SIGKILL)
                    break
                self.request.sendall(data)
        with contextlib.suppress(OSError):
            self.request.shutdown(socket.SHUT_RDWR)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    server = Server(tmp_path_factory.mktemp("server"))
    server.begin()
    try:
        yield server
    finally:
        if server.process.poll() is None:
            server.signal(signal.SIGKILL)


@pytest.fixture
def between(server: Server, monkeypatch: pytest.MonkeyPatch) -> Iterator[Between]:
    if server.process.poll() is not None:
        server.begin()
    server.wait()
    for name in ("TESSERA_REGISTRY", "TESSERA_PARENT_RUN", "MLFLOW_RUN_ID"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(registry, "UPLOAD_SECONDS", 1)  # then a request is given up after the 2 seconds of all others
    with Between(server) as between:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", between.uri)
        monkeypatch.setenv("TESSERA_TRACKING", "on")
        yield between
        between.shutdown()


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A tokenizer and a prior that can draw, though nobody trained them."""
    torch.manual_seed(0)
    folder, training = tmp_path_factory.mktemp("artifacts"), {"num_steps": 1}
    spec = ImageSpec(name="toy", channels=1, height=8, width=8, num_classes=1, class_names=("a",), licence="none")
    module = load("tokenizers", "vqvae")
    quantizer = {"kind": "vector", "codebook_size": 16, "code_dim": 4}
    sizes = {"quantizer": quantizer, "patch_size": 2, "channels": 8, "num_blocks": 1}
    config = parse(module.Config, {"kind": "vqvae", "training": training, **sizes})
    tokenizer = module.Model(config, spec)
    with artifact.create(folder / "tokenizer") as place:
        checkpoints.save(place, "tokenizers", config, spec, tokenizer, "code")
    tokens = TokenSpec(
        codebook_size=16,
        latent_shape=tokenizer.latent_shape,
        index_grid=tokenizer.latent_shape[1:],
        num_classes=1,
        class_counts=(1,),
        latent_mean=(0.0,) * 4,
        latent_std=(1.0,) * 4,
        tokenizer_fingerprint=artifact.fingerprint(folder / "tokenizer"),
    )
    module = load("priors", "autoregressive")
    config = parse(module.Config, {"kind": "autoregressive", "training": training, "width": 8, "depth": 1, "heads": 1})
    with artifact.create(folder / "prior") as place:
        checkpoints.save(place, "priors", config, tokens, module.Model(config, tokens), "code")
    return {role: folder / role for role in ("tokenizer", "prior")}


def offer(root: Path, parts: dict[str, Path], name: str) -> str:
    """As stages.evaluate does; the digest of what is offered."""
    digest = hashlib.sha256(name.encode()).hexdigest()
    prints = {role: artifact.fingerprint(path) for role, path in parts.items()}
    tags = {"tessera.system": name, "tessera.seconds": "60.0"}
    with journal_module.open_run(
        name, experiment=NAME, root=root, state=None, params={}, tags=tags, kind="system"
    ) as run:
        run.offer_model(NAME, parts, prints, {"guidance_scale": 1.0}, digest)
    return digest


def check_whole(server: Server, parts: dict[str, Path], digest: str, place: Path) -> None:
    """One version, of one logged model, with every file of the artifacts and of the package."""
    from mlflow import MlflowClient

    client = MlflowClient(server.uri)
    (version,) = client.search_model_versions(f"name = '{NAME}' and tags.`tessera.digest` = '{digest}'")
    experiments = [client.get_experiment_by_name(NAME).experiment_id]
    (model,) = client.search_logged_models(experiments, f"tags.`tessera.digest` = '{digest}'")
    assert (version.source, str(model.status)) == (f"models:/{model.model_id}", "READY")
    run = client.get_run(version.run_id)
    assert ([output.model_id for output in run.outputs.model_outputs], run.info.status) == (
        [model.model_id],
        "FINISHED",
    )
    assert run.info.end_time - run.info.start_time >= 60_000  # how long its stages took, before it was opened
    assert [
        one.info.run_id for one in client.search_runs(experiments, f"tags.`tessera.system` = '{run.info.run_name}'")
    ] == [version.run_id]
    address = model.artifact_location.replace("mlflow-artifacts:", "")
    stored = server.folder / address.lstrip("/")
    for role, path in parts.items():
        assert artifact.fingerprint(artifact.check(stored / "artifacts" / role)) == artifact.fingerprint(path)
    package = Path(registry.__file__).parents[1]
    source = {path.relative_to(package): path.read_bytes() for path in package.rglob("*.py")}
    code = stored / "code" / "tessera"
    assert {path.relative_to(code): path.read_bytes() for path in code.rglob("*.py")} == source


MOMENTS = [
    ("killed", b"PUT .*prior/weights", 0),
    ("killed before it answers", b"POST .*model-versions/create", 0),
    ("frozen", b"POST .*logged-models HTTP", 3.0),
    ("frozen", b"PATCH .*logged-models", 3.0),
    ("frozen", b"POST .*model-versions/create", 5.0),
]


@pytest.mark.parametrize(("harm", "moment", "seconds"), MOMENTS, ids=[f"{how}-{at.decode()}" for how, at, _ in MOMENTS])
def test_a_registration_that_the_server_breaks_off_becomes_one_whole_version(
    between: Between, parts: dict[str, Path], tmp_path: Path, harm: str, moment: bytes, seconds: float
) -> None:
    server = between.mlflow
    between.harm, between.moment, between.seconds = harm, moment, seconds
    name = f"system-{MOMENTS.index((harm, moment, seconds))}"
    digest = offer(tmp_path, parts, name)
    _, trouble = uploader._push_all(tmp_path, uploader.all_mirrors(tmp_path, {}), None)
    assert between.harm == ""  # it was done
    if harm != "frozen":
        assert "did not take run" in trouble
        server.start()
    assert uploader.replay(tmp_path, 60) == 0
    check_whole(server, parts, digest, tmp_path)


LOAD = """
import json, sys
import mlflow
from mlflow import MlflowClient
drawn = {}
for version in MlflowClient().search_model_versions(f"name = '{sys.argv[1]}'"):
    model = mlflow.pyfunc.load_model(f"models:/{version.name}/{version.version}")
    drawn[version.tags["tessera.system"]] = model.predict({"labels": [0, 0], "seed": 1})["images"]
print(json.dumps(drawn))
"""


def test_every_version_can_be_loaded_where_the_project_is_not(
    between: Between, parts: dict[str, Path], tmp_path: Path
) -> None:
    offer(tmp_path, parts, "unharmed")
    assert uploader.replay(tmp_path, 60) == 0
    kept = environment(between.mlflow.uri)
    del kept["PYTHONPATH"]
    done = subprocess.run(
        [sys.executable, "-c", LOAD, NAME], cwd=tmp_path, env=kept, capture_output=True, text=True, timeout=200
    )
    assert done.returncode == 0, done.stderr
    drawn: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    assert len(drawn["unharmed"]) == 2
    assert set(map(str, drawn.values())) == {str(drawn["unharmed"])}  # the same artifacts draw the same images

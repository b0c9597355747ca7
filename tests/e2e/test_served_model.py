"""From tiny trainings to images over HTTP: evaluated, registered, crowned, served by MLflow."""

import base64
import io
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from PIL import Image

from stages import (
    encode_tokens,
    evaluate,
    evaluate_tokenizer,
    prepare_images,
    reference_stats,
    sample_images,
    train_features,
    train_prior,
    train_tokenizer,
)
from tessera import seeding
from tessera.components import parse
from tessera.params import Pipeline
from tessera.running import publish
from tessera.running.job import Job
from tessera.system import System

pytestmark = pytest.mark.e2e(seconds=80)
ROOT = Path(__file__).parents[2]
TRAINING = {"num_steps": 60, "batch_size": 16, "learning_rate": 0.01}
GUIDANCE = 2.0


def tiny_params() -> Pipeline:
    values = yaml.safe_load((ROOT / "params.yaml").read_text())
    values["dataset"]["source"] = str(ROOT / "requirements.lock")
    values["features"]["classifier"] |= {"channels": 8, "training": TRAINING}
    tokenizer = values["tokenizers"]["vqvae"] | {"channels": 8, "num_blocks": 1, "training": TRAINING}
    tokenizer["quantizer"] |= {"codebook_size": 32, "init_step": 1}
    values["tokenizers"] = {"vqvae": tokenizer}
    values["encode_tokens"]["warps"] = 0
    flow = values["systems"]["vqgan-flow"]
    flow["prior"]["denoiser"] |= {"channels": 8, "num_blocks": 1}
    flow["prior"]["training"] = TRAINING
    values["systems"] = {
        "flow": flow | {"tokenizer": "vqvae", "sampling": {"guidance_scale": GUIDANCE, "num_steps": 2}}
    }
    values["sample_images"] = {"num_images": 60, "batch_size": 60}
    return parse(Pipeline, values)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkout in which one system was trained, drawn and evaluated, by the stages."""
    root = tmp_path_factory.mktemp("checkout")
    data, params = root / "data", tiny_params()

    def job(name: str) -> Job:
        return Job(name, root / ".state" / name)

    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        patch.setattr(publish, "ROOT", root)
        prepare_images.run(params, data / "images", job("images"))
        seen = {"images": data / "images", "features": data / "features", "reference": data / "reference"}
        of_features = (data / "images", data / "features" / "classifier", data / "f.csv", data / "f.json")
        train_features.run(params, "classifier", *of_features, job("features"))
        reference_stats.run(
            params, "classifier", data / "images", data / "features" / "classifier", data / "reference" / "classifier",
            job("reference"),
        )  # fmt: skip
        tokenizer, tokens, prior, samples = (Path("data", name) for name in ("tokenizer", "tokens", "prior", "samples"))
        train_tokenizer.run(params, "vqvae", data / "images", tokenizer, data / "t.csv", job("tokenizer"))
        encode_tokens.run(params, "vqvae", data / "images", tokenizer, tokens, job("tokens"))
        evaluate_tokenizer.run(
            params, "vqvae", **seen, tokenizer=tokenizer, tokens=tokens, picture=data / "r.png",
            codebook_uses=data / "c.csv", metrics=data / "t.json", job=job("evaluate_tokenizer"),
        )  # fmt: skip
        files = (data / "p.csv", data / "p.json")
        train_prior.run(params, "flow", data / "images", tokenizer, tokens, prior, *files, job("prior"))
        sample_images.run(params, "flow", tokenizer, prior, samples, data / "s.png", job("samples"))
        patch.setenv("TESSERA_TRACKING", "on")
        evaluate.run(
            params, "flow", **seen, samples=samples, tokenizer=tokenizer, prior=prior, metrics=data / "s.json",
            tokenizer_metrics=data / "t.json", prior_metrics=data / "p.json", picture=data / "s.png",
            neighbors=data / "n.png", job=job("evaluate"),
        )  # fmt: skip
    return root


def environment(root: Path, **more: str) -> dict[str, str]:
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("MLFLOW_", "TESSERA_"))}
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"  # mlflow calls uvicorn by name
    quiet = {"MLFLOW_DISABLE_TELEMETRY": "true", "DO_NOT_TRACK": "1", "OMP_NUM_THREADS": "1"}
    return {**kept, "PATH": path, **quiet, **more}


def track(root: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "tessera.tracking", *arguments, "--root", str(root)]
    here = environment(root, PYTHONPATH=str(ROOT))
    return subprocess.run(command, cwd=root, env=here, capture_output=True, text=True, timeout=300)


class Client:
    def __init__(self, port: int):
        self.address = f"http://127.0.0.1:{port}"

    def answers(self) -> bool:
        try:
            return urllib.request.urlopen(f"{self.address}/health", timeout=2).status == 200
        except (urllib.error.URLError, OSError):
            return False

    def ask(self, body: Any, kind: str = "application/json") -> tuple[int, str]:
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        request = urllib.request.Request(f"{self.address}/invocations", data, {"Content-Type": kind})
        try:
            with urllib.request.urlopen(request, timeout=120) as answer:
                return answer.status, answer.read().decode()
        except urllib.error.HTTPError as error:
            return error.code, error.read().decode()

    def images(self, **inputs: Any) -> list[str]:
        code, text = self.ask({"inputs": inputs})
        assert code == 200, text
        return json.loads(text)["predictions"]["images"]


@pytest.fixture(scope="module")
def client(root: Path) -> Client:
    sent = track(root, "replay", "--timeout", "200")
    assert sent.returncode == 0 and sent.stdout.endswith("; 0 left\n"), sent.stderr
    logged = [path for path in (root / "mlruns").rglob("*") if path.is_file()]
    assert {"weights.safetensors", "served_model.py"} <= {path.name for path in logged}
    assert not [path for path in logged if path.suffix in (".pkl", ".pickle", ".pyc", ".pt")]
    by = "--metric", "generation/fd_classifier", "--lower", "--threshold", "1e9", "--dataset", "digits"
    crowned = track(root, "champion", *by)
    assert crowned.returncode == 0, crowned.stderr
    assert "flow (version 1) is champion of tessera-digits" in crowned.stdout
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    elsewhere = root / "elsewhere"  # where nothing but the environment is: the model brings its own code
    elsewhere.mkdir()
    command = [sys.executable, "-m", "mlflow", "models", "serve", "-m", "models:/tessera-digits@champion"]
    command += ["--env-manager", "local", "--host", "127.0.0.1", "--port", str(port)]
    with (root / "serve.log").open("w") as log:
        server = subprocess.Popen(
            command,
            cwd=elsewhere,
            env=environment(root, MLFLOW_TRACKING_URI=f"sqlite:///{root}/mlflow.db"),
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
    try:
        client = Client(port)
        deadline = time.monotonic() + 240
        while not client.answers():
            assert server.poll() is None and time.monotonic() < deadline, (root / "serve.log").read_text()[-3000:]
            time.sleep(0.2)
        yield client
    finally:
        os.killpg(server.pid, signal.SIGKILL)
        server.wait(10)


def decoded(png: str) -> np.ndarray:
    return np.array(Image.open(io.BytesIO(base64.b64decode(png))))


def test_an_equal_request_gets_equal_bytes_and_another_seed_other_images(root: Path, client: Client) -> None:
    labels = [3, 5, 3]
    first = client.images(labels=labels, seed=1, guidance_scale=2.0)
    assert client.images(labels=labels, seed=1, guidance_scale=2.0) == first
    assert client.images(labels=labels, seed=1) == first  # 2.0 is what was evaluated
    assert client.images(labels=labels, seed=2, guidance_scale=2.0) != first
    assert client.images(labels=labels, seed=1, guidance_scale=20.0) != first
    assert [decoded(png).shape for png in first] == [(8, 8)] * 3
    system = System.read(root / "data" / "tokenizer", root / "data" / "prior")
    settings = tiny_params().sampling("flow")
    direct = system.draw(np.array(labels), settings, seeding.generator(1, "serve"))
    assert np.abs(direct[:, 0].astype(int) - np.stack([decoded(png) for png in first])).max() <= 1


REFUSED = [
    ({"labels": [10]}, "labels: 10 was given, expected a whole number from 0 to 9"),
    ({"labels": []}, "labels has 0 entries, expected 1 to 64"),
    ({"labels": [1] * 65}, "labels has 65 entries, expected 1 to 64"),
    ({"labels": [1], "seed": 1.5}, "seed: 1.5 was given, expected a whole number from 0 to 4294967295"),
    ({"labels": [1], "seed": -1}, "seed: -1 was given, expected a whole number from 0 to 4294967295"),
    ({"labels": [1], "guidance_scale": 20.5}, "guidance_scale is 20.5, expected 0 to 20"),
    ({"labels": [1], "guidance_scale": None}, "guidance_scale is nan, expected 0 to 20"),
    ({"labels": ["one"]}, None),  # these MLflow refuses by the signature, in its own words
    ({"labels": 3}, None),
    ({"labels": [1.5]}, None),
    ({"labels": None}, None),
    ({"seed": 1}, None),
    ("", None),
    ([{"labels": [1]}, {"labels": [2]}], "Got 2 requests in one, expected one: put all labels into one list"),
]


@pytest.mark.parametrize(("inputs", "sentence"), REFUSED, ids=[str(inputs)[:40] for inputs, _ in REFUSED])
def test_a_bad_request_gets_400_and_a_sentence(client: Client, inputs: Any, sentence: str | None) -> None:
    code, text = client.ask({"inputs": inputs})
    assert code == 400 and "Traceback" not in text, text
    assert sentence in (None, json.loads(text)["message"])


@pytest.mark.parametrize("body", [b"", b"{", b"\xff", b"[]", b'{"labels": [1]}', b"a,b\n1,2"])
def test_what_is_no_request_gets_400_and_no_trace(client: Client, body: bytes) -> None:
    for kind in ("application/json", "text/csv"):
        code, text = client.ask(body, kind)
        assert code == 400 and "Traceback" not in text and "stack_trace" not in text, text


def test_a_hundred_requests_at_once_are_answered(root: Path, client: Client) -> None:
    wanted = [{"labels": [number % 10] * 8, "seed": number} for number in range(100)]
    began = time.monotonic()
    with ThreadPoolExecutor(100) as pool:
        found = list(pool.map(lambda inputs: client.images(**inputs), wanted))
    served = 800 / (time.monotonic() - began)
    assert [len(images) for images in found] == [8] * 100
    for number in (0, 57, 99):  # in the crowd as alone
        assert client.images(**wanted[number]) == found[number]
    system, settings = (
        System.read(root / "data" / "tokenizer", root / "data" / "prior"),
        tiny_params().sampling("flow"),
    )
    began = time.monotonic()
    for inputs in wanted:
        system.draw(np.array(inputs["labels"]), settings, seeding.generator(inputs["seed"], "serve"))
    print(f"images per second: {served:.0f} served, {800 / (time.monotonic() - began):.0f} by direct calls")


def test_sending_everything_again_makes_no_second_version(root: Path, client: Client) -> None:
    assert track(root, "replay", "--all").returncode == 0
    from mlflow import MlflowClient

    found = MlflowClient(f"sqlite:///{root}/mlflow.db").search_model_versions("name = 'tessera-digits'")
    assert [str(version.version) for version in found] == ["1"]
    # .pyc: the server, which runs the code where it lies; what is logged has none, see `client`
    assert not [path for path in (root / "mlruns").rglob("*") if path.suffix in (".pkl", ".pickle", ".pt")]

"""From tiny trainings to images over HTTP: evaluated, registered, crowned, served by MLflow."""

import base64
import contextlib
import http.client
import io
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import yaml
from foreign_host import answer, check_names
from hostile_requests import JSON, hostile
from in_process import Stages
from PIL import Image

from tessera import seeding
from tessera.components import parse
from tessera.params import Pipeline
from tessera.running import publish
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
    stages = Stages(tiny_params(), Path())
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        patch.setattr(publish, "ROOT", root)
        stages.tokenize("vqvae")
        stages.run("train_prior@flow", "sample_images@flow")
        patch.setenv("TESSERA_TRACKING", "on")
        stages.run("evaluate@flow")
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
    def __init__(self, port: int, pid: int):
        self.port, self.process = port, psutil.Process(pid)

    def answers(self) -> bool:
        with contextlib.suppress(OSError):
            return self.send("GET", "/health")[0] == 200
        return False

    def send(
        self, method: str, path: str, body: bytes = b"", headers: dict[str, str] | None = None, seconds: float = 120
    ) -> tuple[int, str, dict[str, str]]:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=seconds)
        with contextlib.closing(connection):
            connection.request(method, path, body, headers or {})
            answer = connection.getresponse()
            return answer.status, answer.read().decode(), {key.lower(): value for key, value in answer.getheaders()}

    def ask(self, body: Any, kind: str = "application/json") -> tuple[int, str]:
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        return self.send("POST", "/invocations", data, {"Content-Type": kind})[:2]

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
    elsewhere = root / "elsewhere"  # where nothing but what serves is: the model brings its own code
    shutil.copytree(ROOT / "serving", elsewhere / "serving")
    command = [sys.executable, "-m", "serving.images", "models:/tessera-digits@champion", "--port", str(port)]
    with (root / "serve.log").open("w") as log:
        server = subprocess.Popen(
            command,
            cwd=elsewhere,
            env=environment(
                root, MLFLOW_TRACKING_URI=f"sqlite:///{root}/mlflow.db", TESSERA_ALLOWED_HOSTS="gpu7, *.tessera.example"
            ),
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
    try:
        client = Client(port, server.pid)
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
    system = System.read(root / "data/tokenizers/vqvae", root / "data/priors/flow")
    settings = tiny_params().sampling("flow")
    direct = system.draw(np.array(labels), settings, seeding.generator(1, "serve", device=system.device))
    assert np.abs(direct[:, 0].astype(int) - np.stack([decoded(png) for png in first])).max() <= 1


EXAMPLE = '{"inputs": {"labels": [3, 5], "seed": 1}}'
WORDED = '{"inputs": {"captions": ["a blue heart"], "seed": 1}}'
MISSING = (
    f"labels is missing: expected {EXAMPLE}, or, of a model that was told captions, {WORDED}, attributes or embeddings"
)
KEYS = "labels, captions, attributes, embeddings, seed, guidance_scale"
ON_LABELS = (
    "this system was trained on labels, not on {}: expected labels, or a system whose prior has condition: {{kind: {}}}"
)
REFUSED = [
    ({"labels": [10]}, "labels: 10 was given, expected a whole number from 0 to 9"),
    ({"labels": []}, "labels has 0 entries, expected 1 to 64"),
    ({"labels": [1] * 65}, "labels has 65 entries, expected 1 to 64"),
    ({"labels": [1], "seed": 1.5}, "seed: 1.5 was given, expected a whole number from 0 to 4294967295"),
    ({"labels": [1], "seed": -1}, "seed: -1 was given, expected a whole number from 0 to 4294967295"),
    ({"labels": [1], "guidance_scale": 20.5}, "guidance_scale is 20.5, expected 0 to 20"),
    ({"labels": [1], "guidance_scale": None}, "guidance_scale is nan, expected 0 to 20"),
    ({"labels": ["one"]}, f"labels[0] is 'one': Input should be a valid integer; expected {EXAMPLE}"),
    ({"labels": 3}, f"labels is 3: Input should be a valid list; expected {EXAMPLE}"),
    ({"labels": [1.5]}, f"labels[0] is 1.5: Input should be a valid integer; expected {EXAMPLE}"),
    ({"labels": None}, MISSING),
    ({"seed": 1}, MISSING),
    ({"labels": [1], "captions": None}, "captions is null: leave it out"),
    ({"captions": [3]}, f"captions[0] is 3: Input should be a valid string; expected {EXAMPLE}"),
    ({"captions": ["three"]}, ON_LABELS.format("captions", "caption")),
    ({"attributes": [{"size": 3.0}]}, ON_LABELS.format("attributes", "attributes")),
    ({"attributes": [{"size": 3}, {"style": None}, {}]}, ON_LABELS.format("attributes", "attributes")),
    ({"embeddings": [[1, 0], [0, 1]], "labels": [3, 5]}, ON_LABELS.format("embeddings", "embedding")),
    ({"embeddings": [[1.5, 0.0]], "seed": 1}, ON_LABELS.format("embeddings", "embedding")),
    ({"embeddings": [[1, 0], [1]]}, "embeddings have 1 to 2 numbers: expected equally many in each"),
    ({"embeddings": [["1"]]}, f"embeddings[0][0] is '1': Input should be a valid number; expected {EXAMPLE}"),
    ({"attributes": [3]}, f"attributes[0] is 3: Input should be a valid dictionary; expected {EXAMPLE}"),
    (
        {"attributes": [{}], "captions": ["a"]},
        "captions and attributes are given: expected those that the model was told",
    ),
    ({"attributes": []}, "attributes has 0 entries, expected 1 to 64"),
    ({"attributes": [{}] * 65}, "attributes has 65 entries, expected 1 to 64"),
    ("", f"inputs has no names: expected {EXAMPLE}"),
    ({"labels": [1], "temperature": 1}, f"Unknown: temperature; expected {KEYS}"),
    (
        {"labels": [1], "num_steps": 10**9, "labels2": [1]},
        f"Unknown: num_steps, labels2; expected {KEYS}",
    ),
    ([{"labels": [1]}, {"labels": [2]}], "Got 2 requests in one, expected one: put all labels into one list"),
]


@pytest.mark.parametrize(("inputs", "sentence"), REFUSED, ids=[str(inputs)[:40] for inputs, _ in REFUSED])
def test_a_bad_request_gets_400_and_a_sentence(client: Client, inputs: Any, sentence: str) -> None:
    code, text = client.ask({"inputs": inputs})
    assert (code, json.loads(text)["message"]) == (400, sentence)


def test_every_form_of_a_table_in_json_means_the_same(client: Client) -> None:
    row = {"labels": [3, 5], "seed": 1}
    forms = {
        "inputs": [row],
        "instances": row,
        "dataframe_records": [row],
        "dataframe_split": {"columns": list(row), "data": [list(row.values())]},
    }
    images = client.images(**row)
    for form, table in forms.items():
        code, text = client.ask({form: table})
        assert code == 200 and json.loads(text)["predictions"]["images"] == images, form


def test_no_hostile_request_gets_more_than_a_sentence(root: Path, client: Client) -> None:
    requests = hostile()
    assert len(requests) >= 75
    for name, headers, body in requests:
        began = time.monotonic()
        code, text, _ = client.send("POST", "/invocations", body, headers)
        assert 400 <= code < 500 and time.monotonic() - began < 5, (name, code, text)
        assert not {"Traceback", "stack_trace"} & set(re.findall(r"\w+", text)) and len(text) < 400, (name, text)
    assert "Traceback" not in (root / "serve.log").read_text()


def test_a_body_that_is_too_large_is_refused_before_it_has_arrived(client: Client) -> None:
    with socket.create_connection(("127.0.0.1", client.port), timeout=30) as asking:
        head = "POST /invocations HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        asking.sendall(f"{head}Transfer-Encoding: chunked\r\n\r\n".encode() + b"11000\r\n" + b" " * 0x11000)
        assert asking.recv(65536).startswith(b"HTTP/1.1 413 ")  # while the last chunk is still to come


def test_names_of_strangers_are_refused(client: Client) -> None:
    check_names(client.port, "/invocations", json.dumps({"inputs": {"labels": [3]}}))
    known = [
        answer(client.port, host, "/version")[0]
        for host in ("gpu7:443", "a.tessera.example", "gpu8", "tessera.example")
    ]
    assert known == [200, 200, 400, 400]


def test_of_a_crowd_as_many_wait_as_may_and_the_others_are_told_to_come_back(root: Path, client: Client) -> None:
    wanted = [{"labels": [number % 10] * 8, "seed": number} for number in range(200)]
    client.images(**wanted[0])
    before = client.process.memory_info().rss

    def ask(inputs: dict[str, Any]) -> tuple[int, str, dict[str, str]]:
        return client.send("POST", "/invocations", json.dumps({"inputs": inputs}).encode(), JSON)

    with ThreadPoolExecutor(200) as pool:
        found = list(pool.map(ask, wanted))
    codes = [code for code, _, _ in found]
    assert set(codes) == {200, 503} and codes.count(200) >= 33  # one is answered, 32 wait
    assert all(int(headers["retry-after"]) > 0 for code, _, headers in found if code == 503)
    for inputs, (code, text, _) in zip(wanted, found, strict=True):  # in the crowd as alone
        if code == 200 and inputs["seed"] % 5 == 0:
            assert json.loads(text)["predictions"]["images"] == client.images(**inputs)
    assert client.process.memory_info().rss < 1.1 * before


def test_sending_everything_again_makes_no_second_version(root: Path, client: Client) -> None:
    assert track(root, "replay", "--all").returncode == 0
    from mlflow import MlflowClient

    found = MlflowClient(f"sqlite:///{root}/mlflow.db").search_model_versions("name = 'tessera-digits'")
    assert [str(version.version) for version in found] == ["1"]
    # .pyc: the server, which runs the code where it lies; what is logged has none, see `client`
    assert not [path for path in (root / "mlruns").rglob("*") if path.suffix in (".pkl", ".pickle", ".pt")]

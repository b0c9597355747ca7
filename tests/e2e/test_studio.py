"""The studio's page: what it draws, edits and refuses, in a browser and by twenty requests at once."""

import base64
import contextlib
import html
import http.client
import io
import json
import os
import re
import shlex
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import yaml
from foreign_host import check_names
from hostile_requests import JSON, hostile
from in_process import Stages
from PIL import Image, ImageDraw
from starlette.exceptions import HTTPException

from studio import edit
from studio.actions import KEPT, MAX_LAYERS, Studio, for_painting, mask_of, painted_layers
from studio.figures import table
from tessera.artifacts import pictures
from tessera.components import kinds, parse
from tessera.params import Pipeline
from tessera.running import publish

pytestmark = pytest.mark.e2e(seconds=100)
ROOT = Path(__file__).parents[2]
TRAINING = {"num_steps": 60, "batch_size": 16, "learning_rate": 0.01}
PATIENCE = 120  # seconds for an answer, on a busy machine


def tiny_params() -> dict[str, Any]:
    values = yaml.safe_load((ROOT / "params.yaml").read_text())
    values["dataset"]["source"] = str(ROOT / "requirements.lock")
    tokenizer = values["tokenizers"]["vqvae"] | {"channels": 8, "num_blocks": 1, "training": TRAINING}
    tokenizer["quantizer"] |= {"codebook_size": 32, "init_step": 1}
    values["tokenizers"] = {"vqvae": tokenizer, "none": values["tokenizers"]["none"]}
    values["encode_tokens"]["warps"] = 0
    flow, masked = values["systems"]["vqgan-flow"], values["systems"]["vqgan-masked"]
    flow["prior"]["denoiser"] |= {"channels": 8, "num_blocks": 1}
    masked["prior"] |= {"width": 24, "depth": 1, "heads": 2}
    for system in (flow, masked):
        system["prior"]["training"] = TRAINING
        system["tokenizer"] = "vqvae"
    flow["prior"]["guide"] = {"snapshot_at": 0.5}
    flow["sampling"] = {"guidance_scale": 1.5, "num_steps": 3}
    masked["sampling"] = {"guidance_scale": 1.5, "decoding_steps": 3}
    gan = values["systems"]["gan"]
    gan["prior"] |= {"channels": 8, "num_blocks": 1, "training": TRAINING}
    edges = {"kind": "image", "shows": "edges", "pixels": [8, 8], "patch_size": 4, "width": 16, "depth": 1}
    of_edges = flow["prior"] | {"num_views": 1, "condition": edges}
    painted = {**flow, "prior": {key: value for key, value in of_edges.items() if key != "guide"}}
    values["systems"] = {"gan": gan, "masked": masked, "flow": flow, "untrained": flow, "painted": painted}
    return values


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkout in which four of five systems are trained, by the stages."""
    root = tmp_path_factory.mktemp("checkout")
    values = tiny_params()
    (root / "params.yaml").write_text(yaml.safe_dump(values, sort_keys=False))
    stages = Stages(parse(Pipeline, values), root)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        patch.setattr(publish, "ROOT", root)
        stages.run("prepare_images")
        for used, names in {"vqvae": ("masked", "flow", "painted"), "none": ("gan",)}.items():
            stages.run(f"train_tokenizer@{used}", f"encode_tokens@{used}", *(f"train_prior@{name}" for name in names))
    return root


@pytest.fixture(scope="module")
def studio(root: Path) -> Studio:
    return Studio(root)


def start(root: Path, port: int, **options: Any) -> subprocess.Popen[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "studio.page", "--port", str(port)]
    return subprocess.Popen(command, cwd=root, env=environment, text=True, **options)


@pytest.fixture(scope="module")
def address(root: Path) -> Iterator[str]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with (root / "studio.log").open("w") as log:
        server = start(root, port, stdout=subprocess.PIPE, stderr=log)
    try:
        assert server.stdout.readline() == f"Tessera studio: http://127.0.0.1:{port} (Ctrl-C ends it)\n", (
            root / "studio.log"
        ).read_text()
        yield f"http://127.0.0.1:{port}"
        told = (root / "studio.log").read_text()
        assert server.poll() is None and told.count("Traceback") == told.count("InvalidPathError: Cannot move"), told
    finally:
        server.kill()
        server.wait(10)


def run(command: str, root: Path, patch: pytest.MonkeyPatch, out: Path) -> np.ndarray:
    """What the command that the studio shows writes, with another name for its output."""
    words = shlex.split(command)
    assert words[:3] == ["python", "-m", "studio.edit"] and words[-1] == "out.png"
    patch.chdir(root)
    assert edit.main([*words[3:-1], str(out)]) == 0
    return np.asarray(Image.open(out))


def images_in(text: str) -> np.ndarray:
    """(B, C, H, W) the images of the page's HTML."""
    found = re.findall(r"data:image/png;base64,([^\"]+)", text)
    return np.stack([np.asarray(Image.open(io.BytesIO(base64.b64decode(data)))) for data in found])[:, None]


def test_only_trained_systems_are_offered_the_most_able_first_with_only_the_knobs_they_have(studio: Studio) -> None:
    assert studio.names == ["masked", "flow", "painted", "gan"]
    assert {name: knob.key for name, knob in studio.knobs("masked").items()} == {
        "guidance": "guidance_scale", "temperature": "temperature", "steps": "decoding_steps",
    }  # fmt: skip
    assert {name: tuple(knob) for name, knob in studio.knobs("flow").items()} == {
        "guidance": ("guidance_scale", 1.5), "steps": ("num_steps", 3), "autoguidance": ("autoguidance_scale", 1.0),
    }  # fmt: skip


def test_a_system_that_cannot_do_an_edit_is_known_before_it_tries(studio: Studio) -> None:
    assert studio.edits == {name: kinds("edits") for name in studio.names[:3]} | {"gan": ["interpolate"]}
    assert "prior gan has no way to do so: choose masked or flow" in studio.refusal("gan", "inpaint")
    assert not studio.refusal("flow", "inpaint")


def test_a_command_has_only_what_differs_from_the_defaults(studio: Studio) -> None:
    def of(kind: str, settings: dict[str, Any] | None = None, **given: Any) -> str:
        return edit.request(studio.params, "flow", kind, settings, **given).command()

    start = "python -m studio.edit --system flow"
    assert studio.draw("flow", None, 1, 0, guidance=1.5, autoguidance=1.0).command == f"{start} --sample out.png"
    assert studio.draw("flow", 3, 6, 2, guidance=2.0, steps=3).command == (
        f"{start} --sample --label 3 --count 6 --sampling guidance_scale=2.0 --seed 2 out.png"
    )
    assert of("enhance", {"damage": "noise", "noise_std": 0.4}, label=3) == (
        f"{start} --enhance --label 3 --set noise_std=0.4 in.png out.png"
    )
    assert of("inpaint", {"told_label": "inferred"}, label=3) == (
        f"{start} --inpaint --label 3 --set 'told_label=\"inferred\"' in.png out.png"
    )


def test_thumbnails_are_test_images_evenly_spread_in_squares(studio: Studio) -> None:
    assert len(studio.rows) == 24 and studio.rows[0] == 0 and set(np.diff(studio.rows)) <= {15, 16}
    for row, thumbnail in zip(studio.rows, studio.thumbnails(), strict=True):
        pixels = np.asarray(studio.take_test_image(row).picture)
        assert np.array_equal(np.asarray(thumbnail), pixels.repeat(12, 0).repeat(12, 1))


@pytest.mark.parametrize("name", ["masked", "flow"])
@pytest.mark.parametrize("label", [3, None])
def test_the_command_of_a_sample_draws_the_same_bits(name, label, studio, root, monkeypatch, tmp_path) -> None:
    drawn = studio.draw(name, label, 12, 5, guidance=2.0, steps=4)
    again = run(drawn.command, root, monkeypatch, tmp_path / "again.png")
    assert np.array_equal(again, pictures.grid(drawn.images, 10))
    assert not np.array_equal(studio.draw(name, label, 12, 6, guidance=2.0, steps=4).images, drawn.images)
    assert not np.array_equal(studio.draw(name, label, 12, 5, guidance=7.0, steps=4).images, drawn.images)
    if name == "flow":
        led_away = studio.draw(name, label, 12, 5, guidance=2.0, steps=4, autoguidance=4.0)
        again = run(led_away.command, root, monkeypatch, tmp_path / "led-away.png")
        assert not np.array_equal(led_away.images, drawn.images)
        assert np.array_equal(again, pictures.grid(led_away.images, 10))
    assert (drawn.indices is None) == (name == "flow")


def test_shown_indices_decode_to_the_shown_image(studio: Studio) -> None:
    import torch

    drawn = studio.draw("masked", 3, 4, 0)
    cells = re.findall(r">(\d+)</td>", "".join(map(table, drawn.indices)))
    indices = torch.tensor([int(cell) for cell in cells]).view(drawn.indices.shape)
    with torch.no_grad():
        decoded = edit.to_uint8(studio._open("masked").tokenizer.decode_indices(indices))
    assert np.array_equal(decoded.numpy(), drawn.images)


def half(size: tuple[int, int]) -> Image.Image:
    mask = Image.new("L", size)
    ImageDraw.Draw(mask).rectangle((0, size[1] // 2, size[0], size[1]), 255)
    return mask


@pytest.mark.parametrize("name", ["masked", "flow"])
@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        ("inpaint", {}),
        ("enhance", {"damage": "noise", "noise_std": 0.4}),
        ("enhance", {"damage": "downsample", "factor": 2}),
        ("restyle", {"target": 3, "strength": 0.7}),
        ("restyle", {"strength": 0.55}),  # with a reference
        ("variations", {"strength": 0.6}),
        ("interpolate", {}),
    ],
)
def test_the_command_of_an_edit_makes_the_same_bits(name, kind, settings, studio, root, monkeypatch, tmp_path) -> None:
    source, other = studio.take_test_image(5)[0], studio.take_test_image(6)[0]
    mask = half((8, 8)) if kind == "inpaint" else None
    needs_other = kind == "interpolate" or (kind == "restyle" and "target" not in settings)
    edited = studio.edit(
        name, kind, source, 7, settings, mask=mask, other=other if needs_other else "", share=0.35
    )  # fmt: skip
    again = run(edited.command, root, monkeypatch, tmp_path / "again.png")
    assert np.array_equal(again, np.asarray(edited.picture))
    assert not np.array_equal(np.asarray(edited.picture), np.asarray(studio.picture(source).convert("L")))


def test_a_label_that_is_given_is_told_to_the_prior(studio: Studio) -> None:
    def told(settings: dict[str, str] | None = None, **given: int) -> str:
        return edit.request(studio.params, "flow", "inpaint", settings, **given).config.told_label

    assert (told(), told(label=3), told({"told_label": "none"}, label=3)) == ("inferred", "own", "none")
    with pytest.raises(ValueError, match="told_label is own, but no label is given: expected one"):
        told({"told_label": "own"})
    source = studio.take_test_image(5)[0]
    edited = [
        np.asarray(studio.edit("flow", "enhance", source, 7, {"noise_std": 0.4}, label=label).picture)
        for label in (None, 3, 8)
    ]
    assert not np.array_equal(edited[1], edited[0]) and not np.array_equal(edited[1], edited[2])


def test_a_command_runs_in_a_shell(studio: Studio, root: Path, tmp_path: Path) -> None:
    edited = studio.edit("flow", "restyle", studio.take_test_image(5)[0], 1, {"target": 2}, label=3)
    command = edited.command.replace("python", sys.executable, 1).replace("out.png", str(tmp_path / "out.png"))
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(["sh", "-c", command], cwd=root, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert np.array_equal(np.asarray(Image.open(tmp_path / "out.png")), np.asarray(edited.picture))


def taken(studio: Studio) -> str:
    return studio.take_test_image(0).name


REFUSED = [
    (lambda studio: studio.draw("flow", 3, 1, 0, temperature=0.5), "flow has no temperature"),
    (lambda studio: studio.draw("untrained", 3, 1, 0), "no trained system 'untrained'"),
    (lambda studio: studio.draw("flow", 10, 1, 0), "label is 10: expected 0 to 9"),
    (lambda studio: studio.draw("flow", 3, 33, 0), "the number of images is 33: expected a whole number from 1 to 32"),
    (lambda studio: studio.draw("flow", 3, 1, None), "the seed is empty"),
    (lambda studio: studio.draw("flow", 3, 1, 0.5), "the seed is 0.5"),
    (lambda studio: studio.take_test_image(10**6), "the number of a test image is 1000000"),
    (lambda studio: studio.edit("flow", "enhance", "", 0), "there is no picture yet"),
    (
        lambda studio: studio.edit("flow", "enhance", studio.take_test_image(0)[0], 0, {"damage": "downsample", "factor": 3}),
        "not divisible",
    ),
    (
        lambda studio: studio.edit("gan", "enhance", taken(studio), 0),
        "gan cannot do this edit (enhance), because its prior gan has no way to do so: choose masked or flow",
    ),
    (lambda studio: studio.edit("flow", "variations", "0123456789abcdef.png", 0), "the picture is no longer in .state/studio"),
    (
        lambda studio: studio.edit("flow", "restyle", taken(studio), 0, {"target": 1}, other=taken(studio)),
        "expected a target or another image, not both",
    ),
    (lambda studio: mask_of([Image.new("RGBA", (80, 80))], (8, 8)), "nothing is painted"),
    (lambda studio: mask_of([], (8, 8)), "nothing is painted"),
]  # fmt: skip


@pytest.mark.parametrize(("action", "sentence"), REFUSED, ids=[sentence for _, sentence in REFUSED])
def test_a_mistake_is_one_sentence(action, sentence: str, studio: Studio) -> None:
    with pytest.raises(ValueError, match=re.escape(sentence)):
        action(studio)


@pytest.mark.parametrize("size", [(8, 8), (28, 28), (400, 30), (900, 700), (3000, 2001)])
def test_a_painted_dot_masks_the_pixel_below_it(size: tuple[int, int]) -> None:
    shown = for_painting(Image.new("RGB", size))
    assert 280 <= max(shown.size) <= 1120
    layer = Image.new("RGBA", shown.size)
    x, y = shown.width * 3 // 4, shown.height // 4
    layer.putpixel((x, y), (255, 0, 0, 255))
    mask = np.asarray(mask_of([layer], size))
    rows, columns = np.nonzero(mask)
    pixels_a_dot = max(1, size[0] / shown.width) * max(1, size[1] / shown.height)
    assert set(np.unique(mask)) == {0, 255} and len(rows) <= 2 * pixels_a_dot + 2
    assert abs(columns.mean() - x * size[0] / shown.width) <= max(1, size[0] / shown.width)
    assert abs(rows.mean() - y * size[1] / shown.height) <= max(1, size[1] / shown.height)


def png(size: tuple[int, int], mode: str = "1") -> bytes:
    file = io.BytesIO()
    Image.new(mode, size).save(file, "png")
    return file.getvalue()


PAINTINGS = [
    ([png((4, 4))] * (MAX_LAYERS + 1), "5 layers are painted: expected at most 4"),
    ([png((8190, 8190))], "has 8190 x 8190 pixels"),
    ([png((4096, 4100))] * 2, "together more than 33,554,432 pixels"),
    ([png((4, 4)), png((5, 4))], "have 2 sizes"),
    ([b"no picture"], "Pillow cannot identify it"),
    ([png((4, 4), "RGB")[:-30]], "cannot be read"),
]


@pytest.mark.parametrize(("files", "sentence"), PAINTINGS, ids=[sentence for _, sentence in PAINTINGS])
def test_a_painting_beyond_the_limits_is_refused_with_a_sentence(files: list[bytes], sentence: str) -> None:
    with pytest.raises(ValueError, match=re.escape(sentence)):
        painted_layers(files)


def test_a_painting_within_the_limits_is_read_as_it_is() -> None:
    layer = Image.new("RGBA", (40, 30), "#ff2d7880")
    layer.putpixel((3, 4), (1, 2, 3, 0))
    file = io.BytesIO()
    layer.save(file, "png")
    assert [np.asarray(read).tolist() for read in painted_layers([file.getvalue()] * MAX_LAYERS)] == [
        np.asarray(layer).tolist()
    ] * MAX_LAYERS


def test_names_of_strangers_and_pages_from_elsewhere_are_refused(address: str) -> None:
    check_names(int(address.rpartition(":")[2]), "/config")


def post(address: str, path: str, body: bytes, headers: dict[str, str] = JSON) -> tuple[int, str]:
    connection = http.client.HTTPConnection(address.removeprefix("http://"), timeout=PATIENCE)
    with contextlib.closing(connection):
        connection.request("POST", f"/gradio_api/{path}", body, headers)
        answered = connection.getresponse()
        return answered.status, answered.read().decode()


def answer_of(address: str, name: str, *values: Any) -> str:
    """The events that Gradio answers a call with."""
    _, called = post(address, f"call/{name}", json.dumps({"data": values}).encode())
    with urllib.request.urlopen(f"{address}/gradio_api/call/{name}/{json.loads(called)['event_id']}") as events:
        return events.read().decode()


def peak_memory(address: str) -> int:
    """Of the server, in bytes."""
    port = address.rpartition(":")[2]
    (server,) = [child for child in psutil.Process().children() if port in child.cmdline()]
    (line,) = [line for line in Path(f"/proc/{server.pid}/status").read_text().splitlines() if line.startswith("VmHWM")]
    return int(line.split()[1]) * 1024


def test_a_bomb_of_painted_layers_gets_a_sentence_and_no_memory(address: str) -> None:
    before = peak_memory(address)
    form = (
        b"--x\r\nContent-Disposition: form-data; name=files; filename=l.png\r\n\r\n"
        + png((8190, 8190))
        + b"\r\n--x--\r\n"
    )
    code, paths = post(address, "upload", form, {"Content-Type": "multipart/form-data; boundary=x"})
    assert code == 200, paths
    bomb = {"path": json.loads(paths)[0], "meta": {"_type": "gradio.FileData"}}
    for layers, sentence in ((1, "has 8190 x 8190 pixels"), (40, "40 layers are painted")):
        painted = {"background": None, "layers": [bomb] * layers, "composite": bomb}
        told = answer_of(address, "inpaint", "masked", painted, -1, 0)
        assert told.startswith("event: error") and sentence in told, told
    assert peak_memory(address) < before + 2**26  # one layer, decoded, has four times as much


def test_what_a_browser_sends_of_a_painting_is_kept_within_limits() -> None:
    import gradio as gr
    from gradio.components.image_editor import EditorData
    from gradio.data_classes import DataWithFiles

    from studio.editor import MAX_PAINTINGS, within_limits

    editor, layer = within_limits(gr.ImageEditor()), png((4, 4), "RGBA")

    def send(painting: str, index: Any, file: bytes = layer, kind: str = "layer") -> None:
        form = {"type": kind, "index": index, "id": painting}
        editor.accept_blobs(DataWithFiles(data=form, files=[("layer", file)]))

    for number in range(100):
        send(str(number), "0")
        send(str(number), None, kind="composite")
    assert len(editor.blob_storage) == MAX_PAINTINGS
    for index, file in ((10**9, layer), (MAX_LAYERS, layer), (-1, layer), ("x", layer), (0, bytes(2**23 + 1))):
        with pytest.raises(HTTPException, match="413: a painting has at most 4 layers of 8,388,608 bytes"):
            send("a", index, file)
    with ThreadPoolExecutor(MAX_LAYERS) as pool:  # as a browser sends them
        for number in range(200):
            list(pool.map(lambda index, painting=f"all {number}": send(painting, str(index)), range(MAX_LAYERS)))
            assert len(editor.preprocess(EditorData(id=f"all {number}"))["layers"]) == MAX_LAYERS
    send("99", "0")
    (read,) = editor.preprocess(EditorData(id="99"))["layers"]
    assert read.size == (4, 4) and editor.preprocess(EditorData(id="99"))["layers"] == []


@pytest.mark.parametrize(
    ("path", "size", "code"),
    [
        ("queue/join", 2**20 + 1, 413),
        ("call/sample", 2**20 + 1, 413),
        ("component_server", 2**23 + 2**17, 413),
        ("upload", 2**20 + 1, 400),
    ],
)
def test_a_request_that_is_larger_than_its_kind_needs_is_refused(address: str, path: str, size: int, code: int) -> None:
    assert post(address, path, b" " * size)[0] == code


def test_a_file_of_the_machine_is_no_upload(address: str, tmp_path: Path) -> None:
    (tmp_path / "private.png").write_bytes(png((8, 8), "L"))
    private = {"path": str(tmp_path / "private.png"), "meta": {"_type": "gradio.FileData"}}
    painted = {"background": None, "layers": [private], "composite": None}
    for told in (answer_of(address, "upload_vary", private), answer_of(address, "inpaint", "masked", painted, -1, 0)):
        assert told.startswith("event: error") and "was not uploaded by a user" in told, told


def test_no_hostile_request_to_the_studio_fails_it_or_keeps_it_waiting(address: str) -> None:
    for name, headers, body in hostile():
        for path in ("queue/join", "call/sample", "component_server"):
            began = time.monotonic()
            code, text = post(address, path, body, headers)
            assert 400 <= code < 500 and time.monotonic() - began < 5 and len(text) < 500, (
                path,
                name,
                code,
                text[:500],
            )


def test_a_crowd_at_the_studio_is_bounded_and_the_next_one_is_served(address: str) -> None:
    body = json.dumps({"data": ["masked", -1, 32, 0, 1.0, 1.0, 200, 1.0, "", ""]}).encode()
    with ThreadPoolExecutor(50) as pool:
        codes = list(pool.map(lambda _: post(address, "call/sample", body)[0], range(200)))
    assert set(codes) == {200, 503}
    began = time.monotonic()
    with urllib.request.urlopen(f"{address}/gradio_api/queue/status") as told:
        assert json.load(told)["queue_size"] <= 32 and time.monotonic() - began < 2


def test_a_taken_port_and_an_untrained_checkout_end_with_a_sentence_and_2(root, address, tmp_path) -> None:
    (tmp_path / "params.yaml").write_text((root / "params.yaml").read_text())
    port = int(address.rpartition(":")[2])
    starts = [start(place, port, stdout=subprocess.PIPE, stderr=subprocess.PIPE) for place in (root, tmp_path)]
    taken, untrained = (process.communicate(timeout=PATIENCE) for process in starts)
    assert [process.returncode for process in starts] == [2, 2]
    assert taken == ("", f"port {port} is taken: choose another, such as make studio STUDIO_PORT={port + 1}\n")
    assert untrained == ("", "no system of params.yaml is trained yet: run make repro first\n")


@pytest.fixture
def page(browser, address: str):
    opened = browser.new_page(viewport={"width": 1280, "height": 1000})
    opened.set_default_timeout(PATIENCE * 1000)
    asked: list[str] = []
    opened.on("request", lambda request: asked.append(request.url))
    opened.goto(address)
    opened.wait_for_selector("#draw")
    yield opened
    foreign = [url for url in asked if not url.startswith((address, "data:", f"blob:{address}"))]
    opened.close()
    assert len(asked) > 10 and not foreign


def photograph(page: Any, name: str) -> None:
    if "TESSERA_SHOTS" in os.environ:
        page.screenshot(path=Path(os.environ["TESSERA_SHOTS"]) / f"{name}.png", full_page=True)


def test_a_sample_shows_the_images_and_indices_of_its_command(page, root, studio) -> None:
    page.click("#draw")
    page.wait_for_selector("#drawn figure td")
    photograph(page, "studio-test-sample")
    expected = studio.draw("masked", None, 6, 0)
    shown = page.inner_html("#drawn")
    assert np.array_equal(images_in(shown), expected.images)
    assert [int(cell) for cell in page.locator("#drawn td").all_inner_texts()] == expected.indices.flatten().tolist()
    assert expected.command in page.locator(".command textarea").first.input_value()
    page.click("#system input")
    page.get_by_role("option", name="flow", exact=True).last.click()
    page.get_by_label("Temperature", exact=False).first.wait_for(state="hidden")
    page.click("#draw")
    page.get_by_text("there are no indices to show").wait_for()
    assert np.array_equal(images_in(page.inner_html("#drawn")), studio.draw("flow", None, 6, 0).images)


def test_a_picture_is_told_and_another_one_or_none(page, root, studio, monkeypatch, tmp_path) -> None:
    """By a system that was told edges, which are shown in the place of the picture that has them."""
    assert not page.locator("#telling").is_visible()
    page.click("#system input")
    page.get_by_role("option", name="painted", exact=True).last.click()
    page.locator("#told img").wait_for()
    page.locator("#thumbnails-told button").nth(5).click()
    kept = studio.take_test_picture("painted", studio.rows[5])
    for picture in (kept, ""):
        page.click("#draw")
        expected = studio.draw("painted", None, 6, 0, picture=picture)
        page.wait_for_function(
            "found => document.querySelector('.command textarea').value == found", arg=expected.command
        )
        photograph(page, f"studio-told-{bool(picture)}")
        assert np.array_equal(images_in(page.inner_html("#drawn")), expected.images)
        written = run(expected.command, root, monkeypatch, tmp_path / "out.png")
        assert np.array_equal(written, pictures.grid(expected.images, 6))
        page.click("#clear-told")
        page.locator("#told img").wait_for(state="hidden")
    assert f"--picture {KEPT / kept} " in studio.draw("painted", None, 6, 0, picture=kept).command
    page.click("#system input")
    page.get_by_role("option", name="flow", exact=True).last.click()
    page.locator("#telling").wait_for(state="hidden")


def seen_of_the_editor(page: Any) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(page.locator("#editor canvas").first.screenshot())).convert("RGB")).astype(
        int
    )


def is_painted(pixels: np.ndarray) -> np.ndarray:
    """Where the paint's colour is, which no picture of these has."""
    return pixels.max(axis=2) - pixels.min(axis=2) > 40


def at_rest(page: Any, other_than: np.ndarray | None = None) -> np.ndarray:
    """The editor once a picture with paint is on it, another than this, and nothing has changed for a second."""
    before = seen_of_the_editor(page)
    for _ in range(PATIENCE):
        page.wait_for_timeout(1000)
        now = seen_of_the_editor(page)
        is_awaited = is_painted(now).any() and not np.array_equal(now, other_than)
        if is_awaited and np.array_equal(now, before):
            return now
        before = now
    raise AssertionError("the picture does not come to rest")


def paint(page: Any) -> None:
    """A stroke above the half that is painted at first; again, as a person would, if the editor was not ready for it."""
    at_rest(page)
    box = page.locator("#editor canvas").first.bounding_box()
    x, y = box["width"] / 2, box["height"] / 2 - 70
    for _ in range(5):
        page.mouse.move(box["x"] + x - 90, box["y"] + y)
        page.mouse.down()
        page.mouse.move(box["x"] + x, box["y"] + y, steps=2)
        page.mouse.move(box["x"] + x + 90, box["y"] + y, steps=2)
        page.mouse.up()
        if is_painted(at_rest(page))[int(y), int(x)]:
            return
    raise AssertionError("no stroke is seen on the editor")


def test_what_the_mouse_paints_is_inpainted_and_the_rest_stays(page, root, studio, monkeypatch, tmp_path) -> None:
    page.get_by_role("tab", name="Inpaint").click()
    before = at_rest(page)
    page.fill("#number-inpaint input", "7")
    page.click("#take-inpaint")
    source, label, _ = studio.take_test_image(7)
    page.wait_for_function(f"document.querySelector('[aria-label=\"The picture shows\"]').value == '{label}'")
    at_rest(page, other_than=before)
    paint(page)
    page.click("#inpaint")
    result = page.locator("#inpainted img")
    result.wait_for()
    photograph(page, "studio-test-inpaint")
    edited = np.asarray(Image.open(io.BytesIO(page.request.get(result.get_attribute("src")).body())).convert("L"))
    commands = page.locator(".command textarea").evaluate_all("all => all.map(one => one.value)")
    (command,) = [text for text in commands if "--inpaint" in text]
    mask = np.asarray(Image.open(root / shlex.split(command)[shlex.split(command).index("--mask") + 1]))
    assert mask.shape == (8, 8) and mask[2, 2:6].all() and not mask[0].any()
    assert mask[4:7, 1:7].all() and not mask[7].any() and not mask[:, 0].any()
    original = np.asarray(studio.picture(source).convert("L"))
    assert np.array_equal(edited[mask == 0], original[mask == 0]) and (edited != original).any()
    assert np.array_equal(run(command, root, monkeypatch, tmp_path / "again.png"), edited)


BUTTONS = {
    "Compare": ("draw-both", "#drawn-right figure"),
    "Inpaint": ("inpaint", "#inpainted img"),
    "Enhance": ("enhance", "#enhanced img"),
    "Restyle": ("restyle", "#restyled img"),
    "Vary": ("vary", "#varied img"),
    "Interpolate": ("interpolate", "#between img"),
}


def test_the_first_click_on_every_tab_gives_a_result(page) -> None:
    for tab, (button, result) in BUTTONS.items():
        page.get_by_role("tab", name=tab).click()
        page.wait_for_timeout(1500)  # until the picture is on the canvas
        page.click(f"#{button}")
        page.wait_for_selector(result)
    assert not page.locator(".toast-body").count()


def test_a_click_on_a_thumbnail_takes_it_and_keeps_what_is_painted(page, root, studio) -> None:
    page.get_by_role("tab", name="Inpaint").click()
    paint(page)
    before = seen_of_the_editor(page)
    page.click("#thumbnails-inpaint button >> nth=7")
    page.wait_for_function(f"document.querySelector('#number-inpaint input').value == '{studio.rows[7]}'")
    at_rest(page, other_than=before)
    page.click("#inpaint")
    page.wait_for_selector("#inpainted img")
    commands = page.locator(".command textarea").evaluate_all("all => all.map(one => one.value)")
    (words,) = [shlex.split(text) for text in commands if "--inpaint" in text]
    assert Path(words[-2]).name == studio.take_test_image(studio.rows[7]).name
    mask = np.asarray(Image.open(root / words[words.index("--mask") + 1]))
    assert mask[2, 2:6].all() and mask[4:7, 1:7].all() and not mask[0].any()


def test_a_tab_says_what_the_chosen_system_cannot_do(page) -> None:
    page.click("#system input")
    page.get_by_role("option", name="gan", exact=True).last.click()
    for tab, (button, _) in BUTTONS.items():
        page.get_by_role("tab", name=tab).click()
        is_able = tab in ("Compare", "Interpolate")
        page.wait_for_function(f"document.querySelector('#{button}').disabled != {str(is_able).lower()}")
        why = page.locator(f"#cannot-{button}").filter(has_text="gan cannot do this edit")
        assert why.is_visible() != is_able


def test_each_seed_varies_a_picture_otherwise(address: str, studio: Studio) -> None:
    from gradio_client import Client

    client, source = Client(address, verbose=False, analytics_enabled=False), studio.take_test_image(3)[0]
    client.predict(3, api_name="/take_vary")
    for seed in (1, 2):
        path, command = client.predict("flow", -1, 0.6, seed, api_name="/vary")
        alone = studio.edit("flow", "variations", source, seed, {"strength": 0.6})
        assert (np.asarray(Image.open(path)).tobytes(), command) == (np.asarray(alone.picture).tobytes(), alone.command)


def bad_files(shared_data: Path) -> list[Path]:
    """Ten that Pillow refuses, each for another reason, by the manifest of the test data."""
    import csv

    folder, found = shared_data / "ingest", {}
    with (folder / "manifest.csv").open() as file:
        for row in csv.DictReader(file):
            if row["outcome"] != "ok" and (folder / row["path"]).is_file():
                found.setdefault((row["outcome"], row["message"][:12]), folder / row["path"])
    return list(found.values())[:10]


def upload(page: Any, path: Path) -> None:
    with page.expect_file_chooser() as chooser:
        page.click("#upload-enhance")
    chooser.value.set_files(path)


def test_each_bad_upload_gives_a_message_and_the_page_lives_on(page, shared_data, tmp_path) -> None:
    files = bad_files(shared_data)
    assert len(files) == 10
    huge = tmp_path / "huge.png"
    with huge.open("wb") as file:
        file.truncate(edit.MAX_BYTES + 10)
    page.get_by_role("tab", name="Enhance").click()
    for path in [*files, huge]:
        upload(page, path)
        toast = page.locator(".toast-body").filter(has_text=path.name)
        toast.first.wait_for()
        text = toast.first.inner_text()
        print(text.replace("\n", " "))
        assert "Traceback" not in text and len(text) < 400
        for close in page.locator(".toast-close").all():
            close.click()
    photograph(page, "studio-test-uploads")
    good = tmp_path / "good.png"
    Image.radial_gradient("L").save(good)
    upload(page, good)
    page.wait_for_timeout(2000)
    page.click("#enhance")
    page.wait_for_selector("#enhanced img")


def test_twenty_requests_at_once_get_what_each_gets_alone(root, address, studio, tmp_path) -> None:
    from gradio_client import Client, handle_file

    client = Client(address, verbose=False, analytics_enabled=False)
    pixels = [np.random.default_rng(number).integers(0, 256, (8, 8), np.uint8) for number in range(4)]
    others = [Client(address, verbose=False, analytics_enabled=False) for _ in pixels]
    for number, values in enumerate(pixels):
        Image.fromarray(values).save(tmp_path / f"{number}.png")

    def sample(number: int) -> tuple[str, str]:
        name, label = ("masked", "flow")[number % 2], number % 10
        return client.predict(name, label, 3, number, 2.0, 1.0, 3, api_name="/sample")

    def enhance(number: int) -> tuple[bytes, str]:
        own = others[number]  # a session of its own, as of a page of its own
        own.predict(handle_file(str(tmp_path / f"{number}.png")), api_name="/upload_enhance")
        path, command = own.predict("masked", -1, number, "noise", 0.4, 1.0, 2, api_name="/enhance")
        return np.asarray(Image.open(path)).tobytes(), command

    tasks = [(sample, number) for number in range(16)] + [(enhance, number) for number in range(4)]
    with ThreadPoolExecutor(20) as pool:
        together = list(pool.map(lambda task: task[0](task[1]), tasks))
    for number in range(16):
        text, command = together[number]
        knobs = {"temperature": 1.0} if number % 2 == 0 else {}
        alone = studio.draw(
            ("masked", "flow")[number % 2], number % 10, 3, number, guidance=2.0, steps=3, **knobs
        )  # fmt: skip
        assert np.array_equal(images_in(html.unescape(text)), alone.images) and command == alone.command
    for number in range(4):
        kept = studio.take((tmp_path / f"{number}.png").read_bytes(), "it")
        alone = studio.edit("masked", "enhance", kept, number, {"noise_std": 0.4})
        assert together[16 + number] == (np.asarray(alone.picture).tobytes(), alone.command)
    assert len(set(together)) == 20
    assert (root / KEPT).is_dir()

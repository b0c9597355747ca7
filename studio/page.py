"""The studio: a page on this machine to draw with trained systems and to edit pictures, with the command for each result.

    python -m studio.page --port 7860

It listens on loopback alone and loads nothing from elsewhere. Uploads come in as files that nothing has decoded, and are
checked by studio/actions.py as the shell checks them. Every mistake is a message on the page.
"""

import argparse
import functools
import html
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

os.environ |= {"GRADIO_ANALYTICS_ENABLED": "False", "HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}
os.environ["GRADIO_TEMP_DIR"] = str(Path(".state/studio/gradio").absolute())
os.environ["NO_PROXY"] = os.environ["no_proxy"] = "127.0.0.1"  # gradio asks its own server whether it runs

import gradio as gr  # noqa: E402  after its environment
from PIL import Image  # noqa: E402

from studio import (
    edit,  # noqa: E402
    figures,  # noqa: E402
)
from studio.actions import KNOBS, MAX_IMAGES, MAX_SEED, Studio, for_painting, mask_of  # noqa: E402

ADDRESS = "127.0.0.1"
NOBODY_KNOWS = -1  # a drop-down has no value for None
INTRODUCTION = """# Tessera studio
Draw with the trained systems of this checkout, and edit pictures with them. Below each result stands the command that
makes it again, in the folder that this page was started in."""
SPARE = 64 * 1024  # bytes around a file in its request
THEME = gr.themes.Soft(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"])
CSS = (
    figures.CSS
    + ".gradio-container {max-width: 1180px !important; margin: 0 auto !important} .command textarea {font: 12px/1.5 monospace}"
)


class Source(NamedTuple):
    """Where a picture comes from: `name` is the State of the kept picture's name."""

    name: gr.State
    label: gr.Dropdown | None


def telling(action: Callable[..., Any]) -> Callable[..., Any]:
    """The action, whose mistakes of the user become messages on the page."""

    @functools.wraps(action)
    def told(*values: Any) -> Any:
        try:
            return action(*values)
        except (ValueError, OSError) as error:
            raise gr.Error(html.escape(str(error)), duration=20, print_exception=False) from None

    return told


def build(studio: Studio) -> gr.Blocks:
    with gr.Blocks(title="Tessera studio", analytics_enabled=False, delete_cache=(3600, 86400)) as page:
        gr.Markdown(INTRODUCTION)
        first = studio.names[0]
        system = gr.Dropdown(studio.names, value=first, label="System", info=studio.about(first), elem_id="system")
        system.change(telling(lambda name: gr.update(info=studio.about(name))), system, system, api_name=False)
        with gr.Tab("Sample"):
            _sample(studio, system)
        with gr.Tab("Compare"):
            _compare(studio)
        with gr.Tab("Inpaint"):
            _inpaint(studio, system)
        with gr.Tab("Enhance"):
            _enhance(studio, system)
        with gr.Tab("Restyle"):
            _restyle(studio, system)
        with gr.Tab("Vary"):
            _vary(studio, system)
        with gr.Tab("Interpolate"):
            _interpolate(studio, system)
    return page


def _sample(studio: Studio, system: gr.Dropdown) -> None:
    known = studio.knobs(studio.names[0])
    with gr.Row():
        label, count, seed = _class(studio, "Class", "one after another"), _count(), _seed()
    with gr.Row():
        knobs = [_knob(knob, known.get(knob)) for knob in KNOBS]
    button = gr.Button("Draw", variant="primary", elem_id="draw")
    shown, command = gr.HTML(elem_id="drawn"), _command()

    def knobs_of(name: str) -> list[gr.Slider]:
        return [_knob(knob, studio.knobs(name).get(knob)) for knob in KNOBS]

    def draw(name: str, label: int, count: int, seed: int, *values: float) -> tuple[str, str]:
        has = studio.knobs(name)
        chosen = {knob: value for knob, value in zip(KNOBS, values, strict=True) if knob in has}
        drawn = studio.draw(name, _known(label), count, seed, **chosen)
        return figures.html(drawn), drawn.command

    system.change(telling(knobs_of), system, knobs, api_name=False)
    button.click(telling(draw), [system, label, count, seed, *knobs], [shown, command], api_name="sample")


def _compare(studio: Studio) -> None:
    gr.Markdown(
        "Two systems of your choice with the same class and seed, each with the sampling settings of `params.yaml`."
    )
    with gr.Row():
        label, count, seed = _class(studio, "Class", "one after another"), _count(), _seed()
    button = gr.Button("Draw both", variant="primary", elem_id="draw-both")
    systems, outputs = [], []
    with gr.Row():
        for number, side in enumerate(("left", "right")):
            with gr.Column():
                name = studio.names[min(number, len(studio.names) - 1)]
                systems.append(gr.Dropdown(studio.names, value=name, label="System", elem_id=f"system-{side}"))
                outputs += [gr.HTML(elem_id=f"drawn-{side}"), _command()]

    def draw(left: str, right: str, label: int, count: int, seed: int) -> list[str]:
        both = [studio.draw(name, _known(label), count, seed) for name in (left, right)]
        return [text for drawn in both for text in (figures.html(drawn), drawn.command)]

    button.click(telling(draw), [*systems, label, count, seed], outputs, api_name="compare")


def _inpaint(studio: Studio, system: gr.Dropdown) -> None:
    gr.Markdown("Take a picture, then paint over what is to be drawn anew. All other pixels stay as they are.")
    with gr.Row():
        with gr.Column(scale=3):
            editor = gr.ImageEditor(
                type="pil", sources=(), transforms=(), layers=False, label="Paint here", elem_id="editor",
                brush=gr.Brush(default_size=48, colors=["#ff2d78"], color_mode="fixed"), eraser=gr.Eraser(48),
                height=660, elem_classes="pixels", buttons=[], canvas_size=(560, 560),
            )  # fmt: skip
        with gr.Column(scale=2):
            source = _source(studio, "inpaint", editor, for_painting)
            seed, button = _seed(), gr.Button("Inpaint", variant="primary", elem_id="inpaint")
            result, command = _result("inpainted"), _command()

    def inpaint(name: str, source: str, painted: dict[str, Any] | None, label: int, seed: int) -> tuple[Any, str]:
        mask = mask_of((painted or {}).get("layers") or [], studio.picture(source).size)
        return studio.edit(name, "inpaint", source, seed, label=_known(label), mask=mask)

    given = [system, source.name, editor, source.label, seed]
    button.click(telling(inpaint), given, [result, command], api_name="inpaint")


def _enhance(studio: Studio, system: gr.Dropdown) -> None:
    gr.Markdown("Say what the picture suffers from; what comes back is an image that it could have come from.")
    with gr.Row():
        with gr.Column():
            picture = _preview("Damaged picture")
            source = _source(studio, "enhance", picture)
        with gr.Column():
            damage = gr.Radio(["noise", "blur", "downsample"], value="noise", label="Damage", elem_id="damage")
            noise = gr.Slider(0, 1, 0.4, step=0.02, label="Noise", info="standard deviation; white is 1, black is -1")
            blur = gr.Slider(0.2, 4, 1, step=0.1, label="Blur", info="standard deviation, in pixels", visible=False)
            factor = gr.Slider(2, 8, 2, step=1, label="Factor", info="by which each side is smaller", visible=False)
            seed = _seed()
            with gr.Row():
                spoil = gr.Button("Damage it first", elem_id="spoil")
                button = gr.Button("Enhance", variant="primary", elem_id="enhance")
            result, command = _result("enhanced"), _command()

    def settings(damage: str, noise: float, blur: float, factor: int) -> dict[str, Any]:
        own = {"blur": {"blur_std": blur}, "downsample": {"factor": int(factor)}}.get(damage, {})
        return {"damage": damage, "noise_std": noise, **own}

    def shown(damage: str) -> list[Any]:
        usual = 0.4 if damage == "noise" else 0.02
        return [gr.update(value=usual), gr.update(visible=damage == "blur"), gr.update(visible=damage == "downsample")]

    def spoiled(source: str, seed: int, *chosen: Any) -> tuple[str, Image.Image]:
        name = studio.damage(source, settings(*chosen), seed)
        return name, studio.picture(name)

    def enhance(name: str, source: str, label: int, seed: int, *chosen: Any) -> tuple[Any, str]:
        return studio.edit(name, "enhance", source, seed, settings(*chosen), _known(label))

    chosen = [damage, noise, blur, factor]
    damage.change(shown, damage, [noise, blur, factor], api_name=False)
    spoil.click(telling(spoiled), [source.name, seed, *chosen], [source.name, picture], api_name="damage")
    given = [system, source.name, source.label, seed, *chosen]
    button.click(telling(enhance), given, [result, command], api_name="enhance")


def _restyle(studio: Studio, system: gr.Dropdown) -> None:
    gr.Markdown("The picture as another class, or with the look of another picture. Strength 0 leaves it as it is.")
    with gr.Row():
        with gr.Column():
            picture = _preview("Picture")
            source = _source(studio, "restyle", picture, has_label=False)
            with gr.Accordion("With the look of another picture", open=False):
                reference = _preview("Reference")
                other = _source(studio, "reference", reference, has_label=False)
        with gr.Column():
            target = _class(studio, "Class to become", "none: the reference decides")
            strength = gr.Slider(0, 1, 0.7, step=0.05, label="Strength", elem_id="strength")
            seed, button = _seed(), gr.Button("Restyle", variant="primary", elem_id="restyle")
            result, command = _result("restyled"), _command()

    def restyle(name: str, source: str, other: str, target: int, strength: float, seed: int) -> tuple[Any, str]:
        if _known(target) is None and not other:
            raise ValueError("nothing says what to restyle to: choose a class, or a reference picture")
        settings = {"target": _known(target), "strength": strength}
        return studio.edit(name, "restyle", source, seed, settings, other=other)

    given = [system, source.name, other.name, target, strength, seed]
    button.click(telling(restyle), given, [result, command], api_name="restyle")


def _vary(studio: Studio, system: gr.Dropdown) -> None:
    gr.Markdown("Pictures around a picture, the farther from it the larger the strength. Each seed gives another one.")
    with gr.Row():
        with gr.Column():
            picture = _preview("Picture")
            source = _source(studio, "vary", picture)
        with gr.Column():
            strength = gr.Slider(0, 1, 0.5, step=0.05, label="Strength")
            seed, button = _seed(), gr.Button("Vary", variant="primary", elem_id="vary")
            result, command = _result("varied"), _command()

    def vary(name: str, source: str, label: int, strength: float, seed: int) -> tuple[Any, str]:
        return studio.edit(name, "variations", source, seed, {"strength": strength}, _known(label))

    given = [system, source.name, source.label, strength, seed]
    button.click(telling(vary), given, [result, command], api_name="vary")


def _interpolate(studio: Studio, system: gr.Dropdown) -> None:
    gr.Markdown("An image on the way from one picture to another.")
    sources = []
    with gr.Row():
        for key, title in (("from", "From"), ("to", "To")):
            with gr.Column():
                preview = _preview(title)
                sources.append(_source(studio, key, preview, has_label=False).name)
        with gr.Column():
            share = gr.Slider(0, 1, 0.5, step=0.05, label="Share of the way")
            seed, button = _seed(), gr.Button("Interpolate", variant="primary", elem_id="interpolate")
            result, command = _result("between"), _command()

    def interpolate(name: str, start: str, end: str, share: float, seed: int) -> tuple[Any, str]:
        studio.picture(end)
        return studio.edit(name, "interpolate", start, seed, other=end, share=share)

    button.click(telling(interpolate), [system, *sources, share, seed], [result, command], api_name="interpolate")


def _source(
    studio: Studio,
    key: str,
    preview: gr.Image | gr.ImageEditor,
    shown: Callable[[Image.Image], Image.Image] = lambda picture: picture,
    has_label: bool = True,
) -> Source:
    """Buttons that put a picture of the user's, or of the test images, into the preview."""
    name = gr.State("")
    upload = gr.UploadButton("Upload a picture", elem_id=f"upload-{key}")
    with gr.Row(equal_height=True):
        number = gr.Number(0, precision=0, minimum=0, label="Test image", elem_id=f"number-{key}", min_width=100)
        button = gr.Button("Take this one", elem_id=f"take-{key}", min_width=100)
    label = _class(studio, "The picture shows", "not told") if has_label else None

    def taken(path: str) -> tuple[Any, ...]:
        file = Path(path)
        kept = studio.take(file.read_bytes(), file.name)
        return kept, shown(studio.picture(kept)), *([NOBODY_KNOWS] if has_label else [])

    def picked(row: int) -> tuple[Any, ...]:
        kept, is_a = studio.take_test_image(row)
        return kept, shown(studio.picture(kept)), *([is_a] if has_label else [])

    changed = [name, preview, *([label] if label else [])]
    upload.upload(telling(taken), upload, changed, api_name=f"upload_{key}")
    button.click(telling(picked), number, changed, api_name=f"take_{key}")
    return Source(name, label)


def _class(studio: Studio, title: str, none: str) -> gr.Dropdown:
    choices = [(none, NOBODY_KNOWS), *((name, label) for label, name in enumerate(studio.classes))]
    return gr.Dropdown(choices, value=NOBODY_KNOWS, label=title)


def _known(label: int) -> int | None:
    return None if label == NOBODY_KNOWS else label


def _count() -> gr.Slider:
    return gr.Slider(1, MAX_IMAGES, 6, step=1, label="Images")


def _seed() -> gr.Number:
    return gr.Number(0, precision=0, minimum=0, maximum=MAX_SEED, label="Seed")


def _knob(knob: str, now: Any) -> gr.Slider:
    """A slider at the system's own setting; hidden where it has none."""
    low, high, step = {"guidance": (0, 10, 0.05), "temperature": (0.05, 3, 0.05), "steps": (1, 200, 1)}[knob]
    value = now.value if now else 1
    return gr.Slider(low, max(high, value), value, step=step, label=knob.capitalize(), visible=now is not None)


def _preview(title: str) -> gr.Image:
    return gr.Image(
        type="pil", format="png", interactive=False, label=title, height=300, elem_classes="pixels", buttons=[]
    )


def _result(name: str) -> gr.Image:
    return gr.Image(
        format="png", interactive=False, label="Result", height=300, elem_id=name, elem_classes="pixels",
        buttons=["download"],
    )  # fmt: skip


def _command() -> gr.Textbox:
    title = "The same from the shell"
    return gr.Textbox(label=title, interactive=False, lines=2, max_lines=12, buttons=["copy"], elem_classes="command")


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m studio.page", description=__doc__.partition("\n")[0])
    parser.add_argument("--port", type=int, default=7860)
    port = parser.parse_args(arguments).port
    try:
        page = build(Studio())
        Image.MAX_IMAGE_PIXELS = edit.MAX_PIXELS  # also of the painted layer, which gradio decodes
        page.queue(max_size=200, default_concurrency_limit=8)
        page.launch(
            server_name=ADDRESS, server_port=port, share=False, prevent_thread_lock=True, quiet=True, footer_links=[],
            run_history=False, enable_monitoring=False, ssr_mode=False, pwa=False, mcp_server=False, theme=THEME, css=CSS,
            max_file_size=edit.MAX_BYTES + SPARE,
        )  # fmt: skip
    except (ValueError, OSError) as error:
        is_taken = "empty port" in str(error)
        print(f"port {port} is taken: choose another, such as make studio STUDIO_PORT={port + 1}" if is_taken else error,
              file=sys.stderr)  # fmt: skip
        return 2
    print(f"Tessera studio: http://{ADDRESS}:{port} (Ctrl-C ends it)", flush=True)
    page.block_thread()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

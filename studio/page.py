"""The studio: a page on this machine to draw with trained systems and to edit pictures, with the command for each result.

    python -m studio.page --port 7860

It listens on loopback alone and loads nothing from elsewhere. Uploads come in as files that nothing has decoded, and are
checked by studio/actions.py as the shell checks them. Every mistake is a message on the page.
"""

import argparse
import errno
import os
import sys
from pathlib import Path
from typing import Any

os.environ |= {"GRADIO_ANALYTICS_ENABLED": "False", "HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}
os.environ["GRADIO_TEMP_DIR"] = str(Path(".state/studio/gradio").absolute())

import gradio as gr  # noqa: E402  after its environment
from PIL import Image  # noqa: E402

from studio import controls, figures  # noqa: E402
from studio.actions import KNOBS, PAINT, Studio, Words, for_painting, mask_of, painted_below  # noqa: E402
from studio.controls import edit_button, known, telling  # noqa: E402
from studio.editor import within_limits  # noqa: E402
from studio.server import serve  # noqa: E402

ADDRESS = "127.0.0.1"
INTRODUCTION = """# Tessera studio
Draw and edit with the trained systems of this checkout. The command below a result makes it again, in the folder
that this page was started in."""
NOISE = 0.4  # standard deviation, of the damage that is shown first
THEME = gr.themes.Soft(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"])
CSS = (
    figures.CSS
    + ".gradio-container {max-width: 1180px !important; margin: 0 auto !important} .command textarea {font: 12px/1.5 monospace}"
)


def build(studio: Studio) -> gr.Blocks:
    with gr.Blocks(title="Tessera studio", analytics_enabled=False, delete_cache=(3600, 86400)) as page:
        first = studio.names[0]
        with gr.Row(equal_height=True):
            gr.Markdown(INTRODUCTION)
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
    has = studio.knobs(studio.names[0])
    about_class = controls.about_class(studio, studio.names[0])
    with gr.Row():
        label, count, seed = (
            controls.class_field(studio, "Class", "one after another", info=about_class),
            controls.count_field(),
            controls.seed_field(),
        )
    words = controls.word_fields(studio.reads_captions(studio.names[0]), has_negative=True)
    picture = controls.told_picture(studio, system)
    with gr.Row():
        knobs = [controls.knob_field(knob, has.get(knob)) for knob in KNOBS]
    button = gr.Button("Draw", variant="primary", elem_id="draw")
    shown, command = gr.HTML(elem_id="drawn"), controls.command_field()

    def fields_of(name: str) -> list[gr.Slider | gr.Textbox | gr.Dropdown]:
        of_words = [gr.Textbox(visible=studio.reads_captions(name)) for _ in words]
        of_knobs = [controls.knob_field(knob, studio.knobs(name).get(knob)) for knob in KNOBS]
        return [*of_knobs, *of_words, gr.Dropdown(info=controls.about_class(studio, name))]

    # parameters: the fields of the tab
    def draw(name: str, picture: str, label: int, count: int, seed: int, *values: Any) -> tuple[str, str]:
        has, of_words = studio.knobs(name), Words(*values[len(KNOBS) :]) if studio.reads_captions(name) else None
        chosen = {knob: value for knob, value in zip(KNOBS, values, strict=False) if knob in has}
        told = picture if studio.is_told_pictures(name) else ""
        drawn = studio.draw(name, known(label), count, seed, of_words, told, **chosen)
        return figures.html(drawn), drawn.command

    system.change(telling(fields_of), system, [*knobs, *words, label], api_name=False)
    given = [system, picture, label, count, seed, *knobs, *words]
    button.click(telling(draw), given, [shown, command], api_name="sample")


def _compare(studio: Studio) -> None:
    gr.Markdown(
        "Two systems of your choice with the same class and seed, each with the sampling settings of `params.yaml`."
        + " Pictures are told in the tab Sample alone." * any(map(studio.is_told_pictures, studio.names))
    )
    with gr.Row():
        label, count, seed = (
            controls.class_field(studio, "Class", "one after another"),
            controls.count_field(),
            controls.seed_field(),
        )
    words = controls.word_fields(any(map(studio.reads_captions, studio.names)), has_negative=False)
    button = gr.Button("Draw both", variant="primary", elem_id="draw-both")
    systems, outputs = [], []
    with gr.Row():
        for number, side in enumerate(("left", "right")):
            with gr.Column():
                name = studio.names[min(number, len(studio.names) - 1)]
                systems.append(gr.Dropdown(studio.names, value=name, label="System", elem_id=f"system-{side}"))
                outputs += [gr.HTML(elem_id=f"drawn-{side}"), controls.command_field()]

    def draw(left: str, right: str, label: int, count: int, seed: int, *of_words: str) -> list[str]:
        both = [studio.draw(name, known(label), count, seed, Words(*of_words)) for name in (left, right)]
        return [text for drawn in both for text in (figures.html(drawn), drawn.command)]

    button.click(telling(draw), [*systems, label, count, seed, *words], outputs, api_name="compare")


def _inpaint(studio: Studio, system: gr.Dropdown) -> None:
    gr.Markdown("What is painted over is drawn anew; all other pixels stay as they are. Paint more, or erase.")
    begin = controls.first(studio, 0)

    def canvas(picture: Image.Image, painted: dict[str, Any] | None = None) -> dict[str, Any]:
        """The picture below what is painted already; if that is nothing, or of another size, a half is painted."""
        background = for_painting(picture)
        layers = [layer for layer in layers_of(painted) if layer.size == background.size and layer.getbbox()]
        return {"background": background, "layers": layers or [painted_below(background.size)], "composite": None}

    def layers_of(painted: dict[str, Any] | None) -> list[Image.Image]:
        return (painted or {}).get("layers") or []

    with gr.Row():
        with gr.Column(scale=4):
            editor = within_limits(gr.ImageEditor(
                canvas(begin.picture), type="pil", sources=(), transforms=(), layers=False, label="Paint here",
                brush=gr.Brush(default_size=48, colors=[PAINT], color_mode="fixed"), eraser=gr.Eraser(48),
                height=500, elem_id="editor", elem_classes="pixels", buttons=[], canvas_size=(560, 560),
            ))  # fmt: skip
        with gr.Column(scale=3):
            source = controls.source(studio, "inpaint", editor, begin, canvas)
            seed = controls.seed_field()
            button = edit_button(studio, system, "inpaint", "Inpaint", "inpaint")
        with gr.Column(scale=3):
            result, command = controls.result("inpainted"), controls.command_field()

    def inpaint(name: str, source: str, painted: dict[str, Any] | None, label: int, seed: int) -> tuple[Any, str]:
        mask = mask_of(layers_of(painted), studio.picture(source).size)
        return studio.edit(name, "inpaint", source, seed, label=known(label), mask=mask)

    def unpainted(source: str) -> dict[str, Any]:
        """The editor's own way to clear takes the picture away, too."""
        return {"background": for_painting(studio.picture(source)), "layers": [], "composite": None}

    editor.clear(telling(unpainted), source.name, editor, api_name=False)
    given = [system, source.name, editor, source.label, seed]
    button.click(telling(inpaint), given, [result, command], api_name="inpaint")


def _enhance(studio: Studio, system: gr.Dropdown) -> None:
    gr.Markdown("Say what the picture suffers from; what comes back is an image that it could have come from.")
    whole = controls.first(studio, 0)
    damaged = studio.damage(whole.name, {"noise_std": NOISE}, 0)
    begin = whole._replace(name=damaged, picture=studio.picture(damaged))
    with gr.Row():
        with gr.Column():
            picture = controls.preview("Damaged picture", begin.picture)
            source = controls.source(studio, "enhance", picture, begin)
        with gr.Column():
            damage = gr.Radio(["noise", "blur", "downsample"], value="noise", label="Damage", elem_id="damage")
            noise = gr.Slider(0, 1, NOISE, step=0.02, label="Noise", info="standard deviation; white is 1, black is -1")
            blur = gr.Slider(0.2, 4, 1, step=0.1, label="Blur", info="standard deviation, in pixels", visible=False)
            factor = gr.Slider(2, 8, 2, step=1, label="Factor", info="by which each side is smaller", visible=False)
            seed, spoil = controls.seed_field(), gr.Button("Damage the picture first", elem_id="spoil")
            button = edit_button(studio, system, "enhance", "Enhance", "enhance")
        with gr.Column():
            result, command = controls.result("enhanced"), controls.command_field()

    def settings(damage: str, noise: float, blur: float, factor: int) -> dict[str, Any]:
        own = {"blur": {"blur_std": blur}, "downsample": {"factor": int(factor)}}.get(damage, {})
        return {"damage": damage, "noise_std": noise, **own}

    def shown(damage: str) -> list[Any]:
        usual = NOISE if damage == "noise" else 0.02
        return [gr.update(value=usual), gr.update(visible=damage == "blur"), gr.update(visible=damage == "downsample")]

    def spoiled(source: str, seed: int, *chosen: Any) -> tuple[str, Image.Image]:
        name = studio.damage(source, settings(*chosen), seed)
        return name, studio.picture(name)

    def enhance(name: str, source: str, label: int, seed: int, *chosen: Any) -> tuple[Any, str]:
        return studio.edit(name, "enhance", source, seed, settings(*chosen), known(label))

    chosen = [damage, noise, blur, factor]
    damage.change(telling(shown), damage, [noise, blur, factor], api_name=False)
    spoil.click(telling(spoiled), [source.name, seed, *chosen], [source.name, picture], api_name="damage")
    given = [system, source.name, source.label, seed, *chosen]
    button.click(telling(enhance), given, [result, command], api_name="enhance")


def _restyle(studio: Studio, system: gr.Dropdown) -> None:
    gr.Markdown("The picture as another class, or with the look of another picture. Strength 0 leaves it as it is.")
    begin, model = controls.first(studio, 0), controls.first(studio, len(studio.rows) // 2)
    with gr.Row():
        with gr.Column():
            picture = controls.preview("Picture", begin.picture)
            source = controls.source(studio, "restyle", picture, begin, has_label=False)
        with gr.Column():
            goal = gr.Radio(["a class", "another picture"], value="a class", label="Restyle to", elem_id="goal")
            target = controls.class_field(studio, "Class to become", None, (begin.label + 1) % len(studio.classes))
            with gr.Column(visible=False) as look:
                reference = controls.preview("Picture whose look is wanted", model.picture)
                other = controls.source(studio, "reference", reference, model, has_label=False)
            strength = gr.Slider(0, 1, 0.7, step=0.05, label="Strength", elem_id="strength")
            seed = controls.seed_field()
            button = edit_button(studio, system, "restyle", "Restyle", "restyle")
        with gr.Column():
            result, command = controls.result("restyled"), controls.command_field()

    # parameters: the fields of the tab
    def restyle(
        name: str, source: str, goal: str, target: int, other: str, strength: float, seed: int
    ) -> tuple[Any, str]:
        if goal == "a class":
            return studio.edit(name, "restyle", source, seed, {"target": target, "strength": strength})
        studio.picture(other)
        return studio.edit(name, "restyle", source, seed, {"strength": strength}, other=other)

    def shown(goal: str) -> list[Any]:
        return [gr.update(visible=goal == "a class"), gr.update(visible=goal != "a class")]

    goal.change(telling(shown), goal, [target, look], api_name=False)
    given = [system, source.name, goal, target, other.name, strength, seed]
    button.click(telling(restyle), given, [result, command], api_name="restyle")


def _vary(studio: Studio, system: gr.Dropdown) -> None:
    gr.Markdown("Pictures around a picture, the farther from it the larger the strength. Each seed gives another one.")
    begin = controls.first(studio, 0)
    with gr.Row():
        with gr.Column():
            picture = controls.preview("Picture", begin.picture)
            source = controls.source(studio, "vary", picture, begin)
        with gr.Column():
            strength = gr.Slider(0, 1, 0.5, step=0.05, label="Strength")
            seed = controls.seed_field()
            button = edit_button(studio, system, "variations", "Vary", "vary")
        with gr.Column():
            result, command = controls.result("varied"), controls.command_field()

    def vary(name: str, source: str, label: int, strength: float, seed: int) -> tuple[Any, str]:
        return studio.edit(name, "variations", source, seed, {"strength": strength}, known(label))

    given = [system, source.name, source.label, strength, seed]
    button.click(telling(vary), given, [result, command], api_name="vary")


def _interpolate(studio: Studio, system: gr.Dropdown) -> None:
    gr.Markdown("An image on the way from one picture to another.")
    sources = []
    with gr.Row():
        for key, title, place in (("from", "From", 0), ("to", "To", len(studio.rows) // 2)):
            with gr.Column():
                begin = controls.first(studio, place)
                preview = controls.preview(title, begin.picture)
                sources.append(controls.source(studio, key, preview, begin, has_label=False).name)
        with gr.Column():
            share = gr.Slider(0, 1, 0.5, step=0.05, label="Share of the way")
            seed = controls.seed_field()
            button = edit_button(studio, system, "interpolate", "Interpolate", "interpolate")
            result, command = controls.result("between"), controls.command_field()

    def interpolate(name: str, start: str, end: str, share: float, seed: int) -> tuple[Any, str]:
        studio.picture(end)
        return studio.edit(name, "interpolate", start, seed, other=end, share=share)

    button.click(telling(interpolate), [system, *sources, share, seed], [result, command], api_name="interpolate")


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m studio.page", description=__doc__.partition("\n")[0])
    parser.add_argument("--port", type=int, default=7860)
    port = parser.parse_args(arguments).port
    try:
        serve(build(Studio()), ADDRESS, port, theme=THEME, css=CSS)
    except (ValueError, OSError) as error:
        is_taken = isinstance(error, OSError) and error.errno == errno.EADDRINUSE
        print(f"port {port} is taken: choose another, such as make studio STUDIO_PORT={port + 1}" if is_taken else error,
              file=sys.stderr)  # fmt: skip
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

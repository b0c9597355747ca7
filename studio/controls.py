"""What the tabs of the studio's page share: pictures with their thumbnails, main buttons, and fields for classes and seeds."""

import functools
import html
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import gradio as gr
from PIL import Image

from studio.actions import MAX_IMAGES, Knob, Studio

NOBODY_KNOWS = -1  # a drop-down has no value for None
Told = tuple[str, Image.Image | None]  # the name of a kept picture, "" for none, and what is told of it


class First(NamedTuple):
    """The picture that a tab starts with: its name among the kept ones, its row among the test images."""

    name: str
    picture: Image.Image
    row: int
    label: int


class Source(NamedTuple):
    """Where a picture comes from: `name` is the State of the kept picture's name."""

    name: gr.State
    label: gr.Dropdown | None


def telling(action: Callable[..., Any]) -> Callable[..., Any]:
    """The action, whose mistakes of the user become messages on the page; our own mistakes have a traceback as well."""

    @functools.wraps(action)
    def told(*values: Any) -> Any:
        try:
            return action(*values)
        except (ValueError, OSError) as error:
            sentence = str(error)
        except Exception as error:
            traceback.print_exc()
            sentence = f"the studio failed: {type(error).__name__}: {error}; the terminal it runs in shows where"
        raise gr.Error(html.escape(sentence), duration=20, print_exception=False)

    return told


def first(studio: Studio, place: int) -> First:
    """The thumbnail at this place."""
    row = studio.rows[place % len(studio.rows)]
    taken = studio.take_test_image(row)
    return First(taken.name, taken.picture, row, taken.label)


def source(
    studio: Studio,
    key: str,
    preview: gr.Image | gr.ImageEditor,
    begin: First,
    shown: Callable[..., Any] = lambda picture: picture,
    has_label: bool = True,
) -> Source:
    """Thumbnails and buttons that put a test image, or a picture of the user's, into the preview.

    shown: what the preview is given for a picture; an editor's has a second argument, what the editor holds.
    """
    name = gr.State(begin.name)
    thumbnails = gr.Gallery(
        studio.thumbnails(), columns=8, object_fit="contain", format="png", allow_preview=False, buttons=[],
        label="Test images", show_label=False, container=False, elem_id=f"thumbnails-{key}",
        elem_classes="pixels thumbnails", interactive=False,
    )  # fmt: skip
    with gr.Row(equal_height=True):
        number = gr.Number(
            begin.row, label="Number of a test image", container=False,
            elem_id=f"number-{key}", min_width=60,
        )  # fmt: skip
        button = gr.Button("Take this number", elem_id=f"take-{key}", size="sm", min_width=120)
        upload = gr.UploadButton("Upload", elem_id=f"upload-{key}", size="sm", min_width=70)
    label = class_field(studio, "The picture shows", "not told", begin.label) if has_label else None

    def uploaded(path: str, *held: Any) -> tuple[Any, ...]:
        file = Path(path)
        kept = studio.take(file.read_bytes(), file.name)
        return kept, shown(studio.picture(kept), *held), *([NOBODY_KNOWS] if has_label else [])

    def numbered(row: int, *held: Any) -> tuple[Any, ...]:
        taken = studio.take_test_image(row)
        return taken.name, shown(taken.picture, *held), *([taken.label] if has_label else [])

    def clicked(event: gr.SelectData, *held: Any) -> tuple[Any, ...]:
        row = studio.rows[event.index]
        return row, *numbered(row, *held)

    held = [preview] if isinstance(preview, gr.ImageEditor) else []
    changed = [name, preview, *([label] if label else [])]
    upload.upload(telling(uploaded), [upload, *held], changed, api_name=f"upload_{key}")
    button.click(telling(numbered), [number, *held], changed, api_name=f"take_{key}")
    thumbnails.select(telling(clicked), held, [number, *changed], api_name=False)
    return Source(name, label)


def told_picture(studio: Studio, system: gr.Dropdown) -> gr.State:
    """Shown for systems that were told pictures, beginning with that of a test image. It holds the name of the kept one."""

    def taken(name: str, number: Any) -> Told:
        kept = studio.take_test_picture(name, number)
        return kept, studio.told(name, kept)

    def begun(name: str) -> tuple[list[Image.Image] | None, int, str, Image.Image | None]:
        if not studio.is_told_pictures(name):
            return None, studio.rows[0], "", None
        return studio.pictures_to_tell(name), studio.rows[0], *taken(name, studio.rows[0])

    first = studio.names[0]
    offered, row, kept, shown = begun(first)
    name = gr.State(kept)
    with gr.Row(visible=studio.is_told_pictures(first), elem_id="telling") as fields:
        with gr.Column():
            gr.Markdown("All images are drawn of one picture: click a test image's, upload one, or tell none.")
            thumbnails = gr.Gallery(
                offered, columns=8, object_fit="contain", format="png", allow_preview=False, buttons=[],
                label="Pictures of test images", show_label=False, container=False, elem_id="thumbnails-told",
                elem_classes="pixels thumbnails", interactive=False,
            )  # fmt: skip
            with gr.Row(equal_height=True):
                number = gr.Number(
                    row, label="Number of a test image", container=False, min_width=60, elem_id="number-told"
                )
                take = gr.Button("Take this number", size="sm", min_width=120, elem_id="take-told")
                upload = gr.UploadButton("Upload", size="sm", min_width=70, elem_id="upload-told")
                clear = gr.Button("Tell no picture", size="sm", min_width=120, elem_id="clear-told")
        with gr.Column():
            preview = gr.Image(
                shown, type="pil", format="png", interactive=False, label="The prior is told this picture", height=240,
                elem_id="told", elem_classes="pixels", buttons=[],
            )  # fmt: skip

    def uploaded(system: str, path: str) -> Told:
        file = Path(path)
        kept = studio.take_to_tell(system, file.read_bytes(), file.name)
        return kept, studio.told(system, kept)

    def clicked(system: str, event: gr.SelectData) -> tuple[int, str, Image.Image | None]:
        row = studio.rows[event.index]
        return row, *taken(system, row)

    def changed(system: str) -> tuple[Any, ...]:
        return gr.update(visible=studio.is_told_pictures(system)), *begun(system)

    upload.upload(telling(uploaded), [system, upload], [name, preview], api_name="upload_told")
    take.click(telling(taken), [system, number], [name, preview], api_name="take_told")
    clear.click(telling(lambda: ("", None)), None, [name, preview], api_name=False)
    thumbnails.select(telling(clicked), system, [number, name, preview], api_name=False)
    system.change(telling(changed), system, [fields, thumbnails, number, name, preview], api_name=False)
    return name


def edit_button(studio: Studio, system: gr.Dropdown, kind: str, title: str, name: str) -> gr.Button:
    """The main button of an edit's tab; while the chosen system cannot do the edit, disabled below a sentence why."""
    refusal = studio.refusal(studio.names[0], kind)
    why = gr.Markdown(refusal, visible=bool(refusal), elem_id=f"cannot-{name}", elem_classes="cannot")
    button = gr.Button(title, variant="primary", elem_id=name, interactive=not refusal)

    def asked(system: str) -> tuple[Any, Any]:
        refusal = studio.refusal(system, kind)
        return gr.update(value=refusal, visible=bool(refusal)), gr.update(interactive=not refusal)

    system.change(telling(asked), system, [why, button], api_name=False)
    return button


def class_field(
    studio: Studio, title: str, none: str | None, value: int = NOBODY_KNOWS, info: str | None = None
) -> gr.Dropdown:
    """none: the choice that is no class, if there is one."""
    choices = [(name, label) for label, name in enumerate(studio.classes)]
    return gr.Dropdown([(none, NOBODY_KNOWS), *choices] if none else choices, value=value, label=title, info=info)


def about_class(studio: Studio, name: str) -> str | None:
    """What a class is for a system that is told pictures, too."""
    return "beside a picture none is told unless you choose one" if studio.is_told_pictures(name) else None


def word_fields(is_shown: bool, has_negative: bool) -> list[gr.Textbox]:
    """What is to be drawn, and, if it is asked for, what not, in words."""
    titles = {"caption": "In words", "negative": "Not so, in words"}
    with gr.Row():
        return [
            gr.Textbox(
                "", label=title, elem_id=key if has_negative else f"{key}-of-both", max_lines=1, visible=is_shown
            )
            for key, title in titles.items()
            if has_negative or key == "caption"
        ]


def known(label: int) -> int | None:
    """A drop-down's label; None where nobody knows it."""
    return None if label == NOBODY_KNOWS else label


def count_field() -> gr.Slider:
    return gr.Slider(1, MAX_IMAGES, 6, step=1, label="Images")


def seed_field() -> gr.Number:
    return gr.Number(0, label="Seed")  # its range is checked by our own sentence


def knob_field(knob: str, now: Knob | None) -> gr.Slider:
    """A slider at the system's own setting; hidden where it has none."""
    scale = 0, 10, 0.05
    ranges = {"guidance": scale, "autoguidance": scale, "temperature": (0.05, 3, 0.05), "steps": (1, 200, 1)}
    low, high, step = ranges[knob]
    value = now.value if now else 1
    return gr.Slider(low, max(high, value), value, step=step, label=knob.capitalize(), visible=now is not None)


def preview(title: str, picture: Image.Image) -> gr.Image:
    return gr.Image(
        picture, type="pil", format="png", interactive=False, label=title, height=300, elem_classes="pixels", buttons=[]
    )


def result(name: str) -> gr.Image:
    return gr.Image(
        format="png", interactive=False, label="Result", height=300, elem_id=name, elem_classes="pixels",
        buttons=["download"],
    )  # fmt: skip


def command_field() -> gr.Textbox:
    title = "The same from the shell"
    return gr.Textbox(label=title, interactive=False, lines=2, max_lines=12, buttons=["copy"], elem_classes="command")

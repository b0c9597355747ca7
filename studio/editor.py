"""How much of a painting the studio takes in: Gradio's editor decodes and keeps all that it is sent."""

import html
import threading
from pathlib import Path
from typing import Any

import gradio as gr
from gradio.components.base import server
from gradio.components.image_editor import EditorDataBlobs
from starlette.exceptions import HTTPException

from studio.actions import MAX_LAYERS, painted_layers

MAX_PAINTINGS = 8  # sent by browsers and not used yet
MAX_LAYER_BYTES = 2**23  # as the server reads


def within_limits(editor: gr.ImageEditor) -> gr.ImageEditor:
    """The editor, of which the layers alone are read. (Gradio writes a file beside the code of a subclass.)"""

    keeping = threading.Lock()

    def preprocess(payload: Any) -> dict[str, Any] | None:
        if payload is None:
            return None
        sent = editor.blob_storage.pop(payload.id, None) if payload.id is not None else payload
        files = [layer for layer in (sent.layers if sent else []) if layer is not None]
        try:
            layers = painted_layers([file if isinstance(file, bytes) else Path(file.path) for file in files])
        except (ValueError, OSError) as error:
            raise gr.Error(html.escape(str(error)), duration=20, print_exception=False) from None
        return {"background": None, "layers": layers, "composite": None}

    @server
    def accept_blobs(data: Any) -> None:
        """Keep what a browser sends of a painting before the request that uses it."""
        given, (_, file) = data.data, data.files[0]
        if given["type"] != "layer":
            return
        place = str(given["index"])
        if not place.isdecimal() or int(place[:9]) >= MAX_LAYERS or len(file) > MAX_LAYER_BYTES:
            raise HTTPException(
                413, f"a painting has at most {MAX_LAYERS} layers of {MAX_LAYER_BYTES:,} bytes: paint less"
            )
        new = EditorDataBlobs(background=None, layers=[], composite=None)
        with keeping:  # a browser sends all layers at once
            layers = editor.blob_storage.setdefault(given["id"], new).layers
            layers += [None] * (int(place) + 1 - len(layers))
            layers[int(place)] = file
            while len(editor.blob_storage) > MAX_PAINTINGS:
                del editor.blob_storage[next(iter(editor.blob_storage))]  # the oldest

    editor.preprocess, editor.accept_blobs = preprocess, accept_blobs
    return editor

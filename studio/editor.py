"""The field to paint in, and how much of a painting it takes in."""

import html
from pathlib import Path
from typing import Any

import gradio as gr
from gradio.components.base import server
from gradio.components.image_editor import EditorDataBlobs

from studio.actions import MAX_LAYERS, painted_layers

MAX_PAINTINGS = 8  # sent by browsers and not used yet
MAX_LAYER_BYTES = 2**23  # as the server reads


class Painting(gr.ImageEditor):
    """Gradio's editor, whose layers alone are read, and within limits: Gradio decodes and keeps all that it is sent."""

    is_template = True  # the browser shows it as its parent

    def preprocess(self, payload: Any) -> dict[str, Any] | None:
        if payload is None:
            return None
        sent = self.blob_storage.pop(payload.id, None) if payload.id is not None else payload
        files = [layer for layer in (sent.layers if sent else []) if layer is not None]
        try:
            layers = painted_layers([file if isinstance(file, bytes) else Path(file.path) for file in files])
        except (ValueError, OSError) as error:
            raise gr.Error(html.escape(str(error)), duration=20, print_exception=False) from None
        return {"background": None, "layers": layers, "composite": None}

    @server
    def accept_blobs(self, data: Any) -> None:
        """Keep what a browser sends of a painting before the request that uses it."""
        given, (_, file) = data.data, data.files[0]
        if given["type"] != "layer":
            return
        place = str(given["index"])
        if not place.isdecimal() or int(place[:9]) >= MAX_LAYERS or len(file) > MAX_LAYER_BYTES:
            raise gr.Error(f"a painting has at most {MAX_LAYERS} layers of {MAX_LAYER_BYTES:,} bytes: paint less")
        painting = self.blob_storage.pop(given["id"], None) or EditorDataBlobs(
            background=None, layers=[], composite=None
        )
        painting.layers += [None] * (int(place) + 1 - len(painting.layers))
        painting.layers[int(place)] = file
        self.blob_storage[given["id"]] = painting
        while len(self.blob_storage) > MAX_PAINTINGS:
            del self.blob_storage[next(iter(self.blob_storage))]  # the oldest

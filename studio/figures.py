"""Drawn images and their tokens as HTML: every image enlarged without blur, every token a colored cell with its index."""

import base64
import io

import numpy as np

from studio.actions import Drawn
from tessera.artifacts import pictures

LARGEST_NUMBERED = 16  # columns of a grid whose cells have room for numbers

CSS = """
.drawn {display: flex; flex-wrap: wrap; gap: 18px; align-items: flex-start}
.drawn figure {margin: 0; display: flex; gap: 8px; align-items: center; padding: 8px; border-radius: 8px;
  background: var(--background-fill-secondary)}
.drawn img {height: 156px; image-rendering: pixelated; border-radius: 2px}
.drawn table {border-collapse: collapse; margin: 0; width: auto}
.drawn td {width: 22px; height: 22px; padding: 0; border: 1px solid #fff6; text-align: center; font: 9px/1 monospace;
  color: #111}
.drawn table.many td {width: 6px; height: 6px; border: 0}
.drawn p {flex-basis: 100%; margin: 0}
.pixels img {image-rendering: pixelated; object-fit: contain}
.pixels .image-container, .pixels .image-frame {padding-top: 18px}
.thumbnails .grid-wrap {height: auto; min-height: 0; max-height: none; padding: 0}
.thumbnails .grid-container {grid-template-columns: repeat(8, minmax(0, 1fr)) !important; gap: 4px; padding: 0;
  grid-auto-rows: auto !important; grid-template-rows: none !important; height: auto}
.thumbnails .thumbnail-item {aspect-ratio: 1; width: 100%; height: auto; cursor: pointer;
  border-radius: 3px !important}
/* Gradio asks an editor twice for what is painted, and waits for ever if a new picture comes between */
#editor > [data-testid=status-tracker] {display: none}
[data-testid=status-tracker]:has(> .error) {display: none}  /* a red box without words: the message says them */
#told img {outline: 1px solid var(--border-color-primary)}  /* a white picture on a white page */
.cannot {padding: 8px 12px; border-left: 4px solid var(--color-accent); background: var(--background-fill-secondary)}
.cannot .cannot {padding: 0; border: 0}
"""


def html(drawn: Drawn) -> str:
    """All of them, and below the images of latents why there are no numbers."""
    parts = []
    for number, image in enumerate(drawn.images):
        grid = "" if drawn.indices is None else table(drawn.indices[number])
        parts.append(f'<figure><img alt="image {number}" src="{data_uri(image)}">{grid}</figure>')
    if drawn.indices is None:
        parts.append("<p>This prior draws latents, not codebook indices: there are no indices to show.</p>")
    else:
        last = drawn.codebook_size - 1
        parts.append(
            f"<p>Beside each image its tokens: indices of the codebook, 0 to {last}; equal colors are equal codes.</p>"
        )
    return f'<div class="drawn">{"".join(parts)}</div>'


def table(indices: np.ndarray) -> str:
    """(h, w) indices; a grid too fine for numbers has them as tooltips."""
    is_fine = indices.shape[1] > LARGEST_NUMBERED
    rows = ("".join(_cell(int(index), is_fine) for index in row) for row in indices)
    return f'<table class="{"many" if is_fine else "few"}">{"".join(f"<tr>{row}</tr>" for row in rows)}</table>'


def _cell(index: int, is_fine: bool) -> str:
    hue = index * 137.508 % 360  # the golden angle: near indices get far colors
    text = f' title="{index}"></td>' if is_fine else f">{index}</td>"
    return f'<td style="background:hsl({hue:.0f} 65% 75%)"{text}'


def data_uri(image: np.ndarray) -> str:
    """(C, H, W) uint8 as a PNG of just these pixels."""
    file = io.BytesIO()
    pictures.picture(image).save(file, "png")
    return f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"

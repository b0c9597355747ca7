"""Grids of images as PNG, enlarged by nearest neighbour: what a person looks at to judge a run. Of 16 bits 8 are shown."""

import math
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from tessera.artifacts import bit_depth, whole
from tessera.artifacts.fonts import font_for
from tessera.components import sets

MARGIN = 1  # pixels between images, before enlarging
SHORTEST_SIDE = 48  # of one image on the screen, at least
CAPTIONED_SIDE, FONT_SIZE, LINES, GAP = 112, 11, 3, 3  # pixels, and lines of a caption, in pictures with words


def grid(images: np.ndarray, num_columns: int) -> np.ndarray:
    """(N, C, H, W) uint8 in reading order -> (rows, columns, 3) uint8 on a dark ground, each image enlarged alike.

    Of images of other than 3 channels the first one is shown, in gray."""
    if sets(bit_depth.of(images), "bits"):
        images = bit_depth.shown(images)
    count, channels, height, width = images.shape
    num_rows = math.ceil(count / num_columns)
    canvas = np.full((num_rows * (height + MARGIN) + MARGIN, num_columns * (width + MARGIN) + MARGIN, 3), 32, np.uint8)
    for number, image in enumerate(images):
        row, column = divmod(number, num_columns)
        top, left = MARGIN + row * (height + MARGIN), MARGIN + column * (width + MARGIN)
        colors = image if channels == 3 else np.repeat(image[:1], 3, axis=0)
        canvas[top : top + height, left : left + width] = colors.transpose(1, 2, 0)
    scale = max(1, math.ceil(SHORTEST_SIDE / min(height, width)))
    return canvas.repeat(scale, axis=0).repeat(scale, axis=1)


def picture(image: np.ndarray) -> Image.Image:
    """(C, H, W) uint8: gray, RGB, or of other channels the first one in gray, as `grid` shows it."""
    if sets(bit_depth.of(image), "bits"):
        image = bit_depth.shown(image)
    return Image.fromarray(image.transpose(1, 2, 0) if len(image) == 3 else image[0])


def save_grid(path: Path, images: np.ndarray, num_columns: int) -> None:
    with whole.file(path) as beside:
        Image.fromarray(grid(images, num_columns)).save(beside, optimize=False)


def by_class(images: np.ndarray, labels: np.ndarray, num_columns: int = 10, max_rows: int = 10) -> np.ndarray:
    """The first images of each class, one class per row; without classes, simply the first ones. (N, C, H, W) uint8."""
    classes = np.unique(labels)
    if len(classes) == 1:
        return images[: num_columns * max_rows]
    rows = []
    for label in classes[:max_rows]:
        row = images[labels == label][:num_columns]
        blank = np.zeros((num_columns - len(row), *images.shape[1:]), np.uint8)
        rows.append(np.concatenate([row, blank]))
    return np.concatenate(rows)


def save_captioned(path: Path, images: np.ndarray, captions: list[str], num_columns: int) -> None:
    """As `save_grid`, with the words below each image; (N, C, H, W) uint8. Letters that no font here has are boxes."""
    font = font_for("".join(captions), FONT_SIZE)
    side = max(CAPTIONED_SIDE, *images.shape[2:])
    scale = max(1, round(side / max(images.shape[2:])))
    height, width = (scale * length for length in images.shape[2:])
    cell, num_rows = width + 2 * GAP, math.ceil(len(images) / num_columns)
    row_height = height + LINES * (FONT_SIZE + 2) + 3 * GAP
    canvas = Image.new("RGB", (num_columns * cell, num_rows * row_height), "white")
    draw = ImageDraw.Draw(canvas)
    for number, (image, caption) in enumerate(zip(images, captions, strict=True)):
        row, column = divmod(number, num_columns)
        left, top = column * cell + GAP, row * row_height + GAP
        canvas.paste(picture(image).convert("RGB").resize((width, height), Image.Resampling.NEAREST), (left, top))
        for line, text in enumerate(_lines(caption, lambda text: draw.textlength(text, font) <= width)):
            draw.text((left, top + height + GAP + line * (FONT_SIZE + 2)), text, fill="black", font=font)
    with whole.file(path) as beside:
        canvas.save(beside, "PNG")


def _lines(text: str, fits: Callable[[str], bool]) -> list[str]:
    """At most LINES lines that fit, broken at words where these are short enough; three dots where more follows."""
    lines = [""]
    for word in re.findall(r"\S+\s*", text):
        for piece in [word] if fits(word.rstrip()) else list(word):
            if lines[-1] and not fits((lines[-1] + piece).rstrip()):
                lines.append("")
            lines[-1] += piece
    if len(lines) <= LINES:
        return lines
    last = lines[LINES - 1].rstrip()
    while last and not fits(f"{last}..."):
        last = last[:-1]
    return [*lines[: LINES - 1], f"{last}..."]

"""The rows of files with metadata: JSON lines, CSV, parquet, StyleGAN's dataset.json, and files beside single images.

Every mistake is a ValueError of one sentence that names the file and the line.
"""

import csv
import io
import json
from collections.abc import Iterator
from typing import Any

Row = dict[str, Any]


def rows_of(name: str, data: bytes) -> Iterator[tuple[int, Row]]:
    """The rows of a file with metadata, each with the number of its line. Raises ValueError, naming file and line."""
    try:
        if name.endswith(".parquet"):
            yield from _parquet(name, data)
        elif name.endswith(".jsonl"):
            yield from _json_lines(name, _text(data))
        elif name.endswith(".csv"):
            yield from _csv(name, _text(data))
        else:
            yield from _stylegan(name, _text(data))
    except UnicodeDecodeError as error:
        raise ValueError(f"{name} is no UTF-8 at byte {error.start:,}: save it as UTF-8") from None


def _text(data: bytes) -> str:
    return data.decode("utf-8-sig")


def _json_lines(name: str, text: str) -> Iterator[tuple[int, Row]]:
    for number, line in enumerate(io.StringIO(text), 1):
        if not line.strip():
            continue
        yield number, _object(line, f"{name} line {number}")


def _object(text: str, where: str) -> Any:
    try:
        found = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where} is no JSON ({error}): mend it") from None
    if not isinstance(found, dict):
        raise ValueError(f"{where} is {str(found)!r:.40}, expected a JSON object with the names of columns")
    return found


def _csv(name: str, text: str) -> Iterator[tuple[int, Row]]:
    reader = csv.DictReader(io.StringIO(text, newline=""), strict=True)
    try:
        for row in reader:
            if None in row or None in row.values():
                raise ValueError(
                    f"{name} line {reader.line_num} has another number of cells than the {len(reader.fieldnames or ())} "
                    f"columns of the first line: put captions with commas in quotation marks"
                )
            yield reader.line_num, dict(row)
    except csv.Error as error:
        raise ValueError(f"{name} cannot be read after line {reader.line_num} ({error}): mend it") from None


def _stylegan(name: str, text: str) -> Iterator[tuple[int, Row]]:
    pairs = _object(text, name).get("labels")
    if not isinstance(pairs, list):
        raise ValueError(
            f'{name} has no list of labels, expected {{"labels": [["a/1.png", 3], ...]}} as StyleGAN reads it'
        )
    for number, pair in enumerate(pairs, 1):
        if not (isinstance(pair, list) and len(pair) == 2):
            raise ValueError(
                f'{name}: label {number} is {str(pair)!r:.40}, expected an image and its class: ["a/1.png", 3]'
            )
        yield number, {"file_name": pair[0], "label": pair[1]}


def _parquet(name: str, data: bytes) -> Iterator[tuple[int, Row]]:
    import pyarrow as pa  # here: few have it so, and every stage would wait for it
    import pyarrow.parquet as pq

    try:
        table = pq.ParquetFile(io.BytesIO(data))
        for batch in table.iter_batches():
            yield from enumerate(batch.to_pylist(), 1)
    except (pa.ArrowInvalid, OSError) as error:
        raise ValueError(
            f"{name} cannot be read as parquet ({str(error).splitlines()[0]:.200}): write it again"
        ) from None


def beside(name: str, data: bytes) -> Row:
    """What one file beside an image says."""
    try:
        text = _text(data)
    except UnicodeDecodeError as error:
        raise ValueError(f"{name} is no UTF-8 at byte {error.start:,}: save it as UTF-8") from None
    if name.endswith(".json"):
        return _object(text, name)
    return {"txt" if name.endswith(".txt") else "cls": text.strip()}


def cell(row: Row, column: str, where: str) -> Any:
    if column not in row:
        raise ValueError(f"{where} has no column {column!r}{columns_of(row)}")
    return row[column]


def text_in(row: Row, column: str, where: str) -> str | None:
    value = cell(row, column, where)
    if value is None or value == "" or value != value:  # NaN
        return None
    if not isinstance(value, str | int | float | bool):
        raise ValueError(f"{where} has {str(value)!r:.40} in the column {column!r}, expected text or a number")
    return str(value)


def columns_of(row: Row) -> str:
    return f", expected it among its columns {', '.join(map(repr, row))[:200]}: name yours in metadata"


def naturally(name: str) -> tuple[int, float, str]:
    """Numbers by their size, before words by their letters."""
    try:
        return (0, float(name), name)
    except ValueError:
        return (1, 0.0, name)

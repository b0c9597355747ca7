"""Requests that are wrong in every way we could think of, as (name, headers, body) of a POST; bodies are bytes."""

import json
from typing import Any

JSON = {"Content-Type": "application/json"}
GOOD = {"labels": [3]}


def hostile() -> list[tuple[str, dict[str, str], bytes]]:
    """No server may answer one of them with 200, 5xx or a trace, or take longer than some seconds."""
    found: list[tuple[str, dict[str, str], bytes]] = []

    def add(name: str, body: Any, headers: dict[str, str] = JSON) -> None:
        found.append((name, headers, body if isinstance(body, bytes) else json.dumps(body).encode()))

    def inputs(name: str, **values: Any) -> None:
        add(name, {"inputs": GOOD | values})

    for depth in (200, 10_000, 30_000):
        add(f"lists, {depth} deep", b'{"inputs":' + b"[" * depth + b"]" * depth + b"}")
        add(f"objects, {depth} deep", b'{"inputs":' + b'{"a":' * depth + b"1" + b"}" * depth + b"}")
        add(f"open lists, {depth} deep", b"[" * depth)
    for digits in (20, 400, 4000, 5000, 60_000):
        add(f"a label of {digits} digits", b'{"inputs":{"labels":[' + b"9" * digits + b"]}}")
        add(f"a seed of {digits} digits", b'{"inputs":{"labels":[3],"seed":' + b"9" * digits + b"}}")
    for word in (b"NaN", b"Infinity", b"-Infinity", b"1e999", b"-1", b"20.5e300", b"{}", b"[[]]", b'"x"'):
        add(f"guidance_scale {word.decode()}", b'{"inputs":{"labels":[3],"guidance_scale":' + word + b"}}")
    values: tuple[Any, ...] = (
        "1",
        "x" * 50_000,
        {"a": 1},
        None,
        3,
        1.5,
        True,
        [],
        ["3"],
        [3.0],
        [True],
        [None],
        [[3]],
        [10],
        [-1],
        [0] * 65,
    )
    for value in values:
        inputs(f"labels {str(value)[:20]}", labels=value)
    for value in (1.5, -1, 2**32, "one", [1], {"a": 1}, "9" * 400):
        inputs(f"seed {str(value)[:20]}", seed=value)
    inputs("temperature", temperature=0.5)
    inputs("num_steps", num_steps=10**9)
    inputs("labels2", labels2=[3])
    inputs("2,000 unknown keys", **{f"key{number}": 1 for number in range(2000)})
    inputs("a key of 50,000 letters", **{"k" * 50_000: 1})
    for body in (
        [],
        3,
        None,
        "text",
        {},
        GOOD,
        *({"inputs": given} for given in (None, [], [GOOD, GOOD])),
        {"instances": [GOOD]},
    ):
        add(f"body {str(body)[:30]}", body)
    add("two forms", {"inputs": GOOD, "instances": GOOD})
    add("params", {"inputs": GOOD, "params": {"num_steps": 10**9}})
    add("beside inputs", {"inputs": GOOD, "seed": 1})
    add("a ragged table", {"dataframe_split": {"columns": ["labels", "seed"], "data": [[[3]]]}})
    add("a table of nothing", {"dataframe_split": {"columns": 3, "data": [3]}})
    add("two rows", {"dataframe_records": [GOOD, GOOD]})
    good = json.dumps({"inputs": GOOD}).encode()
    for kind in (
        "",
        "text/xml",
        "text/plain",
        "text/csv",
        "multipart/form-data; boundary=x",
        "application/vnd.apache.parquet",
    ):
        add(f"Content-Type {kind!r}", good, {"Content-Type": kind} if kind else {})
    add(
        "XML",
        b'<?xml version="1.0"?><!DOCTYPE a [<!ENTITY b "&b;&b;">]><a>&b;</a>',
        {"Content-Type": "application/xml"},
    )
    add("a charset", good, {"Content-Type": "application/json; charset=latin-9"})
    add("cut off", good[:-3])
    add("shorter than its Content-Length", good, JSON | {"Content-Length": str(len(good) + 10)})
    add("empty", b"")
    add("a byte order of none", b"\xff\xfe\xfd\x00" * 100)
    add("all bytes", bytes(range(256)) * 8)
    add("gzip", b"\x1f\x8b\x08\x00" + b"\0" * 50, JSON | {"Content-Encoding": "gzip"})
    add("20 MB of labels", b'{"inputs":{"labels":[' + b"3," * 10_000_000 + b"3]}}")
    return found

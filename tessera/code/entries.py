"""The entries of the pipeline's graph, and the code and settings that decide the result of each.

dvc.yaml says which params an entry depends on; the parts in them (files of tessera/FOLDER, by their `kind`) are its code,
beside the stage itself. A part that an entry receives as an artifact brings a hash of its code in config.json.
"""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from tessera.code.definitions import Code, digest_of
from tessera.components import PACKAGE, Params
from tessera.params import Pipeline

PACKAGES = ("stages", "tessera")
OF_IMAGES = frozenset({"bits"})  # added keys of a data set that every stage asks for, of the spec of its images
FINGERPRINTS = "fingerprint_code"  # the stage that writes them: the only one without one
RUN = re.compile(r"python -m tessera\.running (\w+)")


class Entry(NamedTuple):
    name: str  # train_prior@vqgan-flow
    stage: str  # the file in stages/: train_prior
    params: dict[str, Any]  # by their keys in params.yaml, defaults filled in
    keys: frozenset[str] = frozenset()  # OF_IMAGES, of those that the data set sets


def read(params: Pipeline, graph: Path) -> list[Entry]:
    """The entries of a dvc.yaml under these params, in its order."""
    found, of_images = [], keys_set_in(params.dataset) & OF_IMAGES
    for name, stage in yaml.safe_load(graph.read_text(encoding="utf-8"))["stages"].items():
        if name == FINGERPRINTS:
            continue
        body, keys = stage, [None]
        if "foreach" in stage:
            body, keys = stage["do"], list(getattr(params, stage["foreach"].strip("${}")))
        for key in keys:
            named = [*body.get("params", ()), *body.get("meta", {}).get("params", ())]
            wanted = [path.replace("${key}", str(key)) for path in named]
            entry = name if key is None else f"{name}@{key}"
            values = {path: _value(params, path) for path in wanted}
            found.append(Entry(entry, RUN.search(body["cmd"])[1], values, of_images))
    return found


def _value(params: Pipeline, path: str) -> Any:
    """What params hold at a dotted path, such as systems.vqgan-flow.prior."""
    first, *rest = path.split(".")
    if first == "systems" and rest[1:] == ["sampling"]:
        return params.sampling(rest[0])  # as the prior's file understands it
    value = getattr(params, first)
    for step in rest:
        value = value[step] if isinstance(value, dict) else getattr(value, step)
    return value


def modules_of(value: Any) -> Iterator[str]:
    """The modules of all parts in params: of every Config with a `kind`, and of a prior's Sampling."""
    if isinstance(value, Params):
        if hasattr(value, "kind") or type(value).__name__ == "Sampling":
            yield type(value).__module__
        value = dict(value)
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list | tuple):
        for each in value:
            yield from modules_of(each)


def keys_set_in(value: Any) -> frozenset[str]:
    """The added keys (components.AddedKey) that some params in `value` set."""
    found: set[str] = set()
    if isinstance(value, Params):
        fields = type(value).model_fields
        found = {key for key, field in fields.items() if field.exclude_if and not field.exclude_if(getattr(value, key))}
        value = dict(value)
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else ()
    return frozenset(found.union(*map(keys_set_in, inner)))


def all_code() -> Code:
    return Code(PACKAGE.parent, PACKAGES)


def code_of(
    value: Any, stage: str | None = None, code: Code | None = None, keys: frozenset[str] = frozenset()
) -> dict[str, str]:
    """The digests of what the parts in `value` can run, and with `stage` (a file of stages/) of what it runs with them.

    keys: added keys that are set beside those in `value`.
    """
    code = (code or all_code()).of_keys(keys_set_in(value) | keys)
    roots = set(modules_of(value))
    if stage is not None:
        roots.add(f"stages.{stage}.run")
    return code.reached_from(sorted(roots))


def fingerprint(config: Params) -> str:
    """One hash of the code of a part and of the parts in it."""
    return digest_of(code_of(config))


def plain(value: Any) -> Any:
    """Params as JSON has them, defaults filled in."""
    if isinstance(value, Params):
        return value.model_dump(mode="json")
    if isinstance(value, dict):
        return {key: plain(each) for key, each in value.items()}
    return value

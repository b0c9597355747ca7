"""YAML that is plain data: no repeated keys, no dates, no bytes, no numbers and no nesting without end; and the keys that its
optional sections may have."""

import re
from collections.abc import Iterable
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Union, get_args, get_origin

import yaml

from tessera.components import InvalidParams, Params, _Folder, load, parse

MOST_VALUES = 100_000
LARGEST = 2**63 - 1  # of a whole number, where others read it too
UNTOLD = ": unknown key (known keys: )"


class Loader(yaml.SafeLoader):
    """YAML lets a repeated key win silently; here it is an error. 1e-05 is a number, as in YAML 1.2; a date is text."""

    yaml_implicit_resolvers = {
        first: [
            *(
                [("tag:yaml.org,2002:float", re.compile(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+$"))]
                if first in "-+0123456789"
                else []
            ),
            *(one for one in known if one[0] != "tag:yaml.org,2002:timestamp"),
        ]
        for first, known in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, str | int | float | None):
                raise InvalidParams(f"line {key_node.start_mark.line + 1}: the key {key} is no text; expected a name")
            if key in seen:
                raise InvalidParams(
                    f"line {key_node.start_mark.line + 1}: the key '{key}' stands there twice; keep one"
                )
            seen.add(key)
        return super().construct_mapping(node, deep)


def require_plain(value: Any, where: str = "") -> None:
    """Raises InvalidParams, naming the key, for what YAML can say and params cannot: bytes, sets and the like, and aliases
    of aliases, by which a few lines mean a billion values."""
    waiting, num_values = [(where, value)], 0
    while waiting:
        path, each = waiting.pop()
        num_values += 1
        if num_values > MOST_VALUES:
            raise InvalidParams(
                f"more than {MOST_VALUES:,} values, with those that aliases repeat; expected some hundred"
            )
        if isinstance(each, dict | list):
            inner = each.items() if isinstance(each, dict) else enumerate(each)
            waiting += [(f"{path}.{key}" if path else str(key), value) for key, value in inner]
        elif not isinstance(each, str | int | float | None):
            raise InvalidParams(
                f"{path} is of type {type(each).__name__}; expected text, a number, true, false or null"
            )
        elif isinstance(each, int) and not -LARGEST <= each <= LARGEST:
            raise InvalidParams(f"{path} is a number of {each.bit_length():,} bits; expected at most 63")


def read(text: str, path: Path) -> Any:
    """What the text says. Raises InvalidParams, naming the path that it is of, for what is no plain YAML."""
    try:
        value = yaml.load(text, Loader)  # noqa: S506  a SafeLoader
        require_plain(value)
    except InvalidParams as error:
        raise InvalidParams(f"{path}: {error}") from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # numbers of 5,000 digits, a thousand brackets
        raise InvalidParams(f"{path} is no plain YAML: {error}") from None
    return value


def with_keys(config: type[Params], value: Any, sentences: str) -> str:
    """The sentences of InvalidParams about a value of `config`, a line each, with the known keys where they lack them.

    components.parse, which is code of all that people trained, does not look through `Section | None`; no stage reaches this.
    """
    return "\n".join(
        _with_keys_of_section(config, value, line) if line.endswith(UNTOLD) else line for line in sentences.split("\n")
    )


def _with_keys_of_section(model: Any, value: Any, line: str) -> str:
    path = line.removesuffix(UNTOLD)
    where: list[str] = []
    for step in path.split("."):
        fields = getattr(model, "model_fields", None)
        if fields is not None and step not in fields:
            break
        if not isinstance(value, dict) or step not in value:
            return line
        value = value[step]
        where.append(step)
        if fields is None:  # dict[str, Model]
            model = _section(get_args(model)[-1], (), value)
        else:
            model = _section(fields[step].annotation, fields[step].metadata, value)
    try:
        parse(model, value, ".".join(where))
    except InvalidParams as error:
        return next((each for each in str(error).split("\n") if each.startswith(f"{path}: unknown key")), line)
    return line


def _section(annotation: Any, marks: Iterable[Any], value: Any) -> Any:
    """The model of a section: without None, and of a part that of its kind."""
    folder = next((mark.name for mark in marks if isinstance(mark, _Folder)), None)
    if folder:
        return load(folder, value["kind"]).Config
    if get_origin(annotation) in (Annotated, Union, UnionType):
        inner, *others = get_args(annotation)  # None stands last in a union
        return _section(inner, others, value)
    return annotation

"""YAML that is plain data: no repeated keys, no dates, no bytes, no numbers and no nesting without end."""

import re
from pathlib import Path
from typing import Any

import yaml

from tessera.components import InvalidParams

MOST_VALUES = 100_000
LARGEST = 2**63 - 1  # of a whole number, where others read it too


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

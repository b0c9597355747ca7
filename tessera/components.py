"""Finds a part by its file name: `kind: vector` among quantizers is tessera/quantizers/vector.py.

There is no table of parts, because under DVC a table would be a dependency of every stage: one new line in it would
retrain everything. A part's file holds its `Config`, a subclass of `Params`, and the class that the Config describes.
"""

import difflib
import importlib
import json
import reprlib
from functools import cache, partial
from pathlib import Path
from types import ModuleType
from typing import Annotated, Any, Literal, NamedTuple, TypeVar, get_args, get_origin

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, SerializeAsAny, ValidationError, create_model

PACKAGE = Path(__file__).parent
P = TypeVar("P", bound="Params")
T = TypeVar("T")
# The annotation of a key that a part gained after people had trained it. For whoever does not set it nothing is another:
# not the params that are recorded, and not the code that counts (tessera/code/definitions.py)
AddedKey = Annotated[T | None, Field(exclude_if=lambda value: value is None)]
# Ranges of settings that several parts have: beyond them nothing sensible happens
Fraction = Annotated[float, Field(ge=0, le=1)]
Weight = Annotated[float, Field(ge=0, le=1e4)]  # of a term of a loss
RateFactor = Annotated[float, Field(ge=1e-9, le=1e6)]  # times a learning rate
Steps = Annotated[int, Field(ge=1, le=10_000)]  # of a sampler
Precision = Literal["fp32", "bf16"]  # of networks that draw and encode: nn/precision.py
LatentsDtype = Literal["float32", "float16"]  # on disk


class Params(BaseModel):
    """Base of every Config: unknown keys and loosely typed values are errors, and nothing changes after loading."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


def added_later(default: Any) -> Any:
    """The default of a setting that came after artifacts and results were made without it, and that means what they meant.

    It is written nowhere, as if the setting were not there: what was made before stays valid, and equal to what is made now.
    """
    return Field(default, exclude_if=lambda value: value == default)


class InvalidParams(ValueError):
    """What is wrong with the params, one sentence per mistake."""


def sets(config: Any, key: str) -> bool:
    """Whether a part has this added key and its params set it, or of what they made whether it has it. In
    `if sets(config, "KEY"):`, written just so, what stands below is code of those alone that do."""
    return getattr(config, key, None) is not None


class MissingPackage(ValueError):
    """A part is built of a package that is not installed; the sentence says how to get it."""


def missing_package(error: BaseException) -> MissingPackage | None:
    """What is behind an error of an artifact that is whole, and cannot be opened for want of a package."""
    return error.__context__ if isinstance(error.__context__, MissingPackage) else None


def kinds(folder: str) -> list[str]:
    """The parts that exist in tessera/FOLDER."""
    return sorted(path.stem for path in (PACKAGE / folder).glob("*.py") if path.stem != "__init__")


def load(folder: str, kind: str) -> ModuleType:
    """The module tessera/FOLDER/KIND.py. Raises ValueError, naming the choices, if there is none."""
    choices = kinds(folder)
    if kind not in choices:
        raise ValueError(
            f"there is no tessera/{folder}/{kind}.py: choose one of {', '.join(choices)}{_near(kind, choices)}"
        )
    return importlib.import_module(f"tessera.{folder}.{kind}")


@cache
def sampling_schema(kind: str) -> type[Params]:
    """How systems with such a prior draw: the `Sampling` of tessera/priors/KIND.py, and what all systems have."""
    own = load("priors", kind).Sampling
    return create_model(
        own.__name__, __base__=own, __module__=own.__module__, precision=(Precision, added_later("fp32"))
    )


class _Folder(NamedTuple):
    """Marks a field whose value is the Config of any part in the folder."""

    name: str


def _part(folder: str, value: Any) -> Params:
    if isinstance(value, Params):
        return value
    if not isinstance(value, dict) or "kind" not in value:
        raise ValueError(f"expected a mapping with the key 'kind', one of {', '.join(kinds(folder))}; got {value!r}")
    return _validate(load(folder, value["kind"]).Config, value)


def part(folder: str) -> Any:
    """The annotation of a field that holds the Config of any part in FOLDER."""
    return Annotated[SerializeAsAny[Params], BeforeValidator(partial(_part, folder)), _Folder(folder)]


def _name_or_part(folder: str, names: tuple[str, ...], value: Any) -> Params | str:
    if isinstance(value, dict | Params):
        return _part(folder, value)
    if value not in names:
        choices = f"one of {', '.join(names)}, or a mapping with the key 'kind', one of {', '.join(kinds(folder))}"
        raise ValueError(f"expected {choices}; got {value!r}{_near(value, list(names))}")
    return value


def name_or_part(folder: str, names: tuple[str, ...]) -> Any:
    """The annotation of a field that holds one of these names, which have no settings, or the Config of any part in FOLDER."""
    return Annotated[
        SerializeAsAny[Params] | str, BeforeValidator(partial(_name_or_part, folder, names)), _Folder(folder)
    ]


DatasetConfig = part("datasets")
FeaturesConfig = part("features")
TokenizerConfig = part("tokenizers")
QuantizerConfig = part("quantizers")
PriorConfig = part("priors")
DenoiserConfig = part("denoisers")
ConditionConfig = part("conditions")
EditConfig = part("edits")
MetricConfig = part("metrics")
PerceptualConfig = name_or_part("perceptual", ("none", "laplacian", "lpips"))


def _validate(config: type[P], value: Any) -> P:
    return config.model_validate_json(json.dumps(value), strict=True)


def parse(config: type[P], value: Any, where: str = "") -> P:
    """Validate plain data, as YAML or JSON gives it, strictly: "6" is no integer, a list is a fine tuple.

    Raises InvalidParams with one sentence per mistake, each starting with the key's path below `where`.
    """
    try:
        return _validate(config, value)
    except ValidationError as error:
        raise InvalidParams("\n".join(_sentence(config, value, item, where) for item in error.errors())) from None


def _sentence(config: type[Params], value: Any, error: Any, where: str) -> str:
    path = ".".join([*([where] if where else []), *(str(step) for step in error["loc"])]) or "params"
    if error["type"] == "extra_forbidden":
        known = _known_keys(config, value, error["loc"][:-1])
        return f"{path}: unknown key{_near(str(error['loc'][-1]), known)} (known keys: {', '.join(known)})"
    if error["type"] == "missing":
        return f"{path}: this key is missing"
    message = error["msg"].removeprefix("Value error, ")
    if error["type"] == "value_error":
        return f"{path}: {message}"
    return f"{path}: {message[:1].lower() + message[1:]}, got {reprlib.repr(error['input'])}"


def _near(word: Any, choices: list[str]) -> str:
    near = difflib.get_close_matches(str(word), choices, n=1)
    return f"; did you mean '{near[0]}'?" if near else ""


def _known_keys(model: Any, value: Any, location: tuple[int | str, ...]) -> list[str]:
    """The keys that the mapping at `location` may have: descends through fields, dicts of models, and parts."""
    for step in location:
        value = value[step]
        fields = getattr(model, "model_fields", None)
        if fields is None:  # dict[str, Model]
            model, marks = get_args(model)[-1], ()
        else:
            model, marks = fields[step].annotation, fields[step].metadata
        if get_origin(model) is Annotated:
            model, *marks = get_args(model)
        folder = next((mark.name for mark in marks if isinstance(mark, _Folder)), None)
        model = load(folder, value["kind"]).Config if folder else model
    return sorted(getattr(model, "model_fields", {}))

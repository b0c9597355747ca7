"""Serves a registered model: MLflow's own scoring server, behind limits.

    python -m serving.images models:/tessera-digits@champion --port 5001

Nothing of the project is imported here: the model brings the code that it was evaluated with.
"""

import argparse
import json
import os
import sys
from typing import Annotated, Any

import uvicorn
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from starlette.datastructures import Headers
from starlette.middleware import Middleware

from serving.hosts import trusted_hosts
from serving.limits import Limits, OneByOne

ADDRESS = "127.0.0.1"
LIMITS = Limits(body=64 * 1024, reading=4, waiting=32, seconds=50)  # MLflow itself answers 504 after 60 s
EXAMPLE = '{"inputs": {"labels": [3, 5], "seed": 1}}'
WORDED = '{"inputs": {"captions": ["a blue heart"], "seed": 1}}'
REMEDY = (
    "Choose a champion with: python -m tessera.tracking champion --metric generation/fd_classifier --lower --threshold 0.5; "
    "or name a version: make serve MODEL=models:/NAME/1"
)
FORMS = ("inputs", "instances", "dataframe_records", "dataframe_split")  # MLflow's names for a table in JSON


class Inputs(BaseModel):
    """The types of a request; which values are good is known to the model."""

    model_config = ConfigDict(extra="forbid")
    labels: list[Annotated[int, Field(strict=True, ge=-(2**63), lt=2**63)]] | None = None
    captions: list[Annotated[str, Field(strict=True)]] | None = None
    attributes: list[dict[str, Any]] | None = None
    embeddings: list[list[Annotated[float, Field(strict=True)]]] | None = None
    seed: float | None = None
    guidance_scale: float | None = None


def check(headers: Headers, body: bytes) -> None:
    """Raises ValueError with a sentence for a request that MLflow would fail at, or of which it would ignore a part."""
    content_type = headers.get("content-type", "")
    if content_type.partition(";")[0].strip() != "application/json":
        raise ValueError(f"The Content-Type is {content_type[:80] or 'missing'}: expected application/json")
    try:
        request = json.loads(body)  # as MLflow reads it
    except RecursionError:
        raise ValueError(f"The body is nested too deeply: expected {EXAMPLE}") from None
    except ValueError as error:
        raise ValueError(f"The body cannot be read as JSON ({str(error)[:80]}): expected {EXAMPLE}") from None
    try:
        given = Inputs.model_validate(_row(request))
    except ValidationError as error:
        raise ValueError(_sentence(error)) from None
    lists = ("labels", "captions", "attributes", "embeddings")
    if all(getattr(given, name) is None for name in lists):
        raise ValueError(
            f"labels is missing: expected {EXAMPLE}, or, of a model that was told captions, {WORDED}, attributes or embeddings"
        )
    nulls = [name for name in lists if name in given.model_fields_set and getattr(given, name) is None]
    if nulls:  # at which MLflow fails
        raise ValueError(f"{nulls[0]} is null: leave it out")
    lengths = sorted({len(one) for one in given.embeddings or ()})
    if len(lengths) > 1:  # of which MLflow makes no array
        raise ValueError(f"embeddings have {lengths[0]} to {lengths[-1]} numbers: expected equally many in each")


def _row(request: Any) -> Any:
    """The one row of the table, in whichever of MLflow's forms it is."""
    if not isinstance(request, dict) or len(forms := [name for name in FORMS if name in request]) != 1:
        raise ValueError(f"The body is not one request: expected {EXAMPLE}")
    form = forms[0]
    others = [name for name, value in request.items() if name != form and not (name == "params" and not value)]
    if others:
        raise ValueError(f"Unknown: {_names(others)}; expected {form} alone, such as {EXAMPLE}")
    rows = request[form]
    if form == "dataframe_split":
        if not isinstance(rows, dict) or not isinstance(rows.get("data"), list):
            raise ValueError(f"dataframe_split has no columns and data: expected {EXAMPLE}")
        columns, rows = rows.get("columns"), rows["data"]
        if not isinstance(columns, list) or any(not isinstance(row, list) or len(row) != len(columns) for row in rows):
            raise ValueError(f"dataframe_split has not as many columns as data: expected {EXAMPLE}")
        rows = [dict(zip(map(str, columns), row, strict=True)) for row in rows]
    if isinstance(rows, list) and form != "instances":
        if len(rows) != 1:
            raise ValueError(f"Got {len(rows)} requests in one, expected one: put all labels into one list")
        rows = rows[0]
    if not isinstance(rows, dict):
        raise ValueError(f"{form} has no names: expected {EXAMPLE}")
    return rows


def _sentence(error: ValidationError) -> str:
    found = error.errors(include_url=False, include_context=False)
    unknown = [str(one["loc"][0]) for one in found if one["type"] == "extra_forbidden"]
    if unknown:
        return f"Unknown: {_names(unknown)}; expected {', '.join(Inputs.model_fields)}"
    first = found[0]
    place = "".join(f"[{part}]" if isinstance(part, int) else part for part in first["loc"])
    if first["type"] == "missing":
        return f"{place} is missing: expected {EXAMPLE}"
    return f"{place} is {_short(first['input'])}: {first['msg']}; expected {EXAMPLE}"


def _short(value: Any) -> str:
    if isinstance(value, int) and abs(value) >= 2**64:
        return "a number of too many digits"  # Python refuses to write out more than 4,300
    text = repr(value) if isinstance(value, int | float | str) else f"a {type(value).__name__}"
    return text if len(text) <= 40 else f"{text[:40]}..."


def _names(names: list[str]) -> str:
    shown = [name[:40] for name in names[:5]]
    return ", ".join(shown if len(names) <= 5 else [*shown, f"and {len(names) - 5} more"])


def app() -> Any:
    """MLflow's app of the model that its environment variable names, with our limits in front."""
    from mlflow.pyfunc.scoring_server.app import app as scoring

    scoring.add_middleware(OneByOne, path="/invocations", check=check, limits=LIMITS)
    hosts: Middleware = trusted_hosts()
    scoring.add_middleware(hosts.cls, *hosts.args, **hosts.kwargs)
    return scoring


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m serving.images", description=__doc__.partition("\n")[0])
    parser.add_argument("model", help="models:/NAME@ALIAS, models:/NAME/VERSION, or the folder of a downloaded one")
    parser.add_argument("--port", type=int, default=5001)
    given = parser.parse_args(arguments)
    import mlflow
    from mlflow.exceptions import MlflowException
    from mlflow.pyfunc import scoring_server

    try:
        trusted_hosts()
        os.environ[scoring_server._SERVER_MODEL_PATH] = mlflow.artifacts.download_artifacts(given.model)
    except (ValueError, MlflowException) as error:
        print(f"{given.model} cannot be served: {str(error).splitlines()[0]}. {REMEDY}", file=sys.stderr)
        return 2
    uvicorn.run(app(), host=ADDRESS, port=given.port)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

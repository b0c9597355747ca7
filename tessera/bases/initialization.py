"""The key `init` of tokenizers and priors: the weights that a training begins from, in place of random ones."""

from typing import Annotated, Any

from pydantic import ConfigDict, Field, model_validator

from tessera.components import Params

EXPECTED = "expected init: {from: FOLDER, sha256: HASH}, where HASH is that of the part's manifest.json"


class Initialization(Params):
    """A folder of weights, and the sha256 of its manifest.json, which has those of all its files (training/warm_start.py)."""

    model_config = ConfigDict(serialize_by_alias=True)

    folder: Annotated[str, Field(alias="from", min_length=1)]
    sha256: Annotated[str, Field(pattern="^[0-9a-f]{64}$")]

    @model_validator(mode="before")
    @classmethod
    def _has_its_two_keys(cls, value: Any) -> Any:
        if not isinstance(value, dict) or set(value) != {"from", "sha256"}:
            raise ValueError(f"got {value!r:.200}, {EXPECTED}")
        return value

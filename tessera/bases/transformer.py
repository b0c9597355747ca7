"""The sizes of a transformer: what the Config of every part with one begins with."""

from typing import Annotated

from pydantic import Field, model_validator

from tessera.components import Params


class TransformerConfig(Params):
    width: Annotated[int, Field(ge=8)] = 128
    depth: Annotated[int, Field(ge=1)] = 4
    heads: Annotated[int, Field(ge=1)] = 4
    dropout: Annotated[float, Field(ge=0, le=1)] = 0.0

    @model_validator(mode="after")
    def _heads_divide_width(self) -> "TransformerConfig":
        if self.width % self.heads or self.width // self.heads % 4:
            raise ValueError(
                f"width {self.width} over heads {self.heads} must be a multiple of 4 (two rotary axes); "
                f"choose a width of heads x 4n"
            )
        return self

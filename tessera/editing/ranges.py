"""Ranges of settings that several edits have: beyond them nothing sensible happens."""

from typing import Annotated

from pydantic import Field

Tries = Annotated[int, Field(ge=1, le=1000)]  # candidates, sweeps, repeats
PixelStd = Annotated[float, Field(ge=0.001, le=10)]  # of what tokens cannot explain of a pixel in [-1, 1]

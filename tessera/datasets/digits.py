"""1,797 handwritten digits of 8x8 pixels that scikit-learn carries inside: real images on any machine, offline.

Source: E. Alpaydin and C. Kaynak, "Optical Recognition of Handwritten Digits", UCI Machine Learning Repository, 1998;
its test part as shipped with scikit-learn. Differs from it: the split into train and test is ours.
"""

from collections.abc import Iterator
from typing import Annotated, Literal

import numpy as np
from pydantic import Field

from tessera.components import Params
from tessera.contracts import Count, ImageSpec
from tessera.sources.records import DatasetName, Record, array_records, stratified_test_rows

LICENCE = "CC BY 4.0 (UCI), shipped with scikit-learn (BSD-3-Clause)"


class Config(Params):
    kind: Literal["digits"]
    source: str  # the file that pins scikit-learn's version, and with it the data
    name: DatasetName = "digits"
    upsample: Count = 1  # each pixel becomes upsample x upsample pixels
    test_fraction: Annotated[float, Field(gt=0, lt=1)] = 0.2
    split_seed: int = 0

    @property
    def channels(self) -> int:
        return 1

    @property
    def height(self) -> int:
        return 8 * self.upsample

    @property
    def width(self) -> int:
        return 8 * self.upsample

    @property
    def num_classes(self) -> int:
        return 10


def spec(config: Config) -> ImageSpec:
    return ImageSpec(
        name=config.name,
        channels=config.channels,
        height=config.height,
        width=config.width,
        num_classes=config.num_classes,
        class_names=tuple("0123456789"),
        licence=LICENCE,
    )


def records(config: Config) -> Iterator[Record]:
    """All digits, first the train split, then the test split, each in scikit-learn's order."""
    from sklearn.datasets import load_digits  # here: it takes a second, and only this function needs it

    digits = load_digits()
    images = np.rint(digits.images * (255 / 16)).astype(np.uint8)[:, None]  # (N, 1, 8, 8), from values 0 to 16
    images = images.repeat(config.upsample, axis=2).repeat(config.upsample, axis=3)
    is_test = stratified_test_rows(digits.target, config.test_fraction, config.split_seed)
    for split, rows in (("train", np.flatnonzero(~is_test)), ("test", np.flatnonzero(is_test))):
        yield from array_records(split, images[rows], digits.target[rows], [f"digits/{row:04d}" for row in rows])

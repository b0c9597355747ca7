"""How often the class that a network sees in an image is the label it was drawn for; of real images, how good that network is.

Source: Ravuri and Vinyals, "Classification Accuracy Score for Conditional Generative Models", 2019, arXiv:1905.10887.
Differs from it: the classifier has learned real images and judges samples, where theirs learns samples and judges real images.
A share of 1 is reached by one typical image to a class: read it beside recall.
"""

from typing import Literal

from tessera.components import Params
from tessera.contracts import Predicted, RealImages, Record, SeenSamples, Shown

FIGURES = (
    Shown("label_agreement", better="higher", ranks=True),
    Shown("test_accuracy", form=None, better="higher"),
)


class Config(Params):
    kind: Literal["label_agreement"]


def of_samples(config: Config, samples: SeenSamples, found: Record) -> None:
    """`label_agreement` by the first network that knows the classes; for real images see below."""
    if not samples.are_real:
        _add("label_agreement", samples.predicted(), found)


def of_real_images(config: Config, real: RealImages, found: Record) -> None:
    """`test_accuracy` of that network: its agreement with the labels of the test images."""
    _add("test_accuracy", real.predicted(), found)


def share(predicted: Predicted) -> float:
    """The share of images whose likeliest class is their label, in [0, 1]. Raises ValueError for logits that are not finite."""
    if not predicted.logits.isfinite().all():  # argmax takes NaN for the largest: a class like another
        raise ValueError(
            "logits hold values that are not finite, expected finite ones: look for NaN in the images or the weights"
        )
    return float((predicted.logits.argmax(dim=1).numpy() == predicted.labels).mean())


def _add(name: str, predicted: Predicted | None, found: Record) -> None:
    if predicted is not None:
        found.add_share(name, share(predicted), predicted.protocol)

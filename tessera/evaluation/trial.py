"""The trial of the judges: does each put planted garbage far from real images? One that does not says nothing of samples.

Some training images, the garbage that is made of them, and the rest of the training images: the Fréchet distance from the
rest is to be far larger for each kind of garbage than for the images that it was made of.
"""

import math

import numpy as np

from tessera import seeding
from tessera.artifacts.images import Images
from tessera.evaluation import garbage
from tessera.evaluation.comparison import REAL, distance_names
from tessera.evaluation.figures import Group, Measured
from tessera.evaluation.judge import Judge
from tessera.evaluation.reference import Reference
from tessera.metrics import frechet

MOST_IMAGES = 300  # of a kind
LEAST_RATIO = 5.0  # of the distance of garbage and that of real images
LEAST_ERRORS = 5.0  # standard errors of their difference
ITSELF = "trial"  # the prefix of the figure of the images that garbage is made of


def measure(judge: Judge, reference: Reference, train: Images, seed: int, found: Group) -> None:
    """`trial_fd_classifier` of some training images and `blurred_fd_classifier`, ... of what is made of them."""
    kept = reference.feature_rows("train")
    if len(kept) < 4:
        raise ValueError(
            f"{len(kept)} features of training images are too few to try a judge on, expected at least 4: use more images, "
            f"or raise reference_stats.max_features"
        )
    order = seeding.numpy_generator(seed, "trial").permutation(len(kept))
    number = min(MOST_IMAGES, len(kept) // 2)
    some, rest = np.sort(order[:number]), np.sort(order[number:])
    features = reference.features("train")
    others, rows = frechet.moments(features[rest]), kept[some]
    planted = garbage.made_of(train.pixels.gather(rows), seeding.numpy_generator(seed, "garbage"))
    seen = {ITSELF: features[some], **{kind: judge.features(pixels) for kind, pixels in planted.items()}}
    for kind, these in seen.items():
        images = "training images" if kind == ITSELF else f"training images, {kind}"
        moments = frechet.moments(these)
        influences = frechet.influence(these, moments, others)
        found.add(
            f"{kind}_{judge.frechet_name}",
            frechet.distance(moments, others),
            reference.protocol_of("train", images, number, len(rest)),
            frechet.standard_error(influences, train.labels[rows], number),
        )


def ratios(real: Measured, distance: str) -> dict[str, tuple[float, bool]]:
    """By kind of garbage: how many times the distance of real images it has, and whether it is far. Empty if not tried."""
    own = real.figure(f"{ITSELF}_{distance}")
    found = {}
    for kind in garbage.KINDS:
        other = real.figure(f"{kind}_{distance}")
        if own is None or other is None:
            continue
        ratio = other.value / own.value if own.value else math.inf
        errors = [math.nan if one.standard_error is None else one.standard_error for one in (own, other)]
        is_beyond = other.value - own.value > LEAST_ERRORS * math.hypot(*errors)  # not if an error is not known
        found[kind] = (ratio, ratio >= LEAST_RATIO and is_beyond)
    return found


def sentences(real: Measured) -> list[str]:
    """One for each judge that takes some garbage for real images, by name; none if all judges see all of it."""
    found = []
    for distance in distance_names({REAL: [real]}):
        near = {kind: ratio for kind, (ratio, is_far) in ratios(real, distance).items() if not is_far}
        if near:
            listed = ", ".join(f"{kind} ({ratio:.1f} times)" for kind, ratio in near.items())
            found.append(
                f"the judge of {distance} does not see garbage: {listed} has hardly a larger distance than real images, "
                f"expected {LEAST_RATIO:.0f} times theirs and {LEAST_ERRORS:.0f} standard errors more; believe no figure of "
                f"this judge, and use features of kind classifier (labels), timm (color) or contrastive"
            )
    return found

"""The step behind the stages that lets MLflow's registry choose the champion of a data set, by one metric."""

import re
import sys

REFUSED = {
    1: "MLflow did not answer: run it again when it does, what was computed stays",
    2: "the registry refuses to choose: the last lines of the log say why",
}


def arguments(condition: str) -> list[str]:
    """The options of `python -m tessera.tracking champion`. Raises ValueError if this is no condition."""
    found = re.fullmatch(r"\s*([a-z0-9_]+/[a-z0-9_]+)\s*([<>])\s*(-?\d+(?:\.\d+)?)\s*", condition)
    if not found:
        raise ValueError(
            f"champion is {condition!r}: expected a metric of systems, < or >, and a number that the champion has to beat, "
            'e.g. "generation/fd_classifier < 0.5"'
        )
    metric, sign, number = found.groups()
    return ["--metric", metric, "--lower" if sign == "<" else "--higher", "--threshold", number]


def command(condition: str) -> list[str]:
    """Its command line, for the folder whose params.yaml names the data set."""
    return [sys.executable, "-m", "tessera.tracking", "champion", *arguments(condition)]

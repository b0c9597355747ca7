"""Whether the run of params.yaml can end well, before it begins.

    python -m tessera.check              # a sentence for each problem and exit code 2, or one line that all is well
    python -m tessera.check --minutes    # and how long it will take here, by a trial of ten seconds

The images are counted in data/images, if they were prepared from this `dataset`, and in the source otherwise: there by the
names of the files, and some of them are read. `dvc repro` asks the same when it prepares the images and before each training.
"""

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import yaml

from tessera import params as all_params
from tessera.params import Pipeline
from tessera.sources.hashing import require_hashable

if TYPE_CHECKING:
    from tessera.contracts import Planned  # torch, before which the params are read

IMAGES, LOCK = Path("data/images"), Path("dvc.lock")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tessera.check", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--params", type=Path, default=Path("params.yaml"), help="the file to check (params.yaml)")
    parser.add_argument("--minutes", action="store_true", help="try the networks for ten seconds")
    given = parser.parse_args(arguments)
    try:
        params = all_params.read(given.params)
        from tessera.check import estimate, problems  # torch

        require_hashable(Path(params.dataset.source))
        planned = known(params, given.params)
        found = problems.problems(params, planned)
        expected = f"; {estimate.of_run(params, planned).sentence()}" if given.minutes and not found else ""
    except (ValueError, OSError) as error:
        print(f"tessera.check: {error}", file=sys.stderr)
        return 2
    if found:
        print("\n".join(found), file=sys.stderr)
        return 2
    print("\n".join([*problems.remarks(params, planned), f"all is well: {sentence(params, planned)}{expected}"]))
    return 0


def known(params: Pipeline, path: Path) -> "Planned":
    """What is known of the images: by data/images if they are of this dataset, by the source otherwise."""
    from tessera.check import images

    prepared = images.of_artifact(params, IMAGES) if _are_prepared(path) else None
    return prepared or images.of_source(params)


def _are_prepared(path: Path) -> bool:
    """Whether the lock says that data/images were made of this very `dataset`."""
    try:
        lock = yaml.safe_load(LOCK.read_text(encoding="utf-8"))
        made_of = lock["stages"]["prepare_images"]["params"]["params.yaml"]["dataset"]
        return made_of == yaml.safe_load(path.read_text(encoding="utf-8"))["dataset"]
    except (OSError, KeyError, TypeError, yaml.YAMLError):
        return False


def sentence(params: Pipeline, planned: "Planned") -> str:
    spec, number = planned.spec, {split: len(labels) for split, labels in planned.labels.items()}
    classes = f"{spec.num_classes} classes" if spec.num_classes > 1 else "no classes"
    return (
        f"{number['train']:,} train + {number['test']:,} test images {spec.channels}x{spec.height}x{spec.width}, {classes}, "
        f"{', '.join(params.systems)}"
    )


if __name__ == "__main__":
    sys.exit(main())

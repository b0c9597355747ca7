"""Params for a folder of your own images: looks at them, tries the networks for ten seconds, and writes one params file.

    python -m tessera.start photographs                          # then: make repro
    python -m tessera.start photographs --resolution 32 --minutes 10
    python -m tessera.start flowers.zip --labels folders --out flowers.yaml

A params file that you changed is not overwritten: commit it to git, or say --force.
"""

import argparse
import hashlib
import math
import subprocess
import sys
from pathlib import Path

import torch

from tessera.check import estimate, images, problems
from tessera.start import choices
from tessera.start.choices import Choices
from tessera.start.survey import Survey, survey

MARK = "# written by tessera.start, and unchanged while what follows has sha256 "


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tessera.start", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, help="a folder, .tar(.gz, .xz, .bz2) or .zip of images")
    parser.add_argument("--out", type=Path, default=Path("params.yaml"), help="the file to write (params.yaml)")
    parser.add_argument(
        "--resolution", type=int, help="pixels a side, a multiple of 16 (by the images: 32 or 64; GPU: 128)"
    )
    parser.add_argument("--labels", choices=("folders", "none"), help="whether folders are classes (by how they look)")
    parser.add_argument("--minutes", type=float, default=20.0, help="that the whole run may take (20)")
    parser.add_argument("--force", action="store_true", help="overwrite a params file that was changed")
    given = parser.parse_args(arguments)
    try:
        if not given.minutes > 0 or not math.isfinite(given.minutes):
            raise ValueError(f"--minutes {given.minutes:g}: expected a number above 0, such as 20")
        if not given.out.parent.is_dir() or given.out.is_dir():
            raise ValueError(f"--out {given.out}: expected a file in a folder that is there, such as params.yaml")
        if not given.force:
            require_nothing_is_lost(given.out)
        found = survey(given.folder, given.labels)
        chosen, lines = chosen_for(found, given)
        write(given.out, chosen.text())
    except (ValueError, OSError) as error:
        print(f"tessera.start: {error}", file=sys.stderr)
        return 2
    print("\n".join([*of_images(found), *chosen.reasons, *lines]))
    follow = "make repro" if given.out == Path("params.yaml") else f"cp {given.out} params.yaml, then make repro"
    print(f"wrote {given.out}; next: {follow}")
    return 0


def chosen_for(found: Survey, given: argparse.Namespace) -> tuple[Choices, list[str]]:
    """The choices, with steps for the minutes given, and what is expected of them. Raises ValueError if they would not work."""
    source = named(found.source)
    chosen = choices.choose(found, source, given.resolution, torch.cuda.is_available())
    params = chosen.params()
    planned = images.of_source(params)
    problems.require(params, planned)
    tried = estimate.of_run(params, planned)
    chosen = choices.in_time(chosen, tried, given.minutes)
    expected = tried.with_steps_of(chosen.params())
    values = chosen.values
    lines = [
        f"one system, vqgan-flow: {values['tokenizer_steps']:,} steps of the tokenizer, {values['prior_steps']:,} of the prior",
        f"expected: {expected.sentence()}",
    ]
    if expected.minutes > 1.2 * given.minutes:
        lines.append(
            f"that is more than {given.minutes:g} minutes, but fewer steps would give nothing"
            + (": try --resolution 32" if values["resolution"] > 32 else "; a machine that is busy looks slow")
        )
    return chosen, lines


def of_images(found: Survey) -> list[str]:
    """What was seen, in words."""
    sides, modes = found.sides(), sorted({one.mode for one in found.images})
    looked_at = (
        f" ({len(found.seen):,} of {found.num_files:,} files looked at)" if len(found.seen) < found.num_files else ""
    )
    low, high = sides.min(axis=0), sides.max(axis=0)
    lines = [
        f"{found.num_images:,} images{looked_at}, {low[0]}x{low[1]} to {high[0]}x{high[1]} pixels, {', '.join(modes)}"
        f"{f', below {found.root}/' if found.root else ''}"
    ]
    if found.unreadable:
        named_ones = "; ".join(f"{one.name!r} {one.reason}" for one in found.unreadable[:5])
        more = f"; and {len(found.unreadable) - 5} more" if len(found.unreadable) > 5 else ""
        lines.append(f"left out, as they give no image: {named_ones}{more}")
    losing = [one for one in found.images if one.loses]
    if losing:
        lines.append(
            f"{len(losing)} of them lose something, such as {losing[0].name!r}, which {losing[0].loses}; to take pages as "
            f"channels, write dataset.bands in the place of channels; to keep 16 bits, dataset.bits: 16 beside it"
        )
    if found.num_outside:
        lines.append(f"left out, as they lie in no split or class: {found.num_outside} images")
    return lines


def named(source: Path) -> str:
    """As the params name it: relative to here where it lies below, so that a checkout can be moved."""
    whole, here = source.resolve(), Path.cwd().resolve()
    return whole.relative_to(here).as_posix() if whole.is_relative_to(here) else whole.as_posix()


def require_nothing_is_lost(path: Path) -> None:
    """Raise ValueError if the file holds what neither git nor this command could give back."""
    if not path.exists() or _is_our_own(path) or _is_committed(path):
        return
    raise ValueError(
        f"{path} was changed and is not committed, expected one that can be overwritten: keep it (git add {path} && git "
        f"commit, or cp {path} my-params.yaml), write elsewhere (--out), or overwrite it (--force)"
    )


def _is_our_own(path: Path) -> bool:
    first, _, rest = path.read_text(encoding="utf-8", errors="replace").partition("\n")
    return first == MARK + hashlib.sha256(rest.encode()).hexdigest()


def _is_committed(path: Path) -> bool:
    """Whether git has the file as it is."""
    command = ["git", "-C", str(path.resolve().parent)]
    try:
        known = subprocess.run([*command, "ls-files", "--error-unmatch", path.name], capture_output=True)
        same = subprocess.run([*command, "diff", "--quiet", "HEAD", "--", path.name], capture_output=True)
    except OSError:  # there is no git
        return False
    return known.returncode == 0 and same.returncode == 0


def write(path: Path, text: str) -> None:
    path.write_text(f"{MARK}{hashlib.sha256(text.encode()).hexdigest()}\n{text}", encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())

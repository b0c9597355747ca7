"""Whether a source gives images at all, by the first of its files: what is wrong with every file is told before a run."""

import re
from typing import Any

from tessera.sources.records import Source

ENOUGH = 64  # images: one alone may be an exception, as a black mask among colored ones
MOST_TRIED = 1000  # files that are read and give none
MOST_REASONS = 5
QUOTED = re.compile("'.*?'")


def require_some(source: Source, config: Any, num_named: int) -> None:
    """Reads files in their order until they gave ENOUGH images.

    num_named: files that are images by their names. Raises ValueError with the reasons, a file for each, where no file gives
    one, or where more of them give none than prepare_images bears, whatever the others are.
    """
    examples: dict[str, str] = {}  # by reason, whatever it names: the first file with it
    num_good = num_bad = num_bad_named = 0
    is_end = False
    for record in source.records(0):
        if record.image is not None:
            num_good += 1
        elif not record.ignored:
            num_bad += 1
            num_bad_named += bool(record.sha256)  # others are refused unread, by their names, pictures or sizes
            if len(examples) < MOST_REASONS:
                examples.setdefault(QUOTED.sub("", record.reason), f"{record.source!r} {record.reason}")
        if num_good == ENOUGH or num_bad_named == MOST_TRIED:
            break
    else:
        is_end = True
    borne = config.max_unreadable_fraction * (num_named + num_bad - num_bad_named)
    if num_bad <= borne and (num_good or not is_end):
        return
    found = f"{num_bad:,} of the first {num_bad + num_good:,} files give no image"
    expected = f"at most a fraction of {config.max_unreadable_fraction}"
    if not num_good:
        found, expected = "none of its files gives an image" if is_end else found, "some"
    if examples:
        reasons = "; ".join(examples.values())
        raise ValueError(f"{config.source}: {found}, expected {expected}: {reasons}. Mend or remove such files")

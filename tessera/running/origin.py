"""When, where and by what a page was made: for people who are sent it, and no part of any figure."""

import os
import platform
import re
import time
from pathlib import Path

from tessera.running.publish import ROOT
from tessera.tracking import provenance


def described() -> dict[str, str]:
    """date, commit, machine and command; the commit is left out where there is no git."""
    found = {"made": time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime())}
    tags = provenance.tags(ROOT, {})
    if commit := tags.get("mlflow.source.git.commit"):
        changed = [name for name in tags.get("git.uncommitted", "").split(", ") if name]
        where = ", ".join(changed) if len(changed) <= 3 else f"{len(changed)} files"
        found["commit"] = commit[:10] + (f", with changes in {where}" if changed else "")
    return found | {"on": machine(), "by": "DVC" if os.environ.get("DVC_STAGE") else "python -m tessera.running"}


def machine() -> str:
    """The GPUs if there are some, else the processor, with the number of its cores."""
    import torch  # most stages ask for no page

    if torch.cuda.is_available():
        return f"{torch.cuda.device_count()} x {torch.cuda.get_device_name()}"
    return f"{cpu()}, {os.cpu_count()} cores"


def cpu() -> str:
    """The processor's name, as well as the system knows it."""
    known = Path("/proc/cpuinfo")
    named = re.search(r"^model name\s*: (.*)$", known.read_text(), re.MULTILINE) if known.is_file() else None
    return named[1] if named else platform.processor() or platform.machine()

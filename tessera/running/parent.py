"""Ties a process to its parent: kill -9 of dvc must not leave a trainer running."""

import ctypes
import os
import signal
import sys

PR_SET_PDEATHSIG = 1  # <linux/prctl.h>


def die_with_it() -> None:
    """Ask the kernel for SIGTERM when the parent dies; end now if it died before the kernel was asked."""
    parent = os.getppid()
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != parent or _is_orphan(parent):
        sys.exit(128 + signal.SIGTERM)


def _is_orphan(parent: int) -> bool:
    """Whether dvc died while Python was starting: whoever adopted this process since is of another process group.

    The ranks of torchrun may be of groups of their own, and end with it.
    """
    if "DVC_STAGE" not in os.environ or "RANK" in os.environ:
        return False
    return parent == 0 or os.getpgid(parent) != os.getpgid(0)

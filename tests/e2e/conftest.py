"""The one clone in which the pipeline runs, for all files and workers of pytest, and copies of it."""

import fcntl
import json
import os

import pytest
from clones import Clone, copy_checkout


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Clone:
    """A clone in which the pipeline ran, to read and to copy, and not to change; `output` is what `dvc repro` printed.

    Built by the first worker of pytest that asks for it, while the others wait.
    """
    shared = tmp_path_factory.getbasetemp()
    shared = shared.parent if "PYTEST_XDIST_WORKER" in os.environ else shared
    made, told = Clone(shared / "finished"), shared / "finished.json"
    with (shared / "finished.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not told.exists():
            copy_checkout(made.folder)
            done = made.run("dvc", "repro")
            told.write_text(json.dumps([done.returncode, done.stdout, done.stderr]))
    code, made.output, error = json.loads(told.read_text())
    assert code == 0, made.output[-3000:] + error[-3000:]
    return made


@pytest.fixture(scope="module")
def clone(finished: Clone, tmp_path_factory: pytest.TempPathFactory) -> Clone:
    """A copy of the finished clone for the tests of a file, which share it in their order."""
    return finished.copy(tmp_path_factory.mktemp("clone") / "project")

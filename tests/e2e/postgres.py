"""PostgreSQL as tests start it: Debian's, on a free port of loopback, with a folder that is removed afterwards."""

import contextlib
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from ports import free_ports


@contextlib.contextmanager
def postgres_server(password: str) -> Iterator[tuple[Path, int]]:
    """A server whose superuser is tessera, with this password; its folder and port. Skips the test where there is none."""
    binaries = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"))
    if not binaries:
        pytest.skip("no PostgreSQL below /usr/lib/postgresql: install it, for example with apt-get install postgresql")
    prefix = []
    folder = Path(tempfile.mkdtemp(prefix="stack-postgres-"))
    (folder / "password").write_text(password)
    if os.geteuid() == 0:  # which PostgreSQL refuses
        if shutil.which("runuser") is None:
            pytest.skip("PostgreSQL does not run as root, and there is no runuser: run the test as another user")
        prefix = ["runuser", "-u", "postgres", "--"]
        for path in (folder, folder / "password"):
            shutil.chown(path, "postgres")
    (port,) = free_ports(1)
    data, control = folder / "data", [*prefix, str(binaries[-1].with_name("pg_ctl")), "-D", str(folder / "data")]
    options = f"-p {port} -c listen_addresses=127.0.0.1 -c unix_socket_directories={folder} -c fsync=off"
    create = [str(binaries[-1]), "-D", str(data), "-U", "tessera", f"--pwfile={folder / 'password'}"]
    try:
        subprocess.run([*prefix, *create, "-A", "scram-sha-256", "--no-sync"], check=True, stdout=subprocess.DEVNULL)
        (folder / "password").unlink()
        log = ["-l", str(folder / "log"), "-o", options]
        subprocess.run([*control, "-w", *log, "start"], check=True, stdout=subprocess.DEVNULL)
        yield folder, port
    finally:
        subprocess.run([*control, "-m", "immediate", "stop"], check=False, stdout=subprocess.DEVNULL)
        shutil.rmtree(folder)

"""The GPUs of this machine, found without importing torch or Prefect, which take seconds."""

import os
import shutil
import subprocess


def devices() -> list[str]:
    """The GPUs that this process may use, found without importing torch: by index, in the order of nvidia-smi."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    named = [name.strip() for name in (visible or "").split(",") if name.strip() not in ("", "-1")]
    if (visible is not None and all(map(str.isdecimal, named))) or shutil.which("nvidia-smi") is None:
        return named
    listing = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=30)
    lines = [line for line in listing.stdout.splitlines() if line.startswith("GPU ")] if listing.returncode == 0 else []
    if visible is None:
        return [str(index) for index in range(len(lines))]
    # A GPU that is called by its uuid here and by its index elsewhere must have one lock
    index_of = {line.rpartition("UUID: ")[2].rstrip(")"): str(index) for index, line in enumerate(lines)}
    return [index_of.get(name, name) for name in named]

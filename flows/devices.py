"""The GPUs of this machine, found without importing torch or Prefect, which take seconds."""

import os
import shutil
import subprocess


def devices() -> list[str]:
    """The GPUs that this process may use, by index."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return [name.strip() for name in visible.split(",") if name.strip() not in ("", "-1")]
    if shutil.which("nvidia-smi") is None:
        return []
    listing = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=30)
    names = [line for line in listing.stdout.splitlines() if line.startswith("GPU ")] if listing.returncode == 0 else []
    return [str(index) for index in range(len(names))]

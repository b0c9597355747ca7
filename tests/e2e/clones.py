"""Small clones of the project, in which whole pipelines run: the same code and dvc.yaml, with params of a few steps.

Whoever does not need the first run itself takes a copy of the one clone that is run per session, for all workers of pytest.
"""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).parents[2]
SYSTEMS = ("gan", "vqgan-autoregressive", "vqgan-flow")  # a tokenizer and none; one pass, left to right, step by step
ENHANCING = {"denoise", "super-resolution"}
EVERY_EDIT = {"inpaint", "restyle", "variations", "interpolate"} | ENHANCING
AT_THE_END = ["compare_systems", "write_report"]  # of everything that changes a figure


def ran(output: str) -> list[str]:
    """The stages that DVC says it runs, but for the one that reads the code, which every run begins with."""
    return [name for name in re.findall(r"Running stage '([^']+)'", output) if name != "fingerprint_code"]


def cell(system: str, *stages: str) -> set[str]:
    """The stages of a system, or those of them that are named."""
    return {f"{stage}@{system}" for stage in stages or ("train_prior", "sample_images", "evaluate", "edit_images")}


class Clone:
    """A checkout with a DVC repository of its own."""

    def __init__(self, folder: Path):
        self.folder, self.output = folder, ""
        self.environment = {
            **os.environ,
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
            "TESSERA_TRACKING": "off",
            "OMP_NUM_THREADS": "1",  # two trainings of tests must not wait for each other's threads
        }
        self.environment.pop("DVC_ROOT", None)

    def run(self, *command: str, **environment: str) -> subprocess.CompletedProcess:
        return subprocess.run(
            [*command],
            cwd=self.folder,
            env={**self.environment, **environment},
            capture_output=True,
            text=True,
            timeout=900,  # the whole pipeline on a busy machine
        )

    def start(self, *command: str, **environment: str) -> subprocess.Popen:
        return subprocess.Popen(
            [*command],
            cwd=self.folder,
            env={**self.environment, **environment},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )

    def params(self) -> dict[str, Any]:
        return yaml.safe_load((self.folder / "params.yaml").read_text())

    def write_params(self, params: dict[str, Any]) -> None:
        (self.folder / "params.yaml").write_text(yaml.safe_dump(params, sort_keys=False))

    def repro(self, *arguments: str, **environment: str) -> str:
        """What `dvc repro` prints, which must succeed."""
        done = self.run("dvc", "repro", *arguments, **environment)
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
        return done.stdout

    def would_run(self) -> set[str]:
        """What `dvc repro` would run if every stage wrote something new: all that depends on what has changed."""
        if "fingerprint_code:" in (self.folder / "dvc.yaml").read_text():
            self.repro("fingerprint_code")  # every stage depends on it, by a file of its own
        return set(ran(self.repro("--dry", "--force-downstream")))

    def command_of(self, stage: str) -> list[str]:
        """The command line that dvc.yaml gives a stage, without the shell's `exec`."""
        lock = yaml.safe_load((self.folder / "dvc.lock").read_text())
        return lock["stages"][stage]["cmd"].removeprefix("exec ").split()

    def hashes(self, out: str) -> dict[str, str]:
        return json.loads((self.folder / out / "manifest.json").read_text())

    def copy(self, folder: Path) -> "Clone":
        """Real copies: a write through a link would reach what others read, and root is not held up by read-only files."""
        shutil.copytree(self.folder, folder, symlinks=True)
        return Clone(folder)

    def git(self, *arguments: str) -> None:
        identity = ["-c", "user.name=test", "-c", "user.email=test@localhost"]
        subprocess.run(["git", *identity, *arguments], cwd=self.folder, check=True, capture_output=True)


def smoke_params(*systems: str) -> dict[str, Any]:
    """The default params of these systems, with as little work as shows everything."""
    params = yaml.safe_load((ROOT / "params.yaml").read_text())
    params["systems"] = {name: params["systems"][name] for name in systems or SYSTEMS}
    used = {system["tokenizer"] for system in params["systems"].values()}
    params["tokenizers"] = {name: part for name, part in params["tokenizers"].items() if name in used}
    params["features"]["classifier"]["training"] |= {"num_steps": 60, "batch_size": 16}
    params["features"]["classifier"]["channels"] = 8
    params["features"]["random"] = {"kind": "random", "channels": 8, "feature_dim": 16}
    for tokenizer in params["tokenizers"].values():
        if tokenizer["kind"] == "none":
            continue
        tokenizer |= {"channels": 8, "num_blocks": 1}
        tokenizer["quantizer"] |= {"codebook_size": 16, "init_step": 1}
        tokenizer["training"] |= {"num_steps": 60, "batch_size": 16}
        if "discriminator_start_step" in tokenizer:
            tokenizer["discriminator_start_step"] = 5
    params["encode_tokens"]["warps"] = 1
    for system in params["systems"].values():
        prior = system["prior"]
        smaller = {"width": 24, "depth": 1, "heads": 2, "channels": 8, "num_blocks": 1}
        for sizes in (prior, prior.get("denoiser", {})):
            sizes |= {key: value for key, value in smaller.items() if key in sizes}
        prior["training"] |= {"num_steps": 60, "batch_size": 16}
        system["sampling"] |= {key: 2 for key in ("num_steps", "decoding_steps") if key in system["sampling"]}
    params["sample_images"] = {"num_images": 40, "batch_size": 32}
    params["edits"]["inpaint"] |= {"candidates": 1, "repeats": 1}
    for edit in ("denoise", "super-resolution"):
        params["edits"][edit] |= {"candidates": 1, "sweeps": 1, "correction_steps": 2}
    params["edit_images"] = {"num_images": 4, "num_seeds": 2, "batch_size": 4}
    return params


def copy_checkout(folder: Path) -> Clone:
    """The tracked and new files of this checkout, copied, with smoke params, as a git and DVC repository."""
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    for name in listed.stdout.splitlines():
        if (ROOT / name).is_file() and not name.startswith(("tests/", "data/metrics/", "dvc.lock")):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, folder / name)
    made = Clone(folder)
    made.write_params(smoke_params())
    made.git("init", "--quiet", "--initial-branch=main")
    made.git("add", "--all")
    made.git("commit", "--quiet", "--message=start")
    return made

"""A small clone of the project, in which whole pipelines run: the same code and dvc.yaml, with params of two steps."""

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[2]


class Clone:
    """A checkout with a DVC repository of its own."""

    def __init__(self, folder: Path):
        self.folder = folder
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

    def git(self, *arguments: str) -> None:
        identity = ["-c", "user.name=test", "-c", "user.email=test@localhost"]
        subprocess.run(["git", *identity, *arguments], cwd=self.folder, check=True, capture_output=True)


def smoke_params() -> dict[str, Any]:
    """The default params with as little work as shows everything."""
    params = yaml.safe_load((ROOT / "params.yaml").read_text())
    params["features"]["classifier"]["training"] |= {"num_steps": 60, "batch_size": 16}
    params["features"]["classifier"]["channels"] = 8
    params["features"]["random"] = {"kind": "random", "channels": 8, "feature_dim": 16}
    for tokenizer in params["tokenizers"].values():
        if tokenizer["kind"] == "none":
            continue
        tokenizer |= {"channels": 8, "num_blocks": 1}
        tokenizer["quantizer"] |= {"codebook_size": 16, "init_step": 1}
        tokenizer["training"] |= {"num_steps": 60, "batch_size": 16}
    params["tokenizers"]["vqgan"]["discriminator_start_step"] = 5
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
    params["evaluate"]["metrics"]["kernel"] |= {"subset": 20, "num_subsets": 2}
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


@pytest.fixture(scope="session")
def clone(tmp_path_factory: pytest.TempPathFactory) -> Clone:
    return copy_checkout(tmp_path_factory.mktemp("clone") / "project")


@pytest.fixture(scope="module")
def own_clone(tmp_path_factory: pytest.TempPathFactory) -> Clone:
    """For tests that leave more behind than others expect in a clone."""
    return copy_checkout(tmp_path_factory.mktemp("own") / "project")


@pytest.fixture
def two_clones(tmp_path: Path) -> tuple[Clone, Clone]:
    """Of their own, for a test that compares two ways of doing the same."""
    return copy_checkout(tmp_path / "one"), copy_checkout(tmp_path / "other")

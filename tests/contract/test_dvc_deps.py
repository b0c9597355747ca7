"""dvc.yaml lists exactly the code that each stage runs: less would serve stale results, more would retrain for nothing.

A part is chosen by params, so its file is named by them (`tessera/priors/${item.prior.kind}.py`). What parts share (nn/)
cannot be: a stage lists what any part that it could build imports, so that no preset and no new entry is ever stale.
"""

import re
from functools import cache
from pathlib import Path

import grimp
import pytest
import yaml
from dvc.repo import Repo

from tessera.components import kinds, load
from tessera.params import KEYS_DVC_IGNORES

ROOT = Path(__file__).parents[2]
PARAMS = yaml.safe_load((ROOT / "params.yaml").read_text())
# The part of params.yaml that each stage builds from its own params; parts that it receives as an artifact bring the
# hash of their code with them (artifacts/checkpoints.py).
BUILDS = {
    "prepare_images": lambda name: [("datasets", PARAMS["dataset"])],
    "train_features": lambda name: [("features", PARAMS["features"][name])],
    "train_tokenizer": lambda name: [
        ("tokenizers", PARAMS["tokenizers"][name]),
        ("quantizers", PARAMS["tokenizers"][name]["quantizer"]),
    ],
    "train_prior": lambda name: [("priors", PARAMS["systems"][name]["prior"])],
    "sample_images": lambda name: [("priors", PARAMS["systems"][name]["prior"])],
    "edit_images": lambda name: [("edits", config) for config in PARAMS["edits"].values()],
}


@cache
def import_graph() -> grimp.ImportGraph:
    return grimp.build_graph("stages", "tessera")


@cache
def stages() -> dict:
    return {stage.addressing: stage for stage in Repo(ROOT).index.stages}


def is_trained(folder: str, kind: str) -> bool:
    return hasattr(load(folder, kind), "Objective")


def code_run_by(address: str) -> set[str]:
    """The files of stages/ and tessera/ that the stage's process runs and that can change its outputs."""
    stage, _, name = address.partition("@")
    entry = re.search(r"python -m tessera.running (\S+)", stages()[address].cmd).group(1)
    entry = f"stages.{entry}"
    modules = {entry}
    for folder, part in BUILDS.get(stage, lambda name: [])(name):
        siblings = {f"tessera.{folder}.{kind}" for kind in kinds(folder)}
        shared = set().union(*(import_graph().find_upstream_modules(sibling) for sibling in siblings))
        modules |= {f"tessera.{folder}.{part['kind']}"} | shared - siblings
    if stage in ("train_prior", "sample_images"):  # a prior may build any denoiser, by the kind in its params
        modules |= {f"tessera.denoisers.{kind}" for kind in kinds("denoisers")}
    if stage == "train_tokenizer":  # a quantizer may build another, by the kind in its params
        modules |= {f"tessera.quantizers.{kind}" for kind in kinds("quantizers")}
    if stage == "train_prior":  # looks at it are with the features of any kind that is not trained
        modules |= {f"tessera.features.{kind}" for kind in kinds("features") if not is_trained("features", kind)}
    for module in tuple(modules):
        is_choice = module.split(".")[1] in ("denoisers", "features")
        modules |= import_graph().find_upstream_modules(module) if is_choice else set()
    modules |= import_graph().find_upstream_modules(entry)
    files = (Path(*module.split(".")).with_suffix(".py") for module in modules)
    return {file.as_posix() for file in files if (ROOT / file).is_file()}


@pytest.mark.parametrize("address", sorted(stages()))
def test_code_deps_are_the_import_closure(address):
    listed = {str(dep.def_path) for dep in stages()[address].deps if str(dep.def_path).endswith(".py")}
    run = code_run_by(address)
    assert listed == run, f"add to dvc.yaml: {sorted(run - listed)}; take out: {sorted(listed - run)}"


@pytest.mark.parametrize("address", sorted(stages()))
def test_a_stage_is_the_child_of_dvc_and_not_of_a_shell(address):
    assert stages()[address].cmd.startswith("exec python -m tessera.running "), "begin its cmd in dvc.yaml with: exec"


def test_no_init_file_imports_the_project_so_no_code_is_hidden_in_one():
    files = [
        path for folder in ("stages", "tessera", "flows", "studio") for path in (ROOT / folder).rglob("__init__.py")
    ]
    assert len(files) > 8
    for path in files:
        assert not re.search(r"(import|from) +(tessera|stages|flows|studio)", path.read_text()), path


def test_no_key_of_the_params_has_a_name_that_dvc_ignores():
    def keys(value):
        if isinstance(value, dict):
            for key, inner in value.items():
                yield key
                yield from keys(inner)

    for path in (ROOT / "params.yaml", *(ROOT / "presets").glob("*.yaml")):
        assert not set(keys(yaml.safe_load(path.read_text()))) & set(KEYS_DVC_IGNORES), path

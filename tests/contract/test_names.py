"""docs/glossary.md has every name that a user meets: each key of the params and of every part, each figure."""

import json
import re
from pathlib import Path

import pytest
import yaml

from tessera import params
from tessera.bases.diagnostics import Diagnostics
from tessera.bases.latents import Equivariance, LatentRegularization
from tessera.bases.optimization import Training
from tessera.components import kinds, load
from tessera.evaluation import garbage

ROOT = Path(__file__).parents[2]
GLOSSARY = set(re.findall(r"`([^`\n]+)`", (ROOT / "docs" / "glossary.md").read_text(encoding="utf-8")))
FILES = [ROOT / "params.yaml", *sorted((ROOT / "presets").glob("*.yaml"))]
FREE_NAMES = (
    "features",
    "tokenizers",
    "systems",
    "edits",
    "metrics",
    "protocols",
)  # what stands directly below them is named by the user
FOLDERS = (
    "datasets",
    "features",
    "tokenizers",
    "quantizers",
    "priors",
    "denoisers",
    "edits",
    "metrics",
    "perceptual",
    "conditions",
)
FIGURES = [  # besides those of metrics, which tests/contract/test_metrics.py measures
    "fd_random",
    "pfd_classifier",
    "floor_fd_classifier",
    "trial_fd_classifier",
    *(f"{kind}_fd_classifier" for kind in garbage.KINDS),
    "bits_per_token",
    "bits_per_image",
    "train_loss",
    "kept_step",
    "overfitting_step",
    "num_images",
    "num_reference_images",
    "feature_dim",
    "images_per_second",
    "edit_psnr_db",
    "changed_known_pixels",
    "diversity",
    "num_warnings",
    "codebook_collapsed",
    "discriminator_won",
    "discriminator_silent",
    "dead_code_age",
    "seconds",
    "test_loss",
    "validation_loss",
    "follow_fd_validation",
]


def keys_of(value: object, is_free: bool = False) -> set[str]:
    """All keys of nested mappings, except the free names."""
    if not isinstance(value, dict):
        return set()
    found = set() if is_free else set(value)
    return found.union(*(keys_of(inner, key in FREE_NAMES) for key, inner in value.items()))


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_every_key_of_a_params_file_is_in_the_glossary(path):
    keys = keys_of(yaml.safe_load(path.read_text(encoding="utf-8")))
    assert {"kind", "seed", "num_steps", "guidance_scale"} <= keys and "vqgan" not in keys
    assert not keys - GLOSSARY, f"explain in docs/glossary.md: {sorted(keys - GLOSSARY)}"


@pytest.mark.parametrize(("folder", "kind"), [(folder, kind) for folder in FOLDERS for kind in kinds(folder)])
def test_every_setting_of_a_part_is_in_the_glossary(folder, kind):
    module = load(folder, kind)
    keys = set(module.Config.model_fields)
    if folder == "priors":
        keys |= set(module.Sampling.model_fields)
    assert not keys - GLOSSARY, f"explain in docs/glossary.md: {sorted(keys - GLOSSARY)}"


@pytest.mark.parametrize(
    "settings",
    [
        params.Pipeline,
        params.System,
        params.EncodeTokens,
        params.SampleImages,
        params.ReferenceStats,
        params.Evaluate,
        params.FollowTraining,
        Training,
        Diagnostics,
        LatentRegularization,
        Equivariance,
    ],
    ids=lambda settings: settings.__name__,
)
def test_every_shared_setting_is_in_the_glossary(settings):
    keys = set(settings.model_fields)
    assert not keys - GLOSSARY, f"explain in docs/glossary.md: {sorted(keys - GLOSSARY)}"


@pytest.mark.parametrize("figure", FIGURES)
def test_every_figure_is_in_the_glossary(figure):
    assert figure in GLOSSARY


def test_every_key_of_the_kept_runs_metrics_is_in_the_glossary():
    """The list above is written by hand; what the stages really wrote is not."""
    files = sorted((ROOT / "docs" / "results" / "metrics").rglob("*.json"))
    keys = set().union(*(keys_of(json.loads(path.read_text(encoding="utf-8"))) for path in files))
    assert {"value", "standard_error", "network_sha256"} <= keys
    keys -= {path.stem for path in files}  # names of systems
    assert not keys - GLOSSARY, f"explain in docs/glossary.md: {sorted(keys - GLOSSARY)}"


def test_every_promise_about_security_names_tests_that_exist():
    named = set(re.findall(r"`(test_\w+)`", (ROOT / "docs/security.md").read_text(encoding="utf-8")))
    files = list((ROOT / "tests").rglob("test_*.py"))
    defined = {name for file in files for name in re.findall(r"def (test_\w+)", file.read_text(encoding="utf-8"))}
    assert len(named) > 20 and named - defined == set()
    named_files = set(re.findall(r"`(test_\w+\.py)`", (ROOT / "docs/security.md").read_text(encoding="utf-8")))
    assert named_files - {file.name for file in files} == set()

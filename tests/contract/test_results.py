"""What README claims of the default run is what docs/results has of it."""

import json
from pathlib import Path

import pytest

from tessera import params as all_params
from tessera.evaluation import figures
from tools.results import TABLE, first_table

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "docs/results"


@pytest.mark.parametrize("readme", ["README.md", "README.zh.md"])
def test_the_table_in_the_readme_is_that_of_the_kept_run(readme):
    shown = TABLE.search((ROOT / readme).read_text(encoding="utf-8"))
    assert shown and shown[0] == first_table((RESULTS / "comparison.md").read_text(encoding="utf-8"))


def test_the_kept_run_has_metrics_of_every_system_and_a_hash_of_all_weights():
    params = all_params.read(ROOT / "params.yaml")
    known = json.loads((RESULTS / "sha256.json").read_text())
    for name in params.systems:
        assert figures.read(RESULTS / f"metrics/systems/{name}.json").figure("fd_classifier")
        assert len(known[f"data/priors/{name}/weights.safetensors"]) == 64
    for name in params.tokenizers:
        assert figures.read(RESULTS / f"metrics/tokenizers/{name}.json").groups
        assert len(known[f"data/tokenizers/{name}/weights.safetensors"]) == 64


def test_the_lock_of_a_default_run_is_short():
    """DVC reads it at every stage: as YAML, 193 kB took 2.2 s."""
    assert len((RESULTS / "dvc.lock").read_text().splitlines()) <= 2200

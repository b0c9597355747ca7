"""What tests share: tiny specs, tiny image artifacts, and real data that are not part of the project."""

import os
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from accelerate.state import AcceleratorState

from tessera.artifacts import folder as artifact
from tessera.artifacts.images import ImageWriter, write_meta
from tessera.contracts import ImageSpec, TokenSpec
from tessera.running.job import Job

os.environ["TESSERA_TRACKING"] = "off"  # tests that track say so


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest files first, so that no worker is left alone with one at the end; within a file nothing changes."""
    longest = {item: item.get_closest_marker("e2e") for item in items}
    items.sort(key=lambda item: -longest[item].kwargs.get("seconds", 30) if longest[item] else 0)


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real data sets that are not in the repository; tests that need it are skipped without it."""
    folder = Path(os.environ.get("TESSERA_TEST_DATA", Path(__file__).parents[2] / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip(f"no real data at {folder}: set TESSERA_TEST_DATA to their folder")
    return folder


@pytest.fixture(scope="session")
def image_spec() -> ImageSpec:
    """Grey images, higher than wide: a mistaken transpose shows."""
    return ImageSpec(
        name="tiny", channels=1, height=16, width=8, num_classes=3, class_names=("a", "b", "c"), licence="none"
    )


@pytest.fixture(scope="session")
def token_spec() -> TokenSpec:
    return TokenSpec(
        codebook_size=11,
        latent_shape=(3, 4, 2),
        index_grid=(4, 2),
        num_classes=3,
        class_counts=(4, 4, 4),
        latent_mean=(0.0, 1.0, 2.0),
        latent_std=(1.0, 2.0, 0.5),
        tokenizer_fingerprint="f" * 64,
    )


@pytest.fixture(scope="session")
def images_folder(tmp_path_factory: pytest.TempPathFactory, image_spec: ImageSpec) -> Path:
    """An images artifact: each class is another direction of stripes, 48 to train on and 24 to test."""
    out = tmp_path_factory.mktemp("artifacts") / "images"
    random = np.random.default_rng(0)
    rows, columns = np.mgrid[0:16, 0:8]
    patterns = np.stack([rows, columns, rows + columns])  # (3, H, W)
    with artifact.create(out) as place:
        for split, count in (("train", 48), ("test", 24)):
            labels = np.arange(count) % 3
            phase = random.integers(0, 6, (count, 1, 1))
            waves = 127.5 + 100 * np.sin((patterns[labels] + phase) * np.pi / 3) + random.normal(0, 5, (count, 16, 8))
            with ImageWriter(place, split, image_spec) as writer:
                writer.append(waves.clip(0, 255).astype(np.uint8)[:, None], labels)
        index = pd.DataFrame({"split": ["train"] * 48 + ["test"] * 24, "kept": True})
        write_meta(place, image_spec, "0" * 64, index)
    return out


@pytest.fixture(scope="session")
def browser():
    """A headless Chromium of the system; tests that need one are skipped without it."""
    found = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if found is None:
        pytest.skip("no chromium on PATH: install it, for example with apt-get install chromium")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        launched = playwright.chromium.launch(executable_path=found, args=["--no-sandbox", "--disable-gpu"])
        yield launched
        launched.close()


@pytest.fixture(autouse=True)
def fresh_accelerate():
    """Accelerate keeps one precision per process; each test may choose its own, and each fixture of a module, which is
    set up before its first test's fixtures: hence afterwards too."""
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture
def job(tmp_path: Path) -> Job:
    return Job("test", tmp_path / "state")

"""Every command and Python snippet of README and of the site's pages for users, run as it stands, in clones.

What stands for something of the reader's own is put in its place (SUBSTITUTES), and trainings are short. What starts a server,
the tests themselves or several machines is run by the test that ELSEWHERE names; of what is run nowhere NOT_RUN says why. Every
other command is run here.
"""

import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from clones import Clone, smoke_params
from PIL import Image

pytestmark = pytest.mark.e2e(seconds=300)
ROOT = Path(__file__).parents[2]
PAGES = [
    "README.md", "README.zh.md", "docs/index.md", "docs/library.md", "docs/edits.md", "docs/studio.md", "docs/evaluation.md",
    "docs/tutorial.md", "docs/tutorial.zh.md",
]  # fmt: skip
ELSEWHERE = {  # the beginning of a line: the file that runs what it starts, and how that is written there
    "make test": (".ci/run", "make test"),
    "make ui": ("tests/e2e/test_stack.py", "def test_make_ui_answers_to_its_own_names_alone("),
    "make studio": ("tests/e2e/test_studio.py", '"studio.page"'),
    "make stack": ("tests/e2e/test_stack.py", '"flows.stack"'),
    "make serve": ("tests/e2e/test_served_model.py", '"serving.images"'),
    "make demo": ("tests/unit/test_demo.py", '"tools.demo"'),
    "make start IMAGES=photographs    #": ("tests/e2e/test_snippets.py", 'run_page("docs/tutorial.md"'),
    "python -m tessera.code accept": ("tests/e2e/test_update.py", '"accept"'),  # there is nothing to accept here
    "python -m tessera.tracking champion": ("tests/e2e/test_served_model.py", '"champion"'),
    "python -m flows.sweep": ("tests/e2e/test_deployments.py", "sweep/sweep"),
    "TESSERA_PROCESSES=auto": ("tests/unit/test_launch.py", 'TESSERA_PROCESSES="auto"'),
    "TESSERA_PROCESSES_TRAIN_PRIOR=4": ("tests/unit/test_launch.py", 'TESSERA_PROCESSES_TRAIN_PRIOR="2"'),
    "TESSERA_NODES=2": ("tests/e2e/test_training_processes.py", '"TESSERA_NODES": "2"'),
}
NOT_RUN = {"ssh -L": "needs another machine"}
SUBSTITUTES = {  # what this clone has instead
    "vqgan-masked": "vqgan-flow",
    "pixel-diffusion": "vqgan-flow",
    "../other-checkout/": "../other/",
    ".state/studio/1e146e26d5b6a75b.png": "in.png",
}
PRELUDE = (
    'make() { command make --assume-old=.venv/.ready "$@"; }\n'  # what is installed already is not installed again
)
DONE: set[str] = set()  # blocks that ran in the clone: both languages have them


def blocks(page: str) -> list[tuple[str, str]]:
    return re.findall(
        r"^```(bash|python)\n(.*?)^```$", (ROOT / page).read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL
    )


def runnable(block: str) -> str:
    """The lines of a shell block that are run here, with this clone's names, without comments: languages differ in those."""
    kept = [line for line in block.splitlines() if line.strip() and not line.startswith("#")]
    kept = [line for line in kept if not line.startswith((*ELSEWHERE, *NOT_RUN, " "))]
    return "\n".join(substituted(re.sub(r"\s+#.*", "", line)) for line in kept)


def substituted(text: str) -> str:
    for word, other in SUBSTITUTES.items():
        text = text.replace(word, other)
    return text


def run_page(page: str, clone: Clone, after: Callable[[str], None] = lambda block: None) -> None:
    """Its blocks in their order; a Python snippet goes on from those before it. after: told each block once it is done."""
    session = ""
    for language, block in blocks(page):
        text = runnable(block) if language == "bash" else substituted(block)
        session += text if language == "python" else ""
        if text and text not in DONE:
            DONE.add(text)
            command = ["bash", "-euc", PRELUDE + text] if language == "bash" else [sys.executable, "-c", session]
            done = clone.run(*command, PYTHONPATH=str(ROOT))
            assert done.returncode == 0, f"{text}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}"
            after(block)


def prepare(clone: Clone) -> None:
    """An environment, somebody's pictures, a commit to compare with, and another checkout."""
    (clone.folder / ".venv").symlink_to(sys.prefix)
    (clone.folder / ".git/info/exclude").write_text(".venv\n*.png\ndigits-*/\nphotographs*/\n")
    random = np.random.default_rng(0)
    for name in ("in", "a", "b"):
        Image.fromarray(random.integers(0, 256, (8, 8), dtype=np.uint8)).save(clone.folder / f"{name}.png")
    mask = np.zeros((8, 8), np.uint8)
    mask[4:] = 255
    Image.fromarray(mask).save(clone.folder / "mask.png")
    clone.git("config", "user.name", "test")
    clone.git("config", "user.email", "test@localhost")
    if (clone.folder / "dvc.lock").exists():
        other = clone.folder.parent / "other/data/metrics"
        shutil.copytree(clone.folder / "data/metrics", other)
        for path in other.rglob("*.json"):  # a run of another seed
            path.write_text(re.sub(r'("value": )(\d)', r"\g<1>1\2", path.read_text()))


def test_what_is_run_elsewhere_is_in_a_test_that_is_there() -> None:
    for line, (file, words) in ELSEWHERE.items():
        assert words in (ROOT / file).read_text(), line
    lines = [
        line for page in PAGES for language, block in blocks(page) if language == "bash" for line in block.splitlines()
    ]
    for line in (*ELSEWHERE, *NOT_RUN):
        assert any(each.startswith(line) for each in lines), f"{line}: no page has it"


@pytest.mark.parametrize("page", [page for page in PAGES if "tutorial" not in page])
def test_the_commands_and_snippets_of_a_page_run(page: str, clone: Clone) -> None:
    if not (clone.folder / ".venv").exists():
        prepare(clone)
    run_page(page, clone)


def test_the_tutorial_runs_from_photographs_to_an_image_in_python(clone: Clone, tmp_path: Path) -> None:
    fresh = Clone(tmp_path / "fresh")
    clone.git("clone", "--quiet", ".", str(fresh.folder))
    (fresh.folder / ".dvc/config.local").write_text(f"[cache]\n    dir = {tmp_path / 'cache'}\n")
    photographs = fresh.folder / "photographs"
    random = np.random.default_rng(0)
    photographs.mkdir()
    for number in range(120):
        pixels = random.integers(0, 256, (4, 5, 3), dtype=np.uint8)
        Image.fromarray(pixels).resize((50, 40), Image.Resampling.BICUBIC).save(photographs / f"{number}.jpg")
    prepare(fresh)
    DONE.clear()

    def after(block: str) -> None:
        if "make start" in block:
            shorten(fresh)
        if "make repro" in block:  # experiments begin at a commit
            fresh.git("add", "--all")
            fresh.git("commit", "--quiet", "--message=photographs")

    run_page("docs/tutorial.md", fresh, after)
    assert Image.open(fresh.folder / "new.png").size == (32, 32)
    english, chinese = ([block for _, block in blocks(f"docs/tutorial{end}.md")] for end in ("", ".zh"))
    assert english == chinese


def shorten(clone: Clone) -> None:
    """Trainings of a few steps, on networks as small as the tests'."""
    params, smoke = clone.params(), smoke_params("vqgan-flow")
    for tokenizer in params["tokenizers"].values():
        tokenizer["training"]["num_steps"] = 10
        tokenizer |= {"channels": 8, "num_blocks": 1}
        tokenizer["quantizer"] |= {"codebook_size": 16, "init_step": 1}
        if "discriminator_start_step" in tokenizer:
            tokenizer["discriminator_start_step"] = 5
    for system in params["systems"].values():
        system["prior"]["training"]["num_steps"] = 10
    params["sample_images"] = smoke["sample_images"]
    params["edit_images"] = smoke["edit_images"]
    clone.write_params(params)

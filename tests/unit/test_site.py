"""The site: built strictly and offline, whole, with formulas that a browser draws itself."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tools import site

ROOT = Path(__file__).parents[2]
LOADED = re.compile(
    r"<(?:script|img|iframe|source)[^>]*\ssrc=\"?(https?:)?//|<link[^>]*\shref=\"?(https?:)?//(?![^>]*canonical)"
)


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    out = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--quiet", "--strict", "--site-dir", str(out)]
    done = subprocess.run(
        command, cwd=ROOT, env={**os.environ, "NO_MKDOCS_2_WARNING": "1"}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return {str(path.relative_to(out)): path.read_text(encoding="utf-8") for path in out.rglob("*.html")}


def test_every_page_is_in_it_and_nothing_is_loaded_from_elsewhere(pages: dict[str, str]) -> None:
    sources = {path.stem for path in (ROOT / "docs").glob("*.md")} - {"index"}
    assert {f"{name}/index.html" for name in sources} | {"index.html", "404.html"} == pages.keys()
    for name, text in pages.items():
        assert not LOADED.search(text), name


def test_the_reference_has_the_public_names_with_their_types(pages: dict[str, str]) -> None:
    import tessera

    text = re.sub(r"<[^>]+>", "", pages["api/index.html"])
    for name in tessera.__all__:
        assert name in text
    assert "Sequence[int]" in text


def test_formulas_are_drawn_without_a_script_and_stay_in_their_line(pages: dict[str, str]) -> None:
    math = pages["math/index.html"]
    written = (ROOT / "docs/math.md").read_text(encoding="utf-8")
    assert math.count('display="block"') == written.count("```math")
    assert "$" not in re.sub(r"<(pre|code|script)\b.*?</\1>", "", math, flags=re.DOTALL)
    assert not re.search(r"<p>\s*<math", math)


def test_a_command_that_the_converter_does_not_know_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"does not know \\unheardof"):
        site.on_page_markdown("a $\\unheardof{x}$ b")
    assert "<math" not in site.on_page_markdown("`$x$` and\n\n```bash\necho $HOME $x$\n```\n")

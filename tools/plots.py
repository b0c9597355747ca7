"""DVC's curves and pictures as one page that needs no internet: python -m tools.plots (or `make plots`).

The page of `dvc plots show` loads Vega, which draws its curves, from a content delivery network; here it is in the page.
"""

import subprocess
import sys
import tempfile
from pathlib import Path

import vl_convert

OUT = Path("dvc_plots")


def main() -> int:
    script = vl_convert.javascript_bundle("window.vegaEmbed = vegaEmbed;").replace("</script", "<\\/script")
    head = f"<head><title>DVC plots</title><script>{script}</script></head>"
    page = f"<!DOCTYPE html>\n<html>{head}<body>{{plot_divs}}</body></html>\n"
    with tempfile.NamedTemporaryFile("w", suffix=".html", encoding="utf-8") as template:
        template.write(page)
        template.flush()
        show = "plots", "show", *sys.argv[1:], "--html-template", template.name, "--out", str(OUT)
        return subprocess.run([sys.executable, "-m", "dvc", *show]).returncode


if __name__ == "__main__":
    sys.exit(main())

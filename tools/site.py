"""What the site's pages need beside mkdocs: formulas without a script, and links out of docs/ as plain text.

Formulas become MathML, which browsers draw themselves; a script for them would come from another server.
"""

import html
import re
from typing import Any

from latex2mathml.converter import convert

DISPLAY = re.compile(r"^( *)```math\n(.*?)^ *```$", re.MULTILINE | re.DOTALL)
INLINE = re.compile(r"(?<![\\$`\w])\$([^$\n`]+)\$(?![\w$])")
CODE = re.compile(r"(^ *```.*?^ *```$|`[^`\n]+`)", re.MULTILINE | re.DOTALL)
OUTSIDE = re.compile(r"\[([^\]]+)\]\(\.\./([^)]+)\)")
NAMES = {r"\arg\min": r"\operatorname{argmin}", r"\arg\max": r"\operatorname{argmax}"}


def on_page_markdown(markdown: str, **_: Any) -> str:
    """mkdocs calls this for each page before Markdown reads it."""
    markdown = DISPLAY.sub(_block, markdown)
    pieces = CODE.split(markdown)
    return "".join(piece if number % 2 else _prose(piece) for number, piece in enumerate(pieces))


def mathml(latex: str, display: str) -> str:
    """Raises ValueError for a command that the converter does not know."""
    for command, name in NAMES.items():
        latex = latex.replace(command, name)
    made = convert(" ".join(latex.split()), display=display)
    left = re.search(r"\\[A-Za-z]+", html.unescape(re.sub(r"<[^>]*>", " ", made)))
    if left:
        raise ValueError(
            f"latex2mathml does not know {left[0]}: write the formula otherwise, or name it in tools/site.py"
        )
    return made


def _block(found: re.Match[str]) -> str:
    """A formula on a line of its own, which scrolls where it is wider than the page."""
    return f'\n{found[1]}<div style="overflow-x: auto">{mathml(found[2], "block")}</div>\n'


def _prose(text: str) -> str:
    # In a span, as a line that begins with <math> would be a block of its own
    text = INLINE.sub(lambda found: f"<span>{mathml(found[1], 'inline')}</span>", text)
    return OUTSIDE.sub(r"\1 (`\2`)", text)

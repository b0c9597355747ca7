"""Fonts for words below pictures, in whatever letters they are."""

from PIL import ImageFont

NO_LETTER = "\uffff"  # what every font draws as the letter that it lacks
MOST_TRIED = 500  # fonts
LIKELY = ("cjk", "sourcehan", "wqy", "wenquanyi", "hei", "pingfang", "hiragino", "fallback", "unicode", "dejavu")
STYLED = ("bold", "italic", "oblique", "mono", "serif", "display")
LAST_RESORT = "Last Resort"  # a font that has a box for every letter


def font_for(text: str, size: int) -> ImageFont.FreeTypeFont:
    """Pillow's own font; where it lacks letters of the text, one on this machine that has all of them, if any does."""
    own = ImageFont.load_default(size)
    letters = sorted({letter for letter in text if not letter.isascii() and letter.isprintable()})
    if _has(own, letters):
        return own
    from matplotlib import font_manager  # here, because it takes a second

    paths = {font.fname for font in font_manager.fontManager.ttflist}
    for path in sorted(paths, key=_rank)[:MOST_TRIED]:
        try:
            found = ImageFont.truetype(path, size)
        except OSError:  # no outlines, or no font any more
            continue
        if LAST_RESORT not in str(found.getname()) and _has(found, letters):
            return found
    return own


def _rank(path: str) -> tuple[bool, bool, str]:
    """Likely fonts first, and upright ones before others."""
    name = path.lower()
    return not any(part in name for part in LIKELY), any(part in name for part in STYLED), path


def _has(font: ImageFont.FreeTypeFont, letters: list[str]) -> bool:
    lacking = _drawn(font, NO_LETTER)
    return all(_drawn(font, letter) != lacking for letter in letters)


def _drawn(font: ImageFont.FreeTypeFont, letter: str) -> tuple[tuple[int, int], bytes]:
    mask = font.getmask(letter)
    return mask.size, bytes(mask)

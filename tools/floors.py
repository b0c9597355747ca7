"""Draws the floors of the house: python -m tools.floors writes docs/floors.svg.

Rooms and arrows are import-linter's own: its graph of imports, and the layers of pyproject.toml. A line leads from a room down
to one that it imports from, the wider the more imports.
"""

import tomllib
from collections import Counter
from pathlib import Path
from xml.sax.saxutils import escape

import grimp

OUT = Path("docs/floors.svg")
PACKAGES = ("flows", "stages", "studio", "tessera")
TOP = "flows | stages | studio"
WIDTH, FLOOR, MARGIN, BOX = 1080, 74, 16, 34
INK, PAPER, FILL, LINE = "#1c2733", "#ffffff", "#e8eef5", "#7d93ab"


def main() -> None:
    OUT.write_text(drawn(floors(), *rooms_and_arrows()), encoding="utf-8")


def floors() -> list[list[str]]:
    """Rooms from the top floor down: those of the library, under the three that run it."""
    settings = tomllib.loads(Path("pyproject.toml").read_text(encoding="utf-8"))["tool"]["importlinter"]
    (library,) = [contract["layers"] for contract in settings["contracts"] if "containers" in contract]
    return [layer.split(" | ") for layer in (TOP, *library)]


def rooms_and_arrows() -> tuple[Counter[str], Counter[tuple[str, str]]]:
    """How many modules each room has, and how many imports lead from one room into another."""
    graph = grimp.build_graph(
        *PACKAGES, include_external_packages=False, exclude_type_checking_imports=True, cache_dir=None
    )
    sizes: Counter[str] = Counter()
    arrows: Counter[tuple[str, str]] = Counter()
    for module in graph.modules:
        sizes[room_of(module)] += 1
        for imported in graph.find_modules_directly_imported_by(module):
            if room_of(module) != room_of(imported):
                arrows[room_of(module), room_of(imported)] += 1
    return sizes, arrows


def room_of(module: str) -> str:
    """tessera.nn.warp is in nn; flows.stack.members in flows."""
    first, _, rest = module.partition(".")
    return rest.partition(".")[0] if first == "tessera" and rest else first


def drawn(layers: list[list[str]], sizes: Counter[str], arrows: Counter[tuple[str, str]]) -> str:
    """The picture as SVG text, the same for the same graph."""
    places: dict[str, tuple[float, float, float]] = {}  # left, top, width of each room
    for row, rooms in enumerate(layers):
        step = (WIDTH - 2 * MARGIN) / len(rooms)
        width = min(step - 10, 190)
        for column, room in enumerate(rooms):
            places[room] = (MARGIN + step * (column + 0.5) - width / 2, MARGIN + row * FLOOR, width)
    height = 2 * MARGIN + (len(layers) - 1) * FLOOR + BOX
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" font-family="sans-serif" font-size="13">',
        f'<rect width="{WIDTH}" height="{height}" fill="{PAPER}"/>',
    ]
    for (above, below), count in sorted(arrows.items()):
        (x1, y1, w1), (x2, y2, w2) = places[above], places[below]
        start, end = (x1 + w1 / 2, y1 + BOX), (x2 + w2 / 2, y2)
        path = f"M{start[0]:.0f} {start[1]:.0f} C{start[0]:.0f} {start[1] + 30:.0f} {end[0]:.0f} {end[1] - 30:.0f}"
        wide = min(0.6 + count / 5, 4)
        parts.append(
            f'<path d="{path} {end[0]:.0f} {end[1]:.0f}" fill="none" stroke="{LINE}" stroke-opacity="0.45" '
            f'stroke-width="{wide:.1f}"><title>{above} imports from {below}: {count}</title></path>'
        )
    for room, (left, top, width) in places.items():
        label = f"{escape(room)} · {sizes[room] - 1}" if sizes[room] > 1 else escape(room)
        parts += [
            f'<rect x="{left:.0f}" y="{top}" width="{width:.0f}" height="{BOX}" rx="5" fill="{FILL}" stroke="{INK}"/>',
            f'<text x="{left + width / 2:.0f}" y="{top + 21}" text-anchor="middle" fill="{INK}">{label}</text>',
        ]
    return "\n".join([*parts, "</svg>", ""])


if __name__ == "__main__":
    main()

"""data/download.py emoji: a small sheet that is drawn here, cut, and read as presets/emoji.yaml reads it."""

import hashlib
import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from PIL import Image

from tessera import params
from tessera.components import load, parse

ROOT = Path(__file__).parents[2]
SIDE = 3
# name, has_img_google, has_img_twitter and the place on the sheets; then the same of its skin tones
TABLE: list[tuple[str, bool, bool, tuple[int, int], dict[str, tuple[int, int]]]] = [
    ("BLUE HEART", True, True, (0, 0), {}),
    ("HANDSHAKE", True, True, (1, 0), {"1F3FB": (0, 1), "1F3FF-1F3FD": (1, 1)}),
    ("OF GOOGLE ALONE", True, False, (0, 2), {}),
]
TOLD = [
    ("blue heart", ["google", "twitter"], (0, 0)),
    ("handshake", ["google", "twitter"], (1, 0)),
    ("handshake, light skin tone", ["google", "twitter"], (0, 1)),
    ("handshake, dark skin tone and medium skin tone", ["google", "twitter"], (1, 1)),
    ("of google alone", ["google"], (0, 2)),
]


def color(style: str, place: tuple[int, int]) -> tuple[int, int, int]:
    return (40 if style == "google" else 200, 90 * place[0], 60 * place[1])


def publish(host: Path) -> None:
    """emoji.json and a sheet of each style: squares of one color each, whose borders are white."""

    def entry(code: str, flags: tuple[bool, bool], place: tuple[int, int]) -> dict[str, Any]:
        has = dict(zip(("has_img_google", "has_img_twitter"), flags, strict=True))
        where = dict(zip(("sheet_x", "sheet_y"), place, strict=True))
        return {"unified": code, "image": f"{code.lower()}.png"} | has | where

    host.mkdir()
    listed, places = [], []
    for number, (name, google, twitter, place, tones) in enumerate(TABLE):
        flags, code = (google, twitter), f"1F49{number}"
        emoji = entry(code, flags, place) | {"name": name, "category": "Symbols", "subcategory": "heart"}
        if tones:
            emoji["skin_variations"] = {tone: entry(f"{code}-{tone}", flags, at) for tone, at in tones.items()}
        listed.append(emoji)
        places += [place, *tones.values()]
    (host / "emoji.json").write_text(json.dumps(listed))
    for style in ("google", "twitter"):
        sheet = np.full((3 * (SIDE + 2), 2 * (SIDE + 2), 4), 255, np.uint8)
        for place in places:
            left, top = (number * (SIDE + 2) + 1 for number in place)
            sheet[top : top + SIDE, left : left + SIDE, :3] = color(style, place)
        Image.fromarray(sheet).save(host / f"sheet_{style}.png")


def test_sheets_are_cut_into_the_tar_that_the_preset_reads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    spec = importlib.util.spec_from_file_location("download", ROOT / "data/download.py")
    assert spec and spec.loader
    download = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(download)
    preset = params.read(ROOT / "presets/emoji.yaml").dataset.source
    assert download.EMOJI.side == 64 and preset == "data/raw/emoji64.tar"

    host = tmp_path / "host"
    publish(host)

    def file(name: str) -> Any:
        digest = hashlib.sha256((host / name).read_bytes()).hexdigest()
        return download.File((host / name).as_uri(), sha256=digest)

    sheets = {style: file(f"sheet_{style}.png") for style in ("google", "twitter")}
    monkeypatch.setattr(download, "EMOJI", download.Sheets(file("emoji.json"), sheets, SIDE))
    written = []
    for folder in (tmp_path / "a", tmp_path / "b"):
        monkeypatch.setattr(sys, "argv", ["download.py", "emoji", str(folder)])
        download.main()
        written.append((folder / f"emoji{SIDE}.tar").read_bytes())
        said = capsys.readouterr().out
        assert "9 pictures" in said and "Apache-2.0" in said and "CC-BY 4.0" in said
        assert (folder / f"emoji{SIDE}.licences.txt").read_text() in said
    assert written[0] == written[1]

    raw = yaml.safe_load((ROOT / "presets/emoji.yaml").read_text())["dataset"]
    raw |= {"source": str(tmp_path / "a" / f"emoji{SIDE}.tar"), "height": SIDE, "width": SIDE, "resize": "stretch"}
    part = load("datasets", "image_folder")
    records = [record for record in part.records(parse(part.Config, raw)) if not record.ignored]
    found = {(record.metadata.captions[0], record.label): record.image for record in records}
    styles = ("google", "twitter")  # the classes are in this order
    expected = {(text, styles.index(style)): color(style, place) for text, has, place in TOLD for style in has}
    assert len(records) == len(found) and found.keys() == expected.keys()
    for told, image in found.items():
        assert (image == np.array(expected[told], np.uint8)[:, None, None]).all()

    (host / "sheet_google.png").write_bytes(b"another file")
    monkeypatch.setattr(sys, "argv", ["download.py", "emoji", str(tmp_path / "c")])
    with pytest.raises(SystemExit):
        download.main()
    assert "serves another file" in capsys.readouterr().err and not list((tmp_path / "c").glob("*.*"))

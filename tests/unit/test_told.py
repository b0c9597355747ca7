"""Captions on their way to a training and to a judge: which is drawn for which image, and how its nearness is ranked."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from tessera.artifacts import folder as artifact
from tessera.artifacts import tokens as token_artifact
from tessera.artifacts.captions import Captions, examples_of
from tessera.artifacts.tokens import Tokens
from tessera.bases.captions import encoded
from tessera.bases.of_images import OfCaptions
from tessera.conditions import attributes, caption
from tessera.conditions.attributes import OfAttributes
from tessera.contracts import TokenSpec
from tessera.evaluation import told as judged
from tessera.training.told import ToldTokens, write_examples

NUM = 30
CAPTIONS = [[f"image {row}, said {which}" for which in range(row % 3)] for row in range(NUM)]


@pytest.fixture
def tokens(tmp_path: Path, token_spec: TokenSpec) -> dict[str, Tokens]:
    spec = token_spec
    with artifact.create(tmp_path / "tokens") as place:
        for split in ("train", "test"):
            (place / split).mkdir()
            indices = np.random.default_rng(0).integers(0, spec.codebook_size, (NUM, 1, *spec.index_grid))
            np.save(place / split / "indices-00000.npy", indices.astype(np.uint16))
            np.save(place / split / "labels-00000.npy", np.arange(NUM) % spec.num_classes)
        artifact.write_json(place / "meta.json", {"spec": spec.model_dump(), "num_views": 1})
    return token_artifact.read(tmp_path / "tokens", "indices")[1]


def words(rows: torch.Tensor) -> list[str]:
    return [bytes(row[row != 0].tolist()).decode() for row in rows[:, 1:]]


def test_each_image_is_told_one_of_its_captions_beside_its_label(tokens: dict[str, Tokens]) -> None:
    """Also in a subset, and where the tokens lie on the device; captions are drawn by the batch's generator alone."""
    told = ToldTokens(tokens["train"], OfCaptions(Captions(CAPTIONS), 32, "train"))
    rows = torch.tensor([4, 5, 6, 5, 8])
    for data in (told, told.on(torch.device("cpu"))):
        first, again = (data.batch_of(data.stored(rows, torch.Generator().manual_seed(7))) for _ in range(2))
        assert torch.equal(first.labels, again.labels) and torch.equal(first.tokens, tokens["train"].batch(rows).tokens)
        assert first.labels[:, 0].tolist() == [int(label) + 1 for label in tokens["train"].labels[rows]]
        assert all(
            said in (CAPTIONS[row] or [""]) for row, said in zip(rows.tolist(), words(first.labels), strict=True)
        )
    drawn = {
        said for seed in range(40) for said in words(told.stored(rows[:2], torch.Generator().manual_seed(seed)).labels)
    }
    assert drawn == {*CAPTIONS[4], *CAPTIONS[5]}
    assert words(told.batch(rows).labels) == [(CAPTIONS[row] or [""])[0] for row in rows.tolist()]
    some = told.subset(np.array([8, 20, 11]))
    assert words(some.batch(torch.tensor([0, 2])).labels) == [CAPTIONS[8][0], CAPTIONS[11][0]]


def test_captions_that_do_not_fit_are_refused(tokens: dict[str, Tokens]) -> None:
    with pytest.raises(
        ValueError, match=r"something is said of 29 images of train, expected the 30 that the tokens are"
    ):
        ToldTokens(tokens["train"], OfCaptions(Captions(CAPTIONS[1:]), 32, "train"))
    with pytest.raises(ValueError, match=r"max_bytes 8 is too few: the longest caption of train images has 16 bytes"):
        OfCaptions(Captions(CAPTIONS), 8, "train")


def test_a_prior_keeps_captions_by_what_of_them_is_new(tokens: dict[str, Tokens], tmp_path: Path) -> None:
    train, test = [["a red square"], ["a blue circle"], []], [["a red circle"], ["a red square"], ["ein Kreis"]]
    splits = {
        name: ToldTokens(tokens[name], OfCaptions(Captions([*some, *([[]] * (NUM - 3))]), 32, name))
        for name, some in (("train", train), ("test", test))
    }
    write_examples(tmp_path, caption.Config(max_bytes=32), splits, seed=0)
    assert {(one.caption, one.group) for one in examples_of(tmp_path)} == {
        ("a red square", "seen"),
        ("a blue circle", "seen"),
        ("a red circle", "held_out"),
        ("ein Kreis", "new_words"),
    }
    assert examples_of(tmp_path / "elsewhere") == []


class Judge:
    """Sees the number in an image, and reads it in a caption; a caption of two digits is as near to any image as to another."""

    name, device, config = "judge", torch.device("cpu"), SimpleNamespace(kind="image_text")

    def __init__(self) -> None:
        self.model = SimpleNamespace(of_captions=self._of_captions, max_bytes=8)

    @staticmethod
    def _of_captions(rows: torch.Tensor) -> torch.Tensor:
        return torch.stack([torch.eye(10)[int(said)] if len(said) == 1 else torch.zeros(10) for said in words(rows)])

    @staticmethod
    def batches(pixels: np.ndarray, rows: Any = None) -> list[torch.Tensor]:
        return [torch.eye(10)[torch.from_numpy(pixels if rows is None else pixels[rows])]]


def test_ranks_are_those_of_brute_force_and_ties_are_shared() -> None:
    reference = SimpleNamespace(protocol_of=lambda *of, **settings: (of, settings))
    judge = Judge()
    panel: Any = SimpleNamespace(seed=0, references={"judge": reference}, judges={"other": Judge(), "judge": judge})
    captions = {"train": Captions([[str(n)] for n in range(10)]), "test": Captions([["10"], ["11"], []])}
    seen, told = np.array([3, 4, 5, 6]), ["3", "4", "9", "10"]
    groups = np.array(["seen", "seen", "seen", "new_words"])
    found = judged._told(panel, judge, captions, [(seen, None)], told, groups)
    # of 12 captions the right one is nearest, twice; "9" and "10" share the places behind the first with 11 others
    assert found.ranks[0].tolist() == [0, 0, 6, 6]
    assert found.protocol == (("test", "samples", 4, 0), {"num_captions": 12})
    assert found.likeness[0].tolist() == [1, 1, 0, 0] and (found.kind, found.is_first) == ("image_text", False)
    assert found.ranks[1][3] == 6  # nobody else is of its group
    assert all(rank > 0 for rank in found.ranks[1][:2])


def test_others_are_of_the_same_group_and_all_told_once() -> None:
    right, groups = np.arange(50), np.repeat(["seen", "held_out"], 25)
    found = judged._of_others(right, groups, seed=0)
    assert sorted(found) == list(range(50)) and not (found == right).any()
    assert all((found[groups == group] // 25 == right[groups == group] // 25).all() for group in ("seen", "held_out"))


def test_equal_captions_are_encoded_equally_and_no_caption_is_none() -> None:
    rows = encoded(["七", "", "七"], 8)
    assert torch.equal(rows[0], rows[2]) and not rows[1].any()


KNOWN = attributes.Config(numbers={"thickness": (1.0, 5.0)}, categories={"style": ("a", "b")})


def test_attributes_are_told_beside_the_label_and_what_is_missing_is_not_a_number(tokens: dict[str, Tokens]) -> None:
    said: list[Any] = [{"thickness": 1 + row % 5, "style": "ab"[row % 2], "other": "x"} for row in range(NUM)]
    said[4], said[5] = {"style": None, "thickness": "2.0"}, {}
    told = ToldTokens(tokens["train"], OfAttributes(KNOWN, said))
    rows = torch.tensor([0, 3, 4, 5])
    expected = torch.tensor([[-1.0, 0.0], [0.5, 1.0], [-0.5, torch.nan], [torch.nan, torch.nan]])
    for data in (told, told.on(torch.device("cpu"))):
        found = data.batch_of(data.stored(rows, torch.Generator().manual_seed(0))).labels
        torch.testing.assert_close(found[:, 1:], expected, equal_nan=True)
        assert found[:, 0].tolist() == [int(label) + 1 for label in tokens["train"].labels[rows]]
    assert told.said.rows[:, 0].tolist() == [0] * NUM  # the table itself is as it was


@pytest.mark.parametrize(
    ("said", "sentence"),
    [
        ({"thickness": 7}, "thickness is '7': expected a number from 1 to 5"),
        ({"thickness": "thin"}, "thickness is 'thin': expected a number from 1 to 5"),
        ({"style": "c"}, "style is 'c': expected one of a, b"),
        ({"colour": "red"}, "there is no attribute 'colour': expected some of thickness, style"),
    ],
)
def test_what_is_no_attribute_is_told_in_a_sentence(said: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        attributes.encoded(KNOWN, [said])

"""Params for a folder of images: whatever lies there, what is written passes the check, or a sentence says why not."""

import argparse
import subprocess
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tessera.check import images, problems
from tessera.check.estimate import Estimate, Trained
from tessera.start import __main__ as command
from tessera.start import choices
from tessera.start.survey import survey


def photographs(
    folder: Path, number: int, folders: tuple[str, ...] = ("",), is_gray: bool = False, size=(48, 40)
) -> Path:
    """Small JPEGs, dealt to the folders in turn."""
    random = np.random.default_rng(0)
    for place in range(number):
        path = folder / folders[place % len(folders)] / f"{place:03d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        image = Image.fromarray(random.integers(0, 256, (*size[::-1], 3), np.uint8))
        (image.convert("L") if is_gray else image).save(path)
    return folder


def chosen(folder: Path, labels: str | None = None, resolution: int | None = None, is_gpu: bool = False):
    return choices.choose(survey(folder, labels), str(folder), resolution, is_gpu)


@pytest.mark.parametrize("number", [12, 60, 500])
@pytest.mark.parametrize("folders", [("",), ("cat", "dog")], ids=["no classes", "classes"])
@pytest.mark.parametrize("is_gray", [False, True], ids=["colour", "gray"])
def test_what_is_written_passes_the_check(tmp_path, number, folders, is_gray):
    found = chosen(photographs(tmp_path, number, folders, is_gray))
    params = found.params()
    planned = images.of_source(params)
    assert problems.problems(params, planned) == []
    assert planned.spec.channels == (1 if is_gray else 3) and planned.spec.num_classes == len(folders)
    assert len(planned.labels["train"]) + len(planned.labels["test"]) == number
    assert ("classifier" in params.features) == (len(folders) > 1)


def test_pages_and_bits_that_pictures_lose_are_told_and_arrays_name_their_key(tmp_path):
    folder = photographs(tmp_path, 12)
    assert not any("lose" in line for line in command.of_images(survey(folder)))
    page = Image.fromarray(np.zeros((40, 48), np.uint8))
    page.save(folder / "a.tif", save_all=True, append_images=[page])
    Image.fromarray(np.zeros((40, 48), np.uint16)).save(folder / "b.png")
    lines = command.of_images(survey(folder))
    assert any(
        "2 of them lose something, such as 'a.tif', which has several pages or frames, of which" in one for one in lines
    )
    (folder / "a.tif").unlink()
    assert any("1 of them lose something, such as 'b.png', which has 16 bits, which are scaled to 8" in one
               for one in command.of_images(survey(folder)))  # fmt: skip
    arrays = tmp_path / "arrays"
    arrays.mkdir()
    np.save(arrays / "a.npy", np.zeros((4, 4, 5), np.uint8))
    with pytest.raises(
        ValueError, match="'a.npy' is an array of numpy, which dataset.bands reads: write the params by hand"
    ):
        survey(arrays)


@pytest.mark.parametrize("resolution", [16, 48, 128, 256])
def test_every_resolution_gives_a_grid_of_at_most_16_tokens_a_side(tmp_path, resolution):
    params = chosen(photographs(tmp_path, 12), resolution=resolution, is_gpu=resolution > 64).params()
    assert resolution // params.tokenizers["vqgan"].patch_size <= 16
    assert problems.problems(params, images.of_source(params)) == []


def test_a_resolution_that_no_grid_fits_is_refused(tmp_path):
    with pytest.raises(ValueError, match="--resolution 50: expected a multiple of 16, such as 48"):
        chosen(photographs(tmp_path, 12), resolution=50)


def test_train_test_and_val_are_used_and_a_wrapping_folder_is_passed(tmp_path):
    folder = photographs(tmp_path / "raw", 48, ("all/train", "all/train", "all/test", "all/val"))
    found = survey(folder)
    assert (found.root, found.splits, found.class_counts) == ("all", ("train", "test", "val"), {})
    params = chosen(folder).params()
    assert params.dataset.val_images == "train"
    assert {split: len(labels) for split, labels in images.of_source(params).labels.items()} == {
        "train": 36,
        "test": 12,
    }


def test_folders_are_classes_unless_one_says_otherwise_or_most_images_lie_outside(tmp_path):
    folder = photographs(tmp_path / "raw", 40, ("cat", "dog"))
    assert survey(folder).class_counts == {"cat": 20, "dog": 20}
    assert survey(folder, "none").class_counts == {}
    assert survey(photographs(tmp_path / "loose", 40, ("", "cat", "dog"))).class_counts == {}
    with pytest.raises(ValueError, match="expected a folder per class"):
        survey(photographs(tmp_path / "flat", 12), "folders")


def test_what_gives_no_image_is_named_and_allowed_for(tmp_path):
    folder = photographs(tmp_path, 30)
    (folder / "notes.txt").write_text("no image")
    (folder / "cut.jpg").write_bytes((folder / "000.jpg").read_bytes()[:400])
    (folder / ".hidden").write_text("ignored")
    found = survey(folder)
    assert sorted(one.name for one in found.unreadable) == ["cut.jpg", "notes.txt"] and len(found.images) == 30
    assert chosen(folder).params().dataset.max_unreadable_fraction >= 2 / 32


def test_scans_that_are_stored_as_rgb_are_gray_and_long_images_are_padded(tmp_path):
    ramp = np.tile(np.arange(160, dtype=np.uint8), (40, 1))
    for number in range(12):
        Image.fromarray(np.stack([ramp + number] * 3, axis=2)).save(tmp_path / f"{number}.jpg")
    dataset = chosen(tmp_path).params().dataset
    assert (dataset.channels, dataset.resize) == (1, "pad")


UNUSABLE = [
    (lambda folder: (folder / "a.txt").write_text("x"), "holds no image that can be read"),
    (lambda folder: photographs(folder, 5), "has 5 images, expected at least 8"),
    (lambda folder: (photographs(folder, 12), (folder / "link").symlink_to("/nowhere")), "DVC hangs or stops"),
    (
        lambda folder: (
            photographs(folder, 12, ("a", "b")),
            (folder / "c").mkdir(),
            (folder / "c/x.txt").write_text("x"),
        ),
        "'c' holds no image",
    ),
]


@pytest.mark.parametrize(("fill", "sentence"), UNUSABLE, ids=[sentence for _, sentence in UNUSABLE])
def test_a_folder_that_cannot_be_used_is_refused_in_a_sentence(tmp_path, fill, sentence):
    fill(tmp_path)
    with pytest.raises(ValueError, match=sentence):
        chosen(tmp_path)


def test_steps_fill_the_time_and_few_images_are_not_learnt_for_ever(tmp_path):
    def steps(number: int, seconds_per_step: float, minutes: float = 20) -> tuple[int, int]:
        trained = [Trained(name, 1, seconds_per_step) for name in ("train_tokenizer@vqgan", "train_prior@vqgan-flow")]
        start = chosen(photographs(tmp_path / f"{number}", number))
        values = choices.in_time(start, Estimate(trained, 2.0, 0, "cpu"), minutes).values
        return values["tokenizer_steps"], values["prior_steps"]

    of_500 = steps(500, 0.5)
    assert sum(of_500) * 0.5 / 60 == pytest.approx(18, abs=1)
    assert steps(500, 100.0) == (choices.FEWEST_STEPS,) * 2
    assert max(steps(12, 0.001)) < max(steps(500, 0.001)) <= choices.MOST_STEPS


def test_the_command_writes_what_it_said_and_overwrites_nothing_that_was_changed(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    photographs(tmp_path / "my photos", 24)
    monkeypatch.setattr(command.estimate, "of_run", lambda *given: EXPECTED)
    assert command.main(["my photos", "--resolution", "16"]) == 0
    said = capsys.readouterr().out
    assert said.startswith("24 images, 48x40 to 48x40 pixels, RGB") and said.endswith(
        "wrote params.yaml; next: make repro\n"
    )
    text = Path("params.yaml").read_text()
    assert 'source: "my photos"' in text and "num_steps: 1000" in text
    assert command.main(["my photos", "--resolution", "16"]) == 0  # its own file, unchanged

    Path("params.yaml").write_text(text.replace("seed: 0", "seed: 1"))
    assert command.main(["my photos", "--resolution", "16"]) == 2
    assert "--force" in capsys.readouterr().err and "seed: 1" in Path("params.yaml").read_text()
    for line in ("init", "add params.yaml", "-c user.name=n -c user.email=e commit -m m"):
        subprocess.run(["git", *line.split()], check=True, capture_output=True)
    command.require_nothing_is_lost(Path("params.yaml"))  # git has it
    Path("params.yaml").write_text(text.replace("seed: 0", "seed: 2"))
    assert command.main(["my photos", "--resolution", "16"]) == 2
    assert command.main(["my photos", "--resolution", "16", "--force"]) == 0
    assert "seed: 0" in Path("params.yaml").read_text()


EXPECTED = Estimate(
    [Trained("train_tokenizer@vqgan", 500, 0.01), Trained("train_prior@vqgan-flow", 500, 0.01)], 1.0, 2**30, "cpu"
)


def test_more_minutes_than_asked_for_are_told(tmp_path, monkeypatch):
    slow = EXPECTED._replace(trainings=[one._replace(seconds_per_step=9.0) for one in EXPECTED.trainings])
    monkeypatch.setattr(command.estimate, "of_run", lambda *given: slow)
    found = survey(photographs(tmp_path, 12))
    for resolution, advice in ((64, "try --resolution 32"), (32, "a machine that is busy looks slow")):
        _, lines = command.chosen_for(found, argparse.Namespace(resolution=resolution, minutes=20.0))
        (told,) = [line for line in lines if "more than 20 minutes" in line]
        assert told.endswith(advice)


@pytest.mark.parametrize("options", [["--minutes", "-3"], ["--minutes", "nan"], ["--out", "no/such/folder/x.yaml"]])
def test_minutes_and_places_that_cannot_be_are_refused_before_anything_is_looked_at(tmp_path, capsys, options):
    assert command.main([str(tmp_path / "nowhere"), *options]) == 2
    assert f"tessera.start: {options[0]} {options[1]}: expected a " in capsys.readouterr().err

"""What would end in images of nothing is told: classes never shown, masks of what no model sees, values that are no numbers."""

from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from test_check import written
from torch import nn

from stages import prepare_images
from studio import edit as editing
from tessera import params as all_params
from tessera.artifacts.images import to_uint8
from tessera.check import __main__ as check
from tessera.edits import restyle
from tessera.evaluation.judge import Judge
from tessera.sources.frame import Frame
from tessera.system import CannotDraw, System


def with_a_class_to_test_alone(folder):
    """train/ has a and b, test/ has c too."""
    random = np.random.default_rng(0)
    for split, names, number in (("train", "ab", 20), ("test", "abc", 4)):
        for name in names:
            (folder / split / name).mkdir(parents=True)
            for image in range(number):
                pixels = random.integers(0, 256, (8, 8, 3), np.uint8)
                Image.fromarray(pixels).save(folder / split / name / f"{image}.png")
    return {
        "dataset": {"kind": "image_folder", "source": str(folder), "height": 8, "width": 8, "name": "abc"},
        "sample_images.num_images": 20,
        "evaluate.metrics": {"frechet": {"kind": "frechet"}},
    }


def test_a_class_without_a_training_image_is_told_by_prepare_images_and_check(tmp_path, job, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = written(tmp_path, with_a_class_to_test_alone(tmp_path / "raw"))
    sentence = "class 2 ('c') of abc has no training image: no prior learns it, and to draw it is refused; add images"
    prepare_images.run(all_params.read(path), tmp_path / "images", job)
    assert sentence in capsys.readouterr().out
    assert check.main(["--params", str(path)]) == 0
    told = capsys.readouterr().out.splitlines()
    assert told[0].startswith(sentence) and told[1].startswith("all is well: ")


class Gray(nn.Module):
    """Draws the gray of its labels; its images are its tokens."""

    def __init__(self, factor: float = 0.1):
        super().__init__()
        self.factor, self.config = nn.Parameter(torch.tensor(factor)), SimpleNamespace()

    def sample(self, labels, sampling, generator):
        return (labels.view(-1, 1, 1, 1) * self.factor).expand(-1, 3, 4, 2)

    def levels(self, sampling): ...

    def denoise(self, x, sigma, labels, sampling): ...

    def decode(self, latents):
        return latents


SAMPLING = SimpleNamespace(precision="fp32")


@pytest.fixture
def system(token_spec) -> System:
    spec = token_spec.model_copy(
        update={"class_counts": (4, 0, 7), "latent_mean": (0.0,) * 3, "latent_std": (1.0,) * 3}
    )
    return System(Gray(), Gray(), spec, "latents", "toy")


def drawn(system: System, label: int | None, count: int = 4):
    asked = editing.Draw("toy", SAMPLING, SAMPLING, label=label, count=count)
    return editing.draw(system, asked)


def test_a_label_without_a_training_image_is_not_drawn_by_anyone(system):
    expected = "toy was trained on no image of label 1: expected one of 0, 2"
    with pytest.raises(CannotDraw, match=expected):
        system.draw(np.array([0, 1]), SAMPLING, torch.Generator())
    with pytest.raises(CannotDraw, match=expected):
        drawn(system, 1)
    config = restyle.Config(target=1)
    with pytest.raises(ValueError, match=expected):
        restyle.edit(torch.zeros(1, 3, 4, 2), torch.zeros(1, dtype=torch.long), system, config, None, torch.Generator())
    assert (drawn(system, 2)[1] == to_uint8(torch.tensor(0.2)).item()).all()
    system.draw(np.array([0, 2, 3]), SAMPLING, torch.Generator())  # 3 says nothing of the class


def test_one_label_after_another_are_those_that_were_learnt(system):
    _, images = drawn(system, None)
    grays = to_uint8(torch.tensor([0.0, 0.2, 0.0, 0.2])).numpy()
    np.testing.assert_array_equal(images[:, 0, 0, 0], grays)


def test_images_of_no_numbers_are_an_error_and_not_black(token_spec):
    broken = System(Gray(), Gray(float("nan")), token_spec, "latents", "toy")
    with pytest.raises(ValueError, match="images hold values that are not finite"):
        broken.draw(np.array([1]), SAMPLING, torch.Generator())
    with pytest.raises(ValueError, match="images hold values that are not finite"):
        to_uint8(torch.tensor([0.0, torch.inf]))


def times(factor: float, images: torch.Tensor) -> torch.Tensor:
    return images.flatten(1) * factor


@pytest.mark.parametrize("what", ["features", "logits", "class_logits"])
def test_features_of_no_numbers_are_an_error_and_not_the_best_figure(what):
    network = nn.Module()
    network.has_logits = True
    for name in ("features", "logits", "class_logits"):
        setattr(network, name, partial(times, torch.nan if name == what else 0.0))
    judge = Judge(network, SimpleNamespace(kind="toy"))
    with pytest.raises(ValueError, match="hold values that are not finite"):
        getattr(judge, what)(np.zeros((2, 1, 4, 4), np.uint8))


WIDE = SimpleNamespace(height=8, width=8, channels=3, resize="crop")


def mask_of(size: tuple[int, int], box: tuple[int, int, int, int]) -> Image.Image:
    mask = Image.new("L", size, 0)
    mask.paste(255, box)
    return mask


def test_a_mask_of_what_the_models_do_not_see_is_refused():
    frame = Frame(WIDE, (40, 20))  # they see columns 10 to 29
    assert frame.mask(mask_of((40, 20), (10, 0, 30, 20))).all()
    for box in ((0, 0, 10, 20), (9, 5, 20, 10), (25, 0, 31, 3)):
        with pytest.raises(
            ValueError, match="white outside of columns 10 to 29 and rows 0 to 19, .* of 40 x 20 pixels"
        ):
            frame.mask(mask_of((40, 20), box))
    high = Frame(WIDE, (20, 40))
    with pytest.raises(ValueError, match="columns 0 to 19 and rows 10 to 29"):
        high.mask(mask_of((20, 40), (0, 0, 20, 10)))
    for how in ("pad", "stretch"):  # these see everything
        whole = Frame(SimpleNamespace(**{**vars(WIDE), "resize": how}), (40, 20))
        assert whole.mask(mask_of((40, 20), (0, 0, 40, 20))).any()


def test_an_odd_size_that_is_seen_whole_may_be_masked_whole():
    for size in ((8, 8), (9, 9), (33, 33), (333, 333)):
        assert Frame(WIDE, size).mask(mask_of(size, (0, 0, *size))).all()

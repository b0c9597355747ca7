"""Views of images, and the pictures people look at."""

import numpy as np
import pytest
import torch
from PIL import Image

from tessera import seeding
from tessera.artifacts import pictures
from tessera.artifacts.fonts import font_for
from tessera.artifacts.shards import ShardWriter
from tessera.artifacts.tokens import Tokens
from tessera.params import EncodeTokens
from tessera.training import views


def settings(**changes) -> EncodeTokens:
    base = {
        "horizontal_flip": False,
        "warps": 2,
        "warp_rotation": 0.1,
        "warp_scale": 0.05,
        "warp_shift": 0.05,
        "store_latents": True,
        "batch_size": 10,
    }
    return EncodeTokens(**{**base, **changes})


def test_the_number_of_views_is_that_of_warps_and_flips():
    images = torch.rand(3, 1, 8, 6)
    for changes in ({}, {"horizontal_flip": True}, {"warps": 0}, {"warps": 0, "horizontal_flip": True}):
        config = settings(**changes)
        assert 1 + len(views.others(images, config, 0, "train", 0)) == views.count(config)
    flipped = views.others(images, settings(warps=0, horizontal_flip=True), 0, "train", 0)
    assert torch.equal(flipped[0], images.flip(-1))


def test_a_warp_of_nothing_is_the_image_and_the_seed_decides_the_rest():
    images = torch.rand(3, 2, 8, 6)
    still = settings(warp_rotation=0.0, warp_scale=0.0, warp_shift=0.0)
    torch.testing.assert_close(views.warp(images, still, seeding.generator(0, "x")), images, atol=1e-5, rtol=0)
    first, again, other = (views.warp(images, settings(), seeding.generator(seed, "x")) for seed in (0, 0, 1))
    assert torch.equal(first, again) and not torch.equal(first, other) and not torch.equal(first, images)


def test_a_quarter_turn_of_a_warp_is_a_rotation_of_pixels_also_when_the_image_is_not_square(monkeypatch):
    monkeypatch.setattr(torch, "rand", lambda *shape, generator=None: torch.tensor([[1.0], [0.5], [0.5], [0.5]]))
    images = torch.zeros(1, 1, 9, 5)
    images[0, 0, 4, 2:5] = 1  # a bar from the center to the right
    turned = views.warp(images, settings(warp_rotation=torch.pi / 2, warp_scale=0.0, warp_shift=0.0), None)
    column = turned[0, 0, :, 2]
    assert column.sum() > 2.9 and (
        column[:3].sum() < 0.1 or column[-3:].sum() < 0.1
    )  # now up or down, as long as before
    assert column[4] > 0.9 and turned[0, 0, 4, 3:].sum() < 0.1


def test_prior_batches_draw_every_view_and_judge_by_the_first(tmp_path, token_spec):
    rows = np.arange(4)[:, None, None, None] * 0 + np.arange(3)[None, :, None, None] + np.zeros((4, 3, 4, 2), np.int64)
    with ShardWriter(tmp_path / "train", "indices") as writer, ShardWriter(tmp_path / "train", "labels") as labels:
        writer.append(rows.astype(np.uint16))
        labels.append(np.zeros(4, np.int64))
    tokens = Tokens(tmp_path, "train", token_spec, "indices")
    drawn = [tokens.batch(torch.arange(4), seeding.generator(0, step)).tokens for step in range(20)]
    assert set(torch.stack(drawn).unique().tolist()) == {0, 1, 2}
    assert tokens.batch(torch.arange(4)).tokens.unique().tolist() == [0]
    for num_views, expected in ((1, {0}), (2, {0, 1}), (3, {0, 1, 2})):
        some = Tokens(tmp_path, "train", token_spec, "indices", num_views)
        drawn = [some.batch(torch.arange(4), seeding.generator(0, step)).tokens for step in range(20)]
        assert set(torch.stack(drawn).unique().tolist()) == expected
    with pytest.raises(ValueError, match="num_views 4, but .* holds 3 to an image"):
        Tokens(tmp_path, "train", token_spec, "indices", 4)


@pytest.mark.parametrize("channels", [1, 2, 3, 4, 13])
def test_a_picture_shows_colors_or_the_first_channel_in_gray(channels):
    image = np.random.default_rng(0).integers(0, 256, (channels, 4, 6), np.uint8)
    shown = np.asarray(pictures.picture(image))
    np.testing.assert_array_equal(shown, image.transpose(1, 2, 0) if channels == 3 else image[0])
    of_grid = pictures.grid(image[None], 1)[1::12, 1::12][1:5, 1:7]  # enlarged 12 times, with a margin
    np.testing.assert_array_equal(of_grid, shown if channels == 3 else shown[..., None].repeat(3, axis=-1))


@pytest.mark.parametrize("channels", [1, 3])
def test_a_grid_shows_each_image_once_in_reading_order_enlarged(tmp_path, channels):
    images = (np.arange(5)[:, None, None, None] * 40 + np.zeros((5, channels, 8, 4))).astype(np.uint8)
    pictures.save_grid(tmp_path / "sub/grid.png", images, num_columns=3)
    pixels = np.asarray(Image.open(tmp_path / "sub/grid.png"))
    scale = 12  # 48 / 4
    assert pixels.shape == ((2 * 9 + 1) * scale, (3 * 5 + 1) * scale, 3)
    for number in range(5):
        row, column = divmod(number, 3)
        middle = pixels[(1 + row * 9 + 4) * scale, (1 + column * 5 + 2) * scale]
        assert (middle == 40 * number).all()


def test_classes_stand_in_rows_and_missing_images_are_blank():
    labels = np.array([1, 0, 1, 1, 0])
    images = np.arange(5, dtype=np.uint8)[:, None, None, None] + np.ones((5, 1, 2, 2), np.uint8)
    shown = pictures.by_class(images, labels, num_columns=3)
    assert shown[:, 0, 0, 0].tolist() == [2, 5, 0, 1, 3, 4]
    assert len(pictures.by_class(images, np.zeros(5, int), num_columns=2, max_rows=2)) == 4


def test_words_below_images_are_broken_at_words_and_end_in_dots_where_more_follows(tmp_path):
    fits = lambda text: len(text) <= 8  # noqa: E731
    lines = pictures._lines("a woman, medium skin tone", fits)
    assert [line.strip() for line in lines] == ["a woman,", "medium", "skin..."] and all(
        fits(line.rstrip()) for line in lines
    )
    assert pictures._lines("七" * 20, fits)[:2] == ["七" * 8, "七" * 8]
    assert pictures._lines("", fits) == [""]
    images = np.zeros((3, 1, 8, 8), np.uint8)
    images[1] = 200
    pictures.save_captioned(tmp_path / "a.png", images, ["one", "two", ""], 2)
    found = np.asarray(Image.open(tmp_path / "a.png"))
    cell = found.shape[1] // 2
    assert found[20, 20].tolist() == [0] * 3 and found[20, cell + 20].tolist() == [200] * 3
    below = found[116 : found.shape[0] // 2]
    assert (below[:, :cell] < 100).any() and (below[:, cell:] < 100).any()  # there are letters
    assert (found[found.shape[0] // 2 :, cell:] == 255).all()  # and no fourth image


def test_words_below_pictures_are_in_a_font_that_has_their_letters():
    """Pillow's own font has no Cyrillic letters; matplotlib brings one that has. Nobody brings letters of private use."""
    own = font_for("a red square", 11).getname()
    russian = font_for("красный дом", 11)
    assert russian.getname() != own and russian.getmask("д").getbbox()
    assert bytes(russian.getmask("д")) != bytes(russian.getmask("\uffff"))
    assert font_for("\ue123", 11).getname() == own

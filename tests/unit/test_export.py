"""Exported systems: the pipeline's own bits without the pipeline, ONNX beside torch, and twenty folders that are refused."""

import copy
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from huggingface_hub import ModelCard
from mlflow.exceptions import MlflowException
from mlflow.models.utils import _enforce_schema
from mlflow.pyfunc.scoring_server import infer_and_parse_data
from PIL import Image
from starlette.datastructures import Headers

import tessera
from serving.images import check
from stages import sample_images
from tessera import params as all_params
from tessera import seeding
from tessera.artifacts import checkpoints
from tessera.artifacts import folder as artifact
from tessera.artifacts.captions import Example, examples_of, write_examples_file
from tessera.artifacts.images import to_uint8
from tessera.artifacts.samples import Samples
from tessera.components import load as part
from tessera.components import parse
from tessera.conditions import image
from tessera.contracts import ImageSpec, TokenSpec
from tessera.editing import words
from tessera.export import __main__ as command
from tessera.export import card, layout
from tessera.export import onnx as networks
from tessera.params import Pipeline
from tessera.running.job import Job
from tessera.sources.decoding import decode, pixels_of
from tessera.sources.frame import Frame
from tessera.system import System
from tessera.tracking import registry
from tessera.tracking.served_model import ServedImages

ROOT = Path(__file__).parents[2]
DIGITS = ImageSpec(
    name="digits",
    channels=1,
    height=8,
    width=8,
    num_classes=10,
    class_names=("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"),
    licence="CC BY 4.0",
)
SLANTS = [Example("", 1, "held_out", {"slant": 0.5, "style": None}), Example("", 7, "held_out", {"style": "b"})]
EXAMPLES = [Example("a bold one", 1, "seen"), Example("七", 7, "new_words"), Example("bold 七", 7, "held_out")]
GENERATOR = seeding.generator
MASK = torch.ones(8, 8, dtype=torch.bool)
WORDED = "of-images"  # told captions of images beside the label
ADVERSARIAL = "of-images-by-a-gan"  # the same, without label dropout and guidance
SLANTED = "of-attributes"
VECTORED = "of-embeddings"
VECTORS = [
    Example("", 1, "held_out", {}, np.array([0.5, -2.0, 0.0], np.float32)),
    Example("", 7, "held_out", {}, np.full(3, np.nan, np.float32)),
]
PICTURED = "of-pictures"
GRAY = torch.randint(0, 256, (3, 1, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
PICTURE = {"kind": "image", "pixels": [4, 4], "patch_size": 2, "width": 16}
SHOWN = image.encoded(parse(image.Config, PICTURE), GRAY)[:, 1:].numpy()
PICTURES = [Example("", label, "held_out", {}, one) for label, one in zip((1, 7, 4), SHOWN, strict=True)]
SYSTEMS = [*all_params.read(ROOT / "presets/zoo.yaml").systems, WORDED, SLANTED, VECTORED, PICTURED, ADVERSARIAL]
TOLD = {WORDED: EXAMPLES, ADVERSARIAL: EXAMPLES, SLANTED: SLANTS, VECTORED: VECTORS, PICTURED: PICTURES}


@pytest.fixture(scope="module")
def params() -> Pipeline:
    """The zoo's, with few images, in batches of which the last is smaller."""
    values = yaml.safe_load((ROOT / "presets/zoo.yaml").read_text())
    values["sample_images"] = {"num_images": 10, "batch_size": 4}
    values["systems"][WORDED] = copy.deepcopy(values["systems"]["vqvae-captions"])
    values["systems"][WORDED]["prior"]["condition"] = {"kind": "caption", "max_bytes": 16}
    values["systems"][SLANTED] = copy.deepcopy(values["systems"][WORDED])
    condition = {"kind": "attributes", "numbers": {"slant": [-1.0, 1.0]}, "categories": {"style": ["a", "b"]}}
    values["systems"][SLANTED]["prior"]["condition"] = condition
    values["systems"][VECTORED] = copy.deepcopy(values["systems"][WORDED])
    values["systems"][VECTORED]["prior"]["condition"] = {"kind": "embedding", "embedding_dim": 3}
    values["systems"][PICTURED] = copy.deepcopy(values["systems"][WORDED])
    values["systems"][PICTURED]["prior"] |= {"condition": PICTURE, "num_views": 1}
    values["systems"][ADVERSARIAL] = copy.deepcopy(values["systems"]["gan"])
    values["systems"][ADVERSARIAL]["prior"]["condition"] = {"kind": "caption", "max_bytes": 16}
    for system in values["systems"].values():
        system["sampling"] |= {key: 2 for key in ("num_steps", "decoding_steps") if key in system["sampling"]}
    return parse(Pipeline, values)


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory, params: Pipeline) -> Path:
    """Every system of the zoo as a training leaves it, but for the training."""
    root = tmp_path_factory.mktemp("checkout")
    torch.manual_seed(0)
    for name, config in params.tokenizers.items():
        out = root / "data/tokenizers" / name
        with artifact.create(out) as place:
            checkpoints.save(
                place, "tokenizers", config, DIGITS, part("tokenizers", config.kind).Model(config, DIGITS), "code"
            )
    for name, system in params.systems.items():
        tokenizer, _, _ = checkpoints.load_model(root / "data/tokenizers" / system.tokenizer, "tokenizers")
        depth = tokenizer.latent_shape[0]
        spec = TokenSpec(
            codebook_size=tokenizer.codebook_size, latent_shape=tokenizer.latent_shape, index_grid=tokenizer.index_grid,
            num_classes=10, class_counts=(5,) * 9 + (0,), latent_mean=(0.1,) * depth, latent_std=(2.0,) * depth,
            tokenizer_fingerprint=artifact.fingerprint(root / "data/tokenizers" / system.tokenizer),
        )  # fmt: skip
        with artifact.create(root / "data/priors" / name) as place:
            made = part("priors", system.prior.kind).Model(system.prior, spec)
            checkpoints.save(place, "priors", system.prior, spec, made, "code")
            if name in TOLD:
                write_examples_file(place, TOLD[name])
    return root


@pytest.fixture(scope="module")
def exported(checkout: Path, params: Pipeline, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with an export of each system."""
    folder = tmp_path_factory.mktemp("exported")
    for name in SYSTEMS:
        command.write(params, name, checkout, folder / name)
    return folder


@pytest.mark.parametrize("name", SYSTEMS)
def test_a_loaded_system_draws_the_bits_of_the_pipeline_and_knows_its_own_tokens(
    name: str, checkout: Path, exported: Path, params: Pipeline, tmp_path: Path
) -> None:
    data = checkout / "data"
    parts = data / "tokenizers" / params.systems[name].tokenizer, data / "priors" / name
    sample_images.run(
        params, name, *parts, tmp_path / "samples", tmp_path / "grid.png", Job("sample", tmp_path / "state")
    )
    drawn = Samples(tmp_path / "samples", DIGITS)
    system = tessera.load(exported / name, device="cpu")
    labels = np.asarray(drawn.labels).tolist()
    said = examples_of(tmp_path / "samples")
    told: dict[str, Any] = {"captions": [one.caption for one in said]} if name in (WORDED, ADVERSARIAL) else {}
    told |= {"attributes": [one.attributes for one in said]} if name == SLANTED else {}
    if name == VECTORED:
        told["embeddings"] = [None if np.isnan(one.vector).any() else one.vector for one in said]
    if name == PICTURED:
        told["pictures"] = torch.stack([GRAY[(1, 7, 4).index(one.label)] for one in said])
    images = system.sample(labels, seed=params.seed, **told)
    assert np.array_equal(images.numpy(), drawn.pixels.all())
    assert (told or len(set(labels)) == 9) and system.labels == list(range(9))
    assert not torch.equal(system.sample(labels, seed=params.seed + 1, **told), images)
    inside = System.read(*parts)
    tokens = system.encode(images)
    assert torch.equal(tokens, inside.encode(images / 127.5 - 1))
    again = system.decode(tokens)
    assert again.dtype == torch.uint8 and again.shape == images.shape
    if params.systems[name].tokenizer == "none":
        assert torch.equal(again, images)
    pictures = system.pictures(images)
    assert [one.size for one in pictures] == [(8, 8)] * 10
    assert torch.equal(system.preprocess(pictures), images)


def test_words_are_drawn_as_the_shell_draws_them_and_a_label_is_its_first_caption(
    exported: Path, checkout: Path, params: Pipeline
) -> None:
    from studio import edit

    system = tessera.load(exported / "vqvae-captions", device="cpu")
    images = system.sample(captions=["seven", "七", "三", "nobody"], seed=1)
    assert images.shape == (4, 1, 8, 8) and len(set(map(bytes, images.numpy()))) == 4
    assert torch.equal(system.sample(captions=["three", "seven"], seed=2), system.sample([3, 7], seed=2))
    inside = edit.open_system(params, "vqvae-captions", checkout)
    asked = edit.to_draw(params, "vqvae-captions", caption="七", count=2, seed=3)
    line = "python -m studio.edit --system vqvae-captions --sample --caption '七' --count 2 --seed 3 out.png"
    assert asked.command() == line
    tokens, drawn = edit.draw(inside, asked)
    assert drawn.shape == (2, 1, 8, 8) and not torch.equal(*tokens)
    generator = seeding.generator(3, "edit_file")
    assert np.array_equal(words.draw(inside, ["七", "七"], asked.sampling, generator), drawn)
    with pytest.raises(ValueError, match="a label and a caption are given: expected one of them"):
        edit.to_draw(params, "vqvae-captions", caption="七", label=7)


def test_captions_of_images_are_drawn_beside_labels_and_away_from_a_negative_one(
    checkout: Path, exported: Path, params: Pipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    from studio import edit

    system = tessera.load(exported / WORDED, device="cpu")
    asked = {"captions": ["a 7", "a 7"], "labels": [7, 1], "seed": 3, "guidance_scale": 3.0}
    images = system.sample(**asked)
    assert not torch.equal(images, system.sample(**asked | {"labels": None}))
    assert not torch.equal(images, system.sample(**asked | {"negative": "thin"}))
    inside = edit.open_system(params, WORDED, checkout)
    drawing = edit.to_draw(
        params, WORDED, {"guidance_scale": 3.0}, caption="a 7", label=7, negative="thin", count=2, seed=3
    )
    line = "--label 7 --caption 'a 7' --negative thin --count 2 --sampling guidance_scale=3.0 --seed 3 out.png"
    assert drawing.command().endswith(line)
    both = system.sample(captions=["a 7"] * 2, labels=[7, 7], negative="thin", guidance_scale=3.0, seed=3)
    monkeypatch.setattr(seeding, "generator", lambda seed, *purpose, device: GENERATOR(3, "sample_images", 0))
    np.testing.assert_array_equal(edit.draw(inside, drawing)[1], both.numpy())


def test_a_gan_draws_what_it_is_told_beside_a_label_and_never_a_label_alone(
    exported: Path, checkout: Path, params: Pipeline
) -> None:
    from studio import edit

    system = tessera.load(exported / ADVERSARIAL, device="cpu")
    asked = {"captions": ["a 7", "a 7"], "labels": [7, 7], "seed": 3}
    images = system.sample(**asked)
    assert images.shape == (2, 1, 8, 8) and not torch.equal(images[0], images[1])
    assert not torch.equal(images, system.sample(**asked | {"captions": ["a 1", "a 1"]}))
    assert not torch.equal(images, system.sample(**asked | {"labels": [1, 1]}))
    card = (exported / ADVERSARIAL / layout.CARD).read_text()
    assert "Leave out nothing that every image was told." in card
    sentence = "was told the captions of every image in training: expected captions beside labels"
    with pytest.raises(tessera.CannotDraw, match=sentence):
        edit.draw(edit.open_system(params, ADVERSARIAL, checkout), edit.to_draw(params, ADVERSARIAL, label=3))
    with pytest.raises(MlflowException, match=sentence):
        served(checkout, params, ADVERSARIAL)(labels=[3])


def test_a_picture_is_painted_over_as_the_shell_does_it(exported: Path, checkout: Path, params: Pipeline) -> None:
    from studio import edit

    system = tessera.load(exported / PICTURED, device="cpu")
    images = system.sample(pictures=GRAY[[0, 0]], labels=[7, 7], seed=3)
    strong = [system.sample(pictures=GRAY[[row]], labels=[7], seed=3, guidance_scale=50) for row in (0, 1)]
    assert not torch.equal(*strong)
    inside = edit.open_system(params, PICTURED, checkout)
    drawing = edit.to_draw(params, PICTURED, picture=GRAY[0], label=7, count=2, seed=3)
    assert "--label 7 --picture in.png --count 2" in drawing.command()
    told = edit._told(inside, drawing)
    generator = GENERATOR(3, "sample_images", 0, device=inside.device)
    tokens = inside.prior.sample(told, drawing.sampling, generator)
    assert torch.equal(to_uint8(inside.decode(tokens)), images)
    with pytest.raises(ValueError, match="a caption and a picture are given: expected those that the prior was told"):
        edit.to_draw(params, PICTURED, picture=GRAY[0], caption="one")
    with pytest.raises(
        ValueError, match="caption is given, but of-pictures was trained on pictures, not on captions: leave"
    ):
        edit.to_draw(params, PICTURED, picture=GRAY[0], negative="red")
    with pytest.raises(ValueError, match="a negative caption is given without a caption: expected both"):
        edit.to_draw(params, WORDED, label=1, negative="red")


def test_attributes_are_drawn_as_the_shell_draws_them_and_may_be_left_out(
    checkout: Path, exported: Path, params: Pipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    from studio import edit

    system = tessera.load(exported / SLANTED, device="cpu")
    said = {"slant": 0.5, "style": "b"}
    images = system.sample(attributes=[said] * 2, labels=[7, 7], seed=3)
    for other in ({"slant": -1.0, "style": "b"}, {"style": "b"}, {}):
        assert not torch.equal(images, system.sample(attributes=[other] * 2, labels=[7, 7], seed=3))
    inside = edit.open_system(params, SLANTED, checkout)
    drawing = edit.to_draw(params, SLANTED, attributes=said, label=7, count=2, seed=3)
    assert "--label 7 --attribute slant=0.5 --attribute style=b --count 2" in drawing.command()
    monkeypatch.setattr(seeding, "generator", lambda seed, *purpose, device: GENERATOR(3, "sample_images", 0))
    np.testing.assert_array_equal(edit.draw(inside, drawing)[1], images.numpy())


def test_embeddings_are_lists_or_arrays_and_one_may_be_led_away_from(exported: Path) -> None:
    system = tessera.load(exported / VECTORED, device="cpu")
    vectors, options = [[0.5, -1.0, 2.0], [0.0, 0.0, 0.0]], {"seed": 3, "guidance_scale": 3.0}
    drawn = system.sample(embeddings=vectors, **options)
    for same in (np.array(vectors, np.float16), torch.tensor(vectors), [np.array(one) for one in vectors]):
        assert torch.equal(system.sample(embeddings=same, **options), drawn)
    away = system.sample(embeddings=vectors, negative=vectors[0], **options)
    assert not torch.equal(away, drawn) and not torch.equal(system.sample([1, 2], embeddings=vectors, **options), drawn)
    none = system.sample([1, 2], embeddings=[None, None], **options)
    assert torch.equal(none, system.sample([1, 2], **options))
    assert "`system.sample(embeddings=..., labels=[0])`" in (exported / VECTORED / "README.md").read_text()


def test_samples_are_told_captions_of_training_and_of_test_images_in_turn(
    checkout: Path, params: Pipeline, tmp_path: Path
) -> None:
    out, prior = tmp_path / "samples", checkout / "data/priors" / WORDED
    tokenizer = checkout / "data/tokenizers" / params.systems[WORDED].tokenizer
    sample_images.run(
        params, WORDED, tokenizer, prior, out, tmp_path / "samples.png", Job("sample_images", tmp_path / "s")
    )
    told = examples_of(out)
    assert len(told) == 10 and [one.group == "seen" for one in told] == [True, False] * 5
    assert {one.caption for one in told} == {one.caption for one in EXAMPLES}
    assert Samples(out, DIGITS, 10).labels.tolist() == [one.label for one in told]


def served(checkout: Path, params: Pipeline, name: str) -> Callable[..., list[str]]:
    """ask(**request) -> the pictures, by MLflow's own reading of a request; each of its forms is the same."""
    context = SimpleNamespace(
        artifacts={
            "tokenizer": checkout / "data/tokenizers" / params.systems[name].tokenizer,
            "prior": checkout / "data/priors" / name,
        },
        model_config={"sampling": params.sampling(name).model_dump(mode="json")},
    )
    model, schema = ServedImages(), registry.inputs()
    model.load_context(context)

    def ask(is_checked: bool = True, **row: Any) -> list[str]:
        drawn = []
        for form in ({"inputs": [row]}, {"dataframe_records": [row]}):
            if is_checked:
                check(Headers({"content-type": "application/json"}), json.dumps(form).encode())
            table = _enforce_schema(infer_and_parse_data(form, schema), schema)
            drawn.append(model.predict(context, table)["images"])
        assert drawn[0] == drawn[1]
        return drawn[0]

    return ask


def test_the_served_model_draws_captions(checkout: Path, params: Pipeline) -> None:
    ask = served(checkout, params, WORDED)
    alone, beside = ask(captions=["a 7", "七"], seed=1.0), ask(captions=["a 7", "七"], labels=[7, 7], seed=1.0)
    assert len(alone) == 2 and alone != beside and ask(captions=["a 7", "七"], seed=1.0) == alone
    with pytest.raises(ValueError, match="captions is null: leave it out"):
        ask(labels=[7, 7], captions=None)
    for row, sentence in [
        ({"captions": ["one"] * 65}, "captions has 65 entries, expected 1 to 64"),
        ({"captions": ["one"], "labels": [1, 2]}, "there are 2 labels for 1 captions: expected as many"),
        ({"captions": ["x" * 17]}, "has 17 bytes in UTF-8, expected at most max_bytes 16"),
        ({"attributes": [{}]}, "was trained on captions, not on attributes"),
        (
            {"seed": 1.0, "is_checked": False},
            "labels is missing: expected labels, or captions, attributes or embeddings",
        ),
        ({"attributes": [7], "is_checked": False}, "attributes: '7' was given, expected an object such as"),
        ({"embeddings": [["x"]], "is_checked": False}, "was given, expected a list of numbers"),
    ]:
        with pytest.raises(MlflowException, match=sentence):
            ask(**row)


def test_the_served_model_draws_attributes(checkout: Path, params: Pipeline) -> None:
    ask = served(checkout, params, SLANTED)
    some = [{"slant": 1, "style": "b"}, {"slant": 0.5, "style": None}, {}]
    alone, beside = ask(attributes=some, seed=1.0), ask(attributes=some, labels=[7, 7, 7], seed=1.0)
    assert len(alone) == 3 and alone != beside and ask(attributes=some, seed=1.0) == alone
    assert ask(attributes=[{}, {}], labels=[7, 7]) == ask(labels=[7, 7])
    strong, other = (
        ask(attributes=[{"slant": slant, "style": "b"}, *some[1:]], guidance_scale=20) for slant in (1, -1)
    )
    assert other[0] != strong[0] and other[1:] == strong[1:]
    for row, sentence in [
        ({"attributes": [{"slant": 7}]}, "slant is '7': expected a number from -1 to 1"),
        ({"attributes": [{"slant": [0]}]}, r"slant is '\[0\]': expected a number from -1 to 1"),
        ({"attributes": [{"slnt": 0}]}, "there is no attribute 'slnt': expected some of slant, style"),
        ({"attributes": [{}], "labels": [1, 2]}, "there are 2 labels for 1 attributes: expected as many"),
        (
            {"attributes": [{}], "embeddings": [[1, 2]]},
            "attributes and embeddings are given: expected those that the model",
        ),
        ({"attributes": [{}], "labels": [10]}, "labels: 10 was given, expected a whole number from 0 to 9"),
    ]:
        with pytest.raises(MlflowException, match=sentence):
            ask(**row)


def test_the_served_model_draws_embeddings(checkout: Path, params: Pipeline) -> None:
    ask = served(checkout, params, VECTORED)
    vectors = [[0, 1, 2], [1, 0, -3]]
    alone, beside = ask(embeddings=vectors, seed=1.0), ask(embeddings=vectors, labels=[7, 7], seed=1.0)
    assert len(alone) == 2 and alone != beside
    assert ask(embeddings=[[0.0, 1.0, 2.0], [1.0, 0.0, -3.0]], seed=1.0) == alone
    strong, other = (ask(embeddings=[[one, one, -one], [1, 0, -3.0]], guidance_scale=20.0) for one in (1, -1))
    assert other[0] != strong[0] and other[1] == strong[1]
    for row, sentence in [
        ({"embeddings": [[1, 2]]}, "an embedding has 2 numbers: expected embedding_dim 3"),
        ({"embeddings": [[1, 2, 1e39]]}, "an embedding has numbers that are not finite"),
        ({"embeddings": [[1, 2, 3]] * 65}, "embeddings has 65 entries, expected 1 to 64"),
    ]:
        with pytest.raises(MlflowException, match=sentence):
            ask(**row)
    with pytest.raises(ValueError, match="embeddings have 2 to 3 numbers: expected equally many in each"):
        ask(embeddings=[[1, 2, 3], [1, 2]])


@pytest.mark.parametrize(
    ("name", "given", "sentence"),
    [
        ("vqvae-captions", {"captions": ["much too long"]}, "has 13 bytes in UTF-8, expected at most max_bytes 8"),
        ("vqvae-captions", {"captions": [" "]}, "is empty or has the character NUL"),
        ("vqvae-captions", {"captions": "seven"}, "no single caption"),
        ("vqvae-captions", {"captions": []}, "expected a list of at least one"),
        ("vqvae-captions", {"captions": [7]}, "7 is no caption: expected text"),
        ("vqvae-captions", {"captions": ["one"], "labels": [1]}, "not both"),
        (WORDED, {"captions": ["one"], "labels": [1, 2]}, "there are 2 labels for 1 images: expected as many"),
        (WORDED, {"captions": ["one"], "labels": [9]}, "was trained on no image of label 9"),
        (WORDED, {"captions": [""]}, "a caption is empty: expected words, or labels alone"),
        (WORDED, {"captions": ["one"], "negative": ""}, "a caption is empty"),
        (SLANTED, {"attributes": [{"slant": 10**400}]}, "expected a number from -1 to 1"),
        (WORDED, {"captions": ["one"], "negative": 7}, "negative is a int: expected one of what captions are"),
        (WORDED, {"negative": "one"}, "negative is given without captions"),
        (WORDED, {"attributes": [{"slant": 1}]}, "was trained on captions, not on attributes"),
        (SLANTED, {"attributes": [{"slant": 7}]}, "slant is '7': expected a number from -1 to 1"),
        (SLANTED, {"attributes": [{"slnt": 0}]}, "there is no attribute 'slnt': expected some of slant, style"),
        (SLANTED, {"attributes": {"slant": 0}}, "expected a list of at least one"),
        (SLANTED, {"attributes": [0.5]}, "expected of each image a mapping"),
        (SLANTED, {"attributes": [{}], "captions": ["one"]}, "captions and attributes are given"),
        (SLANTED, {"embeddings": [[0, 0, 1]]}, "was trained on attributes, not on embeddings: expected attributes"),
        (
            VECTORED,
            {"captions": ["one"]},
            "was trained on embeddings, not on captions: expected embeddings, or a system",
        ),
        (VECTORED, {"embeddings": [[0, 0, 1]], "attributes": [{}]}, "attributes and embeddings are given"),
        (VECTORED, {"embeddings": [0.0, 0.0, 1.0]}, r"embeddings are a list with a float: expected \(B, E\) numbers"),
        (VECTORED, {"embeddings": np.zeros(3)}, r"embeddings are float64 of the shape \(3,\): expected \(B, E\)"),
        (VECTORED, {"embeddings": "vector"}, "embeddings are a str: expected"),
        (VECTORED, {"embeddings": []}, "embeddings are an empty list: expected"),
        (VECTORED, {"embeddings": np.zeros((2, 4))}, "an embedding has 4 numbers: expected embedding_dim 3"),
        (VECTORED, {"embeddings": torch.full((1, 3), torch.nan)}, "numbers that are not finite: expected finite ones"),
        (VECTORED, {"embeddings": [[0, 0, "1"]]}, "expected a list of 3 numbers"),
        (VECTORED, {"embeddings": [[0, 0, 1]], "labels": [1, 2]}, "there are 2 labels for 1 images: expected as many"),
        (
            VECTORED,
            {"embeddings": [[0, 0, 1]], "negative": "one"},
            "negative is a str: expected one of what embeddings",
        ),
        (VECTORED, {"embeddings": [[0, 0, 1]], "negative": [0, 1]}, "an embedding has 2 numbers"),
        (ADVERSARIAL, {"labels": [1]}, "was told the captions of every image in training: expected captions beside"),
        (ADVERSARIAL, {}, "was told the captions of every image in training: expected captions beside labels"),
        (WORDED, {"captions": [None]}, "a caption is None: expected words, or labels alone"),
        (WORDED, {"captions": ["one", None]}, "a caption is None: expected words, or labels alone"),
        (
            ADVERSARIAL,
            {"captions": ["one"]},
            "was told the label of every image in training, beside its captions: expected",
        ),
        (
            ADVERSARIAL,
            {"captions": ["one"], "labels": [1], "negative": "two"},
            "as its prior has no guidance: leave the neg",
        ),
        (
            WORDED,
            {"captions": ["one"], "guidance_scale": 1.0, "negative": "two"},
            "as its guidance_scale is 1: raise it",
        ),
        (SLANTED, {"captions": ["one"]}, "was trained on attributes, not on captions"),
        ("vqgan-masked", {"captions": ["one"]}, "was trained on labels, not on captions"),
    ],
)
def test_what_is_no_caption_is_told_in_a_sentence(name: str, given: dict, sentence: str, exported: Path) -> None:
    with pytest.raises(ValueError, match=sentence):
        tessera.load(exported / name, device="cpu").sample(**given)


def test_edits_are_those_of_the_shell_and_refuse_as_it_does(exported: Path, checkout: Path, params: Pipeline) -> None:
    from studio import edit

    system = tessera.load(exported / "vqgan-masked", device="cpu")
    images = system.sample([3], seed=1)
    mask = torch.zeros(8, 8, dtype=torch.bool)
    mask[4:] = True
    ours = system.edit("inpaint", images, mask=mask, labels=[3], seed=5)
    inside = edit.open_system(params, "vqgan-masked", checkout)
    asked = edit.request(params, "vqgan-masked", "inpaint", label=3, seed=5)
    picture = Image.fromarray(mask.numpy())
    theirs = edit.edit(inside, asked, params, system.pictures(images)[0], picture)
    assert np.array_equal(ours[0, 0].numpy(), np.asarray(theirs))
    assert torch.equal(ours[..., :4, :], images[..., :4, :]) and not torch.equal(ours, images)
    flow = tessera.load(exported / "vae-flow", device="cpu")
    other = flow.sample([4], seed=2)
    assert torch.equal(flow.edit("interpolate", images, other=other, share=0.0), images)
    assert torch.equal(flow.edit("interpolate", images, other=other, share=1.0), other)
    small = images[..., ::2, ::2].contiguous()
    larger = flow.edit("enhance", small, settings={"damage": "downsample", "factor": 2})
    assert larger.shape == images.shape
    assert flow.edit("variations", images, labels=[3], settings={"strength": 0.5}).shape == images.shape
    with pytest.raises(tessera.CannotEdit, match="gan cannot inpaint"):
        tessera.load(exported / "gan").edit("inpaint", images, mask=mask)


@pytest.mark.parametrize(
    ("call", "told"),
    [
        (lambda system: system.sample([9]), "no image of label 9"),
        (lambda system: system.sample([]), "expected a list of at least one whole number"),
        (lambda system: system.sample([10]), "label 10 is of no class"),
        (lambda system: system.sample([3.7]), "expected a list of at least one whole number"),
        (lambda system: system.sample([True]), "expected a list of at least one whole number"),
        (lambda system: system.sample(["七"]), "words are given as captions"),
        (lambda system: system.sample(3), "expected a list of at least one whole number"),
        (lambda system: system.sample([10**30]), "expected labels of the system"),
        (lambda system: system.sample([1], seed=1.5), "seed is 1.5: expected a whole number"),
        (lambda system: system.sample([1], seed=True), "seed is True: expected a whole number"),
        (lambda system: system.encode(None), "images are a NoneType: expected a torch.uint8 tensor"),
        (lambda system: system.decode([1]), "tokens are a list: expected torch.int64"),
        (lambda system: system.pictures(system.sample([1]) / 255), "images are torch.float32"),
        (lambda system: system.preprocess([]), "pictures are an empty list"),
        (lambda system: system.preprocess(["a.png"]), "pictures are a str: expected a list"),
        (lambda system: system.preprocess(Image.new("L", (8, 8))), "expected a list of at least one PIL.Image.Image"),
        (
            lambda system: system.preprocess([Image.new("F", (8, 8), 3.0)]),
            "picture 0 cannot be read: it has values from",
        ),
        (lambda system: system.sample([1], tempo=3), "sampling.tempo: unknown key"),
        (lambda system: system.encode(torch.zeros(1, 1, 8, 8)), "expected torch.uint8 of .B, 1, 8, 8."),
        (lambda system: system.decode(torch.zeros(1, 3, 3).long()), "expected torch.int64 of .B, 4, 4."),
        (lambda system: system.decode(torch.full((1, 4, 4), 10**6)), "outside the codebook"),
        (lambda system: system.edit("paint", system.sample([1])), "there is no edit 'paint': expected one of enhance"),
        (lambda system: system.edit("inpaint", system.sample([1])), "inpaint needs a mask"),
        (lambda system: system.edit("restyle", system.sample([1]), labels=[1, 2]), "there are 2 labels for 1 images"),
        (
            lambda system: system.edit("restyle", system.sample([1]), labels=[1.0]),
            "expected a list of at least one whole",
        ),
        (
            lambda system: system.edit("restyle", system.sample([1]), settings=[1]),
            "settings are a list: expected a dict",
        ),
        (lambda system: system.edit("restyle", system.sample([1]), share=0.2), "restyle has no use for share"),
        (lambda system: system.edit("variations", system.sample([1]), mask=MASK), "variations has no use for mask"),
        (lambda system: system.edit("inpaint", system.sample([1, 2]), mask=MASK.expand(3, 8, 8)), "or .2, 8, 8., got"),
        (lambda system: system.edit("restyle", system.sample([1]), other=system.sample([1, 2])), "expected one image"),
    ],
)
def test_a_call_that_makes_no_sense_is_one_sentence(exported: Path, call: Any, told: str) -> None:
    with pytest.raises(ValueError, match=told) as caught:
        call(tessera.load(exported / "vqgan-masked", device="cpu"))
    assert len(str(caught.value).splitlines()) == 1


def test_pictures_of_any_mode_become_what_the_data_set_makes_of_their_files(exported: Path, tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    pixels = random.integers(0, 256, (9, 12, 4), dtype=np.uint8)
    turned = Image.Exif()
    turned[0x0112] = 6  # as a phone that is held upright writes it
    saved = {
        "rgba.png": Image.fromarray(pixels),
        "gray.png": Image.fromarray(random.integers(0, 2**16, (9, 12), dtype=np.uint16)),
        "nothing.png": Image.new("LA", (9, 12), (0, 0)),
        "palette.png": Image.fromarray(pixels[..., :3]).quantize(8),
        "phone.jpg": Image.fromarray(pixels[..., :3]),
    }
    system = tessera.load(exported / "vqgan-masked", device="cpu")
    how = json.loads((exported / "vqgan-masked/config.json").read_text())["preprocessing"]
    for name, picture in saved.items():
        picture.save(tmp_path / name, **({"exif": turned} if name == "phone.jpg" else {}))
        expected = decode((tmp_path / name).read_bytes(), max_pixels=1000, **how)
        with Image.open(tmp_path / name) as opened:
            assert np.array_equal(system.preprocess([opened])[0].numpy(), expected), name


@pytest.mark.parametrize("size", [(43, 60), (28, 100), (3, 2), (24, 32), (31, 31)])
@pytest.mark.parametrize("resize", ["crop", "pad", "stretch"])
def test_a_frame_sees_of_a_picture_what_the_data_set_makes_of_it(resize: str, size: tuple[int, int]) -> None:
    how = layout.Preprocessing(channels=3, height=24, width=32, resize=resize, filter="lanczos", background="white")
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8))
    frame = Frame(how, picture.size)
    seen = frame.tensor(picture)
    assert np.array_equal(to_uint8(seen)[0].numpy(), pixels_of(picture, **how.model_dump()))
    back = frame.put_back(picture, torch.full_like(seen, -1.0))
    assert back.size == picture.size
    assert resize == "crop" or not np.asarray(back).any()  # all of the picture lies in the frame


TRACED = [
    "lfq-masked",
    "fsq-bitwise",
    "residual-autoregressive",
    "vae-diffusion",
    "vae-flow-map",
    "gan",
    SLANTED,
    PICTURED,
    ADVERSARIAL,
]


@pytest.mark.parametrize("name", TRACED)
def test_onnxruntime_agrees_with_torch_on_batches_of_other_sizes(
    name: str, checkout: Path, params: Pipeline, tmp_path: Path
) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    system = System.read(checkout / "data/tokenizers" / params.systems[name].tokenizer, checkout / "data/priors" / name)
    networks.write(system, tmp_path / "onnx", TOLD.get(name, ()))
    for file, (network, given, _) in networks.networks(system, TOLD.get(name, ())).items():
        five = {key: torch.cat([one, one.flip(0), one])[:5] for key, one in given.items()}
        session = onnxruntime.InferenceSession(tmp_path / f"onnx/{file}.onnx")
        (found,) = session.run(None, {key: one.numpy() for key, one in five.items()})
        with torch.no_grad():
            np.testing.assert_allclose(found, network(*five.values()).numpy(), atol=1e-4, rtol=0)


def test_onnx_without_what_was_told_is_refused_before_anything_is_written(
    checkout: Path, params: Pipeline, tmp_path: Path
) -> None:
    pytest.importorskip("onnxscript")
    tokenizer = checkout / "data/tokenizers" / params.systems[WORDED].tokenizer
    system = System.read(tokenizer, checkout / "data/priors" / WORDED, WORDED)
    with pytest.raises(ValueError, match="of-images keeps no example of the captions that it was told"):
        networks.write(system, tmp_path / "onnx")
    gone = [Example("much too long for it", 1, "seen")]  # as a text model that is not there refuses to read
    with pytest.raises(ValueError, match="of-images is traced with captions, which cannot be read: .* has 20 bytes"):
        networks.write(system, tmp_path / "onnx", gone)
    assert not (tmp_path / "onnx").exists()


def test_the_card_has_figures_licence_classes_and_a_head_that_the_hub_reads(
    checkout: Path, params: Pipeline, tmp_path: Path
) -> None:
    figures = json.loads((ROOT / "docs/results/metrics/systems/vqgan-masked.json").read_text())
    metrics = checkout / "data/metrics/systems/vqgan-masked.json"
    metrics.parent.mkdir(parents=True)
    shutil.copy(ROOT / "docs/results/metrics/systems/vqgan-masked.json", metrics)
    picture = checkout / "data/pictures/samples/vqgan-masked.png"
    picture.parent.mkdir(parents=True)
    Image.new("L", (80, 80)).save(picture)
    command.write(params, "vqgan-masked", checkout, tmp_path / "out")
    card = ModelCard.load(tmp_path / "out/README.md")
    assert card.data.library_name == "tessera" and card.data.license == "other"
    one = figures["generation"]["fd_classifier"]
    assert (
        f"| generation/fd_classifier | {one['value']:.4g} | {one['standard_error']:.4g} | 1,000 | 359 test | classifier |"
        in card.text
    )
    assert "CC BY 4.0" in card.text and "3 three, 4 four" in card.text and "(./samples.png)" in card.text
    assert json.loads((tmp_path / "out/metrics.json").read_text()) == figures
    metrics.unlink()
    picture.unlink()
    assert tessera.load(tmp_path / "out").sampling == params.sampling("vqgan-masked").model_dump(mode="json")


ASKED = {
    SLANTED: "attributes=[{'slant': 0.0, 'style': 'a'}] * 2, labels=[0, 0]",
    VECTORED: "embeddings=[[0.5] * 3] * 2, labels=[0, 0]",
    PICTURED: "pictures=pictures, labels=[0, 0]",
    WORDED: 'captions=["one", "two"], labels=[0, 0]',
    ADVERSARIAL: 'captions=["one", "two"], labels=[0, 0]',
    "gan": "labels=[0, 0]",
}


@pytest.mark.parametrize("name", ASKED)
def test_the_example_of_the_card_runs_and_tells_all_that_images_were_told(
    name: str, exported: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = (exported / name / layout.CARD).read_text().partition("```python\n")[2].partition("```")[0]
    assert f"system.sample({ASKED[name]}, seed=1)" in lines
    monkeypatch.chdir(tmp_path)
    Image.new("L", (20, 12), 99).save("picture.png")
    exec(lines.replace('"FOLDER"', repr(str(exported / name))), {})
    assert Image.open("one.png").size == (8, 8)


def test_the_example_of_the_card_tells_pictures_from_files_as_such_and_of_bands_as_tensors(params: Pipeline) -> None:
    prior = params.systems[PICTURED].prior
    files = prior.model_copy(update={"condition": parse(image.Config, PICTURE | {"shows": "file"})})
    assert '[Image.open("picture.png")] * 2, are_told=True)' in card._use(DIGITS, files, has_onnx=False)
    bands = DIGITS.model_copy(update={"channels": 4})
    assert "pictures=torch.zeros(2, 4, 8, 8, dtype=torch.uint8), labels" in card._use(bands, prior, has_onnx=False)


def _json(path: Path, **changed: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changed))


def _without(path: Path, key: str) -> None:
    value = json.loads(path.read_text())
    del value[key]
    path.write_text(json.dumps(value))


def _sealed(folder: Path) -> None:
    """As somebody would who changes a file and makes all the hashes fit."""
    for name in layout.PARTS:
        files = {
            path.name: artifact.sha256(path) for path in (folder / name).iterdir() if path.name != artifact.MANIFEST
        }
        artifact.write_json(folder / name / artifact.MANIFEST, files)
    manifests = {name: artifact.sha256(folder / name / artifact.MANIFEST) for name in layout.PARTS}
    _json(folder / "config.json", manifests=manifests)


def _link_out(folder: Path) -> None:
    outside = folder.parent / "outside.safetensors"
    (folder / "prior/weights.safetensors").rename(outside)
    (folder / "prior/weights.safetensors").symlink_to(outside)


def _half(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def _pickled(folder: Path) -> None:
    torch.save({}, folder / "prior/weights.safetensors")
    _sealed(folder)


def _other_network(folder: Path) -> None:
    config = folder / "prior/config.json"
    value = json.loads(config.read_text())
    value["config"]["depth"] += 1
    config.write_text(json.dumps(value))
    _sealed(folder)


def _other_kind(folder: Path) -> None:
    config = folder / "prior/config.json"
    value = json.loads(config.read_text())
    value["config"]["kind"] = "of_the_future"
    config.write_text(json.dumps(value))
    _sealed(folder)


def _not_finite(folder: Path) -> None:
    import safetensors.torch

    path = folder / "prior/weights.safetensors"
    weights = safetensors.torch.load_file(path)
    next(iter(weights.values())).view(-1)[0] = torch.nan
    safetensors.torch.save_file(weights, path)
    _sealed(folder)


BROKEN = {
    "no folder": (lambda folder: shutil.rmtree(folder), "is no folder: expected one that"),
    "a file": (lambda folder: (shutil.rmtree(folder), folder.write_text("x")), "is no folder"),
    "nothing in it": (lambda folder: (shutil.rmtree(folder), folder.mkdir()), "config.json cannot be read"),
    "config of another library": (lambda folder: _json(folder / "config.json", library_name="diffusers"), "of no exported"),
    "config is no JSON": (lambda folder: _half(folder / "config.json"), "config.json cannot be read"),
    "config is a list": (lambda folder: (folder / "config.json").write_text("[]"), "of no exported system"),
    "a future version": (lambda folder: _json(folder / "config.json", format=2, new={}), "newer version .format 2.*update"),
    "an unknown key": (lambda folder: _json(folder / "config.json", extra=1), "extra: unknown key"),
    "a missing key": (lambda folder: _without(folder / "config.json", "sampling"), "sampling: this key is missing"),
    "wrong sha": (lambda folder: _json(folder / "config.json", manifests={"tokenizer": "0" * 64, "prior": "0" * 64}), "sha256"),
    "no hash of a part": (lambda folder: _json(folder / "config.json", manifests={}), "which config.json lacks"),
    "missing weights": (lambda folder: (folder / "prior/weights.safetensors").unlink(), "no file"),
    "missing part": (lambda folder: shutil.rmtree(folder / "tokenizer"), "tokenizer/manifest.json is not"),
    "half the weights": (lambda folder: _half(folder / "prior/weights.safetensors"), "is damaged: sha256"),
    "a flipped config": (lambda folder: _json(folder / "prior/config.json", part="tokenizers"), "is damaged: sha256"),
    "pickled weights": (_pickled, "is a pickle or a zip"),
    "a pickle beside them": (lambda folder: torch.save({}, folder / "prior/more.pt"), "more.pt is not among the files"),
    "another architecture": (_other_network, "does not fit its config.json"),
    "a kind that is not here": (_other_kind, "there is no tessera/priors/of_the_future.py"),
    "not finite": (_not_finite, "is not finite in"),
    "a link out of it": (_link_out, "leads out of"),
    "sampling of another prior": (lambda folder: _json(folder / "config.json", sampling={"eta": 1.0}), "eta: unknown key"),
    "images of another size": (
        lambda folder: _json(
            folder / "config.json",
            preprocessing=json.loads((folder / "config.json").read_text())["preprocessing"] | {"width": 9},
        ),
        "tokenizer of images .1, 8, 8., expected .1, 8, 9.",
    ),
    "the tokenizer of another system": (
        lambda folder: (
            shutil.rmtree(folder / "tokenizer"),
            shutil.copytree(folder.parent / "simvq-autoregressive/tokenizer", folder / "tokenizer"),
            _sealed(folder),
        ),
        "trained on tokens of another tokenizer",
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", BROKEN)
def test_a_folder_that_is_not_as_it_was_written_is_one_sentence_and_nothing_is_loaded(
    what: str, exported: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "vqgan-masked"
    shutil.copytree(exported / "vqgan-masked", folder)
    shutil.copytree(exported / "simvq-autoregressive", tmp_path / "simvq-autoregressive")
    breaks, told = BROKEN[what]
    breaks(folder)
    with pytest.raises(tessera.ArtifactError, match=told) as caught:
        tessera.load(folder)
    sentence = str(caught.value)
    assert len(sentence.splitlines()) == 1 and "dvc" not in sentence, sentence


def test_a_folder_in_the_cache_of_huggingface_hub_is_opened(exported: Path, tmp_path: Path) -> None:
    """Its files are links to blobs beside the snapshots."""
    snapshot, blobs = tmp_path / "models--a--b/snapshots/0123", tmp_path / "models--a--b/blobs"
    shutil.copytree(exported / "gan", snapshot)
    blobs.mkdir()
    for path in [path for path in snapshot.rglob("*") if path.is_file()]:
        blob = blobs / artifact.sha256(path)
        path.rename(blob)
        path.symlink_to(blob)
    assert tessera.load(snapshot).sample([1]).shape == (1, 1, 8, 8)


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["vqgan", "out"], "there is no system 'vqgan' in params.yaml: expected one of gan"),
        (["gan", "there"], "there exists: expected the name of a new folder"),
        (["gan", "out"], "data/tokenizers/none does not exist"),
        (["gan", "data/out"], "data/out lies in data, which stages write: expected a folder outside of it"),
        (["gan", "artifact/out"], "which is an artifact: expected a folder outside of it"),
        (["gan", "params.yaml/out"], "params.yaml is a file: expected a folder to put out into"),
        (["gan", "x" * 250], "has 250 bytes: expected a name of at most 200"),
    ],
)
def test_a_command_that_cannot_work_leaves_nothing(
    arguments: list[str], told: str, tmp_path: Path, monkeypatch, capsys
) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copy(ROOT / "presets/zoo.yaml", "params.yaml")
    Path("there").mkdir()
    Path("artifact").mkdir()
    Path("artifact/manifest.json").touch()
    assert command.main(arguments) == 2
    said = capsys.readouterr().err
    assert said.startswith("nothing was exported: ") and told in said and not Path("out").exists()


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (
            ["--variations", "--caption", "七", "in.png", "out.png"],
            "--variations has no use for --caption: leave it out",
        ),
        (["--restyle", "--count", "5", "in.png", "out.png"], "--restyle has no use for --count"),
        (
            ["--variations", "--mask", "in.png", "in.png", "out.png"],
            "variations has no use for mask: leave it out; it is for",
        ),
        (["--restyle", "--share", "0.2", "in.png", "out.png"], "restyle has no use for share"),
        (["--sample", "--set", "strength=1", "out.png"], "--sample has no use for --set"),
        (["--sample", "--share", "0.2", "out.png"], "--sample has no use for --share"),
        (["--inpaint", "--mask", "gone.png", "in.png", "out.png"], "gone.png is no file: expected a picture"),
        (["--sample", "nowhere/out.png"], "nowhere is no folder: make it, or write elsewhere"),
    ],
)
def test_an_option_that_an_edit_has_no_use_for_is_refused(
    arguments: list[str], told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    from studio import edit

    monkeypatch.chdir(tmp_path)
    Image.new("L", (8, 8)).save("in.png")
    assert edit.main(["--system", "vqgan-masked", *arguments]) == 2
    said = capsys.readouterr().err
    assert said.startswith("nothing was edited: ") and told in said and len(said.splitlines()) == 1


OTHERS = "accelerate dvc gradio matplotlib mlflow pandas prefect psutil pyarrow scipy sklearn timm yaml"


def test_the_wheel_alone_opens_an_export_with_the_packages_that_it_names(exported: Path, tmp_path: Path) -> None:
    source = tmp_path / "source"  # the build leaves files beside what it reads
    shutil.copytree(ROOT / "tessera", source / "tessera", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    build = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--quiet",
        "--no-deps",
        "--no-build-isolation",
        "--wheel-dir",
        tmp_path,
    ]
    subprocess.run([*build, source], check=True, capture_output=True)
    (wheel,) = tmp_path.glob("tessera-*.whl")
    shutil.unpack_archive(wheel, tmp_path / "site", "zip")
    assert (tmp_path / "site/tessera/py.typed").is_file() and not (tmp_path / "site/stages").exists()
    script = f"""
import sys
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {OTHERS.split()!r}:
            raise ImportError(name)
sys.meta_path.insert(0, Refuse())
sys.path.insert(0, {str(tmp_path / "site")!r})
import tessera
assert tessera.__file__.startswith({str(tmp_path)!r})
for folder in sys.argv[1:]:
    system = tessera.load(folder, device="cpu")
    told = {{"captions": ["one", "two", "six"]}} if folder.endswith({ADVERSARIAL!r}) else {{}}
    system.decode(system.encode(system.sample(labels=[3, 3, 7], seed=1, **told)))
"""
    folders = [str(exported / name) for name in SYSTEMS]
    done = subprocess.run([sys.executable, "-c", script, *folders], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr

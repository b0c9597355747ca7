"""What a prior may be told in the place of a label: each condition with each prior that takes labels.

Conditions are found by their files; a new one adds its settings to SETTINGS, by any name, and what it is told to TOLD.
"""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from test_abilities import SPEC, seeded
from test_components import SMALL, _EndsAt, _trained, _training_data
from torch import Tensor, nn

from tessera.artifacts import checkpoints
from tessera.artifacts import folder as artifact
from tessera.bases.captions import encoded
from tessera.bases.conditional import ConditionalConfig, steering_from
from tessera.components import InvalidParams, kinds, load, parse
from tessera.conditions import attributes, caption, embedding, image, text_model
from tessera.contracts import ImageSpec, TokenSpec
from tessera.running.job import Job, Stopped

ROOT = Path(__file__).parents[2]
CAPTIONS = (("a zero", "the digit 0", "零"), ("one", "一"), ("a two",))
ATTRIBUTES = [{"slant": 0.3, "style": "b"}, {"style": "a", "thick": 1.5}, {"slant": -1.0}]
VECTORS = [[0.5, -1.0, 0.0, 2.0, 0.25], None, [3.0, 0.0, -1.0, 0.0, 1.0]]
SETTINGS: dict[str, dict[str, Any]] = {
    "of-classes": {"kind": "caption", "width": 16, "max_bytes": 16, "of_classes": [list(each) for each in CAPTIONS]},
    "of-images": {"kind": "caption", "width": 16, "max_bytes": 16},
    "attended": {"kind": "caption", "width": 16, "max_bytes": 16, "cross_attention": True},
    "text-model": {"kind": "text_model", "folder": "nowhere", "sha256": "0" * 64, "feature_dim": 5, "max_tokens": 4},
    "image": {"kind": "image", "shows": "edges", "pixels": [4, 6], "patch_size": 2, "width": 16},
    "attributes": {
        "kind": "attributes",
        "numbers": {"thick": [1.0, 5.0], "slant": [-1.0, 1.0]},
        "categories": {"style": ["a", "b"]},
    },
    "embedding": {"kind": "embedding", "embedding_dim": 5, "width": 16},
}
TOLD = {
    "of-classes": encoded(["a zero", "二", "a two"], 16),
    "of-images": encoded(["a zero", "二", ""], 16, torch.tensor([0, 1, 2])),
    "attended": encoded(["a zero", "二", ""], 16, torch.tensor([0, 1, 2])),
    "text-model": text_model.beside(
        torch.randn(3, 4, 5, generator=seeded()) * (torch.arange(4) < torch.tensor([4, 2, 0])[:, None]).unsqueeze(2),
        torch.tensor([0, 1, 2]),
    ),
    "image": image.encoded(
        image.Config(shows="edges", pixels=(4, 6), patch_size=2),
        torch.randint(0, 256, (3, 3, 8, 12), generator=seeded(), dtype=torch.uint8),
        torch.tensor([0, 1, 2]),
    ),
    "attributes": attributes.encoded(
        parse(attributes.Config, SETTINGS["attributes"]), ATTRIBUTES, torch.tensor([0, 1, 2])
    ),
    "embedding": embedding.encoded(parse(embedding.Config, SETTINGS["embedding"]), VECTORS, torch.tensor([0, 1, 2])),
}
PRIORS = [kind for kind in kinds("priors") if "condition" in load("priors", kind).Config.model_fields]
GUIDED = [kind for kind in PRIORS if issubclass(load("priors", kind).Config, ConditionalConfig)]  # by label dropout
ATTENTIVE = [name for name, settings in SETTINGS.items() if settings.get("cross_attention")]  # which others cannot be
EACH = [(name, prior) for name in SETTINGS for prior in PRIORS if prior in GUIDED or name not in ATTENTIVE]
of_each = pytest.mark.parametrize(("condition", "prior"), EACH)
of_each_guided = pytest.mark.parametrize(("condition", "prior"), [each for each in EACH if each[1] in GUIDED])


def test_every_condition_is_tried() -> None:
    assert SETTINGS.keys() == TOLD.keys()
    assert {settings["kind"] for settings in SETTINGS.values()} == set(kinds("conditions"))


def settings_of(condition: str, prior: str) -> dict[str, Any]:
    """Those of a text model have attention unless they say otherwise."""
    plain = {"cross_attention": False} if condition == "text-model" and prior not in GUIDED else {}
    return SETTINGS[condition] | plain


def built(condition: str, prior: str, spec: TokenSpec = SPEC, **changes: Any) -> nn.Module:
    """A prior of weights so large that what it is told shows."""
    settings = {"kind": prior, **SMALL["priors"][prior], "condition": settings_of(condition, prior)}
    module = load("priors", prior)
    torch.manual_seed(0)
    model = module.Model(parse(module.Config, settings | changes), spec).eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    return model.requires_grad_(False)


def network_of(model: nn.Module) -> nn.Module:
    """What embeds the condition."""
    (found,) = [each for each in model.modules() if type(each).__module__.startswith("tessera.conditions.")]
    return found


def answer(model: nn.Module, told: Tensor) -> Tensor:
    """What the network says of the same tokens, whatever it is told."""
    if load("priors", model.config.kind).LEARNS == "indices":
        indices = torch.randint(SPEC.codebook_size, (1, 8), generator=seeded()).expand(len(told), -1)
        return model(indices, told)
    if not isinstance(model.config, ConditionalConfig):
        return model(torch.randn(1, model.config.noise_dim, generator=seeded()).expand(len(told), -1), told)
    x = torch.randn(1, *SPEC.latent_shape, generator=seeded()).expand(len(told), -1, -1, -1)
    times = torch.full((len(told),), 0.5)
    return model(x, times, told, times / 2) if model.config.kind == "flow_map" else model(x, times, told)


@of_each_guided
def test_the_null_condition_is_the_null_label_and_says_nothing(condition: str, prior: str) -> None:
    model, told = built(condition, prior), TOLD[condition]
    null = answer(model, model.null_labels(told))
    assert torch.equal(null, answer(model, torch.full((len(told),), SPEC.num_classes)))
    null_drawn, drawn = (
        model.sample(one, load("priors", prior).Sampling(), seeded(3)) for one in (model.null_labels(told), told)
    )
    assert not torch.equal(null_drawn, drawn)


@of_each
def test_a_condition_that_nothing_would_be_told_of_is_refused(condition: str, prior: str) -> None:
    with pytest.raises(ValueError, match="is_conditional is false, and there is a condition: leave out one of them"):
        built(condition, prior, is_conditional=False)


@of_each
def test_an_image_depends_on_what_it_is_told_and_not_on_what_others_are(condition: str, prior: str) -> None:
    model, told = built(condition, prior), TOLD[condition]
    said = answer(model, told)
    assert not any(torch.equal(said[one], said[other]) for one, other in ((0, 1), (0, 2), (1, 2)))
    order = torch.tensor([2, 0, 1])
    # products of a batch are not exact: on some processors the last of three rows is added up in another order
    torch.testing.assert_close(answer(model, told[order]), said[order])
    network = network_of(model)
    torch.testing.assert_close(network(told[order]), network(told)[order])
    torch.testing.assert_close(torch.cat([network(told[row : row + 1]) for row in range(3)]), network(told))


@of_each_guided
def test_a_guidance_of_one_is_the_condition_and_of_zero_none(condition: str, prior: str) -> None:
    """By the sampler's own two passes: the scale is so near to 1 that nothing but its being there differs."""
    model, told, sampling = built(condition, prior), TOLD[condition], load("priors", prior).Sampling
    drawn = {
        scale: model.sample(told, parse(sampling, {"guidance_scale": scale}), seeded(3))
        for scale in (0.0, 1.0, 1.0 + 1e-12)
    }
    null = model.sample(model.null_labels(told), sampling(), seeded(3))
    torch.testing.assert_close(drawn[1.0 + 1e-12], drawn[1.0], atol=1e-3, rtol=1e-3)
    torch.testing.assert_close(drawn[0.0], null, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("prior", PRIORS)
def test_captions_of_images_stand_beside_the_label(prior: str) -> None:
    model = built("of-images", prior)
    labels = torch.tensor([0, 1, 2])
    assert torch.equal(answer(model, labels), answer(model, encoded(["", "", ""], 16, labels)))
    worded = answer(model, encoded(["七", "七", "七"], 16, labels))
    assert not any(torch.equal(worded[one], worded[other]) for one, other in ((0, 1), (1, 2)))
    assert not torch.equal(worded, answer(model, labels))


def test_what_is_told_is_left_out_together_and_each_part_alone() -> None:
    told = TOLD["of-images"][:1].expand(20_000, -1)
    module = load("priors", "flow_matching")
    settings = {"kind": "flow_matching", **SMALL["priors"]["flow_matching"], "label_dropout": 0.2}
    config = parse(module.Config, settings | {"condition": SETTINGS["of-images"]})
    objective = module.Objective(module.Model(config, SPEC), config).train()
    torch.manual_seed(0)
    found = objective.dropped(told)
    has_label, has_words = found[:, 0] == told[:, 0], (found[:, 1:] == told[:, 1:]).all(dim=1)
    assert ((found[:, 0] == 0) | has_label).all() and ((found[:, 1:] == 0).all(dim=1) | has_words).all()
    shares = [
        float(one.float().mean()) for one in (~has_label & ~has_words, ~has_label & has_words, has_label & ~has_words)
    ]
    assert shares == pytest.approx([0.2, 0.16, 0.16], abs=0.01)
    assert torch.equal(objective.eval().dropped(told), told)


@pytest.mark.parametrize("prior", GUIDED)
def test_guidance_leads_away_from_a_negative_caption(prior: str) -> None:
    """Away from the condition itself there is nothing to be led by: what is drawn is the unguided sample."""
    model, module = built("of-images", prior), load("priors", prior)
    told = TOLD["of-images"][:1].expand(8, -1)
    strong, off = (parse(module.Sampling, {"guidance_scale": scale}) for scale in (3.0, 1.0))
    with steering_from(model, told[:1]):
        away = model.sample(told, strong, seeded(3))
    torch.testing.assert_close(away, model.sample(told, off, seeded(3)), atol=1e-3, rtol=1e-3)
    assert not torch.equal(away, model.sample(told, strong, seeded(3)))


@pytest.mark.parametrize("prior", PRIORS)
def test_a_label_is_read_as_a_caption_of_its_class(prior: str) -> None:
    model = built("of-classes", prior)
    network = network_of(model)
    labels = torch.tensor([0, 1, 2])
    firsts = encoded([captions[0] for captions in CAPTIONS], 16)
    assert torch.equal(answer(model, labels), answer(model, firsts))
    assert torch.equal(network.of_labels(labels), firsts)
    network.train()
    seen = {bytes(row[1:].tolist()).rstrip(b"\0").decode() for _ in range(40) for row in network.of_labels(labels)}
    assert seen == {each for captions in CAPTIONS for each in captions}
    assert not network.of_labels(torch.tensor([3])).any()


@of_each
def test_a_prior_that_was_saved_is_told_the_same(condition: str, prior: str, tmp_path: Path) -> None:
    model, told = built(condition, prior), TOLD[condition]
    with artifact.create(tmp_path / "prior") as place:
        checkpoints.save(place, "priors", model.config, SPEC, model, "code")
    loaded, config, _ = checkpoints.load_model(tmp_path / "prior", "priors")
    assert torch.equal(answer(loaded, told), answer(model, told))
    if condition == "attributes":  # a file keeps no order of keys
        again = attributes.encoded(config.condition, ATTRIBUTES, torch.tensor([0, 1, 2]))
        assert torch.equal(answer(loaded, again), answer(model, told))


@of_each
def test_a_training_resumes_bit_identically(
    condition: str, prior: str, image_spec: ImageSpec, token_spec: TokenSpec, tmp_path: Any, monkeypatch: Any
) -> None:
    monkeypatch.setitem(SMALL["priors"], prior, {**SMALL["priors"][prior], "condition": settings_of(condition, prior)})
    plain = _trained("priors", prior, image_spec, token_spec, Job("parts", tmp_path / "plain"))
    first = Job("parts", tmp_path / "stopped")
    _, rows = _training_data("priors", prior, image_spec, token_spec)
    with pytest.raises(Stopped):
        _trained("priors", prior, image_spec, token_spec, first, data=_EndsAt(3, rows, first, Stopped))
    resumed = _trained("priors", prior, image_spec, token_spec, Job("parts", tmp_path / "stopped"))
    assert resumed.keys() == plain.keys() and all(torch.equal(value, resumed[name]) for name, value in plain.items())


def test_what_a_caption_says_is_its_bytes_and_then_nothing() -> None:
    rows = encoded(["七", "a b", ""], 8, torch.tensor([0, 4, 2]))
    with pytest.raises(ValueError, match="is no Unicode text"):
        encoded(["\ud800"], 8)
    assert rows.tolist() == [[1, *"七".encode(), *5 * [0]], [5, 97, 32, 98, *5 * [0]], [3, *8 * [0]]]


BAD = [
    ({"of_classes": [["a"], [""]]}, "of_classes"),
    ({"of_classes": [["a"], [" "]]}, "is empty or has the character NUL: expected words"),
    ({"of_classes": [["a\0b"]]}, "is empty or has the character NUL: expected words"),
    ({"of_classes": [["x" * 40]]}, "has 40 bytes in UTF-8, expected at most max_bytes 32: say it in fewer words"),
    ({"of_classes": [["七" * 11]]}, "has 33 bytes in UTF-8"),
    ({"of_classes": []}, "of_classes"),
    ({"of_classes": [[]]}, "of_classes"),
    ({"of_classes": [["a"]], "max_bytes": 10**6}, "max_bytes"),
    ({"of_classes": [["a"]], "width": 12, "heads": 5}, "must be a multiple of 4"),
]


@pytest.mark.parametrize(("settings", "sentence"), BAD)
def test_what_is_no_caption_is_refused_with_the_params(settings: dict[str, Any], sentence: str) -> None:
    with pytest.raises(InvalidParams) as refused:
        parse(caption.Config, {"kind": "caption", **settings}, "condition")
    assert sentence in str(refused.value) and len(str(refused.value)) < 300, refused.value


def test_another_number_of_classes_is_refused() -> None:
    two = {"of_classes": [["a"], ["b"]]}
    config = parse(caption.Config, {"kind": "caption", **two})
    with pytest.raises(ValueError, match=r"captions of 2 classes, expected 3, a list for each label"):
        caption.Network(config, SPEC, nn.Embedding(4, 8))


@pytest.mark.parametrize("condition", ATTENTIVE)
def test_attention_that_no_layer_would_pay_is_refused(condition: str) -> None:
    with pytest.raises(
        ValueError, match="no layer of this prior attends to a sequence, it is told the mean: write cross_att"
    ):
        built(condition, "gan")


IN_A_COPY = """
import sys, yaml
from pathlib import Path
import numpy as np
import torch
from stages import encode_tokens, prepare_images, sample_images, train_prior, train_tokenizer
from tessera import seeding
from tessera.artifacts.captions import examples_of
from tessera.components import parse
from tessera.editing import words
from tessera.export import given
from tessera.params import Pipeline
from tessera.running.job import Job
from tessera.system import System

torch.set_num_threads(1)
raw = yaml.safe_load(Path(sys.argv[1], "params.yaml").read_text())
prior = {"kind": "flow_matching", "denoiser": {"kind": "transformer", "width": 32, "depth": 1, "heads": 2}, "num_views": 1}
prior |= {"condition": {"kind": "brightness"}, "training": {"num_steps": 4, "batch_size": 8}}
raw |= {"tokenizers": {"none": {"kind": "none", "quantizer": {"kind": "identity"}}}}
raw["systems"] = {"bright": {"tokenizer": "none", "prior": prior, "sampling": {}}}
raw |= {"follow_training": {"every": 0}, "sample_images": {"num_images": 12, "batch_size": 8}}
raw["features"] = {"random": {"kind": "random"}}
params, made = parse(Pipeline, raw), [Path(name) for name in ("images", "none", "tokens", "prior")]
job = lambda: Job("x", Path("state"))
prepare_images.run(params, made[0], job())
train_tokenizer.run(params, "none", made[0], made[1], Path("t.csv"), job())
encode_tokens.run(params, "none", *made[:3], job())
train_prior.run(params, "bright", *made[:3], made[3], Path("h.csv"), Path("m.json"), job())
sample_images.run(params, "bright", made[1], made[3], Path("samples"), Path("grid.png"), job())
told = examples_of(Path("samples"))
assert len(told) == 12 and all(0 <= one.vector[0] <= 1 for one in told)
system, generator = System.read(made[1], made[3], "bright"), seeding.generator(0, "x", 0)
said = given.said({"captions": None, "brightness": [0.25, 0.5]}, None)
drawn = words.draw(system, said, parse(system.sampling_schema, {}), generator, np.array([1, 2]))
assert drawn.shape == (2, 1, 8, 8)
for wrong, labels in ((["a word"], None), ([2.0], None)):
    try:
        words.told(system, wrong, labels)
    except ValueError as error:
        print(error)
"""


def test_a_condition_is_one_file(tmp_path: Path) -> None:
    """The worked example of docs/adding_parts.md, in a copy of the package: nothing else of it is touched."""
    text = (ROOT / "docs" / "adding_parts.md").read_text(encoding="utf-8")
    example = re.search(r"`tessera/conditions/brightness\.py`:\n\n```python\n(.*?)```", text, re.DOTALL).group(1)
    for folder in ("tessera", "stages"):
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / "tessera/conditions/brightness.py").write_text(example, encoding="utf-8")
    ran = subprocess.run(
        [sys.executable, "-c", IN_A_COPY, str(ROOT)],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert ran.stdout.splitlines()[-2:] == [
        "bright was trained on brightness, not on captions: expected brightness, or a system whose prior has condition: "
        "{kind: caption}",
        "brightness is 2.0: expected a number from 0, black, to 1, white",
    ]

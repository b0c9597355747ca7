"""What every image was told may not be left out of what a GAN is asked for; what some images lacked, may."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from tessera.components import load, parse
from tessera.contracts import TokenBatch, TokenSpec
from tessera.editing import words
from tessera.editing.left_out import require_told
from tessera.system import CannotDraw, System

TRAINING = {"num_steps": 3, "learning_rate": 0.01}
STYLES = {"numbers": {"slant": [-1.0, 1.0]}, "categories": {"style": ["a", "b"]}}
GRAY = torch.full((1, 4, 4), 128, dtype=torch.uint8)
VECTOR = [0.5, -1.0]
BOTH = {"slant": 0.5, "style": "b"}
CONDITIONS: dict[str, dict[str, Any]] = {
    "captions": {"kind": "caption", "max_bytes": 8},
    "attributes": {"kind": "attributes", **STYLES},
    "embeddings": {"kind": "embedding", "embedding_dim": 2},
    "pictures": {"kind": "image", "pixels": [4, 4], "patch_size": 2, "width": 8, "depth": 1},
}


def trained(spec: TokenSpec, name: str, said: list[Any], kind: str = "gan", **settings: Any) -> System:
    """A system after three steps on images of which this was said, beside labels."""
    network = {} if kind == "gan" else {"denoiser": {"kind": "transformer", "width": 16, "depth": 1, "heads": 2}}
    values = {"kind": kind, "condition": CONDITIONS[name], "training": TRAINING, **network, **settings}
    module = load("priors", kind)
    config = parse(module.Config, values)
    torch.manual_seed(0)
    model = module.Model(config, spec)
    objective = module.Objective(model, config)
    labels = torch.arange(len(said)) % spec.num_classes
    rows = load("conditions", config.condition.kind).encoded(config.condition, said, labels)
    batch = TokenBatch(torch.randn(len(said), *spec.latent_shape), rows)
    optimizers = objective.optimizers()
    for step in range(3):
        for phase in objective.phases:
            for one in optimizers[phase]:
                one.zero_grad()
            objective(batch, phase, step)["loss"].backward()
            for one in optimizers[phase]:
                one.step()
    return System(nn.Identity(), model.eval(), spec, "latents")


@pytest.mark.parametrize(
    ("name", "given", "missing", "sentence"),
    [
        ("captions", "one", "", "was told the captions of every image in training: expected captions beside labels"),
        (
            "attributes",
            BOTH,
            {},
            "was told slant and style of every image in training: expected that of each image, too",
        ),
        ("embeddings", VECTOR, None, "was told the embeddings of every image in training: expected embeddings beside"),
        ("pictures", GRAY, None, "was told the pictures of every image in training: expected pictures beside labels"),
    ],
)
def test_what_every_image_was_told_is_wanted_and_what_some_lacked_is_not(
    name: str, given: Any, missing: Any, sentence: str, token_spec: TokenSpec
) -> None:
    labels = np.array([1, 2])
    system = trained(token_spec, name, [given] * 3)
    with pytest.raises(CannotDraw, match=sentence):
        require_told(system)
    words.told(system, [given, given], labels)
    if name in ("attributes", "embeddings"):  # of the others a list has nothing that says nothing
        with pytest.raises(CannotDraw, match=sentence):
            words.told(system, [given, missing], labels)
    if name != "pictures":
        lacking = trained(token_spec, name, [given, missing, given])
        require_told(lacking)
        require_told(
            lacking, load("conditions", CONDITIONS[name]["kind"]).encoded(lacking.prior.config.condition, [missing])
        )


def test_each_attribute_is_wanted_or_not_by_itself(token_spec: TokenSpec) -> None:
    system = trained(token_spec, "attributes", [BOTH, {"style": "a"}, BOTH])
    words.told(system, [{"style": "b"}], np.array([1]))
    with pytest.raises(CannotDraw, match=r"was told style of every image in training: expected that of each image"):
        words.told(system, [{"slant": 0.5}], np.array([1]))


def test_a_prior_with_label_dropout_may_be_told_anything(token_spec: TokenSpec) -> None:
    for rate in (0.0, 0.1):
        system = trained(token_spec, "embeddings", [VECTOR] * 3, "flow_matching", label_dropout=rate)
        if rate:
            require_told(system)
            words.told(system, [None])
            continue
        with pytest.raises(CannotDraw, match="expected embeddings beside labels"):
            words.told(system, [None], np.array([1]))
        words.told(system, [None], is_alone=True)

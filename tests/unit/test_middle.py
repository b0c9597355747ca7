"""What a prior's middle features are asked for: the terms by hand, what they reach, the training with them, what is refused."""

import itertools
import math
from typing import Any

import numpy as np
import pytest
import torch
from test_warm_start import TRAINING, Trainer, params, stopping
from test_warm_start import weights_of as tensors

from tessera.artifacts import images as image_artifact
from tessera.artifacts import tokens as token_artifact
from tessera.bases.middle import Alignment, Head, dispersion
from tessera.check import images as known_images
from tessera.check import problems
from tessera.components import load, parse
from tessera.contracts import TokenBatch
from tessera.features import timm
from tessera.params import Pipeline
from tessera.running.job import Stopped
from tessera.training import aligned

FLOW = {"kind": "flow_matching", "denoiser": {"kind": "transformer", "width": 16, "depth": 2, "heads": 2}}
UNET = {"kind": "diffusion", "denoiser": {"kind": "unet", "channels": 8, "channel_multipliers": [1], "num_blocks": 1}}
MASKED = {"kind": "masked", "width": 16, "depth": 2, "heads": 2}
TO_LATENTS, TO_FEATURES = {"alignment": {"to": "latents"}}, {"alignment": {"to": "features"}, "num_views": 1}


def planned(run: Pipeline, trainer: Trainer):
    return known_images.of_artifact(run, trainer.images)


def given(kind: dict[str, Any], **keys: Any) -> Pipeline:
    prior = parse(load("priors", kind["kind"]).Config, kind | {"training": TRAINING} | keys)
    found = params()
    drawn = found.sample_images.model_copy(update={"num_images": 24})
    return found.model_copy(
        update={
            "sample_images": drawn,
            "systems": {"small": found.systems["small"].model_copy(update={"prior": prior})},
        }
    )


@pytest.fixture(scope="module")
def trainer(tmp_path_factory: pytest.TempPathFactory, images_folder) -> Trainer:
    """A tokenizer and its tokens; each test trains a prior of its own."""
    trainer = Trainer(tmp_path_factory.mktemp("source"), images_folder)
    trainer.train_tokenizer(params())
    trainer.encode(params())
    return trainer


def test_dispersion_is_the_mean_over_pairs_by_hand():
    torch.manual_seed(0)
    features = torch.randn(5, 3, 4)
    rows = features.flatten(1).numpy().astype(np.float64)
    pairs = [np.square(a - b).sum() / 12 for a, b in itertools.product(rows, rows)]
    expected = math.log(np.mean([math.exp(-pair / 0.7) for pair in pairs]))
    assert float(dispersion(features, 0.7)) == pytest.approx(expected, rel=1e-5)
    assert float(dispersion(features[:1], 0.7)) == 0
    assert float(dispersion(1e4 * features, 0.7)) == pytest.approx(-math.log(5))  # nothing is gained by growing further
    apart = features.clone().requires_grad_()
    dispersion(apart, 0.7).backward()
    assert dispersion(features - 0.1 * apart.grad, 0.7) < dispersion(features, 0.7)


@pytest.mark.parametrize("kind", [FLOW, UNET], ids=["transformer", "unet"])
def test_alignment_is_one_less_the_mean_cosine_with_the_target_at_each_place(token_spec, kind):
    model = load("priors", kind["kind"]).Model(given(kind).systems["small"].prior, token_spec)
    torch.manual_seed(0)
    head, (height, width) = Head(model, 3), token_spec.latent_shape[1:]
    channels = 16 if kind is FLOW else 8
    places = torch.randn(2, height * width, channels)
    features = places if kind is FLOW else places.transpose(1, 2).unflatten(2, (height, width))
    target = torch.randn(2, 3, 2 * height, 2 * width)  # finer: the mean over each place
    found = float(head(features, target).detach())
    wanted = target.numpy().reshape(2, 3, height, 2, width, 2).mean(axis=(3, 5)).reshape(2, 3, -1)
    cosines = []
    for image, place in itertools.product(range(2), range(height * width)):
        said = head.layers(places[image, place]).detach().numpy()
        seen = wanted[image, :, place]
        cosines.append(said @ seen / np.linalg.norm(said) / np.linalg.norm(seen))
    assert found == pytest.approx(1 - np.mean(cosines), rel=1e-5)


@pytest.mark.parametrize("keys", [TO_LATENTS, {"dispersive": {}}], ids=["alignment", "dispersive"])
@pytest.mark.parametrize("layer", [1, 2])
def test_the_terms_train_the_layers_up_to_theirs_and_no_others(token_spec, monkeypatch, keys, layer):
    config = given(FLOW, **{key: value | {"layer": layer} for key, value in keys.items()}).systems["small"].prior
    part = load("priors", "flow_matching")
    torch.manual_seed(0)
    objective = part.Objective(part.Model(config, token_spec), config).train()
    objective.head = Head(objective.model, token_spec.latent_shape[0])
    own = part.Objective.loss
    monkeypatch.setattr(part.Objective, "loss", lambda *given: {key: 0 * value for key, value in own(*given).items()})
    batch = TokenBatch(torch.randn(6, *token_spec.latent_shape), torch.zeros(6, dtype=torch.long))
    terms = objective(batch, "prior", 0)
    terms["loss"].backward()
    blocks = objective.model.denoiser.transformer.blocks
    moved = [any(p.grad is not None and p.grad.any() for p in block.parameters()) for block in blocks]
    assert moved == [True, layer == 2] and objective.model.denoiser.enter.weight.grad.any()
    assert set(terms) == {"loss", "prior_loss", "alignment_loss" if "alignment" in keys else "dispersive_loss"}
    objective.eval()
    assert set(objective(batch, "prior", 0)) == {"loss"}  # held-out losses compare with those of others


@pytest.mark.parametrize(
    ("kind", "keys"),
    [
        (FLOW, TO_LATENTS | {"dispersive": {"layer": 1}}),
        (FLOW, TO_FEATURES),
        (MASKED, TO_FEATURES),
        (UNET, {"dispersive": {}}),
    ],
    ids=["latents and dispersive", "features", "features of indices", "dispersive of a unet"],
)
def test_a_training_that_is_stopped_gives_the_same_bits_and_an_artifact_like_any(trainer, tmp_path, kind, keys):
    run = given(kind, **keys)
    trainer.train_prior(run)
    whole, history = tensors(trainer.prior), (trainer.root / "prior.csv").read_text()
    assert [key for key in ("alignment_loss", "dispersive_loss") if key in history.partition("\n")[0]] == [
        f"{key}_loss" for key in ("alignment", "dispersive") if key in keys
    ]
    with pytest.raises(Stopped):
        trainer.train_prior(run, stopping(trainer, "train_prior@small", after=3))
    trainer.train_prior(run)
    assert "resumed step 3" in trainer.said
    resumed = tensors(trainer.prior)
    assert all(torch.equal(resumed[name], value) for name, value in whole.items())
    trainer.train_prior(given(kind))
    assert tensors(trainer.prior).keys() == whole.keys()  # no head


def test_the_target_is_what_the_network_sees_in_each_image(trainer):
    spec, splits = image_artifact.read(trainer.images)
    _, tokens = token_artifact.read(trainer.tokens, "latents", 1)
    some = tokens["train"].subset(np.array([5, 2, 40]))
    job = trainer.job("x")
    features = aligned.computed(Alignment(to="features"), some, trainer.images, job)
    batch = aligned.AlignedTokens(some, features).stored(torch.tensor([2, 0]))
    pixels = torch.from_numpy(splits["train"].pixels.all()[[40, 5]]) / 127.5 - 1
    network, grid = aligned.Network(Alignment(to="features"), spec), tokens["train"].spec.latent_shape[1:]
    torch.testing.assert_close(batch.features.float(), network(pixels, grid), atol=2e-3, rtol=2e-3)  # float16
    judge = timm.Model(timm.Config(), spec)  # whose features are the mean of the same grid
    timm.prepare(judge, timm.Config())
    torch.testing.assert_close(network(pixels, (1, 1)).flatten(1), judge.features(pixels), atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize(
    ("kind", "keys", "sentence"),
    [
        (MASKED, TO_LATENTS, "alignment.to latents: masked learns indices"),
        (FLOW, {"alignment": {"to": "features"}}, "write prior.num_views: 1"),
        (
            FLOW,
            {"dispersive": {"layer": 3}},
            "dispersive.layer 3 is beyond the 2 layers of this prior: choose one of 1 to 2",
        ),
        (UNET, {"alignment": {"to": "latents", "layer": 1}}, "unet has its middle alone, which needs no number"),
        (FLOW | {"kind": "flow_map"}, {"dispersive": {}}, "which flow_map asks more than once"),
        (FLOW, {"dispersive": {}, "training": TRAINING | {"compile": True}}, "write compile: false"),
        (FLOW, {"alignment": {"to": "features", "network_layer": 9}, "num_views": 1}, "alignment.network_layer 9"),
        (
            FLOW,
            {"alignment": {"to": "features", "network": "resnet18"}, "num_views": 1},
            "resnet18 has no installed weights",
        ),
    ],
)
def test_what_cannot_be_is_refused_in_a_sentence_before_anything_runs(trainer, kind, keys, sentence):
    found = problems.problems(given(kind, **keys), planned(given(kind, **keys), trainer))
    assert len(found) == 1 and sentence in found[0] and found[0].startswith("systems.small.prior"), found


def test_latents_ask_no_network_and_keys_are_known():
    with pytest.raises(ValueError, match="asks no other network, and network is set"):
        Alignment(to="latents", network="resnet18")
    with pytest.raises(ValueError, match="unknown key wieght, expected to or weight or layer"):
        Alignment(to="latents", wieght=1)
    assert Alignment.model_validate(Alignment(to="latents").model_dump()).to == "latents"  # as artifacts keep it


def test_a_network_that_trained_a_prior_is_not_its_only_judge(trainer):
    run = given(FLOW, **TO_FEATURES)
    alone = run.model_copy(update={"features": {"timm": parse(timm.Config, {"kind": "timm"})}})
    (found,) = problems.problems(alone, planned(alone, trainer))
    assert "is also its only judge (features timm)" in found
    assert not problems.problems(run, planned(run, trainer))

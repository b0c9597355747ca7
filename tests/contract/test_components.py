"""What every part promises, asked of every file in its folder: a new part gets these tests by being there."""

import atexit
import functools
import importlib
import os
import random
import shutil
import signal
import tempfile
from functools import partialmethod
from pathlib import Path
from typing import Any

import pytest
import tiny_text_models
import torch
from torch import nn

from tessera.artifacts import checkpoints
from tessera.artifacts import folder as artifact
from tessera.bases.captions import encoded
from tessera.bases.optimization import Training, optimizers_for
from tessera.components import Params, kinds, load, parse
from tessera.contracts import Encoded, ImageBatch, TokenBatch
from tessera.nn.precision import in_precision
from tessera.running.job import Job, Stopped
from tessera.sources import text_models
from tessera.training.loop import fit


def image_and_text() -> dict[str, Any]:
    """Settings of a small CLIP with random weights, in a folder as transformers writes it."""
    folder = Path(tempfile.mkdtemp(prefix="clip-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    tiny_text_models.save("clip", folder)
    return {"folder": str(folder), "sha256": text_models.fingerprint(folder)}


TRAINING = {"num_steps": 2, "batch_size": 4, "learning_rate": 0.01}


@functools.cache
def published() -> dict[str, Any]:
    """Settings of a small VQModel with random weights, in a folder as diffusers writes it."""
    import diffusers  # takes seconds

    folder = Path(tempfile.mkdtemp(prefix="published-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    network = {
        "in_channels": 1,
        "out_channels": 1,
        "block_out_channels": [8, 8],
        "down_block_types": ["DownEncoderBlock2D"] * 2,
        "up_block_types": ["UpDecoderBlock2D"] * 2,
        "norm_num_groups": 4,
        "num_vq_embeddings": 16,
        "vq_embed_dim": 4,
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        diffusers.VQModel(**network).save_pretrained(folder)
    return {
        "folder": str(folder),
        "sha256": artifact.sha256(folder / "diffusion_pytorch_model.safetensors"),
        "network": {"class_name": "VQModel", **network},
        "quantizer": {"kind": "vector", "codebook_size": 16, "code_dim": 4, "update": "gradient", "init": "uniform"},
        "discriminator_channels": 8,
        "adversarial_weight": 0.1,
        "training": TRAINING,
    }


# The smallest sensible settings of each part, or a function that gives them; a new part adds a line here only if its defaults
# cannot be built from {}.
SMALL = {
    "tokenizers": {
        "diffusers": published,
        "none": {"quantizer": {"kind": "identity"}},
        "vqvae": {
            "quantizer": {"kind": "vector", "codebook_size": 16, "code_dim": 4, "init_step": 1},
            "channels": 8,
            "num_blocks": 1,
            "training": TRAINING,
        },
        "vqgan": {
            "quantizer": {"kind": "vector", "codebook_size": 16, "code_dim": 4, "init_step": 1},
            "channels": 8,
            "num_blocks": 1,
            "discriminator_channels": 8,
            "training": TRAINING,
        },
        "vae": {
            "quantizer": {"kind": "identity", "code_dim": 4},
            "channels": 8,
            "num_blocks": 1,
            "adversarial_weight": 0.1,
            "discriminator_channels": 8,
            "training": TRAINING,
        },
    },
    "quantizers": {
        "residual": {"quantizer": {"kind": "vector", "codebook_size": 16, "code_dim": 4, "init_step": 1}},
    },
    "priors": {
        "autoregressive": {"width": 16, "depth": 2, "heads": 2, "training": TRAINING},
        "bitwise": {"width": 16, "depth": 2, "heads": 2, "training": TRAINING},
        "flow_matching": {
            "denoiser": {"kind": "transformer", "width": 16, "depth": 2, "heads": 2},
            "training": TRAINING,
        },
        "flow_map": {
            "denoiser": {"kind": "transformer", "width": 16, "depth": 2, "heads": 2},
            "flow_share": 0.0,
            "training": TRAINING,
        },
        "masked": {"width": 16, "depth": 2, "heads": 2, "training": TRAINING},
        "gan": {"channels": 8, "noise_dim": 8, "training": TRAINING},
        "diffusion": {
            "denoiser": {"kind": "unet", "channels": 8, "channel_multipliers": [1, 2], "num_blocks": 1},
            "training": TRAINING,
        },
    },
    "features": {
        "classifier": {"channels": 8, "training": TRAINING},
        "clip": image_and_text,
        "contrastive": {"channels": 8, "training": TRAINING},
        "dinov2": {"variant": "small", "weights": "none.safetensors", "sha256": "0" * 64},
        "inception": {"weights": "none.safetensors", "sha256": "0" * 64},
    },
    "denoisers": {
        "transformer": {"width": 16, "depth": 2, "heads": 2},
        "unet": {"channels": 8, "channel_multipliers": [1, 2], "num_blocks": 1},
    },
}
FOLDERS = ("tokenizers", "quantizers", "priors", "denoisers")
EVERY = [(folder, kind) for folder in FOLDERS for kind in kinds(folder)]


def settings_of(folder: str, kind: str) -> dict[str, Any]:
    trained = {"training": TRAINING} if "training" in load(folder, kind).Config.model_fields else {}
    found = SMALL.get(folder, {}).get(kind, trained)
    return {"kind": kind, **(found() if callable(found) else found)}


def small(folder: str, kind: str) -> Params:
    return parse(load(folder, kind).Config, settings_of(folder, kind))


@pytest.mark.parametrize(("folder", "kind"), EVERY)
def test_the_module_says_where_its_method_comes_from(folder, kind):
    text = importlib.import_module(f"tessera.{folder}.{kind}").__doc__
    assert "Source" in text and "arXiv" in text


@pytest.mark.parametrize(("folder", "kind"), EVERY)
def test_an_unknown_key_is_refused_by_name(folder, kind):
    with pytest.raises(ValueError, match="no_such_key: unknown key"):
        parse(load(folder, kind).Config, {**settings_of(folder, kind), "no_such_key": 1})


@pytest.mark.parametrize("kind", kinds("quantizers"))
def test_quantizer_codes_are_named_by_their_indices(kind):
    config = small("quantizers", kind)
    quantizer = load("quantizers", kind).Quantizer(config).eval()
    z = torch.randn(1, config.code_dim, 3, 2, generator=torch.Generator().manual_seed(0))
    quantized = quantizer(z)
    assert quantized.codes.shape == z.shape and quantized.loss.shape == ()
    if quantizer.codebook_size is None:
        assert quantized.indices is None and torch.equal(quantized.codes, z)
        with pytest.raises(ValueError, match="codebook"):
            quantizer.indices_to_codes(torch.zeros(1, 3, 2, dtype=torch.long))
    else:
        assert quantized.indices.dtype == torch.long
        assert quantized.indices.shape == (1, 3, 2 * quantizer.indices_per_code)
        assert quantized.indices.min() >= 0 and quantized.indices.max() < quantizer.codebook_size
        torch.testing.assert_close(quantizer.indices_to_codes(quantized.indices), quantized.codes, atol=1e-6, rtol=0)


@pytest.mark.parametrize("kind", kinds("quantizers"))
def test_neighbors_are_the_nearest_other_codes(kind):
    config = small("quantizers", kind)
    quantizer = load("quantizers", kind).Quantizer(config).eval()
    if quantizer.codebook_size is None:
        with pytest.raises(ValueError, match="codebook"):
            quantizer.neighbors(torch.zeros(3, dtype=torch.long), 2)
        return
    levels = quantizer.indices_per_code
    size = quantizer.codebook_size // levels
    indices = torch.randint(quantizer.codebook_size, (30,), generator=torch.Generator().manual_seed(0))
    found = quantizer.neighbors(indices, 5)
    assert found.shape == (30, 5) and torch.equal(found // size, (indices // size).unsqueeze(1).expand(-1, 5))
    for index, near in zip(indices.tolist(), found.tolist(), strict=True):
        # brute force over every code of the same level, those of all other levels being equal
        rows = torch.arange(levels).repeat(size, 1) * size
        rows[:, index // size] = index // size * size + torch.arange(size)
        codes = quantizer.indices_to_codes(rows.view(1, 1, -1))[0, :, 0].T  # (K, D)
        distances = (codes - codes[index % size]).norm(dim=1)
        assert index not in near and len(set(near)) == 5
        others = distances[torch.arange(size) != index % size].sort().values
        torch.testing.assert_close(distances[[one % size for one in near]], others[:5], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", kinds("quantizers"))
def test_gradient_passes_straight_through_the_quantizer(kind):
    """Unchanged, or as that of `bound` where the quantizer squashes latents before it rounds them."""
    config = small("quantizers", kind)
    quantizer = load("quantizers", kind).Quantizer(config).eval()
    z = torch.randn(2, config.code_dim, 3, 2, requires_grad=True)
    weights = torch.randn_like(z)
    expected = weights
    if hasattr(quantizer, "bound"):
        expected = torch.autograd.grad((quantizer.bound(z) * weights).sum(), z)[0]
    (quantizer(z).codes * weights).sum().backward()
    torch.testing.assert_close(z.grad, expected)


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("kind", kinds("tokenizers"))
def test_tokenizer_shapes_types_and_determinism(kind, batch, image_spec):
    model = load("tokenizers", kind).Model(small("tokenizers", kind), image_spec).eval()
    images = torch.rand(batch, 1, 16, 8) * 2 - 1
    encoded = model.encode(images)
    assert isinstance(encoded, Encoded) and encoded.latents.dtype == torch.float32
    assert encoded.latents.shape == (batch, *model.latent_shape)
    decoded = model.decode(encoded.latents)
    assert decoded.shape == images.shape and decoded.dtype == torch.float32
    assert torch.equal(decoded, model.decode(model.encode(images).latents))
    if model.codebook_size:
        assert encoded.indices.shape == (batch, *model.index_grid)
        torch.testing.assert_close(model.decode_indices(encoded.indices), decoded)
    else:
        assert encoded.indices is None


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("kind", kinds("priors"))
def test_prior_samples_are_tokens_and_the_seed_decides_them(kind, batch, token_spec):
    module = load("priors", kind)
    model = module.Model(small("priors", kind), token_spec).eval()
    for parameter in model.parameters():  # an untrained zero head would sample the same from any network
        nn.init.normal_(parameter, std=0.3)
    labels = torch.arange(batch) % 3
    drawn = [model.sample(labels, module.Sampling(), torch.Generator().manual_seed(seed)) for seed in (0, 0, 1)]
    assert torch.equal(drawn[0], drawn[1]) and not torch.equal(drawn[0], drawn[2])
    if module.LEARNS == "indices":
        assert drawn[0].shape == (batch, 4, 2) and drawn[0].min() >= 0 and drawn[0].max() < token_spec.codebook_size
    else:
        assert drawn[0].shape == (batch, *token_spec.latent_shape) and drawn[0].isfinite().all()


@pytest.mark.parametrize("kind", kinds("priors"))
def test_in_bf16_a_prior_returns_float32_and_draws_from_the_same_noise(kind, token_spec):
    """What is beyond it adds many small steps, or weighs small differences."""
    module = load("priors", kind)
    torch.manual_seed(0)
    model = module.Model(small("priors", kind), token_spec).eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.1)
    copy, labels = in_precision(model, "bf16"), torch.arange(30) % 3
    plain, drawn = (each.sample(labels, module.Sampling(), torch.Generator().manual_seed(0)) for each in (model, copy))
    if module.LEARNS == "indices":
        assert drawn.dtype == torch.int64 and (drawn == plain).float().mean() > 0.9
    else:
        assert drawn.dtype == torch.float32 and 0 < (drawn - plain).abs().mean() < 0.1 * plain.std()
    if hasattr(model, "denoise"):
        x = torch.randn(30, *token_spec.latent_shape)
        assert copy.denoise(x, 1.0, labels, module.Sampling()).dtype == torch.float32


@pytest.mark.parametrize("kind", kinds("tokenizers"))
def test_in_bf16_a_tokenizer_returns_float32(kind, image_spec):
    torch.manual_seed(0)
    model = load("tokenizers", kind).Model(small("tokenizers", kind), image_spec).eval()
    copy, images = in_precision(model, "bf16"), torch.rand(4, 1, 16, 8) * 2 - 1
    latents = copy.encode(images).latents
    decoded = copy.decode(latents)
    assert latents.dtype == decoded.dtype == torch.float32
    torch.testing.assert_close(latents, model.encode(images).latents, atol=0.05, rtol=0.05)
    torch.testing.assert_close(decoded, model.decode(latents), atol=0.05, rtol=0.05)


@pytest.mark.parametrize("kind", kinds("denoisers"))
def test_in_bf16_a_denoiser_returns_float32(kind, token_spec):
    """Guidance multiplies the difference of two of them."""
    torch.manual_seed(0)
    model = load("denoisers", kind).Model(small("denoisers", kind), token_spec.latent_shape, 4).eval()
    given = torch.randn(5, *token_spec.latent_shape), torch.rand(5), torch.arange(5) % 4
    assert in_precision(model, "bf16")(*given).dtype == torch.float32


GUIDED = [kind for kind in kinds("priors") if "guidance_scale" in load("priors", kind).Sampling.model_fields]


def test_most_priors_are_guided_so_the_test_below_is_about_something():
    assert {"autoregressive", "flow_matching"} <= set(GUIDED)


@pytest.mark.parametrize("kind", GUIDED)
def test_guidance_of_one_is_the_conditional_model_exactly(kind, token_spec, monkeypatch):
    module = load("priors", kind)
    model = module.Model(small("priors", kind), token_spec).eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    plain = model.sample(torch.tensor([0, 2]), module.Sampling(guidance_scale=1.0), torch.Generator().manual_seed(0))
    near = model.sample(
        torch.tensor([0, 2]), module.Sampling(guidance_scale=1 + 1e-6), torch.Generator().manual_seed(0)
    )
    strong = model.sample(torch.tensor([0, 2]), module.Sampling(guidance_scale=8.0), torch.Generator().manual_seed(0))
    torch.testing.assert_close(plain, near, atol=1e-3, rtol=0)
    assert not torch.equal(plain, strong)


@pytest.mark.parametrize("kind", kinds("priors"))
def test_an_unconditional_prior_ignores_labels(kind, token_spec):
    module = load("priors", kind)
    config = small("priors", kind).model_copy(update={"is_conditional": False})
    model = module.Model(config, token_spec).eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    sampling = module.Sampling(guidance_scale=3.0) if kind in GUIDED else module.Sampling()
    a = model.sample(torch.tensor([0, 1]), sampling, torch.Generator().manual_seed(0))
    b = model.sample(torch.tensor([2, 2]), sampling, torch.Generator().manual_seed(0))
    assert torch.equal(a, b)


@pytest.mark.parametrize("kind", kinds("features"))
def test_features_are_of_each_image_alone_and_as_wide_as_the_network_says(kind, image_spec):
    spec = image_spec.model_copy(update={"channels": 3, "height": 32, "width": 32})
    config, module = small("features", kind), load("features", kind)
    assert not hasattr(module, "Objective") or config.seed == 0  # its own, for runs of several seeds to compare
    torch.manual_seed(0)
    model = module.Model(config, spec).eval()
    with torch.no_grad():  # those of some are in a file, which is not here
        for name, values in model.state_dict().items():
            if values.ndim > 1:
                values.normal_(std=(2 / values[0].numel()) ** 0.5)
            elif values.is_floating_point():
                values.fill_(0.0 if "bias" in name or "mean" in name else 1.0)
        images = torch.rand(3, 3, 32, 32) * 2 - 1
        together, alone = model.features(images), [model.features(one[None]) for one in images]
    assert together.shape == (3, model.feature_dim) and together.dtype == torch.float32
    torch.testing.assert_close(together, torch.cat(alone), rtol=1e-3, atol=1e-5)
    assert (together[0] - together[1]).abs().max() > 1e-3 * together.abs().max()  # it sees them
    assert isinstance(model.has_logits, bool) and isinstance(model.resize, str)
    assert not hasattr(model, "logits") or not model.has_logits or model.logits(images).shape == (3, spec.num_classes)


@pytest.mark.parametrize("kind", kinds("denoisers"))
def test_a_denoiser_keeps_shapes_and_learns_to_heed_time_and_label(kind, token_spec):
    """A few steps on a target that both decide: then every weight has had a gradient, and both change the output."""
    torch.manual_seed(0)
    denoiser = load("denoisers", kind).Model(small("denoisers", kind), token_spec.latent_shape, 4)
    x, times, labels = torch.randn(6, *token_spec.latent_shape), torch.linspace(-1, 1, 6), torch.arange(6) % 4
    assert denoiser(x[:1], times[:1], labels[:1]).shape == (1, *token_spec.latent_shape)
    target = (times + labels).view(-1, 1, 1, 1) * x
    optimizer = torch.optim.Adam(denoiser.parameters(), lr=0.01)
    had_gradient = set()
    for _ in range(8):
        optimizer.zero_grad()
        out = denoiser(x, times, labels)
        assert out.shape == x.shape and out.dtype == torch.float32
        (out - target).square().mean().backward()
        had_gradient |= {name for name, p in denoiser.named_parameters() if p.grad is not None and p.grad.any()}
        optimizer.step()
    assert not {name for name, _ in denoiser.named_parameters()} - had_gradient
    with torch.no_grad():
        before = denoiser(x, times, labels)
        assert (denoiser(x, times + 0.3, labels) - before).abs().max() > 1e-3
        assert (denoiser(x, times, (labels + 1) % 4) - before).abs().max() > 1e-3


@pytest.mark.parametrize(
    ("folder", "kind"), [("denoisers", kind) for kind in kinds("denoisers")] + [("tokenizers", "vqgan")]
)
def test_muon_moves_the_matrices_inside_and_adamw_the_rest(folder, kind, image_spec, token_spec):
    if folder == "denoisers":
        part = load(folder, kind).Model(small(folder, kind), token_spec.latent_shape, 4)
    else:
        part = load(folder, kind).Model(small(folder, kind), image_spec)
    adamw, muon = optimizers_for(part, Training(num_steps=1, optimizer="muon"))
    names = {id(parameter): name for name, parameter in part.named_parameters() if parameter.requires_grad}
    inside, rest = ([p for g in one.param_groups for p in g["params"]] for one in (muon, adamw))
    assert sorted(names[id(p)] for p in (*inside, *rest)) == sorted(names.values())  # each once
    assert inside and all(p.ndim in (2, 4) for p in inside)
    ends = [getattr(m, name) for m in part.modules() for name in ("stem", "head", "enter", "leave") if hasattr(m, name)]
    assert ends and not {id(p) for end in ends for p in end.parameters()} & {id(p) for p in inside}


class _Rows:
    def __init__(self, batch):
        self.whole = batch

    def __len__(self) -> int:
        return len(self.whole.labels)

    def stored(self, rows, generator=None):
        return type(self.whole)(*(tensor[rows] for tensor in self.whole))

    def batch_of(self, stored):
        return stored

    def on(self, device):
        return type(self)(type(self.whole)(*(tensor.to(device) for tensor in self.whole)))


class _Death(BaseException):
    """Ends a training in the middle of a step, as a kill -9 does: nothing of it says farewell."""


class _EndsAt:
    """Ends the training when the batch of step `number` is taken, counting from 1: by asking for a stop, or by death."""

    def __init__(self, number, rows, job, by):
        self.number, self.rows, self.job, self.by, self.taken = number, rows, job, by, 0

    def __len__(self) -> int:
        return len(self.rows)

    def stored(self, rows, generator=None):
        return self.rows.stored(rows, generator)

    def batch_of(self, stored):
        self.taken += 1
        if self.taken == self.number:
            if self.by is _Death:
                raise _Death
            self.job.request_stop(signal.SIGTERM)
        return self.rows.batch_of(stored)


def _training_data(folder, kind, image_spec, token_spec):
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(12) % 3
    if kind == "image_text":
        labels = encoded(["", *(f"image {label}" for label in labels[1:].tolist())], 64)
    if folder in ("tokenizers", "quantizers", "features"):
        return image_spec, _Rows(ImageBatch(torch.rand(12, 1, 16, 8, generator=generator) * 2 - 1, labels))
    if load("priors", kind).LEARNS == "indices":
        return token_spec, _Rows(TokenBatch(torch.randint(11, (12, 4, 2), generator=generator), labels))
    return token_spec, _Rows(TokenBatch(torch.randn(12, *token_spec.latent_shape, generator=generator), labels))


TRAINED = [
    (folder, kind)
    for folder in ("features", "tokenizers", "priors")
    for kind in kinds(folder)
    if hasattr(load(folder, kind), "Objective")
]
TRAINED += [("quantizers", kind) for kind in kinds("quantizers")]


def _trainable(folder, kind):
    """The folder, module and settings to train a part by; a quantizer is trained as part of the smallest tokenizer."""
    if folder == "quantizers":
        config = small("tokenizers", "vqvae").model_copy(update={"quantizer": small("quantizers", kind)})
        return "tokenizers", load("tokenizers", "vqvae"), config
    return folder, load(folder, kind), small(folder, kind)


def _trained(folder, kind, image_spec, token_spec, job, data=None, seed=0, **changes):
    """A part trained for six steps on random data, by the settings of SMALL with these changes in `training`."""
    folder, module, config = _trainable(folder, kind)
    settings = config.training.model_copy(update={"num_steps": 6, "ema_decay": 0.5, **changes})
    config = config.model_copy(update={"training": settings})
    spec, rows = _training_data(folder, kind, image_spec, token_spec)
    torch.manual_seed(seed)
    model = module.Model(config, spec)
    job.resumable()
    return fit(module.Objective(model, config), data or rows, settings, seed=seed, job=job).state_dict()


@pytest.fixture(scope="session")
def plain(image_spec, token_spec, tmp_path_factory):
    """The weights of a part that `_trained` trained in one go, which is done once for all tests."""

    @functools.cache
    def weights(folder, kind, precision="fp32"):
        job = Job("plain", tmp_path_factory.mktemp("plain"))
        return _trained(folder, kind, image_spec, token_spec, job, precision=precision)

    return weights


@pytest.mark.parametrize("by", [Stopped, _Death])
@pytest.mark.parametrize(("folder", "kind"), TRAINED)
def test_a_training_that_was_stopped_or_killed_and_is_resumed_is_bit_identical(
    folder, kind, by, image_spec, token_spec, plain, tmp_path
):
    step = random.Random(f"{folder}/{kind}/{by}").randint(2, 5)  # another one for each part
    first = Job("parts", tmp_path)
    if by is _Death:  # whoever is asked to stop saves what there is
        first.checkpoint_seconds = 0.0
    _, rows = _training_data(folder, kind, image_spec, token_spec)
    with pytest.raises(by):
        _trained(folder, kind, image_spec, token_spec, first, data=_EndsAt(step, rows, first, by))
    again, said = Job("parts", tmp_path), []
    again.say = said.append
    resumed = _trained(folder, kind, image_spec, token_spec, again)
    assert said == [f"resumed step {step if by is Stopped else step - 1}"]
    for name, value in plain(folder, kind).items():
        assert torch.equal(value, resumed[name]), name


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("kind", ["vqvae", "vqgan", "vae", "diffusers"])
def test_a_training_with_regularized_latents_resumes_bit_identically(
    kind, precision, image_spec, token_spec, tmp_path, monkeypatch
):
    latents = {"noise": 1.0, "equivariance": {"probability": 0.8, "smallest_scale": 0.5}}
    settings = {**settings_of("tokenizers", kind), "latents": latents}
    monkeypatch.setitem(SMALL["tokenizers"], kind, settings)
    train = functools.partial(_trained, "tokenizers", kind, image_spec, token_spec, precision=precision)
    uninterrupted, first = train(Job("parts", tmp_path / "plain")), Job("parts", tmp_path / "stopped")
    _, rows = _training_data("tokenizers", kind, image_spec, token_spec)
    with pytest.raises(Stopped):
        train(first, data=_EndsAt(3, rows, first, Stopped))
    resumed = train(Job("parts", tmp_path / "stopped"))
    assert all(torch.equal(value, resumed[name]) for name, value in uninterrupted.items())
    monkeypatch.setitem(SMALL["tokenizers"], kind, {**settings, "latents": {"noise": 0.0}})
    plain = train(Job("parts", tmp_path / "off"))
    assert plain.keys() == uninterrupted.keys() and any(not torch.equal(plain[name], resumed[name]) for name in plain)


@pytest.mark.parametrize("kind", ["vqgan", "vae"])
def test_a_training_with_a_perceptual_network_resumes_bit_identically(
    kind, image_spec, token_spec, tmp_path, monkeypatch
):
    """Also where the network's constant would come out otherwise: another machine rounds otherwise."""
    settings = {**SMALL["tokenizers"][kind], "perceptual": {"kind": "features", "layers": [0, 1], "min_side": 32}}
    monkeypatch.setitem(SMALL["tokenizers"], kind, settings)
    uninterrupted = _trained("tokenizers", kind, image_spec, token_spec, Job("parts", tmp_path / "plain"))
    first = Job("parts", tmp_path / "stopped")
    _, rows = _training_data("tokenizers", kind, image_spec, token_spec)
    with pytest.raises(Stopped):
        _trained("tokenizers", kind, image_spec, token_spec, first, data=_EndsAt(3, rows, first, Stopped))
    perceptual = load("perceptual", "features")
    noise = perceptual.natural_noise
    monkeypatch.setattr(perceptual, "natural_noise", lambda count, side: 0.5 * noise(count, side))
    again = Job("parts", tmp_path / "stopped")
    resumed = _trained("tokenizers", kind, image_spec, token_spec, again)
    assert resumed.keys() == uninterrupted.keys()
    assert all(torch.equal(value, resumed[name]) for name, value in uninterrupted.items())
    assert not any("network" in name for name in uninterrupted)


@pytest.mark.parametrize(("folder", "kind"), TRAINED)
def test_checkpointed_gradients_and_data_on_the_device_change_nothing(folder, kind, image_spec, token_spec, plain, job):
    saving = _trained(folder, kind, image_spec, token_spec, job, gradient_checkpointing=True, data_on_device=True)
    for name, value in plain(folder, kind).items():
        torch.testing.assert_close(saving[name], value, msg=name)


# In bf16 one of each family of networks; all parts train in bf16 below, and all compile in fp32
COMPILED = [(*part, "fp32") for part in TRAINED if part[0] != "features"]
COMPILED += [("tokenizers", "vae", "bf16"), ("priors", "autoregressive", "bf16"), ("priors", "diffusion", "bf16")]


@pytest.mark.parametrize(("folder", "kind", "precision"), COMPILED)
def test_compiled_training_works(folder, kind, precision, image_spec, token_spec, plain, job, monkeypatch):
    """By the tracer and its autograd; with TESSERA_TEST_COMPILE_BACKEND=inductor by the code generator too: it needs a
    C++ compiler and minutes."""
    backend = os.environ.get("TESSERA_TEST_COMPILE_BACKEND", "aot_eager")
    monkeypatch.setattr(nn.Module, "compile", partialmethod(nn.Module.compile, backend=backend))
    # inductor then drops by the random numbers that there are without it
    same_draws = importlib.import_module("torch._inductor.config").patch(fallback_random=True)
    with same_draws:
        compiled = _trained(folder, kind, image_spec, token_spec, job, precision=precision, compile=True)
    tolerance = {} if precision == "fp32" else {"atol": 0.05, "rtol": 0.05}
    for name, value in plain(folder, kind, precision).items():
        torch.testing.assert_close(compiled[name], value, msg=name, **tolerance)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize(("folder", "kind"), TRAINED)
def test_training_moves_every_weight_and_saving_is_exact(
    folder, kind, precision, image_spec, token_spec, job, tmp_path
):
    folder, module, config = _trainable(folder, kind)
    config = config.model_copy(
        update={
            "training": config.training.model_copy(update={"precision": precision, "num_steps": 6, "ema_decay": 0.0})
        }
    )
    spec, data = _training_data(folder, kind, image_spec, token_spec)
    torch.manual_seed(0)
    model = module.Model(config, spec)
    before = {name: value.clone() for name, value in model.named_parameters()}
    job.resumable()
    trained = fit(module.Objective(model, config), data, config.training, seed=0, job=job)
    after = dict(trained.named_parameters())
    still = [name for name in before if torch.equal(before[name], after[name]) and "null" not in name]
    assert not still, f"no gradient reached {still}"
    assert all(value.isfinite().all() for value in after.values())
    with artifact.create(tmp_path / "part") as place:
        checkpoints.save(place, folder, config, spec, trained, "code")
    again, config_again, spec_again = checkpoints.load_model(tmp_path / "part", folder)
    assert config_again == config and spec_again == spec
    for name, value in trained.state_dict().items():
        assert torch.equal(value, again.state_dict()[name]), name

"""What every part promises, asked of every file in its folder: a new part gets these tests by being there."""

import importlib

import pytest
import torch
from torch import nn

from tessera.artifacts import checkpoints
from tessera.artifacts import folder as artifact
from tessera.components import Params, kinds, load, parse
from tessera.contracts import Encoded, ImageBatch, TokenBatch
from tessera.training import fit

TRAINING = {"num_steps": 2, "batch_size": 4, "learning_rate": 0.01}
# The smallest sensible settings of each part; a new part adds a line here only if its defaults cannot be built from {}.
SMALL = {
    "tokenizers": {
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
    },
    "priors": {
        "autoregressive": {"width": 16, "depth": 2, "heads": 2, "training": TRAINING},
        "flow_matching": {
            "denoiser": {"kind": "transformer", "width": 16, "depth": 2, "heads": 2},
            "training": TRAINING,
        },
        "masked": {"width": 16, "depth": 2, "heads": 2, "training": TRAINING},
    },
}
EVERY = [(folder, kind) for folder in ("tokenizers", "quantizers", "priors") for kind in kinds(folder)]


def small(folder: str, kind: str) -> Params:
    settings = SMALL.get(folder, {}).get(kind, {})
    return parse(load(folder, kind).Config, {"kind": kind, **settings})


@pytest.mark.parametrize(("folder", "kind"), EVERY)
def test_the_module_says_where_its_method_comes_from(folder, kind):
    text = importlib.import_module(f"tessera.{folder}.{kind}").__doc__
    assert "Source" in text and "arXiv" in text


@pytest.mark.parametrize(("folder", "kind"), [(f, k) for f in ("tokenizers", "quantizers", "priors") for k in kinds(f)])
def test_an_unknown_key_is_refused_by_name(folder, kind):
    settings = {**SMALL.get(folder, {}).get(kind, {}), "kind": kind, "no_such_key": 1}
    with pytest.raises(ValueError, match="no_such_key: unknown key"):
        parse(load(folder, kind).Config, settings)


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
        assert quantized.indices.min() >= 0 and quantized.indices.max() < quantizer.codebook_size
        torch.testing.assert_close(quantizer.indices_to_codes(quantized.indices), quantized.codes, atol=1e-6, rtol=0)


@pytest.mark.parametrize("kind", kinds("quantizers"))
def test_gradient_passes_straight_through_the_quantizer(kind):
    config = small("quantizers", kind)
    quantizer = load("quantizers", kind).Quantizer(config).eval()
    z = torch.randn(2, config.code_dim, 3, 2, requires_grad=True)
    weights = torch.randn_like(z)
    (quantizer(z).codes * weights).sum().backward()
    torch.testing.assert_close(z.grad, weights)


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
    sampling = module.Sampling(guidance_scale=3.0)
    a = model.sample(torch.tensor([0, 1]), sampling, torch.Generator().manual_seed(0))
    b = model.sample(torch.tensor([2, 2]), sampling, torch.Generator().manual_seed(0))
    assert torch.equal(a, b)


class _Rows:
    def __init__(self, batch):
        self.whole = batch

    def __len__(self) -> int:
        return len(self.whole.labels)

    def batch(self, rows, generator=None):
        return type(self.whole)(*(tensor[rows] for tensor in self.whole))


def _training_data(folder, kind, image_spec, token_spec):
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(12) % 3
    if folder == "tokenizers":
        return image_spec, _Rows(ImageBatch(torch.rand(12, 1, 16, 8, generator=generator) * 2 - 1, labels))
    if load("priors", kind).LEARNS == "indices":
        return token_spec, _Rows(TokenBatch(torch.randint(11, (12, 4, 2), generator=generator), labels))
    return token_spec, _Rows(TokenBatch(torch.randn(12, *token_spec.latent_shape, generator=generator), labels))


TRAINED = [
    (folder, kind)
    for folder in ("tokenizers", "priors")
    for kind in kinds(folder)
    if hasattr(load(folder, kind), "Objective")
]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize(("folder", "kind"), TRAINED)
def test_training_moves_every_weight_and_saving_is_exact(
    folder, kind, precision, image_spec, token_spec, job, tmp_path
):
    module, config = load(folder, kind), small(folder, kind)
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
        checkpoints.save(place, folder, config, spec, trained)
    again, config_again, spec_again = checkpoints.load_model(tmp_path / "part", folder)
    assert config_again == config and spec_again == spec
    for name, value in trained.state_dict().items():
        assert torch.equal(value, again.state_dict()[name]), name

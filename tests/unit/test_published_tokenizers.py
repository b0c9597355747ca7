"""Published autoencoders: they agree with diffusers itself, priors learn their tokens, and twenty folders are refused."""

import importlib.util
import inspect
import json
import re
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import onnxruntime
import pytest
import safetensors.torch
import torch
import yaml
from torch import Tensor, nn

import tessera
from stages import encode_tokens, sample_images, train_prior, train_tokenizer
from tessera.artifacts import checkpoints
from tessera.artifacts import folder as artifact
from tessera.artifacts import images as image_artifact
from tessera.artifacts import tokens as token_artifact
from tessera.artifacts.images import to_float
from tessera.check import estimate, problems
from tessera.check import images as known_images
from tessera.components import InvalidParams, MissingPackage, parse
from tessera.contracts import ImageBatch, ImageSpec, TokenSpec
from tessera.export import __main__ as export
from tessera.export import onnx as networks
from tessera.params import Pipeline
from tessera.running.job import Job
from tessera.sources import diffusers as published
from tessera.system import System
from tessera.tokenizers import diffusers as tokenizer

ROOT = Path(__file__).parents[2]
WEIGHTS = "diffusion_pytorch_model.safetensors"
DOWN, UP = "DownEncoderBlock2D", "UpDecoderBlock2D"
LEVELS = {"block_out_channels": [8, 16], "down_block_types": [DOWN, DOWN], "up_block_types": [UP, UP]}
SIDES = {
    f"{side}_{key}": value
    for side in ("encoder", "decoder")
    for key, value in {
        "block_types": ["ResBlock", "EfficientViTBlock"],
        "block_out_channels": [8, 16],
        "layers_per_block": [0, 1],
        "qkv_multiscales": [[], [5]],
    }.items()
}
NETWORKS: dict[str, dict[str, Any]] = {
    "kl": {"class_name": "AutoencoderKL", **LEVELS, "norm_num_groups": 4, "latent_channels": 3},
    "vq": {"class_name": "VQModel", **LEVELS, "norm_num_groups": 4, "num_vq_embeddings": 32, "vq_embed_dim": 2},
    "tiny": {
        "class_name": "AutoencoderTiny",
        **{f"{side}_block_out_channels": [8, 8, 8] for side in ("encoder", "decoder")},
        **{f"num_{side}_blocks": [1, 1, 1] for side in ("encoder", "decoder")},
    },
    "dc": {"class_name": "AutoencoderDC", **SIDES, "latent_channels": 4, "attention_head_dim": 8},
    # as VQ-Diffusion and MoVQ have them, FLUX, and DC-AE of ImageNet
    "spatial": {
        "class_name": "VQModel",
        "block_out_channels": [32, 32],
        "down_block_types": [DOWN, "AttnDownEncoderBlock2D"],
        "up_block_types": ["AttnUpDecoderBlock2D", UP],
        "norm_type": "spatial",
        "num_vq_embeddings": 32,
    },
    "plain": {
        "class_name": "AutoencoderKL",
        **LEVELS,
        "norm_num_groups": 4,
        "use_quant_conv": False,
        "use_post_quant_conv": False,
        "mid_block_add_attention": False,
    },
    "norms": {
        "class_name": "AutoencoderDC",
        **SIDES,
        **{f"{side}_layers_per_block": [1, 1] for side in ("encoder", "decoder")},
        "latent_channels": 4,
        "attention_head_dim": 8,
        "decoder_norm_types": ["batch_norm", "rms_norm"],
        "decoder_act_fns": ["relu", "silu"],
        "downsample_block_type": "Conv",
        "upsample_block_type": "interpolate",
    },
}  # fmt: skip
SPEC = ImageSpec(
    name="tiny", channels=1, height=16, width=8, num_classes=3, class_names=("a", "b", "c"), licence="none"
)
IMAGES = torch.rand(3, 1, 16, 8, generator=torch.Generator().manual_seed(3)) * 2 - 1


def network(name: str) -> dict[str, Any]:
    """Of gray images, as params.yaml has it."""
    gray = {"in_channels": 1} | ({} if name in ("dc", "norms") else {"out_channels": 1})
    return NETWORKS[name] | gray


def theirs(name: str) -> nn.Module:
    """The network of diffusers with random weights under which latents and images vary."""
    arguments = {key: value for key, value in network(name).items() if key != "class_name"}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        made = getattr(diffusers, NETWORKS[name]["class_name"])(**arguments, scaling_factor=0.3).eval()
        for values in made.state_dict().values():
            if values.ndim > 1:
                values.normal_(std=values[0].numel() ** -0.5)
            elif values.is_floating_point():
                values.add_(0.1 * torch.rand(values.shape))
    return made


def their_latents(made: nn.Module, images: Tensor) -> Tensor:
    encoded = made.encode(images)
    if isinstance(made, diffusers.AutoencoderKL):
        return encoded.latent_dist.mode()
    return encoded.latent if isinstance(made, diffusers.AutoencoderDC) else encoded.latents


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of each network, as diffusers writes it."""
    root = tmp_path_factory.mktemp("published")
    for name in NETWORKS:
        theirs(name).save_pretrained(root / name)
    return root


def settings(folder: Path, name: str, **changes: Any) -> dict[str, Any]:
    found = published.network_of(network(name))
    sha256 = artifact.sha256(folder / WEIGHTS) if (folder / WEIGHTS).is_file() else "0" * 64
    quantizer = published.quantizer_of(found)
    return {
        "kind": "diffusers",
        "folder": str(folder),
        "sha256": sha256,
        "quantizer": quantizer,
        "network": network(name),
        **changes,
    }


def configured(folder: Path, name: str, **changes: Any) -> tokenizer.Config:
    return parse(tokenizer.Config, settings(folder, name, **changes))


def filled(config: tokenizer.Config, spec: ImageSpec = SPEC) -> tokenizer.Objective:
    torch.manual_seed(1)
    return tokenizer.Objective(tokenizer.Model(config, spec), config)


@pytest.mark.parametrize("name", NETWORKS)
@torch.no_grad()
def test_latents_indices_and_images_are_those_of_diffusers(name: str, folders: Path) -> None:
    made, model = theirs(name), filled(configured(folders / name, name)).model.eval()
    latents = their_latents(made, IMAGES)
    images = made.decode(latents).sample
    encoded = model.encode(IMAGES)
    assert latents.std() > 0.05 and images.std() > 0.05  # so that there is something to agree on
    torch.testing.assert_close(encoded.latents, latents, atol=1e-5, rtol=0)
    torch.testing.assert_close(model.decode(latents), images, atol=1e-5, rtol=0)
    assert model.latent_shape == tuple(latents.shape[1:])
    factor = model.config.downsample_factor
    assert images.shape == IMAGES.shape and (16 // factor, 8 // factor) == model.index_grid
    if isinstance(made, diffusers.VQModel):
        indices = made.quantize(latents)[2][2].view(3, *model.index_grid)
        assert torch.equal(encoded.indices, indices) and len(indices.unique()) > 4
        torch.testing.assert_close(model.decode_indices(indices), images, atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", ["kl", "spatial"])
def test_names_of_older_files_and_half_precision_are_read(name: str, folders: Path, tmp_path: Path) -> None:
    """Files of before 2023, which are most of those that are used, name the layers of attention otherwise."""
    shutil.copytree(folders / name, tmp_path / name)
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    weights = safetensors.torch.load_file(tmp_path / name / WEIGHTS)
    for new, before in old.items():
        weights = {key.replace(f".{new}.", f".{before}."): tensor for key, tensor in weights.items()}
    assert any(".query." in key for key in weights)
    safetensors.torch.save_file({key: tensor.half() for key, tensor in weights.items()}, tmp_path / name / WEIGHTS)
    model = filled(configured(tmp_path / name, name)).model.eval()
    made = getattr(diffusers, NETWORKS[name]["class_name"]).from_pretrained(tmp_path / name, local_files_only=True)
    with torch.no_grad():
        torch.testing.assert_close(model.encode(IMAGES).latents, their_latents(made, IMAGES), atol=1e-5, rtol=0)


@pytest.mark.parametrize("class_name", published.CLASSES)
def test_keys_and_defaults_are_those_of_the_installed_diffusers(class_name: str) -> None:
    """Another version may have others: then its folders are refused by name, and this test says which."""
    known = published.CLASSES[class_name]
    theirs = inspect.signature(getattr(diffusers, class_name).__init__).parameters
    defaults = {key: one.default for key, one in theirs.items() if key not in ("self", *known.without_effect)}
    assert defaults == known().arguments()


ATTENTION = ["ResBlock"] * 3 + ["EfficientViTBlock"] * 3
SCALES = [[], [], [], [5], [5], [5]]
WIDTHS = [128, 256, 512, 512, 1024, 1024]
AS_ON_THE_HUB: dict[str, tuple[dict[str, Any], int, int | None]] = {  # config.json, downsampling, codes
    "sd-vae-ft-mse": (
        {
            "_class_name": "AutoencoderKL", "_diffusers_version": "0.4.2", "act_fn": "silu",
            "block_out_channels": [128, 256, 512, 512], "down_block_types": [DOWN] * 4, "in_channels": 3, "latent_channels": 4,
            "layers_per_block": 2, "norm_num_groups": 32, "out_channels": 3, "sample_size": 256, "up_block_types": [UP] * 4,
        }, 8, None,
    ),
    "taesd": (
        {
            "_class_name": "AutoencoderTiny", "_diffusers_version": "0.20.0.dev0", "act_fn": "relu",
            "block_out_channels": [64] * 4, "decoder_block_out_channels": [64] * 4, "encoder_block_out_channels": [64] * 4,
            "force_upcast": False, "in_channels": 3, "latent_channels": 4, "latent_magnitude": 3, "latent_shift": 0.5,
            "num_decoder_blocks": [3, 3, 3, 1], "num_encoder_blocks": [1, 3, 3, 3], "out_channels": 3, "scaling_factor": 1.0,
            "upsampling_scaling_factor": 2,
        }, 8, None,
    ),
    "movq": (
        {
            "_class_name": "VQModel", "_diffusers_version": "0.17.0.dev0", "act_fn": "silu",
            "block_out_channels": [128, 256, 256, 512], "down_block_types": [DOWN] * 3 + ["AttnDownEncoderBlock2D"],
            "in_channels": 3, "latent_channels": 4, "layers_per_block": 2, "norm_num_groups": 32, "norm_type": "spatial",
            "num_vq_embeddings": 16384, "out_channels": 3, "sample_size": 32, "scaling_factor": 0.18215,
            "up_block_types": ["AttnUpDecoderBlock2D"] + [UP] * 3, "vq_embed_dim": 4,
        }, 8, 16384,
    ),
    "dc-ae": (
        {
            "_class_name": "AutoencoderDC", "_diffusers_version": "0.32.0.dev0", "attention_head_dim": 32,
            "decoder_act_fns": "silu", "decoder_block_out_channels": WIDTHS, "decoder_block_types": ATTENTION,
            "decoder_layers_per_block": [3] * 6, "decoder_norm_types": "rms_norm", "decoder_qkv_multiscales": SCALES,
            "downsample_block_type": "Conv", "encoder_block_out_channels": WIDTHS, "encoder_block_types": ATTENTION,
            "encoder_layers_per_block": [2, 2, 2, 3, 3, 3], "encoder_qkv_multiscales": SCALES, "in_channels": 3,
            "latent_channels": 32, "scaling_factor": 0.41407, "upsample_block_type": "interpolate",
        }, 32, None,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", AS_ON_THE_HUB)
def test_configs_as_they_are_published_are_taken(name: str, tmp_path: Path) -> None:
    value, factor, codes = AS_ON_THE_HUB[name]
    (tmp_path / "config.json").write_text(json.dumps(value))
    found = published.read_network(tmp_path)
    assert (found.class_name, found.downsample_factor, found.codebook_size) == (value["_class_name"], factor, codes)
    lacking = {key for key in value if not key.startswith("_") and key not in found.without_effect} - {
        *found.arguments()
    }
    assert not lacking


def test_the_example_of_the_documentation_is_valid() -> None:
    text = (ROOT / "docs/systems.md").read_text(encoding="utf-8")
    (block,) = [one for one in re.findall("```yaml\n(.*?)```", text, re.DOTALL) if "kind: diffusers" in one]
    ((name, found),) = yaml.safe_load(block)["tokenizers"].items()
    config = parse(tokenizer.Config, found)
    download = load_script(ROOT / "data/download.py")
    assert (config.sha256, config.downsample_factor) == (download.TOKENIZERS[name].sha256, 8)
    listed = set(re.findall(r"^\| `([a-z0-9-]+)` \| `(?:Autoencoder|VQModel)", text, re.MULTILINE))
    assert listed == set(download.TOKENIZERS)


def load_script(path: Path) -> Any:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("is_known", [True, False])
def test_a_tokenizer_is_downloaded_when_it_is_asked_for_and_checked_where_its_hash_is_known(
    is_known: bool, folders: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    download = load_script(ROOT / "data/download.py")
    assert all(re.fullmatch("[0-9a-f]{64}", one.sha256) or not one.sha256 for one in download.TOKENIZERS.values())
    sha256 = artifact.sha256(folders / "vq" / WEIGHTS)
    one = download.Tokenizer((folders / "vq").as_uri(), "MIT", sha256 if is_known else "")
    monkeypatch.setitem(download.TOKENIZERS, "taesd", one)
    monkeypatch.setattr(sys, "argv", ["download.py", "taesd", str(tmp_path / "vq")])
    for _ in range(2):
        download.main()
        said = capsys.readouterr().out
        assert ("nobody told the sha256" in said) != is_known and (sha256 in said) != is_known
        assert said.splitlines()[-1] == f"for params.yaml: python -m tessera.sources.diffusers {tmp_path / 'vq'}"
    assert "is there already" in said
    assert published.require(tmp_path / "vq", sha256, published.network_of(network("vq"))).is_file()
    monkeypatch.setitem(download.TOKENIZERS, "taesd", one._replace(sha256="0" * 64))
    monkeypatch.setattr(sys, "argv", ["download.py", "taesd", str(tmp_path / "other")])
    with pytest.raises(SystemExit):
        download.main()
    assert "expected " + "0" * 64 in capsys.readouterr().err and not (tmp_path / "other" / WEIGHTS).exists()


# Through the stages


def params(folders: Path, **tokenizers: dict[str, Any]) -> Pipeline:
    values = yaml.safe_load((ROOT / "params.yaml").read_text())
    dataset = {"kind": "image_folder", "source": str(ROOT), "height": 16, "width": 8, "channels": 1}
    training = {"num_steps": 2, "batch_size": 4}
    indices = {"kind": "autoregressive", "width": 16, "depth": 1, "heads": 2, "training": training}
    denoiser = {"kind": "transformer", "width": 16, "depth": 1, "heads": 2}
    latents = {"kind": "flow_matching", "denoiser": denoiser, "training": training}
    priors = {"vq": (indices, {}), "kl": (latents, {"num_steps": 2})}
    values |= {
        "dataset": dataset,
        "tokenizers": tokenizers or {name: settings(folders / name, name) for name in priors},
        "systems": {
            f"{name}-prior": {"tokenizer": name, "prior": prior, "sampling": sampling}
            for name, (prior, sampling) in priors.items()
            if not tokenizers or name in tokenizers
        },
        "sample_images": {"num_images": 6, "batch_size": 6},
    }
    values["encode_tokens"] |= {"warps": 0, "batch_size": 20}
    return parse(Pipeline, values)


def train(params: Pipeline, name: str, images: Path, data: Path) -> Path:
    """The artifact of the stage."""
    out = data / "tokenizers" / name
    train_tokenizer.run(params, name, images, out, data / f"{name}.csv", Job(f"train_tokenizer@{name}", data / "state"))
    return out


@pytest.mark.parametrize("name", ["vq", "kl"])
def test_a_prior_learns_the_tokens_and_no_later_stage_needs_the_folder(
    name: str, folders: Path, images_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(folders / name, tmp_path / "weights")
    all_params = params(folders, **{name: settings(tmp_path / "weights", name)})
    data, system = tmp_path / "data", f"{name}-prior"
    made = train(all_params, name, images_folder, data)
    assert (data / f"{name}.csv").read_text() == "step,loss\n"  # nothing was trained
    recorded = json.loads((made / "config.json").read_text())["config"]
    assert recorded["sha256"] == artifact.sha256(folders / name / WEIGHTS)
    shutil.rmtree(tmp_path / "weights")

    tokens = data / "tokens" / name
    encode_tokens.run(all_params, name, images_folder, made, tokens, Job("encode", data / "state"))
    spec, splits = token_artifact.read(tokens, "indices" if name == "vq" else "latents")
    _, originals = image_artifact.read(images_folder)
    images = to_float(originals["test"].uint8(np.arange(24)))
    with torch.no_grad():
        latents = their_latents(theirs(name), images)
    learned = splits["test"].batch(torch.arange(24)).tokens
    if name == "vq":
        with torch.no_grad():
            assert torch.equal(learned.flatten(), theirs(name).quantize(latents)[2][2])
        assert spec.codebook_size == 32
    else:  # whatever the published scaling_factor is: mean 0 and deviation 1 on the training images
        mean, std = (torch.tensor(each).view(1, -1, 1, 1) for each in (spec.latent_mean, spec.latent_std))
        torch.testing.assert_close(learned, (latents - mean) / std, atol=1e-5, rtol=0)
        training = splits["train"].batch(torch.arange(48)).tokens
        torch.testing.assert_close(training.std(dim=(0, 2, 3), correction=0), torch.ones(3), atol=1e-4, rtol=0)

    places = {"images": images_folder, "tokenizer": made, "tokens": tokens}
    prior = data / "priors" / system
    train_prior.run(
        all_params,
        system,
        **places,
        out=prior,
        history=data / "h.csv",
        metrics=data / "m.json",
        job=Job("p", data / "s"),
    )
    sample_images.run(all_params, system, made, prior, data / "samples", data / "grid.png", Job("d", data / "s"))
    assert System.read(made, prior).encode(images).shape == learned.shape

    export.write(all_params, system, tmp_path, tmp_path / "exported")
    loaded = tessera.load(tmp_path / "exported", device="cpu")
    pixels = originals["test"].uint8(np.arange(24))
    assert loaded.sample([0, 1], seed=0).shape == (2, 1, 16, 8)
    torch.testing.assert_close(loaded.encode(pixels), learned, atol=1e-5, rtol=0)

    monkeypatch.setitem(sys.modules, "diffusers", None)  # as where it is not installed
    with pytest.raises(tessera.ArtifactError, match=r"pip install 'tessera\[pretrained\]'") as caught:
        tessera.load(tmp_path / "exported")
    assert "again" not in str(caught.value)  # nothing is wrong with the folder
    with pytest.raises(artifact.ArtifactError, match=r"pip install 'tessera\[pretrained\]'"):
        System.read(made, prior)


def test_the_decoder_as_onnx_takes_batches_that_diffusers_lays_out_otherwise(
    folders: Path, token_spec: TokenSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = token_spec.model_copy(update={"codebook_size": None, "latent_shape": (3, 8, 4), "index_grid": (8, 4)})
    system = System(filled(configured(folders / "kl", "kl")).model.eval(), nn.Linear(1, 1), spec, "latents")
    tokens, decoder = torch.randn(65, 3, 8, 4), networks.Call(system, "decode").eval()
    with torch.no_grad():
        expected = decoder(tokens).numpy()
    monkeypatch.setattr(networks, "networks", lambda *_: {"decoder": (decoder, {"tokens": tokens[:2]}, "images")})
    networks.write(system, tmp_path / "onnx")
    session = onnxruntime.InferenceSession(tmp_path / "onnx/decoder.onnx")
    (found,) = session.run(None, {"tokens": tokens.numpy()})
    np.testing.assert_allclose(found, expected, atol=1e-4, rtol=0)


def test_tuning_starts_at_the_published_weights_and_makes_reconstructions_better(
    folders: Path, images_folder: Path, tmp_path: Path
) -> None:
    training = {"num_steps": 25, "batch_size": 16, "learning_rate": 0.003}
    images = to_float(image_artifact.read(images_folder)[1]["test"].uint8(np.arange(24)))
    errors = {}
    for name, changes in {"frozen": {}, "tuned": {"training": training, "adversarial_weight": 0.01}}.items():
        all_params = params(folders, vq=settings(folders / "vq", "vq", **changes))
        model, _, _ = checkpoints.load_model(train(all_params, "vq", images_folder, tmp_path / name), "tokenizers")
        errors[name] = float((model.decode(model.encode(images).latents) - images).square().mean())
        codes = safetensors.torch.load_file(folders / "vq" / WEIGHTS)["quantize.embedding.weight"]
        assert torch.equal(model.quantizer.codebook, codes) == (name == "frozen")
    assert errors["tuned"] < 0.5 * errors["frozen"]


@pytest.mark.parametrize("name", ["kl", "vq", "tiny"])
def test_a_network_is_tuned_for_latents_that_are_easy_to_model(name: str, folders: Path) -> None:
    """EQ-VAE's own use: reconstructions have the sizes of the transformed images, and noise moves them."""
    latents = {"equivariance": {"probability": 1, "smallest_scale": 0.5}}
    with pytest.raises(ValueError, match="latents act in training alone, and training.num_steps is 0: write a number"):
        filled(configured(folders / name, name, latents=latents))
    training = {"num_steps": 10, "learning_rate": 0.001}
    images, found = torch.rand(4, 1, 16, 8) * 2 - 1, []
    for noise in (0.0, 2.0):
        settings_ = {"training": training, "latents": {**latents, "noise": noise}}
        objective = filled(configured(folders / name, name, **settings_)).train()
        sizes = []
        for step in range(6):
            torch.manual_seed(0)
            reconstructions, _, _ = objective.reconstruct(images, step)
            target = objective.model.regularizer.transformed(images, step)
            assert reconstructions.shape == target.shape
            sizes.append(tuple(target.shape))
        assert len(set(sizes)) > 2
        found.append(reconstructions)
    assert not torch.allclose(*found)


def test_blocks_with_running_averages_are_never_run_twice_in_a_step(folders: Path) -> None:
    model = filled(configured(folders / "norms", "norms")).model
    again = [block for block in model.modules() if getattr(block, "recomputes", False)]
    assert len(again) == 3 and any(isinstance(each, nn.BatchNorm2d) for each in model.modules())
    assert not [each for block in again for each in block.modules() if isinstance(each, nn.BatchNorm2d)]
    for name in NETWORKS:
        some = tokenizer.Model(configured(folders / name, name), SPEC)
        parts = (some.encoder, some.decoder)
        assert all(any(getattr(block, "recomputes", False) for block in part.modules()) for part in parts), name


def test_averaged_codes_start_as_the_published_ones(folders: Path) -> None:
    """One step moves an average by a small share of the way; from sums that are not those of the codes it would jump."""
    quantizer = published.quantizer_of(published.network_of(network("vq"))) | {"update": "ema", "ema_decay": 0.99}
    config = configured(folders / "vq", "vq", quantizer=quantizer)
    objective = filled(config).train()
    before = objective.model.quantizer.codebook.clone()
    objective(ImageBatch(IMAGES, torch.zeros(3)), "autoencoder", 0)
    moved = (objective.model.quantizer.codebook - before).abs().amax()
    assert 0 < moved < 0.5 * before.std()


# What is refused


def _json(folder: Path, **changed: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changed))


def _half(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def _weights(folder: Path) -> dict[str, Tensor]:
    """Copies: the file may be written over, and safetensors maps it."""
    return {name: tensor.clone() for name, tensor in safetensors.torch.load_file(folder / WEIGHTS).items()}


def _pickled(folder: Path, name: str) -> None:
    torch.save(_weights(folder), folder / name)
    if name != WEIGHTS:
        (folder / WEIGHTS).unlink()


def _link_out(folder: Path, name: str) -> None:
    (folder / name).rename(folder.parent / name)
    (folder / name).symlink_to(folder.parent / name)


def _another(folder: Path) -> None:
    """A file and a folder of another network, of the same class and with the same config."""
    weights = _weights(folder)
    weights["encoder.conv_in.weight"] = torch.zeros(9, 1, 3, 3)
    safetensors.torch.save_file(weights, folder / WEIGHTS)


# how it is broken, what is said, and whether the sha256 in params is that of the file that is there
BROKEN: dict[str, tuple[Callable[[Path], Any], str, bool]] = {
    "no folder": (lambda folder: shutil.rmtree(folder), "is no folder: expected one with config.json", False),
    "a file": (lambda folder: (shutil.rmtree(folder), folder.write_text("x")), "is no folder", False),
    "missing config": (lambda folder: (folder / "config.json").unlink(), "has no config.json: expected it beside", True),
    "half a config": (lambda folder: _half(folder / "config.json"), "config.json is no whole JSON", True),
    "config is a list": (lambda folder: (folder / "config.json").write_text("[]"), r"is of \[\]: expected one of", True),
    "a class of other things": (lambda folder: _json(folder, _class_name="UNet2DModel"), "is of 'UNet2DModel': expected", True),
    "another of the classes": (
        lambda folder: shutil.copy(folder.parent / "tiny/config.json", folder),
        "says class_name AutoencoderTiny, but params.yaml network.class_name AutoencoderKL",
        True,
    ),
    "a future version": (
        lambda folder: _json(folder, _diffusers_version="9.0", rotary=True),
        "written by diffusers '9.0', is not as this version knows it: rotary: unknown key.*Update tessera",
        True,
    ),
    "a value of the future": (lambda folder: _json(folder, act_fn="swirl"), "act_fn: .*got 'swirl'", True),
    "another shape": (lambda folder: _json(folder, layers_per_block=3), "says layers_per_block 3, but .* 1", True),
    "levels that differ": (
        lambda folder: _json(folder, block_out_channels=[8, 16, 16]),
        "block_out_channels has 3, down_block_types has 2.*expected equal lengths",
        True,
    ),
    "missing weights": (lambda folder: (folder / WEIGHTS).unlink(), f"has no {WEIGHTS}: expected it", False),
    "pickled weights": (
        lambda folder: _pickled(folder, "diffusion_pytorch_model.bin"),
        "has diffusion_pytorch_model.bin, a pickle, which is never opened, but no",
        False,
    ),
    "a pickle of the right name": (lambda folder: _pickled(folder, WEIGHTS), "is a pickle or a zip", True),
    "half a file": (lambda folder: _half(folder / WEIGHTS), "has sha256 .* expected .*: get the file again", False),
    "an altered file": (_another, "has sha256", False),
    "weights of another network": (_another, r"encoder.conv_in.weight has shape \(9, 1, 3, 3\), expected \(8, 1, 3, 3\)", True),
    "weights by a link out of it": (lambda folder: _link_out(folder, WEIGHTS), "leads out of", True),
    "config by a link out of it": (lambda folder: _link_out(folder, "config.json"), "leads out of", True),
}  # fmt: skip
OPENED = (
    "a pickle of the right name",
    "weights of another network",
)  # the file that was meant, and it holds something else


@pytest.mark.parametrize("what", BROKEN)
def test_a_folder_that_is_not_the_one_that_was_meant_is_one_sentence(
    what: str, folders: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(folders / "kl", tmp_path / "kl")
    shutil.copytree(folders / "tiny", tmp_path / "tiny")
    before, (breaks, told, is_hash_of_now) = settings(tmp_path / "kl", "kl"), BROKEN[what]
    breaks(tmp_path / "kl")
    all_params = params(folders, kl=settings(tmp_path / "kl", "kl") if is_hash_of_now else before)
    config = all_params.tokenizers["kl"]
    opened = []
    monkeypatch.setattr(checkpoints.safetensors.torch, "load_file", lambda path: opened.append(path) or {})
    planned = known_images.planned(all_params, SPEC, {split: np.arange(60) % 3 for split in ("train", "test")})
    found = [one for one in problems.problems(all_params, planned) if one.startswith("tokenizers.kl: ")]
    if what in OPENED:
        assert found == []
        monkeypatch.undo()
    else:
        assert len(found) == 1 and opened == []
    with pytest.raises(ValueError, match=told) as caught:
        filled(config)
    assert len(str(caught.value).splitlines()) == 1 and opened == []
    assert found in ([], [f"tokenizers.kl: {caught.value}"])
    later = problems.problems(all_params, planned, is_begin=False)
    assert not [one for one in later if one.startswith("tokenizers.kl: ")]  # what was made of it stands


def test_an_estimate_leaves_out_what_is_not_trained(folders: Path) -> None:
    training = {"num_steps": 3, "batch_size": 2}
    kl, vq = settings(folders / "kl", "kl"), settings(folders / "vq", "vq", training=training)
    all_params = params(folders, kl=kl, vq=vq)
    planned = known_images.planned(all_params, SPEC, {split: np.arange(60) % 3 for split in ("train", "test")})
    found = [one.entry for one in estimate.of_run(all_params, planned, seconds=0.01).trainings]
    assert [one for one in found if "tokenizer" in one] == ["train_tokenizer@vq"]


@pytest.mark.parametrize(
    ("spec", "told"),
    [
        ({"channels": 3}, "the images have channels 3, but this AutoencoderKL takes 1"),
        ({"height": 15}, "images of 15x8 are not divisible by the downsampling of 2 of this AutoencoderKL"),
    ],
)
def test_images_that_the_network_cannot_take_are_told_before_anything_runs(
    spec: dict, told: str, folders: Path
) -> None:
    all_params = params(folders)
    planned = known_images.planned(
        all_params, SPEC.model_copy(update=spec), {split: np.arange(60) % 3 for split in ("train", "test")}
    )
    assert any(one.startswith("tokenizers.kl: ") and told in one for one in problems.problems(all_params, planned))


@pytest.mark.parametrize(
    ("name", "changes", "told"),
    [
        ("kl", {"network": {"class_name": "AutoencoderOobleck"}}, "class_name is 'AutoencoderOobleck': expected a mapping"),
        ("kl", {"network": network("kl") | {"norm_groups": 4}}, "norm_groups: unknown key; did you mean 'norm_num_groups'"),
        ("kl", {"network": network("kl") | {"out_channels": 3}}, "out_channels 3 differs from in_channels 1"),
        ("dc", {"network": network("dc") | {"encoder_layers_per_block": [1, 0]}}, "has a 0 after the first level"),
        ("spatial", {"network": network("spatial") | {"vq_embed_dim": 2}}, "vq_embed_dim 2 with norm_type spatial"),
        ("kl", {"quantizer": {"kind": "fsq"}}, "AutoencoderKL takes quantizer identity, not fsq"),
        ("vq", {"quantizer": {"kind": "identity"}}, "has kind identity, expected vector"),
        ("vq", {"quantizer": {"kind": "vector", "codebook_size": 32, "code_dim": 2}}, "has init data, expected uniform"),
        ("kl", {"patch_size": 4}, "patch_size: unknown key"),
        ("kl", {"training": {"optimizer": "muon"}}, "write training.optimizer: adamw"),
        ("kl", {"sha256": "abc"}, "sha256: "),
    ],
)  # fmt: skip
def test_settings_that_cannot_be_meant_are_one_sentence(name: str, changes: dict, told: str, folders: Path) -> None:
    with pytest.raises(InvalidParams, match=told) as caught:
        configured(folders / name, name, **changes)
    assert len(str(caught.value).splitlines()) == 1


def test_what_diffusers_itself_refuses_is_a_sentence_too(folders: Path) -> None:
    config = configured(folders / "kl", "kl", network=network("kl") | {"norm_num_groups": 7})
    with pytest.raises(ValueError, match=r"cannot build this AutoencoderKL .*divisible by num_groups"):
        tokenizer.Model(config, SPEC)


def test_without_diffusers_the_sentence_says_how_to_get_it(folders: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "diffusers", None)
    with pytest.raises(MissingPackage, match=r"pip install 'tessera\[pretrained\]'"):
        tokenizer.Model(configured(folders / "kl", "kl"), SPEC)


@pytest.mark.parametrize("name", ["kl", "vq"])
def test_the_lines_that_are_printed_for_a_folder_are_its_settings(name: str, folders: Path, capsys) -> None:
    assert published.main([str(folders / name)]) == 0
    said = capsys.readouterr().out
    assert said.startswith("for params.yaml:\n")
    ((key, found),) = yaml.safe_load(said.partition("\n")[2])["tokenizers"].items()
    assert key == name and parse(tokenizer.Config, found) == configured(folders / name, name)
    assert published.main([str(folders)]) == 2
    assert "has no config.json" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "key", "value"),
    [
        ("kl", "block_out_channels", [65_536, 65_536]),
        ("kl", "layers_per_block", 256),
        ("vq", "num_vq_embeddings", 2**22),
        ("tiny", "num_encoder_blocks", [256, 256, 256]),
        ("dc", "decoder_layers_per_block", [0, 256]),
    ],
)
def test_an_artifact_of_a_network_larger_than_its_weights_is_refused_before_it_is_built(
    name: str, key: str, value: Any, folders: Path, tmp_path: Path
) -> None:
    config = configured(folders / name, name)
    with artifact.create(tmp_path / name) as place:
        checkpoints.save(place, "tokenizers", config, SPEC, filled(config).model, "code")
        described = json.loads((place / "config.json").read_text())
        described["config"]["network"][key] = value
        if name == "vq":
            described["config"]["quantizer"]["codebook_size"] = value
        (place / "config.json").write_text(json.dumps(described))
    began = time.monotonic()
    with pytest.raises(artifact.ArtifactError, match="describes no network that its weights could fill"):
        checkpoints.load_model(tmp_path / name, "tokenizers")
    assert time.monotonic() - began < 5

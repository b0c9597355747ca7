"""Drawing, encoding and editing in bfloat16: near what float32 gives, recorded, and nothing to those who do not ask for it."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from test_validation import SYSTEMS, Setting
from torch import nn

from stages import edit_images, encode_tokens, reference_stats, sample_images, train_features, train_prior
from studio import edit as studio_edit
from tessera import params as all_params
from tessera import seeding
from tessera.artifacts import folder as artifact
from tessera.artifacts import images as image_artifact
from tessera.artifacts import tokens as token_artifact
from tessera.artifacts.images import to_float, to_uint8
from tessera.artifacts.samples import Samples
from tessera.code import entries
from tessera.components import kinds, load, parse, sampling_schema
from tessera.evaluation import figures
from tessera.evaluation.reconstructions import Codes
from tessera.nn.precision import in_precision
from tessera.priors import flow_matching
from tessera.running.job import Job
from tessera.system import System
from tessera.tracking.served_model import ServedImages, _png

ROOT = Path(__file__).parents[2]
TRAINING = {"num_steps": 10, "batch_size": 16, "learning_rate": 0.01}
TOKENIZER = {
    "kind": "vqvae",
    "quantizer": {"kind": "simvq", "codebook_size": 16, "code_dim": 4},
    "patch_size": 4,
    "channels": 16,
    "num_blocks": 1,
    "training": TRAINING | {"num_steps": 30},
}
UNET = {"kind": "unet", "channels": 8, "channel_multipliers": [1], "num_blocks": 1, "patch_size": 2}
DIFFUSION = {"kind": "diffusion", "denoiser": UNET, "training": TRAINING}
TRAINED = SYSTEMS | {
    "flow": SYSTEMS["flow"] | {"tokenizer": "vqvae"},
    "diffusion": {"tokenizer": "none", "prior": DIFFUSION},
}
LABELS = np.arange(60) % 3
GRAY_LEVELS = 4  # of 256, by which a pixel may differ that is decoded from equal tokens, or drawn without a codebook
MOST = 0.9  # the share of indices that are equal, and of pixels within GRAY_LEVELS where latents are quantized after drawing


class Checkout(Setting):
    """A tokenizer that has learnt its images, and priors that have begun to."""

    def system(self, name: str) -> System:
        out = self.folder / "priors" / name
        if not out.is_dir():
            system = TRAINED[name] | {"prior": TRAINED[name]["prior"] | {"training": TRAINING}}
            self.train(out.parent / f"{name}.files", name, system=system).out.rename(out)
        return System.read(self.folder / "tokenizers" / TRAINED[name]["tokenizer"], out, name)

    def asking(self, name: str, sampling: dict[str, Any] | None = None, **encoding: Any) -> all_params.Pipeline:
        raw = self.params({name: TRAINED[name] | {"sampling": sampling or {}}}).model_dump(mode="json")
        raw["sample_images"] = {"num_images": 30, "batch_size": 16}
        raw["encode_tokens"] |= encoding
        raw["dataset"] = {"kind": "image_folder", "source": "none", "height": 16, "width": 8, "channels": 1}
        raw["features"] = {"random": {"kind": "random"}}
        raw["edits"] = {edit: raw["edits"][edit] for edit in ("inpaint", "variations", "denoise")}
        raw["edit_images"] = {"num_images": 6, "num_seeds": 1, "batch_size": 6}
        return parse(all_params.Pipeline, raw)


@pytest.fixture(scope="module")
def checkout(tmp_path_factory, images_folder) -> Checkout:
    return Checkout(tmp_path_factory.mktemp("precision"), images_folder, TOKENIZER)


def seeded() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def sampling(name: str, **settings: Any) -> Any:
    return sampling_schema(TRAINED[name]["prior"]["kind"])(**settings)


def tokens_of(system: System, settings: Any) -> torch.Tensor:
    return system.prior.sample(torch.from_numpy(LABELS), settings, seeded())


def images_of(checkout: Checkout) -> torch.Tensor:
    return to_float(image_artifact.read(checkout.images)[1]["test"].uint8(np.arange(24)))


def near(one: np.ndarray, other: np.ndarray) -> float:
    """The share of pixels within GRAY_LEVELS of each other, of images that are not the same."""
    assert not np.array_equal(one, other)
    return (np.abs(one.astype(int) - other.astype(int)) <= GRAY_LEVELS).mean()


@pytest.mark.parametrize("name", TRAINED)
def test_a_copy_in_bf16_gives_the_bits_of_autocast_over_the_whole_model(checkout, name):
    """PyTorch's own context is what it is compared with: rounding the weights beforehand, and their layout, change nothing."""
    system, images = checkout.system(name), images_of(checkout)
    copy = system.computing_in("bf16")
    assert copy.computing_in("bf16") is copy and copy.computing_in("fp32") is copy
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        tokens = tokens_of(system, sampling(name))
        expected = (tokens, system.decode(tokens), system.encode(images))
    found = (tokens_of(copy, sampling(name)), copy.decode(tokens), copy.encode(images))
    for one, other in zip(found, expected, strict=True):
        assert one.dtype in (torch.int64, torch.float32) and torch.equal(one, other)


@pytest.mark.parametrize("name", TRAINED)
def test_images_in_bf16_are_nearly_those_in_fp32_and_fp32_is_the_plain_model(checkout, name):
    system = checkout.system(name)
    plain = tokens_of(system, load("priors", TRAINED[name]["prior"]["kind"]).Sampling())  # knows no precision
    expected = to_uint8(system.decode(plain)).numpy()
    assert system.computing_in("fp32") is system
    assert np.array_equal(system.draw(LABELS, sampling(name), seeded()), expected)
    drawn = system.draw(LABELS, sampling(name, precision="bf16"), seeded())
    assert np.array_equal(system.draw(LABELS, sampling(name), seeded()), expected)  # of the same object, afterwards
    if system.learns == "indices":
        rounded = tokens_of(system.computing_in("bf16"), sampling(name))
        assert (rounded == plain).float().mean() > MOST
        drawn = to_uint8(system.computing_in("bf16").decode(plain)).numpy()
    assert near(drawn, expected) == 1 if name != "flow" else near(drawn, expected) > MOST


def test_of_a_tokenizer_indices_are_mostly_equal_and_its_codes_stay_float32(checkout):
    system, images = checkout.system("masked"), images_of(checkout)
    copy, indices = system.computing_in("bf16"), system.encode(images)
    assert len(indices.unique()) > 4 and (copy.encode(images) == indices).float().mean() > MOST
    latents = system.encode_latents(images)
    assert {tensor.dtype for tensor in copy.tokenizer.quantizer.state_dict().values()} == {torch.float32}
    assert torch.equal(copy.quantize(latents), system.quantize(latents))
    expected = system.tokenizer.quantizer(latents).codes  # within what is called under autocast, too
    seen = []
    copy.tokenizer.decoder.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    copy.decode_latents(latents)
    assert torch.equal(seen[0], expected)


class Part(nn.Module):
    """What a prior of somebody else's may look like."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x)

    def brand_new_ability(self, x: torch.Tensor) -> tuple[torch.Tensor, bool, bool]:
        within = torch.is_autocast_enabled("cpu")
        return self(x), within, self._own()

    def _own(self) -> bool:
        return torch.is_autocast_enabled("cpu")


def test_every_public_method_computes_in_bf16_and_what_is_between_the_calls_does_not():
    part, x = Part(), torch.rand(5, 3)
    copy = in_precision(part, "bf16")
    for found, *within in (copy.brand_new_ability(x), (copy(x), True, True)):
        assert found.dtype == torch.bfloat16 and within == [True, True]
    assert not torch.is_autocast_enabled("cpu") and part.layer.weight.dtype == torch.float32
    assert part.brand_new_ability(x)[0].dtype == torch.float32
    none = load("tokenizers", "none")
    pixels = none.Model(none.Config(quantizer={"kind": "identity"}), SimpleNamespace(channels=1, height=2, width=2))
    assert in_precision(pixels, "bf16") is pixels  # without a network there is nothing to round


def drawn_by_the_stage(
    checkout: Checkout, place: Path, name: str, settings: dict[str, Any], said: list[str]
) -> Samples:
    params, job = checkout.asking(name, settings), Job(f"sample_images@{name}", place / "state")
    job.say = said.append
    checkout.system(name)
    tokenizer, prior = (
        checkout.folder / part for part in (f"tokenizers/{TRAINED[name]['tokenizer']}", f"priors/{name}")
    )
    sample_images.run(params, name, tokenizer, prior, place / "samples", place / "samples.png", job)
    return Samples(place / "samples", image_artifact.read(checkout.images)[0])


def test_samples_say_their_precision_and_in_fp32_nothing(checkout, tmp_path):
    plain = drawn_by_the_stage(checkout, tmp_path / "plain", "flow", {"num_steps": 3}, [])
    default = drawn_by_the_stage(checkout, tmp_path / "fp32", "flow", {"num_steps": 3, "precision": "fp32"}, [])
    rounded = drawn_by_the_stage(checkout, tmp_path / "bf16", "flow", {"num_steps": 3, "precision": "bf16"}, [])
    assert rounded.meta["sampling"] == plain.meta["sampling"] | {"precision": "bf16"}
    manifests = [(tmp_path / name / "samples/manifest.json").read_bytes() for name in ("plain", "fp32")]
    assert default.meta == plain.meta and "precision" not in plain.meta["sampling"] and manifests[0] == manifests[1]
    assert near(rounded.pixels.all(), plain.pixels.all()) > MOST


@pytest.mark.parametrize(("has_bf16", "asked"), [(False, "bf16"), (True, "bf16"), (False, "fp32")])
def test_bf16_on_a_processor_without_it_is_called_slow(checkout, tmp_path, monkeypatch, capsys, has_bf16, asked):
    system, settings = checkout.system("flow"), {"num_steps": 1, "precision": asked}
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx2": True, "amx_bf16": has_bf16})
    sentence, told = "no bf16 instructions: precision fp32 is many times faster", []
    drawn_by_the_stage(checkout, tmp_path, "flow", settings, said := [])
    told.append(any(sentence in line for line in said))
    encoded_by_the_stage(checkout, tmp_path, asked, said := [])
    told.append(any(sentence in line for line in said))
    studio_edit.draw(system, studio_edit.to_draw(checkout.asking("flow", settings), "flow"))
    told.append(sentence in capsys.readouterr().err)
    assert told == [asked == "bf16" and not has_bf16] * 3


def edited_by_the_stage(checkout: Checkout, place: Path, settings: dict[str, Any]) -> tuple[Path, figures.Measured]:
    params, images, judge = checkout.asking("flow", settings), checkout.images, checkout.folder / "features" / "random"
    checkout.system("flow")
    if not judge.is_dir():
        curve, metrics = judge.with_suffix(".csv"), judge.with_suffix(".json")
        train_features.run(params, "random", images, judge, curve, metrics, Job("f", place / "f"))
        reference_stats.run(
            params, "random", images, judge, checkout.folder / "reference/random", Job("r", place / "r")
        )
    edit_images.run(
        params, "flow", images, judge.parent, checkout.folder / "reference", checkout.folder / "tokenizers/vqvae",
        checkout.folder / "priors/flow", place / "edits", place / "edits.png", place / "edits.json", Job("e", place / "e"),
    )  # fmt: skip
    return artifact.check(place / "edits"), figures.read(place / "edits.json")


def test_edits_are_made_in_the_precision_of_the_sampling_and_say_so(checkout, tmp_path):
    settings = {"num_steps": 3}
    plain, measured = edited_by_the_stage(checkout, tmp_path / "fp32", settings)
    rounded, measured_of_it = edited_by_the_stage(checkout, tmp_path / "bf16", settings | {"precision": "bf16"})
    metas = [artifact.read_json(folder / "meta.json") for folder in (plain, rounded)]
    assert metas[1] == metas[0] | {"precision": "bf16"} and "precision" not in metas[0]
    assert measured_of_it.drawn == measured.drawn | {"precision": "bf16"}
    changed = measured_of_it.groups["inpaint"]["changed_known_pixels"]
    assert changed.value == 0  # what is put back went through no network
    for edit in ("inpaint", "variations", "denoise"):
        psnr = [one.groups[edit]["edit_psnr_db"].value for one in (measured, measured_of_it)]
        assert psnr[0] != psnr[1] and psnr[0] == pytest.approx(psnr[1], abs=0.5)
    images = [np.load(folder / "variations-00000.npy") for folder in (plain, rounded)]
    assert near(*images) > MOST


def test_the_studio_and_its_command_keep_to_the_precision(checkout):
    system, params = checkout.system("flow"), checkout.asking("flow", {"num_steps": 3, "precision": "bf16"})
    asked = studio_edit.to_draw(params, "flow", count=12)
    assert asked.command() == "python -m studio.edit --system flow --sample --count 12 out.png"
    plain = studio_edit.to_draw(params, "flow", {"precision": "fp32"}, count=12)
    assert """ --sampling 'precision="fp32"' """ in plain.command()
    assert near(*(studio_edit.draw(system, one)[1] for one in (asked, plain))) > MOST
    picture = Image.fromarray(image_artifact.read(checkout.images)[1]["test"].uint8(np.array([0]))[0, 0].numpy())
    edited = [
        studio_edit.edit(system, studio_edit.request(params, "flow", "variations", None, changed), params, picture)
        for changed in (None, {"precision": "fp32"})
    ]
    assert near(*map(np.asarray, edited)) > MOST


def test_a_served_model_draws_in_the_precision_that_was_evaluated(checkout):
    system, images = checkout.system("flow"), {}
    folders = {"tokenizer": checkout.folder / "tokenizers/vqvae", "prior": checkout.folder / "priors/flow"}
    for chosen in ("fp32", "bf16"):
        settings = sampling("flow", num_steps=3, precision=chosen)
        model = ServedImages()
        model.load_context(
            SimpleNamespace(artifacts=folders, model_config={"sampling": settings.model_dump(mode="json")})
        )
        images[chosen] = model._draw([0, 1, 2], None, 1, model.settings)["images"]
        generator = seeding.generator(1, "serve", device=system.device)
        assert images[chosen] == [_png(one) for one in system.draw(np.arange(3), settings, generator)]
    assert images["fp32"] != images["bf16"]


def test_validations_draw_in_the_precision_of_follow_training(checkout, tmp_path, monkeypatch):
    seen, sample = [], flow_matching.Model.sample

    def watched(self, labels, sampling, generator):
        seen.append((torch.is_autocast_enabled("cpu"), next(self.denoiser.transformer.parameters()).dtype))
        return sample(self, labels, sampling, generator)

    monkeypatch.setattr(flow_matching.Model, "sample", watched)
    asked = ({"every": 5}, {"every": 5, "precision": "bf16"})
    trained = [checkout.train(tmp_path / str(len(one)), "flow", system=TRAINED["flow"], **one) for one in asked]
    assert [within for within, _ in seen] == [False, True]
    assert all(torch.equal(value, trained[1].weights[name]) for name, value in trained[0].weights.items())
    one, other = (each.validations.follow_fd_test.iloc[0] for each in trained)
    assert one != other and one == pytest.approx(other, rel=0.05)


def encoded_by_the_stage(checkout: Checkout, place: Path, precision: str, said: list[str]) -> Path:
    job = Job("encode_tokens@vqvae", place / "state")
    job.say = said.append
    tokenizer = checkout.folder / "tokenizers/vqvae"
    encode_tokens.run(
        checkout.asking("masked", precision=precision), "vqvae", checkout.images, tokenizer, place / "tokens", job
    )
    return place / "tokens"


def test_tokens_of_a_bf16_encoder_are_mostly_equal_and_say_so_wherever_they_are_measured(checkout, tmp_path):
    folders = checkout.folder / "tokens/vqvae", encoded_by_the_stage(checkout, tmp_path, "bf16", [])
    metas = [artifact.read_json(folder / "meta.json") for folder in folders]
    assert metas[0].keys() == {"spec", "num_views"} and metas[1]["precision"] == "bf16"
    plain, rounded = (token_artifact.read(folder, "indices")[1]["train"] for folder in folders)
    assert (rounded.values.all() == plain.values.all()).mean() > MOST
    assert rounded.encoding == {"precision": "bf16"} and plain.encoding == {}
    assert Codes(folders[1], 16, "tiny").protocol().settings == {"precision": "bf16"}
    params, prior = checkout.asking("masked"), checkout.system("masked").prior
    for folder, settings in zip(folders, ({}, {"precision": "bf16"}), strict=True):
        found = train_prior.held_out_figures(params, "masked", prior, token_artifact.read(folder, "indices")[1])
        protocols = [protocol.settings for protocol in found.protocols.values()]
        assert [one.keys() - {"prior", "tokenizer"} for one in protocols] == [settings.keys()] * len(protocols)


@pytest.mark.parametrize("path", ["systems.vqgan-flow.sampling", "encode_tokens", "follow_training"])
def test_a_precision_that_nobody_sets_changes_no_entry_of_the_graph(path):
    """What dvc.lock of before holds stays what it is; and with one set, only those entries differ that draw by it."""
    raw = yaml.safe_load((ROOT / "params.yaml").read_text())

    def settings() -> dict[str, Any]:
        graph = entries.read(parse(all_params.Pipeline, raw), ROOT / "dvc.yaml")
        return {entry.name: {key: entries.plain(value) for key, value in entry.params.items()} for entry in graph}

    def changed() -> set[str]:
        about_all = {"compare_systems", "write_report"}  # seconds
        return {name for name, now in settings().items() if now != before[name]} - about_all

    before, section = settings(), raw
    unwritten = [value for entry in before.values() for key, value in entry.items() if key == path]
    assert unwritten and "precision" not in str(unwritten) and "latents_dtype" not in str(unwritten)
    for step in path.split("."):
        section = section[step]
    section["precision"] = "fp32"
    assert changed() == set()
    section["precision"] = "bf16"
    expected = {
        "systems.vqgan-flow.sampling": {"sample_images@vqgan-flow", "edit_images@vqgan-flow"},
        "encode_tokens": {f"encode_tokens@{name}" for name in raw["tokenizers"]},
        "follow_training": {f"train_prior@{name}" for name in raw["systems"]},
    }
    assert changed() == expected[path]


@pytest.mark.parametrize("kind", kinds("priors"))
def test_every_prior_is_sampled_in_a_precision_that_its_file_does_not_know(kind):
    schema, own = sampling_schema(kind), load("priors", kind).Sampling
    assert "precision" not in own.model_fields and set(schema.model_fields) == {*own.model_fields, "precision"}
    assert schema().model_dump() == own().model_dump() and schema(precision="bf16").model_dump()["precision"] == "bf16"
    assert list(entries.modules_of(schema())) == [f"tessera.priors.{kind}"]  # whose code decides
    with pytest.raises(ValueError, match=r"precision: input should be 'fp32' or 'bf16', got 'fp16'"):
        parse(schema, {"precision": "fp16"})

"""Mistakes in params.yaml: each is one sentence that says where, what was expected and what to do, before any work."""

import copy
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tessera.components import InvalidParams, kinds
from tessera.params import read

ROOT = Path(__file__).parents[2]
GOOD = yaml.safe_load((ROOT / "params.yaml").read_text())
PRESETS = [ROOT / "params.yaml", *sorted((ROOT / "presets").glob("*.yaml"))]
AUTOREGRESSIVE = "systems.vqgan-autoregressive.prior"
IMAGES = {"kind": "image_folder", "source": "images", "height": 8, "width": 8}


def changed(path: str, value) -> dict:
    """The default params with one value replaced; keys are separated by dots."""
    params = copy.deepcopy(GOOD)
    *above, last = path.split(".")
    target = params
    for key in above:
        target = target[key]
    if value is Ellipsis:
        del target[last]
    else:
        target[last] = value
    return params


def written(folder: Path, params) -> Path:
    path = folder / "params.yaml"
    path.write_text(yaml.safe_dump(params, sort_keys=False))
    return path


@pytest.mark.parametrize("path", PRESETS, ids=lambda path: path.name)
def test_every_committed_params_file_is_valid(path):
    assert read(path).systems


WRONG = [
    (f"{AUTOREGRESSIVE}.depht", 3, r"prior\.depht: unknown key; did you mean 'depth'\?"),
    (
        "tokenizers.vqgan.quantizer.codebok_size",
        3,
        r"quantizer\.codebok_size: unknown key; did you mean 'codebook_size'\?",
    ),
    ("sede", 0, r"sede: unknown key; did you mean 'seed'\?"),
    (
        "dataset",
        IMAGES | {"metadata": {"pictures": "mask"}},
        r"dataset\.metadata\.pictures: unknown key; did you mean 'picture'\? \(known keys: attributes, captions, ",
    ),
    (
        "systems.vqgan-flow.prior.guide",
        {"snapshot_at": 0.5, "a.b": 1},
        r"prior\.guide\.a\.b: unknown key \(known keys: snapshot_at\)",
    ),
    (
        "systems.vqgan-flow.prior.condition",
        {"kind": "image", "pixels": [8, 8], "show": "edges"},
        r"prior\.condition\.show: unknown key; did you mean 'shows'\?",
    ),
    (
        "features.words",
        {"kind": "image_text", "captions": {"max_byte": 9}},
        r"words\.captions\.max_byte: unknown key; did you mean 'max_bytes'\?",
    ),
    ("systems.vqgan-flow.sampling.num_step", 3, r"sampling\.num_step: unknown key; did you mean 'num_steps'\?"),
    ("tokenizers.vqgan.kind", "vqgann", r"there is no tessera/tokenizers/vqgann\.py.*did you mean 'vqgan'\?"),
    ("tokenizers.vqgan.quantizer.kind", "fqs", r"there is no tessera/quantizers/fqs\.py: choose one of"),
    (f"{AUTOREGRESSIVE}.kind", ..., r"expected a mapping with the key 'kind'"),
    (f"{AUTOREGRESSIVE}.depth", "6", r"prior\.depth: .*integer, got '6'"),
    (f"{AUTOREGRESSIVE}.depth", 0, r"prior\.depth: .*greater than or equal to 1, got 0"),
    (f"{AUTOREGRESSIVE}.depth", True, r"prior\.depth: .*integer, got True"),
    (f"{AUTOREGRESSIVE}.dropout", 1.5, r"prior\.dropout: .*less than or equal to 1, got 1\.5"),
    (f"{AUTOREGRESSIVE}.dropout", float("nan"), r"prior\.dropout: "),
    (f"{AUTOREGRESSIVE}.heads", 5, r"width 96 over heads 5 must be a multiple of 4"),
    (f"{AUTOREGRESSIVE}.training.num_steps", ..., r"training\.num_steps: this key is missing"),
    (f"{AUTOREGRESSIVE}.training.precision", "fp8", r"training\.precision: .*'fp32' or 'bf16'"),
    ("seed", -1, r"seed: .*greater than or equal to 0"),
    ("systems", {}, r"systems: .*at least 1"),
    ("tokenizers.vqgan.patch_size", 3, r"tokenizer vqgan: images of 8x8 are not divisible by its downsampling of 3"),
    (
        "dataset",
        {"kind": "image_folder", "source": "x", "height": 8, "width": 9},
        r"tokenizer vqvae: images of 8x9 are not divisible by its downsampling of 2",
    ),
    (
        "systems.vqgan-flow.tokenizer",
        "vqgna",
        r"system vqgan-flow: there is no tokenizer 'vqgna', only vqvae, vqgan, none",
    ),
    (
        "tokenizers.vqgan.quantizer",
        {"kind": "identity"},
        r"system vqgan-autoregressive: prior autoregressive models indices",
    ),
    ("encode_tokens.store_latents", False, r"system vqgan-flow: .*set encode_tokens\.store_latents: true"),
    (
        "encode_tokens",
        GOOD["encode_tokens"] | {"store_latents": False, "latents_dtype": "float16"},
        r"encode_tokens: latents_dtype float16 needs store_latents: true; set it, or leave out the dtype",
    ),
    (
        "systems.vqgan-flow.sampling.precision",
        "half",
        r"sampling\.precision: input should be 'fp32' or 'bf16', got 'half'",
    ),
    ("systems.gan.sampling.precison", "bf16", r"sampling\.precison: unknown key; did you mean 'precision'\?"),
    ("tokenizers.vqgan.perceptual", "lpips", r"lpips needs lpips_weights"),
    ("tokenizers.VQ_GAN", GOOD["tokenizers"]["vqgan"], r"'VQ_GAN' is no valid name"),
    (
        "follow_training.features",
        GOOD["features"]["classifier"],
        r"follow_training: features classifier are trained by the pipeline, and every prior would train again",
    ),
    ("follow_training.criterion", "frechet", r"criterion frechet chooses among looks, and with every 0 there are none"),
    (
        "follow_training",
        {"every": 5, "criterion": "validation_loss"},
        r"system gan: prior gan has no loss of validation images, by which follow_training\.criterion validation_loss would",
    ),
    ("follow_training.validation_share", 1.0, r"validation_share: .*less than 1, got 1\.0"),
    ("follow_training.evry", 5, r"follow_training\.evry: unknown key; did you mean 'every'\?"),
    ("follow_training.features", {"kind": "inception", "weights": "x"}, r"features\.sha256: this key is missing"),
    ("dataset.kind", "imagenet", r"there is no tessera/datasets/imagenet\.py: choose one of cifar10"),
]


METRICS = GOOD["evaluate"]["metrics"]
OLD = {
    "kernel_subset": 300,
    "num_kernel_subsets": 20,
    "max_neighbor_images": 10000,
    "perturbation_share": 0.1,
    "perturbation_neighbors": 8,
}  # the section before metrics had entries
WRONG += [
    ("evaluate.metrics.kernel.subst", 3, r"metrics\.kernel\.subst: unknown key; did you mean 'subset'\?"),
    ("evaluate.metrics.kernel.subset", 1, r"metrics\.kernel\.subset: .*greater than or equal to 2, got 1"),
    ("evaluate.metrics.kernel.kind", "kernal", r"there is no tessera/metrics/kernal\.py.*did you mean 'kernel'\?"),
    ("evaluate.metrics", ..., r"evaluate\.metrics: this key is missing"),
    ("evaluate.metrics", {**METRICS, "more": METRICS["kernel"]}, r"metrics kernel and more are both of kind kernel"),
    ("evaluate.metrics", {"kernel": METRICS["kernel"]}, r"metrics has no entry of kind frechet"),
    ("evaluate.metrics.lpips", {"kind": "lpips"}, r"metrics\.lpips\.weights: this key is missing"),
    (
        "evaluate.kernel_subset",
        300,
        r"evaluate: kernel_subset belong to entries of metrics now: kernel: \{kind: kernel",
    ),
    (
        "evaluate",
        {**OLD, "kernel_subset": 1},
        r"evaluate\.metrics\.kernel\.subset: .*greater than or equal to 2, got 1",
    ),
    ("evaluate", {**OLD, "perturbation": 1}, r"evaluate\.perturbation: unknown key"),
]


@pytest.mark.parametrize(("path", "value", "message"), WRONG, ids=[f"{path}={value!r:.20}" for path, value, _ in WRONG])
def test_a_mistake_is_told_in_a_sentence(tmp_path, path, value, message):
    with pytest.raises(InvalidParams, match=message) as error:
        read(written(tmp_path, changed(path, value)))
    assert len(str(error.value)) < 700


PACKAGED, FILE = {}, {"network": "resnet18", "weights": "w.safetensors", "sha256": "0" * 64}


@pytest.mark.parametrize(
    ("trains", "judges", "refused"),
    [
        (PACKAGED, {"timm": PACKAGED}, "tf_efficientnet_lite0"),
        (FILE, {"a": FILE, "b": FILE | {"layer": -1}}, "resnet18"),
        (PACKAGED, {"timm": FILE | {"network": "tf_efficientnet_lite0"}}, "tf_efficientnet_lite0"),  # may be the same
        (PACKAGED, {"timm": PACKAGED, "other": FILE}, None),
        (FILE, {"timm": FILE | {"sha256": "1" * 64}}, None),
        (FILE, {"timm": PACKAGED}, None),
    ],
)
def test_the_network_that_trains_a_tokenizer_is_not_its_only_judge(tmp_path, trains, judges, refused):
    params = changed("tokenizers.vqgan.perceptual", {"kind": "features", **trains})
    params["features"] = {name: {"kind": "timm", **judge} for name, judge in judges.items()}
    if refused is None:
        assert read(written(tmp_path, params)).features.keys() == judges.keys()
        return
    names = ", ".join(judges)
    sentence = rf"tokenizer vqgan is trained to please {refused}, .* its only judge \(features {names}\): add"
    with pytest.raises(InvalidParams, match=sentence):
        read(written(tmp_path, params))


def test_params_of_before_metrics_had_entries_mean_what_they_did(tmp_path):
    """A user who updates keeps the file that everything was trained by."""
    old = read(written(tmp_path, {**GOOD, "evaluate": OLD}))
    new = read(ROOT / "params.yaml")
    kernel = old.evaluate.metrics["kernel"]
    assert (kernel.subset, kernel.num_subsets) == (300, 20)  # they mean nothing now, and evaluate says so
    newer = {"kernel": new.evaluate.metrics["kernel"], "nearest-real": new.evaluate.metrics["nearest-real"]}
    metrics = {**old.evaluate.metrics, **newer}
    assert old.model_copy(update={"evaluate": old.evaluate.model_copy(update={"metrics": metrics})}) == new
    assert [config.kind for config in old.evaluate.metrics.values()] == [
        config.kind for config in new.evaluate.metrics.values() if config.kind != "nearest_real"
    ]  # tables keep the order of their columns
    file = {"lpips_weights": "vgg.safetensors", "lpips_sha256": "0" * 64}
    lpips = read(written(tmp_path, {**GOOD, "evaluate": {**OLD, **file}})).evaluate.metrics["lpips"]
    assert (lpips.kind, lpips.weights, lpips.sha256) == ("lpips", "vgg.safetensors", "0" * 64)
    empty = {"lpips_weights": "", "lpips_sha256": ""}
    assert read(written(tmp_path, {**GOOD, "evaluate": {**OLD, **empty}})) == old


def test_the_criterion_of_older_params_is_of_validation_images_now(tmp_path):
    following = {"every": 5, "criterion": "test_loss"}
    systems = {name: system for name, system in GOOD["systems"].items() if name != "gan"}
    found = read(written(tmp_path, {**GOOD, "systems": systems, "follow_training": following})).follow_training
    assert (found.criterion, found.validation_share) == ("validation_loss", 0.1)


def test_all_mistakes_are_told_at_once(tmp_path):
    params = changed(f"{AUTOREGRESSIVE}.depht", 3)
    params["seed"] = "zero"
    with pytest.raises(InvalidParams) as error:
        read(written(tmp_path, params))
    assert "depht" in str(error.value) and "seed: " in str(error.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("seed: 0\nseed: 1\n", "line 2: the key 'seed' stands there twice"),
        ("seed: !!python/object/apply:os.system ['true']\n", "no plain YAML"),
        ("- a\n- b\n", "expected a mapping with the keys seed, dataset"),
        ("seed: [0\n", "no plain YAML"),
        ("", "expected a mapping"),
    ],
)
def test_a_file_that_is_no_params_file_is_refused(tmp_path, text, message):
    path = tmp_path / "params.yaml"
    path.write_text(text)
    with pytest.raises(InvalidParams, match=message):
        read(path)


def test_a_stage_refuses_bad_params_before_touching_anything(tmp_path):
    """Even a stage that does not use the mistaken section: no training runs towards a mistake."""
    written(tmp_path, changed(f"{AUTOREGRESSIVE}.depht", 3))
    command = [sys.executable, "-m", "tessera.running", "prepare_images", "--out", "data/images"]
    environment = {"PATH": "/usr/bin:/bin", "PYTHONPATH": str(ROOT), "TESSERA_TRACKING": "off"}
    result = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert result.returncode == 2
    assert "did you mean 'depth'?" in result.stderr and "Traceback" not in result.stderr
    assert not (tmp_path / "data").exists()


keys = st.sampled_from(["seed", "dataset", "features", "tokenizers", "systems", "follow_training", "evaluate", "extra"])
plain = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 99) | st.floats(allow_nan=True) | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6) | st.just("kind"), inner, max_size=3)
    ),
    max_leaves=6,
)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])  # other tests run beside it
@given(st.dictionaries(keys, plain, max_size=3))
def test_no_input_ends_in_anything_but_a_sentence(tmp_path_factory, replaced):
    path = written(tmp_path_factory.mktemp("params"), {**GOOD, **replaced})
    try:
        read(path)
    except InvalidParams as error:
        assert str(path) in str(error)


def test_the_zoo_has_every_part():
    zoo = yaml.safe_load((ROOT / "presets/zoo.yaml").read_text())
    used = {folder: set() for folder in ("tokenizers", "quantizers", "priors", "denoisers", "conditions")}
    for tokenizer in zoo["tokenizers"].values():
        used["tokenizers"].add(tokenizer["kind"])
        used["quantizers"].add(tokenizer["quantizer"]["kind"])
    for system in zoo["systems"].values():
        used["priors"].add(system["prior"]["kind"])
        for key in ("denoiser", "condition"):
            used[f"{key}s"] |= {system["prior"].get(key, {}).get("kind")} - {None}
    used["tokenizers"].add("diffusers")  # which needs weights that nobody here has
    used["conditions"] |= {"attributes", "embedding", "image"}  # of images that digits are not: tests/e2e/test_words.py
    used["conditions"].add("text_model")  # whose weights nobody here has: tests/unit/test_text_models.py
    assert used == {folder: set(kinds(folder)) for folder in used}


def test_yaml_that_params_cannot_mean_is_told_by_its_key_and_numbers_are_those_of_yaml_1_2(tmp_path):
    text = (ROOT / "params.yaml").read_text()

    def read_with(old: str, new: str):
        (tmp_path / "params.yaml").write_text(text.replace(old, new, 1))
        return read(tmp_path / "params.yaml")

    assert (
        read_with("learning_rate: 0.002}", "learning_rate: 1e-05}").features["classifier"].training.learning_rate
        == 1e-5
    )
    for new, sentence in {
        "split_seed: 2024-05-01": "split_seed: input should be a valid integer, got '2024-05-01'",
        "split_seed: !!binary aGVsbG8=": "dataset.split_seed is of type bytes",
        "? [a, b]\n  : 0": r"line \d+: the key \['a', 'b'\] is no text",
    }.items():
        with pytest.raises(InvalidParams, match=sentence):
            read_with("split_seed: 0", new)

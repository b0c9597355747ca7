"""Settings beyond which nothing sensible happens are refused with the params, not found in black images."""

import importlib
import inspect
from typing import Annotated, Any, get_args, get_origin

import pytest
from annotated_types import Ge, Gt, Le, Lt
from test_names import FOLDERS
from test_params import GOOD, changed, written

from tessera import params as all_params
from tessera.components import InvalidParams, Params, kinds, load, parse
from tessera.params import read

PARTS = [load(folder, kind) for folder in FOLDERS for kind in kinds(folder)]
MODULES = [
    all_params,
    *PARTS,
    *map(importlib.import_module, ("tessera.bases.optimization", "tessera.bases.diagnostics", "tessera.bases.latents")),
]


def settings() -> list[type[Params]]:
    """The classes of all that params may hold."""
    found = {
        value
        for module in MODULES
        for _, value in inspect.getmembers(module, inspect.isclass)
        if issubclass(value, Params) and value is not Params and value.__module__ == module.__name__
    }
    return sorted(found, key=lambda value: (value.__module__, value.__name__))


def unbounded(annotation: Any, marks: tuple = ()) -> bool:
    """Whether a number in the annotation may be of any size, at either end."""
    if get_origin(annotation) is Annotated:
        inner, *own = get_args(annotation)
        own = [each for mark in own for each in (getattr(mark, "metadata", None) or [mark])]
        return unbounded(inner, (*marks, *own))
    if annotation is float:
        ends = [any(isinstance(mark, kind) for mark in marks) for kind in ((Ge, Gt), (Le, Lt))]
        return not all(ends)
    return any(unbounded(each) for each in get_args(annotation))


@pytest.mark.parametrize("config", settings(), ids=lambda config: f"{config.__module__}.{config.__name__}")
def test_every_number_with_a_fraction_has_bounds(config):
    for name, field in config.model_fields.items():
        assert not unbounded(Annotated[field.annotation, *field.metadata] if field.metadata else field.annotation), name


DIFFUSION, FLOW = "systems.pixel-diffusion.sampling", "systems.vqgan-flow.sampling"
AUTOREGRESSIVE, MASKED = "systems.vqgan-autoregressive.sampling", "systems.vqgan-masked.sampling"
NONSENSE = [
    (f"{DIFFUSION}.clip_data", [1, -1], r"clip_data: \[1, -1\] is no interval: expected the lower end first"),
    (f"{DIFFUSION}.clip_data", [-1e300, 1], r"clip_data"),
    (f"{DIFFUSION}.guidance_interval", [0.9, 0.1], r"guidance_interval: \[0\.9, 0\.1\] is no interval"),
    (f"{FLOW}.guidance_interval", [0.5, 0.5], r"guidance_interval: \[0\.5, 0\.5\] is no interval"),
    (f"{FLOW}.guidance_scale", 1e38, r"guidance_scale: .*less than or equal to 100, got 1e\+38"),
    (f"{DIFFUSION}.guidance_scale", 1e38, r"guidance_scale: .*less than or equal to 100"),
    (f"{AUTOREGRESSIVE}.temperature", 1e-45, r"temperature: .*greater than or equal to 0\.01, got 1e-45"),
    (f"{MASKED}.temperature", 1e-45, r"temperature: .*greater than or equal to 0\.01"),
    (f"{MASKED}.choice_temperature", 1e300, r"choice_temperature: .*less than or equal to 1000"),
    (f"{AUTOREGRESSIVE}.guidance_ramp", 1e-320, r"guidance_ramp"),
    (f"{DIFFUSION}.sigma_min", 1e-320, r"sigma_min: .*greater than or equal to 0\.0001"),
    (f"{DIFFUSION}.sigma_max", 1e200, r"sigma_max: .*less than or equal to 10000"),
    (f"{DIFFUSION}.num_steps", 10**9, r"num_steps: .*less than or equal to 10000"),
    ("systems.gan.sampling.truncation", 1e-320, r"truncation: .*greater than or equal to 0\.01"),
    ("systems.gan.prior.r1_weight", 1e300, r"r1_weight"),
    ("systems.pixel-diffusion.prior.sigma_log_mean", 1e4, r"sigma_log_mean"),
    ("systems.vqgan-flow.prior.time_std", 1e-320, r"time_std"),
    ("systems.vqgan-flow.prior.training.learning_rate", 1e30, r"learning_rate: .*less than or equal to 10,"),
    ("systems.vqgan-flow.prior.training.betas", [1.0, 0.9], r"betas"),
    ("tokenizers.vqgan.perceptual_weight", 1e38, r"perceptual_weight"),
    ("tokenizers.vqgan.quantizer.commitment_weight", 1e38, r"commitment_weight"),
    ("edits.denoise.noise_std", 1e-320, r"noise_std 9.99989e-321 is no damage: expected at least 0\.001"),
    ("edits.inpaint.pixel_std", 1e-320, r"pixel_std"),
    ("dataset.name", "a/b", r"dataset\.name: .*pattern"),
    ("dataset.name", "a:b", r"dataset\.name: .*pattern"),
    ("dataset.name", "a\n", r"dataset\.name: .*pattern"),
    ("dataset.name", "", r"dataset\.name: .*pattern"),
    ("dataset.name", "x" * 101, r"dataset\.name: .*at most 100"),
]


@pytest.mark.parametrize(
    ("path", "value", "message"), NONSENSE, ids=[f"{path}={value!r:.20}" for path, value, _ in NONSENSE]
)
def test_settings_that_give_black_images_or_nan_are_refused(tmp_path, path, value, message):
    with pytest.raises(InvalidParams, match=message) as error:
        read(written(tmp_path, changed(path, value)))
    assert len(str(error.value)) < 500


@pytest.mark.parametrize("name", ["digits", "fashion-mnist", "EuroSAT_2.1", "7"])
def test_names_that_mlflow_takes_are_taken(name):
    assert parse(load("datasets", "digits").Config, {**GOOD["dataset"], "name": name}).name == name

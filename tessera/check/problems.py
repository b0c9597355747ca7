"""What in the params cannot work on the images at hand: found before anything is trained.

Three askers, and no list of what they ask:
- every network is built, so that what its constructor refuses is refused now, and so is a folder of weights for it that
  would not fit (`_networks`);
- every part whose file has `problems(config, planned)` is asked, wherever it stands in the params (`_parts`);
- what no part knows alone stands here: views, batches, files of weights, images for the floors.

Nothing is refused that a later stage would bear. No stage reaches this code, so that none is stale when it changes.
"""

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tessera.artifacts import folder as artifact
from tessera.artifacts.bit_depth import ROUNDED
from tessera.artifacts.samples import floor_rows
from tessera.artifacts.shards import spread
from tessera.bases.guide import EXAMPLE
from tessera.components import Params, load, sets
from tessera.contracts import Planned, TokenSpec
from tessera.nn.weightless import WithoutWeights
from tessera.params import Pipeline, is_same_network
from tessera.training import aligned, by_speed, views, warm_start

MOST_NAMED = 20  # classes, in a sentence


def problems(params: Pipeline, planned: Planned, is_begin: bool = True) -> list[str]:
    """A sentence for each, beginning with the key that it is about.

    is_begin: files of weights are asked for too. Later they may be gone, as what was made of them stands.
    """
    planned = planned._replace(is_begin=is_begin)
    asked = [_networks(params, planned), _parts(params, planned), _channels(params, planned)]
    asked += [_bits(params, planned), _alignments(params, planned)]
    asked += [_settings(params), _numbers(params, planned)]
    if is_begin:
        asked.append(f"{where}: {sentence}" for where, config in _configs(params) for sentence in _weights(config))
    return [sentence for some in asked for sentence in some]


def remarks(params: Pipeline, planned: Planned) -> list[str]:
    """A sentence for each thing that can be borne, but that nobody would expect."""
    return [*_barren(planned), *_guided_from_nothing(params)]


def _barren(planned: Planned) -> Iterator[str]:
    spec, counts = planned.spec, np.bincount(planned.labels["train"], minlength=planned.spec.num_classes)
    barren = [f"{label} ({spec.class_names[label]!r})" for label in np.flatnonzero(counts == 0)]
    if barren:
        yield (
            f"class {', '.join(barren[:MOST_NAMED])}{' and others' if len(barren) > MOST_NAMED else ''} of {spec.name} has no "
            f"training image: no prior learns it, and to draw it is refused; add images of it, or take it out"
        )


def _guided_from_nothing(params: Pipeline) -> Iterator[str]:
    for name, system in params.systems.items():
        scale = getattr(params.sampling(name), "guidance_scale", 1.0)
        is_told = getattr(system.prior, "is_conditional", False)
        if is_told and scale != 1.0 and getattr(system.prior, "label_dropout", 1.0) == 0:
            yield (
                f"systems.{name}.sampling: guidance_scale {scale:g} leads away from a prior that is told nothing, which with "
                f"label_dropout: 0 it never learns to be: write label_dropout: 0.1 in systems.{name}.prior, or "
                f"guidance_scale: 1"
            )


def require(params: Pipeline, planned: Planned, is_begin: bool = True) -> None:
    """Raises ValueError with a line for each problem."""
    found = problems(params, planned, is_begin)
    if found:
        raise ValueError("the params do not fit the images:\n" + "\n".join(found))


def _networks(params: Pipeline, planned: Planned) -> Iterator[str]:
    judges = {f"features.{name}": config for name, config in params.features.items()}
    if params.follow_training.every:
        judges["follow_training.features"] = params.follow_training.features
    for where, config in judges.items():
        yield from _built(where, "features", config, planned.spec)[1]
    for name, config in params.tokenizers.items():
        model, refused = _begun(f"tokenizers.{name}", "tokenizers", config, planned.spec, planned.is_begin)
        yield from refused
        if model is None:
            continue
        spec = tokens_of(model, planned)
        for system, entry in params.systems.items():
            if entry.tokenizer == name:
                yield from _begun(f"systems.{system}.prior", "priors", entry.prior, spec, planned.is_begin)[1]


def _built(where: str, folder: str, config: Any, spec: Params) -> tuple[torch.nn.Module | None, list[str]]:
    """The network, its weights undefined, or the sentence of the constructor that refuses."""
    try:
        with WithoutWeights():
            return load(folder, config.kind).Model(config, spec), []
    except ValueError as refusal:
        return None, [f"{where}: {refusal}"]


def _begun(
    where: str, folder: str, config: Any, spec: Params, is_begin: bool
) -> tuple[torch.nn.Module | None, list[str]]:
    """As `_built`, and the sentence about the folder of weights that it is to begin from."""
    model, refused = _built(where, folder, config, spec)
    if is_begin and model is not None and sets(config, "init"):
        own = Path("data") / folder / where.split(".")[1]
        if Path(config.init.folder).resolve() == own.resolve():
            return model, [
                f"{where}: init.from: {own} is what this stage writes anew: copy it elsewhere, and name the copy"
            ]
        try:
            warm_start.read(model, config, folder)
        except ValueError as refusal:
            refused = [f"{where}: {refusal}"]
    return model, refused


def tokens_of(tokenizer: Any, planned: Planned) -> TokenSpec:
    """The spec of the tokens that this tokenizer would make of these images; the latents' moments are not known yet."""
    depth = tokenizer.latent_shape[0]
    return TokenSpec(
        codebook_size=tokenizer.codebook_size,
        latent_shape=tokenizer.latent_shape,
        index_grid=tokenizer.index_grid,
        num_classes=planned.spec.num_classes,
        class_counts=tuple(np.bincount(planned.labels["train"], minlength=planned.spec.num_classes).tolist()),
        latent_mean=(0.0,) * depth,
        latent_std=(1.0,) * depth,
        tokenizer_fingerprint="",
    )


def _parts(params: Pipeline, planned: Planned) -> Iterator[str]:
    for where, config in _configs(params):
        ask = getattr(sys.modules[type(config).__module__], "problems", None) if hasattr(config, "kind") else None
        if ask is not None:
            yield from (f"{where}: {sentence}" for sentence in ask(config, planned))


def _channels(params: Pipeline, planned: Planned) -> Iterator[str]:
    for where, config in _configs(params):
        if planned.spec.channels not in (1, 3) and getattr(config, "perceptual", None) == "lpips":
            yield (
                f"{where}: images of {planned.spec.channels} channels do not fit perceptual: lpips, expected 1 (gray) or 3 "
                f"(RGB): write perceptual: laplacian"
            )


def _bits(params: Pipeline, planned: Planned) -> Iterator[str]:
    """What would round images of 16 bits on their way."""
    if not sets(planned.spec, "bits"):
        return
    for name in params.systems:
        if params.sampling(name).precision == "bf16":
            yield (f"systems.{name}.sampling: {ROUNDED}: write precision: fp32, or leave it out")
    if params.encode_tokens.precision == "bf16":
        yield f"encode_tokens: {ROUNDED}: write precision: fp32, or leave it out"
    has_none = any(config.kind == "none" for config in params.tokenizers.values())
    if has_none and params.encode_tokens.latents_dtype == "float16":
        yield (
            "encode_tokens.latents_dtype: float16 has 11 significant bits, and the latents of tokenizer none are images of 16: "
            "write latents_dtype: float32"
        )


def _alignments(params: Pipeline, planned: Planned) -> Iterator[str]:
    """Networks that priors are aligned to: whether there are such ones, with weights and the layer."""
    for name, system in params.systems.items():
        settings = getattr(system.prior, "alignment", None)
        if settings is None or settings.to == "latents":
            continue
        where = f"systems.{name}.prior"
        if all(is_same_network(judge, settings) for judge in params.features.values()):
            yield (
                f"{where}: it is trained to see as {settings.network} does, which is also its only judge (features "
                f"{', '.join(params.features)}): add features of another network, or choose another one for alignment"
            )
        try:
            config = aligned.config_of(settings)
            with WithoutWeights():
                load("features", config.kind).Model(config, planned.spec)
        except ValueError as refusal:
            yield f"{where}: {aligned.in_our_words(refusal)}"
            continue
        yield from (f"{where}: {sentence}" for sentence in load("features", config.kind).problems(config, planned))


def _settings(params: Pipeline) -> Iterator[str]:
    """What params alone decide."""
    num_views = views.count(params.encode_tokens)
    for name, system in params.systems.items():
        wanted = getattr(system.prior, "num_views", None) or 0
        if wanted > num_views:
            yield (
                f"systems.{name}.prior: num_views {wanted} is more than the {num_views} that encode_tokens makes of an image: "
                f"write num_views: {num_views}, or raise encode_tokens.warps"
            )
        sampling = params.sampling(name)
        if sets(sampling, "autoguidance_scale") and not sets(system.prior, "guide"):
            yield (
                f"systems.{name}.sampling: autoguidance_scale is {sampling.autoguidance_scale:g}, but the prior keeps no guide "
                f"to lead away from: write {EXAMPLE} in systems.{name}.prior, or leave it out"
            )
        told = getattr(system.prior, "condition", None)
        most = None if told is None else getattr(load("conditions", told.kind), "MOST_VIEWS", None)
        if most is not None and (wanted or num_views) > most:
            yield (
                f"systems.{name}.prior: its condition shows an image as it is, but it learns {wanted or num_views} views of "
                f"each, expected at most {most}: write num_views: {most}"
            )
    for where, config in _configs(params):
        yield from (
            f"{where}: {sentence}"
            for ask in (_batches, _chosen_twice, _compiler, _late_discriminator)
            for sentence in ask(config)
        )


def _batches(config: Params) -> Iterator[str]:
    training = getattr(config, "training", None)
    if training is not None and training.batch_size % training.gradient_accumulation:
        yield (
            f"training.batch_size {training.batch_size} is not divisible by gradient_accumulation "
            f"{training.gradient_accumulation}: choose a divisor"
        )


def _chosen_twice(config: Params) -> Iterator[str]:
    training = getattr(config, "training", None)
    for key in getattr(training, "by_speed", None) or ():
        found = getattr(training, key)
        if found != type(training).model_fields[key].default:
            yield f"training.{key} is {str(found).lower()}, and by_speed would choose it: leave it out of one of the two"


def _compiler(config: Params) -> Iterator[str]:
    training = getattr(config, "training", None)
    if training is not None and training.compile and not torch.cuda.is_available() and by_speed.compiler() is None:
        yield (
            f"training.compile: true, but {by_speed.NO_COMPILER}: install g++, or write by_speed: [compile], which compiles "
            f"where that can be done and pays"
        )


def _late_discriminator(config: Params) -> Iterator[str]:
    start = getattr(config, "discriminator_start_step", 0)
    if getattr(config, "adversarial_weight", 0) and start >= config.training.num_steps:
        yield (
            f"discriminator_start_step {start} is not below the {config.training.num_steps} steps of training.num_steps: the "
            f"discriminator would never begin: lower it, or write adversarial_weight: 0"
        )


def _weights(config: Params) -> Iterator[str]:
    """Files are named by two keys, such as `weights` and `sha256`, or `lpips_weights` and `lpips_sha256`."""
    for key in type(config).model_fields:
        start = key.removesuffix("sha256")
        if start == "lpips_" and getattr(config, "perceptual", "lpips") != "lpips":
            continue  # it stands there and is not read
        named = getattr(config, f"{start}weights", None) if start != key else None
        if not isinstance(named, str) or not named:
            continue
        if not Path(named).is_file():
            yield f"{start}weights: {named} does not exist, expected a safetensors file: get it, or name where it lies"
        elif artifact.sha256(Path(named)) != getattr(config, key):
            yield (
                f"{start}weights: {named} has sha256 {artifact.sha256(Path(named))}, expected {getattr(config, key)}: get the "
                f"file again, or set {key} if you trust this one"
            )


def _numbers(params: Pipeline, planned: Planned) -> Iterator[str]:
    train, num_test = planned.labels["train"], len(planned.labels["test"])
    try:
        floor_rows(train, planned.spec.num_classes, planned.num_samples, params.seed)
    except ValueError as refusal:
        yield f"sample_images.num_images: {planned.num_samples} is too many: {refusal}"
    compared = spread(num_test, planned.max_neighbor_images)
    if not np.isin(compared, spread(num_test, params.reference_stats.max_features)).all():
        yield (
            f"reference_stats.max_features: {params.reference_stats.max_features} keeps too few features of the {num_test} "
            f"test images: write at least {num_test}"
        )


def _configs(value: Any, where: str = "") -> Iterator[tuple[str, Params]]:
    """All Params inside params, each with its path."""
    if isinstance(value, Params):
        if where:
            yield where, value
        inner = {key: getattr(value, key) for key in type(value).model_fields}
    else:
        inner = value if isinstance(value, dict) else {}
    for key, each in inner.items():
        yield from _configs(each, f"{where}.{key}" if where else str(key))

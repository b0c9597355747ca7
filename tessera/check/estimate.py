"""How long a run will take here, and how much memory: from some steps of each training, on images and tokens of noise."""

import resource
import time
from typing import Any, NamedTuple

import torch
from torch import nn

from tessera import seeding
from tessera.bases.optimization import Training
from tessera.check.problems import tokens_of
from tessera.components import load, sets
from tessera.contracts import ImageBatch, ImageSpec, Planned, TokenBatch, TokenSpec
from tessera.nn.precision import in_precision
from tessera.params import Pipeline
from tessera.training import aligned
from tessera.training.by_speed import trial_step

PROCESS_SECONDS = 4.0  # of a stage beside its work, most of it for importing torch (docs/log.md, the tests' diet)
ENTRIES = {"run": 6, "features": 2, "tokenizers": 3, "systems": 4}  # of the graph: once, and for each of a section
DRAWN = 16  # images at once, in the trial of drawing


class Trained(NamedTuple):
    """One training, timed."""

    entry: str  # train_prior@vqgan-flow
    num_steps: int
    seconds_per_step: float

    @property
    def minutes(self) -> float:
        return self.num_steps * self.seconds_per_step / 60


class Estimate(NamedTuple):
    trainings: list[Trained]
    other_minutes: float  # drawing, editing, and starting a process for each stage
    memory_bytes: int  # the most that any of it took: of the GPU if there is one, of this process otherwise
    device: str

    @property
    def minutes(self) -> float:
        return sum(training.minutes for training in self.trainings) + self.other_minutes

    def with_steps_of(self, params: Pipeline) -> "Estimate":
        """The same speeds for params that differ in the numbers of steps alone."""
        sections = {"train_features": params.features, "train_tokenizer": params.tokenizers}
        now = []
        for one in self.trainings:
            stage, _, name = one.entry.partition("@")
            config = params.systems[name].prior if stage == "train_prior" else sections[stage][name]
            now.append(one._replace(num_steps=config.training.num_steps))
        return self._replace(trainings=now)

    def sentence(self) -> str:
        """about 12 minutes and 0.9 GiB on cpu x2 (train_tokenizer@vqgan 5.2, train_prior@vqgan-flow 5.9, others 1.0)"""
        parts = [f"{one.entry} {one.minutes:.1f}" for one in self.trainings] + [f"others {self.other_minutes:.1f}"]
        return (
            f"about {max(1, round(self.minutes))} minutes and {self.memory_bytes / 2**30:.1f} GiB on {self.device} "
            f"({', '.join(parts)})"
        )


def of_run(params: Pipeline, planned: Planned, seconds: float = 10.0) -> Estimate:
    """Try every training and every system, for about `seconds` in all. Raises ValueError where a network cannot be built."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    each = seconds / (len(params.features) + len(params.tokenizers) + 2 * len(params.systems))
    spec, trainings = planned.spec, []
    for name, config in params.features.items():
        trainings += _tried(f"train_features@{name}", "features", config, spec, _images(config, spec), each)
    token_specs, decoders = {}, {}
    for name, config in params.tokenizers.items():
        decoders[name] = load("tokenizers", config.kind).Model(config, spec).to(device).eval()
        token_specs[name] = tokens_of(decoders[name], planned)
        trainings += _tried(f"train_tokenizer@{name}", "tokenizers", config, spec, _images(config, spec), each)
    drawing = 0.0
    for name, system in params.systems.items():
        tokens = token_specs[system.tokenizer]
        batch = _tokens(system.prior, tokens)
        trainings += _tried(f"train_prior@{name}", "priors", system.prior, tokens, batch, each)
        prior = load("priors", system.prior.kind).Model(system.prior, tokens).to(device).eval()
        if sets(system.prior, "guide"):
            prior.guide = load("priors", system.prior.kind).Model(system.prior, tokens).to(device).eval()
        drawing += num_drawn(params) * _seconds_to_draw(prior, params.sampling(name), tokens, device)
    sections = {"run": 1, **{key: len(getattr(params, key)) for key in ENTRIES if key != "run"}}
    starting = PROCESS_SECONDS * sum(ENTRIES[key] * number for key, number in sections.items())
    if device.type == "cuda":
        return Estimate(
            trainings, (drawing + starting) / 60, torch.cuda.max_memory_allocated(), torch.cuda.get_device_name()
        )
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return Estimate(trainings, (drawing + starting) / 60, memory, f"cpu x{torch.get_num_threads()}")


def num_drawn(params: Pipeline) -> int:
    """Images that each system draws: its samples, and about two for each trial of an edit."""
    edited = params.edit_images.num_images * params.edit_images.num_seeds * len(params.edits)
    return params.sample_images.num_images + 2 * edited


def _images(config: Any, spec: ImageSpec) -> ImageBatch | None:
    if not hasattr(config, "training"):
        return None
    number = config.training.batch_size
    images = torch.rand(number, spec.channels, spec.height, spec.width) * 2 - 1
    if sets(config, "captions"):  # one byte to each, for how long they are does not count
        told = torch.zeros(number, 1 + config.captions.max_bytes, dtype=torch.long)
        told[:, 1] = torch.arange(number) % 256
        return ImageBatch(images, told)
    return ImageBatch(images, torch.arange(number) % spec.num_classes)


def _tokens(config: Any, spec: TokenSpec) -> TokenBatch:
    number = config.training.batch_size
    if load("priors", config.kind).LEARNS == "indices":
        tokens = torch.randint(spec.codebook_size, (number, *spec.index_grid))
    else:
        tokens = torch.randn(number, *spec.latent_shape)
    return TokenBatch(tokens, torch.arange(number) % spec.num_classes)


def _tried(entry: str, folder: str, config: Any, spec: Any, batch: Any, seconds: float) -> list[Trained]:
    """The training of a part, timed; none where nothing is trained."""
    module = load(folder, config.kind)
    if batch is None or not hasattr(module, "Objective") or not config.training.num_steps:
        return []
    objective = module.Objective(module.Model(config, spec), config)
    if sets(config, "alignment"):
        batch = aligned.for_trial(objective, config.alignment, batch)
    precisions = ("fp32", "bf16") if "precision" in (config.training.by_speed or ()) else (config.training.precision,)
    each = [_seconds_per_step(objective, batch, config.training, precision, seconds) for precision in precisions]
    return [Trained(entry, config.training.num_steps, min(each))]


def _seconds_per_step(objective: Any, batch: Any, settings: Training, precision: str, seconds: float) -> float:
    """Of a late step, when all that starts late has started. The first of them is not counted."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    objective.to(device).train()
    optimizers = objective.optimizers()
    batch = type(batch)(*(tensor.to(device) for tensor in batch))
    began, num_steps = time.monotonic(), -1
    while num_steps < 1 or time.monotonic() - began < seconds * num_steps / (num_steps + 1):
        trial_step(objective, optimizers, batch, settings, precision)
        num_steps += 1
        if num_steps == 0:
            began = time.monotonic()
    return (time.monotonic() - began) / num_steps


def _seconds_to_draw(prior: nn.Module, sampling: Any, spec: TokenSpec, device: torch.device) -> float:
    """Per image. What decoding takes is little beside it."""
    labels = torch.arange(DRAWN, device=device) % spec.num_classes
    prior = in_precision(prior, sampling.precision)
    began = time.monotonic()
    prior.sample(labels, sampling, seeding.generator(0, "trial", device=device)).cpu()
    return (time.monotonic() - began) / DRAWN

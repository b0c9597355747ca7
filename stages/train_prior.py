"""Train the prior of one system on the tokens of its tokenizer, and validate it meanwhile where params say so."""

import math
from pathlib import Path

import torch
from torch import nn

from tessera.artifacts import checkpoints
from tessera.artifacts import folder as artifact
from tessera.artifacts import tokens as token_artifact
from tessera.artifacts.tokens import Tokens
from tessera.components import load, sets
from tessera.contracts import Job, KnowsLikelihood
from tessera.evaluation.figures import Protocol, Recorder, without_network
from tessera.evaluation.likelihood import bits_of_each, mean_loss, proportional_rows
from tessera.params import Pipeline
from tessera.training import aligned, by_speed, loop, previews, told, warm_start
from tessera.training.snapshot import Snapshot
from tessera.training.validation import PriorValidation, hold_out


def run(  # nine parameters: one for each option of the command in dvc.yaml
    params: Pipeline, name: str, images: Path, tokenizer: Path, tokens: Path, out: Path, history: Path, metrics: Path,
    job: Job,
) -> dict[str, float] | None:  # fmt: skip
    config = params.systems[name].prior
    module = load("priors", config.kind)
    spec, splits = token_artifact.read(tokens, module.LEARNS, config.num_views)
    if sets(config, "condition"):
        splits = told.told_tokens(config.condition, splits, images)
        all_splits = dict(splits)
    if params.follow_training.criterion != "last":
        splits |= hold_out(splits["train"], params.follow_training, params.seed, job)
    torch.manual_seed(params.seed)
    model = module.Model(config, spec)
    millions = sum(p.numel() for p in model.parameters()) / 1e6
    job.say(
        f"{len(splits['train']):,} images x {splits['train'].num_views} views, {module.LEARNS} "
        f"{splits['train'].values.row_shape[1:]}, {millions:.2f} M parameters, {loop.threads()}"
    )
    validation = None
    if params.follow_training.every:
        validation = PriorValidation(params, name, spec, splits, images, tokenizer, job)
    inputs = {"prior": config, "tokens": artifact.fingerprint(tokens), "seed": params.seed}
    if sets(config, "condition"):
        inputs["captions"] = told.fingerprint(splits)
    job.resumable(inputs | (validation.inputs() if validation else {}), parts=(config, params.follow_training.features))
    if sets(config, "condition"):
        told.compute(splits, job)
    objective = module.Objective(model, config)
    if sets(config, "init"):
        warm_start.begin(objective, config, "priors", job)
    if sets(config, "guide"):
        validation = Snapshot(config, validation, job)
    if sets(config, "alignment"):
        splits |= {"train": aligned.begin(objective, config.alignment, splits["train"], images, job)}
    preview = previews.Previews(previews.of_prior(params, name, spec, tokenizer), job)
    model = loop.fit(
        objective, splits["train"], config.training, seed=params.seed, job=job, validation=validation, preview=preview
    )
    if model is None:  # only the first process writes
        return None
    if validation:
        validation.keep(model)
    with artifact.create(out) as place:
        checkpoints.save(place, "priors", config, spec, model, job.code_of(config))
        if sets(config.training, "by_speed"):
            by_speed.write_record(place, job)
        if sets(config, "init"):
            warm_start.write_record(place, job)
        if sets(config, "condition"):
            told.write_examples(place, config.condition, all_splits, params.seed)
        if validation:
            validation.write(place)
    job.keep_history(history)
    found = held_out_figures(params, name, model, splits)
    found.measured().write(metrics)
    values = {key: figure.value for key, figure in found.groups.get("prior", {}).items()}
    job.say("  ".join([*(f"{key} {value:.4g}" for key, value in values.items()), f"wrote {out}"]))
    return values


def held_out_figures(params: Pipeline, name: str, model: nn.Module, splits: dict[str, Tokens]) -> Recorder:
    """Loss and bits of all test images, where the prior has them, and the loss of equally many training images.

    A GAN has neither: no loss of its training says anything of images held out.
    """
    config, test = params.systems[name].prior, splits["test"]
    module, found = load("priors", config.kind), Recorder()
    rows = torch.arange(len(test))
    of_tokens = {"prior": config.kind, "tokenizer": model.spec.tokenizer_fingerprint[:12], **test.encoding}

    def protocol(images: str, number: int) -> Protocol:
        return without_network(params.dataset.name, f"tokens of {images} images", number, **of_tokens)

    model.to("cuda" if torch.cuda.is_available() else "cpu")
    if "prior" in module.Objective.phases:
        objective = module.Objective(model, config)
        number = min(len(test), len(splits["train"]))
        trained_on = torch.from_numpy(proportional_rows(splits["train"].labels, number, params.seed))
        of_test = mean_loss(objective, test, rows, params.seed)
        of_train = mean_loss(objective, splits["train"], trained_on, params.seed)
        found.add("prior", "test_loss", of_test, protocol("test", len(test)))
        found.add("prior", "train_loss", of_train, protocol("training", number))
    if isinstance(model, KnowsLikelihood):
        bits = bits_of_each(model, test, rows, params.seed)
        found.add_mean("prior", "bits_per_image", bits, protocol("test", len(test)))
        found.add_mean("prior", "bits_per_token", bits / math.prod(model.spec.index_grid), protocol("test", len(test)))
    return found

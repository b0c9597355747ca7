"""Train the prior of one system on the tokens of its tokenizer.

python -m stages.train_prior vqgan-flow --tokens data/tokens/vqgan --out data/priors/vqgan-flow \
        --history data/curves/priors/vqgan-flow.csv
"""

from pathlib import Path

import torch

from tessera import stage_process, training
from tessera.artifacts import checkpoints
from tessera.artifacts import folder as artifact
from tessera.artifacts import tokens as token_artifact
from tessera.components import load
from tessera.contracts import Objective
from tessera.params import Pipeline


def run(
    params: Pipeline, name: str, tokens: Path, out: Path, history: Path, job: stage_process.Job
) -> dict[str, float] | None:
    config = params.systems[name].prior
    module = load("priors", config.kind)
    spec, splits = token_artifact.read(tokens, module.LEARNS, config.num_views)
    torch.manual_seed(params.seed)
    model = module.Model(config, spec)
    millions = sum(p.numel() for p in model.parameters()) / 1e6
    job.say(
        f"{len(splits['train']):,} images x {splits['train'].num_views} views, {module.LEARNS} "
        f"{splits['train'].values.row_shape[1:]}, {millions:.2f} M parameters, {training.threads()}"
    )
    job.resumable(*checkpoints.identity(config, spec), artifact.fingerprint(tokens), params.seed)
    model = training.fit(module.Objective(model, config), splits["train"], config.training, seed=params.seed, job=job)
    if model is None:  # only the first process writes
        return None
    with artifact.create(out) as place:
        checkpoints.save(place, "priors", config, spec, model)
    job.keep_history(history)
    if "prior" not in module.Objective.phases:  # a GAN has no loss of images that were held out
        job.say(f"wrote {out}")
        return {}
    loss = held_out_loss(module.Objective(model, config), splits["test"], params.seed)
    job.say(f"loss on {len(splits['test']):,} test images {loss:.4f}; wrote {out}")
    return {"test_loss": loss}


@torch.no_grad()
def held_out_loss(objective: Objective, dataset: token_artifact.Tokens, seed: int, batch_size: int = 500) -> float:
    """The training loss, without dropout, of images that were not trained on: nats per token, or squared error."""
    objective.eval()
    torch.manual_seed(seed)
    total = 0.0
    for start in range(0, len(dataset), batch_size):
        rows = torch.arange(start, min(start + batch_size, len(dataset)))
        total += float(objective(dataset.batch(rows), "prior", 0)["loss"]) * len(rows)
    return total / len(dataset)


if __name__ == "__main__":
    stage_process.main(run)

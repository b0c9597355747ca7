"""Autoregressive sampling without the key-value cache, with it, and in bfloat16: the number of images per second.

    python -m benchmarks.sampling

64 tokens, batch 64, 4 layers of width 256, one thread; in float32 the same indices come out with the cache and without.
"""

import time
from functools import partial

import torch

from tessera.bases.optimization import PriorTraining
from tessera.contracts import TokenSpec
from tessera.nn.precision import in_precision
from tessera.priors.autoregressive import Config, Model, Sampling, draw

BATCH, LENGTH = 64, 64


@torch.no_grad()
def without_cache(model: Model, labels: torch.Tensor, sampling: Sampling, generator: torch.Generator) -> torch.Tensor:
    indices = torch.zeros(len(labels), LENGTH, dtype=torch.long)
    for place in range(LENGTH):
        x = torch.cat([model.label_embedding(labels)[:, None], model.index_embedding(indices[:, :place])], dim=1)
        hidden = model.transformer(x + model.position[: place + 1])  # only what is known so far
        indices[:, place] = draw(model.head(hidden[:, -1]).float(), sampling, generator)
    return indices.view(-1, 8, 8)


def main() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    spec = TokenSpec(
        codebook_size=1024,
        latent_shape=(8, 8, 8),
        index_grid=(8, 8),
        num_classes=10,
        class_counts=(1,) * 10,
        latent_mean=(0.0,) * 8,
        latent_std=(1.0,) * 8,
        tokenizer_fingerprint="0" * 64,
    )
    model = (
        Model(Config(width=256, depth=4, heads=4, training=PriorTraining(num_steps=1)), spec)
        .eval()
        .requires_grad_(False)
    )
    in_bf16 = in_precision(model, "bf16")
    labels, seconds, drawn = torch.arange(BATCH) % 10, {}, {}
    samplers = {
        "without cache": partial(without_cache, model),
        "with cache": model.sample,
        "with cache, bf16": in_bf16.sample,
    }
    for name, sample in samplers.items():
        rounds = []
        for _ in range(3):
            start = time.process_time()
            drawn[name] = sample(labels, Sampling(), torch.Generator().manual_seed(0))
            rounds.append(time.process_time() - start)
        seconds[name] = sorted(rounds)[1]
    assert torch.equal(drawn["with cache"], drawn["without cache"])
    for name, value in seconds.items():
        print(f"{name:<17} {1000 * value:8.0f} CPU ms  {BATCH / value:8.1f} images/s")
    equal = (drawn["with cache, bf16"] == drawn["with cache"]).float().mean()
    print(f"ratio {seconds['without cache'] / seconds['with cache']:.1f}x; torch {torch.__version__}, 1 thread")
    print(f"in bf16 {100 * equal:.1f} % of the indices are equal")


if __name__ == "__main__":
    main()

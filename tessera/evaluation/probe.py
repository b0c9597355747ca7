"""Small priors that are trained on a tokenizer's tokens for a moment, to see how easily these are modelled (Probe in
metrics/prior_probe.py).

Network, training, rows and noise are the same for every tokenizer and every run; they do not follow the seed of a run, because
figures are to differ by the tokens alone. Only first views are learned, however many are stored.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from tessera import seeding
from tessera.artifacts import tokens as token_artifact
from tessera.artifacts.shards import spread
from tessera.artifacts.tokens import Tokens
from tessera.bases.optimization import PriorTraining, learning_rate_factor, optimizers_for
from tessera.components import Params
from tessera.contracts import Job, Learns, Record, TokenBatch
from tessera.denoisers import transformer
from tessera.evaluation import figures
from tessera.evaluation.figures import Protocol, Setting
from tessera.evaluation.panel import Panel
from tessera.nn.noise_levels import even_uniforms
from tessera.nn.samplers import noise
from tessera.params import Evaluate, Pipeline
from tessera.priors import autoregressive

KIND = "prior_probe"  # of the metric
SEED = 0
BATCH, TEST_BATCH = 64, 500  # images of a step; and at a time when they are measured
SIZE = {"width": 64, "depth": 2, "heads": 2, "dropout": 0.0}
RATE = 0.002  # the learning rate at its highest
MOST_PLACES = 256  # of the sequence of a flow: larger grids are taken in patches
MOST_IMAGES = 2000  # test images, evenly spread
NUM_TIMES = 8


def entry(settings: Evaluate) -> Params | None:
    """The entry of evaluate.metrics that asks for probes."""
    return next((config for config in settings.metrics.values() if config.kind == KIND), None)


def measure(params: Pipeline, panel: Panel, tokens: Path, model: nn.Module, found: Record, job: Job) -> None:
    """Ask the metric. tokens: the artifact; model: the tokenizer that made them, where the probes are to be."""
    has = {"latents": params.encode_tokens.store_latents, "indices": model.codebook_size is not None}
    learned = tuple(learns for learns, is_there in has.items() if is_there)
    if "latents" not in learned:
        job.say("no probe_loss: it is of latents, and encode_tokens.store_latents is false")
    if learned:
        device = next(iter(panel.judges.values())).device
        panel.measure("of_probe", TokenProbe(tokens, learned, params.dataset.name, device), found)


class TokenProbe:
    """Trains a probe when its metric asks for it (Probe in metrics/prior_probe.py)."""

    times = (np.arange(NUM_TIMES) + 0.5) / NUM_TIMES

    def __init__(self, tokens: Path, learned: tuple[Learns, ...], dataset: str, device: torch.device):
        """tokens: the artifact; learned: what it holds."""
        self._tokens, self._learned, self._dataset, self._device = tokens, learned, dataset, device

    def velocity_errors(self, num_steps: int) -> np.ndarray | None:
        """(N, T) mean squared errors of the velocity, of each test image at each of `times`; None without latents."""
        if "latents" not in self._learned:
            return None
        learned, test, device = *self._splits("latents"), self._device
        with seeded(device):
            spec = learned.spec
            config = transformer.Config(**SIZE, patch_size=patch_of(spec.latent_shape[1:]))
            network = transformer.Model(config, spec.latent_shape, spec.num_classes).to(device)

            def loss(batch: TokenBatch) -> Tensor:
                times = even_uniforms(len(batch.tokens), device)
                return velocity_errors(network, batch, times, torch.randn_like(batch.tokens)).mean()

            train(network, loss, learned, num_steps)
        generator = seeding.generator(SEED, "probe_noise", device=device)
        found = []
        for batch in batches(test, device):
            at = [torch.full((len(batch.labels),), time, device=device) for time in self.times.tolist()]
            with torch.no_grad():
                errors = [velocity_errors(network, batch, times, noise(batch.tokens, generator)) for times in at]
            found.append(torch.stack(errors, dim=1).double().cpu())
        return torch.cat(found).numpy()

    def bits(self, num_steps: int) -> np.ndarray | None:
        """(N,) bits of the indices of each test image; None without a codebook."""
        if "indices" not in self._learned:
            return None
        learned, test, device = *self._splits("indices"), self._device
        with seeded(device):
            training = PriorTraining(num_steps=num_steps, learning_rate=RATE)
            config = autoregressive.Config(**SIZE, label_dropout=0.0, training=training)
            model = autoregressive.Model(config, learned.spec).to(device)
            objective = autoregressive.Objective(model, config)
            train(model, lambda batch: objective(batch, "prior", 0)["loss"], learned, num_steps)
        generator = seeding.generator(SEED, "probe_bits", device=device)
        return torch.cat([model.bits(*batch, generator).double().cpu() for batch in batches(test, device)]).numpy()

    def protocol(self, **settings: Setting) -> Protocol:
        _, test = self._splits(self._learned[0])
        name = "tokens of the test images"
        return figures.without_network(self._dataset, name, len(test), **settings, **test.encoding)

    def _splits(self, learns: Learns) -> tuple[Tokens, Tokens]:
        """The training tokens, in their first views, and the test tokens."""
        _, splits = token_artifact.read(self._tokens, learns, 1)
        return splits["train"], splits["test"].subset(spread(len(splits["test"]), MOST_IMAGES))


def patch_of(grid: tuple[int, int]) -> int:
    """The side of the patches of latents that leave at most MOST_PLACES places, as far as halving goes."""
    side = 1
    while grid[0] * grid[1] > MOST_PLACES * side**2 and not (grid[0] % (2 * side) or grid[1] % (2 * side)):
        side *= 2
    return side


def velocity_errors(network: nn.Module, batch: TokenBatch, times: Tensor, noises: Tensor) -> Tensor:
    """(B,) squared errors of the velocity at a time (B,) of each image, means over its values.

    Lipman et al., 2022, arXiv:2210.02747, equation 23 at sigma_min = 0, as in priors/flow_matching.py.
    """
    at = times.view(-1, 1, 1, 1)
    velocity = network((1 - at) * noises + at * batch.tokens, times, batch.labels)
    return (velocity - (batch.tokens - noises)).square().mean(dim=(1, 2, 3))


def train(network: nn.Module, loss: Callable[[TokenBatch], Tensor], tokens: Tokens, num_steps: int) -> None:
    """Train a network in place and leave it in evaluation mode; draws from torch's global generator."""
    settings = PriorTraining(num_steps=num_steps, learning_rate=RATE)
    optimizers, device = optimizers_for(network.train(), settings), next(network.parameters()).device
    rates = [(group, group["lr"]) for one in optimizers for group in one.param_groups]
    for step in range(num_steps):
        for group, rate in rates:
            group["lr"] = rate * learning_rate_factor(step, settings)
        value = loss(placed(tokens.batch(torch.randint(len(tokens), (BATCH,))), device))
        value.backward()
        nn.utils.clip_grad_norm_(network.parameters(), settings.gradient_clip)
        for one in optimizers:
            one.step()
            one.zero_grad(set_to_none=True)
    network.eval()


def batches(tokens: Tokens, device: torch.device) -> Iterator[TokenBatch]:
    for rows in torch.arange(len(tokens)).split(TEST_BATCH):
        yield placed(tokens.batch(rows), device)


def placed(batch: TokenBatch, device: torch.device) -> TokenBatch:
    return TokenBatch(*(tensor.to(device) for tensor in batch))


@contextmanager
def seeded(device: torch.device) -> Iterator[None]:
    """Inside, torch's global generator begins anew and gradients are kept; afterwards it is as it was."""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []), torch.enable_grad():
        torch.manual_seed(SEED)
        yield

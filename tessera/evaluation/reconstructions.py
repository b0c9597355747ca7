"""Measuring a tokenizer: decoded images, each beside its original and all of them beside the test images; its codes.

Of decoded images nothing is kept but what metrics and networks keep of them: memory does not grow with their number.
"""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from tessera import seeding
from tessera.artifacts import bit_depth
from tessera.artifacts import tokens as token_artifact
from tessera.artifacts.images import Images, to_float, to_uint8
from tessera.components import load, sets
from tessera.contracts import ImageSpec, Pairs, Record
from tessera.evaluation import figures
from tessera.evaluation.figures import Protocol, Setting
from tessera.evaluation.judge import Summary
from tessera.evaluation.panel import Panel
from tessera.metrics import codebook
from tessera.nn.gumbel import uniform
from tessera.params import Evaluate

OF_TEST = "reconstructions of the test images"

# (n, C, H, W) images as they are stored -> what the tokenizer makes of them, in the same dtype, on the CPU
Decode = Callable[[Tensor], Tensor]


class Decoded:
    """Decoded images as the networks see them (contracts.SeenReconstructions)."""

    def __init__(self, panel: Panel, prefix: str, labels: np.ndarray, are_originals: bool = False):
        """labels: of the images; are_originals: these are the test images, which they are compared with."""
        self.prefix, self.networks = prefix, {}
        self._panel, self._labels, self._are_originals = panel, labels, are_originals
        self._summaries = {name: Summary(len(labels), panel.max_images) for name in panel.judges}

    def update(self, decoded: Tensor) -> None:
        for name, judge in self._panel.judges.items():
            for batch in judge.batches(decoded.numpy()):
                self._summaries[name].update(batch)

    def measure(self, images: str, found: Record, **settings: Setting) -> None:
        """Ask the metrics; images: what protocols call them; settings: how they were made."""
        self.networks = self._panel.seen(images, self._labels, self._summaries, **settings)
        self._panel.measure("of_reconstructions", self, found)

    def originals(self, network: str) -> Tensor | None:
        if not self._are_originals:
            return None
        seen = self.networks[network]
        return seen.on_device(self._panel.references[network].features_at("test", seen.kept))


def reconstruction(model: nn.Module, device: torch.device) -> Decode:
    def decode(originals: Tensor) -> Tensor:
        if sets(model, "bits"):
            encoded = model.encode(to_float(originals).to(device))
            return bit_depth.stored(model.decode(encoded.latents), model).cpu()
        return to_uint8(model.decode(model.encode(to_float(originals).to(device)).latents)).cpu()

    return decode


def perturbation(model: nn.Module, device: torch.device, settings: Evaluate, seed: int) -> Decode:
    """Reconstructions from indices that are a little wrong."""
    generator = seeding.generator(seed, "perturbed_indices", device=device)

    def decode(originals: Tensor) -> Tensor:
        indices = model.encode(to_float(originals).to(device)).indices
        if sets(model, "bits"):
            replaced = perturbed(indices, model, settings, generator)
            return bit_depth.stored(model.decode_indices(replaced), model).cpu()
        return to_uint8(model.decode_indices(perturbed(indices, model, settings, generator))).cpu()

    return decode


def perturbed(indices: Tensor, model: nn.Module, settings: Evaluate, generator: torch.Generator) -> Tensor:
    """The indices, a share of them replaced by one of the nearest other codes: the small mistakes that a prior makes.

    Source: Qiu et al. (RobustTok), 2025, arXiv:2503.08354, section 3, whose pFID is taken of such images.
    """
    is_replaced = uniform(indices, generator) < settings.perturbation_share
    near = model.quantizer.neighbors(indices[is_replaced], settings.perturbation_neighbors)
    drawn = {"generator": generator, "device": generator.device}
    choice = torch.randint(settings.perturbation_neighbors, (len(near), 1), **drawn).to(indices.device)
    replaced = indices.clone()
    replaced[is_replaced] = near.gather(1, choice).squeeze(1)
    return replaced


class AllPairs:
    """Every metric of pairs of images, on reconstructions of test images beside these."""

    def __init__(self, panel: Panel, spec: ImageSpec, device: torch.device):
        parts = ((load("metrics", config.kind), config) for config in panel.metrics.values())
        self._pairs: list[Pairs] = [
            module.Pairs(config, spec, device) for module, config in parts if hasattr(module, "Pairs")
        ]

    def update(self, originals: Tensor, decoded: Tensor) -> None:
        for pairs in self._pairs:
            pairs.update(originals, decoded)

    def record(self, test: Images, test_sha256: str, found: Record) -> None:
        def protocol(network: str = "none", network_sha256: str = "", **settings: Setting) -> Protocol:
            pixels = figures.without_network(test.spec.name, OF_TEST, len(test), "test", test_sha256, **settings)
            return pixels.model_copy(update={"network": network, "network_sha256": network_sha256})

        for pairs in self._pairs:
            pairs.record(protocol, found)


class Codes:
    """How often each code occurs among the tokens of the training images, in their first view (contracts.TokenUse)."""

    def __init__(self, tokens: Path, codebook_size: int, dataset: str):
        _, learned = token_artifact.read(tokens, "indices")
        train = learned["train"]
        self._dataset, self._num_images, self._encoding = dataset, len(train), train.encoding
        self.counts = torch.zeros(codebook_size, dtype=torch.long)
        for start in range(0, len(train), 10_000):
            rows = torch.arange(start, min(start + 10_000, len(train)))
            self.counts += codebook.count(train.batch(rows).tokens, codebook_size)

    def protocol(self, **settings: Setting) -> Protocol:
        settings = settings | self._encoding
        return figures.without_network(self._dataset, "tokens of the training images", self._num_images, **settings)

"""A system's networks as ONNX, for onnxruntime and what reads ONNX elsewhere: encoder.onnx, decoder.onnx, prior.onnx.

The batch is of any size. Images are float32 in [-1, 1], tokens as TrainedSystem has them, labels up to and including the null
label; of a prior that was told something beside them, `labels` are the rows of its condition, as its file in conditions/ says
(the label plus 1, then what is told). prior.onnx is one call of the prior's network, by its own inputs: logits of all indices
(autoregressive, masked), or of their digits, some of which are shown (bitwise), the prediction at a noise level or a time
(diffusion, flow), or for jumps from a time (flow map), latents of noise (GAN). guide.onnx is the same of its guide, where it
keeps one. The sampler around them is the caller's.
"""

import inspect
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from tessera.artifacts import whole
from tessera.artifacts.captions import Example
from tessera.components import load, sets
from tessera.nn.cross_attention import CrossAttention
from tessera.system import System

OPSET = 20
OPTIONAL = ("is_hidden",)  # arguments that `forward` can do without, and a sampler around it cannot
EXAMPLES = 2  # images while the graph is traced: a batch of one would be taken for a constant


class Call(nn.Module):
    """A method of a system that takes a tensor, as a network."""

    def __init__(self, system: System, method: str):
        super().__init__()
        self.tokenizer, self.system, self.method = system.tokenizer, system, method

    def forward(self, given: Tensor) -> Tensor:
        return getattr(self.system, self.method)(given)


def write(system: System, out: Path, told: Sequence[Example] = ()) -> None:
    """told: what the prior keeps of what it was told of images (artifacts/captions.py: examples_of).

    Raises ValueError, before anything is written, if onnx and onnxscript are not installed, the prior takes what this file does
    not know, or what it was told cannot be made here, such as the features of a text model that is not there.
    """
    try:
        import onnxscript  # noqa: F401  by torch.onnx
    except ImportError:
        raise ValueError("ONNX needs the packages onnx and onnxscript: pip install 'tessera[onnx]'") from None
    parts = networks(system, told)
    out.mkdir()
    for name, (network, given, result) in parts.items():
        # The graph is of any batch, whatever is said here: diffusers lays 64 images and more out otherwise, to the same end
        batch = torch.export.Dim("batch", min=1, max=63)
        with whole.file(out / f"{name}.onnx") as beside, warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")  # of the exporter about itself
            # Here, because torch.onnx would make a constant of a batch that the network does not leave open
            graph = torch.export.export(
                network,
                tuple(given.values()),
                dynamic_shapes=tuple({0: batch} for _ in given),
                strict=_attends(network),
            )
            torch.onnx.export(
                graph, (), beside, input_names=list(given), output_names=[result], opset_version=OPSET, dynamo=True,
                external_data=False, verbose=False,
            )  # fmt: skip


def networks(system: System, told: Sequence[Example] = ()) -> dict[str, tuple[nn.Module, dict[str, Tensor], str]]:
    """{file: (network, an example of each of its inputs, the name of what it gives)}, on the CPU. told: see `write`."""
    system = System(system.tokenizer.cpu(), system.prior.cpu(), system.spec, system.learns, system.name)
    images, tokens = _images(system), _tokens(system)
    inputs, guide = _inputs_of_prior(system, tokens, told), getattr(system.prior, "guide", None)
    found = {
        "encoder": (Call(system, "encode").eval(), {"images": images}, "tokens"),
        "decoder": (Call(system, "decode").eval(), {"tokens": tokens}, "images"),
        "prior": (system.prior, inputs, "predicted"),
    }
    return found if guide is None else found | {"guide": (guide, inputs, "predicted")}


def _attends(network: nn.Module) -> bool:
    """To a sequence beside its places: there a batch is asked for its length, which only the strict tracer leaves open."""
    return any(isinstance(part, CrossAttention) for part in network.modules())


def _images(system: System) -> Tensor:
    with torch.no_grad():
        shape = system.decode(_tokens(system)).shape
    return torch.rand(shape) * 2 - 1


def _tokens(system: System) -> Tensor:
    spec = system.spec
    if system.learns == "indices":
        return torch.randint(spec.codebook_size, (EXAMPLES, *spec.index_grid))
    return torch.randn(EXAMPLES, *spec.latent_shape)


def _labels(system: System, told: Sequence[Example]) -> Tensor:
    """(EXAMPLES,) labels; (EXAMPLES, ...) rows of what is told in their place, where images were told something beside them."""
    config = system.prior.config
    labels = torch.from_numpy(system.labels[:1]).expand(EXAMPLES).contiguous()
    if not sets(config, "condition") or getattr(config.condition, "replaces_label", False):
        return labels
    part = load("conditions", config.condition.kind)
    if not told:
        raise ValueError(
            f"{system.name} keeps no example of the {part.NAME} that it was told, by which its network is traced: expected "
            f"some in told.json of its prior; train it anew, or leave out --onnx"
        )
    shown = [told[place % len(told)] for place in range(EXAMPLES)]
    try:
        return part.of_examples(config.condition, shown, torch.tensor([one.label for one in shown]))
    except ValueError as error:
        raise ValueError(f"{system.name} is traced with {part.NAME}, which cannot be read: {error}") from None


def _inputs_of_prior(system: System, tokens: Tensor, told: Sequence[Example]) -> dict[str, Tensor]:
    """An example of each argument that the prior's `forward`, or a sampler around it, needs, known by its name."""
    config = system.prior.config
    examples: dict[str, Callable[[], Tensor]] = {
        "indices": lambda: tokens.flatten(1),
        "is_hidden": lambda: torch.rand(*tokens.flatten(1).shape, len(system.prior.radix.sizes)) < 0.5,
        "x": lambda: tokens,
        "t": lambda: torch.rand(EXAMPLES),
        "lengths": lambda: torch.rand(EXAMPLES),
        "sigma": lambda: torch.rand(EXAMPLES) + 0.1,
        "noise": lambda: torch.randn(EXAMPLES, config.noise_dim),
        "labels": lambda: _labels(system, told),
    }
    parameters = inspect.signature(system.prior.forward).parameters.values()
    needed = [each.name for each in parameters if each.default is inspect.Parameter.empty or each.name in OPTIONAL]
    unknown = [name for name in needed if name not in examples]
    if unknown:
        raise ValueError(
            f"the prior's forward takes {unknown[0]}, expected {', '.join(examples)}: add an example of it to export/onnx.py"
        )
    return {name: examples[name]() for name in needed}

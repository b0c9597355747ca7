"""A system's networks as ONNX, for onnxruntime and what reads ONNX elsewhere: encoder.onnx, decoder.onnx, prior.onnx.

The batch is of any size. Images are float32 in [-1, 1], tokens as TrainedSystem has them, labels up to and including the null
label. prior.onnx is one call of the prior's network, by its own inputs: logits of all indices (autoregressive, masked), the
prediction at a noise level or a time (diffusion, flow), or for jumps from a time (flow map), latents of noise (GAN).
guide.onnx is the same of its guide, where it keeps one. The sampler around them is the caller's.
"""

import inspect
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from tessera.artifacts import whole
from tessera.system import System

OPSET = 20
EXAMPLES = 2  # images while the graph is traced: a batch of one would be taken for a constant


class Call(nn.Module):
    """A method of a system that takes a tensor, as a network."""

    def __init__(self, system: System, method: str):
        super().__init__()
        self.tokenizer, self.system, self.method = system.tokenizer, system, method

    def forward(self, given: Tensor) -> Tensor:
        return getattr(self.system, self.method)(given)


def write(system: System, out: Path) -> None:
    """Raises ValueError if onnx and onnxscript are not installed, or the prior takes what this file does not know."""
    try:
        import onnxscript  # noqa: F401  by torch.onnx
    except ImportError:
        raise ValueError("ONNX needs the packages onnx and onnxscript: pip install 'tessera[onnx]'") from None
    out.mkdir()
    for name, (network, given, result) in networks(system).items():
        # The graph is of any batch, whatever is said here: diffusers lays 64 images and more out otherwise, to the same end
        batch = torch.export.Dim("batch", min=1, max=63)
        with whole.file(out / f"{name}.onnx") as beside, warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")  # of the exporter about itself
            # Here, because torch.onnx would make a constant of a batch that the network does not leave open
            graph = torch.export.export(network, tuple(given.values()), dynamic_shapes=tuple({0: batch} for _ in given))
            torch.onnx.export(
                graph, (), beside, input_names=list(given), output_names=[result], opset_version=OPSET, dynamo=True,
                external_data=False, verbose=False,
            )  # fmt: skip


def networks(system: System) -> dict[str, tuple[nn.Module, dict[str, Tensor], str]]:
    """{file: (network, an example of each of its inputs, the name of what it gives)}, on the CPU."""
    system = System(system.tokenizer.cpu(), system.prior.cpu(), system.spec, system.learns, system.name)
    images, tokens = _images(system), _tokens(system)
    inputs, guide = _inputs_of_prior(system, tokens), getattr(system.prior, "guide", None)
    found = {
        "encoder": (Call(system, "encode").eval(), {"images": images}, "tokens"),
        "decoder": (Call(system, "decode").eval(), {"tokens": tokens}, "images"),
        "prior": (system.prior, inputs, "predicted"),
    }
    return found if guide is None else found | {"guide": (guide, inputs, "predicted")}


def _images(system: System) -> Tensor:
    with torch.no_grad():
        shape = system.decode(_tokens(system)).shape
    return torch.rand(shape) * 2 - 1


def _tokens(system: System) -> Tensor:
    spec = system.spec
    if system.learns == "indices":
        return torch.randint(spec.codebook_size, (EXAMPLES, *spec.index_grid))
    return torch.randn(EXAMPLES, *spec.latent_shape)


def _inputs_of_prior(system: System, tokens: Tensor) -> dict[str, Tensor]:
    """An example of each argument that the prior's `forward` cannot do without, known by its name."""
    config = system.prior.config
    examples: dict[str, Callable[[], Tensor]] = {
        "indices": lambda: tokens.flatten(1),
        "x": lambda: tokens,
        "t": lambda: torch.rand(EXAMPLES),
        "lengths": lambda: torch.rand(EXAMPLES),
        "sigma": lambda: torch.rand(EXAMPLES) + 0.1,
        "noise": lambda: torch.randn(EXAMPLES, config.noise_dim),
        "labels": lambda: torch.from_numpy(system.labels[:1]).expand(EXAMPLES).contiguous(),
    }
    parameters = inspect.signature(system.prior.forward).parameters.values()
    needed = [each.name for each in parameters if each.default is inspect.Parameter.empty]
    unknown = [name for name in needed if name not in examples]
    if unknown:
        raise ValueError(
            f"the prior's forward takes {unknown[0]}, expected {', '.join(examples)}: add an example of it to export/onnx.py"
        )
    return {name: examples[name]() for name in needed}

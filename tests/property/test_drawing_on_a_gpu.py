"""Drawing on a GPU without one.

Tensors that have a device and no values (FakeTensorMode) refuse whatever waits for a value. CUDA graphs are played on the CPU:
the kernels of a step are recorded, undone, and run again on the same memory, without the Python that called them.
"""

from contextlib import contextmanager, nullcontext
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from toy_distributions import spec

from tessera.bases.optimization import PriorTraining
from tessera.components import load
from tessera.nn import decoding, steps, transformer
from tessera.nn.gumbel import gumbel_noise
from tessera.nn.precision import in_precision
from tessera.nn.samplers import noise
from tessera.priors import autoregressive

GPU = torch.device("cuda:0")
MIB = 2**20
SAMPLINGS = [
    ("masked", {}),
    ("masked", {"order": "halton", "guidance_scale": 2.0, "guidance_ramp": 2.0}),
    ("masked", {"order": "random"}),
    ("autoregressive", {}),
    ("autoregressive", {"guidance_scale": 2.0, "guidance_ramp": 2.0, "top_k": 5, "top_p": 0.9}),
    ("bitwise", {"order": "confidence"}),
    ("bitwise", {"guidance_scale": 2.0, "autoguidance_scale": 2.0, "guidance_ramp": 2.0}),
    ("diffusion", {"sampler": "ancestral", "num_steps": 3}),
    ("flow_matching", {"num_steps": 3}),
    ("gan", {"truncation": 1.0}),
    ("masked", {"order": "halton", "guidance_scale": 2.0, "autoguidance_scale": 2.0, "guidance_ramp": 2.0}),
    ("autoregressive", {"guidance_scale": 2.0, "autoguidance_scale": 2.0, "guidance_ramp": 2.0}),
    ("diffusion", {"autoguidance_scale": 2.0, "num_steps": 3}),
    ("flow_matching", {"autoguidance_scale": 2.0, "num_steps": 3}),
]


class GpuGenerator(torch.Generator):
    """Says that it is on a GPU; without values nothing is asked of it."""

    @property
    def device(self):
        return GPU


class Gpu(FakeTensorMode):
    """What is on the GPU has no values; what is on the CPU has. `sent`: the bytes of the tensors that went there, in order."""

    def __init__(self):
        super().__init__(allow_non_fake_inputs=True)
        self.sent = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        given = tree_leaves((args, kwargs))
        if not any(isinstance(each, FakeTensor) or (isinstance(each, torch.device) and each == GPU) for each in given):
            return func(*args, **(kwargs or {}))
        here = [each for each in given if isinstance(each, torch.Tensor) and not isinstance(each, FakeTensor)]
        self.sent += [each.nbytes for each in here if each.ndim]  # a single number is an argument of its kernel
        return super().__torch_dispatch__(func, types, args, kwargs)


@pytest.fixture(autouse=True)
def without_a_graph(monkeypatch):
    """The same steps that a graph would hold, each called."""

    def call(step, times, device, generator):
        number = torch.zeros(1, dtype=torch.long, device=device)
        for _ in range(times):
            step(number)
            number += 1

    monkeypatch.setattr(steps, "_replay", call)


def sample(kind: str, settings: dict, generator: torch.Generator) -> tuple[torch.Tensor, list[int]]:
    """Tokens of 16 images with the sampling's settings, and what was sent to the GPU for them."""
    part, token_spec = load("priors", kind), spec(codebook_size=4096, shape=(64, 8, 8))
    config = {"kind": kind, "training": {"num_steps": 1}}
    if kind != "gan":
        sizes = {"width": 16, "depth": 1, "heads": 2}
        is_of_indices = part.LEARNS == "indices"
        config |= sizes if is_of_indices else {"denoiser": {"kind": "transformer", **sizes}}
    with Gpu() as gpu:
        with GPU:
            model = part.Model(part.Config.model_validate(config), token_spec).eval()
            model.guide = part.Model(part.Config.model_validate(config), token_spec).eval()
        labels = torch.zeros(16, dtype=torch.long, device=GPU)
        gpu.sent.clear()
        return model.sample(labels, part.Sampling.model_validate(settings), generator), gpu.sent


@pytest.mark.parametrize(("kind", "settings"), SAMPLINGS)
def test_no_noise_is_sent_to_the_gpu_and_nothing_waits_for_it(kind, settings):
    tokens, sent = sample(kind, settings, GpuGenerator())
    assert tokens.device == GPU and tokens.shape in [(16, 8, 8), (16, 64, 8, 8)]
    assert max(sent, default=0) < MIB / 16


@pytest.mark.parametrize(("kind", "settings"), SAMPLINGS)
def test_a_generator_on_the_cpu_draws_for_the_gpu(kind, settings):
    """The same draws as on the CPU: they are made there, and sent."""
    drawn = torch.Generator().manual_seed(0)
    before = drawn.get_state()
    tokens, sent = sample(kind, settings, drawn)
    assert tokens.device == GPU and not torch.equal(drawn.get_state(), before)
    assert sum(sent) >= 16 * 4 * (64 if kind == "gan" else 64 * 64)


def test_masked_steps_are_sent_before_the_first_one():
    numbers = [len(sample("masked", {"decoding_steps": steps}, GpuGenerator())[1]) for steps in (2, 16)]
    assert numbers[0] == numbers[1]


def test_what_waits_for_the_gpu_and_what_is_sent_would_be_seen():
    with Gpu() as gpu:
        there = torch.zeros(1024, device=GPU)
        with pytest.raises(DataDependentOutputException):
            there.argmax().item()
        assert torch.rand(1024).argmax().item() < 1024 and gpu.sent == []
        there += torch.rand(1024).to(GPU)
    assert gpu.sent == [4096]


def test_noise_is_on_the_device_of_the_tensor_and_that_of_the_generator():
    generators = torch.Generator().manual_seed(0), torch.Generator().manual_seed(0)
    there, here = torch.empty(3, 2, device="meta"), torch.empty(3, 2)
    for draw in (noise, gumbel_noise):
        assert draw(there, generators[0]).device.type == "meta"
        draw(here, generators[1])
        assert torch.equal(*(each.get_state() for each in generators))


class Graph(TorchDispatchMode):
    """A CUDA graph on the CPU: kernels are recorded with their arguments, and what they wrote is undone; a replay runs them."""

    def __init__(self):
        super().__init__()
        self.kernels, self.written, self.replays = [], [], 0

    def register_generator_state(self, generator):
        self.generator = generator

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        for given, declared in zip(args, func._schema.arguments, strict=False):
            if declared.alias_info is not None and declared.alias_info.is_write:
                self.written.append((given, given.clone()))
        out = func(*args, **kwargs)
        here = {x.untyped_storage().data_ptr() for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)}
        fresh = [
            x for x in tree_leaves(out) if x.untyped_storage().data_ptr() not in here
        ]  # others share what they are of
        self.kernels.append((func, args, kwargs, fresh))
        return out

    @contextmanager
    def capture(self):
        state = self.generator.get_state()
        with self:
            yield
        for tensor, before in reversed(self.written):
            tensor.copy_(before)
        self.generator.set_state(state)

    def replay(self):
        self.replays += 1
        for func, args, kwargs, fresh in self.kernels:
            for kept, new in zip(fresh, tree_leaves(func(*args, **kwargs)), strict=False):
                kept.copy_(new)


@pytest.fixture
def graphs(monkeypatch) -> list[Graph]:
    """The graphs that were made: `steps.repeat` takes the CPU for a GPU."""
    monkeypatch.undo()
    made = []

    def graph():
        made.append(Graph())
        return made[-1]

    stream = SimpleNamespace(wait_stream=lambda other: None, synchronize=lambda: None)
    for name, instead in {
        "device": lambda device: nullcontext(),
        "Stream": lambda: stream,
        "current_stream": lambda: stream,
        "stream": lambda stream: nullcontext(),
        "CUDAGraph": graph,
        "graph": lambda graph, stream, capture_error_mode: graph.capture(),
    }.items():
        monkeypatch.setattr(torch.cuda, name, instead)
    monkeypatch.setattr(autoregressive, "repeat", steps._replay)
    for module in (decoding, transformer):
        monkeypatch.setattr(module, "is_handwritten_faster", lambda x: False)
    return made


GRAPHED = [
    {},
    {"guidance_scale": 2.5, "guidance_ramp": 2.0},
    {"top_k": 5, "top_p": 0.8},
    {"guidance_scale": 2.5, "autoguidance_scale": 2.0, "guidance_ramp": 2.0},
]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("until", [(0.0, 0.0), (1.0, 1.0)])
@pytest.mark.parametrize("settings", GRAPHED)
def test_one_graph_of_a_step_draws_every_index(until, settings, precision, request):
    torch.manual_seed(0)
    config = autoregressive.Config(
        width=32, depth=2, heads=2, random_order_until=until, training=PriorTraining(num_steps=1)
    )
    sizes = spec(codebook_size=9, shape=(3, 3, 2), num_classes=3)
    model = autoregressive.Model(config, sizes).eval()
    model.guide = autoregressive.Model(config, sizes).eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    model = in_precision(model, precision)
    sampling, labels = autoregressive.Sampling(**settings), torch.arange(60) % 3
    given, is_known = torch.randint(9, (60, 3, 2)), torch.rand(60, 3, 2) < 0.3

    def drawn():
        generator = torch.Generator().manual_seed(7)
        indices = model.complete(given, is_known, labels, sampling, generator)
        return indices, model.sample(labels, sampling, generator), generator.get_state()

    called = drawn()
    graphs = request.getfixturevalue("graphs")
    replayed = drawn()
    assert [graph.replays for graph in graphs] == [5, 5]  # of 6 places; the first is called
    assert all(torch.equal(*pair) for pair in zip(called, replayed, strict=True))

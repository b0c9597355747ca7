"""Drawing on a GPU without one: tensors that have a device and no values (FakeTensorMode) refuse whatever waits for a value."""

import pytest
import torch
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensor, FakeTensorMode
from torch.utils._pytree import tree_leaves
from toy_distributions import spec

from tessera.components import load
from tessera.nn.gumbel import gumbel_noise
from tessera.nn.samplers import noise

GPU = torch.device("cuda:0")
MIB = 2**20
SAMPLINGS = [
    ("masked", {}),
    ("masked", {"order": "halton", "guidance_scale": 2.0, "guidance_ramp": 2.0}),
    ("masked", {"order": "random"}),
    ("autoregressive", {}),
    ("autoregressive", {"guidance_scale": 2.0, "guidance_ramp": 2.0, "top_k": 5, "top_p": 0.9}),
    ("diffusion", {"sampler": "ancestral", "num_steps": 3}),
    ("flow_matching", {"num_steps": 3}),
    ("gan", {"truncation": 1.0}),
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

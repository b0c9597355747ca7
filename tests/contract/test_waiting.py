"""What a step asks of the host: on meta tensors, whose numbers nobody can read, a step of every part still goes through."""

import contextlib

import pytest
import torch
from test_components import SMALL, TRAINED, _trainable, _training_data
from torch.utils._python_dispatch import TorchDispatchMode

from tessera.training import loop
from tessera.training.terms import Terms

META = torch.device("meta")


class Alone:
    """What a step asks of an Accelerator."""

    num_processes, process_index, device = 1, 0, META

    def autocast(self):
        return contextlib.nullcontext()

    def no_sync(self, network):
        return contextlib.nullcontext()

    def backward(self, loss):
        loss.backward()


class Copies(TorchDispatchMode):
    """Records operators that bring values of the host's memory to the device, or wait for it to know a size."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        given = [each for each in torch.utils._pytree.tree_leaves((args, kwargs)) if isinstance(each, torch.Tensor)]
        result = function(*args, **(kwargs or {}))
        of_host = [each for each in given if each.device.type == "cpu"]
        if of_host and getattr(result, "device", None) == META:
            self.found.append(str(function))
        if any(name in str(function) for name in ("bincount", "masked_select", "unique", "nonzero")):
            self.found.append(str(function))
        return result


@pytest.fixture
def meta(monkeypatch):
    """What PyTorch refuses on meta tensors though it has nothing to do with their values."""
    clip = torch.nn.utils.clip_grad_norm_
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", lambda some, most, foreach: clip(some, most))
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: contextlib.nullcontext())
    monkeypatch.setattr(torch.optim.AdamW, "step", lambda self: None)


@pytest.mark.parametrize(("folder", "kind"), TRAINED)
def test_an_ordinary_step_reads_nothing_from_the_device_and_copies_nothing_to_it(
    folder, kind, image_spec, token_spec, meta
):
    folder, module, config = _trainable(folder, kind)
    spec, rows = _training_data(folder, kind, image_spec, token_spec)
    objective = module.Objective(module.Model(config, spec), config).train().to(META)
    optimizers, terms = objective.optimizers(), Terms(objective.phases, META, torch.tensor)
    batch = type(rows.whole)(*(tensor.to(META) for tensor in rows.whole))
    for step in range(4):  # a codebook passes the first by, and is placed in the second
        with Copies() as copies:
            loop._step(objective, objective, optimizers, [batch], 1.0, Alone(), terms, step)
        assert copies.found == [] or step == 0  # once, of what stays there
    with pytest.raises(RuntimeError):  # this is how a step that did ask would end
        terms.read()


@pytest.mark.parametrize("kind", ["vqvae", "vqgan", "vae"])
def test_a_step_with_regularized_latents_waits_no_more(kind, image_spec, token_spec, meta, monkeypatch):
    latents = {"noise": 1.0, "equivariance": {"probability": 1, "smallest_scale": 0.5}}
    monkeypatch.setitem(SMALL["tokenizers"], kind, {**SMALL["tokenizers"][kind], "latents": latents})
    test_an_ordinary_step_reads_nothing_from_the_device_and_copies_nothing_to_it(
        "tokenizers", kind, image_spec, token_spec, meta
    )


def test_a_row_of_the_history_is_read_at_once(monkeypatch):
    reads, tolist = [], torch.Tensor.tolist
    monkeypatch.setattr(torch.Tensor, "tolist", lambda self: reads.append(1) or tolist(self))
    monkeypatch.setattr(torch.Tensor, "item", None)
    terms = Terms(("a", "b"), torch.device("cpu"), torch.tensor)
    for step in range(3):
        terms.begin(step)
        terms.note("a", {"loss": torch.tensor(1.5 + step), "size": torch.tensor(2.0)}, torch.tensor(1.0))
        terms.note("b", {"loss": torch.tensor(0.25)}, torch.tensor(1.0))
    assert terms.read() == {"loss": 3.5, "size": 2.0, "b_loss": 0.25} and len(reads) == 1

"""Inference in bfloat16: products and convolutions of networks are in it, all between and around networks is float32.

Sources: which operations keep float32 is PyTorch's choice (torch.autocast), after Micikevicius et al., "Mixed Precision
Training", 2017, arXiv:1710.03740, section 3.3; bfloat16: Kalamkar et al., 2019, arXiv:1905.12322, section 3.
Differs from them: nothing is trained, so weights are rounded once instead of in every call; the values are the same.
"""

import copy
import functools
import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

PRODUCTS = (nn.Linear, nn.Conv2d, nn.ConvTranspose2d)


def in_precision(model: nn.Module, precision: str) -> nn.Module:
    """For "fp32" the model itself. For "bf16" a copy whose every public method computes under autocast to bfloat16.

    The model's code decides what stays float32 there: what a tokenizer or a prior returns, a quantizer's distances, guidance,
    the steps of samplers and the noise.
    """
    some = next(model.parameters(), None)
    if precision == "fp32" or some is None:
        return model
    found = copy.deepcopy(model)
    for name, layer in found.named_modules():
        if isinstance(layer, PRODUCTS) and not name.startswith("quantizer."):
            layer.to(torch.bfloat16)  # as autocast would in every call
    for name, _ in inspect.getmembers(type(found), inspect.isfunction):
        if name == "forward" or not (name.startswith("_") or hasattr(nn.Module, name)):
            setattr(found, name, _under_autocast(getattr(found, name), some.device.type))
    return found


def _under_autocast(method: Callable[..., Any], device: str) -> Callable[..., Any]:
    @functools.wraps(method)
    def call(*args: Any, **kwargs: Any) -> Any:
        with torch.autocast(device, torch.bfloat16):
            return method(*args, **kwargs)

    return call


def slowness(precision: str, device: torch.device) -> str:
    """What a person should know of this precision on this device: a sentence, or ""."""
    is_native = any(has for name, has in torch.cpu.get_capabilities().items() if "bf16" in name)
    if precision == "fp32" or device.type != "cpu" or is_native:
        return ""
    return "this processor has no bf16 instructions: precision fp32 is many times faster on it"

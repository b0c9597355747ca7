"""Networks that are built to be asked what they are, and never run."""

import math
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

FILLING = ("normal_", "uniform_", "trunc_normal_", "kaiming_normal_", "kaiming_uniform_")
MAKING = ("empty", "zeros", "ones", "full", "rand", "randn")  # functions of a shape


class WithoutWeights(TorchFunctionMode):
    """Inside, networks are built without being filled: of large ones the memory is then never touched.

    Nor are they built on the meta device, as torch's skip_init does first: its kernels take seconds to import.
    """

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if getattr(function, "__name__", "") in FILLING:
            return args[0] if args else kwargs["tensor"]  # of a method of Tensor, or of nn.init
        if kwargs.get("device") == "meta":
            kwargs = kwargs | {"device": "cpu"}
        return function(*args, **kwargs)


class TooLarge(ValueError):
    """A network was about to take more than it may."""


class WithinLimits(WithoutWeights):
    """WithoutWeights, of a network that a stranger describes: raises TooLarge before its tensors have more values, or are
    more, than was said."""

    def __init__(self, most_values: int, most_tensors: int):
        super().__init__()
        self.values, self.tensors = most_values, most_tensors

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(function, "__name__", "") in MAKING:
            shape = (kwargs or {}).get(
                "size", args[0] if args and isinstance(args[0], tuple | list | torch.Size) else args
            )
            self.tensors -= 1
            self.values -= math.prod(side for side in shape if isinstance(side, int)) if shape else 1
            if self.values < 0 or self.tensors < 0:
                raise TooLarge("it would have more weights than the file holds")
        return super().__torch_function__(function, types, args, kwargs)

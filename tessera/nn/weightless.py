"""Networks that are built to be asked what they are, and never run."""

from typing import Any

from torch.overrides import TorchFunctionMode

FILLING = ("normal_", "uniform_", "trunc_normal_", "kaiming_normal_", "kaiming_uniform_")


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

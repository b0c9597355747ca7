"""Steps of equal work along a sequence: on a GPU one CUDA graph, captured once and replayed for every further element.

A step is told its number as an int, or as a tensor (1,) on the device; the functions here read and write at either. What a
graph does is fixed when it is captured, so within one the number must be a tensor, and no shape may depend on it.
"""

from collections.abc import Callable

import torch
from torch import Tensor

Number = int | Tensor


def element(x: Tensor, number: Number, dim: int = 0) -> Tensor:
    """The element of x at `number` along an axis, which stays, with length 1."""
    return x.narrow(dim, number, 1) if isinstance(number, int) else x.index_select(dim, number)


def put(x: Tensor, number: Number, value: Tensor, dim: int = 0) -> None:
    """Write the element of x at `number` along an axis; value has length 1 along it."""
    if isinstance(number, int):
        x.narrow(dim, number, 1).copy_(value)
    else:
        x.index_copy_(dim, number, value.to(x.dtype))


def repeat(step: Callable[[Number], None], times: int, device: torch.device, generator: torch.Generator) -> None:
    """step(0), ..., step(times - 1), one after the other.

    The generator is the one that the step draws from; no graph can hold the draws of one on the CPU.
    """
    if device.type == "cuda" and generator.device.type == "cuda":
        _replay(step, times, device, generator)
        return
    for number in range(times):
        step(number)


def _replay(step: Callable[[Number], None], times: int, device: torch.device, generator: torch.Generator) -> None:
    """`repeat` by a CUDA graph of this call alone: it sees the weights as they are, and costs about two steps.

    A graph by hand, for torch.compile cannot trace a generator, would compile for minutes, and anew for every batch size. The
    first step is run as it is, on the stream of the capture: libraries allocate there what they need once.
    """
    with torch.cuda.device(device):
        number = torch.zeros(1, dtype=torch.long, device=device)

        def advance() -> None:
            step(number)
            number.add_(1)

        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            advance()
        torch.cuda.current_stream().wait_stream(stream)
        if times > 1:
            graph = torch.cuda.CUDAGraph()
            # a replay draws on from where the one before stopped; versions after 2.11 do so unasked (pytorch#176753)
            graph.register_generator_state(generator)
            with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
                advance()
            for _ in range(times - 1):
                graph.replay()
        torch.cuda.current_stream().synchronize()  # the graph owns the memory of what still runs

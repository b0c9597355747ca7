"""The causal body of nn/transformer.py, one element of the sequence after another: what sampling asks of it.

Keys and values of all elements so far are kept (Vaswani et al. 2017, arXiv:1706.03762, equation 1, one row at a time).

Shape letters: B batch, L sequence, N width, H heads, E = N / H.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from tessera.nn import handwritten
from tessera.nn.steps import Number, element
from tessera.nn.transformer import NORM_EPSILON, Block, Past, Transformer, is_handwritten_faster

# weights in columns: on a CPU MKL then multiplies 16 to 128 rows by them in 0.7 to 0.9 of the time, with the same bits; fewer
# rows, or wider layers, gain nothing by it (measured on a Xeon with AVX-512)
FEWEST_ROWS, LARGEST_WIDTH = 16, 256


class Decoder:
    """Any device, and any of the precisions that autocast gives."""

    def __init__(self, body: Transformer, like: Tensor):
        """like: (B, N), the elements of one step."""
        self.body, dtype = body, like.dtype
        if torch.is_autocast_enabled(like.device.type):
            dtype = torch.get_autocast_dtype(like.device.type)
        shape = (2, len(like), body.heads, body.cos.shape[0], body.width // body.heads)
        self.memory = [like.new_zeros(shape, dtype=dtype) for _ in body.blocks]  # zeros: what is masked must be numbers

    def step(self, x: Tensor, number: Number, places: Tensor | None = None) -> Tensor:
        """(B, N), the elements at `number` -> (B, N), what the body makes of them given those before.

        places: (B, 1) their grid places, for each image its own; None is raster order.
        """
        body, x = self.body, x.unsqueeze(1)
        cos, sin = (angles.to(x.dtype) for angles in self._angles(number, places))
        is_past = None
        if not isinstance(number, int):
            is_past = (torch.arange(len(body.cos), device=x.device) <= number).unsqueeze(0)
        for block, (keys, values) in zip(body.blocks, self.memory, strict=True):
            x = block(x, cos, sin, None, body.is_causal, Past(keys, values, number, is_past))
        return body.norm(x).squeeze(1)

    def _angles(self, number: Number, places: Tensor | None) -> list[Tensor]:
        """Cosines and sines, (1, E / 2) or (B, 1, 1, E / 2)."""
        tables = self.body.cos, self.body.sin
        if places is None:
            return [element(table, number) for table in tables]
        return [table[places].unsqueeze(1) for table in tables]


class HandwrittenDecoder(Decoder):
    """`Decoder` on a CPU in float32: the same formulas and bits, in buffers that stay in the processor's cache.

    What a step gives is one of them, and holds until the next step.
    """

    def __init__(self, body: Transformer, like: Tensor):
        super().__init__(body, like)
        rows, width, new = len(like), body.width, like.new_empty
        self.layers = [_matrices(block, rows >= FEWEST_ROWS and width <= LARGEST_WIDTH) for block in body.blocks]
        self.h, self.qkv, self.gate_up = new(rows, width), new(rows, 3 * width), new(rows, self.layers[0][3].shape[1])
        by_heads = self.qkv.view(rows, 3, body.heads, -1)
        self.both, self.query = by_heads[:, :2], by_heads[:, 0].unsqueeze(2)  # (B, 2, H, E), (B, H, 1, E)
        self.key_value = by_heads[:, 1:].transpose(0, 1).unsqueeze(3)  # (2, B, H, 1, E)
        self.normed = torch.empty_like(self.both)

    def step(self, x: Tensor, number: int, places: Tensor | None = None) -> Tensor:
        x, end = x.clone(), number + 1
        (cos, sin), (gate, up) = self._angles(number, places), self.gate_up.chunk(2, dim=1)
        for block, memory, (qkv, norms, out, gate_up, down) in zip(
            self.body.blocks, self.memory, self.layers, strict=True
        ):
            torch.mm(self._norm(x, block.attention_norm.weight), qkv, out=self.qkv)
            torch.mul(self.both, handwritten.inverse_rms(self.both, NORM_EPSILON), out=self.normed).mul_(norms)
            handwritten.turn(self.normed, cos, sin, 1, self.both)
            memory[:, :, :, number:end] = self.key_value
            seen = F.scaled_dot_product_attention(self.query, *memory[:, :, :, :end])
            x += torch.mm(seen.view(x.shape), out, out=self.h)
            torch.mm(self._norm(x, block.mlp_norm.weight), gate_up, out=self.gate_up)
            F.silu(gate, inplace=True).mul_(up)
            x += torch.mm(gate, down, out=self.h)
        return self._norm(x, self.body.norm.weight)

    def _norm(self, x: Tensor, weight: Tensor) -> Tensor:
        return torch.mul(x, handwritten.inverse_rms(x, NORM_EPSILON), out=self.h).mul_(weight)


def decoder(body: Transformer, like: Tensor) -> Decoder:
    """The faster one for (B, N) elements such as these."""
    is_plain = body.training or torch.is_autocast_enabled(like.device.type)  # dropout, other precisions
    return (HandwrittenDecoder if is_handwritten_faster(like) and not is_plain else Decoder)(body, like)


def _matrices(block: Block, in_columns: bool) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """qkv (N, 3 N), norms of query and key (2, 1, E), out (N, N), gate and up (N, 2 hidden), down (hidden, N)."""
    attention, mlp = block.attention, block.mlp
    layers = (attention.qkv, attention.out, mlp.gate_up, mlp.down)
    qkv, out, gate_up, down = (layer.weight.t().contiguous() if in_columns else layer.weight.t() for layer in layers)
    norms = torch.stack([attention.query_norm.weight, attention.key_norm.weight]).unsqueeze(1)
    return qkv, norms, out, gate_up, down

"""Attention of a network's places to a sequence beside them, such as the bytes of a caption or the patches of an image.

What reads the sequence leaves it in a Context, before the body of the network runs; layers that share the Context attend to
it. Bodies therefore hand nothing through that only some of them need.

Sources: Vaswani et al. 2017, arXiv:1706.03762, section 3.2.3; its place in a network that draws: Rombach et al. (latent
diffusion), 2022, arXiv:2112.10752, equation 3; after the self-attention of a transformer: Chen et al. (PixArt-alpha), 2023,
arXiv:2310.00426, section 2.3, whose layers also begin as the identity; queries and keys normalized: Henry et al., 2020,
arXiv:2010.04245.
Differs from them: it follows the feed-forward layer; each layer has a key of its own that is always there, so that a sequence
without elements says a constant.

Shape letters: B batch, L places, S elements of the sequence, E their width, N width of the network, H heads.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tessera.nn.decoding import Decoder
from tessera.nn.transformer import Block, Past, RMSNorm, Transformer


class Context:
    """The sequence of the batch that a network is being run on."""

    def __init__(self, width: int):
        """width: E."""
        self.width = width
        self.sequence = torch.zeros(1, 0, width)
        self.is_there = torch.zeros(1, 0, dtype=torch.bool)

    def tell(self, sequence: Tensor, is_there: Tensor) -> None:
        """(B, S, E), and (B, S) which of them there are: the others are padding."""
        self.sequence, self.is_there = sequence, is_there

    def __deepcopy__(self, memo: dict[int, Any]) -> "Context":
        """An empty one for a copied network, all of whose layers share it: the sequence may be part of a graph."""
        memo[id(self)] = found = Context(self.width)
        return found


class CrossAttention(nn.Module):
    """(B, L, N) -> (B, L, N), what is added to the places: nothing in the beginning. Vaswani et al., section 3.2.3."""

    def __init__(self, width: int, heads: int, context: Context):
        super().__init__()
        self.context, self.heads = context, heads
        self.norm, self.sequence_norm = RMSNorm(width), RMSNorm(context.width)
        self.query = nn.Linear(width, width, bias=False)
        self.key_value = nn.Linear(context.width, 2 * width, bias=False)
        self.out = nn.Linear(width, width, bias=False)
        self.query_norm, self.key_norm = RMSNorm(width // heads), RMSNorm(width // heads)
        self.nothing = nn.Parameter(torch.randn(1, 1, 2 * width) * 0.02)  # a key and a value that are always there
        nn.init.normal_(self.query.weight, std=width**-0.5)
        nn.init.normal_(self.key_value.weight, std=context.width**-0.5)
        nn.init.zeros_(self.out.weight)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        sequence, is_there = self.context.sequence, self.context.is_there
        query = self.query_norm(self._by_heads(self.query(self.norm(x))))
        said = self.key_value(self.sequence_norm(sequence))  # (B, S, 2 N)
        said = torch.cat([self.nothing.to(said.dtype).expand(len(said), -1, -1), said], dim=1)
        key, value = (self._by_heads(half) for half in said.chunk(2, dim=2))
        is_seen = F.pad(is_there, (1, 0), value=True)[:, None, None]  # (B, 1, 1, 1 + S)
        found = F.scaled_dot_product_attention(query, self.key_norm(key), value, attn_mask=is_seen)
        return self.out(found.transpose(1, 2).reshape(batch, length, width))

    def _by_heads(self, x: Tensor) -> Tensor:
        """(B, L, N) -> (B, H, L, N / H)."""
        return x.unflatten(2, (self.heads, -1)).transpose(1, 2)


class AttendingBlock(Block):
    """A block of a transformer, its layers under their names, whose places then attend to the context."""

    def __init__(self, block: Block, cross_attention: CrossAttention):
        nn.Module.__init__(self)
        for name, layer in block.named_children():
            self.add_module(name, layer)
        if block.modulation is None:
            self.modulation = None
        self.cross_attention = cross_attention

    def forward(
        self, x: Tensor, cos: Tensor, sin: Tensor, condition: Tensor | None, is_causal: bool, past: Past | None
    ) -> Tensor:
        x = super().forward(x, cos, sin, condition, is_causal, past)
        return x + self.cross_attention(x)


class GridCrossAttention(nn.Module):
    """(B, N, h, w) -> (B, N, h, w): the same for the places of a grid; starts as the identity."""

    def __init__(self, channels: int, heads: int, context: Context):
        super().__init__()
        self.cross_attention = CrossAttention(channels, heads, context)

    def forward(self, x: Tensor) -> Tensor:
        found = self.cross_attention(x.flatten(2).transpose(1, 2))
        return x + found.transpose(1, 2).unflatten(2, x.shape[2:])


def attend(network: nn.Module, context: Context) -> None:
    """Let every transformer in a network attend to the context in each block; or, in a U-Net, its coarsest grid."""
    bodies = [part for part in network.modules() if isinstance(part, Transformer)]
    for body in bodies:
        for number, block in enumerate(body.blocks):
            body.blocks[number] = AttendingBlock(block, CrossAttention(body.width, body.heads, context))
    if not bodies:
        middle = network.middle
        channels = middle[0].conv2.out_channels
        middle.append(GridCrossAttention(channels, channels // 32 if channels % 32 == 0 else 1, context))


def told_decoder(body: Transformer, plain: Decoder, like: Tensor) -> Decoder:
    """What decodes (B, N) elements such as these: `plain`, or one that runs the blocks as they are, which attend."""
    return Decoder(body, like) if isinstance(body.blocks[0], AttendingBlock) else plain

"""How evenly a codebook is used: from counts of its indices, which add up over batches.

Perplexity is the number of codes that, used equally often, would carry as much information; its binary logarithm is the
entropy, a lower bound on the bits per token that a code without context needs.

Source: Shannon, "A Mathematical Theory of Communication", 1948, section 6 (entropy).
"""

from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from tessera.components import Params
from tessera.contracts import Record, Shown, TokenUse

FIGURES = (
    Shown("codebook_usage", better="higher"),
    Shown("codebook_perplexity", "{:.1f}", better="higher"),
    Shown("dead_codes", form=None, better="lower"),
    Shown("codebook_bits", form=None, better="higher"),
)


class Config(Params):
    kind: Literal["codebook"]


class CodebookUse(NamedTuple):
    codebook_usage: float  # in (0, 1], the fraction of codes that occur
    codebook_perplexity: float  # in [1, codebook_size], exp of the entropy of the frequencies
    dead_codes: int  # codes that never occur
    codebook_bits: float  # log2 of the perplexity, in [0, log2(codebook_size)]


def of_tokens(config: Config, tokens: TokenUse, found: Record) -> None:
    """`codebook_usage`, `codebook_perplexity`, `dead_codes` and `codebook_bits`."""
    for name, value in use(tokens.counts)._asdict().items():
        found.add(name, value, tokens.protocol())


def count(indices: Tensor | np.ndarray, codebook_size: int) -> Tensor:
    """Indices of any shape and integer dtype -> how often each code occurs, (codebook_size,) int64 on the CPU.

    Counts of batches add up: total = count(first, K) + count(second, K).
    """
    indices = torch.as_tensor(indices)
    if indices.is_floating_point() or indices.is_complex():
        raise ValueError(f"indices are {indices.dtype}, expected integers: pass the indices, not the latents")
    flat = indices.long().flatten()
    if len(flat) and not (flat.min() >= 0 and flat.max() < codebook_size):
        raise ValueError(
            f"indices {flat.min().item()} to {flat.max().item()} are outside 0 to {codebook_size - 1}: "
            f"pass the codebook_size of the tokenizer that made them"
        )
    return torch.bincount(flat, minlength=codebook_size).cpu()


def use(counts: Tensor) -> CodebookUse:
    """counts: (K,) as `count` gives them. Raises ValueError if nothing was counted."""
    total = counts.sum()
    if total == 0:
        raise ValueError("no indices were counted, expected at least one: encode some images first")
    frequencies = counts[counts > 0].double() / total
    entropy = -(frequencies * frequencies.log()).sum()  # in nats
    num_used = len(frequencies)
    return CodebookUse(
        codebook_usage=num_used / len(counts),
        codebook_perplexity=entropy.exp().item(),
        dead_codes=len(counts) - num_used,
        codebook_bits=entropy.item() / np.log(2).item(),
    )

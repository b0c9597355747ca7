"""Nearest codes of a codebook, and a few near ones, without the (rows, codes) matrix of distances in memory.

argmin ||z - e||^2 = argmin ||e||^2 / 2 - z.e, so that a chunk of rows costs one matrix product and one pass over it.

Source: van den Oord et al., "Neural Discrete Representation Learning", 2017, arXiv:1711.00937, equation 1.
Differs from it: rows and codes are taken in tiles that fit the cache of a core.
"""

import torch
from torch import Tensor

CHUNK_BYTES = 4 * 2**20  # of scores held at once: fits the cache of a core
CODES_PER_TILE = 32768  # a larger codebook is searched tile by tile


@torch.no_grad()
def nearest(z: Tensor, codebook: Tensor) -> Tensor:
    """Van den Oord et al., equation 1: (M, D), (K, D) -> (M,) the row of the nearest code."""
    rows, codes = len(z), len(codebook)
    offsets = codebook.square().sum(dim=1) / 2  # (K,)
    tile = min(codes, CODES_PER_TILE)
    chunk = max(1, min(rows, CHUNK_BYTES // (4 * tile)))
    buffer = z.new_empty(chunk, tile)
    indices = torch.empty(rows, dtype=torch.long, device=z.device)
    for start in range(0, rows, chunk):
        piece = z[start : start + chunk]
        for first in range(0, codes, tile):
            part = codebook[first : first + tile]
            scores = buffer[: len(piece), : len(part)]
            torch.addmm(offsets[first : first + tile], piece, part.T, alpha=-1, out=scores)
            if codes == tile:
                indices[start : start + chunk] = scores.argmin(dim=1)
                continue
            best, place = scores.min(dim=1)
            if first == 0:
                lowest, winner = best, place
            else:
                closer = best < lowest
                lowest = torch.where(closer, best, lowest)
                winner = torch.where(closer, place + first, winner)
        if codes != tile:
            indices[start : start + chunk] = winner
    return indices


@torch.no_grad()
def nearest_others(codebook: Tensor, indices: Tensor, count: int) -> Tensor:
    """(K, D), (N,) -> (N, count) the rows of the codes nearest to the code of each index, nearest first, without itself."""
    codes = len(codebook)
    require_others(codes, count)
    asked, places = indices.unique(return_inverse=True)  # many places of an image share a code: search it once
    offsets = codebook.square().sum(dim=1) / 2  # (K,)
    tile = min(codes, CODES_PER_TILE)
    chunk = max(1, CHUNK_BYTES // (4 * tile))
    found = torch.empty(len(asked), count, dtype=torch.long, device=indices.device)
    for start in range(0, len(asked), chunk):
        own = asked[start : start + chunk]
        piece = codebook[own]
        scores, winners = piece.new_empty(len(own), 0), own.new_empty(len(own), 0)
        for first in range(0, codes, tile):
            part = codebook[first : first + tile]
            of_tile = torch.addmm(offsets[first : first + tile], piece, part.T, alpha=-1)
            inside = ((own >= first) & (own < first + len(part))).nonzero().squeeze(1)
            of_tile[inside, own[inside] - first] = torch.inf
            best, place = of_tile.topk(min(count, len(part)), dim=1, largest=False)
            scores, winners = torch.cat([scores, best], dim=1), torch.cat([winners, place + first], dim=1)
            scores, kept = scores.topk(min(count, scores.shape[1]), dim=1, largest=False)
            winners = winners.gather(1, kept)
        found[start : start + chunk] = winners
    return found[places]


def require_others(codebook_size: int, count: int) -> None:
    """Raise ValueError unless every code has `count` others."""
    if not 1 <= count < codebook_size:
        raise ValueError(
            f"{count} neighbors were asked for, but each of {codebook_size} codes has 1 to {codebook_size - 1} others"
        )

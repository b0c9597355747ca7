"""Nearest codes of a codebook, and a few near ones, without the (rows, codes) matrix of distances in memory.

argmin ||z - e||^2 = argmin ||e||^2 / 2 - z.e, so that a chunk of rows costs one matrix product and one pass over it.

Source: van den Oord et al., "Neural Discrete Representation Learning", 2017, arXiv:1711.00937, equation 1.
Differs from it: rows and codes are taken in tiles. On a CPU they fit the cache of a core; elsewhere they are as large as
memory allows, because each of them costs the launch of a few kernels.
"""

import torch
from torch import Tensor

CHUNK_BYTES = 4 * 2**20  # of scores held at once: fits the cache of a core
CODES_PER_TILE = 32768  # a larger codebook is searched tile by tile
DEVICE_BYTES = 2**30  # of scores held at once, where launches and not a cache decide


def tile_shape(codes: int, device: torch.device) -> tuple[int, int]:
    """How many rows, and how many of the codes, are compared at once."""
    is_cpu = device.type == "cpu"
    tile = min(codes, CODES_PER_TILE if is_cpu else DEVICE_BYTES // 4)
    return max(1, (CHUNK_BYTES if is_cpu else DEVICE_BYTES) // (4 * tile)), tile


@torch.no_grad()
def nearest(z: Tensor, codebook: Tensor) -> Tensor:
    """Van den Oord et al., equation 1: (M, D), (K, D) -> (M,) the row of the nearest code."""
    offsets = codebook.square().sum(dim=1) / 2  # (K,)
    if torch.compiler.is_exporting():  # a graph for batches of any size, to which tiles would be cut
        return torch.addmm(offsets, z, codebook.T, alpha=-1).argmin(dim=1)
    rows, codes = len(z), len(codebook)
    chunk, tile = tile_shape(codes, z.device)
    chunk = max(1, min(rows, chunk))
    buffer = z.new_empty(chunk, tile)
    indices = torch.empty(rows, dtype=torch.long, device=z.device)
    columns = codebook.T
    for start in range(0, rows, chunk):
        piece, found = z[start : start + chunk], indices[start : start + chunk]
        for first in range(0, codes, tile):
            part = columns[:, first : first + tile]
            scores = buffer[: len(piece), : part.shape[1]]
            torch.addmm(offsets[first : first + tile], piece, part, alpha=-1, out=scores)
            if codes == tile:
                torch.argmin(scores, dim=1, out=found)
                continue
            best, place = scores.min(dim=1)
            if first == 0:
                lowest, winner = best, place
            else:
                closer = best < lowest
                lowest = torch.where(closer, best, lowest)
                winner = torch.where(closer, place + first, winner)
        if codes != tile:
            found.copy_(winner)
    return indices


def nearest_others(codebook: Tensor, indices: Tensor, count: int) -> Tensor:
    """(K, D), (N,) -> (N, count) the rows of the codes nearest to the code of each index, nearest first, without itself."""
    require_others(len(codebook), count)
    asked, places = indices.unique(return_inverse=True)  # many places of an image share a code: search it once
    return others_of(codebook, asked, count)[places]


@torch.no_grad()
def others_of(codebook: Tensor, asked: Tensor, count: int) -> Tensor:
    """The same for (N,) indices that are all different."""
    codes = len(codebook)
    offsets = codebook.square().sum(dim=1) / 2  # (K,)
    chunk, tile = tile_shape(codes, codebook.device)
    found = torch.empty(len(asked), count, dtype=torch.long, device=asked.device)
    columns = codebook.T
    for start in range(0, len(asked), chunk):
        own = asked[start : start + chunk].unsqueeze(1)
        piece = codebook[own[:, 0]]
        scores, winners = piece.new_empty(len(own), 0), own.new_empty(len(own), 0)
        for first in range(0, codes, tile):
            part = columns[:, first : first + tile]
            of_tile = torch.addmm(offsets[first : first + tile], piece, part, alpha=-1)
            _leave_out(of_tile, own - first)
            best, place = of_tile.topk(min(count, part.shape[1]), dim=1, largest=False)
            scores, winners = torch.cat([scores, best], dim=1), torch.cat([winners, place + first], dim=1)
            scores, kept = scores.topk(min(count, scores.shape[1]), dim=1, largest=False)
            winners = winners.gather(1, kept)
        found[start : start + chunk] = winners
    return found


def _leave_out(scores: Tensor, columns: Tensor) -> None:
    """Make the score at (n, 1) columns infinite, in rows whose column is one of this tile. No device waits for the host."""
    nearby = columns.clamp(0, scores.shape[1] - 1)
    scores.scatter_(1, nearby, scores.gather(1, nearby).masked_fill(columns == nearby, torch.inf))


def require_others(codebook_size: int, count: int) -> None:
    """Raise ValueError unless every code has `count` others."""
    if not 1 <= count < codebook_size:
        raise ValueError(
            f"{count} neighbors were asked for, but each of {codebook_size} codes has 1 to {codebook_size - 1} others"
        )

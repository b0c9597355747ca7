"""Vector quantization: each latent vector becomes the nearest of K codes.

The default keeps the codes as moving averages of the latents they serve, starts them from encoder outputs, and moves
codes that nobody uses onto latents of the batch. The plain gradient codebook (`update: gradient`, `init: uniform`,
`revive_below: 0`) is the classic baseline; it collapses (16 of 1,024 codes in use after 400 steps on CIFAR-10).

Source: van den Oord et al., "Neural Discrete Representation Learning", 2017, arXiv:1711.00937, equations 1 to 3, and
appendix A.1 (moving averages); normalised codes: Yu et al. (ViT-VQGAN), 2021, arXiv:2110.04627, section 3.2; revival:
Williams et al., 2020, arXiv:2002.08111, section 3, after Dhariwal et al. (Jukebox), arXiv:2005.00341.
Differs from it: the averages have Laplace smoothing (as in Sonnet); the start waits `init_step` steps for useful latents.
"""

from typing import Annotated, Literal

import torch
import torch.distributed as dist
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from tessera.components import Params
from tessera.contracts import Quantized

CHUNK_BYTES = 4 * 2**20  # of scores held at once: fits the cache of a core
CODES_PER_TILE = 32768  # a larger codebook is searched tile by tile


class Config(Params):
    kind: Literal["vector"] = "vector"
    codebook_size: Annotated[int, Field(ge=2)] = 256
    code_dim: Annotated[int, Field(ge=1)] = 8
    update: Literal["ema", "gradient"] = "ema"
    ema_decay: Annotated[float, Field(gt=0, lt=1)] = 0.95  # .99 for long trainings
    commitment_weight: Annotated[float, Field(ge=0)] = 0.25  # beta, on the encoder's term
    codebook_weight: Annotated[float, Field(ge=0)] = 1.0  # of the codes' term, when update is gradient
    init: Literal["data", "uniform"] = "data"
    init_step: Annotated[int, Field(ge=0)] = 30  # batches that pass unquantized before init: data
    revive_below: Annotated[float, Field(ge=0, lt=1)] = 0.03  # of the mean use: a code below is dead; 0: never
    normalize_codes: bool = False  # latents and codes on the unit sphere


class Quantizer(nn.Module):
    indices_per_code = 1

    def __init__(self, config: Config):
        super().__init__()
        self.config = config
        self.codebook_size = config.codebook_size
        shape = (config.codebook_size, config.code_dim)
        codes = torch.empty(shape).uniform_(-1 / config.codebook_size, 1 / config.codebook_size)
        if config.update == "gradient":
            self.codebook = nn.Parameter(codes)
        else:
            self.register_buffer("codebook", codes)
            self.register_buffer("code_sums", codes.clone())
        self.register_buffer("code_counts", torch.ones(config.codebook_size))  # moving average of uses per batch
        self.register_buffer("batches_seen", torch.zeros((), dtype=torch.long))

    def forward(self, z: Tensor) -> Quantized:
        """z: (B, D, h, w). Distances and averages are float32 also under autocast."""
        with torch.autocast(z.device.type, enabled=False):
            return self._quantize(z.float())

    def _quantize(self, z: Tensor) -> Quantized:
        batch, width, height, columns = z.shape
        flat = z.permute(0, 2, 3, 1).reshape(-1, width)  # (B * h * w, D)
        if self.config.normalize_codes:
            flat = F.normalize(flat, dim=1)
        if self.training and self._passes_through():
            self.batches_seen += 1
            indices = torch.zeros(len(flat), dtype=torch.long, device=z.device)
            return Quantized(z, indices.view(batch, height, columns), z.new_zeros(()))
        if self.training and self.config.init == "data" and int(self.batches_seen) == self.config.init_step:
            self._start_from(flat.detach())
        codebook = self._codes()
        indices = nearest(flat.detach(), codebook.detach())  # (B * h * w,)
        codes = codebook[indices]
        # ||z - sg(e)||^2 draws the encoder to the code, ||sg(z) - e||^2 the code to the encoder: beta is on the first.
        loss = self.config.commitment_weight * F.mse_loss(flat, codes.detach())
        if self.config.update == "gradient":
            loss = loss + self.config.codebook_weight * F.mse_loss(codes, flat.detach())
        if self.training:
            self._learn(flat.detach(), indices)
            self.batches_seen += 1
        codes = flat + (codes - flat).detach()  # straight through: the decoder's gradient reaches the latents unchanged
        codes = codes.view(batch, height, columns, width).permute(0, 3, 1, 2)
        return Quantized(codes, indices.view(batch, height, columns), loss)

    def indices_to_codes(self, indices: Tensor) -> Tensor:
        """(B, h, w) int64 -> (B, D, h, w) float."""
        return self._codes()[indices].permute(0, 3, 1, 2)

    def _codes(self) -> Tensor:
        return F.normalize(self.codebook, dim=1) if self.config.normalize_codes else self.codebook

    def _passes_through(self) -> bool:
        return self.config.init == "data" and int(self.batches_seen) < self.config.init_step

    @torch.no_grad()
    def _start_from(self, flat: Tensor) -> None:
        self.codebook.copy_(_drawn(flat, self.codebook_size))
        if self.config.update == "ema":
            self.code_sums.copy_(self.codebook)
        self.code_counts.fill_(1.0)

    @torch.no_grad()
    def _learn(self, flat: Tensor, indices: Tensor) -> None:
        """Move the averages by this batch, over all processes; then move dead codes onto latents of the batch."""
        counts = torch.bincount(indices, minlength=self.codebook_size).float()
        _all_reduce(counts)
        decay = self.config.ema_decay
        self.code_counts.lerp_(counts, 1 - decay)
        if self.config.update == "ema":
            sums = torch.zeros_like(self.code_sums).index_add_(0, indices, flat)
            _all_reduce(sums)
            self.code_sums.lerp_(sums, 1 - decay)
            total, epsilon = self.code_counts.sum(), 1e-5
            smooth = (self.code_counts + epsilon) / (total + self.codebook_size * epsilon) * total
            self.codebook.copy_(self.code_sums / smooth.unsqueeze(1))
        if self.config.revive_below:
            self._revive(flat)

    def _revive(self, flat: Tensor) -> None:
        mean = self.code_counts.mean()
        dead = self.code_counts < self.config.revive_below * mean  # (K,)
        # the whole codebook is drawn and only dead rows are taken: no number of dead codes has to reach the host
        fresh = _drawn(flat, self.codebook_size)
        self.codebook.copy_(torch.where(dead.unsqueeze(1), fresh, self.codebook))
        self.code_counts.copy_(torch.where(dead, mean, self.code_counts))
        if self.config.update == "ema":
            revived = self.codebook * self.code_counts.unsqueeze(1)
            self.code_sums.copy_(torch.where(dead.unsqueeze(1), revived, self.code_sums))


@torch.no_grad()
def nearest(z: Tensor, codebook: Tensor) -> Tensor:
    """(M, D), (K, D) -> (M,) the row of the nearest code, without the (M, K) distances in memory.

    argmin ||z - e||^2 = argmin ||e||^2 / 2 - z.e : one matrix product and one pass per chunk of rows, in one buffer.
    """
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


def _drawn(flat: Tensor, count: int) -> Tensor:
    """`count` rows of flat, distinct while they last, with a trace of noise so that repeats part; equal in all processes."""
    order = torch.cat([torch.randperm(len(flat), device=flat.device) for _ in range(-(-count // len(flat)))])[:count]
    rows = flat[order]
    if count > len(flat):
        rows = rows + 1e-3 * flat.std(dim=0) * torch.randn_like(rows)
    if dist.is_initialized():
        rows = rows.contiguous()
        dist.broadcast(rows, src=0)
    return rows


def _all_reduce(tensor: Tensor) -> None:
    if dist.is_initialized():
        dist.all_reduce(tensor)

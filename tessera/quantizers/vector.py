"""Vector quantization: each latent vector becomes the nearest of K codes.

The default keeps the codes as moving averages of the latents they serve, starts them from encoder outputs, and moves
codes that nobody uses onto latents of the batch. The plain gradient codebook (`update: gradient`, `init: uniform`,
`revive_below: 0`) is the classic baseline; it collapses (16 of 1,024 codes in use after 400 steps on CIFAR-10).

Source: van den Oord et al., "Neural Discrete Representation Learning", 2017, arXiv:1711.00937, equations 1 to 3, and
appendix A.1 (moving averages); normalized codes: Yu et al. (ViT-VQGAN), 2021, arXiv:2110.04627, section 3.2; revival:
Williams et al., 2020, arXiv:2002.08111, section 3, after Dhariwal et al. (Jukebox), arXiv:2005.00341; rotation: Fifty et
al., 2024, arXiv:2410.06424, section 4.
Differs from it: the averages have Laplace smoothing (as in Sonnet); the start waits `init_step` steps for useful latents.
"""

from typing import Annotated, Any, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from tessera.components import Params, Weight
from tessera.contracts import Quantized
from tessera.nn.draw import Draw, count
from tessera.nn.nearest import nearest, nearest_others
from tessera.nn.processes import all_reduce
from tessera.nn.straight_through import rotated, straight_through


class Config(Params):
    kind: Literal["vector"] = "vector"
    codebook_size: Annotated[int, Field(ge=2)] = 256
    code_dim: Annotated[int, Field(ge=1)] = 8
    update: Literal["ema", "gradient"] = "ema"
    ema_decay: Annotated[float, Field(gt=0, lt=1)] = 0.95  # .99 for long trainings
    commitment_weight: Weight = 0.25  # beta, on the encoder's term
    codebook_weight: Weight = 1.0  # of the codes' term, when update is gradient
    init: Literal["data", "uniform"] = "data"
    init_step: Annotated[int, Field(ge=0)] = 30  # batches that pass unquantized before init: data
    revive_below: Annotated[float, Field(ge=0, lt=1)] = 0.03  # of the mean use: a code below is dead; 0: never
    normalize_codes: bool = False  # latents and codes on the unit sphere
    rotation_trick: bool = False  # the decoder's gradient is rotated from the code to the latent

    @property
    def codes_start_step(self) -> int | None:
        return self.init_step if self.init == "data" else None


class Quantizer(nn.Module):
    """Its codes move once per step, by the latents of all micro-batches and processes together."""

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
        self.register_buffer("batches_seen", torch.zeros((), dtype=torch.long))  # those of whole steps
        self.micro_batches = 1  # MovesOncePerStep
        self._batches_seen: int | None = (
            0  # the same on the host, which would else wait for the device; None: not known
        )
        self._step: _Step | None = None  # while it has micro-batches to come

    def forward(self, z: Tensor) -> Quantized:
        """z: (B, D, h, w). Distances and averages are float32 also under autocast."""
        with torch.autocast(z.device.type, enabled=False):
            return self._quantize(z.float())

    def _quantize(self, z: Tensor) -> Quantized:
        """Van den Oord et al., equations 1 and 2, and equation 3 less its reconstruction term."""
        batch, width, height, columns = z.shape
        flat = z.permute(0, 2, 3, 1).reshape(-1, width)  # (B * h * w, D)
        if self.config.normalize_codes:
            flat = F.normalize(flat, dim=1)
        if self.training and self._passes_through():
            self._learn(flat.detach(), None)
            indices = torch.zeros(len(flat), dtype=torch.long, device=z.device)
            return Quantized(z, indices.view(batch, height, columns), z.new_zeros(()))
        if self.training and self._starts():
            self._start_from(flat.detach())
        codebook = self._codes()
        indices = nearest(flat.detach(), codebook.detach())  # (B * h * w,)
        codes = codebook[indices]
        # beta ||z - sg(e)||^2 pulls the latents to their codes, ||sg(z) - e||^2 the codes to their latents
        loss = self.config.commitment_weight * F.mse_loss(flat, codes.detach())
        if self.config.update == "gradient":
            loss = loss + self.config.codebook_weight * F.mse_loss(codes, flat.detach())
        if self.training:
            self._learn(flat.detach(), indices)
        codes = rotated(flat, codes) if self.config.rotation_trick else straight_through(flat, codes)
        codes = codes.view(batch, height, columns, width).permute(0, 3, 1, 2)
        return Quantized(codes, indices.view(batch, height, columns), loss)

    def indices_to_codes(self, indices: Tensor) -> Tensor:
        """(B, h, w) int64 -> (B, D, h, w) float."""
        return self._codes()[indices].permute(0, 3, 1, 2)

    def neighbors(self, indices: Tensor, count: int) -> Tensor:
        """(N,) -> (N, count) the other codes nearest to each, nearest first."""
        if self.training and self.config.init == "data" and self._num_seen() <= self.config.init_step:
            return indices.unsqueeze(1).expand(-1, count)  # the last batch passed unquantized: no code to replace
        return nearest_others(self._codes().detach(), indices, count)

    def _codes(self) -> Tensor:
        """(K, D); normalized as in ViT-VQGAN, section 3.2."""
        if not self.config.normalize_codes:
            return self.codebook
        # a copy, because the backward pass of normalize needs its input and revival overwrites codes before it
        codebook = self.codebook.clone() if self.config.update == "gradient" else self.codebook
        return F.normalize(codebook, dim=1)

    def _passes_through(self) -> bool:
        return self.config.init == "data" and self._num_seen() < self.config.init_step

    def _starts(self) -> bool:
        return self.config.init == "data" and self._num_seen() == self.config.init_step and self._step is None

    def _num_seen(self) -> int:
        if self._batches_seen is None:
            self._batches_seen = int(self.batches_seen)
        return self._batches_seen

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self._batches_seen = None

    @torch.no_grad()
    def _start_from(self, flat: Tensor) -> None:
        """Place the codes among the latents of the first micro-batch: those after it need them."""
        draw = Draw(self.codebook_size, flat, micro_batches=1)
        draw.see(flat)
        self.codebook.copy_(draw.rows())
        if self.config.update == "ema":
            self.code_sums.copy_(self.codebook)
        self.code_counts.fill_(1.0)

    @torch.no_grad()
    def _learn(self, flat: Tensor, indices: Tensor | None) -> None:
        """See a micro-batch; after the last one of the step, move. indices None: the latents pass through unquantized."""
        step = self._step = self._step or _Step()
        step.micro_batches += 1
        if indices is not None:
            step.see(self, flat, indices)
        if step.micro_batches < self.micro_batches:
            return
        self._step = None
        self.batches_seen += 1
        self._batches_seen = self._num_seen() + 1
        if indices is not None:
            self._move(step)

    def _move(self, step: "_Step") -> None:
        """Van den Oord et al., appendix A.1, with Laplace smoothing; then revival."""
        all_reduce(step.counts)
        decay = self.config.ema_decay
        self.code_counts.lerp_(step.counts, 1 - decay)
        if self.config.update == "ema":
            all_reduce(step.sums)
            self.code_sums.lerp_(step.sums, 1 - decay)
            total, epsilon = self.code_counts.sum(), 1e-5
            smooth = (self.code_counts + epsilon) / (total + self.codebook_size * epsilon) * total
            self.codebook.copy_(self.code_sums / smooth.unsqueeze(1))
        if self.config.revive_below:
            self._revive(step.draw)

    def _revive(self, draw: Draw) -> None:
        """Williams et al., section 3: codes that are hardly used move onto latents of the batch."""
        mean = self.code_counts.mean()
        dead = self.code_counts < self.config.revive_below * mean  # (K,)
        # the whole codebook is drawn and only dead rows are taken: no number of dead codes has to reach the host
        fresh = draw.rows()
        self.codebook.copy_(torch.where(dead.unsqueeze(1), fresh, self.codebook))
        self.code_counts.copy_(torch.where(dead, mean, self.code_counts))
        if self.config.update == "ema":
            revived = self.codebook * self.code_counts.unsqueeze(1)
            self.code_sums.copy_(torch.where(dead.unsqueeze(1), revived, self.code_sums))


class _Step:
    """What a codebook saw in the micro-batches of one step."""

    counts: Tensor  # (K,) how often each code was chosen
    sums: Tensor  # (K, D) of the latents that chose it; for averages
    draw: Draw  # of latents, for codes that are to be revived

    def __init__(self) -> None:
        self.micro_batches = 0

    def see(self, quantizer: Quantizer, flat: Tensor, indices: Tensor) -> None:
        """(M, D) latents and (M,) their codes."""
        config, size, is_first = quantizer.config, quantizer.codebook_size, self.micro_batches == 1
        counts = count(indices, size)
        self.counts = counts if is_first else self.counts + counts
        if config.update == "ema":
            sums = torch.zeros_like(quantizer.code_sums).index_add_(0, indices, flat)
            self.sums = sums if is_first else self.sums + sums
        if config.revive_below:
            if is_first:
                self.draw = Draw(size, flat, quantizer.micro_batches)
            self.draw.see(flat)

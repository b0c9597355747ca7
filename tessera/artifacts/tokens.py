"""Tokens between stages: index shards (uint16 or int32) and latents (float32 or float16), V views of each training image.

Latents lie as the encoder gave them, but for the rounding of float16; their mean and deviation per channel, in the spec,
standardize them on reading, in float32.
"""

import copy
from functools import lru_cache
from pathlib import Path
from typing import Annotated, NamedTuple

import numpy as np
import torch
from pydantic import Field

from tessera.artifacts import described
from tessera.artifacts import folder as artifact
from tessera.artifacts.folder import ArtifactError
from tessera.artifacts.shards import Shards, labels_of
from tessera.components import LatentsDtype, Params, Precision, added_later
from tessera.contracts import Learns, TokenBatch, Tokenizer, TokenSpec


def index_dtype(codebook_size: int) -> type[np.integer]:
    """The smallest dtype that torch can widen and that holds every index."""
    return np.uint16 if codebook_size <= 2**16 else np.int32


def as_stored(latents: np.ndarray, dtype: LatentsDtype) -> np.ndarray:
    """float32 latents in the dtype. Raises ValueError for those beyond the range of float16."""
    if dtype == "float16" and (largest := np.abs(latents).max(initial=0)) > (limit := np.finfo(np.float16).max):
        raise ValueError(
            f"latents reach {largest:.3g}, expected at most {limit:.0f}, the largest number of float16: write "
            f"encode_tokens.latents_dtype: float32"
        )
    return latents.astype(dtype, copy=False)


class Encoding(Params):
    """How images became tokens and latents are stored."""

    precision: Precision = added_later("fp32")
    latents_dtype: LatentsDtype = added_later("float32")


class Tokens:
    """One split of a tokens artifact, memory-mapped, as a prior learns it."""

    def __init__(
        self,
        folder: Path,
        split: str,
        spec: TokenSpec,
        learns: Learns,
        num_views: int | None = None,
        encoding: Encoding | None = None,
    ):
        folder = Path(folder)
        if learns == "indices" and spec.codebook_size is None:
            raise ArtifactError(
                f"{folder} holds no indices: its tokenizer has no codebook. Use a prior that learns latents"
            )
        self.spec, self.learns, self.split = spec, learns, split
        encoding = encoding or Encoding()
        self.encoding = encoding.model_dump(include=set(Encoding.model_fields))  # for protocols
        grid = spec.index_grid if learns == "indices" else spec.latent_shape
        dtype = index_dtype(spec.codebook_size) if learns == "indices" else np.dtype(encoding.latents_dtype)
        self.values = Shards(folder / split, learns, dtype)  # rows (V, *index_grid) or (V, D, h, w)
        self.labels = labels_of(folder / split, spec.num_classes)  # (N,) int64
        if self.values.row_shape[1:] != grid or len(self.labels) != len(self.values):
            raise ArtifactError(f"{folder}/{split} holds {learns} {self.values.row_shape}, expected (views, *{grid})")
        self.num_views = num_views or self.values.row_shape[0]
        if self.num_views > self.values.row_shape[0]:
            raise ValueError(
                f"the prior wants num_views {num_views}, but {folder}/{split} holds {self.values.row_shape[0]} to an image: "
                f"lower it, or raise encode_tokens.warps"
            )
        self.rows = np.arange(len(self.values))  # of the split's images: which these are

    def __len__(self) -> int:
        return len(self.rows)

    def subset(self, rows: np.ndarray) -> "Tokens":
        """Those of (n,) rows of these, numbered from 0."""
        found = copy.copy(self)
        found.rows, found.labels = self.rows[rows], self.labels[rows]
        return found

    def on(self, device: torch.device) -> "TokensOnDevice":
        """The same tokens, all of them in that device's memory."""
        return TokensOnDevice(self, device)

    def _views(self, number: int, generator: torch.Generator | None) -> torch.Tensor:
        """(number,) the view of each row: drawn, or the first one."""
        if generator is None or self.num_views == 1:
            return torch.zeros(number, dtype=torch.long)
        return torch.randint(self.num_views, (number,), generator=generator)

    def stored(self, rows: torch.Tensor, generator: torch.Generator | None = None) -> TokenBatch:
        """The tokens at these rows as they are stored, each in a view drawn from the generator, or in the first without one."""
        rows_ = rows.numpy()
        views = self._views(len(rows_), generator).numpy()
        values = self.values.gather(self.rows[rows_], views)
        if self.learns == "latents":
            require_finite(values)
        else:
            require_codes(values, self.spec.codebook_size)
            values = values.astype(np.int32)  # torch widens no uint16 on every device
        return TokenBatch(torch.from_numpy(values), torch.from_numpy(self.labels[rows_]))

    def batch_of(self, stored: TokenBatch) -> TokenBatch:
        """As a prior learns them."""
        return TokenBatch(_learnt(stored.tokens, self.spec, self.learns), stored.labels)

    def batch(self, rows: torch.Tensor, generator: torch.Generator | None = None) -> TokenBatch:
        """Those at these rows, as a prior learns them, on the CPU."""
        return self.batch_of(self.stored(rows, generator))


def require_codes(indices: np.ndarray, codebook_size: int) -> None:
    """Raises ArtifactError for an index that is of no code."""
    low, high = indices.min(initial=0), indices.max(initial=0)
    if low < 0 or high >= codebook_size:
        raise ArtifactError(f"index {low if low < 0 else high} is outside the codebook of {codebook_size} codes")


def require_finite(latents: np.ndarray) -> None:
    """Raises ArtifactError unless all latents are numbers."""
    if not np.isfinite(latents).all():
        raise ArtifactError("the tokens hold latents that are not finite: look for NaN in the tokenizer's weights")


class Described(Encoding):
    """meta.json"""

    spec: described.OfTokens
    num_views: Annotated[int, Field(ge=1)]  # of a training image


class Places(NamedTuple):
    """What is stored of a batch where all tokens lie on the device already."""

    rows: torch.Tensor  # (B,) int64
    views: torch.Tensor  # (B,) int64


class TokensOnDevice:
    """A split of tokens, all views of it, on one device: a step copies the numbers of its rows."""

    def __init__(self, tokens: Tokens, device: torch.device):
        values = tokens.values.gather(tokens.rows)
        self.tokens = tokens
        if tokens.learns == "indices":
            require_codes(values, tokens.spec.codebook_size)
            values = values.astype(np.int32)  # torch gathers no uint16
        else:
            require_finite(values)
        self.values = torch.from_numpy(values).to(device)
        self.labels = torch.from_numpy(tokens.labels).to(device)

    def __len__(self) -> int:
        return len(self.labels)

    def stored(self, rows: torch.Tensor, generator: torch.Generator | None = None) -> Places:
        return Places(rows, self.tokens._views(len(rows), generator))

    def batch_of(self, stored: Places) -> TokenBatch:
        values = self.values[stored.rows, stored.views]
        return TokenBatch(_learnt(values, self.tokens.spec, self.tokens.learns), self.labels[stored.rows])


def _learnt(values: torch.Tensor, spec: TokenSpec, learns: Learns) -> torch.Tensor:
    """int32 indices as int64 ones, latents standardized, float32."""
    return standardize(values.float(), spec) if learns == "latents" else values.long()


def standardize(latents: torch.Tensor, spec: TokenSpec) -> torch.Tensor:
    """(B, D, h, w) latents of the encoder -> mean 0 and deviation 1 per channel."""
    return (latents - _channels(spec.latent_mean, latents)) / _channels(spec.latent_std, latents)


def unstandardize(latents: torch.Tensor, spec: TokenSpec) -> torch.Tensor:
    """The inverse of `standardize`: what the tokenizer decodes."""
    return latents * _channels(spec.latent_std, latents) + _channels(spec.latent_mean, latents)


def decode(tokens: torch.Tensor, tokenizer: Tokenizer, spec: TokenSpec, learns: Learns) -> torch.Tensor:
    """Tokens as a prior learns them, (B, *index_grid) indices or (B, D, h, w) standardized latents -> (B, C, H, W) images."""
    if learns == "indices":
        return tokenizer.decode_indices(tokens)
    return tokenizer.decode(unstandardize(tokens, spec))


def _channels(values: tuple[float, ...], like: torch.Tensor) -> torch.Tensor:
    return _row(values, like.dtype, like.device).view(1, -1, 1, 1)


@lru_cache(maxsize=8)  # a copy from the host in every step else
def _row(values: tuple[float, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    return torch.tensor(values, dtype=dtype, device=device)


def read(folder: Path, learns: Learns, num_views: int | None = None) -> tuple[TokenSpec, dict[str, Tokens]]:
    """Verify the artifact and open both splits, of the training images the first num_views views (None: all)."""
    folder = artifact.check(folder)
    found = described.read(folder / "meta.json", Described)
    train = Tokens(folder, "train", found.spec, learns, num_views, found)
    return found.spec, {"train": train, "test": Tokens(folder, "test", found.spec, learns, encoding=found)}

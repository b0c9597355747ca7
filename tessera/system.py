"""A trained tokenizer and the prior of its tokens, as one thing: what is evaluated, served and edited draws by it."""

from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from tessera.artifacts import bit_depth, checkpoints, guides
from tessera.artifacts import folder as artifact
from tessera.artifacts import tokens as token_artifact
from tessera.artifacts.images import to_uint8
from tessera.components import Params, Precision, load, sampling_schema, sets
from tessera.contracts import Learns, TokenSpec
from tessera.nn.precision import in_precision

MOST_NAMED = 20  # labels, in a sentence
PROBES = 8  # pairs of random images by which the reach of tokens is measured


class CannotEdit(ValueError):
    """The prior of this system has no means for this edit; the sentence says which priors do."""


class CannotDraw(ValueError):
    """The prior was never shown an image of this label; the sentence says which labels there are."""


class System:
    """`tokens` are what the prior learns: (B, *index_grid) indices or (B, D, h, w) standardized latents.

    Images are (B, C, H, W) float32 in [-1, 1], labels (B,) int64 up to and including the null label.
    """

    def __init__(
        self, tokenizer: nn.Module, prior: nn.Module, spec: TokenSpec, learns: Learns, name: str = "this system"
    ):
        self.tokenizer, self.prior, self.spec, self.learns, self.name = tokenizer, prior, spec, learns, name
        self.device = next(prior.parameters()).device
        self.grid = spec.latent_shape[1:]  # (h, w) of tokens, whatever a token is
        self.labels = np.flatnonzero(spec.class_counts)  # those that the prior was trained on

    @classmethod
    def read(cls, tokenizer: Path, prior: Path, name: str = "this system") -> "System":
        """From both artifacts, verified, on the GPU if there is one.

        Raises ArtifactError for a damaged artifact, ValueError if the prior is of another tokenizer's tokens.
        """
        decoder, _, _ = checkpoints.load_model(tokenizer, "tokenizers")
        model, config, spec = checkpoints.load_model(prior, "priors")
        found = artifact.fingerprint(tokenizer)
        if found != spec.tokenizer_fingerprint:
            raise ValueError(
                f"{prior} was trained on tokens of another tokenizer ({spec.tokenizer_fingerprint[:12]}) than "
                f"{tokenizer} ({found[:12]}): decoded so, its samples would be noise. "
                f"Run: dvc repro train_prior@{prior.name}"
            )
        made, expected = ((each.codebook_size, each.latent_shape, each.index_grid) for each in (decoder, spec))
        if made != expected:
            raise artifact.ArtifactError(
                f"{prior} draws tokens (codebook, latents, indices) of {expected}, expected {made} of {tokenizer}. "
                f"{artifact.remedy(prior)}"
            )
        if sets(config, "guide"):
            guides.attach(model, prior)
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        return cls(decoder.to(device), model.to(device), spec, load("priors", config.kind).LEARNS, name)

    @property
    def sampling_schema(self) -> type[Params]:
        """What may be set when it draws."""
        return sampling_schema(self.prior.config.kind)

    def computing_in(self, precision: Precision) -> "System":
        """The same system, its networks in this precision (nn/precision.py); one in bf16 stays so.

        Raises ValueError for bf16 where images have 16 bits.
        """
        if sets(self.tokenizer, "bits"):
            bit_depth.require_fp32(precision)
        return self if precision == "fp32" else self._in_bf16

    @cached_property
    def _in_bf16(self) -> "System":
        parts = (in_precision(part, "bf16") for part in (self.tokenizer, self.prior))
        found = System(*parts, self.spec, self.learns, self.name)
        found._in_bf16 = found  # not rounded again
        return found

    @torch.no_grad()
    def draw(self, labels: np.ndarray, sampling: Any, generator: torch.Generator) -> np.ndarray:
        """(B,) labels -> (B, C, H, W) uint8, or uint16 of images with 16 bits; sampling: of `sampling_schema`; generator: best
        on `device`.

        Equal labels in equal order, sampling and generator give equal bits, on one machine and number of threads. Labels go
        into the prior's `sample`: into its embedding (autoregressive, masked) or its denoiser's (flow_matching, diffusion).
        Raises CannotDraw for a label without a training image.
        """
        self.require_trained_on(labels)
        system = self.computing_in(sampling.precision)
        tokens = system.prior.sample(torch.from_numpy(labels).to(self.device), sampling, generator)
        if sets(self.tokenizer, "bits"):
            return bit_depth.stored(system.decode(tokens), self.tokenizer).cpu().numpy()
        return to_uint8(system.decode(tokens)).cpu().numpy()

    def require(self, edit: str, *abilities: type, means: str) -> None:
        """Raises CannotEdit unless the prior has one of the abilities (contracts.py); means: the priors that do, in words."""
        if not isinstance(self.prior, abilities):
            kind = type(self.prior).__module__.rpartition(".")[2]
            raise CannotEdit(
                f"{self.name} cannot {edit}: its prior {kind} has no way to do so; choose a system with {means}"
            )

    def require_trained_on(self, labels: np.ndarray | list[int]) -> None:
        """Raises CannotDraw for a label that no training image had; the null label is that of none."""
        unknown = set(np.unique(labels).tolist()) - {*self.labels.tolist(), self.spec.num_classes}
        if unknown:
            known = ", ".join(map(str, self.labels[:MOST_NAMED])) + (", ..." if len(self.labels) > MOST_NAMED else "")
            raise CannotDraw(
                f"{self.name} was trained on no image of label {min(unknown)}: expected one of {known}, or training images of "
                f"that class"
            )

    def null_labels(self, count: int) -> Tensor:
        """(count,) the label that says nothing."""
        return torch.full((count,), self.spec.num_classes, device=self.device)

    def encode(self, images: Tensor) -> Tensor:
        """Images -> their tokens."""
        encoded = self.tokenizer.encode(images)
        return encoded.indices if self.learns == "indices" else self.standardize(encoded.latents)

    def decode(self, tokens: Tensor) -> Tensor:
        """Tokens -> images, which may lie a little outside of [-1, 1]."""
        return token_artifact.decode(tokens, self.tokenizer, self.spec, self.learns)

    def encode_latents(self, images: Tensor) -> Tensor:
        """Images -> (B, D, h, w) latents as the tokenizer gives them, before quantization and not standardized."""
        return self.tokenizer.encode(images).latents

    def decode_latents(self, latents: Tensor) -> Tensor:
        """The inverse of `encode_latents`; latents are quantized on the way, where there is a codebook."""
        return self.tokenizer.decode(latents)

    def quantize(self, latents: Tensor) -> Tensor:
        """(B, D, h, w) latents of `encode_latents` -> their (B, *index_grid) indices."""
        return self.tokenizer.quantizer(latents).indices

    def standardize(self, latents: Tensor) -> Tensor:
        """(B, D, h, w) latents of `encode_latents` -> those that a prior of latents learns."""
        return token_artifact.standardize(latents, self.spec)

    def on_index_grid(self, of_tokens: Tensor) -> Tensor:
        """(B, h, w) of tokens -> (B, *index_grid), where a token may be several indices side by side."""
        return of_tokens.repeat_interleave(self.spec.index_grid[1] // self.grid[1], dim=2)

    @cached_property
    def reach(self) -> Tensor:
        """(h, w, H, W) how much each token decides each pixel: from 0, and at most 1 for each token.

        Measured: the mean absolute change of the decoded pixels when this token alone is exchanged for that of another
        image, over PROBES random pairs; divided by the largest of the token.
        """
        generator = torch.Generator().manual_seed(0)
        depth, height, width = self.spec.latent_shape
        drawn = torch.randn(2 * PROBES, depth, height, width, generator=generator)
        ours, theirs = token_artifact.unstandardize(drawn, self.spec).to(self.device).chunk(2)
        with torch.no_grad():
            before = self.decode_latents(ours)
            rows = []
            for row in range(height):
                for column in range(width):
                    changed = ours.clone()
                    changed[:, :, row, column] = theirs[:, :, row, column]
                    rows.append((self.decode_latents(changed) - before).abs().mean(dim=(0, 1)))
        reach = torch.stack(rows).view(height, width, *before.shape[2:])
        return reach / reach.amax(dim=(2, 3), keepdim=True).clamp_min(1e-12)

    def touched(self, mask: Tensor, least: float) -> Tensor:
        """(B, H, W) booleans of pixels -> (B, h, w) whether a token decides some such pixel by more than `least`."""
        decides = self.reach > least
        return (decides.flatten(2).float() @ mask.flatten(1).T.to(decides.device, torch.float32) > 0).movedim(2, 0)

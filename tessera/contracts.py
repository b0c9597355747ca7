"""What passes between the parts: the specs, the tuples, and the protocols of tokenizer, quantizer, prior, objective, metric.

What only some parts can do is an ability: a Protocol, asked for by isinstance, that a part claims by having its members.
tests/contract/test_abilities.py tries each ability that a part claims.

Shape letters everywhere: B batch, C H W image, D latent channels, h w token grid, L = h * w, K codebook size, V views.
Images in models are float32 in [-1, 1]; on disk they are uint8 in [0, 255], or uint16 in [0, 65535].
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, Protocol, runtime_checkable

import numpy as np
import torch
from pydantic import Field
from torch import Tensor
from torch.optim import Optimizer

from tessera.components import AddedKey, Params

Count = Annotated[int, Field(ge=1)]
Side = Annotated[int, Field(ge=1, le=2**16)]  # of an image or a grid, or its channels
Mean, Deviation = Annotated[float, Field(ge=-1e6, le=1e6)], Annotated[float, Field(ge=1e-7, le=1e6)]


class ImageSpec(Params):
    """The shape of every image of a data set, and what its labels mean."""

    name: str
    channels: Side
    height: Side
    width: Side
    num_classes: Count  # 1: the data set has no labels, every label is 0
    class_names: tuple[str, ...]
    licence: str
    bits: AddedKey[Literal[16]] = None  # of each channel, as stored; unset: 8


class TokenSpec(Params):
    """What a prior learns: the grid of one image, its alphabet, and the tokenizer that gives it meaning."""

    codebook_size: Annotated[int, Field(ge=1, le=2**31)] | None  # None: latents only, there are no indices
    latent_shape: tuple[Side, Side, Side]  # (D, h, w)
    index_grid: tuple[Side, Side]  # of the indices of one image: (h, w), or (h, w * q) with q indices to a code
    num_classes: Count
    # of the training images; samples are drawn in proportion to them
    class_counts: tuple[Annotated[int, Field(ge=0)], ...]
    latent_mean: tuple[Mean, ...]  # per channel, of the latents as stored; priors learn (latents - mean) / std
    latent_std: tuple[Deviation, ...]
    tokenizer_fingerprint: str


class Encoded(NamedTuple):
    """An encoded batch of images."""

    latents: Tensor  # (B, D, h, w) float, before quantization: what a continuous prior models
    indices: Tensor | None  # (B, *index_grid) int64 in [0, K): what a discrete prior models; None without a codebook


class Quantized(NamedTuple):
    """A quantized batch of latents."""

    codes: Tensor  # (B, D, h, w), gradients reach the latents through it
    indices: Tensor | None  # (B, h, w * indices_per_code) int64 in [0, K); None without a codebook
    loss: Tensor  # scalar, what the quantizer adds to the training loss


class ImageBatch(NamedTuple):
    images: Tensor  # (B, C, H, W) float32 in [-1, 1]
    labels: Tensor  # (B,) int64


class TokenBatch(NamedTuple):
    tokens: Tensor  # (B, *index_grid) int64 indices, or (B, D, h, w) float32 standardized latents
    labels: Tensor  # (B,) int64


class Quantizer(Protocol):
    """Maps each latent vector to one of finitely many codes."""

    codebook_size: int | None
    indices_per_code: int  # a residual quantizer names a code by several indices, side by side in a row of the grid

    def __call__(self, z: Tensor) -> Quantized: ...
    def indices_to_codes(self, indices: Tensor) -> Tensor: ...  # (B, h, w * indices_per_code) -> (B, D, h, w)
    def neighbors(self, indices: Tensor, count: int) -> Tensor: ...  # (N,) -> (N, count) the nearest other codes


class Tokenizer(Protocol):
    """Stage one: images to tokens and back."""

    latent_shape: tuple[int, int, int]  # (D, h, w)
    index_grid: tuple[int, int]
    codebook_size: int | None

    def encode(self, images: Tensor) -> Encoded: ...
    def decode(self, latents: Tensor) -> Tensor: ...  # quantizes first, where there is a codebook
    def decode_indices(self, indices: Tensor) -> Tensor: ...


class Prior(Protocol):
    """Stage two: a distribution over tokens, given a label. The label num_classes is the null label, which says nothing."""

    config: Any  # the Config that it was built from; is_conditional is False where every label is as the null label

    def sample(self, labels: Tensor, sampling: Any, generator: torch.Generator) -> Tensor: ...  # as TokenBatch.tokens


class Planned(NamedTuple):
    """What is known of a run before it begins: what parts are asked about by `problems(config, planned)`.

    A part's file may have this function beside its Config. It yields a sentence for each setting that cannot work on these
    images: what was found, what was expected, what to write. No stage asks it, and so no result depends on it (tessera/check).
    """

    spec: ImageSpec
    labels: Mapping[str, np.ndarray]  # (N,) int64 of the images of each split, "train" and "test"
    num_samples: int  # sample_images.num_images
    max_neighbor_images: int  # of evaluate
    networks: tuple[str, ...]  # the kinds of the feature networks
    said: Any = None  # of the images by metadata: artifacts/captions.Said, or what params say of it
    is_begin: bool = True  # files that a stage reads once are needed; later they may be gone


# Abilities of priors. Indices are (B, *index_grid) int64, `is_known` are booleans of that shape, labels are (B,) up to and
# including the null label; `sampling` is the Sampling of the prior's file; only the generator is drawn from, where it is.


@runtime_checkable
class Completes(Protocol):
    """A prior of indices that can be given a part of an image: inpainting, restyling, variations."""

    def complete(
        self, indices: Tensor, is_known: Tensor, labels: Tensor, sampling: Any, generator: torch.Generator
    ) -> Tensor: ...  # keeps the indices where is_known and draws the others


@runtime_checkable
class KnowsEvidence(Protocol):
    """A prior of indices that knows how probable known ones are under a label, whatever the others may be.

    Inpainting infers labels by it, and weighs what `complete` drew without reading all that is known.
    """

    reads_all_known: bool  # whether `complete` draws each index given all that is known

    def evidence(self, indices: Tensor, is_known: Tensor, labels: Tensor, generator: torch.Generator) -> Tensor: ...

    # (B,) nats: the log-probability of the known ones, or an estimate of it. If reads_all_known is False, each is taken
    # given all indices before it, known or not: the weight that makes a draw of `complete` one given everything known


@runtime_checkable
class KnowsLikelihood(Protocol):
    """A prior of indices that knows the probability of an image. Restyling keeps the candidate that fits its label best."""

    def bits(self, tokens: Tensor, labels: Tensor, generator: torch.Generator) -> Tensor: ...

    # (B,) bits: -log2 of what the model, without dropout, gives the indices, or an estimate without bias of an upper
    # bound of that


@runtime_checkable
class PredictsMasked(Protocol):
    """A prior of indices that predicts those that are masked given the others, in any pattern: enhancement, restyling."""

    mask_index: int  # stands for an index that is not known; no index of the codebook

    def __call__(self, indices: Tensor, labels: Tensor) -> Tensor: ...  # (B, L), L = h * w -> (B, L, K) logits


@runtime_checkable
class PredictsNext(Protocol):
    """A prior of indices that knows how probable each is given all before it in raster order: restyling."""

    def log_probs(self, indices: Tensor, labels: Tensor) -> Tensor: ...  # (B, *index_grid) nats


@runtime_checkable
class Denoises(Protocol):
    """A prior of latents that removes noise: inpainting, enhancement, restyling, variations, interpolation."""

    def levels(self, sampling: Any) -> list[float]: ...  # falling noise levels, nearly pure noise first, the last 0
    def denoise(self, x: Tensor, sigma: float, labels: Tensor, sampling: Any) -> Tensor: ...

    # the expected data of x = data + sigma * noise, standardized (B, D, h, w); its derivative by x is asked for


# Abilities of quantizers


@runtime_checkable
class Squashes(Protocol):
    """A quantizer that squashes latents before they become codes: the gradient of the codes is that of `bound`."""

    def bound(self, z: Tensor) -> Tensor: ...  # (B, D, h, w), the squashed latents


@runtime_checkable
class LeavesScaledResidual(Protocol):
    """The Config of a quantizer whose codes are fixed, and cannot learn to shrink from level to level of `residual`."""

    residual_scale: float  # what a code leaves over, as a share of the latents' range: below 1


@runtime_checkable
class HasLevels(Protocol):
    """The Config of a quantizer that names a code by an index of each level, and so has as many equal codebooks."""

    num_levels: int
    quantizer: Any  # the Config of each level


@runtime_checkable
class StartsLate(Protocol):
    """The Config of a quantizer whose codes may be placed among the latents of a later step: before, they mean nothing."""

    codes_start_step: int | None  # that step; None: they start with the training


Learns = Literal["indices", "latents"]


class Objective(Protocol):
    """How a model is trained: a module that holds the `model` to keep and whatever only training needs (a discriminator).

    Each step runs its phases in order; each phase is one forward, backward and optimizer step. A prior whose only phase is
    called "prior" has a loss that can be asked of images held out; the phases of a GAN have none.
    """

    model: torch.nn.Module
    phases: tuple[str, ...]

    def __call__(self, batch: Any, phase: str, step: int) -> dict[str, Tensor] | None: ...

    # terms to plot, among them "loss", the one to minimise; None skips this phase at this step
    def optimizers(self) -> dict[str, list[Optimizer]]: ...  # by phase

    # One that diagnoses itself also has `observe(step)`, called after each step, and `diagnose() -> Diagnosis` of those since.


class Job(Protocol):
    """What runs a stage: someone to report to, and a folder that survives a kill. Nothing of it reaches a result.

    Stages and trainings know it by this protocol; tessera/running/job.py implements it, and the runner hands it in.
    """

    name: str  # train_prior@vqgan-flow
    is_main: bool  # the first of the processes that share the stage: it speaks and writes for all
    is_alone: bool  # no other shares it
    state: Path  # a private folder for resumable state
    figures: dict[str, float]  # about this execution (speed, memory): never part of an artifact
    checkpoint_seconds: float

    def say(self, line: str) -> None: ...
    def require_fit(self, params: Any, spec: ImageSpec, labels: Any, said: Any = None) -> None: ...
    # raises ValueError, a sentence per problem, if a later stage could not work on images of which this is said
    def track(self, items: Iterable[Any], total: int, what: str = "") -> Iterator[Any]: ...  # the items, counted aloud
    def part(self, items: Sequence[Any]) -> Sequence[Any]: ...  # those that this process works on when they are shared
    def from_main(self, value: Any) -> Any: ...  # the first process's, in all of them
    def share(self, items: Sequence[Any], work: Callable[[Any], Any]) -> Iterator[Any]: ...  # work of each, in order
    # by all processes of the stage; only the first one, which is_main, is given anything
    def log(self, step: int, values: dict[str, float]) -> None: ...
    def attach(self, path: Path, name: str | None = None) -> None: ...
    def origin(self) -> dict[str, str]: ...  # commit, date, machine, command: for a page's reader
    def show(self, picture: Path) -> None: ...  # says that there is something to look at
    def preview(self, images: np.ndarray, columns: int) -> None: ...  # (N, C, H, W) uint8, for whoever waits
    def resumable(self, inputs: dict[str, Any], parts: tuple[Params, ...]) -> Path: ...  # moves `state` to their folder
    def code_of(self, config: Params) -> str: ...  # the fingerprint of a part's code
    def history(self, num_steps: int, quiet: bool) -> Any: ...  # what appends to state/history.csv
    def keep_history(self, path: Path) -> None: ...
    def stopping_between_steps(self) -> AbstractContextManager[None]: ...  # inside, a signal waits for the next step
    def stop_requested(self) -> bool: ...
    def stop(self, why: str) -> None: ...
    def publish(
        self, params: Any, name: str, measured: Any, files: dict[str, Path | None], images: Path, parts: dict[str, Path]
    ) -> None: ...  # a run of the system in the tracker


# Metrics: a file of tessera/metrics has any of the functions
#     of_samples(config, samples: SeenSamples, found: Record)
#     of_real_images(config, real: RealImages, found: Record)
#     of_reconstructions(config, decoded: SeenReconstructions, found: Record)
#     of_tokens(config, tokens: TokenUse, found: Record), of_told(config, told: Told, found: Record) where there are captions,
#     of_probe(config, probe: Any, found: Record), of small priors of a tokenizer's tokens (metrics/prior_probe.py)
# and of the class Pairs, asked where there is something of this kind; and FIGURES, a Shown for each figure that they record.


class Shown(NamedTuple):
    """How a figure is shown, among the FIGURES of its metric."""

    name: str  # of the figure, or a pattern such as fd_*, where every network has its own
    form: str | None = "{:.3f}"  # in the tables of systems and of tokenizers; None: in its file and in the report alone
    better: Literal["lower", "higher", "neither"] = "neither"
    has_error: bool = False  # its standard error stands beside it
    ranks: bool = False  # every two systems are compared by it, and put in an order


class Record(Protocol):
    """Where a metric puts its figures. A protocol, as `protocol(...)` below gives it, says what a figure is of."""

    def add(self, name: str, value: float, protocol: Any, standard_error: float | None = None) -> None: ...
    def add_mean(self, name: str, values: Any, protocol: Any) -> None: ...  # of one value per image, with its error
    def add_share(self, name: str, share: float, protocol: Any, of: int | None = None) -> None: ...  # of so many images
    def alarm(self, sentence: str) -> None: ...  # of what is wrong with the images, told to the person who waits
    def note(self, sentence: str) -> None: ...  # of anything else that this person should know


class Seen(Protocol):
    """A set of images as one feature network sees it, beside real images that are seen by the same network."""

    network: str  # its name in the params
    kind: str  # of the network: inception, classifier, ...
    num_images: int
    moments: Any  # mean and covariance of the features of all images: tessera.metrics.frechet.Moments
    features: Tensor  # (n, D) float64 on its device, of at most evaluate.max_neighbor_images images, evenly spread
    labels: np.ndarray  # (n,) of these images

    def real_moments(self, split: str = "test") -> Any: ...
    def real_features(self, split: str = "test", is_limited: bool = False) -> Tensor: ...

    # (M, D) float64 of a split, on the same device; is_limited: at most evaluate.max_neighbor_images of them, evenly spread

    def real_labels(self, split: str = "test") -> np.ndarray: ...  # (M,) of all real_features

    def protocol(
        self, split: str = "test", num_images: int | None = None, num_real: int | None = None, **settings: Any
    ) -> Any: ...  # num_images: unless all; num_real: of the split's images, unless all; settings: those of the metric


class Predicted(NamedTuple):
    """What the first network that knows the classes of a data set says of images."""

    logits: Tensor  # (N, num_classes)
    labels: np.ndarray  # (N,) what they are to be
    protocol: Any


class Told(NamedTuple):
    """How a network that reads captions finds the one that each image was told, among all captions there are."""

    kind: str  # of the network
    is_first: bool  # of those that read captions
    # of the image's own caption; and of that of another image of its group, which is what chance gives
    likeness: tuple[np.ndarray, np.ndarray]  # (N,) cosines
    ranks: tuple[np.ndarray, np.ndarray]  # (N,) how many other captions are nearer to the image, of num_captions
    groups: np.ndarray  # (N,) what of the caption is new: seen, held_out, new_words (artifacts/captions.py)
    num_captions: int
    protocol: Any


class SeenSamples(Protocol):
    """Samples of a system beside test images; or training images in their place, which are the floor of each figure."""

    networks: Mapping[str, Seen]
    first: Seen  # by the first network, which judges neighbors
    spec: ImageSpec
    seed: int
    are_real: bool  # training images in the place of samples
    nearest_training: Any  # by the first network's features: tessera.nn.neighbors.Nearest

    def pixels(self) -> Iterator[np.ndarray]: ...  # all samples, (n, C, H, W) uint8 at a time
    def test_pixels(self) -> Iterator[np.ndarray]: ...
    def predicted(self) -> Predicted | None: ...  # None if no network knows the classes
    def class_logits(self) -> Iterator[tuple[Seen, np.ndarray]]: ...  # by networks with classes of their own
    def beside(self, name: str) -> Any: ...  # a figure of its tokenizer or its prior, None if there is none
    def protocol(self, **settings: Any) -> Any: ...  # of figures that no network has a part in


class RealImages(Protocol):
    """Real images beside other real images: what figures are where nothing is generated."""

    def halves(self) -> Iterator[tuple[Seen, Seen]]: ...  # of the training images, by each network
    def predicted(self) -> Predicted | None: ...  # of the test images


class SeenReconstructions(Protocol):
    """Decoded images beside the test images."""

    prefix: str  # of the figures: r (of test images), p (of them, from perturbed indices), floor_ (of training images)
    networks: Mapping[str, Seen]

    def originals(self, network: str) -> Tensor | None: ...  # (n, D) features of the images that `features` are of


class TokenUse(Protocol):
    """How often each code occurs among the tokens of the training images."""

    counts: Tensor  # (K,) int64

    def protocol(self, **settings: Any) -> Any: ...


class Pairs(Protocol):
    """Measures reconstructions beside their originals, batch by batch. Built as Pairs(config, spec, device)."""

    def update(self, originals: Tensor, decoded: Tensor) -> None: ...  # both (n, C, H, W) uint8 on the CPU
    def record(self, protocol: Any, found: Record) -> None: ...  # protocol(network="none", network_sha256="", **more)

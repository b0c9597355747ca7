"""params.yaml as one object: every key known, every value in range, every cell of the matrix possible.

Each stage reads it whole before its work, so that a mistake anywhere is told before any training.
"""

import math
import re
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import AfterValidator, ConfigDict, Field, field_validator, model_validator

from tessera import plain_yaml
from tessera.components import (
    DatasetConfig,
    EditConfig,
    FeaturesConfig,
    InvalidParams,
    LatentsDtype,
    MetricConfig,
    Params,
    Precision,
    PriorConfig,
    TokenizerConfig,
    added_later,
    load,
    parse,
    sampling_schema,
)

# DVC ignores changes of keys with these names inside a section (treeverse/dvc#10296).
KEYS_DVC_IGNORES = ("size", "nfiles")


def _entry_name(name: str) -> str:
    if not re.fullmatch(r"[a-z0-9]+(-[a-z0-9]+)*", name) or name == "real":
        raise ValueError(f"'{name}' is no valid name: use a-z, 0-9 and single hyphens ('real' is taken)")
    return name


Name = Annotated[str, AfterValidator(_entry_name)]


class System(Params):
    """One cell of the matrix: a prior on the tokens of a tokenizer, and how it is sampled."""

    tokenizer: str
    prior: PriorConfig
    sampling: dict[str, Any]  # validated by components.sampling_schema


class EncodeTokens(Params):
    """The views of a training image that a prior sees as tokens; the first is the image itself."""

    horizontal_flip: bool  # adds the mirror image of each view
    warps: Annotated[int, Field(ge=0)]  # random sub-pixel warps per image: rotation, scale and shift
    warp_rotation: Annotated[float, Field(ge=0, le=math.pi)]  # radians, largest
    warp_scale: Annotated[float, Field(ge=0, lt=1)]  # largest relative change
    warp_shift: Annotated[float, Field(ge=0, lt=1)]  # largest, as a fraction of the side
    store_latents: bool  # beside the indices; priors of latents need them
    latents_dtype: LatentsDtype = added_later("float32")
    precision: Precision = added_later("fp32")  # of the encoder
    batch_size: Annotated[int, Field(ge=1)]

    @model_validator(mode="after")
    def _has_latents_of_that_dtype(self) -> "EncodeTokens":
        if self.latents_dtype != "float32" and not self.store_latents:
            raise ValueError(
                f"latents_dtype {self.latents_dtype} needs store_latents: true; set it, or leave out the dtype"
            )
        return self


class FollowTraining(Params):
    """Looks at a prior while it trains. All that decides them stands here, so that no change elsewhere retrains a prior."""

    every: Annotated[int, Field(ge=0)] = 0  # steps between looks, the last step being one too; 0: none
    num_images: Annotated[int, Field(ge=2)] = 2000  # drawn at each look, and at most this many real ones of each split
    features: FeaturesConfig = Field({"kind": "random"}, validate_default=True)  # of the distance
    precision: Precision = added_later("fp32")  # of what is drawn
    criterion: Literal["last", "validation_loss", "frechet"] = "last"  # the weights that are kept: of which look
    # Of the training images of each class: by these a criterion other than last chooses. Neither they nor test images train
    validation_share: Annotated[float, Field(gt=0, lt=1)] = 0.1

    @field_validator("criterion", mode="before")
    @classmethod
    def _reads_the_name_of_before_it_was_of_validation_images(cls, value: Any) -> Any:
        return "validation_loss" if value == "test_loss" else value

    @model_validator(mode="after")
    def _is_decided_by_params_alone(self) -> "FollowTraining":
        kind = self.features.kind
        if hasattr(load("features", kind), "Objective"):
            raise ValueError(
                f"features {kind} are trained by the pipeline, and every prior would train again whenever they change: "
                f"use kind random, or one that is read from a weights file (timm, inception)"
            )
        if self.criterion != "last" and not self.every:
            raise ValueError(
                f"criterion {self.criterion} chooses among looks, and with every 0 there are none: set every, or use "
                f"criterion last"
            )
        return self


class SampleImages(Params):
    num_images: Annotated[int, Field(ge=2)]
    batch_size: Annotated[int, Field(ge=1)]


class EditImages(Params):
    num_images: Annotated[int, Field(ge=2)]  # test images, evenly spread, that each edit is tried on
    num_seeds: Annotated[int, Field(ge=1)]  # tries of each; with 2 or more, how much they differ is a figure too
    batch_size: Annotated[int, Field(ge=1)]


class ReferenceStats(Params):
    max_features: Annotated[int, Field(ge=2)]  # kept per split for the metrics of neighbors; moments are of all images


class Evaluate(Params):
    max_neighbor_images: Annotated[int, Field(ge=8)]  # samples, and reference images, that neighbors are searched among
    perturbation_share: Annotated[float, Field(gt=0, le=1)]  # of the indices, replaced by near ones in the pfd figures
    perturbation_neighbors: Annotated[int, Field(ge=1)]  # nearest other codes to choose from
    metrics: Annotated[dict[Name, MetricConfig], Field(min_length=1)]  # in the order of the tables' columns

    @model_validator(mode="before")
    @classmethod
    def _reads_the_keys_of_before_metrics_had_entries(cls, value: Any) -> Any:
        """Those who trained by an older file keep it, and what it says is measured as it was."""
        old = [key for key in OLD_METRIC_KEYS if isinstance(value, dict) and key in value]
        if not old:
            return value
        if "metrics" in value:
            raise ValueError(f"{', '.join(old)} belong to entries of metrics now: {WRITTEN_NOW}")
        return {key: inner for key, inner in value.items() if key not in old} | {"metrics": _old_metrics(value)}

    @model_validator(mode="after")
    def _measures_each_figure_once_and_distances_at_all(self) -> "Evaluate":
        by_kind: dict[str, list[str]] = {}
        for name, config in self.metrics.items():
            by_kind.setdefault(config.kind, []).append(name)
        for kind, names in by_kind.items():
            if len(names) > 1:
                raise ValueError(
                    f"metrics {' and '.join(names)} are both of kind {kind} and would give figures of one name: keep one"
                )
        if "frechet" not in by_kind:
            raise ValueError(
                "metrics has no entry of kind frechet, by which systems and their stages are weighed: add one"
            )
        return self


OLD_METRIC_KEYS = ("kernel_subset", "num_kernel_subsets", "lpips_weights", "lpips_sha256")
WRITTEN_NOW = (
    "kernel: {kind: kernel}, without subsets, and lpips: {kind: lpips, weights: (lpips_weights), sha256: (lpips_sha256)}, "
    "as in params.yaml"
)


def _old_metrics(old: dict[str, Any]) -> dict[str, Any]:
    """The entries that mean what these keys did, when every metric but LPIPS was always measured."""
    lpips = {"kind": "lpips", "weights": old.get("lpips_weights"), "sha256": old.get("lpips_sha256", "")}
    kernel = {"kind": "kernel", "subset": old.get("kernel_subset"), "num_subsets": old.get("num_kernel_subsets")}
    others = ("inception_score", "precision_recall", "copy_rate", "brightness")
    return {
        "label-agreement": {"kind": "label_agreement"},
        "reconstruction": {"kind": "reconstruction"},
        **({"lpips": lpips} if old.get("lpips_weights") else {}),
        "codebook": {"kind": "codebook"},
        "frechet": {"kind": "frechet"},
        "kernel": kernel,
        **{kind.replace("_", "-"): {"kind": kind} for kind in others},
    }


class _Source(Params):
    model_config = ConfigDict(extra="ignore")

    source: str


class _Cell(Params):
    model_config = ConfigDict(extra="ignore")

    tokenizer: Name


class Outline(Params):
    """What is known of params without a part of theirs, and so without torch: their keys, the source, and all names.

    Names are words of commands that a shell reads (dvc.yaml): whoever starts one asks for them first.
    """

    seed: Any
    dataset: _Source
    features: dict[Name, Any]
    tokenizers: dict[Name, Any]
    encode_tokens: Any
    reference_stats: Any
    systems: dict[Name, _Cell]
    follow_training: Any
    sample_images: Any
    edits: dict[Name, Any]
    edit_images: Any
    evaluate: Any


class Pipeline(Params):
    seed: Annotated[int, Field(ge=0)]
    dataset: DatasetConfig
    features: Annotated[dict[Name, FeaturesConfig], Field(min_length=1)]  # the first judges neighbors and copies too
    tokenizers: Annotated[dict[Name, TokenizerConfig], Field(min_length=1)]
    encode_tokens: EncodeTokens
    reference_stats: ReferenceStats
    systems: Annotated[dict[Name, System], Field(min_length=1)]
    follow_training: FollowTraining
    sample_images: SampleImages
    edits: Annotated[dict[Name, EditConfig], Field(min_length=1)]
    edit_images: EditImages
    evaluate: Evaluate

    @model_validator(mode="after")
    def _cells_are_possible(self) -> "Pipeline":
        mistakes = [*self._feature_mistakes(), *self._tokenizer_mistakes(), *self._system_mistakes()]
        if mistakes:
            raise ValueError("; ".join(mistakes))
        return self

    def _feature_mistakes(self) -> list[str]:
        found = []
        called_fid = [name for name, features in self.features.items() if features.kind == "inception"]
        if len(called_fid) > 1:
            found.append(f"features {' and '.join(called_fid)} are both of kind inception: only one can be the fid")
        for name, tokenizer in self.tokenizers.items():
            trained_by = getattr(tokenizer, "perceptual", None)
            if all(is_same_network(judge, trained_by) for judge in self.features.values()):
                found.append(
                    f"tokenizer {name} is trained to please {trained_by.network}, which is also its only judge (features "
                    f"{', '.join(self.features)}): add features of another network, or choose another one for perceptual"
                )
        return found

    def _tokenizer_mistakes(self) -> list[str]:
        from tessera.contracts import HasLevels  # torch, which flows do without until a part is read

        found = []
        for name, tokenizer in self.tokenizers.items():
            levels = tokenizer.quantizer.num_levels if isinstance(tokenizer.quantizer, HasLevels) else 1
            codes, neighbors = (tokenizer.codebook_size or 0) // levels, self.evaluate.perturbation_neighbors
            if tokenizer.codebook_size and neighbors >= codes:
                found.append(
                    f"evaluate.perturbation_neighbors {neighbors} must be below the number of codes of tokenizer {name}, "
                    f"{codes}"
                )
            factor, height, width = tokenizer.downsample_factor, self.dataset.height, self.dataset.width
            if height % factor or width % factor:
                found.append(
                    f"tokenizer {name}: images of {height}x{width} are not divisible by its downsampling of {factor}. "
                    f"Change the size of the images in dataset, or what downsamples (patch_size, channel_multipliers)"
                )
        return found

    def _system_mistakes(self) -> list[str]:
        found = []
        for name, system in self.systems.items():
            prior = load("priors", system.prior.kind)
            if system.tokenizer not in self.tokenizers:
                known = ", ".join(self.tokenizers)
                found.append(f"system {name}: there is no tokenizer '{system.tokenizer}', only {known}")
            elif prior.LEARNS == "indices" and self.tokenizers[system.tokenizer].codebook_size is None:
                found.append(
                    f"system {name}: prior {system.prior.kind} models indices, but tokenizer {system.tokenizer} has no "
                    f"codebook. Give it a quantizer with one (vector), or use a prior of latents (flow_matching)"
                )
            elif prior.LEARNS == "latents" and not self.encode_tokens.store_latents:
                found.append(
                    f"system {name}: prior {system.prior.kind} models latents; set encode_tokens.store_latents: true"
                )
            if self.follow_training.criterion == "validation_loss" and "prior" not in prior.Objective.phases:
                found.append(
                    f"system {name}: prior {system.prior.kind} has no loss of validation images, by which "
                    f"follow_training.criterion validation_loss would choose its weights: use criterion frechet or last"
                )
            try:
                parse(sampling_schema(system.prior.kind), system.sampling, f"systems.{name}.sampling")
            except InvalidParams as error:
                found.append(str(error))
        return found

    def sampling(self, system: str) -> Any:
        """The validated sampling settings of a system."""
        entry = self.systems[system]
        return parse(sampling_schema(entry.prior.kind), entry.sampling, f"systems.{system}.sampling")

    def describe(self, stage: str) -> "Description":
        """What a stage depends on, as a tracker shows it, by these rules.

        A param is what params.yaml sets for a tokenizer, a prior or its sampling, and for any of their kind; what nobody
        sets is the default of all. What is the same for the whole run (seed, data set) or set alike in all systems is a
        tag, because as a column it would tell nothing. A hash of 64 digits is neither. `settings` has everything.
        """
        action, _, name = stage.partition("@")
        whole: dict[str, Any] = {"seed": self.seed, "dataset": self.dataset}
        own: dict[str, Any] = {}
        tokenizer = self.systems[name].tokenizer if name in self.systems else name
        if tokenizer in self.tokenizers:
            own["tokenizer"] = self.tokenizers[tokenizer]
        if name in self.systems:
            own |= {"prior": self.systems[name].prior, "sampling": self.sampling(name)}
        if action in ("train_features", "reference_stats"):
            own["features"] = self.features[name]
        if action == "train_prior":
            whole["follow_training"] = self.follow_training
        cells = [
            {"tokenizer": self.tokenizers[system.tokenizer], "prior": system.prior, "sampling": self.sampling(key)}
            for key, system in self.systems.items()
        ]
        is_set = set().union(*(_flat(cell, only_set=True) for cell in [*cells, own, whole]))
        alike = set()
        if len(cells) > 1:
            flat = [_flat(cell) for cell in cells]
            alike = {key for key in flat[0] if all(key in one and one[key] == flat[0][key] for one in flat)}
        settings = _flat(own) | ({"tokenizer": tokenizer} if name in self.systems else {})
        shown = {key: value for key, value in settings.items() if key in is_set | {"tokenizer"} and not _is_hash(value)}
        params = {key: value for key, value in shown.items() if key not in alike}
        tags = {key: value for key, value in _flat(whole).items() if key in is_set and not _is_hash(value)}
        tags |= {key: value for key, value in shown.items() if key in alike}
        return Description(params, tags, _flat(whole) | settings)


def is_same_network(first: Any, second: Any) -> bool:
    """Whether two parts look at images with one network; installed weights may be those of a file of any sha256."""
    networks = {getattr(config, "network", None) for config in (first, second)}
    digests = {getattr(config, "sha256", None) for config in (first, second)}
    return len(networks) == 1 and None not in networks and (None in digests or len(digests) == 1)


class Description(NamedTuple):
    """Flat params of a stage: {"prior.width": 96, ...}."""

    params: dict[str, Any]  # worth a column of a table of systems
    tags: dict[str, Any]  # the same in all rows of it
    settings: dict[str, Any]  # everything, defaults included


def _is_hash(value: Any) -> bool:
    return bool(re.fullmatch(r"[0-9a-f]{64}", str(value)))


def _flat(value: Any, prefix: str = "", only_set: bool = False) -> dict[str, Any]:
    if isinstance(value, Params):
        value = value.model_dump(mode="json", exclude_unset=only_set)
    if not isinstance(value, dict):
        return {prefix: value}
    flat: dict[str, Any] = {}
    for key, inner in value.items():
        flat |= _flat(inner, f"{prefix}.{key}" if prefix else str(key), only_set)
    return flat


def read(path: Path) -> Pipeline:
    """Read and validate a params file. Raises InvalidParams with a sentence per mistake: first those of its outline."""
    return parsed(_text(path), path)


def parsed(text: str, path: Path) -> Pipeline:
    """As `read`, of a text that is in `path`, or meant for it."""
    value = _mapping(text, path)
    try:
        parse(Outline, value)
        return parse(Pipeline, value)
    except InvalidParams as error:
        raise InvalidParams(f"{path} is not valid:\n{plain_yaml.with_keys(Pipeline, value, str(error))}") from None


def outline(text: str, path: Path) -> Outline:
    """The outline of params with this text, in `path` or meant for it. Raises InvalidParams with a sentence per mistake."""
    try:
        return parse(Outline, _mapping(text, path))
    except InvalidParams as error:
        raise InvalidParams(f"{path} is not valid:\n{error}") from None


def _text(path: Path) -> str:
    try:
        return Path(path).read_text(encoding="utf-8")
    except OSError as error:
        raise InvalidParams(f"{path} cannot be read: {error.strerror}. Run from the project's top folder") from None
    except UnicodeDecodeError as error:
        raise InvalidParams(f"{path} is no UTF-8 ({error}): save it as such") from None


def _mapping(text: str, path: Path) -> dict[str, Any]:
    value = plain_yaml.read(text, path)
    if not isinstance(value, dict):
        raise InvalidParams(f"{path}: expected a mapping with the keys {', '.join(Pipeline.model_fields)}")
    return value

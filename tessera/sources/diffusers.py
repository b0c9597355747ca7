"""A folder with an autoencoder as the package diffusers writes it: config.json and diffusion_pytorch_model.safetensors.

    python -m tessera.sources.diffusers data/weights/taesd     # the lines for params.yaml

Four of its classes are known here, each by the keys of its config.json that decide what the network computes; defaults are
those of diffusers. Other keys are refused, but for those that only its own pipelines read. The package itself is not imported.

Source: von Platen et al., "Diffusers: State-of-the-art diffusion models", 2022, https://github.com/huggingface/diffusers.
"""

import argparse
import re
import reprlib
import sys
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, model_validator
from torch import Tensor

from tessera.artifacts import checkpoints
from tessera.artifacts import folder as artifact
from tessera.artifacts.folder import ArtifactError
from tessera.components import InvalidParams, Params, parse
from tessera.contracts import ImageSpec
from tessera.sources.links import require_no_way_out

CONFIG, WEIGHTS = "config.json", "diffusion_pytorch_model.safetensors"
OLD_NAMES = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}  # of layers of attention
# What its pipelines read and the network does not. Priors learn latents that are standardized anyway
WITHOUT_EFFECT = frozenset(
    {"sample_size", "scaling_factor", "shift_factor", "latents_mean", "latents_std", "force_upcast"}
)
MOST_LEVELS = 16  # of halvings and doublings of the side
Channels = Annotated[int, Field(ge=1, le=2**16)]
Layers = Annotated[int, Field(ge=0, le=256)]
Activation = Literal["silu", "swish", "mish", "gelu", "relu"]
PerLevel = Field(min_length=1, max_length=MOST_LEVELS)
Widths = Annotated[tuple[Channels, ...], PerLevel]
Depths = Annotated[tuple[Layers, ...], PerLevel]
DownBlocks = Annotated[tuple[Literal["DownEncoderBlock2D", "AttnDownEncoderBlock2D"], ...], PerLevel]
UpBlocks = Annotated[tuple[Literal["UpDecoderBlock2D", "AttnUpDecoderBlock2D"], ...], PerLevel]


class Network(Params):
    """What the four have in common. `levels` names the keys that have a value for each level, grouped by equal length."""

    levels: ClassVar[tuple[tuple[str, ...], ...]]
    without_effect: ClassVar[frozenset[str]] = WITHOUT_EFFECT
    codebook_size: ClassVar[int | None] = None

    class_name: str
    in_channels: Channels = 3
    latent_channels: Channels

    @property
    def code_dim(self) -> int:
        """D, the channels of the latents."""
        return self.latent_channels

    @property
    def downsample_factor(self) -> int:
        return 2 ** (len(getattr(self, self.levels[0][0])) - 1)

    def arguments(self) -> dict[str, Any]:
        """Those of the class's constructor."""
        return self.model_dump(exclude={"class_name"})

    def require_fit(self, spec: ImageSpec) -> None:
        """Raises ValueError for images that it cannot take."""
        if spec.channels != self.in_channels:
            raise ValueError(
                f"the images have channels {spec.channels}, but this {self.class_name} takes {self.in_channels}: expected "
                f"images with channels {self.in_channels} (dataset), or another tokenizer"
            )
        factor = self.downsample_factor
        if spec.height % factor or spec.width % factor:
            raise ValueError(
                f"images of {spec.height}x{spec.width} are not divisible by the downsampling of {factor} of this "
                f"{self.class_name}: change the height and width of dataset"
            )

    @model_validator(mode="after")
    def _is_of_one_piece(self) -> "Network":
        for names in self.levels:
            values = {name: getattr(self, name) for name in names}
            lengths = {
                name: len(value) for name, value in values.items() if isinstance(value, tuple)
            }  # a word is for all
            if len(set(lengths.values())) > 1:
                raise ValueError(
                    f"{', '.join(f'{name} has {number}' for name, number in lengths.items())}: expected equal lengths"
                )
        if getattr(self, "out_channels", self.in_channels) != self.in_channels:
            raise ValueError(
                f"out_channels {self.out_channels} differs from in_channels {self.in_channels}: expected them equal"
            )
        return self


class Convolutional(Network):
    """What AutoencoderKL and VQModel have alike."""

    levels = (("block_out_channels", "down_block_types", "up_block_types"),)

    out_channels: Channels = 3
    down_block_types: DownBlocks = ("DownEncoderBlock2D",)
    up_block_types: UpBlocks = ("UpDecoderBlock2D",)
    block_out_channels: Widths = (64,)
    layers_per_block: Layers = 1
    act_fn: Activation = "silu"


class AutoencoderKL(Convolutional):
    class_name: Literal["AutoencoderKL"] = "AutoencoderKL"
    latent_channels: Channels = 4
    norm_num_groups: Channels = 32
    use_quant_conv: bool = True
    use_post_quant_conv: bool = True
    mid_block_add_attention: bool = True


class VQModel(Convolutional):
    without_effect = WITHOUT_EFFECT | {"lookup_from_codebook"}  # of what its `decode` is given

    class_name: Literal["VQModel"] = "VQModel"
    latent_channels: Channels = 3
    num_vq_embeddings: Annotated[int, Field(ge=2, le=2**22)] = 256
    norm_num_groups: Channels = 32
    vq_embed_dim: Channels | None = None  # latent_channels
    norm_type: Literal["group", "spatial"] = "group"
    mid_block_add_attention: bool = True

    @property
    def codebook_size(self) -> int:
        return self.num_vq_embeddings

    @property
    def code_dim(self) -> int:
        return self.vq_embed_dim or self.latent_channels

    @model_validator(mode="after")
    def _decoder_can_see_codes(self) -> "VQModel":
        if self.norm_type == "spatial" and self.code_dim != self.latent_channels:
            raise ValueError(
                f"vq_embed_dim {self.code_dim} with norm_type spatial: expected latent_channels, {self.latent_channels}"
            )
        return self


class AutoencoderTiny(Network):
    levels = (
        ("encoder_block_out_channels", "num_encoder_blocks"),
        ("decoder_block_out_channels", "num_decoder_blocks"),
        ("encoder_block_out_channels", "decoder_block_out_channels"),
    )
    without_effect = WITHOUT_EFFECT | {"latent_magnitude", "latent_shift", "block_out_channels"}

    class_name: Literal["AutoencoderTiny"] = "AutoencoderTiny"
    out_channels: Channels = 3
    encoder_block_out_channels: Widths = (64, 64, 64, 64)
    decoder_block_out_channels: Widths = (64, 64, 64, 64)
    act_fn: Activation = "relu"
    upsample_fn: Literal["nearest", "bilinear", "bicubic"] = "nearest"
    latent_channels: Channels = 4
    upsampling_scaling_factor: Literal[2] = 2  # as the encoder halves
    num_encoder_blocks: Depths = (1, 3, 3, 3)
    num_decoder_blocks: Depths = (3, 3, 3, 1)


Blocks = Literal["ResBlock", "EfficientViTBlock"]
Norm = Literal["rms_norm", "batch_norm"]
Scales = Annotated[tuple[Annotated[tuple[Annotated[int, Field(ge=1, le=99)], ...], Field(max_length=8)], ...], PerLevel]


class AutoencoderDC(Network):
    levels = (
        (
            "encoder_block_out_channels",
            "encoder_layers_per_block",
            "encoder_qkv_multiscales",
            "encoder_block_types",
            "decoder_block_out_channels",
            "decoder_layers_per_block",
            "decoder_qkv_multiscales",
            "decoder_block_types",
            "decoder_norm_types",
            "decoder_act_fns",
        ),
    )

    class_name: Literal["AutoencoderDC"] = "AutoencoderDC"
    latent_channels: Channels = 32
    attention_head_dim: Channels = 32
    encoder_block_types: Blocks | Annotated[tuple[Blocks, ...], PerLevel] = "ResBlock"
    decoder_block_types: Blocks | Annotated[tuple[Blocks, ...], PerLevel] = "ResBlock"
    encoder_block_out_channels: Widths = (128, 256, 512, 512, 1024, 1024)
    decoder_block_out_channels: Widths = (128, 256, 512, 512, 1024, 1024)
    encoder_layers_per_block: Depths = (2, 2, 2, 3, 3, 3)
    decoder_layers_per_block: Depths = (3, 3, 3, 3, 3, 3)
    encoder_qkv_multiscales: Scales = ((), (), (), (5,), (5,), (5,))
    decoder_qkv_multiscales: Scales = ((), (), (), (5,), (5,), (5,))
    upsample_block_type: Literal["pixel_shuffle", "interpolate"] = "pixel_shuffle"
    downsample_block_type: Literal["pixel_unshuffle", "Conv", "conv"] = "pixel_unshuffle"
    decoder_norm_types: Norm | Annotated[tuple[Norm, ...], PerLevel] = "rms_norm"
    decoder_act_fns: Activation | Annotated[tuple[Activation, ...], PerLevel] = "silu"
    encoder_out_shortcut: bool = True
    decoder_in_shortcut: bool = True
    decoder_conv_act_fn: Activation = "relu"

    @model_validator(mode="after")
    def _halves_at_each_level(self) -> "AutoencoderDC":
        for name in ("encoder_layers_per_block", "decoder_layers_per_block"):
            if 0 in getattr(self, name)[1:]:  # a level without layers does not change the side; the first one does
                raise ValueError(
                    f"{name} {getattr(self, name)} has a 0 after the first level: expected at least 1 there"
                )
        return self


CLASSES: dict[str, type[Network]] = {
    "AutoencoderKL": AutoencoderKL,
    "VQModel": VQModel,
    "AutoencoderTiny": AutoencoderTiny,
    "AutoencoderDC": AutoencoderDC,
}


def network_of(value: Any) -> Network:
    """The key `network` of params.yaml, with the name of its class. Raises ValueError, in a sentence."""
    if isinstance(value, Network):
        return value
    name = value.get("class_name") if isinstance(value, dict) else value
    if not isinstance(name, str) or name not in CLASSES or not isinstance(value, dict):
        raise ValueError(f"class_name is {reprlib.repr(name)}: expected a mapping with one of {', '.join(CLASSES)}")
    try:
        return parse(CLASSES[name], value)
    except InvalidParams as error:
        raise ValueError("; ".join(str(error).splitlines())) from None


def read_network(folder: Path) -> Network:
    """What config.json says. Raises ValueError for a folder of anything else, in a sentence; no weights are opened."""
    path = folder / CONFIG
    if not folder.is_dir():
        raise ValueError(f"{folder} is no folder: expected one with {CONFIG} and {WEIGHTS}, as diffusers writes it")
    require_no_way_out(folder)
    if not path.is_file():
        raise ValueError(f"{folder} has no {CONFIG}: expected it beside {WEIGHTS}, as diffusers writes both")
    try:
        value = artifact.read_json(path)
    except ArtifactError:
        raise ValueError(f"{path} is no whole JSON: expected what diffusers writes; get the folder again") from None
    name = value.get("_class_name") if isinstance(value, dict) else value
    if not isinstance(name, str) or name not in CLASSES:
        raise ValueError(f"{path} is of {reprlib.repr(name)}: expected one of {', '.join(CLASSES)}")
    without_effect = CLASSES[name].without_effect
    named = {key: one for key, one in value.items() if not key.startswith("_") and key not in without_effect}
    try:
        return network_of(named | {"class_name": name})
    except ValueError as error:
        version = reprlib.repr(value.get("_diffusers_version", "of no version"))
        raise ValueError(
            f"{path}, written by diffusers {version}, is not as this version knows it: {error}. Update tessera, or take "
            f"another folder"
        ) from None


def require(folder: Path, sha256: str, network: Network) -> Path:
    """The file of weights. Raises ValueError unless the folder is that of this network, with weights of this hash."""
    found = read_network(folder)
    told, expected = ({"class_name": one.class_name} | one.arguments() for one in (found, network))
    wrong = [key for key in told | expected if told.get(key) != expected.get(key)]
    if wrong:
        key = wrong[0]
        raise ValueError(
            f"{folder / CONFIG} says {key} {told.get(key)}, but params.yaml network.{key} {expected.get(key)}: write what "
            f"python -m tessera.sources.diffusers {folder} prints"
        )
    path = folder / WEIGHTS
    if not path.is_file():
        pickles = sorted(each.name for each in folder.glob("*.bin"))
        has = f"{pickles[0]}, a pickle, which is never opened, but" if pickles else ""
        raise ValueError(
            f"{folder} has {has} no {WEIGHTS}: expected it; diffusers writes it with save_pretrained".replace("  ", " ")
        )
    digest = artifact.sha256(path)
    if digest != sha256:
        raise ValueError(
            f"{path} has sha256 {digest}, expected {sha256}: get the file again, or set sha256 if you trust this one"
        )
    return path


def read_weights(folder: Path, sha256: str, network: Network) -> dict[str, Tensor]:
    """Tensors by the names of today's diffusers. Raises ValueError as `require` does, and for anything but safetensors."""
    weights = checkpoints.read_weights(require(folder, sha256, network))
    return {_name_of_today(name): tensor for name, tensor in weights.items()}


def _name_of_today(name: str) -> str:
    """Attention layers had other names in files of before 2023."""
    *above, layer, kind = name.split(".")
    if "attentions" not in above:
        return name
    return ".".join([*above, OLD_NAMES.get(layer, layer), kind])


def quantizer_of(network: Network) -> dict[str, Any]:
    """A quantizer (tessera/quantizers) whose codes can be the published ones, and move as in the paper if they are tuned."""
    if network.codebook_size is None:
        return {"kind": "identity"}
    sizes = {"codebook_size": network.codebook_size, "code_dim": network.code_dim}
    return {"kind": "vector", **sizes, "update": "gradient", "init": "uniform", "revive_below": 0.0}


def lines(folder: Path) -> str:
    """What to write into params.yaml for a folder. Raises ValueError, as `read_network` does."""
    import yaml  # here, because whoever opens an exported system has it not

    network, path = read_network(folder), folder / WEIGHTS
    if not path.is_file():
        require(folder, "", network)  # says why
    name = re.sub("[^a-z0-9]+", "-", folder.resolve().name.lower()).strip("-") or "published"
    changed = network.model_dump(mode="json", exclude_defaults=True)
    entry = {
        "kind": "diffusers",
        "folder": str(folder),
        "sha256": artifact.sha256(path),
        **({"quantizer": quantizer_of(network)} if network.codebook_size else {}),
        "network": {"class_name": network.class_name} | changed,
    }
    return yaml.safe_dump({"tokenizers": {name: entry}}, sort_keys=False, default_flow_style=None, width=110)


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tessera.sources.diffusers", description="Print the lines of params.yaml for a folder."
    )
    parser.add_argument("folder", type=Path, help=f"with {CONFIG} and {WEIGHTS}")
    try:
        print(f"for params.yaml:\n{lines(parser.parse_args(arguments).folder)}", end="")
    except (ValueError, OSError) as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

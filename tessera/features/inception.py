"""The 2048 features of Inception-v3 as the FID is defined by them: its weights, its resizing, its 8-bit images.

A Fréchet distance may be called FID with these features only, and only if the weights are those that TensorFlow
published in 2015. They are read from a local file, never downloaded; `make weights` gets that file. The Inception
Score is taken on this network's 1008 classes (`class_logits`).

Source: Szegedy et al., "Rethinking the Inception Architecture for Computer Vision", 2015, arXiv:1512.00567; Heusel et
al., 2017, arXiv:1706.08500 (FID). Layers and resizing are those of torch-fidelity (Apache-2.0), which reproduces the
TensorFlow graph; its extractor itself is not built, since it downloads or unpickles its weights. Class logits are those
that it calls "logits_unbiased", as Salimans et al., 2016, arXiv:1606.03498, had them: without the bias.
"""

from collections import OrderedDict
from functools import partial
from pathlib import Path
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from tessera.artifacts import weights_file
from tessera.artifacts.images import to_uint8
from tessera.bases.judging import require_gray_or_rgb
from tessera.components import Params
from tessera.contracts import ImageSpec

SIDE = 299  # pixels that the network sees
NUM_CLASSES = 1008  # TensorFlow's: the 1,000 of ImageNet and 8 without a meaning
AT_ONCE = 50  # images in the network: each takes 11 MB in its widest layer

REMEDY = "`make weights` downloads and converts the published file, and prints the line for params.yaml"


class Config(Params):
    kind: Literal["inception"] = "inception"
    weights: Annotated[str, Field(min_length=1)]  # path of a safetensors file
    sha256: Annotated[str, Field(pattern="^[0-9a-f]{64}$")]  # of that file


class Model(nn.Module):
    """Without meaningful weights until `prepare` or `load_state_dict` has put them in."""

    has_logits = False  # its 1008 classes are not those of the data set
    feature_dim = 2048
    resize = f"bilinear to {SIDE}x{SIDE} as TensorFlow 1"

    def __init__(self, config: Config, spec: ImageSpec):
        super().__init__()
        require_gray_or_rgb(spec, "Inception-v3")
        # Imported here because it takes seconds, which only those who use it should wait.
        from torch_fidelity import feature_extractor_inceptionv3 as layers
        from torch_fidelity.interpolate_compat_tensorflow import interpolate_bilinear_2d_like_tensorflow1x

        self._resized = partial(interpolate_bilinear_2d_like_tensorflow1x, size=(SIDE, SIDE), align_corners=False)
        conv = layers.BasicConv2d
        # The names are those of the published weights.
        named: list[tuple[str, nn.Module]] = [
            ("Conv2d_1a_3x3", conv(3, 32, kernel_size=3, stride=2)),
            ("Conv2d_2a_3x3", conv(32, 32, kernel_size=3)),
            ("Conv2d_2b_3x3", conv(32, 64, kernel_size=3, padding=1)),
            ("MaxPool_1", nn.MaxPool2d(3, stride=2)),
            ("Conv2d_3b_1x1", conv(64, 80, kernel_size=1)),
            ("Conv2d_4a_3x3", conv(80, 192, kernel_size=3)),
            ("MaxPool_2", nn.MaxPool2d(3, stride=2)),
            ("Mixed_5b", layers.InceptionA(192, pool_features=32)),
            ("Mixed_5c", layers.InceptionA(256, pool_features=64)),
            ("Mixed_5d", layers.InceptionA(288, pool_features=64)),
            ("Mixed_6a", layers.InceptionB(288)),
            ("Mixed_6b", layers.InceptionC(768, channels_7x7=128)),
            ("Mixed_6c", layers.InceptionC(768, channels_7x7=160)),
            ("Mixed_6d", layers.InceptionC(768, channels_7x7=160)),
            ("Mixed_6e", layers.InceptionC(768, channels_7x7=192)),
            ("Mixed_7a", layers.InceptionD(768)),
            ("Mixed_7b", layers.InceptionE_1(1280)),
            ("Mixed_7c", layers.InceptionE_2(2048)),
            ("AvgPool", nn.AdaptiveAvgPool2d(1)),
        ]
        self.blocks = nn.Sequential(OrderedDict(named))
        self.fc = nn.Linear(2048, NUM_CLASSES, bias=False)
        self.eval().requires_grad_(False)

    def train(self, mode: bool = True) -> "Model":
        """Stays in evaluation mode: batch statistics would make features depend on their neighbours."""
        return super().train(False)

    @torch.no_grad()
    def features(self, images: Tensor) -> Tensor:
        """images: (B, C, H, W) float in [-1, 1], C 1 or 3, any size -> (B, 2048) float32, at least 0."""
        return torch.cat([self._features(some) for some in images.split(AT_ONCE)])

    @torch.no_grad()
    def class_logits(self, images: Tensor) -> Tensor:
        """images as above -> (B, 1008) float32, which are `fc(features)`: whoever has features needs no second pass."""
        return self.fc(self.features(images)).float()

    def _features(self, images: Tensor) -> Tensor:
        pixels = self._resized(to_uint8(images).float().expand(-1, 3, -1, -1))
        return self.blocks((pixels - 128) / 128).flatten(1).float()


def prepare(model: Model, config: Config) -> None:
    """Read the weights from config.weights, once, when the features artifact is made; the artifact then holds them."""
    path = Path(config.weights)
    expected = "the weights of torch-fidelity's FID Inception-v3"
    weights = weights_file.read(path, config.sha256, ("features.weights", "features.sha256"), expected, REMEDY)
    # All but the bias of the classes, which nothing needs; the names are those of the file's own network.
    named = {name if name == "fc.weight" else f"blocks.{name}": w for name, w in weights.items() if name != "fc.bias"}
    weights_file.fill(model, named, path, "features.weights", expected, REMEDY)

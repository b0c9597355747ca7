"""Features of a convolutional network with fixed random weights: cheap, for the validation of priors and for tests.

Random convolutions keep what is near in an image near in the features, without a bias towards what some training set
made important. They cannot tell colored mush from photographs (docs/log.md, judges that see garbage): no judge of a run.
All weights follow from the seed and the shape of the images.

Source: Naeem et al., "Reliable Fidelity and Diversity Metrics for Generative Models", 2020, arXiv:2002.09797 (random
embeddings for images far from ImageNet); He et al., "Delving Deep into Rectifiers", 2015, arXiv:1502.01852, equation 10
(the scale of the weights).
Differs from the former: a small network in place of VGG16, so that it runs on any image size.
"""

import math
from typing import Annotated, Literal

from pydantic import Field
from torch import nn
from torch.nn.utils import skip_init

from tessera import seeding
from tessera.bases.judging import PooledFeatures
from tessera.components import Params
from tessera.contracts import ImageSpec


class Config(Params):
    kind: Literal["random"] = "random"
    channels: Annotated[int, Field(ge=1)] = 64
    feature_dim: Annotated[int, Field(ge=1)] = 64
    seed: Annotated[int, Field(ge=0)] = 0


class Model(PooledFeatures):
    def __init__(self, config: Config, spec: ImageSpec):
        super().__init__()
        self.feature_dim = config.feature_dim
        layers: list[nn.Module] = []
        in_channels, side = spec.channels, min(spec.height, spec.width)
        while side >= 4 or not layers:
            # skip_init: the global generator is left alone
            layers += [skip_init(nn.Conv2d, in_channels, config.channels, 3, stride=2, padding=1), nn.ReLU()]
            in_channels, side = config.channels, -(-side // 2)
        self.blocks = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(2))
        self.to_features = skip_init(nn.Linear, 4 * config.channels, config.feature_dim)
        generator = seeding.generator(config.seed, "random features")
        for layer in [*self.blocks, self.to_features]:
            if isinstance(layer, nn.Conv2d | nn.Linear):
                fan_in = layer.weight[0].numel()
                nn.init.normal_(layer.weight, std=math.sqrt(2 / fan_in), generator=generator)
                nn.init.normal_(layer.bias, std=0.1, generator=generator)  # units of the images, which are in [-1, 1]
        self.requires_grad_(False)

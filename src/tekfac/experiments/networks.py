"""Networks by name, each of any width, for images of any size that its pooling leaves something of.

ReLUs act in place where what they overwrite is needed by nobody: after batch normalisation, whose
backward pass reads its input, and after an addition, whose backward pass reads nothing.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor, nn
from torch.nn import functional as F

from tekfac.experiments.errors import InputError

ImageShape = tuple[int, int, int]


@dataclass(frozen=True)
class Network:
    """A network that a run can name.

    Attributes:
        build: makes the network from the image shape (C, H, W), the number of classes and the
            width, of which its other numbers of channels or units are multiples.
        width: the default width.
    """

    build: Callable[[ImageShape, int, int], nn.Module]
    width: int


def cnn(image_shape: ImageShape, classes: int, width: int) -> nn.Module:
    """Two 3×3 convolutions (1, 2 × width), each with 2×2 max-pooling, and two linear layers."""
    channels, rows, columns = image_shape
    if min(rows, columns) < 4:
        raise InputError(f"--network cnn needs images of 4×4 pixels or more, got {rows}×{columns}")
    return nn.Sequential(
        nn.Conv2d(channels, width, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(width, 2 * width, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(2 * width * (rows // 4) * (columns // 4), 4 * width),
        nn.ReLU(),
        nn.Linear(4 * width, classes),
    )


def mlp(image_shape: ImageShape, classes: int, width: int) -> nn.Module:
    """Two hidden layers of ``width`` units on the flattened image."""
    return nn.Sequential(
        nn.Flatten(),
        nn.Linear(math.prod(image_shape), width),
        nn.ReLU(),
        nn.Linear(width, width),
        nn.ReLU(),
        nn.Linear(width, classes),
    )


def resnet20(image_shape: ImageShape, classes: int, width: int) -> nn.Module:
    """He et al.'s ResNet20 for small images: three stages of three blocks (1, 2, 4 × width).

    The paper behind TEKFAC has width 64; He et al.'s own is 16, with shortcuts that are padded with
    zeros instead of convolved.
    """
    stages: list[nn.Module] = []
    inputs = width
    for channels, stride in ((width, 1), (2 * width, 2), (4 * width, 2)):
        stages.append(
            nn.Sequential(
                ResidualBlock(inputs, channels, stride),
                ResidualBlock(channels, channels, 1),
                ResidualBlock(channels, channels, 1),
            )
        )
        inputs = channels
    return _he_initialised(
        nn.Sequential(
            *_convolution(image_shape[0], width),
            *stages,
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(inputs, classes),
        )
    )


class ResidualBlock(nn.Module):
    """Two 3×3 convolutions beside a shortcut, which has a 1×1 convolution if the shape changes."""

    def __init__(self, inputs: int, channels: int, stride: int) -> None:
        super().__init__()
        self.residual = nn.Sequential(
            *_convolution(inputs, channels, stride),
            nn.Conv2d(channels, channels, 3, padding=1, bias=False),
            nn.BatchNorm2d(channels),
        )
        self.shortcut: nn.Module = nn.Identity()
        if (inputs, stride) != (channels, 1):
            self.shortcut = nn.Sequential(
                nn.Conv2d(inputs, channels, 1, stride=stride, bias=False),
                nn.BatchNorm2d(channels),
            )

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.residual(x) + self.shortcut(x), inplace=True)


def vgg16(image_shape: ImageShape, classes: int, width: int) -> nn.Module:
    """VGG16 for small images: 13 3×3 convolutions in five groups (1, 2, 4, 8, 8 × width).

    Batch normalisation after each convolution, 2×2 max-pooling after each group, one linear layer.
    Pooling rounds odd sizes up, so that MNIST's 28×28 pixels last as long as 32×32 do.
    """
    inputs, rows, columns = image_shape
    layers: list[nn.Module] = []
    for multiple, convolutions in ((1, 2), (2, 2), (4, 3), (8, 3), (8, 3)):
        for _ in range(convolutions):
            layers += _convolution(inputs, multiple * width)
            inputs = multiple * width
        layers.append(nn.MaxPool2d(2, ceil_mode=True))
    positions = math.ceil(rows / 32) * math.ceil(columns / 32)
    return _he_initialised(
        nn.Sequential(*layers, nn.Flatten(), nn.Linear(positions * inputs, classes))
    )


def _convolution(inputs: int, channels: int, stride: int = 1) -> list[nn.Module]:
    """A 3×3 convolution with batch normalisation, which makes a bias superfluous, and a ReLU."""
    return [
        nn.Conv2d(inputs, channels, 3, stride=stride, padding=1, bias=False),
        nn.BatchNorm2d(channels),
        nn.ReLU(inplace=True),
    ]


def _he_initialised(network: nn.Module) -> nn.Module:
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
    return network


NETWORKS: dict[str, Network] = {
    "cnn": Network(cnn, 16),
    "mlp": Network(mlp, 100),
    "resnet20": Network(resnet20, 64),
    "vgg16": Network(vgg16, 64),
}


def resolve_width(name: str, width: int | None) -> int:
    """The width of the network ``name``: the one given, or its default.

    Raises:
        InputError: if the name is unknown or the width is not positive.
    """
    if name not in NETWORKS:
        raise InputError(f"--network {name!r} is unknown; there is: {', '.join(NETWORKS)}")
    if width is None:
        return NETWORKS[name].width
    if width < 1:
        raise InputError(f"--width must be 1 or more, got {width}")
    return width


def build(name: str, image_shape: ImageShape, classes: int, width: int | None = None) -> nn.Module:
    """A freshly initialised network; its weights are drawn from torch's global generator.

    Args:
        name: a name of ``NETWORKS``.
        image_shape: channels, height and width of the images.
        classes: the number of classes.
        width: None for the network's default.

    Raises:
        InputError: if the name is unknown, the width is not positive, or the network cannot take
            such images.
    """
    width = resolve_width(name, width)
    return NETWORKS[name].build(image_shape, classes, width)

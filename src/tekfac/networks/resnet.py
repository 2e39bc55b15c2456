"""Residual networks (arXiv 1512.03385)."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from tekfac.networks.parts import ImageShape, convolution, he_initialised


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
    return he_initialised(
        nn.Sequential(
            *convolution(image_shape[0], width),
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
            *convolution(inputs, channels, stride),
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

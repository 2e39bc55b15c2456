"""What networks are built of.

ReLUs act in place where what they overwrite is needed by nobody: after batch normalisation, whose
backward pass reads its input, and after an addition, whose backward pass reads nothing.
"""

from __future__ import annotations

from torch import nn

# Channels, height and width.
ImageShape = tuple[int, int, int]


def convolution(inputs: int, channels: int, stride: int = 1) -> list[nn.Module]:
    """A 3×3 convolution with batch normalisation, which makes a bias superfluous, and a ReLU."""
    return [
        nn.Conv2d(inputs, channels, 3, stride=stride, padding=1, bias=False),
        nn.BatchNorm2d(channels),
        nn.ReLU(inplace=True),
    ]


def he_initialised(network: nn.Module) -> nn.Module:
    """The network with its convolutions drawn anew, by He et al.'s rule for ReLUs."""
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
    return network

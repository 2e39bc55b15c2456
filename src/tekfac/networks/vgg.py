"""VGG networks (arXiv 1409.1556)."""

from __future__ import annotations

import math

from torch import nn

from tekfac.networks.parts import ImageShape, convolution, he_initialised


def vgg16(image_shape: ImageShape, classes: int, width: int) -> nn.Module:
    """VGG16 for small images: 13 3×3 convolutions in five groups (1, 2, 4, 8, 8 × width).

    Batch normalisation after each convolution, 2×2 max-pooling after each group, one linear layer.
    Pooling rounds odd sizes up, so that MNIST's 28×28 pixels last as long as 32×32 do.
    """
    inputs, rows, columns = image_shape
    layers: list[nn.Module] = []
    for multiple, convolutions in ((1, 2), (2, 2), (4, 3), (8, 3), (8, 3)):
        for _ in range(convolutions):
            layers += convolution(inputs, multiple * width)
            inputs = multiple * width
        layers.append(nn.MaxPool2d(2, ceil_mode=True))
    positions = math.ceil(rows / 32) * math.ceil(columns / 32)
    return he_initialised(
        nn.Sequential(*layers, nn.Flatten(), nn.Linear(positions * inputs, classes))
    )

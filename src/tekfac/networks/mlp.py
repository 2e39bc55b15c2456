"""A multi-layer perceptron."""

from __future__ import annotations

import math

from torch import nn

from tekfac.networks.parts import ImageShape


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

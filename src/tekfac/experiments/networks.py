"""Networks by name. A factory takes the image shape (C, H, W) and the number of classes."""

from __future__ import annotations

import math
from collections.abc import Callable

from torch import nn

from tekfac.experiments.errors import InputError

ImageShape = tuple[int, int, int]


def cnn(image_shape: ImageShape, classes: int) -> nn.Module:
    """Two 3×3 convolutions (16, 32 channels), each with 2×2 max-pooling, and two linear layers."""
    channels, height, width = image_shape
    if min(height, width) < 4:
        raise InputError(f"--network cnn needs images of 4×4 pixels or more, got {height}×{width}")
    return nn.Sequential(
        nn.Conv2d(channels, 16, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(16, 32, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(32 * (height // 4) * (width // 4), 64),
        nn.ReLU(),
        nn.Linear(64, classes),
    )


def mlp(image_shape: ImageShape, classes: int) -> nn.Module:
    """Two hidden layers of 100 units on the flattened image."""
    return nn.Sequential(
        nn.Flatten(),
        nn.Linear(math.prod(image_shape), 100),
        nn.ReLU(),
        nn.Linear(100, 100),
        nn.ReLU(),
        nn.Linear(100, classes),
    )


NETWORKS: dict[str, Callable[[ImageShape, int], nn.Module]] = {"cnn": cnn, "mlp": mlp}


def build(name: str, image_shape: ImageShape, classes: int) -> nn.Module:
    """A freshly initialised network; its weights are drawn from torch's global generator.

    Raises:
        InputError: if the name is unknown or the network cannot take such images.
    """
    if name not in NETWORKS:
        raise InputError(f"--network {name!r} is unknown; there is: {', '.join(NETWORKS)}")
    return NETWORKS[name](image_shape, classes)

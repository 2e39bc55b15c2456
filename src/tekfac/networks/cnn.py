"""A small convolutional network."""

from __future__ import annotations

from torch import nn

from tekfac.errors import InputError
from tekfac.networks.parts import ImageShape


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

"""Networks by name."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import nn

from tekfac.errors import InputError
from tekfac.networks.cnn import cnn
from tekfac.networks.mlp import mlp
from tekfac.networks.parts import ImageShape
from tekfac.networks.resnet import resnet20
from tekfac.networks.vgg import vgg16


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

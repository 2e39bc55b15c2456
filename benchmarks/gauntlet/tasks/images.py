"""Classification of images: ResNet20, VGG16, a vision transformer."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from benchmarks.gauntlet.sources import SHAPES, Sources
from benchmarks.gauntlet.tasks.task import (
    HELD_OUT,
    Batch,
    Part,
    Task,
    accuracy,
    cross_entropy,
    shrunk,
    shuffled,
)
from benchmarks.gauntlet.tasks.transformer import Block, initialise
from tekfac import networks
from tekfac.data import Dataset

CLASSES = 10
BATCH = 64


class ViT(nn.Module):
    """A transformer on patches of 4×4 pixels, whose outputs are averaged."""

    def __init__(self, width: int, depth: int, heads: int) -> None:
        super().__init__()
        channels, rows, columns = SHAPES["cifar10"]
        self.patches = nn.Conv2d(channels, width, 4, stride=4)
        self.position = nn.Parameter(torch.zeros(rows // 4 * (columns // 4), width))
        self.blocks = nn.Sequential(*(Block(width, heads, causal=False) for _ in range(depth)))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, CLASSES)
        initialise(self)

    def forward(self, images: Tensor) -> Tensor:
        x = self.patches(images).flatten(2).mT + self.position
        return self.head(self.norm(self.blocks(x)).mean(1))


def resnet20(sources: Sources, fraction: float) -> Task:
    """ResNet20 of width 16."""
    width = shrunk(16, fraction)
    return _classification(
        "resnet20",
        f"ResNet20 of width {width}",
        250,
        65,
        lambda: networks.build("resnet20", SHAPES["cifar10"], CLASSES, width),
        sources,
        fraction,
    )


def vgg16(sources: Sources, fraction: float) -> Task:
    """VGG16 of width 16."""
    width = shrunk(16, fraction)
    return _classification(
        "vgg16",
        f"VGG16 of width {width}",
        600,
        50,
        lambda: networks.build("vgg16", SHAPES["cifar10"], CLASSES, width),
        sources,
        fraction,
    )


def vit(sources: Sources, fraction: float) -> Task:
    """A vision transformer with patches of 4×4."""
    width = shrunk(96, fraction, multiple=4)
    return _classification(
        "vit",
        f"ViT, 4 layers of {width}, patches of 4×4",
        300,
        60,
        lambda: ViT(width, depth=4, heads=4),
        sources,
        fraction,
    )


def _classification(
    name: str,
    network_title: str,
    steps: int,
    seconds: float,
    network: Callable[[], nn.Module],
    sources: Sources,
    fraction: float,
) -> Task:
    batch = shrunk(BATCH, fraction)
    held_out = shrunk(HELD_OUT, fraction)

    def split() -> Dataset:
        # The training images without those that searches are judged by.
        data = sources.dataset("cifar10")
        return data.hold_out(min(held_out, len(data.y_train) // 5))

    def batches(generator: torch.Generator) -> Iterator[Batch]:
        data = split()
        for chosen in shuffled(len(data.y_train), batch, generator):
            yield data.standardised(data.x_train[chosen]), data.y_train[chosen]

    def examples(part: Part) -> Batch:
        data = split() if part == "search" else sources.dataset("cifar10")
        return data.standardised(data.x_test[:held_out]), data.y_test[:held_out]

    return Task(
        name=name,
        title=f"{network_title}, batch {batch}",
        data=sources.words("cifar10"),
        steps=shrunk(steps, fraction),
        seconds=seconds,
        network=network,
        batches=batches,
        held_out=examples,
        loss=cross_entropy,
        score_name="accuracy",
        score=accuracy,
        likelihood="categorical",
    )

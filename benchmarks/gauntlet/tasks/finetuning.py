"""A network trained on half of the classes goes on to the other half, with few images."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from filelock import FileLock
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
from tekfac import networks
from tekfac.data import Dataset
from tekfac.data.augmentation import crop_and_flip
from tekfac.runs.files import write_atomically
from tekfac.runs.schedules import Schedule

OLD_CLASSES = 5
IMAGES = 1000
BATCH = 32
PRETRAINING_STEPS = 600
PRETRAINING_BATCH = 64


def finetuning(sources: Sources, fraction: float) -> Task:
    """ResNet20 of width 16, all of it trained, with a new last layer."""
    width = shrunk(16, fraction)
    batch = shrunk(BATCH, fraction)
    held_out = shrunk(HELD_OUT // 2, fraction)
    # The same few for all seeds, and others than searches are judged by.
    few = shrunk(IMAGES, fraction)

    def half(old: bool) -> Dataset:
        return _half(sources.dataset("cifar10"), old)

    def network() -> nn.Module:
        net = networks.build("resnet20", SHAPES["cifar10"], OLD_CLASSES, width)
        # The last layer keeps its fresh weights: its classes are others now.
        fresh = {name: p for name, p in net.state_dict().items() if name.startswith(_head(net))}
        path = sources.cache / f"pretrained-{width}.pt"
        with FileLock(path.with_suffix(".lock")):
            if not path.exists():
                _pretrain(path, half(old=True), width, fraction)
        net.load_state_dict({**torch.load(path, weights_only=True), **fresh})
        return net

    def new() -> Dataset:
        data = half(old=False)
        data = data.hold_out(min(held_out, len(data.y_train) // 5))
        return data.first(min(few, len(data.y_train)))

    def batches(generator: torch.Generator) -> Iterator[Batch]:
        data = new()
        for chosen in shuffled(len(data.y_train), batch, generator):
            images = crop_and_flip(data.x_train[chosen], generator)
            yield data.standardised(images), data.y_train[chosen]

    def examples(part: Part) -> Batch:
        data = new() if part == "search" else half(old=False)
        return data.standardised(data.x_test[:held_out]), data.y_test[:held_out]

    return Task(
        name="finetuning",
        title=f"ResNet20 of width {width}, from five classes to {few} images of the "
        f"others, batch {batch}",
        data=sources.words("cifar10"),
        steps=shrunk(300, fraction),
        seconds=40,
        network=network,
        batches=batches,
        held_out=examples,
        loss=cross_entropy,
        score_name="accuracy",
        score=accuracy,
        likelihood="categorical",
    )


def _half(data: Dataset, old: bool) -> Dataset:
    """The first five classes, or the others, numbered from 0."""

    def chosen(labels: Tensor) -> Tensor:
        return (labels < OLD_CLASSES) == old

    train, test = chosen(data.y_train), chosen(data.y_test)
    return replace(
        data,
        x_train=data.x_train[train],
        y_train=data.y_train[train] % OLD_CLASSES,
        x_test=data.x_test[test],
        y_test=data.y_test[test] % OLD_CLASSES,
        classes=OLD_CLASSES,
    )


def _head(network: nn.Module) -> str:
    """The prefix of the last layer's parameters."""
    *_, (name, _module) = network.named_modules()
    return f"{name}."


def _pretrain(path: Path, data: Dataset, width: int, fraction: float) -> None:
    """Train with SGD on the old classes, and keep the weights."""
    steps = shrunk(PRETRAINING_STEPS, fraction)
    generator = torch.Generator().manual_seed(0)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = networks.build("resnet20", SHAPES["cifar10"], OLD_CLASSES, width)
    optimizer = torch.optim.SGD(network.parameters(), 0.1, momentum=0.9, weight_decay=5e-4)
    factor = partial(Schedule("cosine", warmup=0.05).factor, steps_per_epoch=steps, epochs=1)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
    batches = shuffled(len(data.y_train), shrunk(PRETRAINING_BATCH, fraction), generator)
    for _, chosen in zip(range(steps), batches, strict=False):
        images = crop_and_flip(data.x_train[chosen], generator)
        optimizer.zero_grad()
        cross_entropy(network(data.standardised(images)), data.y_train[chosen]).backward()
        optimizer.step()
        scheduler.step()
    write_atomically(path, lambda file: torch.save(network.state_dict(), file))

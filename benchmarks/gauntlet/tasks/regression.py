"""A field without noise, the sound of a plucked string, fit by a network: full batches."""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import repeat

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.gauntlet.sources import Sources
from benchmarks.gauntlet.tasks.task import HELD_OUT, Batch, Part, Task, shrunk

# Where the string of length 1 is plucked, and how fast its oscillations die away.
PLUCKED_AT = 0.3
DECAY = 0.5
HARMONICS = 5
POINTS = 2000
SEEDS: dict[str, int] = {"train": 0, "search": 1, "final": 2}


def regression(sources: Sources, fraction: float) -> Task:
    """The displacement of a string as a function of place and time, by three layers of tanh."""
    width = shrunk(128, fraction)
    points = shrunk(POINTS, fraction)

    def network() -> nn.Module:
        return nn.Sequential(
            nn.Linear(2, width),
            nn.Tanh(),
            nn.Linear(width, width),
            nn.Tanh(),
            nn.Linear(width, width),
            nn.Tanh(),
            nn.Linear(width, 1),
        )

    def batches(generator: torch.Generator) -> Iterator[Batch]:
        return repeat(_sampled("train", points))

    def held_out(part: Part) -> Batch:
        return _sampled(part, shrunk(HELD_OUT, fraction))

    return Task(
        name="regression",
        title=f"MLP 2-{width}-{width}-{width}-1, tanh, full batch of {points}",
        data=f"a plucked string's damped wave equation, {HARMONICS} harmonics, no noise",
        steps=shrunk(5000, fraction),
        seconds=30,
        network=network,
        batches=batches,
        held_out=held_out,
        loss=_loss,
        score_name="squared error",
        score=F.mse_loss,
        likelihood="gaussian",
    )


def displacement(place: Tensor, time: Tensor) -> Tensor:
    """Of the string, which is let go at time 0, divided by its root mean square."""
    total = torch.zeros_like(place)
    square = 0.0
    for n in range(1, HARMONICS + 1):
        amplitude = math.sin(n * math.pi * PLUCKED_AT) / n**2
        damped = amplitude * torch.exp(-DECAY * time)
        total += damped * torch.sin(n * math.pi * place) * torch.cos(n * math.pi * time)
        square += amplitude**2 / 4 * (1 - math.exp(-4 * DECAY)) / (4 * DECAY)
    return total / math.sqrt(square)


def _sampled(part: str, points: int) -> Batch:
    """Points at random places, from 0 to 1, and times, from 0 to 2, scaled to [-1, 1]."""
    generator = torch.Generator().manual_seed(SEEDS[part])
    place, time = torch.rand(2, points, 1, generator=generator)
    return torch.cat([2 * place - 1, 2 * time - 1], dim=1), displacement(place, 2 * time)


def _loss(output: Tensor, target: Tensor) -> Tensor:
    return F.mse_loss(output, target) / 2

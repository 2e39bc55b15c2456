"""What a task is, and what several of them are made of."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.gauntlet.sources import Sources
from tekfac import Likelihood

Batch = tuple[Tensor, Tensor]
"""Inputs and targets; examples come first."""

Part = Literal["search", "final"]
"""Searches are judged by other held-out examples than final runs."""

HELD_OUT = 1000


@dataclass(frozen=True)
class Task:
    """What an optimizer is to learn.

    Attributes:
        name: short, fit for a file's name.
        title: the network and what it learns, in words.
        data: where the examples came from, in words.
        steps: of a full run.
        seconds: a full run of AdamW took, evaluation included, on one core of a processor of 2025;
            for estimates only.
        network: a fresh network, its weights drawn from torch's global generator.
        batches: an endless stream of training batches.
        held_out: examples that are not trained on.
        loss: of a batch, from the network's output and the targets: what is minimised, and what
            runs are judged by.
        score_name: what `score` is, in words.
        score: a second figure, a mean over examples like the loss.
        likelihood, mean_over: what the output means, and what the loss is a mean over, as
            ``tekfac.TEKFAC`` takes them.
    """

    name: str
    title: str
    data: str
    steps: int
    seconds: float
    network: Callable[[], nn.Module]
    batches: Callable[[torch.Generator], Iterator[Batch]]
    held_out: Callable[[Part], Batch]
    loss: Callable[[Tensor, Tensor], Tensor]
    score_name: str
    score: Callable[[Tensor, Tensor], Tensor]
    likelihood: str | Likelihood
    mean_over: str = "terms"


class TaskFactory(Protocol):
    """Makes a task, without reading its data yet."""

    def __call__(self, sources: Sources, fraction: float) -> Task:
        """The task, with steps, batches, widths and held-out examples shrunk by ``fraction``."""


def shrunk(size: int, fraction: float, multiple: int = 1) -> int:
    """A positive share of ``size`` that is a multiple of ``multiple``."""
    return max(1, round(size * fraction / multiple)) * multiple


def shuffled(count: int, batch: int, generator: torch.Generator) -> Iterator[Tensor]:
    """Indices of batches without end, each epoch in another order; its last few are left out."""
    batch = min(batch, count)
    while True:
        order = torch.randperm(count, generator=generator)
        yield from order[: count - count % batch].split(batch)


def cross_entropy(output: Tensor, target: Tensor) -> Tensor:
    """Mean over examples, and positions, of outputs whose last dimension is the classes."""
    return F.cross_entropy(output.flatten(0, -2), target.flatten())


def accuracy(output: Tensor, target: Tensor) -> Tensor:
    """The share of right answers."""
    return (output.argmax(-1) == target).float().mean()

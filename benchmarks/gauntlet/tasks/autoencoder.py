"""The deep autoencoder of MNIST, on which K-FAC was first shown."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.gauntlet.sources import Sources
from benchmarks.gauntlet.tasks.task import HELD_OUT, Batch, Part, Task, shrunk, shuffled
from tekfac.data import Dataset

PIXELS = 784
HIDDEN = (1000, 500, 250)
CODE = 30


def autoencoder(sources: Sources, fraction: float) -> Task:
    """784-1000-500-250-30 and back, ReLU; cross-entropy summed over pixels."""
    # Not down to a unit or two, whose ReLU may be dead.
    *hidden, code = (shrunk(width, fraction, multiple=5) for width in (*HIDDEN, CODE))
    widths = [PIXELS, *hidden, code, *reversed(hidden), PIXELS]
    batch = shrunk(256, fraction)
    held_out = shrunk(HELD_OUT, fraction)

    def network() -> nn.Module:
        layers: list[nn.Module] = []
        for number, (inputs, outputs) in enumerate(pairwise(widths), start=1):
            layers.append(nn.Linear(inputs, outputs))
            # The code and the pixels' logits may have either sign.
            if number not in (len(widths) // 2, len(widths) - 1):
                layers.append(nn.ReLU())
        # With torch's own initialisation eight layers of ReLU pass on next to nothing at first.
        for layer in layers:
            if isinstance(layer, nn.Linear):
                nn.init.xavier_uniform_(layer.weight)
                nn.init.zeros_(layer.bias)
        return nn.Sequential(*layers)

    def split() -> Dataset:
        data = sources.dataset("mnist")
        return data.hold_out(min(held_out, len(data.y_train) // 5))

    def batches(generator: torch.Generator) -> Iterator[Batch]:
        images = split().x_train
        for chosen in shuffled(len(images), batch, generator):
            yield _pair(images[chosen])

    def examples(part: Part) -> Batch:
        data = split() if part == "search" else sources.dataset("mnist")
        return _pair(data.x_test[:held_out])

    return Task(
        name="autoencoder",
        title=f"Autoencoder {'-'.join(map(str, widths))}, batch {batch}",
        data=sources.words("mnist"),
        steps=shrunk(500, fraction),
        seconds=30,
        network=network,
        batches=batches,
        held_out=examples,
        loss=_loss,
        score_name="squared error",
        score=_squared_error,
        likelihood="bernoulli",
        mean_over="examples",
    )


def _pair(images: Tensor) -> Batch:
    pixels = images.flatten(1) / 255
    return pixels, pixels


def _loss(output: Tensor, target: Tensor) -> Tensor:
    entropy = F.binary_cross_entropy_with_logits(output, target, reduction="sum")
    return entropy / len(target)


def _squared_error(output: Tensor, target: Tensor) -> Tensor:
    return (output.sigmoid() - target).square().sum() / len(target)

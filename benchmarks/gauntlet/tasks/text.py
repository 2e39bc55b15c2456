"""Models of Python's own documentation, character by character: a small GPT and an LSTM."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from benchmarks.gauntlet.sources import Sources
from benchmarks.gauntlet.tasks.task import Batch, Part, Task, accuracy, cross_entropy, shrunk
from benchmarks.gauntlet.tasks.transformer import Block, initialise
from tekfac import Categorical

DATA = "the reference in Python's pydoc_data"


class GPT(nn.Module):
    """A decoder of ``context`` characters at most."""

    def __init__(self, characters: int, context: int, width: int, depth: int, heads: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(characters, width)
        self.position = nn.Parameter(torch.zeros(context, width))
        self.blocks = nn.Sequential(*(Block(width, heads, causal=True) for _ in range(depth)))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, characters)
        initialise(self)

    def forward(self, text: Tensor) -> Tensor:
        x = self.embedding(text) + self.position[: text.shape[1]]
        return self.head(self.norm(self.blocks(x)))


class LSTM(nn.Module):
    """Two layers, from a state of zeros for every piece of text."""

    def __init__(self, characters: int, width: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(characters, width)
        self.lstm = nn.LSTM(width, width, num_layers=2, batch_first=True)
        self.head = nn.Linear(width, characters)

    def forward(self, text: Tensor) -> Tensor:
        return self.head(self.lstm(self.embedding(text))[0])


def gpt(sources: Sources, fraction: float) -> Task:
    """Four layers of 128."""
    width = shrunk(128, fraction, multiple=4)
    context = shrunk(128, fraction)
    return _language_model(
        "gpt",
        f"GPT, 4 layers of {width}",
        400,
        50,
        lambda: GPT(sources.text.characters, context, width, depth=4, heads=4),
        context,
        shrunk(16, fraction),
        sources,
        fraction,
    )


def lstm(sources: Sources, fraction: float) -> Task:
    """Two layers of 192."""
    width = shrunk(192, fraction)
    return _language_model(
        "lstm",
        f"LSTM, 2 layers of {width}",
        750,
        40,
        lambda: LSTM(sources.text.characters, width),
        shrunk(64, fraction),
        shrunk(32, fraction),
        sources,
        fraction,
    )


def _language_model(
    name: str,
    network_title: str,
    steps: int,
    seconds: float,
    network: Callable[[], nn.Module],
    context: int,
    batch: int,
    sources: Sources,
    fraction: float,
) -> Task:
    def batches(generator: torch.Generator) -> Iterator[Batch]:
        # A view of all pieces, each one longer than the context: what is to be guessed is shifted.
        pieces = sources.text.train.unfold(0, context + 1, 1)
        while True:
            yield _pair(pieces[torch.randint(len(pieces), (batch,), generator=generator)])

    def examples(part: Part) -> Batch:
        text = sources.text.search if part == "search" else sources.text.final
        pieces = text.unfold(0, context + 1, context)
        return _pair(pieces[: shrunk(len(pieces), fraction)])

    return Task(
        name=name,
        title=f"{network_title}, on characters; batch {batch} of {context}",
        data=DATA,
        steps=shrunk(steps, fraction),
        seconds=seconds,
        network=network,
        batches=batches,
        held_out=examples,
        loss=cross_entropy,
        score_name="accuracy",
        score=accuracy,
        likelihood=Categorical(dim=-1),
    )


def _pair(pieces: Tensor) -> Batch:
    return pieces[:, :-1], pieces[:, 1:]

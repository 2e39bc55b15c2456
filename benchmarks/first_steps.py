"""The first hundred steps on networks of other people's, each one timed, and the state's size.

    python -m benchmarks.first_steps --models resnet18:32,efficientnet_b0:4 --size 96

Networks are torchvision's, with random weights, or ``gpt2`` (GPT-2 small, 128 tokens) and
``gpt-mini``; after the colon comes the batch size. Each optimizer trains a copy of its own on one
batch; they take turns step by step in one process on one thread. Times are processor time, so that
other work on the machine matters little. What a step of which kind takes tells what a hundred
steps in the long run take: of the usual intervals, plain steps, ten with statistics, and one new
basis for every layer.
"""

from __future__ import annotations

import argparse
import gc
import time
import warnings
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from statistics import median
from unittest import mock

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import tekfac
from tekfac.curvature.blocks import Block
from tekfac.optimizer.intervals import STATISTICS, is_due
from tekfac.optimizer.schedule import SHARE

HEADER = (
    "network, batch | SGD | AdamW | plain step | with statistics | all bases | slowest / plain | "
    "first 100 / steady 100 | whole interval / AdamW | state (MiB) | / AdamW's"
)


class GPT(nn.Module):
    """GPT-2's network, with an output layer of its own."""

    def __init__(self, width: int, depth: int, heads: int, words: int, tokens: int) -> None:
        super().__init__()
        self.words = nn.Embedding(words, width)
        self.places = nn.Parameter(torch.randn(tokens, width) * 0.02)
        self.blocks = nn.ModuleList(GPTBlock(width, heads) for _ in range(depth))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, words, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.words(x) + self.places
        for block in self.blocks:
            x = block(x)
        out: Tensor = self.head(self.norm(x))
        return out.transpose(1, 2)


class GPTBlock(nn.Module):
    """Attention and two layers with GELU, each after a norm layer and around them a shortcut."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(2))
        self.attention = nn.Linear(width, 3 * width)
        self.projection = nn.Linear(width, width)
        self.mlp = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.attention(self.norms[0](x)).unflatten(2, (3, self.heads, -1)).unbind(2)
        q, k, v = (tensor.transpose(1, 2) for tensor in (q, k, v))
        seen = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.projection(seen.transpose(1, 2).flatten(2))
        out: Tensor = x + self.mlp(self.norms[1](x))
        return out


# Steps without statistics that are taken in any case, to know what such take.
QUIET = 3

GPTS = {"gpt2": (768, 12, 12, 50257, 128), "gpt-mini": (128, 4, 4, 64, 64)}


def network(name: str, batch: int, size: int) -> tuple[nn.Module, Tensor, Tensor]:
    """A network of this name, and a batch for it."""
    torch.manual_seed(0)
    if name in GPTS:
        *shape, words, tokens = GPTS[name]
        x = torch.randint(words, (batch, tokens))
        return GPT(*shape, words, tokens), x, x.roll(-1, 1)
    library, _, own = name.rpartition("/")
    if library == "timm":
        import timm

        model = timm.create_model(own, num_classes=100)
    else:
        from torchvision.models import get_model

        given = {"image_size": size} if name.startswith("vit") else {}
        model = get_model(name, weights=None, num_classes=100, **given)
    return model, torch.randn(batch, 3, size, size), torch.randint(100, (batch,))


@dataclass
class Steps:
    """An optimizer's steps so far.

    Attributes:
        seconds: each one's processor time.
        without_bases: the same, less what new bases took.
        kinds: "statistics" for those that took any, else "plain".
    """

    take: Callable[[], float]
    optimizer: torch.optim.Optimizer
    seconds: list[float] = field(default_factory=list)
    without_bases: list[float] = field(default_factory=list)
    kinds: list[str] = field(default_factory=list)

    def step(self) -> None:
        """Take one more."""
        start = time.process_time()
        self.take()
        self.seconds.append(time.process_time() - start)

    def state(self) -> float:
        """MiB of its state."""
        states = self.optimizer.state_dict()["state"].values()
        tensors = [v for own in states for v in own.values() if isinstance(v, Tensor)]
        return sum(v.numel() * v.element_size() for v in tensors) / 2**20

    def median(self, kind: str) -> float:
        """Of the steps of a kind, without bases; the first, which finds caches empty, aside."""
        steps = zip(self.without_bases[1:], self.kinds[1:], strict=True)
        found = [seconds for seconds, of in steps if of == kind]
        return median(found) if found else float("nan")  # more steps would have had some


def steps_of(
    make: Callable[[nn.Module], torch.optim.Optimizer], name: str, batch: int, size: int
) -> Steps:
    """An optimizer with a network and a batch of its own."""
    model, x, y = network(name, batch, size)
    optimizer = make(model)

    def take() -> float:
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
        return loss.item()

    return Steps(take, optimizer)


def measured(name: str, batch: int, size: int, steps: int, options: dict[str, object]) -> str:
    """A row of the table."""
    peers = {
        "sgd": lambda model: torch.optim.SGD(model.parameters(), lr=1e-4, momentum=0.9),
        "adamw": lambda model: torch.optim.AdamW(model.parameters(), lr=1e-5),
        "tekfac": lambda model: tekfac.TEKFAC(model, lr=1e-5, **options),
    }
    runs = {peer: steps_of(make, name, batch, size) for peer, make in peers.items()}
    ours = runs["tekfac"]
    bases: dict[str, list[float]] = defaultdict(list)
    eigen, refresh = Block.eigen, Block.refresh

    def decomposed(block: Block) -> list[Tensor]:
        start = time.process_time()
        result = eigen(block)
        bases[block.name].append(time.process_time() - start)
        return result

    def refreshed_by(block: Block, found: list[Tensor]) -> bool:
        start = time.process_time()
        result = refresh(block, found)
        bases[block.name][-1] += time.process_time() - start
        return result

    # What imports have left to be collected is no step's work.
    gc.collect()
    gc.freeze()
    with (
        mock.patch.object(Block, "eigen", decomposed),
        mock.patch.object(Block, "refresh", refreshed_by),
    ):
        for number in range(steps + QUIET):
            if number >= steps and ours.kinds.count("plain") >= QUIET:
                break
            if number == steps - 1:
                # No more statistics after this step, if that is soon.
                quiet = {"interval_warmup": False, "factor_every": 10**6, "scale_every": 10**6}
                vars(ours.optimizer).update(quiet)
            for run in runs.values():
                blocks = getattr(run.optimizer, "blocks", {}).values()
                run.kinds.append("statistics" if any(b.listening for b in blocks) else "plain")
                before = sum(map(sum, bases.values()))
                run.step()
                run.without_bases.append(run.seconds[-1] - sum(map(sum, bases.values())) + before)
    slowest = max(ours.seconds[:steps])
    plain, statistics = ours.median("plain"), ours.median("statistics")
    refreshed = sum(median(seconds) for seconds in bases.values())
    steady = 100 * plain + 10 * (statistics - plain) + refreshed
    # What is left of the hundred, if fewer were taken: at most the share that bases may have.
    due = sum(is_due(step, 10, STATISTICS) for step in range(steps, 100))
    first = (
        sum(ours.seconds[:steps]) + due * (statistics - plain) + (100 - steps) * plain * (1 + SHARE)
    )
    sgd, adamw = (runs[peer].median("plain") for peer in ("sgd", "adamw"))
    missing = sum(block.empty for block in ours.optimizer.blocks.values())  # type: ignore[attr-defined]
    cells = [
        f"{name}, {batch}" + (f" ({missing} without a basis)" if missing else ""),
        f"{sgd:.3f}",
        f"{adamw:.3f}",
        f"{plain:.3f}",
        f"{statistics:.3f}",
        f"{refreshed:.3f}",
        f"{slowest / plain:.1f} ({ours.seconds.index(slowest) + 1}.)",
        f"{first / steady:.2f}",
        f"{steady / 100 / adamw:.2f}",
        f"{ours.state():.0f}",
        f"{ours.state() / runs['adamw'].state():.2f}",
    ]
    return " | ".join(cells)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", default="resnet18:4,resnet18:32")
    parser.add_argument("--size", type=int, default=96, help="pixels on a side")
    parser.add_argument("--steps", type=int, default=100, help="of the hundred, the rest by kinds")
    parser.add_argument("--set", action="append", default=[], metavar="NAME=VALUE")
    given = parser.parse_args()
    options = {name: eval(value) for name, _, value in (s.partition("=") for s in given.set)}
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    print(f"| {HEADER} |\n|{' --- |' * (HEADER.count('|') + 1)}", flush=True)
    for model in given.models.split(","):
        name, _, batch = model.partition(":")
        print(f"| {measured(name, int(batch), given.size, given.steps, options)} |", flush=True)


if __name__ == "__main__":
    main()

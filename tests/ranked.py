"""Models trained by one process, and by several ranks, each with its part of the batches."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed import checkpoint
from torch.distributed.checkpoint.state_dict import (
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

import tekfac
from harness import NETWORKS, RESCALED, batch

Batch = tuple[Tensor, Tensor]
Loss = Callable[[Any, Tensor], Tensor]

STEPS = 10
TOLERANCE = 1e-9

DIVIDED = pytest.mark.skipif(
    not hasattr(torch.cpu.Stream, "record_event"),
    reason="fully_shard of this version of torch does not run on CPUs",
)


def options_of(method: str, **options: Any) -> dict[str, Any]:
    every = {"factor_every": 2, "basis_every": 3, "interval_warmup": False}
    if method in RESCALED:
        every["scale_every"] = 2
    return {"lr": 0.05, "damping": 1e-2, "fisher": "exact", **every, **options}


class OfTheOutput(tekfac.Categorical):
    """Labels that only the outputs decide, so that no stream of random numbers is asked."""

    def sample(self, output: Tensor, generator: torch.Generator) -> Tensor:
        label = (output * torch.arange(1, output.shape[1] + 1)).argmax(1)
        return output.softmax(1) - F.one_hot(label, output.shape[1])


def cross_entropy(output: Any, target: Tensor) -> Tensor:
    """The mean over terms that are there, 0 where there is none."""
    loss = F.cross_entropy(output, target, reduction="sum")
    return loss / (target != -100).sum().clamp_min(1)


def parameters(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def whole(model: nn.Module) -> dict[str, Tensor]:
    """All parameters of a model of which ranks have parts."""
    if hasattr(model, "reshard"):
        model.reshard()
    return {
        name: (p.full_tensor() if isinstance(p, DTensor) else p).detach().clone()
        for name, p in model.named_parameters()
    }


def wrapping(around: str) -> Callable[..., Any]:
    """What has parts, or copies, of a model on ranks with batches of their own."""
    if around == "fully_shard":
        return fully_shard
    found = pytest.importorskip("torch.distributed._composable.replicate_with_fsdp")
    return found.replicate  # type: ignore[no-any-return]


def train(
    model: nn.Module,
    called: nn.Module,
    optimizer: tekfac.NaturalGradient,
    batches: Sequence[Sequence[Batch]],
    loss: Loss = cross_entropy,
) -> dict[str, Tensor]:
    """Parameters after a step for each list of micro-batches; only the last is synchronised."""
    for parts in batches:
        optimizer.zero_grad()
        for number, (x, y) in enumerate(parts):
            last = number == len(parts) - 1
            wait = nullcontext() if last or called is model else called.no_sync()  # type: ignore
            with wait:
                (loss(called(x), y) / len(parts)).backward()
        optimizer.step()
    return parameters(model)


def shards(data: Sequence[Batch], sizes: Sequence[int]) -> list[list[Batch]]:
    """For each rank, its part of each batch."""
    parts = [list(zip(x.split(list(sizes)), y.split(list(sizes)), strict=True)) for x, y in data]
    return [[part[rank] for part in parts] for rank in range(len(sizes))]


def as_averaged(shares: Sequence[Batch]) -> Loss:
    """One process's loss whose gradient is that which ranks with these shares average."""

    def loss(output: Tensor, target: Tensor) -> Tensor:
        sizes = [len(y) for _, y in shares]
        parts = zip(output.split(sizes), target.split(sizes), strict=True)
        return torch.stack([cross_entropy(o, t) for o, t in parts]).mean()

    return loss


def with_missing(data: Sequence[Batch], sizes: Sequence[int]) -> list[Batch]:
    """Some terms are left out, unevenly, and all of the last rank's in the second batch."""
    result = []
    for number, (x, y) in enumerate(data):
        y = y.clone()
        y[:3] = -100
        if number == 1:
            y[-sizes[-1] :] = -100
        result.append((x, y))
    return result


def centrally(
    model: nn.Module, method: str, fisher: str, data: Sequence[Batch], sizes: Sequence[int]
) -> dict[str, Tensor]:
    """One process whose curvature is of the mean over all terms, and its gradient the ranks'."""
    optimizer = getattr(tekfac, method)(model, **options_of(method, fisher=fisher))
    for number, (x, y) in enumerate(data):
        optimizer.zero_grad()
        cross_entropy(model(x), y).backward()
        twin = copy.deepcopy(model)
        twin.zero_grad()
        as_averaged([part[number] for part in shards(data, sizes)])(twin(x), y).backward()
        for p, other in zip(model.parameters(), twin.parameters(), strict=True):
            p.grad = other.grad
        optimizer.step()
    return parameters(model)


def data_of(network: str, examples: int, steps: int = STEPS) -> list[Batch]:
    torch.manual_seed(1)
    return [batch(network, examples) for _ in range(steps)]


def network_of(name: str) -> nn.Module:
    torch.manual_seed(2)
    return NETWORKS[name]()


def close(found: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float) -> None:
    assert found.keys() == expected.keys()
    for name, value in found.items():
        missed = float((value - expected[name]).norm() / expected[name].norm())
        assert missed < tolerance, (name, missed)


def alone(
    network: str, method: str, data: Sequence[Batch], sizes: Sequence[int], **options: Any
) -> dict[str, Tensor]:
    """One process with the whole batch, and the gradient that ranks would average."""
    model = network_of(network)
    optimizer = getattr(tekfac, method)(model, **options_of(method, **options))
    for number, (x, y) in enumerate(data):
        loss = as_averaged([part[number] for part in shards(data, sizes)])
        train(model, model, optimizer, [[(x, y)]], loss)
    return parameters(model)


def on_ranks(
    network: str, method: str, data: Sequence[Batch], sizes: Sequence[int], options: dict[str, Any]
) -> tuple[dict[str, Tensor], int]:
    """One rank of several, and how many bytes of state it holds."""
    model = network_of(network)
    called = DistributedDataParallel(model, find_unused_parameters=True)
    optimizer = getattr(tekfac, method)(called, **options_of(method, **options))
    mine = [[part] for part in shards(data, sizes)[dist.get_rank()]]
    found = train(model, called, optimizer, mine)
    return found, held_bytes(optimizer)


def held_bytes(optimizer: tekfac.NaturalGradient) -> int:
    return sum(
        0 if value.is_meta else value.numel() * value.element_size()
        for block in optimizer.blocks.values()
        for value in block.state_dict().values()
    )


@contextmanager
def taken_over(
    folder: Path, number: int, model: nn.Module, optimizer: tekfac.NaturalGradient
) -> Iterator[None]:
    """Part ``number`` of a training: goes on where the one before has left it, and leaves it."""

    def states() -> dict[str, Any]:
        return {
            "model": get_model_state_dict(model),
            "optimizer": get_optimizer_state_dict(model, optimizer),
        }

    if number:
        found = states()
        checkpoint.load(found, checkpoint_id=folder / str(number - 1))
        set_model_state_dict(model, found["model"])
        set_optimizer_state_dict(model, optimizer, found["optimizer"])
    yield
    checkpoint.save(states(), checkpoint_id=folder / str(number))

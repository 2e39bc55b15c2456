"""Several processes that train one model, against one process with all their batches together."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import tekfac
from harness import METHODS, NETWORKS, RESCALED, batch
from processes import together

Batch = tuple[Tensor, Tensor]
Loss = Callable[[Any, Tensor], Tensor]

STEPS = 6
TOLERANCE = 1e-9


def options_of(method: str, **options: Any) -> dict[str, Any]:
    every = {"factor_every": 2, "basis_every": 3, "interval_warmup": False}
    if method in RESCALED:
        every["scale_every"] = 2
    return {"lr": 0.05, "damping": 1e-2, "fisher": "exact", **every, **options}


def cross_entropy(output: Any, target: Tensor) -> Tensor:
    """The mean over terms that are there, 0 where there is none."""
    loss = F.cross_entropy(output, target, reduction="sum")
    return loss / (target != -100).sum().clamp_min(1)


def parameters(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


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


def data_of(network: str, examples: int) -> list[Batch]:
    torch.manual_seed(1)
    return [batch(network, examples) for _ in range(STEPS)]


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


PLACEMENTS = ["replicated", "sharded"]


@pytest.mark.parametrize("placement", PLACEMENTS)
@pytest.mark.parametrize("network", list(NETWORKS))
@pytest.mark.parametrize("method", METHODS)
def test_exact_fisher(method: str, network: str, placement: str) -> None:
    # Fewer examples than a layer has inputs leave it to rounding which basis there is of the rest.
    data, sizes = data_of(network, 48), [29, 19]
    expected = alone(network, method, data, sizes)
    results = together(2, on_ranks, network, method, data, sizes, {"placement": placement})
    for found, _ in results:
        close(found, expected, TOLERANCE)
    assert all(torch.equal(results[0][0][name], results[1][0][name]) for name in expected)


# -- what divides what -----------------------------------------------------------------------------


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


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("fisher", ["exact", "empirical"])
def test_uneven_terms(method: str, fisher: str) -> None:
    """Also for a rank none of whose terms counts.

    The user's gradient is DDP's mean of the ranks' means; the empirical Fisher matrix has that of
    each example, for which each rank's loss is a mean over its own terms.
    """
    sizes = [13, 4]
    data = with_missing(data_of("mlp", sum(sizes)), sizes)
    model = network_of("mlp")
    expected = centrally(model, method, fisher, data, sizes)
    options = {"fisher": fisher}
    for found, _ in together(2, on_ranks, "mlp", method, data, sizes, options):
        close(found, expected, TOLERANCE)


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


def accumulated(
    method: str, fisher: str, data: Sequence[Batch], reduction: str
) -> dict[str, Tensor]:
    model = network_of("mlp")
    called = DistributedDataParallel(model)
    options = options_of(method, fisher=fisher, loss_reduction=reduction)
    optimizer = getattr(tekfac, method)(called, **options)
    parts = shards(data, [3, 3, 3, 3])
    mine = parts[2 * dist.get_rank() : 2 * dist.get_rank() + 2]
    loss = cross_entropy if reduction == "mean" else summed
    return train(model, called, optimizer, list(zip(*mine, strict=True)), loss)


def summed(output: Tensor, target: Tensor) -> Tensor:
    # The micro-batches' mean that `train` takes is undone, and DDP's.
    return 4 * F.cross_entropy(output, target, reduction="sum")


@pytest.mark.parametrize("method", ["KFAC", "TEKFAC"])
@pytest.mark.parametrize("fisher", ["exact", "empirical"])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_accumulation(method: str, fisher: str, reduction: str) -> None:
    if fisher == "empirical" and reduction == "sum":
        pytest.skip("a sum that is undone by hand is none")
    data = data_of("mlp", 12)
    model = network_of("mlp")
    options = options_of(method, fisher=fisher, loss_reduction=reduction)
    optimizer = getattr(tekfac, method)(model, **options)
    loss = cross_entropy
    if reduction == "sum":

        def loss(output: Tensor, target: Tensor) -> Tensor:
            return F.cross_entropy(output, target, reduction="sum")

    expected = train(model, model, optimizer, [[part] for part in data], loss)
    for found in together(2, accumulated, method, fisher, data, reduction):
        close(found, expected, TOLERANCE)


class Heads(nn.Module):
    """Two outputs, and a layer that only some batches use."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(5, 6)
        self.first, self.second = nn.Linear(6, 3), nn.Linear(6, 4)
        self.extra = nn.Linear(6, 6)

    def forward(self, x: Tensor) -> list[Tensor]:
        hidden = self.body(x).tanh()
        if x[0, 0] > 0:
            hidden = hidden + self.extra(hidden).tanh()
        return [self.first(hidden), self.second(hidden)]


def both(outputs: list[Tensor], target: Tensor) -> Tensor:
    return cross_entropy(outputs[0], target) + 0.5 * cross_entropy(outputs[1], target)


def with_heads(method: str, data: Sequence[Batch], **options: Any) -> dict[str, Tensor]:
    torch.manual_seed(3)
    model = Heads().double()
    if not dist.is_initialized():
        optimizer = getattr(tekfac, method)(model, **options_of(method))
        return train(model, model, optimizer, [[part] for part in data], both)
    called = DistributedDataParallel(model, find_unused_parameters=True)
    optimizer = getattr(tekfac, method)(model, **options_of(method))
    size = len(data[0][0]) // dist.get_world_size()
    mine = shards(data, [size] * dist.get_world_size())[dist.get_rank()]
    return train(model, called, optimizer, [[part] for part in mine], both)


@pytest.mark.parametrize("method", METHODS)
def test_several_outputs(method: str) -> None:
    data = [(x.abs(), y) for x, y in data_of("mlp", 12)]
    expected = with_heads(method, data)
    for found in together(2, with_heads, method, data):
        close(found, expected, TOLERANCE)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("count", [2, 4])
def test_layer_that_one_rank_uses(method: str, count: int) -> None:
    """Its statistics are of the examples that went through it; nobody waits for the others."""
    data = data_of("mlp", 12)
    for number, (x, _) in enumerate(data):
        x[:, 0] = -x[:, 0].abs()
        if number != 2:  # then nobody uses it
            x[-12 // count :, 0].abs_()
    results = together(count, with_heads, method, data)
    torch.manual_seed(3)
    start = parameters(Heads().double())
    for found in results:
        assert all(value.isfinite().all() for value in found.values())
        assert all(torch.equal(value, results[0][name]) for name, value in found.items())
        assert not torch.equal(found["extra.weight"], start["extra.weight"])


# -- ways to give the model ------------------------------------------------------------------------


class Holder(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x)  # type: ignore[no-any-return]


WAYS = ["given", "afterwards", "holder", "compiled", "compiled inside", "static", "mesh"]


def in_a_way(way: str, data: Sequence[Batch]) -> tuple[dict[str, Tensor], list[str], int]:
    """Parameters, the blocks' names, and how many gradients DDP's hooks have seen in a step."""
    model = network_of("mlp")
    inner = torch.compile(model, backend="eager") if way == "compiled inside" else model
    parallel = DistributedDataParallel(inner, static_graph=way == "static")
    called: nn.Module = parallel
    given: nn.Module = called
    options = options_of("TEKFAC")
    if way == "afterwards":
        given = model
    elif way == "holder":
        called = given = Holder(parallel)
    elif way == "compiled":
        called = given = torch.compile(parallel, backend="eager")  # type: ignore[assignment]
    elif way == "mesh":
        mesh = dist.device_mesh.init_device_mesh("cpu", (dist.get_world_size(),))
        given, options["process_group"] = model, mesh
    buckets: list[int] = []

    def averaged(state, bucket):  # type: ignore[no-untyped-def]  # DDP reads annotations
        buckets.append(1)
        flat = bucket.buffer().div_(dist.get_world_size())
        return dist.all_reduce(flat, async_op=True).get_future().then(lambda f: f.value()[0])

    parallel.register_comm_hook(None, averaged)
    optimizer = tekfac.TEKFAC(given, **options)
    mine = shards(data, [6, 6])[dist.get_rank()]
    for x, y in mine:
        optimizer.zero_grad()
        cross_entropy(called(x), y).backward()
        optimizer.step()
    return parameters(model), list(optimizer.blocks), len(buckets)


@pytest.mark.parametrize("way", WAYS)
def test_ways_to_give_the_model(way: str) -> None:
    """The pass with the model's own labels does not set DDP's reductions off."""
    data = data_of("mlp", 12)
    expected = alone("mlp", "TEKFAC", data, [6, 6])
    for found, names, buckets in together(2, in_a_way, way, data):
        close(found, expected, TOLERANCE)
        assert names == ["0", "2", "4"] or way == "holder"
        assert buckets == STEPS

"""Several processes that train one model, against one process with all their batches together."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import tekfac
from harness import METHODS, NETWORKS, RESCALED
from processes import together
from ranked import (
    STEPS,
    TOLERANCE,
    Batch,
    OfTheOutput,
    alone,
    centrally,
    close,
    cross_entropy,
    data_of,
    network_of,
    on_ranks,
    options_of,
    parameters,
    shards,
    train,
    with_missing,
)
from tekfac.ranks.ranks import GATHER, Group

PLACEMENTS = ["replicated", "sharded"]


# Each method with each network and with both placements.
@pytest.mark.parametrize(
    ("method", "network", "placement"),
    [
        (method, network, PLACEMENTS[(i + j) % 2])
        for i, method in enumerate(METHODS)
        for j, network in enumerate(NETWORKS)
    ],
)
def test_exact_fisher(method: str, network: str, placement: str) -> None:
    # Fewer examples than a layer has inputs leave it to rounding which basis there is of the rest.
    data, sizes = data_of(network, 48), [29, 19]
    expected = alone(network, method, data, sizes)
    results = together(2, on_ranks, network, method, data, sizes, {"placement": placement})
    for found, _ in results:
        close(found, expected, TOLERANCE)
    assert all(torch.equal(results[0][0][name], results[1][0][name]) for name in expected)


# -- what divides what -----------------------------------------------------------------------------


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
@pytest.mark.parametrize(
    ("fisher", "reduction"), [("exact", "mean"), ("exact", "sum"), ("empirical", "mean")]
)
def test_accumulation(method: str, fisher: str, reduction: str) -> None:
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


WAYS = ["given", "afterwards", "holder", "compiled", "compiled inside", "static", "views", "mesh"]


def in_a_way(way: str, data: Sequence[Batch]) -> tuple[dict[str, Tensor], list[str], int]:
    """Parameters, the blocks' names, and how many gradients DDP's hooks have seen in a step."""
    model = network_of("mlp")
    inner = torch.compile(model, backend="eager") if way == "compiled inside" else model
    views = way == "views"
    parallel = DistributedDataParallel(
        inner, static_graph=way == "static", gradient_as_bucket_view=views
    )
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


def by_tokens(placement: str | None) -> tuple[dict[str, Tensor], bool]:
    """Parameters, and whether the first layer was orthogonalized by itself."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Flatten(), nn.Linear(168, 3)).double()
    called = model if placement is None else DistributedDataParallel(model)
    optimizer = tekfac.TEKFAC(called, fisher="exact", lr=0.05, placement=placement or "auto")
    x = torch.randn(3, 6, 21, 6, generator=torch.Generator().manual_seed(1)).double()
    part = slice(None) if placement is None else slice(dist.get_rank(), None, 2)
    for number in range(3):
        optimizer.zero_grad()
        cross_entropy(called(x[number, part]), torch.arange(6)[part] % 3).backward()
        optimizer.step()
    return parameters(model), optimizer.blocks["0"].orthogonal


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_the_rows_of_all_ranks_decide_what_is_orthogonalized(placement: str) -> None:
    # A matrix of 8×7 is from 101 rows on: 126 in all, on either rank 63.
    expected, orthogonal = by_tokens(None)
    assert orthogonal
    for found, orthogonal in together(2, by_tokens, placement):
        assert orthogonal
        close(found, expected, TOLERANCE)


# -- labels that are drawn -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "placement", "sizes"),
    [
        *((method, "auto", [11, 5]) for method in METHODS),
        ("KFAC", 0.5, [7, 5, 9, 3]),
        ("TEKFAC", "sharded", [7, 5, 9, 3]),
    ],
)
def test_labels_that_do_not_depend_on_ranks(
    method: str, placement: str | float, sizes: list[int]
) -> None:
    data = data_of("mlp", sum(sizes))
    options = {"fisher": "mc", "likelihood": OfTheOutput(dim=1)}
    expected = alone("mlp", method, data, sizes, **options)
    options["placement"] = placement
    for found, _ in together(len(sizes), on_ranks, "mlp", method, data, sizes, options):
        close(found, expected, TOLERANCE)


def drawn(seed: int, steps: int) -> list[Tensor]:
    """What the rank draws in each step."""
    torch.manual_seed(seed)
    seen: list[Tensor] = []

    class Noted(tekfac.Categorical):
        def sample(self, output: Tensor, generator: torch.Generator) -> Tensor:
            seen.append(torch.rand(8, generator=generator))
            return super().sample(output, generator)

    model = network_of("mlp")
    called = DistributedDataParallel(model)
    torch.manual_seed(seed)
    options = options_of("KFAC", factor_every=1, fisher="mc", likelihood=Noted(dim=1))
    optimizer = tekfac.KFAC(called, **options)
    train(model, called, optimizer, [[part] for part in data_of("mlp", 4)[:steps]])
    return seen


def test_ranks_draw_labels_of_their_own() -> None:
    """The same in every run with the same seed, whatever the number of ranks beside."""
    runs = {count: together(count, drawn, 5, 3) for count in (2, 4)}
    other = together(2, drawn, 6, 3)
    numbers = [tuple(each.tolist()) for rank in [*runs[4], *other] for each in rank]
    assert len(set(numbers)) == len(numbers)
    for rank, seen in enumerate(runs[2]):
        assert all(torch.equal(a, b) for a, b in zip(seen, runs[4][rank], strict=True))


# -- what is sent ----------------------------------------------------------------------------------


COLLECTIVES = ("all_reduce", "broadcast", GATHER, "all_to_all_single")


@contextmanager
def noted() -> Iterator[list[tuple[str, int]]]:
    """This rank's collectives, DDP's own left out, and the bytes that go into each."""
    log: list[tuple[str, int]] = []

    def listened(name: str) -> Any:
        real = getattr(dist, name)

        def called(tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
            own = args[0] if name.startswith(("all_to", "all_gather")) else tensor
            log.append((name, own.numel() * own.element_size()))
            return real(tensor, *args, **kwargs)

        return mock.patch.object(dist, name, called)

    with ExitStack() as stack:
        for name in COLLECTIVES:
            stack.enter_context(listened(name))
        yield log


def told_by(
    sizes: Sequence[Sequence[int]], few: int
) -> tuple[list[Tensor], list[Tensor], list[tuple[str, int]]]:
    """What each rank has, all of it as it is known to be, as it is told, and what was sent."""
    rank, dtypes = dist.get_rank(), (torch.float32, torch.float64)
    generator = torch.Generator().manual_seed(0)
    tensors, sources, known = [], [], []
    for number in range(max(map(len, sizes))):
        for source, own in enumerate(sizes):
            if number < len(own):
                value = torch.rand(2, own[number] // 2, generator=generator)
                known.append(value.to(dtypes[number % 2]).mT)
                tensors.append(known[-1] if source == rank else known[-1].to("meta"))
                sources.append(source)
    ranks = Group(dist.group.WORLD, torch.device("cpu"), None, averaged=True)
    with mock.patch("tekfac.ranks.ranks.FEW", few), noted() as log:
        told = ranks.spread(tensors, sources)
    return known, told, log


@pytest.mark.parametrize(
    ("sizes", "few", "calls"),
    [
        ([(), (6, 8)], 0, ["broadcast"] * 2),
        ([(8, 6), (6, 6)], 0, [GATHER] * 2),
        ([(8,), (40,)], 0, ["all_to_all_single", GATHER]),
        ([(8,), (40,)], 32, [GATHER]),
        ([(), (4, 2, 6), (60,), (2,)], 0, ["all_to_all_single", GATHER, "broadcast"]),
        ([(60,), (), (), (2,)], 0, ["all_to_all_single", GATHER]),
        ([(0,), (0,)], 0, []),
    ],
)  # fmt: skip
def test_all_are_told_what_some_have(
    sizes: Sequence[Sequence[int]], few: int, calls: Sequence[str]
) -> None:
    """In one or two collectives, whoever has how much."""
    total = 4 * sum(size for own in sizes for size in own)
    for known, told, log in together(len(sizes), told_by, sizes, few):
        assert [name for name, _ in log] == calls
        for one, other in zip(told, known, strict=True):
            assert torch.equal(one, other)
            assert one.dtype == other.dtype
            assert one.is_contiguous()
        # Filled up to a multiple of the ranks at most.
        gathered = sum(size for name, size in log if name.startswith("all_gather"))
        assert gathered * len(sizes) <= 2 * total + 8 * len(sizes) + 4 * few


def sent(method: str, options: dict[str, Any]) -> list[list[tuple[str, int]]]:
    """Each step's collectives and bytes."""
    model = network_of("mlp").float()
    parallel = DistributedDataParallel(model)
    optimizer = getattr(tekfac, method)(parallel, **options_of(method, **options))
    steps = []
    with noted() as log:
        for x, y in data_of("mlp", 8):
            log.clear()
            train(model, parallel, optimizer, [[(x.float(), y)]])
            steps.append(list(log))
    return steps


@pytest.mark.parametrize("method", METHODS)
def test_what_is_sent(method: str) -> None:
    """Statistics go in one piece, symmetric factors as triangles; other steps say nothing."""
    [first, quiet, measured, based, *_] = together(2, sent, method, {})[0]
    assert quiet == []
    [(name, size)] = measured
    assert name == "all_reduce"
    triangles = sum(d * (d + 1) // 2 + (d % 2) * (d + 1) // 2 for d in (6, 4, 5, 4, 5, 3))
    entries = triangles + 3 * 2
    if method.startswith("T"):
        entries += 3
    if method in RESCALED:
        entries += 6 * 4 + 5 * 4 + 5 * 3 + 3
    assert size == 4 * entries
    for step in (first, based):
        assert {name for name, _ in step} == {"all_reduce", GATHER}
    less = together(2, sent, method, {"communication": torch.bfloat16})[0][2]
    assert [name for name, _ in less] == ["all_reduce"] * 2
    assert sum(size for _, size in less) < 0.62 * size


def counted(method: str | None) -> list[int]:
    """How many collectives the backend was given in each step, whoever asked for them."""
    model = network_of("mlp")
    parallel = DistributedDataParallel(model)
    optimizer: Any = torch.optim.SGD(model.parameters(), 0.1)
    if method is not None:
        optimizer = getattr(tekfac, method)(parallel, **options_of(method, placement="replicated"))
    found = []
    for each in data_of("mlp", 8):
        before = dist.group.WORLD._get_sequence_number_for_group()
        train(model, parallel, optimizer, [[each]])
        found.append(dist.group.WORLD._get_sequence_number_for_group() - before)
    return found


@pytest.mark.parametrize("method", METHODS)
def test_a_quiet_step_has_the_collectives_of_any_optimizer(method: str) -> None:
    """Statistics are due in every other step, bases in every third."""
    [usual, _], [found, _] = together(2, counted, None), together(2, counted, method)
    quiet = [step for step in range(STEPS) if step % 2 and step % 3]
    assert [found[step] for step in quiet] == [usual[step] for step in quiet]
    assert all(found[step] > usual[step] for step in range(STEPS) if step not in quiet)


@pytest.mark.parametrize("method", ["KFAC", "TEKFAC"])
def test_whole_bases_go_to_those_who_need_them(method: str) -> None:
    """A rank that holds no block is told eigenvalues alone, until statistics are rotated."""
    options = {"placement": "sharded", "factor_every": 2, "basis_every": 3}
    if method in RESCALED:
        options["scale_every"] = 2
    _, quiet, measured, based, *_ = together(2, sent, method, options)[0]
    values = 4 * sum((6, 4, 5, 4, 5, 3)) + 4 * 3
    vectors = 4 * sum(d * d for d in (6, 4, 5, 4, 5, 3))
    apart = [size for name, size in based if name == GATHER]
    back = [size for name, size in quiet if name == GATHER]
    assert len(back) == 1
    # Each puts in as much as the one that has more.
    assert values / 2 <= apart[0] <= values
    assert apart[1:] == back
    lent = [size for name, size in measured if name == GATHER][:-1]
    assert len(lent) == (method in RESCALED)
    assert all(vectors / 2 <= size <= vectors for size in lent)


@pytest.mark.parametrize("method", METHODS)
def test_low_precision(method: str) -> None:
    """Sums sent in bfloat16 are good to three digits."""
    data, sizes = data_of("mlp", 48), [24, 24]
    expected = alone("mlp", method, data, sizes)
    options = {"communication": torch.bfloat16}
    start = parameters(network_of("mlp"))
    for found, _ in together(2, on_ranks, "mlp", method, data, sizes, options):
        for name, value in found.items():
            change, wanted = value - start[name], expected[name] - start[name]
            assert (change - wanted).norm() < 0.05 * wanted.norm()


# -- what only one rank does -----------------------------------------------------------------------


def evaluating(data: Sequence[Batch]) -> dict[str, Tensor]:
    """Rank 0 evaluates in every step, in which compilers stop standing aside for measurements."""
    model = network_of("mlp")
    compiled = torch.compile(DistributedDataParallel(model), backend="aot_eager")
    optimizer = tekfac.TEKFAC(compiled, **options_of("TEKFAC"))
    for x, y in shards(data, [6, 6])[dist.get_rank()]:
        optimizer.zero_grad()
        if dist.get_rank() == 0:
            with torch.no_grad():
                compiled(x)
        cross_entropy(compiled(x), y).backward()
        optimizer.step()
    return parameters(model)


def test_an_evaluation_on_one_rank() -> None:
    """What it misses of a measurement, the other's part stands for; both go on alike."""
    one, other = together(2, evaluating, data_of("mlp", 12))
    assert all(torch.equal(one[name], other[name]) for name in one)

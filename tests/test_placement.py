"""Which rank holds and makes what: pure functions, memory, and states that move."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import tekfac
from harness import METHODS
from processes import together
from ranked import (
    TOLERANCE,
    Batch,
    close,
    held_bytes,
    options_of,
    shards,
    train,
)
from tekfac.curvature.statistics import folded, unfolded
from tekfac.ranks.placement import LITTLE, divided, holders, members, unit_size

# -- pure functions --------------------------------------------------------------------------------


def test_the_costliest_goes_first_to_whoever_has_least_to_do() -> None:
    everybody = [range(3)] * 6
    assert divided([1, 7, 2, 5, 5, 1], everybody, [0, 0, 0]) == [2, 0, 1, 1, 2, 2]
    assert divided([], [], [0]) == []
    assert divided([3, 3], [range(2)] * 2, [4, 0]) == [1, 1]
    assert divided([3, 3], [[1], [1]], [0, 0]) == [1, 1]


@pytest.mark.parametrize("count", [1, 2, 5, 8])
def test_nobody_has_much_more_to_do(count: int) -> None:
    generator = torch.Generator().manual_seed(count)
    costs = torch.randint(1, 1000, (40,), generator=generator).tolist()
    takers = divided(costs, [range(count)] * len(costs), [0] * count)
    loads = [sum(c for c, t in zip(costs, takers, strict=True) if t == r) for r in range(count)]
    assert sum(loads) == sum(costs)
    # Graham's bound for longest-first.
    assert max(loads) <= (4 / 3) * max(sum(costs) / count, max(costs))


def test_unit_sizes() -> None:
    assert unit_size("replicated", 8, 2**50) == 1
    assert unit_size("sharded", 8, 1) == 8
    assert [unit_size(part, 8, 1) for part in (1.0, 0.6, 0.5, 0.3, 0.25, 0.2, 0.01)] == [
        1, 1, 2, 2, 4, 4, 8,
    ]  # fmt: skip
    assert unit_size(0.2, 6, 1) == 3
    assert [unit_size("auto", 8, part * LITTLE) for part in (1, 2, 3, 100)] == [1, 2, 4, 8]
    assert [list(members(rank, 2)) for rank in range(4)] == [[0, 1], [0, 1], [2, 3], [2, 3]]
    assert list(holders(1, 6, 2)) == [1, 3, 5]


@pytest.mark.parametrize("d", [1, 2, 3, 6, 7])
def test_folded_triangles(d: int) -> None:
    upper = torch.randn(2, d, d).triu()
    packed = folded(upper + torch.full((d, d), torch.nan).tril(-1))
    assert packed.shape == (2, (d + 1) // 2, d + 1)
    assert torch.equal(unfolded(packed), upper)


# -- memory ----------------------------------------------------------------------------------------


def wide() -> nn.Sequential:
    """Layers of which some sides are kept whole, and some by their leading eigenvectors."""
    torch.manual_seed(4)
    return nn.Sequential(
        nn.Linear(20, 9), nn.Tanh(), nn.Linear(9, 7), nn.Tanh(),
        nn.Linear(7, 7), nn.Tanh(), nn.Linear(7, 6), nn.Tanh(), nn.Linear(6, 3),
    ).double()  # fmt: skip


def batches_of(examples: int, steps: int) -> list[Batch]:
    torch.manual_seed(5)
    return [
        (torch.randn(examples, 20, dtype=torch.float64), torch.randint(3, (examples,)))
        for _ in range(steps)
    ]


def made(method: str, called: nn.Module, **options: Any) -> tekfac.NaturalGradient:
    # One method's steps need all of a layer's momentum at the rank that holds its block.
    options = {"orthogonalize": method == "EKFAC", **options_of(method, **options)}
    return getattr(tekfac, method)(called, **options)  # type: ignore[no-any-return]


def placed(
    method: str, data: Sequence[Batch], options: dict[str, Any]
) -> tuple[dict[str, Tensor], int, dict[str, Any]]:
    """Parameters, the bytes that this rank holds, and the optimizer's state."""
    model = wide()
    called = DistributedDataParallel(model)
    optimizer = made(method, called, **options)
    count = dist.get_world_size()
    mine = shards(data, [len(data[0][0]) // count] * count)[dist.get_rank()]
    found = train(model, called, optimizer, [[part] for part in mine])
    return found, held_bytes(optimizer), copy.deepcopy(optimizer.state_dict())


@pytest.mark.parametrize(
    ("method", "placement"),
    [
        *((method, "sharded") for method in METHODS),
        ("KFAC", "replicated"),
        ("EKFAC", 0.5),
        ("TKFAC", 0.5),
        ("TEKFAC", "replicated"),
    ],
)
def test_four_ranks(method: str, placement: str | float) -> None:
    data = batches_of(64, 10)
    model = wide()
    expected = train(model, model, made(method, model), [[part] for part in data])
    results = together(4, placed, method, data, {"placement": placement})
    for found, _, _ in results:
        close(found, expected, TOLERANCE)
        assert all(torch.equal(found[name], results[0][0][name]) for name in found)


@pytest.mark.parametrize("method", METHODS)
def test_kept_parts_of_wide_sides(method: str) -> None:
    """Of a side of which only the leading eigenvectors are kept all ranks know these."""
    data, options = batches_of(64, 10), {"rank": 2, "storage": torch.float64}
    model = wide()
    expected = train(model, model, made(method, model, **options), [[part] for part in data])
    for placement in ("replicated", "sharded"):
        for found, _, _ in together(2, placed, method, data, {**options, "placement": placement}):
            close(found, expected, 1e-7)


def held_of_alike(method: str, options: dict[str, Any]) -> int:
    """The bytes that this rank holds of eight layers of one size."""
    torch.manual_seed(6)
    model = nn.Sequential(*(nn.Linear(20, 20) for _ in range(8)))
    called = DistributedDataParallel(model)
    optimizer = made(method, called, **options)
    [(x, _)] = batches_of(4, 1)
    train(model, called, optimizer, [[(x.float(), torch.randint(20, (4,)))]])
    return held_bytes(optimizer)


@pytest.mark.parametrize("method", ["KFAC", "TEKFAC"])
def test_state_falls_with_the_number_of_ranks(method: str) -> None:
    [whole] = together(1, held_of_alike, method, {})
    for count, placement, holding in ((2, "sharded", 2), (4, "sharded", 4), (4, 0.5, 2)):
        for held in together(count, held_of_alike, method, {"placement": placement}):
            # Of each side the eigenvalues stay, and a few numbers.
            assert whole / holding <= held <= 1.15 * whole / holding


# -- states that move ------------------------------------------------------------------------------


def resumed(
    method: str, data: Sequence[Batch], options: dict[str, Any], state: Any, start: Any
) -> dict[str, Tensor]:
    model = wide()
    model.load_state_dict(start)
    called = DistributedDataParallel(model) if dist.is_initialized() else model
    optimizer = made(method, called, **options)
    optimizer.load_state_dict(state)
    count = dist.get_world_size() if dist.is_initialized() else 1
    rank = dist.get_rank() if dist.is_initialized() else 0
    mine = shards(data, [len(data[0][0]) // count] * count)[rank]
    return train(model, called, optimizer, [[part] for part in mine])


@pytest.mark.parametrize("method", METHODS)
def test_a_state_goes_to_any_number_of_ranks_and_back(method: str) -> None:
    data = batches_of(64, 8)
    model = wide()
    expected = train(model, model, made(method, model), [[part] for part in data])
    sharded = {"placement": "sharded"}
    results = together(4, placed, method, data[:4], sharded)
    start = results[0][0]
    for _, _, state in results[1:]:
        same_state(state, results[0][2])
    state = results[0][2]
    close(resumed(method, data[4:], {}, state, start), expected, TOLERANCE)
    others: dict[str, list[tuple[int, dict[str, Any]]]] = {
        "KFAC": [(4, {"placement": 0.5})],
        "EKFAC": [(2, sharded)],
        "TKFAC": [(2, {"placement": "replicated"})],
        "TEKFAC": [(2, sharded), (2, {"placement": "replicated"}), (4, {"placement": 0.5})],
    }
    for count, options in others[method]:
        for found in together(count, resumed, method, data[4:], options, state, start):
            close(found, expected, TOLERANCE)
    model = wide()
    optimizer = made(method, model)
    start = train(model, model, optimizer, [[part] for part in data[:4]])
    for found in together(2, resumed, method, data[4:], sharded, optimizer.state_dict(), start):
        close(found, expected, TOLERANCE)


def saved_by_one(data: Sequence[Batch]) -> tuple[dict[str, Tensor], dict[str, Any] | None]:
    """Rank 0 alone asks for the state, which every rank has."""
    model = wide()
    called = DistributedDataParallel(model)
    optimizer = made("TEKFAC", called, placement="replicated")
    mine = shards(data, [len(data[0][0]) // 2] * 2)[dist.get_rank()]
    found = train(model, called, optimizer, [[part] for part in mine])
    return found, copy.deepcopy(optimizer.state_dict()) if dist.get_rank() == 0 else None


def test_one_rank_saves_a_state_that_all_have() -> None:
    data = batches_of(64, 8)
    model = wide()
    expected = train(model, model, made("TEKFAC", model), [[part] for part in data])
    [(start, state), _] = together(2, saved_by_one, data[:4])
    close(resumed("TEKFAC", data[4:], {}, state, start), expected, TOLERANCE)


def same_state(one: dict[str, Any], other: dict[str, Any]) -> None:
    for key, values in one["state"].items():
        for name, value in values.items():
            if isinstance(value, Tensor):
                assert torch.equal(value, other["state"][key][name]), name


def test_a_state_goes_on_bit_by_bit() -> None:
    data = batches_of(16, 8)
    options = {"placement": "sharded", "fisher": "mc"}
    whole = together(2, placed, "TEKFAC", data, options)
    half = together(2, placed, "TEKFAC", data[:4], options)
    found = together(2, resumed, "TEKFAC", data[4:], options, half[0][2], half[0][0])
    for name, value in whole[0][0].items():
        assert torch.equal(found[0][name], value)


def asked_elsewhere() -> list[str]:
    data = batches_of(8, 1)
    model = wide()
    called = DistributedDataParallel(model)
    optimizer = made("TEKFAC", called, placement="sharded")
    train(model, called, optimizer, [data])
    told = []
    for block in optimizer.blocks.values():
        assert block.trace > 0
        assert block.damping > 0
        try:
            block.dense()
        except RuntimeError as error:
            told.append(str(error))
    return told


def test_a_block_that_another_rank_holds_says_so() -> None:
    told = [words for each in together(2, asked_elsewhere) for words in each]
    assert len(told) == 5
    assert all("is held by another rank" in words for words in told)

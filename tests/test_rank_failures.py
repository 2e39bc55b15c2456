"""What goes wrong on one rank: the same comes of it on all, or an error, and never a hang."""

from __future__ import annotations

import os
import time
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import tekfac
from processes import Failed, outcomes, together
from ranked import (
    DIVIDED,
    TOLERANCE,
    close,
    cross_entropy,
    data_of,
    network_of,
    options_of,
    parameters,
    shards,
    train,
)

SECONDS = 40.0


def built(change: dict[str, Any], **options: Any) -> tekfac.NaturalGradient:
    """An optimizer; rank 1's with other options."""
    model = network_of("mlp")
    own = change if dist.get_rank() == 1 else {}
    return tekfac.TEKFAC(DistributedDataParallel(model), **options_of("TEKFAC", **options, **own))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"basis_every": 7}, "ranks differ in their settings"),
        ({"lr": 0.1}, "rank 0 has lr=0.05, rank 1 has lr=0.1"),
        ({"exclude": ["0"]}, "ranks differ in their layers"),
        ({"fisher": "empirical"}, "fisher=ExactFisher, rank 1 has fisher=NoneType"),
        ({"rank": 3}, "rank 0 has rank=32, rank 1 has rank=3"),
    ],
)
def test_other_settings(change: dict[str, Any], words: str) -> None:
    for result in outcomes(2, built, change, seconds=SECONDS):
        assert isinstance(result, Failed)
        assert words in str(result)


def another_model() -> None:
    width = 4 + dist.get_rank()
    tekfac.KFAC(nn.Sequential(nn.Linear(5, width), nn.Linear(width, 3)))


def test_other_models() -> None:
    for result in outcomes(2, another_model, seconds=SECONDS):
        assert "ValueError: ranks differ in their parameters" in str(result)
        assert "rank 0 has 0.weight: (4, 5)" in str(result)
        assert "rank 1 has 0.weight: (5, 5)" in str(result)


def other_values(wrapped: bool) -> dict[str, Tensor]:
    """Of each rank, parameters of its own, which `DistributedDataParallel` would make the same."""
    model = network_of("mlp")
    with torch.no_grad():
        model[2].weight += dist.get_rank()  # type: ignore[operator]
    optimizer = tekfac.TEKFAC(model, **options_of("TEKFAC"))
    called = DistributedDataParallel(model) if wrapped else model
    return train(model, called, optimizer, [[each] for each in data_of("mlp", 6)])


def test_other_values() -> None:
    for result in outcomes(2, other_values, False, seconds=SECONDS):
        assert "ValueError: ranks differ in the values of their parameters" in str(result)
        assert "rank 0 has 2.weight: values of sum" in str(result)
    one, other = together(2, other_values, True, seconds=SECONDS)
    assert all(torch.equal(value, other[name]) for name, value in one.items())


def with_trouble(trouble: str, parallel: bool) -> tuple[dict[str, Tensor], dict[str, int]]:
    """Training in which something happens to rank 1's third batch, or to its gradient."""
    model = network_of("mlp")
    called: nn.Module = DistributedDataParallel(model) if parallel else model
    optimizer = tekfac.TEKFAC(called, **options_of("TEKFAC", factor_every=1))
    for number, (x, y) in enumerate(shards(data_of("mlp", 12), [6, 6])[dist.get_rank()]):
        hit = number == 2 and dist.get_rank() == 1
        if hit and trouble == "input":
            x = x.clone()
            x[0, 0] = float("nan")
        if hit and trouble == "empty":
            x, y = x[:0], y[:0]
        optimizer.zero_grad()
        loss = cross_entropy(called(x), y)
        (loss * float("inf") if hit and trouble == "loss" else loss).backward()
        if not parallel:
            for p in model.parameters():
                assert p.grad is not None
                dist.all_reduce(p.grad)
                p.grad /= dist.get_world_size()
            if hit and trouble == "gradient":
                model[0].weight.grad.fill_(float("nan"))  # type: ignore[union-attr, operator]
        optimizer.step()
    return parameters(model), optimizer.counters


@pytest.mark.filterwarnings("ignore:the gradient of")
@pytest.mark.parametrize("parallel", [True, False])
@pytest.mark.parametrize("trouble", ["input", "loss", "gradient", "empty"])
def test_trouble_on_one_rank(trouble: str, parallel: bool) -> None:
    results = together(2, with_trouble, trouble, parallel, seconds=SECONDS)
    (found, counters), (other, others) = results
    assert counters == others
    skips = trouble != "empty" and not (trouble == "gradient" and parallel)
    assert counters["skipped_steps"] == skips
    for name, value in found.items():
        assert value.isfinite().all()
        assert torch.equal(value, other[name])


def dying(when: int, divided: bool) -> None:
    model = network_of("mlp")
    called: nn.Module = DistributedDataParallel(model)
    if divided:
        called = fully_shard(network_of("mlp"), mesh=init_device_mesh("cpu", (2,)))
    optimizer = tekfac.TEKFAC(called, **options_of("TEKFAC", factor_every=1))
    for number, (x, y) in enumerate(data_of("mlp", 6)):
        cross_entropy(called(x), y).backward()
        if number == when and dist.get_rank() == 1:
            os._exit(1)
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize(
    ("when", "divided"), [(0, False), (1, False), (3, False), pytest.param(1, True, marks=DIVIDED)]
)
def test_a_rank_that_dies(when: int, divided: bool) -> None:
    """The others learn it from the backend, at once: they do not wait for it."""
    start = time.monotonic()
    survivor, dead = outcomes(2, dying, when, divided, seconds=SECONDS)
    assert time.monotonic() - start < SECONDS / 2 + 15
    assert "it died" in str(dead)
    assert isinstance(survivor, Failed)
    assert "RuntimeError" in str(survivor) or "DistBackendError" in str(survivor)


def changed(name: str, value: Any, when: int, on: list[int], placement: str) -> dict[str, Tensor]:
    """A setting is changed before a step, on some ranks; bases are due in steps 0, 3, 6, 9."""
    model = network_of("mlp")
    rank, ranks = (dist.get_rank(), 2) if dist.is_initialized() else (0, 1)
    called = DistributedDataParallel(model) if ranks > 1 else model
    optimizer = tekfac.TEKFAC(called, **options_of("TEKFAC", placement=placement))
    for number, (x, y) in enumerate(shards(data_of("mlp", 48), [48 // ranks] * ranks)[rank]):
        if number == when and rank in on:
            if name == "lr":
                optimizer.param_groups[0][name] = value
            else:
                setattr(optimizer, name, value)
        train(model, called, optimizer, [[(x, y)]])
    return parameters(model)


@pytest.mark.parametrize(
    ("name", "value", "before"),
    [
        ("lr", 0.005, 0.05),
        ("factor_every", 3, 2),
        ("scale_every", 1, 2),
        ("basis_every", 2, 3),
        ("basis_every", 7, 3),
        ("interval_warmup", True, False),
    ],
)
@pytest.mark.parametrize(("when", "placement"), [(1, "replicated"), (2, "sharded")])
def test_settings_that_come_apart(
    name: str, value: Any, before: Any, when: int, placement: str
) -> None:
    """All go on as before until they compare what they have."""
    for result in outcomes(2, changed, name, value, when, [1], placement, seconds=SECONDS):
        what = "parameter groups" if name == "lr" else "settings"
        assert f"ranks differ in their {what}" in str(result)
        assert f"rank 0 has {name}={before}, rank 1 has {name}={value}" in str(result)


@pytest.mark.parametrize(("name", "value"), [("factor_every", 1), ("basis_every", 2)])
def test_settings_changed_on_all_ranks(name: str, value: int) -> None:
    """In a step with bases they count from there, as with one process; else from the next on."""
    expected = changed(name, value, 3, [0], "auto")
    for when, placement in ((2, "sharded"), (3, "replicated")):
        for found in together(2, changed, name, value, when, [0, 1], placement, seconds=SECONDS):
            close(found, expected, TOLERANCE)


def other_states() -> None:
    """Rank 1 goes on from a state that is a step older."""
    model = network_of("mlp")
    called = DistributedDataParallel(model)
    optimizer = tekfac.TEKFAC(called, **options_of("TEKFAC"))
    data = [[part] for part in data_of("mlp", 6)]
    train(model, called, optimizer, data[:3])
    older = optimizer.state_dict()
    train(model, called, optimizer, data[3:4])
    optimizer.load_state_dict(older if dist.get_rank() == 1 else optimizer.state_dict())
    train(model, called, optimizer, data[4:])


def test_states_of_different_steps() -> None:
    for result in outcomes(2, other_states, seconds=SECONDS):
        assert "ranks differ in the steps that they took" in str(result)
        assert "rank 0 has 4, rank 1 has 3" in str(result)


def turned_on_one() -> None:
    """A square matrix that one rank multiplies with from the other side."""

    class Turned(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.eye(5, dtype=torch.float64))
            self.out = nn.Linear(5, 3).double()

        def forward(self, x: Tensor) -> Tensor:
            w = self.w if dist.get_rank() else self.w.T
            return self.out((x @ w).tanh())  # type: ignore[no-any-return]

    model = Turned()
    called = DistributedDataParallel(model)
    optimizer = tekfac.TEKFAC(called, **options_of("TEKFAC"))
    train(model, called, optimizer, [[part] for part in data_of("mlp", 6)])


def test_layers_used_differently() -> None:
    for result in outcomes(2, turned_on_one, seconds=SECONDS):
        assert "ranks use layer 'w' differently" in str(result)


def wrong_groups() -> list[str]:
    model = network_of("mlp")
    told = []
    mesh = dist.device_mesh.init_device_mesh("cpu", (1, dist.get_world_size()))
    for option in ({"process_group": mesh}, {"process_group": "gloo"}, {"placement": 0}):
        try:
            tekfac.TEKFAC(model, **option)
        except (TypeError, ValueError) as error:
            told.append(str(error))
    return told


def test_wrong_groups() -> None:
    for told in together(2, wrong_groups, seconds=SECONDS):
        assert "process_group takes a mesh of one dimension, got one of 2" in told[0]
        assert "process_group takes a torch.distributed process group" in told[1]
        assert "placement must be" in told[2]
    with pytest.raises(ValueError, match=r"torch\.distributed is not initialised"):
        tekfac.TEKFAC(network_of("mlp"), process_group=object())
    with pytest.raises(ValueError, match=r"communication must be one of torch\.bfloat16"):
        tekfac.TEKFAC(network_of("mlp"), communication=torch.float16)

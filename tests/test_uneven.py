"""Ranks that run out of batches before others do, in a `Join`, against one process."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from contextlib import nullcontext, suppress
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.algorithms.join import Join
from torch.nn.parallel import DistributedDataParallel

import tekfac
from processes import outcomes, together
from ranked import (
    TOLERANCE,
    Batch,
    Loss,
    as_averaged,
    close,
    cross_entropy,
    data_of,
    network_of,
    options_of,
    parameters,
    shards,
    train,
)
from test_placement import same_state

# A hang ends the test; ranks import torch first, which takes a busy machine a minute.
SECONDS = 120.0
STEPS, AFTER = 7, 2

Shares = Sequence[Sequence[Batch]]


def shares_of(sizes: Sequence[int], counts: Sequence[int]) -> list[list[Batch]]:
    """For each rank its batches, as many as it has."""
    found = shards(data_of("mlp", sum(sizes), STEPS), sizes)
    return [own[:count] for own, count in zip(found, counts, strict=True)]


def made(method: str, called: torch.nn.Module, **options: Any) -> tekfac.NaturalGradient:
    return getattr(tekfac, method)(called, **options_of(method, momentum=0.9, **options))  # type: ignore


def alone(method: str, shares: Shares, divided: bool, **options: Any) -> dict[str, Tensor]:
    """One process that sees, in each step, all that ranks have for it."""
    model = network_of("mlp")
    optimizer = made(method, model, **options)
    for number in range(STEPS):
        parts = [own[number] for own in shares if number < len(own)]
        averaged, weight = as_averaged(parts), len(parts) / len(shares) if divided else 1.0

        def loss(
            output: Tensor, target: Tensor, averaged: Loss = averaged, weight: float = weight
        ) -> Tensor:
            return weight * averaged(output, target)

        x, y = (torch.cat(each) for each in zip(*parts, strict=True))
        train(model, model, optimizer, [[(x, y)]], loss)
    later = data_of("mlp", 12, AFTER)
    return train(model, model, optimizer, [[each] for each in later])


def on_ranks(
    method: str, shares: Shares, divided: bool, options: dict[str, Any]
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Parameters and state after the join, and two more steps for which all have a batch."""
    model = network_of("mlp")
    called = DistributedDataParallel(model)
    optimizer = made(method, called, **options)
    own = [[each] for each in shares[dist.get_rank()]]
    with Join([called, optimizer], divide_by_initial_world_size=divided):  # type: ignore[list-item]
        train(model, called, optimizer, own)
    count = dist.get_world_size()
    later = shards(data_of("mlp", 12, AFTER), [12 // count] * count)[dist.get_rank()]
    found = train(model, called, optimizer, [[each] for each in later])
    return found, optimizer.state_dict()


@pytest.mark.parametrize(
    ("method", "placement", "counts", "fisher", "divided"),
    [
        ("KFAC", "replicated", (STEPS, 3), "exact", False),
        ("KFAC", "sharded", (2, STEPS), "empirical", False),
        ("EKFAC", "replicated", (0, STEPS), "exact", False),
        ("TKFAC", "sharded", (STEPS, 0), "exact", False),
        ("TEKFAC", "replicated", (STEPS, 5), "empirical", False),
        ("TEKFAC", "sharded", (4, STEPS), "exact", True),
        ("TEKFAC", "sharded", (STEPS, 1, STEPS, 4), "exact", False),
        ("EKFAC", 0.5, (1, 4, STEPS, 2), "exact", True),
    ],
)
def test_as_one_process_with_the_batches_that_there_are(
    method: str, placement: str | float, counts: Sequence[int], fisher: str, divided: bool
) -> None:
    """And all ranks are alike afterwards, in their state too."""
    sizes = [29, 19] if len(counts) == 2 else [17, 9, 13, 11]
    if fisher == "empirical":
        sizes = [24, 24]  # or one process's loss weighs examples as no rank's does
    shares = shares_of(sizes, counts)
    expected = alone(method, shares, divided, fisher=fisher)
    options = {"placement": placement, "fisher": fisher}
    results = together(len(counts), on_ranks, method, shares, divided, options, seconds=SECONDS)
    for found, state in results:
        close(found, expected, TOLERANCE)
        assert all(torch.equal(value, results[0][0][name]) for name, value in found.items())
        same_state(state, results[0][1])


def test_damping_that_follows_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Compared in the tenth step, when one rank has no batch any more, and decided in a later."""
    monkeypatch.setattr(sys.modules[__name__], "STEPS", 14)
    shares = shares_of([29, 19], (14, 5))
    rule = tekfac.AgreementDamping(decay=0.5, minimum=1e-3)
    # Which steps are orthogonalized goes by the rows of the largest share.
    options = {"damping": rule, "lr": 1e-3, "orthogonalize": False}
    expected = alone("TEKFAC", shares, False, **options)
    results = together(2, on_ranks, "TEKFAC", shares, False, options, seconds=SECONDS)
    for found, state in results:
        close(found, expected, TOLERANCE)
        assert state["tekfac"]["agreement"]["since"] > 9
        same_state(state, results[0][1])


def accumulating(apart: bool) -> dict[str, Tensor]:
    """Two batches for each step; rank 1 has two steps less."""
    model = network_of("mlp")
    called = DistributedDataParallel(model)
    optimizer = made("TEKFAC", called)
    pairs = shards(data_of("mlp", 24, STEPS), [6] * 4)[2 * dist.get_rank() :]
    with Join([called, optimizer], divide_by_initial_world_size=False):  # type: ignore[list-item]
        for number in range(STEPS - 2 * dist.get_rank()):
            optimizer.zero_grad()
            for last in (False, True):
                x, y = pairs[last][number]
                with nullcontext() if last or not apart else called.no_sync():
                    (cross_entropy(called(x), y) / 2).backward()
            optimizer.step()
    return parameters(model)


def test_accumulation() -> None:
    model = network_of("mlp")
    optimizer = made("TEKFAC", model)
    for number, (x, y) in enumerate(data_of("mlp", 24, STEPS)):
        size = 24 if number < STEPS - 2 else 12
        train(model, model, optimizer, [[(x[:size], y[:size])]])
    for found in together(2, accumulating, True, seconds=SECONDS):
        close(found, parameters(model), TOLERANCE)


def test_accumulation_that_says_a_step_where_there_is_none() -> None:
    for result in outcomes(2, accumulating, False, seconds=SECONDS):
        assert "RuntimeError: two passes through the model before a step" in str(result)


def again(enabled: bool) -> dict[str, Tensor]:
    """A join that ends in an error, or is none, and another one."""
    model = network_of("mlp")
    called = DistributedDataParallel(model)
    optimizer = made("TEKFAC", called)
    joinables: list[Any] = [called, optimizer]
    data = [[each] for each in shards(data_of("mlp", 12, STEPS), [6, 6])[dist.get_rank()]]
    with suppress(KeyError), Join(joinables, enable=enabled):
        train(model, called, optimizer, data[:2])
        x, y = data[2][0]
        cross_entropy(called(x), y).backward()
        raise KeyError
    if not enabled:
        cross_entropy(called(x), y).backward()  # no step belongs to each pass
    with Join(joinables):
        train(model, called, optimizer, data[2:])
    return parameters(model)


@pytest.mark.parametrize("enabled", [True, False])
def test_a_join_after_another(enabled: bool) -> None:
    model = network_of("mlp")
    data = [[each] for each in data_of("mlp", 12, STEPS)]
    expected = train(model, model, made("TEKFAC", model), data)
    for found in together(2, again, enabled, seconds=SECONDS):
        close(found, expected, TOLERANCE)


def joined(way: str) -> None:
    model = network_of("mlp")
    called = DistributedDataParallel(model)
    damping = tekfac.AdaptiveDamping() if way == "adaptive" else 1e-2
    optimizer = made("TEKFAC", model if way == "afterwards" else called, damping=damping)
    joinables: dict[str, list[Any]] = {
        "model": [called],
        "optimizer": [optimizer],
        "turned": [optimizer, called],
    }
    with Join(joinables.get(way, [called, optimizer])):
        train(model, called, optimizer, [[each] for each in data_of("mlp", 6)])


@pytest.mark.parametrize(
    ("way", "words"),
    [
        ("model", "RuntimeError: ranks that run out of batches (join) would leave those"),
        ("optimizer", "RuntimeError: Join needs the model's DistributedDataParallel and then"),
        ("turned", "RuntimeError: Join needs the model's DistributedDataParallel and then"),
        ("afterwards", "ValueError: Join is for an optimizer that was given a model with one"),
        ("adaptive", "NotImplementedError: AdaptiveDamping tries steps on all ranks' batches"),
    ],
)
def test_what_is_refused(way: str, words: str) -> None:
    for result in outcomes(2, joined, way, seconds=SECONDS):
        assert words in str(result)

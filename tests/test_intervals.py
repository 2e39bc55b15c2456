"""When statistics and bases are due: by hand, and as seen from outside."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import tekfac
from tekfac.optimizer.intervals import decay_at, is_due


def due(every: int, divisor: int | None, until: int) -> list[int]:
    return [step for step in range(until) if is_due(step, every, divisor)]


def test_long_intervals_are_reached_by_and_by() -> None:
    # From 0 a step at a time; from 16 every 16 // 8 steps, from 24 every 24 // 8, ...
    expected = [*range(16), 16, 18, 20, 22, 24, 27, 30, 33, 37, 41, 46, 51, 57, 64, 72, 81, 91]
    assert due(10, 8, 100) == expected
    assert due(10, 8, 1000)[-5:] == [951, 961, 971, 981, 991]


def test_an_interval_is_at_most_its_part_of_the_time() -> None:
    for every, divisor in ((10, 8), (100, 4), (1000, 4), (17, 3)):
        steps = due(every, divisor, 20 * every * divisor)
        gaps = [b - a for a, b in itertools.pairwise(steps)]
        expected = [min(every, max(1, step // divisor)) for step in steps[:-1]]
        assert gaps == expected


def test_short_intervals_and_fixed_ones() -> None:
    assert due(3, 8, 10) == [0, 3, 6, 9]
    assert due(1, 8, 4) == [0, 1, 2, 3]
    assert due(10, None, 31) == [0, 10, 20, 30]


def test_averages_remember_a_quarter_of_the_steps_until_decay_is_reached() -> None:
    # In the first steps nothing; an interval of t/8 is half of a quarter of t; later less.
    assert [decay_at(step, 10, 8, 0.95) for step in (1, 2, 3, 4)] == [0.0] * 4
    assert decay_at(8, 10, 8, 0.95) == 1 - 4 / 8
    assert decay_at(64, 10, 8, 0.95) == 1 - 4 * 7 / 64
    assert decay_at(401, 10, 8, 0.95) == 1 - 4 * 10 / 401
    assert decay_at(901, 10, 8, 0.95) == 0.95
    assert decay_at(401, 10, 8, 0.5) == 0.5
    assert decay_at(3, 3, 8, 0.95) == decay_at(10, 10, None, 0.95) == 0.95


@pytest.mark.parametrize("method", ["KFAC", "EKFAC", "TKFAC", "TEKFAC"])
def test_the_optimizer_forgets_as_it_should(method: str) -> None:
    """The bias of a model whose output does not depend on its input: G is p (1 - p), by hand."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(1, 1)).double()
    options: dict[str, Any] = {"factor_decay": 0.9, "likelihood": "bernoulli", "fisher": "exact"}
    if method in ("EKFAC", "TEKFAC"):
        options["scale_decay"] = 0.9
    optimizer = getattr(tekfac, method)(model, lr=0.0, **options)
    x = torch.zeros(4, 1, dtype=torch.float64)
    expected, before = 0.0, None
    for step in range(200):
        with torch.no_grad():
            model[0].bias.fill_(step % 17 / 10)
        optimizer.zero_grad()
        F.binary_cross_entropy_with_logits(model(x), torch.ones_like(x)).backward()
        optimizer.step()
        if is_due(step, 10, 8):
            p = torch.sigmoid(model[0].bias).item()
            past = 0.0 if before is None else min(0.9, max(0.0, 1 - 4 * (step - before) / step))
            expected = past * expected + (1 - past) * p * (1 - p)
            before = step
        block = optimizer.blocks["0"]
        # KFAC's own eigenvalues are as old as its basis.
        found = block.factors.output.value.item() if method == "KFAC" else block.trace
        assert found == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("warmup", [True, False])
@pytest.mark.parametrize("method", ["KFAC", "EKFAC", "TKFAC", "TEKFAC"])
def test_the_optimizer_measures_when_it_is_due(method: str, warmup: bool) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
    options: dict[str, Any] = {"factor_every": 10, "basis_every": 20, "interval_warmup": warmup}
    if method in ("EKFAC", "TEKFAC"):
        options["scale_every"] = 10
    optimizer = getattr(tekfac, method)(model, lr=1e-3, **options)
    measured, refreshed, before = [], [], {}
    for step in range(60):
        optimizer.zero_grad()
        F.cross_entropy(model(torch.randn(8, 3)), torch.randint(2, (8,))).backward()
        optimizer.step()
        state = optimizer.state_dict()["state"][0]
        now = {name: state[f"block.{name}"].clone() for name in ("factor.input", "basis.input")}
        if not before or not torch.equal(now["factor.input"], before["factor.input"]):
            measured.append(step)
        if not before or not torch.equal(now["basis.input"], before["basis.input"]):
            refreshed.append(step)
        before = now
    assert measured == due(10, 8 if warmup else None, 60)
    assert refreshed == due(20, 4 if warmup else None, 60)

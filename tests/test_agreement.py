"""Damping that falls where steps agree with those before them."""

from __future__ import annotations

import copy
import io
import math
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import tekfac
from harness import METHODS, Waits
from processes import together
from ranked import wrapping
from test_fsdp import divided

torch.set_num_threads(1)

STEPS = 45
OPTIONS: dict[str, Any] = {
    "factor_every": 5, "basis_every": 15, "interval_warmup": False, "likelihood": "gaussian",
    "fisher": "exact",
}  # fmt: skip


def rule(ratio: float = 0.3, **options: Any) -> tekfac.AgreementDamping:
    return tekfac.AgreementDamping(ratio, **options)


def problem() -> tuple[nn.Module, Tensor, Tensor]:
    """A smooth function without noise."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(2, 12), nn.Tanh(), nn.Linear(12, 12), nn.Tanh(), nn.Linear(12, 1)
    )
    x = torch.rand(64, 2).double() * 2 - 1
    return model.double(), x, (3 * x[:, :1]).sin() * x[:, 1:]


def step(model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor, y: Tensor) -> float:
    optimizer.zero_grad()
    loss = F.mse_loss(model(x), y)
    loss.backward()
    optimizer.step()
    return loss.item()


def test_it_stays_between_its_bounds() -> None:
    found = rule(0.2, decay=0.5, minimum=0.03)
    assert found.maximum == 0.2
    assert found.after(0.95, 1).ratio == 0.1
    assert found.after(0.95, 10).ratio == 0.03
    assert found.after(0.95, 1).after(0.4, 3).ratio == 0.2
    assert found.after(-1.0, 1).ratio == 0.2
    for between in (0.7, math.nan):
        assert found.after(between, 5) is found
    assert rule(0.2, maximum=1.0).after(0.0, 1000).ratio == 1.0


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"ratio": 0.0}, "ratio must be positive"),
        ({"decay": 1.0}, "decay must be above 0 and below 1, got 1.0"),
        ({"minimum": -1.0}, "minimum must be positive"),
        ({"ratio": 0.3, "minimum": 0.5}, "between minimum=0.5 and maximum=0.3, got 0.3"),
        ({"ratio": 0.3, "maximum": 0.1}, "and maximum=0.1, got 0.3"),
    ],
)
def test_numbers_out_of_range(options: dict[str, float], words: str) -> None:
    with pytest.raises(ValueError, match=f"AgreementDamping's .*{words}"):
        tekfac.AgreementDamping(**options)


@pytest.mark.parametrize("method", METHODS)
def test_the_cosine_is_that_of_steps_and_momentum(
    method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By what stands in the state before and after every tenth step; two groups with their own."""
    for name in ("APART", "AGREED"):
        monkeypatch.setattr(f"tekfac.curvature.damping.{name}", 0.8)  # so that they always move
    model, x, y = problem()
    optimizer = getattr(tekfac, method)(
        model,
        damping=rule(maximum=3.0),
        params=[
            {"params": model[0].parameters(), "lr": 0.1},
            {"params": model[2:].parameters(), "lr": 1e-3},
        ],
        **OPTIONS,
    )
    sums = [torch.zeros(3).double(), torch.zeros(3).double()]
    expected, since, ratios = [rule(maximum=3.0)] * 2, 0, set()
    for number in range(STEPS):
        buffers = [
            {p: optimizer.state[p]["momentum_buffer"].clone() for p in group["params"]}
            if number
            else {}
            for group in optimizer.param_groups
        ]
        # Without warm-up, bases are made in the first step and every 15th from there.
        if number % 15 == 0:
            for place, (dot, own, past) in enumerate(sums):
                cosine = float(dot / (own * past).sqrt())
                expected[place] = expected[place].after(cosine, number - since)
            since, sums = number, [torch.zeros(3).double(), torch.zeros(3).double()]
        step(model, optimizer, x, y)
        if (number + 1) % 10 == 0:
            for group, before, each in zip(optimizer.param_groups, buffers, sums, strict=True):
                for p in group["params"]:
                    v = before[p]
                    u = optimizer.state[p]["momentum_buffer"] - 0.9 * v
                    each += torch.stack([(u * v).sum(), u.square().sum(), v.square().sum()])
        found = [group["damping"] for group in optimizer.param_groups]
        assert [each.ratio for each in found] == pytest.approx([e.ratio for e in expected])
        ratios |= {each.ratio for each in found}
    assert len(ratios) >= 3, "they moved, and not both alike"


def test_full_batches_without_noise_gain_by_it() -> None:
    ends = {}
    for damping in (tekfac.MeanDamping(0.3), rule()):
        model, x, y = problem()
        optimizer = tekfac.TEKFAC(model, damping=damping, likelihood="gaussian")
        for _ in range(600):
            ends[type(damping)] = step(model, optimizer, x, y)
    assert optimizer.param_groups[0]["damping"].ratio < 0.03
    assert ends[tekfac.AgreementDamping] < ends[tekfac.MeanDamping] / 3


def test_batches_drawn_at_random_are_trained_as_with_a_constant_ratio() -> None:
    ends = []
    for damping in (tekfac.MeanDamping(0.3), rule()):
        model, x, y = problem()
        optimizer = tekfac.TEKFAC(model, damping=damping, **OPTIONS)
        generator = torch.Generator().manual_seed(1)
        for _ in range(STEPS):
            some = torch.randint(64, (4,), generator=generator)
            noise = torch.randn(4, 1, generator=generator).double()
            step(model, optimizer, x[some], y[some] + noise)
        ends.append([p.detach() for p in model.parameters()])
    for one, other in zip(*ends, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("options", [{"momentum": 0.0}, {"rms_clip": None, "lr": 1e-3}], ids=str)
def test_without_momentum_or_bound_it_stays(options: dict[str, Any]) -> None:
    model, x, y = problem()
    optimizer = tekfac.TEKFAC(model, **OPTIONS, **options)
    for _ in range(STEPS):
        step(model, optimizer, x, y)
    assert optimizer.param_groups[0]["damping"] == rule()


@pytest.mark.parametrize("stop", [10, 15, 24])
def test_a_run_resumes_exactly(stop: int) -> None:
    """Between comparisons and decisions, too."""
    model, x, y = problem()
    optimizer = tekfac.TEKFAC(model, **OPTIONS)
    for _ in range(stop):
        step(model, optimizer, x, y)
    file = io.BytesIO()
    torch.save([model.state_dict(), optimizer.state_dict()], file)
    file.seek(0)
    saved = torch.load(file)
    other = copy.deepcopy(model)
    resumed = tekfac.TEKFAC(other, **OPTIONS)
    other.load_state_dict(saved[0])
    resumed.load_state_dict(saved[1])
    for _ in range(stop, STEPS):
        step(model, optimizer, x, y)
        step(other, resumed, x, y)
    assert optimizer.param_groups[0]["damping"] == resumed.param_groups[0]["damping"] != rule()
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(p, q)


def test_a_state_from_before_the_rule_goes_on() -> None:
    model, x, y = problem()
    optimizer = tekfac.TEKFAC(model, **OPTIONS)
    step(model, optimizer, x, y)
    older = optimizer.state_dict()
    del older["tekfac"]["agreement"]
    other = copy.deepcopy(model)
    resumed = tekfac.TEKFAC(other, **OPTIONS)
    resumed.load_state_dict(older)
    for _ in range(3):
        assert step(model, optimizer, x, y) == step(other, resumed, x, y)


def test_the_host_waits_for_the_device_only_where_a_basis_is_due(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("tekfac.verdict.waits", lambda device: True)
    model, x, y = problem()
    optimizer = tekfac.TEKFAC(model, lr=1e-3, **{**OPTIONS, "basis_every": 40})
    step(model, optimizer, x, y)
    with Waits() as quiet:
        for _ in range(39):
            optimizer.zero_grad()
            F.mse_loss(model(x), y).backward()
            optimizer.step()
    assert not quiet.found
    step(model, optimizer, x, y)
    assert optimizer.param_groups[0]["damping"].ratio < 0.3


def on_ranks(way: str) -> tuple[float, list[Tensor]]:
    model, x, y = problem()
    called: nn.Module = divided(model) if way == "fully_shard" else DistributedDataParallel(model)
    optimizer = tekfac.TEKFAC(called, **OPTIONS)
    half = slice(32 * dist.get_rank(), 32 * dist.get_rank() + 32)
    for _ in range(STEPS):
        step(called, optimizer, x[half], y[half])
    parts = [p.detach() for p in model.parameters()]
    whole = [p.full_tensor() if hasattr(p, "full_tensor") else p for p in parts]
    return optimizer.param_groups[0]["damping"].ratio, whole


@pytest.mark.parametrize("way", ["fully_shard", "DistributedDataParallel"])
def test_ranks_agree(way: str) -> None:
    if way == "fully_shard":
        wrapping(way)
    model, x, y = problem()
    optimizer = tekfac.TEKFAC(model, **OPTIONS)
    for _ in range(STEPS):
        step(model, optimizer, x, y)
    ratio = optimizer.param_groups[0]["damping"].ratio
    assert ratio < 0.3
    for found, parts in together(2, on_ranks, way):
        assert found == pytest.approx(ratio)
        for part, p in zip(parts, model.parameters(), strict=True):
            torch.testing.assert_close(part, p.detach(), rtol=1e-6, atol=1e-9)

"""Steps as on an accelerator, where the host must not wait: the device decides what is skipped.

The CPU stands in for the accelerator; what would make a host wait is counted by dispatch.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import tekfac
from harness import METHODS, Waits
from tekfac import RelativeDamping, TraceDamping
from tekfac.curvature import sampling

FISHERS = ["mc", "exact", "empirical"]


@pytest.fixture(autouse=True)
def accelerator(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tekfac.verdict.waits", lambda device: True)


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 3, groups=2),
        nn.ReLU(), nn.Flatten(), nn.Linear(64, 3),
    )  # fmt: skip


def batch(step: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(step)
    x = torch.randn(6, 2, 6, 6, generator=generator)
    return x, torch.randint(3, (6,), generator=generator)


def build(method: str, model: nn.Module, **options: Any) -> Any:
    every = {"factor_every": 2, "basis_every": 100, "interval_warmup": False}
    if method in ("EKFAC", "TEKFAC"):
        every["scale_every"] = 3
    return getattr(tekfac, method)(model, **{"lr": 0.01, **every, **options})


def backward(model: nn.Module, step: int) -> None:
    model.zero_grad()
    x, y = batch(step)
    F.cross_entropy(model(x), y).backward()


def train(model: nn.Module, optimizer: Any, steps: range) -> None:
    for step in steps:
        backward(model, step)
        optimizer.step()


def train_on_nan(model: nn.Module, optimizer: Any, step: int) -> None:
    backward(model, step)
    next(model.parameters()).grad.fill_(torch.nan)
    optimizer.step()


def everything(model: nn.Module, optimizer: Any) -> Iterator[tuple[str, Tensor]]:
    """Parameters and all that the optimizer has learnt."""
    yield from model.named_parameters()
    for key, state in optimizer.state_dict()["state"].items():
        for name, value in state.items():
            yield f"{key}.{name}", torch.as_tensor(value)


@pytest.mark.parametrize("much_work", [False, True])
@pytest.mark.parametrize("fisher", FISHERS)
@pytest.mark.parametrize("method", METHODS)
def test_only_a_refresh_of_the_basis_reads_from_the_device(
    method: str, fisher: str, much_work: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = network()
    options: dict[str, Any] = {"nesterov": True, "weight_decay": 0.1, "kl_clip": 1e-3}
    if much_work:
        options |= {"kl_clip": None, "orthogonalize": True}
        monkeypatch.setattr(sampling, "SMALL", 0)
        monkeypatch.setattr(sampling, "multiplies_bfloat16", lambda device: True)
        options |= {"factor_rows": 1, "rank": 3, "storage": torch.bfloat16}
    traced = method in ("TKFAC", "TEKFAC")
    options["damping"] = TraceDamping() if traced else RelativeDamping(1e-2)
    optimizer = build(method, model, fisher=fisher, **options)
    with Waits() as first:
        train(model, optimizer, range(1))
    assert first.found["_local_scalar_dense"] > 0  # what is counted does happen
    with Waits() as quiet:
        train(model, optimizer, range(1, 9))
    assert not quiet.found
    before = {name: value.clone() for name, value in everything(model, optimizer)}
    train(model, optimizer, range(9, 11))
    changed = [n for n, v in everything(model, optimizer) if not torch.equal(v, before[n])]
    assert any("factor" in name for name in changed)  # statistics were taken all the same


@pytest.mark.parametrize("fisher", FISHERS)
@pytest.mark.parametrize("method", METHODS)
def test_the_steps_are_those_of_a_host_that_reads(
    method: str, fisher: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = []
    for waits in (True, False):
        monkeypatch.setattr("tekfac.verdict.waits", lambda device, waits=waits: waits)
        model = network()
        generator = torch.Generator().manual_seed(1)
        optimizer = build(method, model, fisher=fisher, generator=generator, weight_decay=0.1)
        train(model, optimizer, range(7))
        found.append(dict(everything(model, optimizer)))
        assert optimizer.counters["steps"] == 7
    for name, value in found[1].items():
        torch.testing.assert_close(found[0][name], value, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("method", "fisher", "value"),
    [
        (method, fisher, (torch.nan, torch.inf)[(i + j) % 2])
        for i, method in enumerate(METHODS)
        for j, fisher in enumerate(FISHERS)
    ],
)
def test_a_step_whose_gradient_is_not_finite_changes_nothing(
    method: str, fisher: str, value: float
) -> None:
    model = network()
    optimizer = build(method, model, fisher=fisher, weight_decay=0.1)
    train(model, optimizer, range(4))
    before = {name: each.clone() for name, each in everything(model, optimizer)}
    for step, spoilt in ((4, "0.weight"), (5, "1.bias"), (6, "6.bias")):
        backward(model, step)
        p = model.get_parameter(spoilt)
        assert p.grad is not None
        p.grad.view(-1)[0] = value
        with Waits() as waits:
            optimizer.step()
        assert not waits.found
    with pytest.warns(RuntimeWarning, match="gradient of a parameter is not finite: the step was"):
        assert optimizer.counters == {
            "steps": 4, "skipped_steps": 3, "skipped_statistics": 0, "failed_decompositions": 0,
        }  # fmt: skip
    for name, each in everything(model, optimizer):
        assert torch.equal(each, before[name]), name
    train(model, optimizer, range(7, 9))
    assert optimizer.counters["steps"] == 6
    assert all(bool(torch.isfinite(each).all()) for _, each in everything(model, optimizer))


@pytest.mark.parametrize("method", METHODS)
def test_statistics_that_are_not_finite_are_left_out(method: str) -> None:
    class Poisoned(tekfac.Categorical):
        def sample(self, output: Tensor, generator: torch.Generator) -> Tensor:
            return super().sample(output, generator) * (torch.nan if poison else 1.0)

    poison: list[int] = []
    model = network()
    optimizer = build(method, model, likelihood=Poisoned(), factor_every=1)
    train(model, optimizer, range(4))
    before = {name: each.clone() for name, each in everything(model, optimizer)}
    poison.append(1)
    train(model, optimizer, range(4, 6))
    poison.clear()
    with pytest.warns(RuntimeWarning, match="statistics of some layers are not finite"):
        assert optimizer.counters == {
            "steps": 6, "skipped_steps": 0, "skipped_statistics": 2 * len(optimizer.blocks),
            "failed_decompositions": 0,
        }  # fmt: skip
    for name, each in everything(model, optimizer):
        learnt = "block." in name
        assert torch.equal(each, before[name]) == learnt or not learnt, name
    train(model, optimizer, range(6, 7))
    changed = [n for n, v in everything(model, optimizer) if not torch.equal(v, before[n])]
    assert any("factor" in name for name in changed)


def test_a_skipped_step_is_warned_of_at_the_next_refresh() -> None:
    model = network()
    optimizer = build("TEKFAC", model, basis_every=4)
    train(model, optimizer, range(2))
    train_on_nan(model, optimizer, 2)
    with pytest.warns(RuntimeWarning, match="the step was skipped"):
        train(model, optimizer, range(3, 6))


def test_a_run_resumes_exactly(tmp_path: Any) -> None:
    model = network()
    optimizer = build("TEKFAC", model, basis_every=5)
    train(model, optimizer, range(3))
    train_on_nan(model, optimizer, 3)
    with pytest.warns(RuntimeWarning, match="the step was skipped"):
        state = optimizer.state_dict()
    torch.save([model.state_dict(), state], tmp_path / "checkpoint")
    weights, state = torch.load(tmp_path / "checkpoint")
    other = copy.deepcopy(model)
    other.load_state_dict(weights)
    resumed = build("TEKFAC", other)
    resumed.load_state_dict(state)
    for each, by in ((model, optimizer), (other, resumed)):
        train(each, by, range(4, 9))
    for (name, value), (_, same) in zip(
        everything(model, optimizer), everything(other, resumed), strict=True
    ):
        assert torch.equal(value, same), name
    assert resumed.counters == optimizer.counters

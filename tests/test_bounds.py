"""Runs that would diverge train, and one that is lost says so.

The bound itself is checked against `reference`, which takes norms of dense solves in float64.
"""

from __future__ import annotations

import copy
import itertools
import math
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import reference
import tekfac
from harness import METHODS, NETWORKS, SideBySide, batch, pooled
from tekfac.optimizer.events import LOST


# With momentum and without in turns, so that any two of the four meet.
@pytest.mark.parametrize(
    ("method", "network", "rms_clip", "momentum"),
    [
        (method, network, rms_clip, (0.0, 0.9)[(i + j + k) % 2])
        for i, method in enumerate(METHODS)
        for j, network in enumerate(NETWORKS)
        for k, rms_clip in enumerate((1e-3, 1e3))
    ],
)
def test_against_the_reference(method: str, network: str, rms_clip: float, momentum: float) -> None:
    torch.manual_seed(3)
    pair = SideBySide(
        NETWORKS[network](), method, rms_clip=rms_clip, momentum=momentum, lr=1e-3,
        nesterov=momentum > 0, damping=reference.Mean(0.3),
    )  # fmt: skip
    for _ in range(3):
        pair.step(*batch(network, 6))
        pair.check_parameters()


@pytest.mark.parametrize("ratio", [1e-3, 0.3, 10.0])
@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("method", METHODS)
def test_mean_damping(method: str, network: str, ratio: float) -> None:
    torch.manual_seed(3)
    pair = SideBySide(NETWORKS[network](), method, damping=reference.Mean(ratio), lr=1e-3)
    for _ in range(3):
        pair.step(*batch(network, 6))
        pair.check_blocks()
        pair.check_parameters()


def test_mean_damping_is_the_papers_where_the_trace_is_above_nu() -> None:
    changes = []
    for damping in (tekfac.MeanDamping(1.0), tekfac.TraceDamping(nu=1e-12)):
        torch.manual_seed(3)
        model = pooled()
        optimizer = tekfac.TEKFAC(model, damping=damping, fisher="exact")
        x, y = batch("pooled", 6)
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
        changes.append(list(model.parameters()))
    for p, q in zip(*changes, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("factor", [1.0, 1e5])
@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize("method", METHODS)
def test_no_step_is_larger_than_one_of_adam(method: str, nesterov: bool, factor: float) -> None:
    model = perceptron(0)
    optimizer = getattr(tekfac, method)(model, lr=0.01, nesterov=nesterov, rms_clip=2.0)
    largest = 0.0
    for step in range(25):
        before = copy.deepcopy(model)
        backward(model, optimizer, step, factor)
        optimizer.step()
        for new, old in zip(model[::2], before[::2], strict=True):
            moved = torch.cat([new.weight - old.weight, (new.bias - old.bias)[:, None]], 1).detach()
            largest = max(largest, float(moved.square().mean().sqrt()))
    assert largest <= 0.01 * 2.0 * (1 + 1e-4)
    if factor > 1:
        assert largest > 0.01


@pytest.mark.parametrize("method", METHODS)
def test_what_the_loss_is_multiplied_by_does_not_matter_where_the_bound_holds(method: str) -> None:
    found = []
    for factor in (1e4, 1e7):
        model = perceptron(0).double()
        optimizer = getattr(tekfac, method)(model, fisher="exact", lr=0.01)
        for step in range(20):
            backward(model, optimizer, step, factor)
            optimizer.step()
        found.append([p.detach() for p in model.parameters()])
    for p, q in zip(*found, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("damping", [1e-38, tekfac.MeanDamping()], ids=str)
@pytest.mark.parametrize("method", METHODS)
def test_gradients_at_the_end_of_the_numbers(method: str, damping: Any) -> None:
    """Natural gradients overflow, nothing else does."""
    model = perceptron(0)
    optimizer = getattr(tekfac, method)(model, damping=damping)
    for step in range(3):
        backward(model, optimizer, step, 1e18)
        optimizer.step()
        assert all(bool(p.isfinite().all()) for p in model.parameters())
    velocity = [s["momentum_buffer"] for s in optimizer.state.values() if "momentum_buffer" in s]
    assert velocity
    assert all(bool(v.isfinite().all()) for v in velocity)


@pytest.mark.parametrize("reduction", ["pixels", "everything"])
@pytest.mark.parametrize("method", METHODS)
def test_an_autoencoder_with_a_summed_loss_trains(method: str, reduction: str) -> None:
    losses = autoencoded(method, reduction)
    assert all(math.isfinite(loss) for loss in losses)
    assert losses[-1] < 0.95 * losses[0]


def test_it_does_not_train_without_a_bound() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        losses = autoencoded("TEKFAC", "everything", rms_clip=None)
    assert not max(losses) < 2 * losses[0]  # nan, or far up


def autoencoded(method: str, reduction: str, **options: Any) -> list[float]:
    """Losses of an autoencoder, per example, over 60 steps."""
    torch.manual_seed(0)
    sizes = (64, 48, 24, 6, 24, 48, 64)
    layers = [m for d, e in itertools.pairwise(sizes) for m in (nn.Linear(d, e), nn.ReLU())]
    model = nn.Sequential(*layers[:-1])
    optimizer = getattr(tekfac, method)(model, likelihood="bernoulli", **options)
    x = (torch.randn(512, 6) @ torch.randn(6, 64) / 2).sigmoid()
    found = []
    for step in range(60):
        part = x[(step % 4) * 128 :][:128]
        loss = F.binary_cross_entropy_with_logits(model(part), part, reduction="sum")
        optimizer.zero_grad()
        (loss if reduction == "everything" else loss / 128).backward()
        optimizer.step()
        found.append(float(loss.detach()) / 128)
    return found


@pytest.mark.parametrize("power", [0.5, 1.0])
@pytest.mark.parametrize("method", METHODS)
def test_no_setting_around_the_defaults_ends_in_nan(method: str, power: float) -> None:
    for lr, damping in itertools.product((0.1, 10.0), (0.1, 10.0)):
        model = perceptron(1)
        optimizer = getattr(tekfac, method)(
            model, lr=lr * 5e-3, damping=tekfac.MeanDamping(damping * 0.3), power=power
        )
        for step in range(20):
            loss = backward(model, optimizer, step, 1e3)
            optimizer.step()
        assert bool(loss.isfinite()), (lr, damping)
        assert optimizer.counters["skipped_steps"] == 0


def test_a_state_from_before_there_was_a_bound() -> None:
    """It goes on without."""
    model, resumed = perceptron(0), perceptron(0)
    optimizer = tekfac.TEKFAC(model, rms_clip=None, fisher="empirical")
    old = copy.deepcopy(optimizer.state_dict())
    for group in old["param_groups"]:
        del group["rms_clip"]
    other = tekfac.TEKFAC(resumed, rms_clip=1e-3, fisher="empirical")
    other.load_state_dict(old)
    for step in range(3):
        for each, its in ((model, optimizer), (resumed, other)):
            backward(each, its, step)
            its.step()
    for p, q in zip(model.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(p, q)


@pytest.mark.parametrize("waits", [False, True], ids=["host", "device"])
def test_a_lost_run_says_so(waits: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tekfac.NaturalGradient, "_waits", lambda self: waits)
    model = perceptron(0)
    optimizer = tekfac.TEKFAC(model, interval_warmup=False)
    backward(model, optimizer, 0)
    optimizer.step()

    def train_on_nan(steps: int) -> list[str]:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            for step in range(steps):
                backward(model, optimizer, step, math.nan)
                optimizer.step()
            assert optimizer.counters["steps"] > 0
        return [str(warning.message) for warning in caught]

    # A few bad batches are not the end, however many there are in all.
    for _ in range(3):
        assert not [words for words in train_on_nan(LOST - 1) if "lost" in words]
        backward(model, optimizer, 0)
        optimizer.step()
    said = [words for words in train_on_nan(3 * LOST) if "lost" in words]
    assert len(said) == 1
    assert "third of lr" in said[0]


def perceptron(seed: int) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3))


def backward(model: nn.Module, optimizer: Any, step: int, factor: float = 1.0) -> Tensor:
    """A batch's gradient, of the loss times a factor."""
    generator = torch.Generator().manual_seed(step)
    dtype = next(model.parameters()).dtype
    x = torch.randn(32, 5, generator=generator).to(dtype)
    optimizer.zero_grad()
    loss = F.cross_entropy(model(x), x[:, :3].argmax(1))
    (factor * loss).backward()
    return loss.detach()

"""Factors, eigenvectors and rescaling kept in a narrower type than they are computed in."""

from __future__ import annotations

import copy
import io
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import tekfac

METHODS = ("KFAC", "EKFAC", "TKFAC", "TEKFAC")
LARGE = ("factor.input", "factor.output", "basis.input", "basis.output", "scale")


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(2, 6, 3, padding=1), nn.Tanh(), nn.Flatten(), nn.Linear(6 * 36, 3)
    )


def train(model: nn.Module, optimizer: Any, steps: int) -> None:
    generator = torch.Generator().manual_seed(1)
    x, y = torch.randn(16, 2, 6, 6, generator=generator), torch.arange(16) % 3
    for _ in range(steps):
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()


def make(method: str, model: nn.Module, **options: Any) -> Any:
    # The wide layer, 217 columns, keeps 20 eigenvectors.
    settings = {"factor_every": 2, "basis_every": 3, "lr": 1e-3, "rank": 20, **options}
    return getattr(tekfac, method)(model, **settings)


def large(optimizer: Any) -> dict[str, Tensor]:
    return {
        f"{layer}.{name}": value
        for layer, block in optimizer.blocks.items()
        for name, value in block.state_dict().items()
        if name in LARGE
    }


@pytest.mark.parametrize("method", METHODS)
def test_the_large_tensors_take_half_the_memory(method: str) -> None:
    wide, narrow = make(method, network()), make(method, network(), storage=torch.bfloat16)
    for optimizer in (wide, narrow):
        train(optimizer.model, optimizer, 8)
    assert large(wide).keys() == large(narrow).keys()
    for name, value in large(narrow).items():
        assert value.dtype == torch.bfloat16
        assert value.shape == large(wide)[name].shape
        assert large(wide)[name].dtype == torch.float32
    for block in narrow.blocks.values():
        # And nothing else of that size is kept beside them.
        kept = [v for v in vars(block.factors.input).values() if isinstance(v, Tensor)]
        assert all(v.dtype == torch.bfloat16 or v.dim() == 1 for v in kept)


@pytest.mark.parametrize("method", METHODS)
def test_the_block_is_the_same_to_three_digits(method: str) -> None:
    model = network()
    wide = make(method, model, rank=None)
    narrow = make(method, copy.deepcopy(model), rank=None, storage=torch.bfloat16)
    for optimizer in (wide, narrow):
        train(optimizer.model, optimizer, 1)
    for name, block in wide.blocks.items():
        other, dense = narrow.blocks[name], block.dense()
        assert float((other.dense() - dense).norm() / dense.norm()) < 2e-2
        v = torch.randn(block.shape)
        found, expected = other.inverse_matvec(v), block.inverse_matvec(v)
        assert float((found - expected).norm() / expected.norm()) < 2e-2
        assert other.trace == pytest.approx(block.trace, rel=1e-2)


@pytest.mark.parametrize("method", METHODS)
def test_resumes_bit_for_bit(method: str) -> None:
    model = network()
    optimizer = make(method, model, storage=torch.bfloat16)
    train(model, optimizer, 4)
    saved = io.BytesIO()
    torch.save([model.state_dict(), optimizer.state_dict()], saved)
    train(model, optimizer, 5)
    saved.seek(0)
    states = torch.load(saved, weights_only=True)
    again = network()
    again.load_state_dict(states[0])
    fresh = make(method, again, storage=torch.bfloat16)
    fresh.load_state_dict(states[1])
    train(again, fresh, 5)
    for p, q in zip(model.parameters(), again.parameters(), strict=True):
        assert torch.equal(p, q)


def test_a_state_is_kept_in_the_type_of_who_loads_it() -> None:
    wide = make("TEKFAC", network())
    train(wide.model, wide, 4)
    narrow = make("TEKFAC", network(), storage=torch.bfloat16)
    narrow.load_state_dict(wide.state_dict())
    for name, value in large(narrow).items():
        assert torch.equal(value, large(wide)[name].bfloat16())


@pytest.mark.parametrize("value", ["bfloat16", torch.int32, 16])
def test_bad_types(value: Any) -> None:
    with pytest.raises(ValueError, match=r"storage must be a floating-point torch\.dtype, got"):
        tekfac.TEKFAC(nn.Linear(2, 2), storage=value)

"""Statistics of inputs and gradients in bfloat16: sums in float32, near those in float64."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import tekfac
from tekfac.curvature.statistics import (
    second_moment,
    sketched,
    squared_gradients,
    squared_rows,
    symmetric,
)
from tekfac.numerics import square_norms

METHODS = ("KFAC", "EKFAC", "TKFAC", "TEKFAC")


def near(found: Tensor, expected: Tensor, tolerance: float = 1e-2) -> None:
    assert found.dtype == torch.float32
    assert float((found.double() - expected).norm() / expected.norm()) < tolerance


@pytest.mark.parametrize("positions", [1, 3, 40])
def test_sums_of_bfloat16_are_float32(positions: int) -> None:
    torch.manual_seed(0)
    a = torch.randn(2, 9, positions, 12).bfloat16()
    g = torch.randn(2, 9, positions, 5).bfloat16()
    weights = torch.rand(2, 9)
    exact_a, exact_g, exact_weights = a.double(), g.double(), weights.double()
    near(square_norms(a), exact_a.square().sum((2, 3)))
    whole = torch.einsum("gn,gnti,gntj->gij", exact_weights, exact_a, exact_a)
    total = second_moment(a, weights)
    near(symmetric(total.clone()), whole)
    near(symmetric(second_moment(a, weights, total)), 2 * whole)
    probe = torch.linalg.qr(torch.randn(2, 12, 4)).Q
    near(sketched(a, weights, probe.bfloat16()), whole @ probe.double())
    u_in, u_out = (torch.linalg.qr(torch.randn(2, d, d)).Q for d in (12, 5))
    gradients = torch.einsum("gnto,gnti->gnoi", exact_g, exact_a)
    for columns in (12, 4):  # a whole basis and a part of one
        rotated = u_out.double().mT[:, None] @ gradients @ u_in.double()[:, None, :, :columns]
        expected = rotated.square().sum(1)
        if columns < 12:
            rest = gradients.square().sum((1, 2, 3)) - rotated.square().sum((1, 2, 3))
            found = squared_rows(
                a, g, u_in[..., :columns].bfloat16().contiguous(), u_out.bfloat16()
            )
            near(found[..., -1].sum(1), rest, 2e-2)
            near(found[..., :-1], expected, 2e-2)
        else:
            bases = u_in.bfloat16(), u_out.bfloat16()
            near(squared_rows(a, g, *bases), expected, 2e-2)
            own = gradients.transpose(1, 2).bfloat16()
            total = squared_gradients(own, *bases)
            near(total.clone(), expected, 2e-2)
            near(squared_gradients(own, *bases, total), 2 * expected, 2e-2)


@pytest.mark.parametrize("fisher", ["exact", "empirical"])
@pytest.mark.parametrize("method", METHODS)
def test_autocast_to_bfloat16_gives_nearly_the_same_block(method: str, fisher: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(2, 6, 3, padding=1), nn.ReLU(), nn.Conv2d(6, 6, 3), nn.ReLU(), nn.Flatten()
    )
    model.append(nn.Linear(6 * 16, 3))
    x, y = torch.randn(16, 2, 6, 6), torch.arange(16) % 3
    found: list[Any] = []
    for enabled in (False, True):
        optimizer = getattr(tekfac, method)(copy.deepcopy(model), fisher=fisher, momentum=0.0)
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            loss = F.cross_entropy(optimizer.model(x), y)
        loss.backward()
        optimizer.step()
        found.append(optimizer.blocks)
    for name, block in found[0].items():
        dense, other = block.dense(), found[1][name].dense()
        assert other.dtype == torch.float32
        assert float((other - dense).norm() / dense.norm()) < 5e-2
        assert found[1][name].trace == pytest.approx(block.trace, rel=3e-2)

"""Per-example gradients of a layer, against autograd's, one example at a time, in float64."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import tekfac
from tekfac.curvature import basis
from tekfac.layers import ConvLayer, Layer, Sample, layer_of
from tekfac.layers.uses import PRODUCTS

LAYERS: dict[str, tuple[nn.Module, tuple[int, ...]]] = {
    "linear": (nn.Linear(4, 3), (4,)),
    "linear, positions": (nn.Linear(4, 3), (2, 5, 4)),
    "linear, no bias": (nn.Linear(4, 3, bias=False), (5, 4)),
    "padding": (nn.Conv2d(2, 3, 3, padding=1), (2, 5, 6)),
    "stride that leaves a rest": (nn.Conv2d(2, 3, 3, stride=2, padding=1), (2, 6, 6)),
    "no bias": (nn.Conv2d(2, 3, (2, 3), stride=(1, 2), bias=False), (2, 5, 6)),
    "dilation": (nn.Conv2d(2, 3, 3, dilation=(2, 1), padding=(1, 2)), (2, 6, 5)),
    "same": (nn.Conv2d(2, 3, 3, padding="same"), (2, 5, 6)),
    "same, uneven": (nn.Conv2d(2, 3, (2, 4), padding="same"), (2, 5, 6)),
    "circular": (nn.Conv2d(2, 3, 3, padding=1, padding_mode="circular"), (2, 5, 6)),
    "reflect, same, uneven": (
        nn.Conv2d(2, 3, 2, padding="same", padding_mode="reflect"),
        (2, 5, 6),
    ),
    "groups": (nn.Conv2d(4, 6, 3, groups=2, padding=1), (4, 5, 6)),
    "depthwise": (nn.Conv2d(4, 8, 3, groups=4, stride=2), (4, 5, 6)),
    "one dimension": (nn.Conv1d(4, 6, 3, groups=2, stride=2), (4, 11)),
    "three dimensions": (nn.Conv3d(2, 3, 2, padding=1), (2, 3, 4, 2)),
}


def made(name: str, *, weight: bool = True) -> tuple[nn.Module, Layer, tuple[int, ...]]:
    torch.manual_seed(0)
    module, shape = LAYERS[name]
    module = copy.deepcopy(module).double()
    return module, layer_of(module, weight=weight), shape


def multiplied(module: nn.Module, layer: Layer, x: Tensor) -> Tensor:
    """What autograd saves as a convolution's input: padded, where not with zeros and evenly."""
    node = module(x).grad_fn
    if not isinstance(layer, ConvLayer):
        return x
    (product,) = PRODUCTS[node.name()]
    layer.geometry = product.geometry(node)
    return product.input(node)


def truth(module: nn.Module, layer: Layer, x: Tensor, g: Tensor) -> Tensor:
    """``(G, d_out, N, d_in)``."""
    found = []
    for one, gradient in zip(x, g, strict=True):
        loss = (module(one[None]) * gradient).sum()
        own = dict(zip(layer.parameters, torch.autograd.grad(loss, layer.parameters), strict=True))
        found.append(layer.matrix(own.get(layer.weight), own.get(layer.bias)))
    return torch.stack(found, dim=2)


@pytest.mark.parametrize("entries", [2**20, 1], ids=["one chunk", "example by example"])
@pytest.mark.parametrize("name", LAYERS)
def test_gradients(name: str, entries: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tekfac.layers.layer.CHUNK_ENTRIES", entries)
    module, layer, shape = made(name)
    x = torch.randn(4, *shape, dtype=torch.float64)
    g = torch.randn_like(module(x))
    sample = Sample([multiplied(module, layer, x)], [g], examples=4)
    parts = list(layer.gradients(sample))
    assert len(parts) == (1 if entries > 1 else 4)
    torch.testing.assert_close(torch.cat(parts, dim=2), truth(module, layer, x, g))


@pytest.mark.parametrize("name", ["linear, positions", "padding", "groups"])
def test_of_several_calls_and_rows(name: str) -> None:
    """Calls, and k rows per example, add up."""
    module, layer, shape = made(name)
    x = [torch.randn(n, *shape, dtype=torch.float64) for n in (6, 3)]
    g = [torch.randn_like(module(each)) for each in x]
    (found,) = layer.gradients(Sample(list(x), g, examples=3))
    six, three = (truth(module, layer, *call) for call in zip(x, g, strict=True))
    torch.testing.assert_close(found, six[:, :, 0::2] + six[:, :, 1::2] + three)


@pytest.mark.parametrize("name", ["linear, positions", "padding", "groups"])
def test_of_a_bias_alone(name: str) -> None:
    module, layer, shape = made(name, weight=False)
    x = torch.randn(4, *shape, dtype=torch.float64)
    g = torch.randn_like(module(x))
    (found,) = layer.gradients(Sample([None], [g], examples=4))
    torch.testing.assert_close(found, truth(module, layer, x, g))


@pytest.mark.parametrize("dtypes", [(torch.float16, torch.float32), (torch.bfloat16,) * 2], ids=str)
def test_of_half_precision(dtypes: tuple[torch.dtype, torch.dtype]) -> None:
    torch.manual_seed(0)
    module = nn.Conv2d(2, 3, 3, padding=1)
    layer = layer_of(module)
    x, g = torch.randn(4, 2, 5, 6).to(dtypes[0]), torch.randn(4, 3, 5, 6).to(dtypes[1])
    (found,) = layer.gradients(Sample([x], [g], examples=4))
    lower = dtypes[1] == torch.bfloat16
    assert found.dtype == (torch.bfloat16 if lower else torch.float32)
    tolerance = 2e-2 if lower else 1e-4
    expected = truth(module, layer, x.float(), g.float())
    torch.testing.assert_close(found.float(), expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("fisher", ["exact", "empirical"])
@pytest.mark.parametrize("method", ["EKFAC", "TEKFAC"])
def test_rotating_rows_or_gradients_makes_no_difference(
    method: str, fisher: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1, stride=2),
        nn.Tanh(),
        nn.Conv2d(4, 6, 2, groups=2, bias=False),
        nn.Tanh(),
        nn.Flatten(2),
        nn.Linear(9, 4),
        nn.Flatten(),
        nn.Linear(24, 3),
    ).double()
    x, y = torch.randn(7, 2, 8, 8, dtype=torch.float64), torch.arange(7) % 3
    found: list[Any] = []
    for rows in (True, False):
        monkeypatch.setattr(basis, "rotates_rows", lambda *_, rows=rows: rows)
        optimizer = getattr(tekfac, method)(copy.deepcopy(model), fisher=fisher)
        F.cross_entropy(optimizer.model(x), y).backward()
        optimizer.step()
        found.append(optimizer.blocks)
    for name, block in found[0].items():
        torch.testing.assert_close(found[1][name].dense(), block.dense(), rtol=1e-9, atol=1e-12)

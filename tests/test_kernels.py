"""Kernels that belong to no convolution's module, and modules' kernels used in other ways."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

import tekfac
from harness import METHODS
from processes import together
from tekfac.layers import ConvLayer, LinearLayer, StackLayer
from test_uses import EXACT, check

torch.set_num_threads(1)

Use = Callable[[Tensor, Tensor, Any], Tensor]
X, Y = torch.randn(5, 2, 6, 6, generator=torch.Generator().manual_seed(1)).double(), torch.arange(5)


class Kernel(nn.Module):
    """A parameter that is used in some way, and a head for the mean over all places."""

    def __init__(
        self, shape: tuple[int, ...], use: Use, channels: int, bias: int | None = None
    ) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(shape) / 3)
        self.bias = None if bias is None else nn.Parameter(torch.randn(bias))
        self.use, self.head = use, nn.Linear(channels, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.use(x, self.weight, self.bias).tanh().flatten(2).mean(2))


def loss(model: nn.Module) -> Tensor:
    return F.cross_entropy(model(X), Y % 3)


def single_logits(model: nn.Module) -> list[Tensor]:
    return [model(each[None]) for each in X]


KERNELS: dict[str, tuple[tuple[int, ...], Use, int, int | None]] = {
    "2d": ((4, 2, 3, 3), lambda x, w, b: F.conv2d(x, w, b, padding=1), 4, 4),
    "2d by halves": (
        (4, 1, 3, 3),
        lambda x, w, b: F.conv2d(x, w, b, stride=2, dilation=2, groups=2),
        4,
        4,
    ),
    "2d same": ((4, 2, 3, 3), lambda x, w, b: F.conv2d(x, w, b, padding="same"), 4, None),
    "1d": ((4, 2, 3), lambda x, w, b: F.conv1d(x.flatten(2), w, b), 4, 4),
    "1d without a bias": ((4, 2, 3), lambda x, w, b: F.conv1d(x.flatten(2), w), 4, None),
    "1d each channel": ((2, 1, 3), lambda x, w, b: F.conv1d(x.flatten(2), w, groups=2), 2, None),
    "3d": ((4, 1, 2, 2, 2), lambda x, w, b: F.conv3d(x[:, None], w, b), 4, 4),
    "transposed": (
        (2, 2, 3, 3),
        lambda x, w, b: F.conv_transpose2d(x, w, b, stride=2, output_padding=1),
        2,
        2,
    ),
    "transposed by halves": (
        (2, 2, 3, 3),
        lambda x, w, b: F.conv_transpose2d(x, w, b, stride=2, groups=2),
        4,
        4,
    ),
    "some rows": ((6, 2, 3, 3), lambda x, w, b: F.conv2d(x, w[2:]), 4, None),
    "two strides": (
        (4, 2, 3, 3),
        lambda x, w, b: F.conv2d(x, w, b).mean(3)[..., ::2] + F.conv2d(x, w, b, stride=2).amax(3),
        4,
        4,
    ),
    "two dilations": (
        (4, 2, 3, 3),
        lambda x, w, b: F.conv2d(x, w, b, padding=1) + F.conv2d(x, w, b, padding=2, dilation=2),
        4,
        4,
    ),
    "as a matrix": (
        (4, 2, 6, 6),
        lambda x, w, b: F.linear(x.flatten(1), w.flatten(1), b)[..., None],
        4,
        4,
    ),
    "squeezed": (
        (4, 36, 1, 1),
        lambda x, w, b: F.linear(x.flatten(2), w.squeeze(-1).squeeze(-1), b).mT,
        4,
        4,
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", KERNELS)
def test_the_dense_matrix(kind: str) -> None:
    torch.manual_seed(0)
    shape, use, channels, bias = KERNELS[kind]
    check(Kernel(shape, use, channels, bias), loss, single_logits, {"", "head"})


def test_a_module_s_kernel_at_two_dilations() -> None:
    """Each use is read with its own geometry."""

    class Trident(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.head = nn.Conv2d(2, 4, 3, padding=1), nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            conv = self.conv
            wide = F.conv2d(x, conv.weight, conv.bias, padding=2, dilation=2)
            return self.head((conv(x).tanh() * wide).mean((2, 3)))

    torch.manual_seed(0)
    check(Trident(), loss, single_logits, {"conv", "head"})


@pytest.mark.parametrize("columns", [True, False])
def test_a_module_s_kernel_as_a_matrix(columns: bool) -> None:
    class Patch(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.head = nn.Conv2d(2, 4, 6), nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            w, x = self.conv.weight.flatten(1), x.flatten(1)
            made = x @ w.T if columns else F.linear(x, w, self.conv.bias)
            return self.head(made.tanh())

    torch.manual_seed(0)
    optimizer = check(Patch(), loss, single_logits, {"conv", "head"})
    assert type(optimizer.blocks["conv"].layer) is LinearLayer


@pytest.mark.parametrize(
    ("use", "words"),
    [
        (
            lambda x, w, b: (
                F.conv2d(x, w)[..., 0] + F.linear(x.flatten(1), w.flatten(1))[..., None]
            ),
            "beside another kind of product",
        ),
        (
            lambda x, w, b: F.conv2d(x[:, :, :, 0, None], w[:2, :1], groups=2),
            "SliceBackward0 before",
        ),
    ],
)
def test_what_is_not_known_is_said(use: Use, words: str) -> None:
    torch.manual_seed(0)
    model = Kernel((4, 2, 6, 6), use, 4).double()
    if "Slice" in words:
        model = Kernel((4, 2, 6, 1), use, 2).double()
    optimizer = tekfac.EKFAC(model, **EXACT)
    loss(model).backward()
    with pytest.warns(RuntimeWarning, match="no curvature of layers ''.*" + words):
        optimizer.step()
    assert words in optimizer.treatment()["weight"]


def test_positions_and_scales_are_no_kernels() -> None:
    torch.manual_seed(0)
    model = Kernel((2, 6, 6), lambda x, w, b: x * w, 2)
    optimizer = tekfac.TEKFAC(model.double())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loss(model).backward()
        optimizer.step()
    assert optimizer.treatment()["weight"].startswith("first order: used by MulBackward0")


@pytest.mark.parametrize(
    "kind", ["1d each channel", "2d by halves", "1d without a bias", "as a matrix"]
)
@pytest.mark.parametrize("method", METHODS)
def test_a_state_says_how_a_kernel_was_used(kind: str, method: str) -> None:
    torch.manual_seed(0)
    shape, use, channels, bias = KERNELS[kind]
    models, ends = [Kernel(shape, use, channels, bias).double()], []
    optimizers = [getattr(tekfac, method)(models[0], fisher="exact")]

    def step(model: nn.Module, optimizer: tekfac.NaturalGradient) -> None:
        optimizer.zero_grad()
        loss(model).backward()
        optimizer.step()

    step(models[0], optimizers[0])
    models.append(Kernel(shape, use, channels, bias).double())
    optimizers.append(getattr(tekfac, method)(models[1], fisher="exact"))
    models[1].load_state_dict(models[0].state_dict())
    optimizers[1].load_state_dict(optimizers[0].state_dict())
    for model, optimizer in zip(models, optimizers, strict=True):
        step(model, optimizer)
        kind_of = type(optimizer.blocks[""].layer)
        assert kind_of is (LinearLayer if kind == "as a matrix" else ConvLayer)
        assert kind_of is not StackLayer
        ends.append([p.detach() for p in model.parameters()])
    for one, other in zip(*ends, strict=True):
        assert torch.equal(one, other)


class Mixed(nn.Module):
    """Layers that are of another kind than they seem before their first use.

    A kernel for each channel, one of three dimensions, one that is multiplied as a matrix, and
    bags; the last two for batches with a positive sum only.
    """

    def __init__(self) -> None:
        super().__init__()
        self.each, self.line = (
            nn.Parameter(torch.randn(2, 1, 3, 3)),
            nn.Parameter(torch.randn(4, 2, 3)),
        )
        self.patch, self.bag = nn.Conv2d(2, 4, 6), nn.EmbeddingBag(7, 4, mode="sum")
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = F.conv2d(x, self.each, padding=1, groups=2).tanh()
        y = F.conv1d(y.flatten(2), self.line).tanh().mean(2)
        if x.sum() > 0:
            y = y + F.linear(x.flatten(1), self.patch.weight.flatten(1), self.patch.bias)
            y = y * self.bag((x[:, 0, :, 0].abs() * 3).long().clamp_max(6))
        return self.head(y)


def on_ranks(method: str, data: list[Tensor], options: dict[str, Any]) -> list[Tensor]:
    torch.manual_seed(0)
    model = Mixed().double()
    called = DistributedDataParallel(model, find_unused_parameters=True)
    optimizer = getattr(tekfac, method)(called, **options)
    for x in data:
        optimizer.zero_grad()
        F.cross_entropy(called(x[dist.get_rank()]), Y[:3] % 3).backward()
        optimizer.step()
    return [p.detach().clone() for p in model.parameters()]


@pytest.mark.parametrize("placement", ["replicated", "sharded"])
@pytest.mark.parametrize("method", ["KFAC", "TEKFAC"])
def test_a_rank_that_has_not_seen_a_layer_learns_its_kind(method: str, placement: str) -> None:
    # One half is positive: the layers of the other branch are seen by one rank alone.
    halves = torch.randn(3, 2, 3, 2, 6, 6, generator=torch.Generator().manual_seed(3)).double()
    data = [torch.stack([-x[0].abs(), x[1].abs()]) for x in halves]
    every = {"factor_every": 1, "basis_every": 1, "interval_warmup": False, "fisher": "exact"}
    options = every | ({"scale_every": 1} if method == "TEKFAC" else {})
    torch.manual_seed(0)
    model = Mixed().double()
    optimizer = getattr(tekfac, method)(model, **options)
    for x in data:
        optimizer.zero_grad()
        for half in x:
            (F.cross_entropy(model(half), Y[:3] % 3) / 2).backward()
        optimizer.step()
    for found in together(2, on_ranks, method, data, options | {"placement": placement}):
        for p, expected in zip(found, model.parameters(), strict=True):
            torch.testing.assert_close(p, expected)


class Heads(nn.Module):
    """A weight with a dimension for heads, between two layers."""

    def __init__(self, shape: tuple[int, ...], use: Use, channels: int) -> None:
        super().__init__()
        self.before, self.weight = nn.Linear(6, 6), nn.Parameter(torch.randn(shape) / 3)
        self.use, self.head = use, nn.Linear(channels, 3)

    def forward(self, x: Tensor) -> Tensor:
        made = self.use(self.before(x.flatten(1, 2)).tanh(), self.weight, None)
        return self.head(made.tanh().flatten(2).mean(1))


# Rows are (N, T, d), of a matrix whose second dimension is made of two.
OF_HEADS: dict[str, tuple[tuple[int, ...], Use, int]] = {
    "into heads": ((6, 2, 4), lambda x, w, b: torch.einsum("ntd,dhk->nthk", x, w), 8),
    "heads first": (
        (6, 2, 4),
        lambda x, w, b: torch.einsum("ntd,dhk->nhtk", x, w).transpose(1, 2),
        8,
    ),
    "out of heads": (
        (4, 2, 3),
        lambda x, w, b: torch.einsum("nthk,dhk->ntd", x.unflatten(2, (2, 3)), w),
        4,
    ),
    "positions first": (
        (6, 2, 4),
        lambda x, w, b: torch.einsum("tnd,dhk->tnhk", x.transpose(0, 1), w).transpose(0, 1),
        8,
    ),
    "tensordot": ((6, 2, 4), lambda x, w, b: torch.tensordot(x, w, 1), 8),
    "flattened": ((4, 2, 3), lambda x, w, b: F.linear(x, w.flatten(1)), 4),
    "three": ((6, 3, 2, 4), lambda x, w, b: torch.einsum("ntd,dchk->ntchk", x, w).sum(2), 8),
    # With heads first, the matrix is a copy in another order.
    "first into heads": ((2, 6, 4), lambda x, w, b: torch.einsum("ntd,hdk->nthk", x, w), 8),
    "first, turned": ((2, 4, 6), lambda x, w, b: torch.einsum("ntd,hkd->nthk", x, w), 8),
    "first out of heads": (
        (2, 3, 4),
        lambda x, w, b: torch.einsum("nthk,hkd->ntd", x.unflatten(2, (2, 3)), w),
        4,
    ),
    "XLNet's out of heads": (
        (4, 2, 3),
        lambda x, w, b: torch.einsum("ihnd,jnd->ihj", x.unflatten(2, (2, 3)), w),
        4,
    ),
    "rearranged": (
        (2, 6, 4),
        lambda x, w, b: F.linear(x, w.permute(0, 2, 1).reshape(8, 6)),
        8,
    ),
    "between": ((2, 6, 4), lambda x, w, b: x @ w.transpose(0, 1).reshape(6, 8), 8),
    "three, first": ((3, 2, 6, 4), lambda x, w, b: torch.einsum("ntd,chdk->ntchk", x, w).sum(2), 8),
}


@pytest.mark.parametrize("kind", OF_HEADS)
def test_a_dimension_for_heads(kind: str) -> None:
    """As XLNet has it: a matrix, and no stack of them."""
    torch.manual_seed(0)
    model = Heads(*OF_HEADS[kind])
    optimizer = check(model, loss, single_logits, {"before", "", "head"})
    layer = optimizer.blocks[""].layer
    assert type(layer) is LinearLayer
    entries = torch.arange(model.weight.numel(), dtype=torch.float64).view_as(model.weight)
    assert torch.equal(layer.split(layer.matrix(entries, None))[0], entries)


@pytest.mark.parametrize("kind", ["first into heads", "first out of heads"])
def test_a_state_tells_which_dimensions_are_rows(kind: str) -> None:
    """Where the other side is taken for the rows, no shape says so: here both are alike."""
    torch.manual_seed(0)
    model = Heads(*OF_HEADS[kind]).double()
    optimizer = tekfac.TEKFAC(model, **EXACT)
    loss(model).backward()
    optimizer.step()
    other = Heads(*OF_HEADS[kind]).double()
    other.load_state_dict(model.state_dict())
    fresh = tekfac.TEKFAC(other, **EXACT)
    fresh.load_state_dict(optimizer.state_dict())
    assert fresh.blocks[""].layer.form == optimizer.blocks[""].layer.form
    for each, its in ((model, optimizer), (other, fresh)):
        torch.manual_seed(1)
        its.zero_grad()
        loss(each).backward()
        its.step()
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(p, q)


def test_two_orders_of_one_parameter_are_told() -> None:
    def use(x: Tensor, w: Tensor, b: Any) -> Tensor:
        one = torch.einsum("ntd,hdk->nthk", x, w).flatten(2)
        return torch.cat([one, x[..., :4] @ w.flatten(0, 1).mT], 2)

    torch.manual_seed(0)
    model = Heads((2, 6, 4), use, 20).double()
    optimizer = tekfac.TEKFAC(model)
    loss(model).backward()
    with pytest.warns(RuntimeWarning, match="beside another kind of product"):
        optimizer.step()
    assert optimizer.blocks[""].empty

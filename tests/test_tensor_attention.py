"""Attention divided among ranks, against one process, and what of a basis rounding decides."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

import tekfac
from processes import together
from ranked import TOLERANCE, close, options_of, whole
from tekfac.curvature.linalg import eigh
from test_tensor_parallel import SECONDS, SLOW, TOKENS, batches, loss_of, mesh_of


class Attention(nn.Module):
    """A block of a transformer, whose heads are divided among ranks."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.table, self.head = nn.Embedding(TOKENS, 8), nn.Linear(8, classes)
        self.q, self.k, self.v, self.o = (nn.Linear(8, 8) for _ in range(4))
        self.up, self.down = nn.Linear(8, 16), nn.Linear(16, 8)

    def forward(self, x: Tensor) -> Tensor:
        h = self.table(x)
        q, k, v = (layer(h).unflatten(-1, (-1, 4)) for layer in (self.q, self.k, self.v))
        weights = torch.einsum("bshd,bthd->bhst", q, k).softmax(-1)
        h = h + self.o(torch.einsum("bhst,bthd->bshd", weights, v).flatten(2))
        return self.head(h + self.down(self.up(h).tanh()))


HEADS = {name: ColwiseParallel() for name in ("q", "k", "v", "up")}
HEADS |= {name: RowwiseParallel() for name in ("o", "down")}

Choose = Callable[[Tensor], Tensor]


def settled(free: Tensor) -> Tensor:
    """The basis of a subspace that is nearest to some directions, whichever it was given by."""
    some = torch.randn(free.shape, generator=torch.Generator().manual_seed(3), dtype=free.dtype)
    return torch.linalg.qr(free @ (free.mT @ some)).Q


def turned(free: Tensor) -> Tensor:
    """Another basis of a subspace."""
    some = torch.randn(free.shape[1], free.shape[1], dtype=free.dtype)
    return free @ torch.linalg.qr(some).Q


def choosing(choose: Choose, matrix: Tensor) -> tuple[Tensor, Tensor] | None:
    """`eigh`, with another choice of the eigenvectors that have the eigenvalue zero."""
    found = eigh(matrix)
    assert found is not None
    values, vectors = found[0], found[1].clone()
    for own, columns in zip(values, vectors, strict=True):
        free = int((own < 1e-12 * own.max()).sum())
        columns[:, :free] = choose(columns[:, :free])
    return values, vectors


def attending(method: str, classes: int, choose: Choose | None) -> dict[str, Tensor]:
    torch.manual_seed(2)
    model = Attention(classes).double()
    if dist.is_initialized():
        parallelize_module(model, mesh_of(1)["tensor"], HEADS)
    optimizer = getattr(tekfac, method)(model, **options_of(method))
    found = eigh if choose is None else partial(choosing, choose)
    with mock.patch("tekfac.curvature.moments.eigh", found):
        for x, _ in batches(24, 7):
            optimizer.zero_grad()
            loss_of(model(x), x % classes).backward()
            optimizer.step()
    return whole(model)


@pytest.mark.parametrize(
    ("method", "classes", "choose"),
    [("TEKFAC", 12, None), ("TEKFAC", 5, settled), pytest.param("EKFAC", 12, None, marks=SLOW)],
)
def test_attention(method: str, classes: int, choose: Choose | None) -> None:
    """Fewer classes than a layer is wide leave directions without any gradient of the first batch.

    Which basis they have is up to rounding: one is chosen for all.
    """
    expected = attending(method, classes, choose)
    for found in together(2, attending, method, classes, choose, seconds=SECONDS):
        close(found, expected, TOLERANCE)


def test_a_basis_that_rounding_chooses_is_no_fault_of_ranks() -> None:
    """One process differs from itself as much, and where all directions have gradients does not."""
    for classes, least, most in ((5, 1e-6, 1e-2), (12, 0.0, TOLERANCE)):
        one, other = (attending("TEKFAC", classes, choose) for choose in (None, turned))
        far = max(float((other[name] - one[name]).norm() / one[name].norm()) for name in one)
        assert least <= far < most

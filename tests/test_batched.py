"""One matrix multiplied in a batch of them, as `torch.einsum` does, and behind several views."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import tekfac
from test_uses import check

torch.set_num_threads(1)

USES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "einsum": lambda x, w: torch.einsum("nti,oi->nto", x, w),
    "einsum, weight first": lambda x, w: torch.einsum("oi,nti->nto", w, x),
    "einsum, ellipsis": lambda x, w: torch.einsum("...i,oi->...o", x, w),
    "einsum, heads": lambda x, w: torch.einsum("nti,hdi->nthd", x, w.view(2, 2, 5)).flatten(2),
    "tensordot": lambda x, w: torch.tensordot(x, w, dims=([2], [1])),
    "bmm": lambda x, w: torch.bmm(x, w.mT.expand(len(x), -1, -1)),
    "bmm, columns": lambda x, w: torch.bmm(w.expand(len(x), -1, -1), x.mT).mT,
    "baddbmm": lambda x, w: torch.baddbmm(
        x.new_zeros(1), x, w.mT.expand(len(x), -1, -1), alpha=1.0
    ),
}


class Used(nn.Module):
    def __init__(self, use: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.first, self.head = nn.Linear(4, 5), nn.Linear(4, 3)
        self.matrix = nn.Parameter(torch.randn(4, 5) / 2)
        self.use = use

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.head(self.use(self.first(x).tanh(), self.matrix).tanh())
        return result


@pytest.mark.parametrize("kind", USES)
def test_one_matrix_for_all(kind: str) -> None:
    torch.manual_seed(0)
    x, y = torch.randn(6, 2, 4).double(), torch.randint(3, (6, 2))
    check(
        Used(USES[kind]),
        lambda m: F.cross_entropy(m(x).flatten(0, 1), y.flatten()),
        lambda m: [m(each[None])[0] for each in x],
        {"first", "matrix", "head"},
    )


def test_different_matrices_are_no_one_layer() -> None:
    torch.manual_seed(0)
    x, y = torch.randn(2, 6, 5).double(), torch.randint(3, (2, 6))

    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.matrix, self.head = nn.Parameter(torch.randn(8, 5) / 2), nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            result: Tensor = self.head(torch.bmm(x, self.matrix.view(2, 4, 5).mT).tanh())
            return result

    model = Two().double()
    optimizer = tekfac.TEKFAC(model)
    F.cross_entropy(model(x).flatten(0, 1), y.flatten()).backward()
    with pytest.warns(RuntimeWarning, match="Bmm"):
        optimizer.step()
    assert optimizer.treatment()["matrix"].startswith("first order: used by")

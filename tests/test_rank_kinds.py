"""Stacks of experts, tables and weights of no module, under several ranks and under one."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

import tekfac
from processes import together
from ranked import (
    TOLERANCE,
    Batch,
    close,
    cross_entropy,
    options_of,
    shards,
    train,
    whole,
)

SECONDS = 120.0
TOKENS, EXPERTS, WIDTH, INNER = 37, 3, 5, 4


class Kinds(nn.Module):
    """Each token goes to an expert of its own, or all of them are multiplied at once.

    Args:
        routed: which of the two.
    """

    def __init__(self, routed: bool) -> None:
        super().__init__()
        self.routed = routed
        self.table = nn.Embedding(TOKENS, WIDTH)
        self.places = nn.Parameter(torch.randn(4, WIDTH))
        self.mix = nn.Parameter(torch.randn(WIDTH, WIDTH) / 2)
        self.router = nn.Linear(WIDTH, EXPERTS)
        self.experts = nn.Parameter(torch.randn(EXPERTS, INNER, WIDTH) / 2)
        self.head = nn.Linear(INNER, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = self.table(x) + self.places[x % 4]
        h = F.linear(h, self.mix).tanh().flatten(0, 1)
        share = self.router(h).softmax(-1)
        if self.routed:
            best = x.flatten() % EXPERTS
            out = h.new_zeros(len(h), INNER)
            for expert in range(EXPERTS):
                rows = (best == expert).nonzero().flatten()
                if len(rows):
                    made = F.linear(h[rows], self.experts[expert]) * share[rows, expert, None]
                    out = out.index_add(0, rows, made)
        else:
            made = torch.bmm(h.expand(EXPERTS, *h.shape), self.experts.mT)
            out = torch.einsum("end,ne->nd", made, share)
        return self.head(out.tanh()).view(*x.shape, 3)


def model_of(routed: bool) -> nn.Module:
    torch.manual_seed(3)
    return Kinds(routed).double()


def data_of(examples: int, steps: int = 10) -> list[Batch]:
    """In every other batch the first rank has nothing for the last expert."""
    torch.manual_seed(1)
    found = []
    for step in range(steps):
        x, y = torch.randint(TOKENS, (examples, 4)), torch.randint(3, (examples, 4))
        if step % 2:
            own = x[: examples // 2]
            own -= own % EXPERTS // (EXPERTS - 1)
        found.append((x, y))
    return found


def loss_of(output: Tensor, y: Tensor) -> Tensor:
    return cross_entropy(output.flatten(0, 1), y.flatten())


def on_ranks(way: str, routed: bool, method: str, options: dict[str, Any]) -> dict[str, Tensor]:
    model = called = model_of(routed)
    ranks = dist.get_world_size()
    if way == "fully_shard":
        mesh = init_device_mesh("cpu", (ranks,))
        fully_shard(model.table, mesh=mesh)
        fully_shard(model, mesh=mesh)
    else:
        called = DistributedDataParallel(model)
        options |= {"placement": way}
    optimizer = getattr(tekfac, method)(called, **options_of(method, **options))
    mine = shards(data_of(8 * ranks), [8] * ranks)[dist.get_rank()]
    found = train(model, called, optimizer, [[each] for each in mine], loss_of)
    assert not any(block.empty for block in optimizer.blocks.values())
    assert optimizer.blocks["experts"].groups == EXPERTS
    assert {"table", "places", "mix"} < optimizer.blocks.keys()
    return whole(model) if way == "fully_shard" else found


SLOW = pytest.mark.slow


# All combinations have been run; these have every way, use and method with either Fisher matrix.
@pytest.mark.parametrize(
    ("way", "routed", "method", "fisher"),
    [
        ("replicated", True, "EKFAC", "exact"),
        ("sharded", True, "TEKFAC", "empirical"),
        ("fully_shard", True, "TEKFAC", "exact"),
        pytest.param("replicated", False, "TKFAC", "empirical", marks=SLOW),
        pytest.param("sharded", False, "KFAC", "exact", marks=SLOW),
        pytest.param("sharded", True, "TKFAC", "exact", marks=SLOW),
        pytest.param("fully_shard", True, "KFAC", "empirical", marks=SLOW),
        pytest.param("fully_shard", False, "EKFAC", "empirical", marks=SLOW),
    ],
)
def test_as_one_process(way: str, routed: bool, method: str, fisher: str) -> None:
    model = model_of(routed)
    optimizer = getattr(tekfac, method)(model, **options_of(method, fisher=fisher))
    expected = train(model, model, optimizer, [[each] for each in data_of(16)], loss_of)
    for found in together(2, on_ranks, way, routed, method, {"fisher": fisher}, seconds=SECONDS):
        close(found, expected, TOLERANCE)

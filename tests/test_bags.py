"""Tables whose entries are added up: each is a position with the sum's gradient."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import tekfac
from harness import METHODS, RESCALED
from tekfac.layers import EmbeddingLayer, LinearLayer
from test_uses import check

torch.set_num_threads(1)

TOKENS, WIDTH, CLASSES = 9, 4, 3
IDS = torch.tensor([[1, 1, 3, 0], [2, 4, 5, 2], [6, 0, 0, 0], [7, 2, 3, 1], [5, 4, 3, 2]])
Y = torch.arange(5) % CLASSES
SHARES = torch.rand(5, 4, generator=torch.Generator().manual_seed(2)).double()

# Bags of 3, 0, 1, 6 and 3 entries, one after the other.
LIST, ENDS = torch.tensor([1, 2, 1, 7, 3, 3, 0, 5, 2, 6, 4, 0, 8]), [0, 3, 3, 4, 10, 13]


class Bag(nn.Module):
    """A label for each ``fields`` bags."""

    def __init__(self, fields: int = 1, tied: bool = False, **options: Any) -> None:
        super().__init__()
        self.bag = nn.EmbeddingBag(TOKENS, WIDTH, **options)
        self.hidden, self.head = nn.Linear(fields * WIDTH, WIDTH), nn.Linear(WIDTH, CLASSES)
        self.fields, self.tied = fields, tied

    def forward(self, ids: Tensor, offsets: Tensor | None = None, shares: Any = None) -> Tensor:
        sums = self.bag(ids, offsets, shares)
        hidden = self.hidden(sums.view(-1, self.fields * WIDTH)).tanh()
        return hidden @ self.bag.weight.T if self.tied else self.head(hidden)


class Rows(Bag):
    """The same by rows of a table, added up outside."""

    def __init__(self, like: Bag) -> None:
        super().__init__()
        self.load_state_dict(like.state_dict())
        self.mode = like.bag.mode
        table, self.bag = self.bag.weight, nn.Embedding(TOKENS, WIDTH)  # type: ignore[assignment]
        self.bag.weight = table
        self.double()

    def forward(self, ids: Tensor, offsets: Tensor | None = None, shares: Any = None) -> Tensor:
        rows = self.bag(ids)
        if shares is not None:
            rows = rows * shares[:, :, None]
        rows = rows.mean(1) if self.mode == "mean" else rows.sum(1)
        return self.head(self.hidden(rows).tanh())


@pytest.mark.parametrize("padding", [None, 2])
@pytest.mark.parametrize("mode", ["sum", "mean"])
def test_bags_of_one_length(mode: str, padding: int | None) -> None:
    torch.manual_seed(0)
    optimizer = check(
        Bag(mode=mode, padding_idx=padding),
        lambda m: F.cross_entropy(m(IDS), Y),
        lambda m: [m(each[None]) for each in IDS],
        {"bag", "hidden", "head"},
    )
    assert isinstance(optimizer.blocks["bag"].layer, EmbeddingLayer)


@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("mode", ["sum", "mean"])
def test_bags_of_any_length(mode: str, last: bool) -> None:
    torch.manual_seed(0)
    offsets = torch.tensor(ENDS if last else ENDS[:-1])
    spans = list(itertools.pairwise(ENDS))

    def alone(first: int, end: int) -> tuple[Tensor, Tensor]:
        return LIST[first:end], torch.tensor([0, end - first] if last else [0])

    check(
        Bag(mode=mode, include_last_offset=last, padding_idx=3),
        lambda m: F.cross_entropy(m(LIST, offsets), Y),
        lambda m: [m(*alone(*span)) for span in spans],
        {"bag", "hidden", "head"},
    )


def test_several_bags_of_an_example() -> None:
    """As click models have them, one for each field."""
    torch.manual_seed(0)
    offsets = torch.tensor([0, 3, 3, 4, 6, 7, 8, 10, 11, 12])
    ends = [*offsets.tolist(), len(LIST)]

    def alone(i: int) -> tuple[Tensor, Tensor]:
        first, middle, end = ends[2 * i : 2 * i + 3]
        return LIST[first:end], torch.tensor([0, middle - first])

    check(
        Bag(2, mode="mean"),
        lambda m: F.cross_entropy(m(LIST, offsets), Y),
        lambda m: [m(*alone(i)) for i in range(5)],
        {"bag", "hidden", "head"},
    )


def test_weights_of_single_entries() -> None:
    torch.manual_seed(0)
    check(
        Bag(mode="sum"),
        lambda m: F.cross_entropy(m(IDS, None, SHARES), Y),
        lambda m: [m(i[None], None, s[None]) for i, s in zip(IDS, SHARES, strict=True)],
        {"bag", "hidden", "head"},
    )


def test_a_table_that_is_multiplied_too() -> None:
    """Then a bag is one row, of as many ones as it has entries."""
    torch.manual_seed(0)
    model = Bag(mode="mean", tied=True)
    del model.head
    optimizer = check(
        model,
        lambda m: F.cross_entropy(m(IDS), Y),
        lambda m: [m(each[None]) for each in IDS],
        {"bag", "hidden"},
    )
    assert type(optimizer.blocks["bag"].layer) is LinearLayer


@pytest.mark.parametrize("fisher", ["exact", "empirical"])
@pytest.mark.parametrize("mode", ["sum", "mean", "shares"])
@pytest.mark.parametrize("method", METHODS)
def test_as_rows_that_are_added_up_outside(method: str, mode: str, fisher: str) -> None:
    torch.manual_seed(0)
    model = Bag(mode="sum" if mode == "shares" else mode).double()
    every = {"factor_every": 1, "basis_every": 1, "interval_warmup": False}
    every |= {"scale_every": 1} if method in RESCALED else {}
    blocks = []
    for each in (model, Rows(model)):
        optimizer = getattr(tekfac, method)(each, fisher=fisher, lr=0.0, **every)
        for ids in (IDS, IDS.flip(0)):
            optimizer.zero_grad()
            shares = SHARES if mode == "shares" else None
            F.cross_entropy(each(ids, None, shares), Y).backward()
            optimizer.step()
        blocks.append(optimizer.blocks["bag"].dense(damped=True))
    torch.testing.assert_close(*blocks)


def test_a_bag_without_any_entry_at_all() -> None:
    torch.manual_seed(0)
    model = Bag()
    optimizer = tekfac.TEKFAC(model)
    for _ in range(2):
        optimizer.zero_grad()
        none = torch.zeros(0, dtype=torch.long)
        F.cross_entropy(model(none, torch.zeros(5, dtype=torch.long)), Y).backward()
        optimizer.step()
    assert all(p.isfinite().all() for p in model.parameters())
    F.cross_entropy(model(IDS), Y).backward()
    optimizer.step()
    assert all(p.isfinite().all() for p in model.parameters())
    assert not optimizer.blocks["hidden"].empty

"""A model that is never called itself, but whose parts are, against dense Fisher matrices."""

from __future__ import annotations

import copy
import pickle
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import tekfac
from test_uses import EXACT, dense_fisher, flat_order

torch.set_num_threads(1)


class Module(nn.Module):
    """As a LightningModule: what is trained are its parts, called from outside of any forward."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 4))
        self.heads = nn.ModuleList([nn.Linear(4, 3), nn.Linear(4, 2)])
        self.loss = nn.CrossEntropyLoss()

    def forward(self, x: Tensor) -> Tensor:
        raise AssertionError("nobody calls this")


def hooks(model: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


def one_call(m: Module, x: Tensor) -> list[Tensor]:
    return [m.body(x)]


def in_a_row(m: Module, x: Tensor) -> list[Tensor]:
    return [m.heads[0](m.body(x).tanh())]


def layer_by_layer(m: Module, x: Tensor) -> list[Tensor]:
    h = m.body[2](m.body[1](m.body[0](x)))
    return [m.heads[0](h)]


def two_heads(m: Module, x: Tensor) -> list[Tensor]:
    h = m.body(x)
    return [m.heads[1](h), m.heads[0](h)]


def checkpointed(m: Module, x: Tensor) -> list[Tensor]:
    return [m.heads[0](checkpoint(m.body, x, use_reentrant=False))]


@pytest.mark.parametrize(
    ("run", "names"),
    [
        (one_call, {"body.0", "body.2"}),
        (in_a_row, {"body.0", "body.2", "heads.0"}),
        (layer_by_layer, {"body.0", "body.2", "heads.0"}),
        (two_heads, {"body.0", "body.2", "heads.0", "heads.1"}),
        (checkpointed, {"body.0", "body.2", "heads.0"}),
    ],
)
def test_the_outermost_calls_of_parts(
    run: Callable[[Module, Tensor], list[Tensor]], names: set[str]
) -> None:
    torch.manual_seed(0)
    model, x = Module().double(), torch.randn(6, 5).double()
    optimizer = tekfac.EKFAC(model, scale_every=1, scale_examples=None, **EXACT)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        torch.stack(
            [model.loss(z, torch.arange(6) % z.shape[1]) for z in run(model, x)]
        ).sum().backward()
        optimizer.step()
    assert {name for name, block in optimizer.blocks.items() if not block.empty} == names
    for name in names:
        block = optimizer.blocks[name]
        order = flat_order(block)
        parameters = block.layer.parameters
        # Of several outputs the matrix is the sum.
        truth = torch.zeros(())
        for number in range(len(run(model, x))):
            logits = [run(model, row[None])[number] for row in x]
            truth = truth + dense_fisher(logits, parameters)
        truth = truth[order][:, order]
        found = block.dense()
        assert block.trace == pytest.approx(float(truth.trace()), rel=1e-8), name
        assert abs(float(((truth - found) * found).sum())) < 1e-8 * float(truth.square().sum())


def train(model: Module, optimizer: Any, steps: int, call: Callable[[Tensor], Tensor]) -> None:
    generator = torch.Generator().manual_seed(1)
    for _ in range(steps):
        x = torch.randn(8, 5, generator=generator)
        with torch.no_grad():
            call(x)  # evaluation in between
        optimizer.zero_grad()
        for part in x.split(4):  # two micro-batches
            (model.loss(call(part), (part[:, 0] > 0).long()) / 2).backward()
        optimizer.step()


def test_steps_are_those_of_the_part_alone() -> None:
    torch.manual_seed(0)
    model = Module()
    alone = copy.deepcopy(model)
    torch.manual_seed(2)
    optimizer = tekfac.TEKFAC(model)
    torch.manual_seed(2)
    reference = tekfac.TEKFAC(alone.body)
    train(model, optimizer, 12, model.body)
    train(alone, reference, 12, alone.body)
    for p, q in zip(model.parameters(), alone.parameters(), strict=True):
        assert torch.equal(p, q)
    assert optimizer.blocks["body.0"].trace == reference.blocks["0"].trace


def test_a_model_that_is_called_is_not_listened_to_elsewhere() -> None:
    torch.manual_seed(0)
    model, x, y = (
        nn.Sequential(nn.Linear(5, 4), nn.Linear(4, 3)),
        torch.randn(6, 5),
        torch.arange(6),
    )
    alone = copy.deepcopy(model)
    optimizer = tekfac.TEKFAC(model, fisher="exact")
    reference = tekfac.TEKFAC(alone, fisher="exact")
    before = hooks(model)
    for m, o in ((model, optimizer), (alone, reference)):
        for _ in range(3):
            o.zero_grad()
            h = m[0](x)  # a part, before the model
            loss = F.cross_entropy(m(x), y % 3)
            (loss + (F.cross_entropy(h, y % 4) if m is model else 0)).backward()
            o.step()
    assert before == 6
    assert hooks(model) == 2
    assert optimizer.blocks["1"].trace == pytest.approx(reference.blocks["1"].trace, rel=0.1)
    optimizer.close()
    assert hooks(model) == 0


def test_nothing_stays_behind() -> None:
    model = Module()
    optimizer = tekfac.TEKFAC(model)
    train(model, optimizer, 2, model.body)
    twin = copy.deepcopy(model)
    assert b"tekfac" not in pickle.dumps(twin.body)
    twin.body(torch.randn(2, 5)).sum().backward()
    optimizer.close()
    assert hooks(model) == 0


def test_a_result_that_says_nothing_is_told() -> None:
    model, x = Module(), torch.randn(6, 5)
    optimizer = tekfac.TEKFAC(model, output=lambda result: result.logits)
    F.cross_entropy(model.body(x), torch.arange(6) % 4).backward()
    with pytest.raises(
        RuntimeError, match=r"no statistics could be taken: of what 'body' returned"
    ):
        optimizer.step()


def test_a_list_of_likelihoods_is_for_what_one_call_returns() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(5, 3), nn.Linear(5, 1)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return self.a(x), self.b(x)

    torch.manual_seed(0)
    model, x = nn.ModuleDict({"net": Two()}), torch.randn(6, 5)
    optimizer = tekfac.TEKFAC(model, likelihood=["categorical", "gaussian"], **EXACT)
    a, b = model["net"](x)
    (F.cross_entropy(a, torch.arange(6) % 3) + b.square().mean() / 2).backward()
    optimizer.step()
    rows = torch.cat([x, torch.ones(6, 1)], 1)
    assert optimizer.blocks["net.b"].trace == pytest.approx(
        float(rows.square().sum() / 6), rel=1e-4
    )


class Actor(nn.Module):
    """A policy whose methods call its parts: two towers at once, then a head on each."""

    def __init__(self) -> None:
        super().__init__()
        self.towers = Towers()
        self.value, self.action = nn.Linear(4, 1), nn.Linear(4, 3)

    def evaluate(self, x: Tensor) -> tuple[Tensor, Tensor]:
        one, other = self.towers(x)
        return self.action(one.tanh()), self.value(other.tanh())


class Towers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Linear(5, 4), nn.Linear(5, 4)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.left(x), self.right(x)


def gaussian_trace(model: Actor, x: Tensor, parameters: list[Tensor]) -> float:
    """Of a squared error's Fisher matrix with variance 1, whose mean is over examples."""
    total = 0.0
    for row in x:
        value = model.evaluate(row[None])[1]
        found = torch.autograd.grad(value.sum(), parameters)
        total += sum(float(g.square().sum()) for g in found) / len(x)
    return total


def test_likelihoods_of_heads_that_are_called_one_by_one() -> None:
    """In the order of the calls; towers, which return as many, are no outputs."""
    torch.manual_seed(0)
    model, x = Actor().double(), torch.randn(6, 5).double()
    optimizer = tekfac.EKFAC(
        model,
        likelihood=["categorical", "gaussian"],
        scale_every=1,
        scale_examples=None,
        **EXACT,
    )
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        actions, values = model.evaluate(x)
        (F.cross_entropy(actions, torch.arange(6) % 3) + values.square().mean() / 2).backward()
        optimizer.step()
    found = {name: block.trace for name, block in optimizer.blocks.items()}
    for name in ("towers.left", "action"):
        logits = [model.evaluate(row[None])[0] for row in x]
        truth = dense_fisher(logits, optimizer.blocks[name].layer.parameters)
        assert found[name] == pytest.approx(float(truth.trace()), rel=1e-9), name
    for name in ("towers.right", "value"):
        truth = gaussian_trace(model, x, optimizer.blocks[name].layer.parameters)
        assert found[name] == pytest.approx(truth, rel=1e-9), name


def test_likelihoods_that_are_not_as_many_as_heads() -> None:
    model, x = Actor(), torch.randn(6, 5)
    optimizer = tekfac.TEKFAC(model, likelihood=["categorical", "gaussian", "gaussian"])
    actions, values = model.evaluate(x)
    with pytest.raises(ValueError, match=r"3 likelihoods .* returned 2 outputs .* 'action', 'val"):
        (actions.logsumexp(1).mean() + values.square().mean()).backward()
    del optimizer

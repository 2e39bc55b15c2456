"""Stacks of matrices in one parameter, as in mixtures of experts: a block for each of them."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import tekfac
from harness import METHODS, RESCALED
from test_measured import seeded
from test_uses import EXACT, dense_fisher

torch.set_num_threads(1)

EXPERTS, WIDTH, INNER = 3, 4, 5


class Mixture(nn.Module):
    """A router, and experts of which each token goes to the best, or to all."""

    def __init__(self, use: Any, turned: bool, inner: int = INNER) -> None:
        super().__init__()
        torch.manual_seed(0)
        shape = (EXPERTS, inner, WIDTH) if turned else (EXPERTS, WIDTH, inner)
        self.experts = nn.Parameter(torch.randn(*shape) / 2)
        self.router, self.head = nn.Linear(WIDTH, EXPERTS), nn.Linear(inner, 3)
        self.use = use
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.flatten(0, -2)
        weights = self.router(tokens).softmax(-1)
        return self.head(self.use(self, tokens, weights).tanh()).view(*x.shape[:-1], 3)


def routed(product: Callable[[Tensor, Tensor, int], Tensor]) -> Any:
    def use(m: Any, x: Tensor, weights: Tensor) -> Tensor:
        best = weights.topk(2).indices
        out = x.new_zeros(len(x), INNER)
        for expert in range(EXPERTS):
            rows, _ = (best == expert).nonzero(as_tuple=True)
            if len(rows):
                made = product(x[rows], m.experts, expert) * weights[rows, expert, None]
                out = out.index_add(0, rows, made)
        return out

    return use


def dense(product: Callable[[Tensor, Tensor], Tensor]) -> Any:
    def use(m: Any, x: Tensor, weights: Tensor) -> Tensor:
        made = product(x.expand(EXPERTS, *x.shape), m.experts)
        return torch.einsum("end,ne->nd", made, weights)

    return use


USES = [
    (routed(lambda x, w, e: x @ w[e]), False),
    (routed(lambda x, w, e: F.linear(x, w[e])), True),
    (routed(lambda x, w, e: F.linear(x, w[torch.tensor(e)].T)), False),
    (routed(lambda x, w, e: x @ w.mT[e - EXPERTS]), True),
    (routed(lambda x, w, e: (w.unbind(0)[e] @ x.T).T), True),
    (dense(torch.bmm), False),
    (dense(lambda x, w: x @ w.mT), True),
    (dense(lambda x, w: (w @ x.mT).mT), True),
    (dense(lambda x, w: torch.einsum("end,edo->eno", x, w)), False),
    (dense(lambda x, w: torch.func.vmap(torch.matmul)(x, w)), False),
]


def truths(model: Mixture, x: Tensor, y: Tensor, inner: int = INNER) -> list[Tensor]:
    """Each expert's part of the dense matrix."""
    rows = [model(row[None])[0][here >= 0] for row, here in zip(x, y, strict=True)]
    whole = dense_fisher([each for each in rows if len(each)], [model.experts])
    size = WIDTH * inner
    return [whole[e * size : (e + 1) * size, e * size : (e + 1) * size] for e in range(EXPERTS)]


def labels(*shape: int) -> Tensor:
    y = torch.randint(3, shape, generator=torch.Generator().manual_seed(1))
    y[0, 1:] = -100
    return y


def stepped(model: nn.Module, x: Tensor, y: Tensor, method: str, **options: Any) -> Any:
    options = {**EXACT, **({"scale_every": 1} if method in RESCALED else {}), **options}
    if method in RESCALED:
        options["scale_examples"] = None
    optimizer = getattr(tekfac, method)(model, **options)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        F.cross_entropy(model(x).flatten(0, 1), y.flatten()).backward()
        optimizer.step()
    return optimizer


@pytest.mark.parametrize(("use", "turned"), USES, ids=range(len(USES)))
def test_each_expert_has_a_block(use: Any, turned: bool) -> None:
    """EKFAC's is the best diagonal in its basis: trace and product are the dense matrix's."""
    model, x, y = Mixture(use, turned), seeded(4, 3, WIDTH), labels(4, 3)
    block = stepped(model, x, y, "EKFAC").blocks["experts"]
    assert block.groups == EXPERTS
    found, size = block.dense(), WIDTH * INNER
    # Where each entry of the parameter is in the block's order.
    order = block.layer.to_vector(
        block.layer.matrix(torch.arange(float(EXPERTS * size)).view_as(model.experts), None)
    )
    for e, truth in enumerate(truths(model, x, y)):
        own = (
            found[e]
            if found.dim() == 3
            else found[e * size : (e + 1) * size][:, e * size :][:, :size]
        )
        here = order.view(EXPERTS, -1)[e].long() - e * size
        turned_truth = truth[here][:, here]
        assert float(own.trace()) == pytest.approx(float(truth.trace()), rel=1e-8)
        missed = ((turned_truth - own) * own).sum()
        assert abs(float(missed)) < 1e-8 * float(truth.square().sum())


class Listed(Mixture):
    """The same experts as modules in a list."""

    def __init__(self, like: Mixture) -> None:
        super().__init__(routed(lambda x, experts, e: experts[e](x)), False)
        del self.experts
        self.experts = nn.ModuleList(nn.Linear(WIDTH, INNER, bias=False) for _ in range(EXPERTS))
        self.double()
        for own, weight in zip(self.experts, like.experts, strict=True):
            own.weight.data.copy_(weight.detach().T)


@pytest.mark.parametrize("tokens", [3, 1])
def test_experts_in_a_list(tokens: int) -> None:
    """The matrix is a mean over all terms, of those too whose examples a layer has not seen."""
    model, x = Listed(Mixture(USES[0][0], False)), seeded(12 // tokens, tokens, WIDTH)
    y = labels(12 // tokens, tokens)
    optimizer = stepped(model, x, y, "EKFAC")
    rows = [model(row[None])[0][here >= 0] for row, here in zip(x, y, strict=True)]
    for e in range(EXPERTS):
        truth = dense_fisher([each for each in rows if len(each)], [model.experts[e].weight])
        found = optimizer.blocks[f"experts.{e}"].trace
        assert found == pytest.approx(float(truth.trace()), rel=1e-9)


@pytest.mark.parametrize("tokens", [3, 1])
@pytest.mark.parametrize("method", METHODS)
def test_an_expert_is_as_a_layer_of_its_own(method: str, tokens: int) -> None:
    stack = Mixture(USES[0][0], False)
    listed = Listed(stack)
    x, y = seeded(12 // tokens, tokens, WIDTH), labels(12 // tokens, tokens)
    options = {"fisher": "mc", "lr": 0.1, "damping": 1e-2, "rms_clip": None}
    optimizers = [
        stepped(m, x, y, method, generator=torch.Generator().manual_seed(0), **options)
        for m in (stack, listed)
    ]
    for e in range(EXPERTS):
        expected = listed.experts[e].weight.detach().T
        torch.testing.assert_close(stack.experts.detach()[e], expected)
    experts = [block.trace for name, block in optimizers[1].blocks.items() if "experts" in name]
    assert optimizers[0].blocks["experts"].trace == pytest.approx(sum(experts), rel=1e-9)


@pytest.mark.parametrize("method", METHODS)
def test_an_expert_that_is_not_used_stays_and_its_first_batch_is_taken_whole(method: str) -> None:
    """Its input factor is a mean over the examples that it saw."""

    def use(m: Any, x: Tensor, weights: Tensor) -> Tensor:
        made = [x @ m.experts[e] * weights[:, e, None] for e in range(EXPERTS) if e != m.idle]
        return torch.stack(made).sum(0)

    model, x, y = Mixture(use, False), seeded(4, 3, WIDTH), labels(4, 3)
    model.idle = 1
    options = {"lr": 1e-2, "damping": tekfac.MeanDamping(1.0), "fisher": "mc"}
    optimizer = stepped(model, x, y, method, **options)
    before = model.experts.detach()[1].clone()
    assert torch.isfinite(model.experts).all()
    model.idle = -1
    for _ in range(2):
        optimizer.zero_grad()
        F.cross_entropy(model(x).flatten(0, 1), y.flatten()).backward()
        optimizer.step()
    assert torch.isfinite(model.experts).all()
    assert not torch.equal(model.experts[1], before)
    if method in ("KFAC", "EKFAC"):
        inputs = optimizer.blocks["experts"].factors.input.value
        torch.testing.assert_close(inputs[1], inputs[0])


@pytest.mark.skipif(not hasattr(torch, "_grouped_mm"), reason="of newer torch")
@pytest.mark.parametrize("turned", [False, True])
def test_rows_that_lie_expert_by_expert(turned: bool) -> None:
    """As Hugging Face's experts are by default; there is no such product in float64."""

    def grouped(m: Any, x: Tensor, weights: Tensor) -> Tensor:
        best, order = weights.argmax(1).sort(stable=True)
        ends = torch.bincount(best, minlength=EXPERTS).cumsum(0).int()
        w = m.experts.mT if turned else m.experts
        made = torch._grouped_mm(x[order], w, offs=ends)
        return torch.zeros_like(made).index_copy(0, order, made)

    def one_by_one(m: Any, x: Tensor, weights: Tensor) -> Tensor:
        w = m.experts.mT if turned else m.experts
        return torch.stack([row @ w[e] for row, e in zip(x, weights.argmax(1), strict=True)])

    x, y = seeded(4, 3, WIDTH), labels(4, 3)
    blocks = []
    for use, dtype in ((grouped, torch.float32), (one_by_one, torch.float64)):
        model = Mixture(use, turned, inner=8).to(dtype)
        block = stepped(model, x.to(dtype), y, "KFAC").blocks["experts"]
        blocks.append(block.dense().double())
    torch.testing.assert_close(*blocks, rtol=1e-3, atol=1e-6)
    model = Mixture(grouped, turned, inner=8).float()
    block = stepped(model, x.float(), y, "EKFAC").blocks["experts"]
    truth = sum(float(part.trace()) for part in truths(Mixture(one_by_one, turned, 8), x, y, 8))
    assert block.trace == pytest.approx(truth, rel=1e-4)


def test_what_is_no_product_of_single_matrices_is_said() -> None:
    def gathered(m: Any, x: Tensor, weights: Tensor) -> Tensor:
        return (x[:, None] @ m.experts[weights.argmax(1)])[:, 0]

    model = Mixture(gathered, False)
    optimizer = tekfac.EKFAC(model, scale_every=1, **EXACT)
    F.cross_entropy(model(seeded(4, 3, WIDTH)).flatten(0, 1), labels(4, 3).flatten()).backward()
    with pytest.warns(RuntimeWarning, match="'experts'.* used by IndexBackward0 before BmmB"):
        optimizer.step()


def test_a_state_goes_on() -> None:
    model = Mixture(USES[1][0], True)
    x, y = seeded(4, 3, WIDTH), labels(4, 3)
    optimizer = stepped(model, x, y, "TEKFAC")
    other = tekfac.TEKFAC(model, scale_every=1, scale_examples=None, **EXACT)
    other.load_state_dict(optimizer.state_dict())
    dense_one, dense_other = (o.blocks["experts"].dense() for o in (optimizer, other))
    assert torch.equal(dense_one, dense_other)

"""Models that return their loss alone: what is measured is found in the graph of that.

The truth is dense and of single examples, made by autograd from the outputs that the loss hides.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import tekfac
from test_uses import EXACT, check, dense_fisher, flat_order

torch.set_num_threads(1)

Loss = Callable[[Tensor, Tensor], Any]


class Own(nn.Module):
    """A network that makes its loss itself."""

    def __init__(self, loss: Loss, outputs: int = 3) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.loss = loss
        self.body, self.head = nn.Linear(4, 5), nn.Linear(5, outputs)
        self.double()

    def outputs(self, x: Tensor) -> Tensor:
        return self.head(self.body(x).tanh())

    def forward(self, x: Tensor, y: Tensor) -> Any:
        return self.loss(self.outputs(x), y)


def seeded(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).double()


def labels(*shape: int, classes: int = 3) -> Tensor:
    return torch.randint(classes, shape, generator=torch.Generator().manual_seed(1))


def total(result: Any) -> Tensor:
    if isinstance(result, Tensor):
        return result.sum()
    return sum(map(total, result.values() if isinstance(result, dict) else result))


def by_hand(logits: Tensor, y: Tensor) -> Tensor:
    return F.nll_loss(F.log_softmax(logits, -1), y)


SOFT = F.softmax(seeded(6, 3, seed=7), 1)


@pytest.mark.parametrize(
    "loss",
    [
        F.cross_entropy,
        by_hand,
        lambda out, y: 3 * F.cross_entropy(out, y) + 1,
        lambda out, y: {"loss": F.cross_entropy(out, y), "hits": (out.argmax(1) == y).sum()},
        lambda out, y: (F.cross_entropy(out, y), out.detach()),
        lambda out, y: [F.cross_entropy(out, y)],
        lambda out, y: F.cross_entropy(out, y, reduction="none"),
        lambda out, y: F.cross_entropy(out, y, label_smoothing=0.1),
        lambda out, y: F.cross_entropy(out, y, torch.tensor([1.0, 2.0, 0.5]).double()),
        lambda out, y: F.cross_entropy(out, SOFT),
        lambda out, y: F.kl_div(F.log_softmax(out, 1), SOFT, reduction="batchmean"),
        # Of a penalty of logits besides, a softmax's gradient would not be known.
        lambda out, y: F.cross_entropy(out, y) + 1e-2 * out.logsumexp(1).square().mean(),
        lambda out, y: checkpoint(F.cross_entropy, out, y, use_reentrant=False),
    ],
)
def test_a_cross_entropy(loss: Loss) -> None:
    x, y = seeded(6, 4), labels(6)
    check(
        Own(loss),
        lambda m: total(m(x, y)),
        lambda m: [m.outputs(row[None]) for row in x],
        {"body", "head"},
    )


@pytest.mark.parametrize(
    "loss",
    [
        lambda out, y: F.cross_entropy(out.flatten(0, 1), y.flatten()),
        lambda out, y: F.cross_entropy(out.mT, y),
        lambda out, y: F.cross_entropy(out.mT.unsqueeze(2), y.unsqueeze(1)),
        lambda out, y: F.cross_entropy(out.flatten(0, 1), y.flatten(), reduction="none").view(3, 4),
    ],
)
def test_tokens_of_which_some_do_not_count(loss: Loss) -> None:
    x, y = seeded(3, 4, 4), labels(3, 4)
    y[0, 1:] = y[2, 3] = -100
    check(
        Own(loss),
        lambda m: total(m(x, y)),
        lambda m: [m.outputs(row)[here >= 0] for row, here in zip(x, y, strict=True)],
        {"body", "head"},
    )


def dense(model: Own, x: Tensor, curvature: Callable[[Tensor], Tensor], name: str) -> Tensor:
    """Of a likelihood all of whose entries are terms, and its Hessian's diagonal."""
    parameters = list(getattr(model, name).parameters())
    sum_of, terms = torch.zeros(()), 0
    for row in x:
        out = model.outputs(row[None]).flatten()
        rows = [
            torch.cat([g.flatten() for g in torch.autograd.grad(o, parameters, retain_graph=True)])
            for o in out
        ]
        j = torch.stack(rows)
        sum_of = sum_of + j.T @ (curvature(out.detach())[:, None] * j)
        terms += len(out)
    return sum_of / terms


def of_sigmoid(out: Tensor) -> Tensor:
    return out.sigmoid() * (1 - out.sigmoid())


@pytest.mark.parametrize(
    ("loss", "likelihood", "curvature"),
    [
        (F.mse_loss, "gaussian", torch.ones_like),
        (lambda out, y: F.mse_loss(y, out, reduction="sum"), "gaussian", torch.ones_like),
        (lambda out, y: F.mse_loss(out, y, reduction="none").sum(1), "gaussian", torch.ones_like),
        (F.smooth_l1_loss, tekfac.Gaussian(0.25), lambda out: 4 * torch.ones_like(out)),
        (F.huber_loss, "gaussian", torch.ones_like),
        (F.binary_cross_entropy_with_logits, "bernoulli", of_sigmoid),
        (
            lambda out, y: F.binary_cross_entropy_with_logits(
                out, y, pos_weight=torch.full((3,), 2.0).double(), reduction="none"
            ),
            "bernoulli",
            of_sigmoid,
        ),
    ],
)
def test_other_losses(loss: Loss, likelihood: Any, curvature: Callable[[Tensor], Tensor]) -> None:
    model, x, y = Own(loss), seeded(6, 4), labels(6, 3, classes=2).double()
    optimizer = tekfac.EKFAC(
        model, likelihood=likelihood, scale_every=1, scale_examples=None, **EXACT
    )
    total(model(x, y)).backward()
    optimizer.step()
    for name in ("body", "head"):
        truth = dense(model, x, curvature, name)
        assert optimizer.blocks[name].trace == pytest.approx(float(truth.trace()), rel=1e-8)
        order = flat_order(optimizer.blocks[name])
        truth, found = truth[order][:, order], optimizer.blocks[name].dense()
        assert abs(float(((truth - found) * found).sum())) < 1e-8 * float(truth.square().sum())


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_the_data_s_own_labels(reduction: str) -> None:
    x, y = seeded(6, 4), labels(6)
    model = Own(lambda out, y: F.cross_entropy(out, y, reduction=reduction))
    options = {**EXACT, "fisher": "empirical", "loss_reduction": reduction}
    optimizer = tekfac.EKFAC(model, scale_every=1, scale_examples=None, **options)
    model(x, y).backward()
    optimizer.step()
    for name in ("body", "head"):
        truth = 0.0
        for row, label in zip(x, y, strict=True):
            loss = F.cross_entropy(model.outputs(row[None]), label[None])
            own = torch.autograd.grad(loss, list(getattr(model, name).parameters()))
            truth += sum(float(g.square().sum()) for g in own) / 6
        assert optimizer.blocks[name].trace == pytest.approx(truth, rel=1e-9)


def test_labels_drawn() -> None:
    model, x, y = Own(F.cross_entropy), seeded(6, 4), labels(6)
    options = {**EXACT, "fisher": "mc", "mc_samples": 400}
    generator = torch.Generator().manual_seed(0)
    optimizer = tekfac.EKFAC(
        model, scale_every=1, scale_examples=None, generator=generator, **options
    )
    model(x, y).backward()
    optimizer.step()
    for name in ("body", "head"):
        truth = dense_fisher(
            [model.outputs(row[None]) for row in x], list(getattr(model, name).parameters())
        )
        assert optimizer.blocks[name].trace == pytest.approx(float(truth.trace()), rel=0.05)


def both(out: Tensor, y: Tensor) -> dict[str, Tensor]:
    kind, size = out[:, :3], out[:, 3:]
    target = torch.ones_like(size)
    return {"kind": F.cross_entropy(kind, y), "size": F.mse_loss(size, target) / 2}


@pytest.mark.parametrize("order", [["categorical", "gaussian"], ["gaussian", "categorical"]])
def test_two_losses_each_with_its_likelihood(order: list[str]) -> None:
    model, x, y = Own(both, 5), seeded(6, 4), labels(6)
    optimizer = tekfac.EKFAC(model, likelihood=order, scale_every=1, scale_examples=None, **EXACT)
    total(model(x, y)).backward()
    optimizer.step()
    for name in ("body", "head"):
        parameters = list(getattr(model, name).parameters())
        truth = float(
            dense_fisher([model.outputs(row[None])[:, :3] for row in x], parameters).trace()
        )
        for row in x:
            for entry in model.outputs(row[None])[0, 3:]:
                own = torch.autograd.grad(entry, parameters, retain_graph=True)
                truth += sum(float(g.square().sum()) for g in own) / 12
        assert optimizer.blocks[name].trace == pytest.approx(truth, rel=1e-9)


@pytest.mark.parametrize(
    ("loss", "likelihood", "words"),
    [
        (
            both,
            "categorical",
            r'log-softmax of \(6, 3\), squared error of \(6, 2\).*=\["categorical", "gau',
        ),
        (lambda out, y: out.square().mean(), "gaussian", r"\(the loss itself, made by hand\? Then"),
        (lambda out, y: [out.square().mean()], "gaussian", "made by no cross_entropy"),
        (F.cross_entropy, "gaussian", r'log-softmax of \(6, 5\).*likelihood="categorical"'),
        (
            lambda out, y: F.cross_entropy(out[:, :2], y % 2) + F.cross_entropy(out[:, 2:], y),
            "categorical",
            r'\["categorical", "categorical"\]',
        ),
        (
            lambda out, y: F.mse_loss(out[:, :2], out[:, 2:4]),
            "gaussian",
            r'\["gaussian", "gaussian"\].*or return the outputs beside the loss',
        ),
        # Which of these has which variance can't be known.
        (
            lambda out, y: F.mse_loss(out, torch.zeros_like(out)) + F.mse_loss(out, out.detach()),
            [tekfac.Gaussian(1.0), tekfac.Gaussian(2.0)],
            "or return the outputs beside the loss",
        ),
    ],
)
@pytest.mark.parametrize("fisher", ["mc", "empirical"])
def test_what_can_t_be_known_is_refused(
    fisher: str, loss: Loss, likelihood: Any, words: str
) -> None:
    model = Own(loss, 5)
    optimizer = tekfac.EKFAC(model, likelihood=likelihood, fisher=fisher)
    with pytest.raises(ValueError, match=words):
        model(seeded(6, 4), labels(6))
    optimizer.close()


def test_a_part_that_returns_its_loss() -> None:
    """A LightningModule's ``training_step`` calls ``self.net``."""

    class Whole(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = Own(F.cross_entropy)

    x, y = seeded(6, 4), labels(6)
    check(
        Whole(),
        lambda m: m.net(x, y),
        lambda m: [m.net.outputs(row[None]) for row in x],
        {"net.body", "net.head"},
    )


def test_micro_batches_and_evaluations_between() -> None:
    x, y = seeded(6, 4), labels(6)
    found = []
    for parts in ((slice(6),), (slice(0, 2), slice(2, 6))):
        model = copy.deepcopy(Own(F.cross_entropy))
        optimizer = tekfac.EKFAC(model, scale_every=1, scale_examples=None, **EXACT)
        for part in parts:
            (model(x[part], y[part]) * len(x[part]) / 6).backward()
            model.eval()
            with torch.no_grad():
                model(x, y)
            model.train()
        optimizer.step()
        found.append({name: block.trace for name, block in optimizer.blocks.items()})
    assert found[0] == pytest.approx(found[1], rel=1e-9)


class Beside(Own):
    """Returns features and loss, and none of the logits between them."""

    def forward(self, x: Tensor, y: Tensor) -> dict[str, Tensor]:
        features = self.body(x).tanh()
        return {"loss": self.loss(self.head(features), y), "features": features}


def test_output_may_point_to_the_loss() -> None:
    model, x, y = Beside(F.cross_entropy), seeded(6, 4), labels(6)
    optimizer = tekfac.EKFAC(
        copy.deepcopy(model),
        output=lambda result: result["loss"],
        scale_every=1,
        scale_examples=None,
        **EXACT,
    )
    optimizer.model(x, y)["loss"].backward()
    optimizer.step()
    for name, module in (("body", model.body), ("head", model.head)):
        truth = dense_fisher([model.outputs(row[None]) for row in x], list(module.parameters()))
        assert optimizer.blocks[name].trace == pytest.approx(float(truth.trace()), rel=1e-9)


def test_a_loss_that_output_points_to_and_that_shows_nothing() -> None:
    model = Beside(lambda logits, y: (logits.logsumexp(1) - logits[:, 0]).mean())
    optimizer = tekfac.EKFAC(model, output=lambda result: result["loss"])
    with pytest.raises(ValueError, match="the model returned its loss alone, which is made by no"):
        optimizer.model(seeded(6, 4), labels(6))

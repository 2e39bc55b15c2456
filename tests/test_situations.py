"""Situations from other people's code: measured as it should be, or said once in words."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import tekfac
from test_measured import build, labels, near, network, seeded, traces
from test_uses import check, dense_fisher

torch.set_num_threads(1)


# -- what is trained at all ------------------------------------------------------------------------


def train(model: nn.Module, optimizer: tekfac.NaturalGradient, steps: int = 2) -> None:
    for _ in range(steps):
        optimizer.zero_grad()
        F.cross_entropy(model(seeded(6, 4)), labels(6)).backward()
        optimizer.step()


def test_a_layer_that_was_unfrozen_is_told_of_until_it_is_added() -> None:
    model = network()
    model[0].requires_grad_(False)
    optimizer = tekfac.TEKFAC(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train(model, optimizer)
    model[0].requires_grad_(True)
    with pytest.warns(RuntimeWarning, match=r"parameters '0.weight', '0.bias' have .* in no param"):
        train(model, optimizer)
    before = model[0].weight.detach().clone()
    optimizer.add_param_group({"params": list(model[0].parameters())})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train(model, optimizer)
    assert not torch.equal(before, model[0].weight)


def test_a_head_that_was_replaced_is_told_of() -> None:
    model = network()
    optimizer = tekfac.TEKFAC(model)
    train(model, optimizer)
    model[2] = nn.Linear(5, 3).double()
    with pytest.warns(RuntimeWarning, match=r"parameters '2.weight', '2.bias' have gradients"):
        train(model, optimizer, 12)


def test_who_gave_groups_knows_what_is_in_none() -> None:
    model = network()
    optimizer = tekfac.TEKFAC(model, params=[{"params": list(model[2].parameters())}])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train(model, optimizer)


class Wave(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.phase = nn.Parameter(torch.randn(4, 5, dtype=torch.cdouble))
        self.head = nn.Linear(5, 3).double()

    def forward(self, x: Tensor) -> Tensor:
        return self.head((x.to(self.phase.dtype) @ self.phase).abs())


def test_complex_parameters_beside_real_ones() -> None:
    model = Wave()
    optimizer = build(model, lr=1e-2, first_order=tekfac.Adam(lr=1e-3))
    own = torch.optim.Adam([model.phase.detach().clone().requires_grad_()], lr=1e-3)
    loss = F.cross_entropy(model(seeded(6, 4)), labels(6))
    loss.backward()
    [copy] = own.param_groups[0]["params"]
    copy.grad = model.phase.grad.clone()
    own.step()
    optimizer.step()
    torch.testing.assert_close(model.phase, copy)
    assert optimizer.treatment()["phase"] == "first order: Wave has no curvature block"
    # One that is not finite ends the step.
    optimizer.zero_grad()
    (model(seeded(6, 4)).sum() * torch.nan).backward()
    with pytest.warns(RuntimeWarning, match="not finite"):
        optimizer.step()
    torch.testing.assert_close(model.phase, copy)


@pytest.mark.filterwarnings("ignore:.*torch.jit:FutureWarning")
def test_what_torch_jit_has_compiled() -> None:
    model = torch.jit.trace(network(), seeded(6, 4))
    with pytest.raises(TypeError, match=r"give it the model as it was before torch\.jit"):
        tekfac.TEKFAC(model)
    parts = nn.Sequential(torch.jit.script(network()), nn.Linear(3, 3).double())
    optimizer = build(parts)
    F.cross_entropy(parts(seeded(6, 4)), labels(6)).backward()
    optimizer.step()
    assert "compiled by torch.jit" in optimizer.treatment()["0.0.weight"]
    truth = dense_fisher([parts(row[None]) for row in seeded(6, 4)], list(parts[1].parameters()))
    assert optimizer.blocks["1"].trace == pytest.approx(float(truth.trace()), rel=1e-9)


# -- what is made of an output ---------------------------------------------------------------------


@pytest.mark.parametrize("likelihood", ["categorical", tekfac.Categorical(dim=1)])
@pytest.mark.parametrize("fisher", ["exact", "empirical"])
def test_a_temperature_in_output(likelihood: Any, fisher: str) -> None:
    """The loss divides the logits: so does ``output=``, and some examples do not count."""
    model, x, y = network(), seeded(6, 4), labels(6)
    y[2] = -100

    def run(m: nn.Module) -> Tensor:
        return F.cross_entropy(m(x) / 4, y)

    options = {"likelihood": likelihood, "fisher": fisher, "output": lambda logits: logits / 4}
    found = traces(model, run, **options)
    for name, trace in found.items():
        parameters = list(model[int(name)].parameters())
        if fisher == "exact":
            rows = [model(row[None]) / 4 for row in x[y >= 0]]
            truth = float(dense_fisher(rows, parameters).trace())
        else:
            truth = 0.0
            for row, label in zip(x[y >= 0], y[y >= 0], strict=True):
                loss = F.cross_entropy(model(row[None]) / 4, label[None])
                own = torch.autograd.grad(loss, parameters)
                truth += sum(float(g.square().sum()) for g in own) / 5
        assert trace == pytest.approx(truth, rel=1e-9)


def test_probabilities_of_which_output_makes_logits() -> None:
    x, y = seeded(6, 4), labels(6)
    plain = traces(network(), lambda m: F.cross_entropy(m(x), y))
    model = nn.Sequential(*network(), nn.Softmax(1))
    near(traces(model, lambda m: F.nll_loss(m(x).log(), y), output=torch.log), plain)


# -- whose row is whose ----------------------------------------------------------------------------


class Shuffled(nn.Module):
    """One layer sees the examples twice, the second time in another order."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.head = nn.Linear(4, 5), nn.Linear(5, 3)

    def forward(self, x: Tensor, order: Tensor) -> Tensor:
        back = torch.empty_like(order).scatter_(0, order, torch.arange(len(order)))
        return self.head(self.first(x) + self.first(x[order]).tanh()[back])


def test_a_layer_that_sees_the_examples_in_two_orders() -> None:
    torch.manual_seed(0)
    x, y, order = seeded(6, 4), labels(6), torch.tensor([3, 0, 5, 1, 4, 2])
    check(
        Shuffled(),
        lambda m: F.cross_entropy(m(x, order), y),
        lambda m: [m(row[None], torch.tensor([0])) for row in x],
        {"first", "head"},
    )


class Packed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.rnn, self.head = nn.LSTM(4, 3, batch_first=True), nn.Linear(3, 3)

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        packed = nn.utils.rnn.pack_padded_sequence(
            x, lengths, batch_first=True, enforce_sorted=False
        )
        return self.head(self.rnn(packed)[1][0][-1])


def test_packed_sequences() -> None:
    """They are sorted by their length: the first step's rows are as many as the examples."""
    torch.manual_seed(0)
    x, y, lengths = seeded(6, 5, 4), labels(6), torch.tensor([5, 3, 1, 4, 2, 5])

    def alone(m: nn.Module) -> list[Tensor]:
        with torch.backends.mkldnn.flags(enabled=False):
            return [m(x[i : i + 1], lengths[i : i + 1]) for i in range(6)]

    names = {"head", "rnn.weight_ih_l0", "rnn.weight_hh_l0"}
    check(Packed(), lambda m: F.cross_entropy(m(x, lengths), y), alone, names)


class Flat(nn.Module):
    """A transformer whose logits are ``(N T, V)``."""

    def __init__(self, batch_first: bool) -> None:
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(4, 2, 6, dropout=0.0, batch_first=batch_first)
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layer(x)).flatten(0, 1)


@pytest.mark.parametrize("batch_first", [True, False])
def test_one_sequence_in_a_batch(batch_first: bool) -> None:
    """Tokens that look at one another are no examples of their own."""
    torch.manual_seed(0)
    x, y = seeded(1, 5, 4), labels(5)
    x = x if batch_first else x.transpose(0, 1)
    attention = {"layer.self_attn.in_proj_weight", "layer.self_attn.out_proj"}
    check(
        Flat(batch_first),
        lambda m: F.cross_entropy(m(x), y),
        lambda m: [m(x)],
        {*attention, "layer.linear1", "layer.linear2", "head"},
    )


# -- what is multiplied ----------------------------------------------------------------------------


class Bare(nn.Module):
    def __init__(self, use: Any) -> None:
        super().__init__()
        self.use, self.matrix = use, nn.Parameter(torch.randn(4, 5) / 2)
        self.head = nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.use(x, self.matrix).tanh())


@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support")
@pytest.mark.parametrize("kind", ["to_sparse", "to_sparse_csr"])
def test_sparse_inputs(kind: str) -> None:
    torch.manual_seed(0)
    x, y = seeded(6, 4) * (seeded(6, 4, seed=2) > 0), labels(6)
    model = Bare(lambda x, w: getattr(x, kind)() @ w).double()
    optimizer = build(model)
    F.cross_entropy(model(x), y).backward()
    optimizer.step()
    truth = dense_fisher([model(row[None]) for row in x], [model.matrix])
    assert optimizer.blocks["matrix"].trace == pytest.approx(float(truth.trace()), rel=1e-9)


@pytest.mark.parametrize(
    ("use", "words"),
    [
        (
            lambda x, w: (torch.complex(x, 2 * x) @ w.to(torch.cdouble)).abs(),
            "ToCopyBackward0 before MmBackward0",
        ),
        (
            lambda x, w: torch.stack(
                [
                    part.mean(0)
                    for part in F.linear(
                        torch.nested.nested_tensor(
                            [row.expand(n + 1, -1) for n, row in enumerate(x)], layout=torch.jagged
                        ),
                        w.T,
                    ).unbind()
                ]
            ),
            "LinearBackward0 of a nested tensor",
        ),
    ],
    ids=["complex", "nested"],
)
def test_what_can_t_be_read_is_said(use: Any, words: str) -> None:
    torch.manual_seed(0)
    x, y = seeded(6, 4), labels(6)
    model = Bare(use).double()
    optimizer = build(model)
    F.cross_entropy(model(x), y).backward()
    with pytest.warns(RuntimeWarning, match=f"no curvature of layers 'matrix'.*({words})"):
        optimizer.step()
    truth = dense_fisher([model(row[None]) for row in x], list(model.head.parameters()))
    assert optimizer.blocks["head"].trace == pytest.approx(float(truth.trace()), rel=1e-9)


def test_a_model_of_nothing_that_can_be_read_trains_by_the_first_order_rule() -> None:
    class Nested(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = network()

        def forward(self, x: Tensor) -> Tensor:
            parts = [row.expand(n + 1, -1) for n, row in enumerate(x)]
            rows = self.layers(torch.nested.nested_tensor(parts, layout=torch.jagged))
            return torch.stack([part.mean(0) for part in rows.unbind()])

    model = Nested()
    optimizer = tekfac.TEKFAC(model)
    before = [p.detach().clone() for p in model.parameters()]
    F.cross_entropy(model(seeded(6, 4)), labels(6)).backward()
    with pytest.warns(RuntimeWarning, match="LinearBackward0 of a nested tensor"):
        optimizer.step()
    assert not any(torch.equal(*pair) for pair in zip(before, model.parameters(), strict=True))
    assert "of a nested tensor" in optimizer.treatment()["layers.0.weight"]

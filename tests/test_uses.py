"""Layers found by their weights' uses: each against the dense Fisher matrix of single examples.

The truth is made by autograd alone, in float64: the Jacobian of each example's outputs, example by
example through the model, and the likelihood's Hessian in closed form.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import tekfac

torch.set_num_threads(1)

EXACT = {
    "factor_every": 1,
    "basis_every": 1,
    "factor_rows": None,
    "rank": None,
    "interval_warmup": False,
    "fisher": "exact",
    "lr": 0.0,
    "first_order": tekfac.Adam(lr=0.0),
}


def hessian(logits: Tensor) -> Tensor:
    """Of ``-log softmax`` summed over rows ``(T, V)``: block-diagonal over them."""
    blocks = [torch.diag(p) - torch.outer(p, p) for p in logits.detach().softmax(-1)]
    return torch.block_diag(*blocks)


def dense_fisher(logits: list[Tensor], parameters: list[Tensor]) -> Tensor:
    """The mean over terms, from each example's logits ``(T, V)``."""
    total, terms = torch.zeros(()), 0
    for rows in logits:
        jacobian = []
        for entry in rows.flatten():
            found = torch.autograd.grad(
                entry, parameters, retain_graph=True, materialize_grads=True
            )
            jacobian.append(torch.cat([g.flatten() for g in found]))
        j = torch.stack(jacobian)
        total = total + j.T @ hessian(rows) @ j
        terms += len(rows)
    return total / terms


def flat_order(block: Any) -> Tensor:
    """Where each entry of the block's vectors is among its parameters' own entries."""
    layer, start, parts = block.layer, 0, []
    for p in layer.parameters:
        parts.append(torch.arange(start, start + p.numel()).reshape(p.shape).double())
        start += p.numel()
    bias = parts[1] if len(parts) > 1 else None
    return layer.to_vector(layer.matrix(parts[0], bias)).flatten().long()


def check(
    model: nn.Module,
    run: Callable[[nn.Module], Tensor],
    logits_of: Callable[[nn.Module], list[Tensor]],
    names: set[str],
    **options: Any,
) -> tekfac.EKFAC:
    """One step on a batch; every block is the best diagonal of the dense matrix in its basis."""
    model = model.double()
    optimizer = tekfac.EKFAC(model, scale_every=1, scale_examples=None, **{**EXACT, **options})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run(model).backward()
        optimizer.step()
    measured = {name for name, block in optimizer.blocks.items() if not block.empty}
    assert measured == names
    for name in names:
        block = optimizer.blocks[name]
        order = flat_order(block)
        truth = dense_fisher(logits_of(model), block.layer.parameters)[order][:, order]
        assert block.trace == pytest.approx(float(truth.trace()), rel=1e-8), name
        found = block.dense()
        assert abs(float(((truth - found) * found).sum())) < 1e-8 * float(truth.square().sum())
    return optimizer


# -- products that are no module's own forward -----------------------------------------------------


class Bare(nn.Module):
    """One matrix used in some way, and a head."""

    def __init__(self, use: Callable[[Tensor, Tensor], Tensor], rows: int, columns: int) -> None:
        super().__init__()
        self.use, self.matrix = use, nn.Parameter(torch.randn(rows, columns) / 2)
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.use(x, self.matrix).tanh())


@pytest.mark.parametrize(
    ("use", "rows", "columns"),
    [
        (lambda x, w: F.linear(x, w), 4, 5),
        (lambda x, w: x @ w, 5, 4),
        (lambda x, w: x @ w.T, 4, 5),
        (lambda x, w: (w @ x.T).T, 4, 5),
        (lambda x, w: torch.addmm(x.new_zeros(4), x, w), 5, 4),
        (lambda x, w: torch.cat([x @ w[:, :5].T, x @ w[:, 5:].T], 1), 2, 10),
        (lambda x, w: torch.cat([F.linear(x, part) for part in w.split([1, 3])], 1), 4, 5),
        (lambda x, w: x[:, :3] @ w[:3] + x[:, 3:] @ w[3:], 5, 4),
        (lambda x, w: x[:, 1:] @ w[1:], 5, 4),
        (lambda x, w: (w[1:].T @ x[:, 1:].T).T, 5, 4),
        (lambda x, w: F.linear(x, w.flatten(1)), 4, 5),
        (lambda x, w: torch.stack([F.linear(row, w) for row in x]), 4, 5),
    ],
)
def test_a_matrix_in_anybodys_code(
    use: Callable[[Tensor, Tensor], Tensor], rows: int, columns: int
) -> None:
    torch.manual_seed(0)
    model, x = Bare(use, rows, columns), torch.randn(6, 5).double()
    y = torch.randint(3, (6,))
    names = {"head", "matrix"}
    if columns == 10:  # its columns are split: such a use is not known, and said
        optimizer = tekfac.EKFAC(model.double(), scale_every=1, **EXACT)
        F.cross_entropy(model(x), y).backward()
        with pytest.warns(RuntimeWarning, match="'matrix'.* used by SliceBackward0"):
            optimizer.step()
        assert "SliceBackward0" in optimizer.treatment()["matrix"]
        return
    check(
        model,
        lambda m: F.cross_entropy(m(x), y),
        lambda m: [m(row[None]) for row in x],
        names,
    )


def test_a_weight_with_noise_is_said_and_a_table_is_not() -> None:
    """A matrix that is added to a layer's input is nobody's weight: nothing is amiss."""
    torch.manual_seed(0)
    x, y = torch.randn(6, 5).double(), torch.randint(3, (6,))
    noisy = Bare(lambda x, w: F.linear(x, w + 0.1), 4, 5).double()
    optimizer = tekfac.EKFAC(noisy, scale_every=1, **EXACT)
    F.cross_entropy(noisy(x), y).backward()
    with pytest.warns(RuntimeWarning, match="'matrix'.* AddBackward0 before MmBackward0"):
        optimizer.step()

    table = Bare(torch.add, 6, 4).double()
    table.forward = lambda x: table.head(table.use(x[:, :4], table.matrix))
    optimizer = tekfac.EKFAC(table, scale_every=1, **EXACT)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        F.cross_entropy(table(x), y).backward()
        optimizer.step()
    assert "AddBackward0" in optimizer.treatment()["matrix"]


class Tied(nn.Module):
    """A decoder with the encoder's weight, from the other side."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.head = nn.Linear(5, 4), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.linear(self.encoder(x).tanh(), self.encoder.weight.T).tanh())


class Word(nn.Module):
    """An output head tied to the embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.hidden = nn.Embedding(7, 4), nn.Linear(4, 4)
        self.out = nn.Linear(4, 7, bias=False)
        self.out.weight = self.embed.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.hidden(self.embed(x)).tanh())


def test_one_weight_from_both_sides() -> None:
    torch.manual_seed(0)
    x, y = torch.randn(6, 5).double(), torch.randint(3, (6,))
    check(
        Tied(),
        lambda m: F.cross_entropy(m(x), y),
        lambda m: [m(row[None]) for row in x],
        {"encoder", "head"},
    )


def test_a_head_tied_to_the_embedding() -> None:
    torch.manual_seed(0)
    x, y = torch.randint(7, (5, 3)), torch.randint(7, (5, 3))
    check(
        Word(),
        lambda m: F.cross_entropy(m(x).flatten(0, 1), y.flatten()),
        lambda m: [m(row[None])[0] for row in x],
        {"hidden", "out"},
    )


# -- sequences, however they lie -------------------------------------------------------------------


class Encoder(nn.Module):
    """A transformer layer and a head, in each of four forms of input and output."""

    def __init__(self, batch_first: bool, flat: bool) -> None:
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(4, 2, 6, dropout=0.0, batch_first=batch_first)
        self.head, self.batch_first, self.flat = nn.Linear(4, 3), batch_first, flat

    def forward(self, x: Tensor) -> Tensor:
        logits = self.head(self.layer(x))
        return logits.flatten(0, 1) if self.flat else logits


ENCODER = {
    "layer.self_attn.in_proj_weight",
    "layer.self_attn.out_proj",
    "layer.linear1",
    "layer.linear2",
    "head",
}


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("flat", [False, True])
@pytest.mark.parametrize("given", [False, True])
def test_a_transformer(batch_first: bool, flat: bool, given: bool) -> None:
    torch.manual_seed(0)
    x, y = torch.randn(3, 4, 4).double(), torch.randint(3, (3, 4))
    if not batch_first:
        x, y = x.transpose(0, 1), y.transpose(0, 1)

    def logits(m: nn.Module) -> list[Tensor]:
        examples = x if batch_first else x.transpose(0, 1)
        alone = [e[None] if batch_first else e[:, None] for e in examples]
        return [m(e).reshape(4, 3) for e in alone]

    # The dimension may be said where inside attention there is no other order.
    options = {"batch_dim": 0 if batch_first else 1} if given and not batch_first else {}
    optimizer = check(
        Encoder(batch_first, flat),
        lambda m: F.cross_entropy(m(x).reshape(-1, 3), y.flatten()),
        logits,
        ENCODER,
        **options,
    )
    assert optimizer.counters["steps"] == 1


class Cross(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention, self.head = nn.MultiheadAttention(4, 2, batch_first=True), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        query, memory = x[:, :2], x[:, 2:]
        return self.head(self.attention(query, memory, memory, need_weights=False)[0])


def test_attention_to_something_else() -> None:
    torch.manual_seed(0)
    x, y = torch.randn(3, 5, 4).double(), torch.randint(3, (3, 2))
    check(
        Cross(),
        lambda m: F.cross_entropy(m(x).flatten(0, 1), y.flatten()),
        lambda m: [m(row[None])[0] for row in x],
        {"attention.in_proj_weight", "attention.out_proj", "head"},
    )


class Recurrent(nn.Module):
    def __init__(self, kind: type[nn.RNNBase], flat: bool, **options: Any) -> None:
        super().__init__()
        self.rnn = kind(3, 2, **options)
        self.head, self.flat = nn.Linear(2 * (1 + self.rnn.bidirectional), 3), flat

    def forward(self, x: Tensor) -> Tensor:
        out = self.head(self.rnn(x)[0])
        return out.flatten(0, 1) if self.flat else out


@pytest.mark.parametrize("flat", [False, True])
@pytest.mark.parametrize(
    ("kind", "options"),
    [
        (nn.LSTM, {"batch_first": True}),
        (nn.LSTM, {}),
        (nn.GRU, {"batch_first": True, "bidirectional": True}),
        (nn.RNN, {"num_layers": 2}),
    ],
)
def test_recurrent_layers(kind: type[nn.RNNBase], options: dict[str, Any], flat: bool) -> None:
    torch.manual_seed(0)
    x, y = torch.randn(3, 4, 3).double(), torch.randint(3, (3, 4))
    first = bool(options.get("batch_first"))
    if not first:
        x, y = x.transpose(0, 1), y.transpose(0, 1)
    model = Recurrent(kind, flat, **options)

    def logits(m: nn.Module) -> list[Tensor]:
        m = copy.copy(m)
        examples = x if first else x.transpose(0, 1)
        with torch.backends.mkldnn.flags(enabled=False):
            return [m(e[None] if first else e[:, None]).reshape(4, 3) for e in examples]

    names = {"head"} | {f"rnn.{n}" for n, _ in model.rnn.named_parameters() if "weight" in n}
    check(model, lambda m: F.cross_entropy(m(x).reshape(-1, 3), y.flatten()), logits, names)


class Graphs(nn.Module):
    """Nodes of graphs of several sizes, and a mean over each graph's."""

    def __init__(self) -> None:
        super().__init__()
        self.node, self.out = nn.Linear(4, 5), nn.Linear(5, 3)

    def forward(self, x: Tensor, graph: Tensor, graphs: int) -> Tensor:
        h = self.node(x).tanh()
        return self.out(torch.zeros(graphs, 5, dtype=h.dtype).index_add(0, graph, h))


@pytest.mark.parametrize("sizes", [[3, 1, 4, 2], [3, 1, 4, 4], [3, 1, 4, 5], [3, 3, 3, 3]])
def test_nodes_of_graphs(sizes: list[int]) -> None:
    torch.manual_seed(0)
    graph = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes))
    order = torch.randperm(len(graph))
    x, y = torch.randn(len(graph), 4).double(), torch.randint(3, (len(sizes),))
    graph = graph[order]
    check(
        Graphs(),
        lambda m: F.cross_entropy(m(x, graph, len(sizes)), y),
        lambda m: [row[None] for row in m(x, graph, len(sizes))],
        {"node", "out"},
    )


# -- transposed convolutions -----------------------------------------------------------------------


class Up(nn.Module):
    def __init__(self, up: nn.Module) -> None:
        super().__init__()
        self.up, self.head = up, nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.up(x).flatten(2).square().mean(2))


@pytest.mark.parametrize(
    ("up", "shape"),
    [
        (nn.ConvTranspose1d(2, 4, 3), (2, 5)),
        (nn.ConvTranspose2d(2, 4, 3, stride=2, padding=1, output_padding=1), (2, 3, 3)),
        (nn.ConvTranspose2d(4, 4, (2, 3), stride=(1, 2), groups=2, bias=False), (4, 3, 2)),
        (nn.ConvTranspose2d(2, 4, 2, dilation=2, padding=1), (2, 3, 3)),
        (nn.ConvTranspose3d(2, 4, 2), (2, 2, 2, 2)),
    ],
)
def test_transposed_convolutions(up: nn.Module, shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    x, y = torch.randn(5, *shape).double(), torch.randint(3, (5,))
    groups = up.groups
    if groups > 1:  # the truth has the groups' cross terms, the block has not
        model = Up(copy.deepcopy(up)).double()
        optimizer = tekfac.EKFAC(model, scale_every=1, scale_examples=None, **EXACT)
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
        truth = dense_fisher([model(row[None]) for row in x], [model.up.weight])
        assert optimizer.blocks["up"].trace == pytest.approx(float(truth.trace()), rel=1e-8)
        return
    check(
        Up(copy.deepcopy(up)),
        lambda m: F.cross_entropy(m(x), y),
        lambda m: [m(row[None]) for row in x],
        {"up", "head"},
    )


class FusedHead(torch.autograd.Function):
    """Log-probabilities of labels by a head's weight, without ever holding the logits."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, y: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight, y)
        return (x @ weight.T).log_softmax(-1).gather(1, y[:, None])[:, 0]

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None]:
        x, weight, y = ctx.saved_tensors
        g = F.one_hot(y, len(weight)) - (x @ weight.T).softmax(-1)
        g = gradient[:, None] * g
        return g @ weight, g.T @ x, None


class WithFusedHead(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(4, 5), nn.Linear(5, 3, bias=False)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return FusedHead.apply(self.body(x).tanh(), self.head.weight, y)


def test_a_weight_in_somebody_s_autograd_function_is_told() -> None:
    model, x, y = WithFusedHead(), torch.randn(6, 4), torch.arange(6) % 3
    optimizer = tekfac.TEKFAC(model, fisher="empirical")
    (-model(x, y).mean()).backward()
    with pytest.warns(RuntimeWarning, match="'head'.* FusedHeadBackward .a custom autograd funct"):
        optimizer.step()
    assert not optimizer.blocks["body"].empty


class OnceBiased(nn.Module):
    """A layer whose weight is multiplied twice, and whose bias is added to one of the results."""

    def __init__(self, layer: nn.Module, second: Callable[[Any, Tensor], Tensor]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer, self.second, self.head = layer, second, nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = self.second(self.layer, self.layer(x).tanh())
        return self.head(h.tanh().flatten(1))


@pytest.mark.parametrize(
    ("layer", "second"),
    [
        (lambda: nn.Linear(4, 4), lambda layer, h: F.linear(h, layer.weight)),
        (lambda: nn.Linear(4, 4), lambda layer, h: h @ layer.weight),
        (
            lambda: nn.Conv2d(1, 1, 3, padding=1),
            lambda layer, h: F.conv2d(h, layer.weight, padding=1),
        ),
    ],
    ids=["linear", "from the other side", "convolution"],
)
def test_a_bias_that_only_one_use_adds(layer: Any, second: Callable[[Any, Tensor], Tensor]) -> None:
    model = OnceBiased(layer(), second)
    shape = (1, 4, 4) if isinstance(model.layer, nn.Conv2d) else (4, 4)
    x, y = torch.randn(5, *shape).double(), torch.arange(5) % 3
    check(
        model,
        lambda m: F.cross_entropy(m(x), y),
        lambda m: [m(row[None]) for row in x],
        {"layer", "head"},
    )


class Residual(nn.Module):
    """As of a differential equation: what is fitted is made of derivatives of a network."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(
            nn.Linear(2, 5), nn.Tanh(), nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3)
        )

    def forward(self, x: Tensor) -> Tensor:
        x = x.detach().requires_grad_()
        u = self.net(x)
        (first,) = torch.autograd.grad(u.sum(), x, create_graph=True)
        (second,) = torch.autograd.grad(first[:, 0].sum(), x, create_graph=True)
        return u * (first[:, :1] + 5 * second[:, 1:])


def test_derivatives_in_the_model() -> None:
    x, y = torch.randn(5, 2).double(), torch.arange(5) % 3
    check(
        Residual(),
        lambda m: F.cross_entropy(m(x), y),
        lambda m: [m(row[None]) for row in x],
        {"net.0", "net.2", "net.4"},
    )


class Scaled(nn.Module):
    """A network whose gradients are made smaller behind its output, by a hook or otherwise."""

    def __init__(self, hooked: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.hooked, self.body, self.head = hooked, nn.Linear(4, 5), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        z = self.head(self.body(x).tanh())
        if not self.hooked:
            return z / 8 + 7 * z.detach() / 8
        z.register_hook(lambda gradient: gradient / 8)
        return z


def test_a_hook_on_the_output_scales_the_curvature_of_all_layers() -> None:
    x, y = torch.randn(6, 4).double(), torch.arange(6) % 3
    found = []
    for hooked in (True, False):
        optimizer = tekfac.EKFAC(Scaled(hooked).double(), **EXACT)
        F.cross_entropy(optimizer.model(x), y).backward()
        optimizer.step()
        found.append({name: block.trace for name, block in optimizer.blocks.items()})
    assert found[0] == pytest.approx(found[1], rel=1e-9)

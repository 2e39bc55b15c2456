"""Tables that are looked up: layers with one-hot inputs, of which none is ever made."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import parametrizations
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import reference
import tekfac
from harness import METHODS, RESCALED, SideBySide, Waits, relative
from processes import together
from tekfac.curvature.statistics import counted, squared_lookups
from tekfac.layers import EmbeddingLayer

TOKENS, WIDTH, CLASSES = 9, 4, 3
FISHERS = ["exact", "empirical"]


class Classifier(nn.Module):
    """One label for all tokens of an example."""

    def __init__(self, padding: int | None = None, **options: Any) -> None:
        super().__init__()
        self.table = nn.Embedding(TOKENS, WIDTH, padding_idx=padding, **options)
        self.hidden, self.head = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.hidden(self.table(x)).tanh().mean(1))


class Tagger(Classifier):
    """A label for each token."""

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.hidden(self.table(x)).tanh()).mT


def tokens(examples: int, positions: int) -> Tensor:
    """Some twice in an example, and the last entry never."""
    x = torch.randint(TOKENS - 1, (examples, positions))
    x[:, -1] = x[:, 0]
    return x


def settings(method: str, **options: Any) -> dict[str, Any]:
    every = {"factor_every": 1, "basis_every": 1, "interval_warmup": False}
    return {**every, **({"scale_every": 1} if method in RESCALED else {}), **options}


# -- against dense matrices ------------------------------------------------------------------------


@pytest.mark.parametrize("padding", [None, 2])
@pytest.mark.parametrize("fisher", FISHERS)
@pytest.mark.parametrize("method", METHODS)
def test_the_dense_matrix(method: str, fisher: str, padding: int | None) -> None:
    torch.manual_seed(0)
    pair = SideBySide(Classifier(padding).double(), method, fisher=fisher)
    for _ in range(2):
        pair.step(tokens(6, 5), torch.randint(CLASSES, (6,)))
    pair.check_blocks()
    pair.check_parameters()
    assert isinstance(pair.fast.blocks["table"].layer, EmbeddingLayer)


@pytest.mark.parametrize("fisher", FISHERS)
@pytest.mark.parametrize("method", METHODS)
def test_a_label_for_each_token(method: str, fisher: str) -> None:
    """Some of which the loss leaves out."""
    torch.manual_seed(0)
    pair = SideBySide(Tagger().double(), method, fisher=fisher)
    for _ in range(2):
        y = torch.randint(CLASSES, (5, 4))
        y[0, 1] = y[3] = -100
        pair.step(tokens(5, 4), y)
    pair.check_blocks()
    pair.check_parameters()


@pytest.mark.parametrize(
    "rule", [reference.Mean(0.3), reference.Factored(0.1), reference.Relative(0.1)]
)
@pytest.mark.parametrize("method", METHODS)
def test_damping_rules(method: str, rule: Any) -> None:
    torch.manual_seed(0)
    pair = SideBySide(Classifier().double(), method, damping=rule, power=0.5)
    for _ in range(2):
        pair.step(tokens(6, 5), torch.randint(CLASSES, (6,)))
    pair.check_blocks()
    pair.check_parameters()


@pytest.mark.parametrize("power", [None, 1.0, 0.75])
@pytest.mark.parametrize("method", METHODS)
def test_by_default_a_table_is_divided_by_the_root(method: str, power: float | None) -> None:
    torch.manual_seed(0)
    model = Classifier().double()
    optimizer = getattr(tekfac, method)(
        model, lr=0.1, momentum=0.0, damping=0.01, power=power, rms_clip=None, **settings(method)
    )
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    F.cross_entropy(model(tokens(6, 5)), torch.randint(CLASSES, (6,))).backward()
    optimizer.step()
    for name, default in (("table", 0.5), ("hidden", 1.0)):
        # A table's matrix is its transpose: entries are columns.
        own = [f"{name}.weight"] + [f"{name}.bias"] * (name == "hidden")
        weight, *biases = (model.get_parameter(each) for each in own)
        moved = [p.detach() - before[each] for each, p in zip(own, (weight, *biases), strict=True)]
        parts = [[p.grad for p in (weight, *biases)], moved]
        gradient, step = (
            torch.cat([first.T if name == "table" else first, *(r[:, None] for r in rest)], 1)
            for first, *rest in parts
        )
        values, vectors = torch.linalg.eigh(optimizer.blocks[name].dense(damped=True))
        divided = values ** -(default if power is None else power)
        expected = vectors @ (divided * (vectors.T @ gradient.flatten()))
        assert relative(-step.flatten() / 0.1, expected) < 1e-9


def true_trace(model: nn.Module, weight: Tensor, x: Tensor) -> float:
    """Of the Fisher matrix, example by example and class by class."""
    trace = 0.0
    for row in x:
        for each in model(row[None])[0].log_softmax(0):
            (d,) = torch.autograd.grad(each, weight, retain_graph=True)
            trace += float(each.detach().exp() * d.square().sum()) / len(x)
    return trace


@pytest.mark.parametrize("method", RESCALED)
def test_the_trace_is_the_fisher_matrix_s(method: str) -> None:
    torch.manual_seed(0)
    model, x = Classifier().double(), tokens(6, 5)
    optimizer = getattr(tekfac, method)(model, fisher="exact", lr=0.0, **settings(method))
    F.cross_entropy(model(x), torch.arange(6) % CLASSES).backward()
    trace = true_trace(model, model.table.weight, x)
    optimizer.step()
    assert optimizer.blocks["table"].trace == pytest.approx(trace, rel=1e-12)


class OneHot(Classifier):
    """The same with a matrix that one-hot rows are multiplied with."""

    def __init__(self, like: Classifier) -> None:
        super().__init__()
        self.table = nn.Linear(*like.table.weight.shape, bias=False)  # type: ignore[assignment]
        self.hidden, self.head = copy.deepcopy(like.hidden), copy.deepcopy(like.head)
        self.double().table.weight.data = like.table.weight.detach().T.clone()

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(F.one_hot(x, TOKENS).double())


@pytest.mark.parametrize("method", METHODS)
def test_leading_eigenvectors_of_the_output_side(method: str) -> None:
    """As of a linear layer that sees one-hot rows; of its own inputs that one keeps all.

    Each batch has all entries, so that damping counts all for both.
    """
    torch.manual_seed(0)
    table = Classifier().double()
    table.table, table.hidden = nn.Embedding(TOKENS, 20), nn.Linear(20, WIDTH)
    matrix = OneHot(table.double())
    data = []
    for _ in range(3):
        x = torch.cat([torch.arange(TOKENS), torch.randint(TOKENS, (21,))]).view(6, 5)
        data.append((x, torch.randint(CLASSES, (6,))))
    blocks = []
    for model in (table, matrix):
        optimizer = getattr(tekfac, method)(
            model, fisher="exact", lr=0.1, rank=3, power=1.0, **settings(method)
        )
        for x, y in data:
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
        blocks.append(optimizer.blocks["table"])
    assert blocks[0].kept == (0, 3)
    assert blocks[1].kept == (TOKENS, 3)
    vector = torch.randn(20, TOKENS).double()
    for ask in ("matvec", "inverse_matvec"):
        found, expected = (getattr(block, ask)(vector) for block in blocks)
        assert relative(found, expected) < 1e-8
    assert relative(blocks[0].dense(), blocks[1].dense()) < 1e-8
    assert relative(table.table.weight.T, matrix.table.weight) < 1e-10


# -- however a table is used -----------------------------------------------------------------------


class Table(nn.Module):
    """A parameter that is looked up in some way, in front of a head."""

    def __init__(self, use: Callable[[Tensor, Tensor], Tensor], *shape: int) -> None:
        super().__init__()
        self.use, self.rows = use, nn.Parameter(torch.randn(*shape))
        self.head = nn.Linear(WIDTH, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.use(x, self.rows).tanh()).mean(1)


@pytest.mark.parametrize(
    ("use", "shape"),
    [
        (F.embedding, (TOKENS, WIDTH)),
        (lambda x, w: F.embedding(x, w.t()), (WIDTH, TOKENS)),
        (lambda x, w: F.embedding(x, w[2:]), (TOKENS + 2, WIDTH)),
        (lambda x, w: F.embedding(x, w[:TOKENS]), (TOKENS + 2, WIDTH)),
        (lambda x, w: F.embedding(x, w, padding_idx=1), (TOKENS, WIDTH)),
        (lambda x, w: F.embedding(x, w, padding_idx=-1), (TOKENS, WIDTH)),
        (lambda x, w: F.embedding(x, w[2:], padding_idx=1), (TOKENS + 2, WIDTH)),
        (lambda x, w: F.embedding(x, w) + F.embedding(x.flip(1), w).sin(), (TOKENS, WIDTH)),
        (lambda x, w: F.embedding(x.int(), w), (TOKENS, WIDTH)),
        (lambda x, w: checkpoint(F.embedding, x, w, use_reentrant=False), (TOKENS, WIDTH)),
        (lambda x, w: w[x], (TOKENS, WIDTH)),
        (lambda x, w: w[x - TOKENS], (TOKENS, WIDTH)),
        (lambda x, w: w[2:][x], (TOKENS + 2, WIDTH)),
        (lambda x, w: w.t()[x], (WIDTH, TOKENS)),
        (lambda x, w: w.index_select(0, x.flatten()).view(*x.shape, WIDTH), (TOKENS, WIDTH)),
        (lambda x, w: w[x] + F.embedding(x.flip(1), w).sin(), (TOKENS, WIDTH)),
        (lambda x, w: checkpoint(lambda x, w: w[x], x, w, use_reentrant=False), (TOKENS, WIDTH)),
    ],
)
def test_functions(use: Callable[[Tensor, Tensor], Tensor], shape: tuple[int, int]) -> None:
    """The block of EKFAC is the best diagonal of the true matrix in its basis."""
    torch.manual_seed(0)
    model, x = Table(use, *shape).double(), torch.randint(TOKENS, (6, 5))
    x[:, 3] = x[:, 1]
    optimizer = tekfac.EKFAC(model, fisher="exact", lr=0.0, **settings("EKFAC"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        F.cross_entropy(model(x), torch.arange(6) % CLASSES).backward()
        optimizer.step()
    block = optimizer.blocks["rows"]
    assert isinstance(block.layer, EmbeddingLayer)
    truth = torch.zeros(block.dim, block.dim).double()
    for row in x:
        log_p = model(row[None])[0].log_softmax(0)
        for each in log_p:
            (d,) = torch.autograd.grad(each, model.rows, retain_graph=True)
            vector = block.layer.to_vector(block.layer.matrix(d, None)).flatten()
            truth += each.exp().detach() * torch.outer(vector, vector) / len(x)
    found = block.dense()
    assert block.trace == pytest.approx(float(truth.trace()), rel=1e-10)
    assert abs(float(((truth - found) * found).sum())) < 1e-10 * float(truth.square().sum())


class Positions(Classifier):
    """Rows of a second table go to every example."""

    def __init__(self) -> None:
        super().__init__()
        self.places = nn.Embedding(5, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        h = self.table(x) + self.places(torch.arange(x.shape[1]))
        return self.head(self.hidden(h).tanh().mean(1))


@pytest.mark.parametrize("method", METHODS)
def test_rows_that_examples_share(method: str) -> None:
    """All of them are taken for one example, whose gradient is the examples' sum."""
    torch.manual_seed(0)
    model, x = Positions().double(), tokens(6, 5)
    optimizer = getattr(tekfac, method)(model, fisher="empirical", **settings(method))
    F.cross_entropy(model(x), torch.arange(6) % CLASSES).backward()
    gradient = 6 * model.places.weight.grad
    optimizer.step()
    assert optimizer.summary().entries[-1].order == "shared"
    block = optimizer.blocks["places"]
    if method in RESCALED:
        assert block.trace == pytest.approx(float(gradient.square().sum()) / 6, rel=1e-10)
    values = block.eigenvalues
    assert values.shape == (WIDTH, 5)


class Both(Classifier):
    """Its table is looked up, and from some time on the output's weight, too."""

    tied = True

    def forward(self, x: Tensor) -> Tensor:
        h = self.hidden(self.table(x)).tanh().mean(1)
        return F.linear(h, self.table.weight) if self.tied else F.pad(self.head(h), (0, 6))


def test_a_table_that_is_seen_to_be_multiplied() -> None:
    torch.manual_seed(0)
    model, x = Both().double(), tokens(6, 5)
    optimizer = tekfac.EKFAC(model, fisher="exact", lr=0.0, **settings("EKFAC"))
    F.cross_entropy(model(x), x[:, 0]).backward()
    trace = true_trace(model, model.table.weight, x)
    optimizer.step()
    block = optimizer.blocks["table"]
    assert not isinstance(block.layer, EmbeddingLayer)
    assert block.trace == pytest.approx(trace, rel=1e-10)


def test_a_table_that_is_multiplied_later() -> None:
    torch.manual_seed(0)
    model, x = Both().double(), tokens(6, 5)
    optimizer = tekfac.EKFAC(model, fisher="exact", lr=0.0, **settings("EKFAC"))
    model.tied = False
    F.cross_entropy(model(x), x[:, 0]).backward()
    optimizer.step()
    before = optimizer.blocks["table"].dense()
    model.tied = True
    for _ in range(2):
        optimizer.zero_grad()
        F.cross_entropy(model(x), x[:, 0]).backward()
        optimizer.step()
    F.cross_entropy(model(x), x[:, 0]).backward()
    with pytest.warns(RuntimeWarning, match="curvature of layers 'table' stays as it was"):
        optimizer.step()
    assert "MmBackward0" in optimizer.treatment()["table.weight"]
    torch.testing.assert_close(optimizer.blocks["table"].dense(), before)


def test_what_is_no_table() -> None:
    bag = nn.EmbeddingBag(TOKENS, WIDTH, mode="max")
    scaled = nn.Embedding(TOKENS, WIDTH, scale_grad_by_freq=True)
    optimizer = tekfac.TEKFAC(nn.ModuleDict({"bag": bag, "scaled": scaled, "l": nn.Linear(4, 3)}))
    assert set(optimizer.blocks) == {"l"}
    treatment = optimizer.treatment()
    assert treatment["bag.weight"] == (
        "first order: EmbeddingBag with mode='max' multiplies each column with other entries"
    )
    assert treatment["scaled.weight"] == (
        "first order: Embedding with scale_grad_by_freq=True gets what is no gradient of the loss"
    )


def test_a_table_with_weight_norm() -> None:
    """Each entry is scaled by itself: no function of the rows of W."""
    model = Classifier()
    parametrizations.weight_norm(model.table)
    optimizer = tekfac.TEKFAC(model)
    F.cross_entropy(model(tokens(6, 5)), torch.arange(6) % CLASSES).backward()
    optimizer.step()
    assert set(optimizer.blocks) >= {"hidden", "head"}
    assert {name for name, words in optimizer.treatment().items() if "first order" in words} == {
        "table.parametrizations.weight.original0",
        "table.parametrizations.weight.original1",
    }


def test_gradients_by_frequency() -> None:
    model = Table(lambda x, w: F.embedding(x, w, scale_grad_by_freq=True), TOKENS, WIDTH)
    optimizer = tekfac.TEKFAC(model)
    F.cross_entropy(model(tokens(6, 5)), torch.arange(6) % CLASSES).backward()
    optimizer.step()
    words = "first order: used by EmbeddingBackward0, which is no product known here"
    assert optimizer.treatment()["rows"] == words


# -- size ------------------------------------------------------------------------------------------


class Sizes(TorchDispatchMode):
    """The most entries of any tensor that is made."""

    def __init__(self) -> None:
        super().__init__()
        self.largest = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        for each in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(each, Tensor):
                self.largest = max(self.largest, each.untyped_storage().nbytes() // 4)
        return result


@pytest.mark.parametrize("method", METHODS)
def test_nothing_is_larger_than_the_table(method: str) -> None:
    """Neither one-hot rows, which would be 40 times as large, nor a factor of its entries."""
    torch.manual_seed(0)
    entries, width = 50_000, 12
    model = nn.Sequential(nn.Embedding(entries, width), nn.Linear(width, CLASSES))
    optimizer = getattr(tekfac, method)(model, **settings(method))
    sizes = Sizes()
    for _ in range(2):
        x, y = torch.randint(entries, (500,)), torch.randint(CLASSES, (500,))
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        with sizes:
            optimizer.step()
    assert 0 < sizes.largest <= entries * width
    block = optimizer.blocks["0"]
    held = sum(
        value.numel() * value.element_size()
        for name, value in block.state_dict().items()
        if name not in ("row_norm", "silent", "positions", "factor.delta", "factor.input_seen")
    )
    assert block.state_bytes == held
    assert block.work == 0
    vector = torch.randn(width, entries)
    assert block.inverse_matvec(vector).shape == vector.shape


def test_statistics_do_not_wait_for_the_device() -> None:
    entries, g = torch.randint(-1, 9, (1, 6, 5)), torch.randn(1, 6, 5, 4)
    with Waits() as waits:
        counted(entries, 1.0, torch.zeros(1, 9))
        squared_lookups(entries, g, torch.eye(4)[None], torch.zeros(1, 9, 4))
    assert not waits.found


def test_storage() -> None:
    torch.manual_seed(0)
    model = Classifier()
    optimizer = tekfac.TEKFAC(model, storage=torch.bfloat16, **settings("TEKFAC"))
    F.cross_entropy(model(tokens(6, 5)), torch.arange(6) % CLASSES).backward()
    optimizer.step()
    state = optimizer.blocks["table"].state_dict()
    for name in ("factor.input", "factor.output", "basis.output", "scale"):
        assert state[name].dtype == torch.bfloat16, name
    assert state["basis.input_values"].dtype == torch.float32


# -- states and ranks ------------------------------------------------------------------------------


def trained(model: nn.Module, optimizer: tekfac.NaturalGradient, steps: range) -> list[Tensor]:
    for step in steps:
        torch.manual_seed(step)
        optimizer.zero_grad()
        F.cross_entropy(model(tokens(6, 5)), torch.randint(CLASSES, (6,))).backward()
        optimizer.step()
    return [p.detach().clone() for p in model.parameters()]


@pytest.mark.parametrize("function", [False, True])
@pytest.mark.parametrize("method", METHODS)
def test_a_resumed_run_goes_on_bit_for_bit(method: str, function: bool) -> None:
    """Also that of a parameter of which only its use tells that it is a table."""
    torch.manual_seed(0)
    model = Table(F.embedding, TOKENS, WIDTH) if function else Classifier()
    make, options = getattr(tekfac, method), settings(method) | {"factor_every": 2}
    optimizer = make(model, **options)
    trained(model, optimizer, range(3))
    state, other = copy.deepcopy(optimizer.state_dict()), copy.deepcopy(model)
    expected = trained(model, optimizer, range(3, 8))
    resumed = make(other, **options)
    resumed.load_state_dict(state)
    found = trained(other, resumed, range(3, 8))
    assert all(map(torch.equal, found, expected))


def test_a_state_from_before_tables_were_layers() -> None:
    torch.manual_seed(0)
    older, model = Classifier(), Classifier()
    optimizer = tekfac.TEKFAC(older, exclude=[nn.Embedding], **settings("TEKFAC"))
    trained(older, optimizer, range(3))
    resumed = tekfac.TEKFAC(model, **settings("TEKFAC"))
    resumed.load_state_dict(optimizer.state_dict())
    assert resumed.blocks["table"].empty
    trained(model, resumed, range(3, 5))
    assert not resumed.blocks["table"].empty


def on_ranks(method: str, data: Sequence[Any], options: dict[str, Any]) -> list[Tensor]:
    torch.manual_seed(0)
    model = Classifier(2).double()
    called = DistributedDataParallel(model)
    optimizer = getattr(tekfac, method)(called, **options)
    for x, y in data:
        optimizer.zero_grad()
        half = slice(dist.get_rank() * 3, dist.get_rank() * 3 + 3)
        F.cross_entropy(called(x[half]), y[half]).backward()
        optimizer.step()
    return [p.detach().clone() for p in model.parameters()]


@pytest.mark.parametrize("placement", ["replicated", "sharded"])
@pytest.mark.parametrize("method", METHODS)
def test_two_ranks_are_as_one_process(method: str, placement: str) -> None:
    torch.manual_seed(1)
    data = [(tokens(6, 5), torch.randint(CLASSES, (6,))) for _ in range(4)]
    options = settings(method, fisher="exact", lr=0.1) | {"factor_every": 2, "basis_every": 3}
    torch.manual_seed(0)
    model = Classifier(2).double()
    optimizer = getattr(tekfac, method)(model, **options)
    for x, y in data:
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
    for found in together(2, on_ranks, method, data, options | {"placement": placement}):
        for p, expected in zip(found, model.parameters(), strict=True):
            assert relative(p, expected) < 1e-7


def test_what_takes_parts_of_rows_is_no_lookup() -> None:
    torch.manual_seed(0)
    x = torch.randint(TOKENS, (6, 5))
    for use in (
        lambda x, w: w[:, torch.arange(WIDTH).flip(0)][x],
        lambda x, w: w[x[..., None], torch.arange(WIDTH)],
        lambda x, w: w.index_select(1, torch.arange(WIDTH))[x],
    ):
        model = Table(use, TOKENS, WIDTH).double()
        optimizer = tekfac.EKFAC(model, fisher="exact", **settings("EKFAC"))
        F.cross_entropy(model(x), torch.arange(6) % CLASSES).backward()
        optimizer.step()
        assert optimizer.blocks["rows"].empty
        assert "first order: used by" in optimizer.treatment()["rows"]

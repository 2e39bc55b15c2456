"""Precision, failed decompositions, batches that are not finite, and degenerate ones."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import tekfac
from harness import METHODS, RESCALED, relative

FISHERS = ["mc", "exact", "empirical"]
EIGH = torch.linalg.eigh


def network(dtype: torch.dtype = torch.float32) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 3, 2), nn.ReLU(), nn.Flatten(), nn.Linear(27, 6), nn.ReLU(), nn.Linear(6, 3)
    ).to(dtype)


def batch(step: int, examples: int = 6) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(step)
    x = torch.randn(examples, 1, 4, 4, generator=generator)
    return x, torch.randint(3, (examples,), generator=generator)


def build(method: str, model: nn.Module, **options: Any) -> tekfac.NaturalGradient:
    """An optimizer that measures everything in every step."""
    names = ["factor_every", "basis_every", *(["scale_every"] if method in RESCALED else [])]
    return getattr(tekfac, method)(model, **{"lr": 0.01, **dict.fromkeys(names, 1), **options})


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> None:
    for step in steps:
        x, y = batch(step)
        model.zero_grad()  # not the optimizer's, which would tidy up
        F.cross_entropy(model(x.to(next(model.parameters()).dtype)), y).backward()
        optimizer.step()


def finite(model: nn.Module, optimizer: torch.optim.Optimizer) -> bool:
    """Whether parameters and momentum are."""
    momenta = [s["momentum_buffer"] for s in optimizer.state.values() if "momentum_buffer" in s]
    return all(bool(t.isfinite().all()) for t in [*model.parameters(), *momenta])


def learnt(optimizer: tekfac.NaturalGradient) -> list[dict[str, Tensor]]:
    """The estimates of all blocks, with all that is in them, copied."""
    states = copy.deepcopy(optimizer.state_dict())["state"].values()
    return [{k: v for k, v in state.items() if k.startswith("block.")} for state in states]


def unchanged(
    found: list[dict[str, Tensor]], expected: list[dict[str, Tensor]], part: str = "block."
) -> bool:
    return all(
        torch.equal(state[name], value)
        for state, values in zip(found, expected, strict=True)
        for name, value in values.items()
        if name.startswith(part)
    )


@pytest.fixture
def caught() -> Iterator[list[warnings.WarningMessage]]:
    with warnings.catch_warnings(record=True) as messages:
        warnings.simplefilter("always")
        yield messages


# -- precision -------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("method", METHODS)
def test_precision(method: str, dtype: torch.dtype) -> None:
    model = network(dtype)
    optimizer = build(method, model, lr=0.05, damping=0.1)
    x, y = batch(0)
    losses = []
    for _ in range(15):
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x.to(dtype)), y)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]
    wide = torch.promote_types(dtype, torch.float32)
    for state in learnt(optimizer):
        assert {v.dtype for v in state.values() if v.is_floating_point()} in ({wide}, set())
    for block in optimizer.blocks.values():
        assert block.eigenvalues.dtype == wide
        assert block.matvec(torch.ones(block.dim, dtype=dtype)).dtype == wide
    for p in model.parameters():
        assert p.dtype == dtype
        assert optimizer.state[p]["momentum_buffer"].dtype == dtype


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.bfloat16, 0.1)])
@pytest.mark.parametrize("method", METHODS)
def test_lower_precision_finds_nearly_the_same_curvature(
    method: str, dtype: torch.dtype, tolerance: float
) -> None:
    low = network(dtype)
    high = copy.deepcopy(low).double()
    optimizers = [build(method, model, fisher="exact") for model in (low, high)]
    for model, optimizer in zip((low, high), optimizers, strict=True):
        train(model, optimizer, range(1))
    for name, block in optimizers[0].blocks.items():
        expected = optimizers[1].blocks[name]
        assert relative(block.dense().double(), expected.dense()) < tolerance
        assert block.trace == pytest.approx(expected.trace, rel=tolerance)


# -- eigendecompositions ---------------------------------------------------------------------------


@dataclass
class Unreliable:
    """`torch.linalg.eigh` that fails for some dtypes."""

    failing: tuple[torch.dtype, ...]
    calls: list[torch.dtype]

    def __call__(self, matrix: Tensor) -> Any:
        self.calls.append(matrix.dtype)
        if matrix.dtype in self.failing:
            raise torch.linalg.LinAlgError("the algorithm failed to converge")
        return EIGH(matrix)


@pytest.mark.parametrize("method", METHODS)
def test_a_failed_decomposition_is_retried_in_float64(
    method: str, monkeypatch: pytest.MonkeyPatch, caught: list[warnings.WarningMessage]
) -> None:
    model, other = network(), network()
    train(other, build(method, other), range(4))
    unreliable = Unreliable((torch.float32,), [])
    monkeypatch.setattr(torch.linalg, "eigh", unreliable)
    optimizer = build(method, model)
    train(model, optimizer, range(4))
    assert set(unreliable.calls) == {torch.float32, torch.float64}
    assert optimizer.counters["failed_decompositions"] == 0
    assert not caught
    for state in learnt(optimizer):
        assert all(value.dtype != torch.float64 for value in state.values())
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("wrong", ["raises", "nan"])
@pytest.mark.parametrize("method", METHODS)
def test_the_last_good_basis_stays_if_every_attempt_fails(
    method: str,
    wrong: str,
    monkeypatch: pytest.MonkeyPatch,
    caught: list[warnings.WarningMessage],
) -> None:
    model = network()
    optimizer = build(method, model)
    train(model, optimizer, range(2))
    before = learnt(optimizer)
    with monkeypatch.context() as patch:
        if wrong == "raises":
            patch.setattr(torch.linalg, "eigh", Unreliable((torch.float32, torch.float64), []))
        else:
            patch.setattr(torch.linalg, "eigh", lambda m: (m[..., 0] * torch.nan, m * torch.nan))
        train(model, optimizer, range(2, 5))
    after = learnt(optimizer)
    assert unchanged(after, before, "block.basis.")
    assert not unchanged(after, before, "block.factor.")  # these are still measured
    if method in RESCALED:
        assert not unchanged(after, before, "block.scale")
    assert optimizer.counters["failed_decompositions"] == 3 * len(optimizer.blocks)
    assert [str(w.message).partition(":")[0] for w in caught] == [
        "no eigendecomposition of layer '0''s factors could be found, in float64 either"
    ]
    assert finite(model, optimizer)
    train(model, optimizer, range(5, 6))
    assert not unchanged(learnt(optimizer), before, "block.basis.")
    assert optimizer.counters == {
        "steps": 6, "skipped_steps": 0, "skipped_statistics": 0, "failed_decompositions": 9,
    }  # fmt: skip


@pytest.mark.parametrize("method", METHODS)
def test_no_decomposition_in_the_first_step(
    method: str, monkeypatch: pytest.MonkeyPatch, caught: list[warnings.WarningMessage]
) -> None:
    model = network()
    optimizer = build(method, model, factor_every=10, basis_every=10)
    before = copy.deepcopy(model)
    with monkeypatch.context() as patch:
        patch.setattr(torch.linalg, "eigh", Unreliable((torch.float32, torch.float64), []))
        train(model, optimizer, range(2))
    assert len(caught) == 1
    assert all(block.empty for block in optimizer.blocks.values())
    # The first-order rule trains them meanwhile, and the next step tries again.
    assert not any(map(torch.equal, before.parameters(), model.parameters()))
    train(model, optimizer, range(2, 3))
    assert not any(block.empty for block in optimizer.blocks.values())
    assert optimizer.counters["failed_decompositions"] == 2 * len(optimizer.blocks)
    assert finite(model, optimizer)


# -- batches that are not finite -------------------------------------------------------------------


class Poisoned(tekfac.Categorical):
    """Labels whose gradients are spoilt on demand, while the user's own stay finite."""

    def sample(self, output: Tensor, generator: torch.Generator) -> Tensor:
        cotangent = super().sample(output, generator)
        if poison:
            cotangent[0] = poison[0]
        return cotangent


poison: list[float] = []


@pytest.fixture
def spoil() -> Iterator[Callable[[float], None]]:
    yield poison.append
    poison.clear()


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("method", METHODS)
def test_statistics_that_are_not_finite_are_left_out(
    method: str,
    value: float,
    spoil: Callable[[float], None],
    caught: list[warnings.WarningMessage],
) -> None:
    model = network()
    optimizer = build(method, model, likelihood=Poisoned())
    train(model, optimizer, range(3))
    before = learnt(optimizer)
    spoil(value)
    parameters = copy.deepcopy(model)
    train(model, optimizer, range(3, 5))
    poison.clear()
    assert unchanged(learnt(optimizer), before)
    assert not any(map(torch.equal, parameters.parameters(), model.parameters()))
    blocks = len(optimizer.blocks)
    assert optimizer.counters == {
        "steps": 5, "skipped_steps": 0, "skipped_statistics": 2 * blocks,
        "failed_decompositions": 0,
    }  # fmt: skip
    assert len(caught) == 1
    assert issubclass(caught[0].category, RuntimeWarning)
    assert str(caught[0].message) == (
        "statistics of layer '0' are not finite in this batch: they were left out "
        "(counters['skipped_statistics'] counts such batches)"
    )
    train(model, optimizer, range(5, 8))
    assert finite(model, optimizer)
    assert not unchanged(learnt(optimizer), before)
    assert optimizer.counters["skipped_statistics"] == 2 * blocks


@pytest.mark.parametrize("method", METHODS)
def test_the_first_statistics_are_not_finite(
    method: str, spoil: Callable[[float], None], caught: list[warnings.WarningMessage]
) -> None:
    model = network()
    optimizer = build(method, model, likelihood=Poisoned(), factor_every=10, basis_every=10)
    before = copy.deepcopy(model)
    spoil(torch.nan)
    train(model, optimizer, range(1))
    poison.clear()
    assert all(block.empty for block in optimizer.blocks.values())
    assert not any(map(torch.equal, before.parameters(), model.parameters()))
    train(model, optimizer, range(1, 4))  # measured as soon as it can be, not 10 steps later
    assert not any(block.empty for block in optimizer.blocks.values())
    assert optimizer.counters["skipped_statistics"] == len(optimizer.blocks)
    assert len(caught) == 1
    assert finite(model, optimizer)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("fisher", ["exact", "empirical"])
@pytest.mark.parametrize("method", METHODS)
def test_a_gradient_that_is_not_finite_might_not_have_been(
    method: str, fisher: str, value: float, caught: list[warnings.WarningMessage]
) -> None:
    def bad(model: nn.Module, optimizer: tekfac.NaturalGradient) -> None:
        x, y = batch(99)
        x[0, 0, 0, 0] = value
        model.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()

    model, other = network(), network()
    options = {"fisher": fisher, "factor_every": 2, "basis_every": 3, "weight_decay": 0.1}
    optimizer, reference = (build(method, m, **options) for m in (model, other))
    for step in range(5):
        bad(model, optimizer)  # before the first step, too
        train(model, optimizer, range(step, step + 1))
        train(other, reference, range(step, step + 1))
        assert unchanged(learnt(optimizer), learnt(reference))
        for p, q in zip(model.parameters(), other.parameters(), strict=True):
            assert torch.equal(p, q)
            assert torch.equal(
                optimizer.state[p]["momentum_buffer"], reference.state[q]["momentum_buffer"]
            )
    assert optimizer.counters == {**reference.counters, "skipped_steps": 5}
    assert len(caught) == 1
    assert str(caught[0].message) == (
        "the gradient of '0.weight' is not finite: the step was skipped, parameters, momentum and "
        "curvature are as they were (counters['skipped_steps'] counts such steps)"
    )


def test_a_first_order_gradient_that_is_not_finite_skips_the_step() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.LayerNorm(3))
    optimizer = build("TEKFAC", model)
    F.cross_entropy(model(torch.randn(4, 3)), torch.tensor([0, 1, 2, 0])).backward()
    model[1].bias.grad[0] = torch.nan
    before = copy.deepcopy(model)
    with pytest.warns(RuntimeWarning, match=r"the gradient of '1.bias' is not finite"):
        optimizer.step()
    assert all(map(torch.equal, before.parameters(), model.parameters()))
    assert not optimizer.state
    assert optimizer.blocks["0"].empty


def test_a_gradient_that_is_not_finite_outside_the_model() -> None:
    model, outside = network(), nn.Parameter(torch.ones(1))
    optimizer = build("KFAC", model)
    optimizer.add_param_group({"params": [outside]})
    outside.grad = torch.full((1,), torch.inf)
    with pytest.warns(RuntimeWarning, match="gradient of a parameter outside the model"):
        optimizer.step()


# -- degenerate batches ----------------------------------------------------------------------------


def zero_gradient(step: int) -> tuple[Tensor, Tensor, float]:
    return *batch(step), 0.0


def zero_gradient_first(step: int) -> tuple[Tensor, Tensor, float]:
    return *batch(step), float(step > 0)


def zero_gradient_later(step: int) -> tuple[Tensor, Tensor, float]:
    return *batch(step), float(step != 1)


def one_example(step: int) -> tuple[Tensor, Tensor, float]:
    return *batch(step, 1), 1.0


def all_zero_input(step: int) -> tuple[Tensor, Tensor, float]:
    x, y = batch(step)
    return torch.zeros_like(x), y, 1.0


def scaled_input(factor: float) -> Callable[[int], tuple[Tensor, Tensor, float]]:
    def make(step: int) -> tuple[Tensor, Tensor, float]:
        x, y = batch(step)
        return x * factor, y, 1.0

    return make


def tiny_loss(step: int) -> tuple[Tensor, Tensor, float]:
    return *batch(step), 1e-20


DEGENERATE = {
    "zero gradient": zero_gradient,
    "zero gradient first": zero_gradient_first,
    "zero gradient later": zero_gradient_later,
    "one example": one_example,
    "all-zero input": all_zero_input,
    "huge input": scaled_input(1e20),
    "large input": scaled_input(1e15),
    "tiny input": scaled_input(1e-20),
    "tiny loss": tiny_loss,
}


@pytest.mark.filterwarnings("ignore:statistics of layer", "ignore:the gradient of")
# With a bias and without in turns, so that any two of the four meet.
@pytest.mark.parametrize(
    ("name", "method", "fisher", "bias"),
    [
        (name, method, fisher, (i + j + k) % 2 == 0)
        for i, name in enumerate(DEGENERATE)
        for j, method in enumerate(METHODS)
        for k, fisher in enumerate(FISHERS)
    ],
)
def test_degenerate_batches_step_finitely(name: str, method: str, fisher: str, bias: bool) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 3, 2, bias=bias), nn.ReLU(), nn.Flatten(), nn.Linear(27, 3, bias=bias)
    )
    optimizer = build(method, model, fisher=fisher)
    for step in range(4):
        x, y, factor = DEGENERATE[name](step)
        optimizer.zero_grad()
        (F.cross_entropy(model(x), y) * factor).backward()
        optimizer.step()
        assert finite(model, optimizer)
    assert optimizer.counters["failed_decompositions"] == 0
    if name not in ("huge input", "large input"):
        assert optimizer.counters["steps"] == 4
        assert optimizer.counters["skipped_statistics"] == 0


@pytest.mark.parametrize("fisher", FISHERS)
@pytest.mark.parametrize("method", METHODS)
def test_zero_gradients_move_nothing(method: str, fisher: str) -> None:
    model = network()
    optimizer = build(method, model, fisher=fisher)
    before = copy.deepcopy(model)
    for step in range(3):
        x, y = batch(step)
        optimizer.zero_grad()
        (F.cross_entropy(model(x), y) * 0).backward()
        optimizer.step()
    assert all(map(torch.equal, before.parameters(), model.parameters()))
    assert all(block.empty for block in optimizer.blocks.values())
    # They are no estimate to average with: the first batch that says something is taken whole.
    fresh = build(method, before, fisher=fisher)
    for steps in (range(3, 4), range(4, 5)):
        train(model, optimizer, steps)
        train(before, fresh, steps)
    assert not any(block.empty for block in optimizer.blocks.values())
    if fisher != "mc":
        assert unchanged(learnt(optimizer), learnt(fresh), "block.factor.")


@pytest.mark.parametrize("dies", [0, 2])
@pytest.mark.parametrize("fisher", FISHERS)
@pytest.mark.parametrize("method", METHODS)
def test_a_dead_layer_steps_finitely(method: str, fisher: str, dies: int) -> None:
    model = network()
    optimizer = build(method, model, fisher=fisher)
    for step in range(6):
        if step == dies:
            with torch.no_grad():
                model[3].bias.fill_(-100)
        train(model, optimizer, range(step, step + 1))
        assert finite(model, optimizer)
    assert not optimizer.blocks["5"].empty
    assert model[5].bias.grad.any()
    assert not model[3].bias.grad.any()


@pytest.mark.parametrize("damping", [1e-2, 1e-12])
@pytest.mark.parametrize("fisher", FISHERS)
@pytest.mark.parametrize("method", METHODS)
def test_rank_deficient_factors(method: str, fisher: str, damping: float) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(50, 20), nn.ReLU(), nn.Linear(20, 30))
    optimizer = build(method, model, fisher=fisher, damping=damping, lr=1e-6)
    for _ in range(3):
        optimizer.zero_grad()
        F.cross_entropy(model(torch.randn(2, 50)), torch.randint(30, (2,))).backward()
        optimizer.step()
        assert finite(model, optimizer)
    for block in optimizer.blocks.values():
        assert (block.eigenvalues >= 0).all()
        assert block.eigenvalues.isfinite().all()

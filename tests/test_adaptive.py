"""Damping that follows the loss: the ratio of what a step does to it to what is predicted."""

from __future__ import annotations

import copy
import io
import math
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import tekfac
from harness import METHODS, NETWORKS, RESCALED, SideBySide, batch
from processes import together
from reference import Mean

Closure = Callable[[], Tensor]
EVERY = 2
DECAY = 0.9


def rule(ratio: float = 0.3, **options: Any) -> tekfac.AdaptiveDamping:
    return tekfac.AdaptiveDamping(ratio, **{"every": EVERY, "decay": DECAY, **options})


def exact(model: nn.Module, method: str = "TEKFAC", **options: Any) -> tekfac.NaturalGradient:
    """Measured anew in every step, of half the squared error if nothing else is said."""
    every = {"factor_every": 1, "basis_every": 1}
    if method in RESCALED:
        every["scale_every"] = 1
    options = {
        "momentum": 0.0, "rms_clip": None, "damping": rule(), "fisher": "exact",
        "likelihood": "gaussian", "rank": None, "factor_rows": None, **every, **options,
    }  # fmt: skip
    optimizer: tekfac.NaturalGradient = getattr(tekfac, method)(model, **options)
    return optimizer


def half_square(output: Tensor, target: Tensor) -> Tensor:
    return F.mse_loss(output, target) / 2


def closure_of(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    x: Tensor,
    y: Tensor,
    loss: Callable[[Tensor, Tensor], Tensor] = half_square,
) -> Closure:
    def closure() -> Tensor:
        optimizer.zero_grad()
        value = loss(model(x), y)
        value.backward()
        return value

    return closure


def regression(outputs: int = 1) -> tuple[nn.Module, Tensor, Tensor]:
    torch.manual_seed(0)
    return (
        nn.Sequential(nn.Linear(4, outputs)).double(),
        torch.randn(30, 4, dtype=torch.float64) * torch.tensor([3.0, 1.0, 0.5, 0.1]),
        torch.randn(30, outputs, dtype=torch.float64),
    )


def ratio_of(optimizer: tekfac.NaturalGradient) -> float:
    found: float = optimizer.param_groups[0]["damping"].ratio
    return found


# -- what is compared ------------------------------------------------------------------------------


# The step in Newton's, and what the ratio is to be multiplied by. The curvature is held to be a
# quarter of what it is: ρ = (1 − s/2) / (1 − s/8).
@pytest.mark.parametrize(
    ("step", "factor"),
    [(0.5, DECAY**EVERY), (1.2, 1.0), (1.8, DECAY**-EVERY), (2.2, DECAY**-EVERY)],
)
@pytest.mark.parametrize("method", METHODS)
def test_linear_regression(method: str, step: float, factor: float) -> None:
    """One output: the loss is a quadratic, whose matrix (X, 1)ᵀ(X, 1)/N any method knows whole."""
    model, x, y = regression()
    damping = rule(1e-16, minimum=1e-20)
    options = {"likelihood": tekfac.Gaussian(variance=4.0), "damping": damping}
    optimizer = exact(model, method, lr=step / 4, **options)
    closure = closure_of(model, optimizer, x, y)
    rows = torch.cat([x, torch.ones(30, 1, dtype=x.dtype)], 1)
    for number in range(2 * EVERY):
        loss, before = closure().item(), flat(model.parameters())
        gradient = flat(p.grad for p in model.parameters())
        ratio = ratio_of(optimizer)
        optimizer.step(closure)
        if (number + 1) % EVERY:
            assert ratio_of(optimizer) == ratio
            continue
        delta = flat(model.parameters()) - before
        predicted = gradient @ delta + delta @ (rows.T @ rows / 120) @ delta / 2
        expected = (half_square(model(x), y).item() - loss) / predicted.item()
        assert optimizer.reduction_ratio == pytest.approx(expected, rel=1e-9)
        assert optimizer.reduction_ratio == pytest.approx((1 - step / 2) / (1 - step / 8), rel=1e-5)
        assert ratio_of(optimizer) == pytest.approx(ratio * factor, rel=1e-12)


@pytest.mark.parametrize(
    ("network", "lr", "seen"), [("mlp", 0.1, DECAY), ("flattened", 0.3, 1 / DECAY)]
)
@pytest.mark.parametrize("method", METHODS)
def test_training_goes_as_with_dense_matrices(
    method: str, network: str, lr: float, seen: float
) -> None:
    """Steps, comparisons and what follows from them, against the reference's."""
    torch.manual_seed(3)
    pair = SideBySide(NETWORKS[network](), method, damping=Mean(0.3), lr=lr, momentum=0.5)
    pair.fast.param_groups[0]["damping"] = rule(every=1)
    x, y = batch(network, 6)
    closure = closure_of(pair.model, pair.fast, x, y, F.cross_entropy)
    twin, slow, factors = pair.slow.model, pair.slow, []
    for _ in range(3):
        twin.zero_grad()
        loss = F.cross_entropy(twin(x), y)
        loss.backward()
        before = {name: matrix_of(layer) for name, layer in slow.layers.items()}
        slow.step(x, y, pair.loss, pair.draws)
        predicted = torch.zeros((), dtype=torch.float64)
        for name, layer in slow.layers.items():
            delta = (matrix_of(layer) - before[name]).flatten()
            predicted += flat([matrix_of(layer, gradient=True)]) @ delta
            predicted += delta @ slow.dense(name) @ delta / 2
        reduction = (F.cross_entropy(twin(x), y) - loss).item() / predicted.item()
        pair.fast.step(closure)
        assert predicted < 0
        assert pair.fast.reduction_ratio == pytest.approx(reduction, rel=1e-5)
        factors.append(DECAY if reduction > 3 / 4 else 1 / DECAY if reduction < 1 / 4 else 1.0)
        slow.damping = Mean(slow.damping.ratio * factors[-1])
        assert ratio_of(pair.fast) == pytest.approx(slow.damping.ratio, rel=1e-12)
    assert seen in factors
    pair.check_parameters()


def flat(tensors: Iterable[Tensor]) -> Tensor:
    return torch.cat([each.detach().flatten() for each in tensors])


def matrix_of(layer: nn.Module, gradient: bool = False) -> Tensor:
    weight, bias = ((p.grad if gradient else p.detach()) for p in (layer.weight, layer.bias))
    return torch.cat([weight.flatten(1), bias[:, None]], 1)


def test_it_stays_between_its_bounds() -> None:
    narrow = rule(0.3, minimum=0.29, maximum=0.31)
    assert narrow.after(0.9).ratio == 0.29
    assert narrow.after(0.1).ratio == 0.31
    assert narrow.after(math.nan) is narrow
    assert narrow.after(-math.inf).ratio == 0.31


def test_groups_have_rules_of_their_own() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 1)).double()
    _, x, y = regression()
    groups = [
        {"params": model[0].parameters(), "damping": rule(1.0, every=1)},
        {"params": model[2].parameters(), "damping": tekfac.MeanDamping(2.0)},
    ]
    optimizer = exact(model, lr=0.01, params=groups)
    optimizer.step(closure_of(model, optimizer, x, y))
    assert [group["damping"] for group in optimizer.param_groups] == [
        rule(DECAY, every=1), tekfac.MeanDamping(2.0),
    ]  # fmt: skip


def test_what_has_no_block_counts_by_its_gradient() -> None:
    """The loss is linear in it."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 1), Added()).double()
    _, x, y = regression()
    optimizer = exact(model, lr=0.0, damping=rule(every=1), first_order=tekfac.Adam(lr=1e-2))
    optimizer.param_groups[0]["base_lr"] = 0.0
    optimizer.step(closure_of(model, optimizer, x, y, lambda out, y: out.mean()))
    assert optimizer.reduction_ratio == pytest.approx(1.0, rel=1e-9)


class Added(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.shift = nn.Parameter(torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.shift


# -- where nothing can be said ---------------------------------------------------------------------


def test_a_step_without_length_says_nothing() -> None:
    model, x, y = regression()
    optimizer = exact(model, lr=0.0, damping=rule(every=1))
    optimizer.step(closure_of(model, optimizer, x, y))
    assert optimizer.reduction_ratio is not None
    assert math.isnan(optimizer.reduction_ratio)
    assert ratio_of(optimizer) == 0.3


def test_a_change_below_the_precision_of_the_loss_says_nothing() -> None:
    model, x, y = regression()
    optimizer = exact(model, lr=1e-3, damping=rule(every=1))
    optimizer.step(closure_of(model, optimizer, x, y, lambda o, y: half_square(o, y) + 1e13))
    assert optimizer.reduction_ratio is not None
    assert math.isnan(optimizer.reduction_ratio)


def test_a_loss_that_is_not_finite_after_the_step_raises_it() -> None:
    model, x, y = regression()
    optimizer = exact(model, lr=0.1, damping=rule(every=1))
    calls = []

    def loss(output: Tensor, target: Tensor) -> Tensor:
        calls.append(0)
        return half_square(output, target) + (math.inf if len(calls) == 2 else 0.0)

    optimizer.step(closure_of(model, optimizer, x, y, loss))
    assert optimizer.reduction_ratio == -math.inf
    assert ratio_of(optimizer) == pytest.approx(0.3 / DECAY)


# -- what the second evaluation leaves alone -------------------------------------------------------


def noisy() -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(
        nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Tanh(), nn.Linear(8, 1)
    ).double()


def test_the_second_evaluation_leaves_no_trace() -> None:
    """Two runs, one without comparisons, are the same; both evaluations have the same dropout."""
    _, x, y = regression()
    runs = []
    for every in (1, 1000):
        model = noisy()
        optimizer = exact(
            model, lr=1e-9, damping=rule(0.3, every=every, minimum=0.3, maximum=0.3),
            factor_every=2, scale_every=2, interval_warmup=False,
        )  # fmt: skip
        # What only a backward pass draws.
        model[0].weight.register_hook(lambda _: torch.rand(1) and None)
        closure = closure_of(model, optimizer, x, y)
        torch.manual_seed(2)
        losses = [optimizer.step(closure).item() for _ in range(4)]
        runs.append(
            [losses, *model.parameters(), *(p.grad for p in model.parameters()), *model.buffers(),
             torch.rand(3), *flat_state(optimizer)]
        )  # fmt: skip
        assert model[1].num_batches_tracked == 4
        if every == 1:
            # So small a step leaves the loss nearly as it is, if the random numbers are the same.
            assert optimizer.reduction_ratio == pytest.approx(1.0, rel=1e-2)
    for one, other in zip(*runs, strict=True):
        assert torch.equal(one, other) if isinstance(one, Tensor) else one == other


def flat_state(optimizer: tekfac.NaturalGradient) -> list[Tensor]:
    state = optimizer.state_dict()["state"]
    return [value for each in state.values() for value in each.values()]


@pytest.mark.parametrize("set_to_none", [True, False])
def test_the_gradient_stays(set_to_none: bool) -> None:
    model, x, y = regression()
    optimizer = exact(model, lr=0.1, damping=rule(every=1))

    def closure() -> float:
        optimizer.zero_grad(set_to_none)
        loss = half_square(model(x), y)
        loss.backward()
        grads.append([p.grad for p in model.parameters()])
        return loss.item()

    grads: list[list[Tensor | None]] = []
    for _ in range(3):
        optimizer.step(closure)
        first, second = grads[-2:]
        assert second == [None, None]
        for p, grad in zip(model.parameters(), first, strict=True):
            assert p.grad is grad
            assert bool(grad.any())
    assert torch.is_grad_enabled()
    assert not tekfac.measuring()


def test_hooks_can_tell_it() -> None:
    model, x, y = regression()
    seen: list[bool] = []
    model.register_forward_pre_hook(lambda *_: seen.append(tekfac.measuring()))
    optimizer = exact(model, damping=rule(every=1))
    optimizer.step(closure_of(model, optimizer, x, y))
    assert seen == [False, True]


# -- states ----------------------------------------------------------------------------------------


def test_resumes_bit_for_bit() -> None:
    _, x, y = regression()
    torch.manual_seed(4)
    whole, first = (noisy().float() for _ in range(2))
    x, y = x.float(), y.float()

    ratios = set()

    def run(model: nn.Module, optimizer: tekfac.NaturalGradient, steps: int) -> None:
        for _ in range(steps):
            torch.manual_seed(optimizer.counters["steps"])
            optimizer.step(closure_of(model, optimizer, x, y))
            ratios.add(ratio_of(optimizer))

    def new(model: nn.Module) -> tekfac.NaturalGradient:
        return tekfac.TEKFAC(
            model, lr=0.5, momentum=0.0, rms_clip=None, likelihood="gaussian", damping=rule()
        )

    reference, half = new(whole), new(first)
    run(whole, reference, 9)
    run(first, half, 5)
    second = noisy().float()
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    resumed = tekfac.TEKFAC(second, likelihood="gaussian")
    resumed.load_state_dict(torch_round_trip(half.state_dict()))
    assert resumed.reduction_ratio == half.reduction_ratio
    assert resumed.param_groups[0]["damping"] == half.param_groups[0]["damping"]
    run(second, resumed, 4)
    assert len(ratios) > 1
    assert resumed.param_groups[0]["damping"] == reference.param_groups[0]["damping"]
    assert resumed.reduction_ratio == reference.reduction_ratio
    for p, q in zip(whole.parameters(), second.parameters(), strict=True):
        assert torch.equal(p, q)


def torch_round_trip(state: dict[str, Any]) -> dict[str, Any]:
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    loaded: dict[str, Any] = torch.load(file, weights_only=True)
    return loaded


# -- what is refused -------------------------------------------------------------------------------


def test_without_a_closure() -> None:
    model, x, y = regression()
    optimizer = exact(model)
    before = flat(model.parameters())
    half_square(model(x), y).backward()
    with pytest.raises(RuntimeError, match=r"call step\(closure\).*GradScaler"):
        optimizer.step()
    assert torch.equal(before, flat(model.parameters()))


def test_under_a_scaler() -> None:
    model, x, y = regression()
    optimizer = exact(model.float())
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0)
    scaler.scale(half_square(model(x.float()), y.float())).backward()
    with pytest.raises(RuntimeError, match="AdaptiveDamping evaluates the loss again"):
        scaler.step(optimizer)


def test_gradients_from_before() -> None:
    model, x, y = regression()
    optimizer = exact(model, damping=rule(every=1))

    def closure() -> Tensor:
        loss = half_square(model(x), y)
        loss.backward()
        return loss

    optimizer.step(closure)
    with pytest.raises(RuntimeError, match="gradients before: have the closure call"):
        optimizer.step(closure)


def test_parts_accumulated_inside_of_the_closure() -> None:
    model, x, y = regression()
    ratios = []
    for parts in (1, 3):
        twin = copy.deepcopy(model)
        optimizer = exact(twin, damping=rule(every=1))

        def closure(twin: nn.Module = twin, parts: int = parts) -> float:
            twin.zero_grad()
            total = 0.0
            for some, wanted in zip(x.chunk(parts), y.chunk(parts), strict=True):
                loss = half_square(twin(some), wanted) / parts
                loss.backward()
                total += loss.item()
            return total

        for _ in range(2):
            optimizer.step(closure)
        ratios.append(optimizer.reduction_ratio)
    assert ratios[0] == pytest.approx(ratios[1], rel=1e-6)


@pytest.mark.parametrize("wrong", [None, torch.zeros(2), "0.1"], ids=str)
def test_a_closure_that_returns_no_loss(wrong: Any) -> None:
    model, x, y = regression()
    optimizer = exact(model, damping=rule(every=1))
    closure = closure_of(model, optimizer, x, y)
    with pytest.raises(TypeError, match="a closure that returns the loss, a number, got"):
        optimizer.step(lambda: closure() and wrong)


def test_a_backward_pass_that_cannot_be_left_out() -> None:
    model, x, y = regression()
    optimizer = exact(model, damping=rule(every=1))

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = half_square(model(x), y)
        torch.autograd.backward(loss)
        return loss

    with pytest.raises(RuntimeError, match=r"have the closure call loss.backward\(\)"):
        optimizer.step(closure)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"ratio": 0.0}, "ratio must be positive and finite, got 0.0"),
        ({"every": 0}, "every must be a whole number of at least 1, got 0"),
        ({"decay": 1.0}, "decay must be above 0 and below 1, got 1.0"),
        ({"ratio": 2.0, "maximum": 1.0}, "between minimum=0.001 and maximum=1.0, got 2.0"),
    ],
)
def test_numbers_out_of_range(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=f"AdaptiveDamping's .*{words}"):
        tekfac.AdaptiveDamping(**options)


# -- several ranks ---------------------------------------------------------------------------------


def ranked(placement: str) -> tuple[list[float], list[Tensor]]:
    rank = dist.get_rank()
    _, x, y = regression()
    model = noisy_free()
    called = DistributedDataParallel(model)
    optimizer = exact(called, damping=rule(every=1), lr=1.0, placement=placement)
    closure = closure_of(called, optimizer, x.chunk(2)[rank], y.chunk(2)[rank])
    found = []
    for _ in range(4):
        optimizer.step(closure)
        found.append(optimizer.reduction_ratio)
    return found, [flat(model.parameters())]


def noisy_free() -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1)).double()


@pytest.mark.parametrize("placement", ["replicated", "sharded"])
def test_ranks_go_by_one_ratio(placement: str) -> None:
    _, x, y = regression()
    model = noisy_free()
    optimizer = exact(model, damping=rule(every=1), lr=1.0)
    expected = []
    for _ in range(4):
        optimizer.step(closure_of(model, optimizer, x, y))
        expected.append(optimizer.reduction_ratio)
    results = together(2, ranked, placement)
    for found, [parameters] in results:
        assert found == pytest.approx(expected, rel=1e-7)
        torch.testing.assert_close(parameters, flat(model.parameters()))
    assert results[0][0] == results[1][0]
